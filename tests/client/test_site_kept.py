"""What a site keeps between rounds: SCAFFOLD's control variate, what FedSA leaves it."""

import dataclasses

import numpy as np
import pytest

from huizhen.client.ledger import Ledger
from huizhen.client.local_trainer import LocalTrainer
from huizhen.client.outbox import Outbox
from huizhen.client.site import Site
from huizhen.protocol.errors import ProtocolError, StorageError
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.strategy_terms import StrategyTerms
from huizhen.server.rounds import Coordinator

STEPS = {"length": "steps", "local_steps": 3, "optimizer": "sgd", "momentum": 0.0,
         "head_optimizer": None, "learning_rate": 0.02, "count": 5}  # fmt: skip


@pytest.fixture
def make_kept(tiny_classifier, with_terms):
    def make(name, unit="none"):
        study = with_terms(tiny_classifier.study, privacy={"unit": unit}, rounds=STEPS)
        return dataclasses.replace(study, strategy=StrategyTerms(name=name))

    return make


class Recording:
    """A trainer that notes what it is given and gives to be kept."""

    def __init__(self, trainer):
        self.trainer, self.given, self.gave = trainer, [], []

    def ready(self):
        return self.trainer.ready()

    def train(self, announcement, round, kept):
        trained = self.trainer.train(announcement, round, kept)
        self.given.append(kept)
        self.gave.append(trained.kept)
        return trained

    def metrics(self, announcement):
        return self.trainer.metrics(announcement)


@pytest.fixture
def trainer(tiny_classifier, make_site, rows):
    def make(study):
        model = tiny_classifier
        examples = make_site(model, rows)
        return Recording(LocalTrainer("A", study, examples, model, model.first_tensors(0)))

    return make


class Rounds:
    """A coordinator of one site's study, round by round."""

    def __init__(self, study, model):
        alone = dataclasses.replace(study, sites={"A": study.sites["A"]})
        self.study, self.coordinator = alone, Coordinator(alone, model.shapes)
        self.state = self.coordinator.first(model.first_tensors(0))

    def asked(self):
        return self.coordinator.announcement(self.state), self.state.round

    def take(self, envelope):
        self.state, receipt = self.coordinator.receive(self.state, envelope.data)
        assert receipt.refusal is None
        self.state = self.coordinator.close_round(self.state)


def same(one, other):
    return one.keys() == other.keys() and all((one[n] == other[n]).all() for n in one)


@pytest.mark.parametrize("name", ["scaffold", "fedsa"])
def test_what_is_kept_goes_to_the_next_round_and_nowhere_else(
    tiny_classifier, make_kept, trainer, name
):
    rounds = Rounds(make_kept(name), tiny_classifier)
    training = trainer(rounds.study)
    site = Site("A", rounds.study, training)
    for _ in range(3):
        envelope, _ = site.answer(*rounds.asked())
        sent = rounds.coordinator.sent_shapes(rounds.state)
        assert not any(name.endswith(".control") for name in sent)
        if name == "fedsa":
            assert all(one.endswith(".lora_A") for one in sent)
        rounds.take(envelope)
    assert training.given[0] == {}
    assert same(training.given[1], training.gave[0])
    assert same(training.given[2], training.gave[1])
    assert not same(training.gave[1], training.gave[0])


def test_fedsa_trains_on_from_the_sites_own_factors(tiny_classifier, make_kept, trainer):
    rounds = Rounds(make_kept("fedsa"), tiny_classifier)
    training = trainer(rounds.study)
    site = Site("A", rounds.study, training)
    for _ in range(2):
        rounds.take(site.answer(*rounds.asked())[0])
    head, b = "head.weight", next(n for n in tiny_classifier.shapes if n.endswith(".lora_B"))
    first, second = training.gave
    assert np.abs(first[b]).max() > 0
    # one round of so few steps moves it from where the round before ended, not from the start
    for tensor in (head, b):
        begin = tiny_classifier.first_tensors(0)[tensor]
        assert np.abs(second[tensor] - first[tensor]).max() > 0
        assert np.linalg.norm(second[tensor] - begin) > np.linalg.norm(first[tensor] - begin)


