"""Every strategy, the whole way: sites train, the coordinator averages, the model is used."""

import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from huizhen.protocol.strategy_terms import PARAMETERS
from huizhen.simulations import federation
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.runner import run_experiment

ROUNDS = 4
SGD = [
    ("local_steps = 2", "local_steps = 4\nlength = 'steps'\noptimizer = 'sgd'\nmomentum = 0.0"),
    ("learning_rate = 1e-2", "learning_rate = 0.1"),
]


@pytest.fixture
def run(experiment_file, home, tmp_path):
    """Run a federation of two hospitals and return its folder, its arm and what it came to."""

    def run(terms, *changes, arm="federated", out="run", resume=False):
        if terms["name"] == "scaffold":
            changes = (*SGD, *changes)
        if terms["name"] == "fedsa":
            changes = (('unit = "patient"', 'unit = "none"'), *changes)
        written = "\n".join(f"{key} = {value!r}".replace("'", '"') for key, value in terms.items())
        experiment = load_experiment(
            experiment_file(
                ("[rounds]", f"[strategy]\n{written}\n\n[rounds]"),
                ("count = 2", f"count = {ROUNDS}"),
                ('site = "hospital"', f'site = "hospital"\narms = ["{arm}"]'),
                *changes,
            )
        )
        folder = tmp_path / out
        document = run_experiment(experiment, folder, home=home, resume=resume)
        return folder, document["arms"][arm]

    return run


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_federation_learns_with_each_strategy_and_its_adapter_is_exported(run, name):
    terms = {"name": name}
    if name == "ffa_refresh":
        terms["every"] = 2
    folder, arm = run(terms)
    losses = [entry["loss"] for entry in arm["rounds"]]
    assert len(losses) == ROUNDS
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    place = folder / "federated" / ("North" if name == "fedsa" else "")
    exported = load_file(place / "adapter_model.safetensors")
    ranks = {value.shape[0] for key, value in exported.items() if key.endswith("lora_A.weight")}
    # two sites of rank 2: flora merges 4 ranks in each round, fedex what differs, 2, ffa_refresh 2
    # twice
    assert ranks == {{"flora": 18, "fedex": 10, "ffa_refresh": 6}.get(name, 2)}
    for key in (key for key in exported if key.endswith("lora_A.weight")):
        left = exported[key.replace("lora_A", "lora_B")].astype(np.float64)
        assert np.abs(left @ exported[key]).max() > 0
    down = [entry["bytes_down"] for entry in arm["rounds"]]
    is_growing = name in ("flora", "fedex", "ffa_refresh", "scaffold")  # which begins without c
    assert (down[-1] > down[0]) is is_growing


@pytest.mark.parametrize(
    "name", ["fedprox", "scaffold", "fed_sb", "ffa_refresh", "rolora", "svd", "flora"]
)
def test_a_private_federation_runs_with_each_kind_of_strategy(run, name):
    own = {"every": 2} if name == "ffa_refresh" else {}
    _, arm = run({"name": name, **own}, arm="federated_dp")
    assert all(7.9 < spent <= 8 for spent in arm["epsilon"].values())
    assert len(arm["rounds"]) == ROUNDS


@pytest.mark.parametrize(
    ("name", "terms", "most"),
    [
        ("ffa_ortho", "update_dtype = 'float16'", 0.75),
        ("fedex", "update_dtype = 'int8'", 0.85),
        ("fedavg", "update_dtype = 'int8'\nupdate_share = 0.25", 0.75),
        ("svd", "update_share = 0.5", 0.75),
    ],
)
@pytest.mark.parametrize("arm", ["federated", "federated_dp"])
def test_updates_travel_in_fewer_bytes_and_the_federation_learns(run, name, terms, most, arm):
    """The tiny adapter's headers are a good part of its bytes, and they do not shrink."""
    _, whole = run({"name": name}, arm=arm, out="whole")
    _, fewer = run({"name": name}, ("count = 4", f"count = 4\n{terms}"), arm=arm)
    for one, other in zip(fewer["rounds"], whole["rounds"], strict=True):
        assert one["bytes_up"] < most * other["bytes_up"]
    if arm == "federated":
        assert fewer["rounds"][-1]["loss"] < fewer["rounds"][0]["loss"]


@pytest.mark.parametrize("name", ["ffa_ortho", "svd"])
def test_a_hospital_whose_hardware_carries_less_takes_part(run, name):
    sites = "[sites.North]\npatients_public = 10\nrank = 1\n[sites.South]\npatients_public = 10\n"
    _, whole = run({"name": name}, out="whole")
    _, arm = run({"name": name}, ("[simulation]", f"{sites}\n[simulation]"))
    sent = [[entry["bytes_up"] for entry in one["rounds"]] for one in (arm, whole)]
    assert all(less < all_ranks for less, all_ranks in zip(*sent, strict=True))
    losses = [entry["loss"] for entry in arm["rounds"]]
    assert losses[-1] < losses[0]


def test_the_arms_of_one_site_train_without_what_combines_many(run):
    _, arm = run({"name": "fedadam"}, arm="pooled")
    _, plain = run({"name": "fedavg"}, arm="pooled", out="plain")
    assert arm["per_seed"][0]["adapter"] == plain["per_seed"][0]["adapter"]


@pytest.mark.parametrize("name", ["scaffold", "fedsa"])
def test_a_run_that_is_resumed_goes_on_with_what_the_sites_had_kept(run, name, monkeypatch):
    folder, whole = run({"name": name}, out="whole")
    own = federation._run_round

    def stopped(coordinator, state, *rest):
        if state.round == 3:
            raise KeyboardInterrupt
        return own(coordinator, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(federation, "_run_round", stopped)
        with pytest.raises(KeyboardInterrupt):
            run({"name": name}, out="stopped")
    again, arm = run({"name": name}, out="stopped", resume=True)
    assert arm["metrics"] == whole["metrics"]
    files = sorted(p.relative_to(folder) for p in folder.rglob("adapter_model.safetensors"))
    assert files
    for place in files:
        assert (again / place).read_bytes() == (folder / place).read_bytes()


def test_with_fedsa_each_hospital_has_a_model_of_its_own(run):
    folder, _ = run({"name": "fedsa"})
    found = {
        site: load_file(folder / "federated" / site / "adapter_model.safetensors")
        for site in ("North", "South")
    }
    assert not (folder / "federated" / "adapter_model.safetensors").exists()
    for name, value in found["North"].items():
        is_alike = np.array_equal(value, found["South"][name])
        assert is_alike == name.endswith("lora_A.weight")
