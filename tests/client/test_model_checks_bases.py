"""Every base of the catalogue that is at hand can be trained privately: its records are apart."""

import pytest

from huizhen.client.model_checks import check_model
from huizhen.learning.bases import cached, resolve
from huizhen.learning.catalogue import catalogue
from huizhen.learning.model import AdaptedModel
from huizhen.protocol.errors import PrivacyError

TARGETS = {
    "minilm": ["query", "value"],
    "smollm2-135m-instruct": ["q_proj", "v_proj"],
    "gemma-3-270m": ["q_proj", "v_proj"],
}
MEMORY_MIB = 1024


@pytest.fixture(params=sorted(TARGETS))
def model(request, make_study):
    """A classifier on the base's last layer, in float32."""
    name = request.param
    if name not in {entry.name for entry in cached()}:
        pytest.skip(f"{name} is not in the cache: huizhen models fetch {name}")
    terms = {"layers": 1, "target_modules": TARGETS[name]}
    study = make_study(base={"name": name, "dtype": "float32"}, adapter=terms)
    return AdaptedModel(resolve(name), study)


@pytest.mark.slow
def test_a_base_of_the_catalogue_is_accepted(model, make_site, rows, randomised, monkeypatch):
    examples = make_site(model, rows)
    memory = check_model(model, examples, MEMORY_MIB)
    assert memory.limit == MEMORY_MIB << 20
    assert memory.per_token > 0
    randomised(model)
    check_model(model, examples, MEMORY_MIB)
    # and the check can see on this base what it looks for
    plain = model.losses

    def coupled(batch):
        losses, counts = plain(batch)
        return losses * losses.detach() / losses.detach().sum(), counts

    monkeypatch.setattr(model, "losses", coupled)
    with pytest.raises(PrivacyError, match="changes with its neighbour in the batch"):
        check_model(model, examples, MEMORY_MIB)


def test_no_base_of_the_catalogue_is_left_out():
    at_hand = {name for name, entry in catalogue().items() if entry.kind == "wheel"}
    assert at_hand == set(TARGETS)