def test_scaffold_corrects_each_step_and_sends_its_gradients_alone(
    tiny_classifier, make_kept, trainer
):
    """At one site c is c_i: no correction. With a c_i of 0, the model ends −K·η·c further."""
    rounds = Rounds(make_kept("scaffold"), tiny_classifier)
    training = trainer(rounds.study)
    site = Site("A", rounds.study, training)
    rounds.take(site.answer(*rounds.asked())[0])
    asked, ends, sent = rounds.asked(), {}, {}
    zero = {n: np.zeros_like(v) for n, v in training.gave[0].items()}
    for name, kept in (("plain", {}), ("alike", training.gave[0]), ("moved", zero)):
        sent[name] = training.trainer.train(*asked, kept).update
        ends[name] = tiny_classifier.read(frozenset(sent[name]))
    c, travel = rounds.state.strategy.moments["c"], 3 * 0.02
    for name in ("head.bias", "head.weight"):
        assert ends["alike"][name] == pytest.approx(ends["plain"][name], abs=1e-6)
        # the gradients differ a little, for the steps lead elsewhere
        away, whole = ends["moved"][name] - ends["plain"][name], np.linalg.norm(travel * c[name])
        assert np.linalg.norm(away + travel * c[name]) < 0.2 * whole
        assert np.linalg.norm(sent["moved"][name] - sent["plain"][name]) < 0.2 * whole
        assert whole > 1e-4
    x = rounds.coordinator.first(tiny_classifier.first_tensors(0)).strategy.x
    assert x.keys() == rounds.state.strategy.x.keys()
    for name, u in sent["plain"].items():  # without a correction it is what training added
        moved = ends["plain"][name] - rounds.state.strategy.x[name]
        assert u == pytest.approx(moved, rel=1e-3, abs=1e-6)


def test_a_coordinator_cannot_steer_what_a_private_site_sends_by_what_it_announces(
    tiny_classifier, make_kept, trainer, ledger
):
    """A c beyond all bounds: the update is still clipped gradients and noise, and it leaves."""
    rounds = Rounds(make_kept("scaffold", "patient"), tiny_classifier)
    training = trainer(rounds.study)
    site = Site("A", rounds.study, training, ledger=ledger)
    rounds.take(site.answer(*rounds.asked())[0])
    strategy = rounds.state.strategy
    lie = {name: np.full_like(value, 3e37) for name, value in strategy.moments["c"].items()}
    rounds.state = dataclasses.replace(
        rounds.state, strategy=dataclasses.replace(strategy, moments={"c": lie})
    )
    envelope, _ = site.answer(*rounds.asked())
    sent = rounds.coordinator.check(rounds.state, envelope.data)
    assert not isinstance(sent, str)
    assert max(np.abs(value).max() for value in sent.tensors.values()) < 100


def test_what_is_kept_of_another_adapter_is_refused(tiny_classifier, make_kept, trainer):
    rounds = Rounds(make_kept("scaffold"), tiny_classifier)
    training = trainer(rounds.study)
    with pytest.raises(ProtocolError, match="what was kept is of another adapter"):
        training.train(*rounds.asked(), {"head.bias.control": np.zeros(1, np.float32)})


@pytest.fixture
def ledger(tmp_path):
    cap = Cap(epsilon=8.5, delta=1e-3)
    path = tmp_path / "site" / "ledger.sqlite"
    with Ledger.create(path, site="A", cohort="rare", cap=cap) as made:
        yield made


def test_a_private_site_that_starts_anew_goes_on_with_what_it_had(
    tiny_classifier, make_kept, trainer, ledger
):
    """Kept beside the update that the ledger names; the last one's is removed."""
    rounds = Rounds(make_kept("scaffold", "patient"), tiny_classifier)
    training = trainer(rounds.study)
    for round in range(3):
        site = Site("A", rounds.study, training, ledger=ledger)  # another process, each time
        rounds.take(site.answer(*rounds.asked())[0])
        places = list((Outbox.beside(ledger.path).folder / site.digest).glob("*.own"))
        assert len(places) == 1
        if round:
            assert same(training.given[round], training.gave[round - 1])
    places[0].write_bytes(b"damaged")
    rounds.take(Site("A", rounds.study, training, ledger=ledger).answer(*rounds.asked())[0])
    assert training.given[-1] == {}


def test_what_an_unanswered_round_kept_is_never_used(
    tiny_classifier, make_kept, trainer, ledger, monkeypatch
):
    """It is noised by a round that nobody has: only what the ledger names may be built upon."""
    rounds = Rounds(make_kept("scaffold", "patient"), tiny_classifier)
    training = trainer(rounds.study)
    rounds.take(Site("A", rounds.study, training, ledger=ledger).answer(*rounds.asked())[0])

    def full(*arguments):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "answer", full)
        with pytest.raises(StorageError, match="the disk is full"):
            Site("A", rounds.study, training, ledger=ledger).answer(*rounds.asked())
    Site("A", rounds.study, training, ledger=ledger).answer(*rounds.asked())
    assert same(training.given[2], training.gave[0])
    assert not same(training.given[2], training.gave[1])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_kept_is_of_the_update_as_it_arrives(
    tiny_classifier, make_kept, trainer, with_terms, dtype
):
    """Else c, which the coordinator makes of rounded updates, would drift from the mean of c_i."""
    study = with_terms(make_kept("scaffold"), rounds={**STEPS, "update_dtype": dtype})
    rounds = Rounds(study, tiny_classifier)
    training = trainer(rounds.study)
    site = Site("A", rounds.study, training)
    for _ in range(3):
        rounds.take(site.answer(*rounds.asked())[0])
        c = rounds.state.strategy.moments["c"]
        for name, value in c.items():
            assert training.gave[-1][f"{name}.control"] == pytest.approx(value, rel=1e-5, abs=1e-7)
