"""A site believes its trainer only what it can check, and pays for nothing that it cannot train."""

import contextlib
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from huizhen.client.ledger import Ledger
from huizhen.client.local_trainer import LocalTrainer
from huizhen.client.outbox import Outbox
from huizhen.client.site import Site
from huizhen.protocol.errors import (
    HuizhenError,
    PrivacyError,
    ProtocolError,
    ReleaseLostError,
    StorageError,
)
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.wire import Message, encode
from huizhen.strategies.catalogue import make_strategy


@pytest.fixture
def measuring(tiny_classifier, with_terms):
    terms = {"unit": "patient", "metrics_epsilon": 2.0}
    return with_terms(tiny_classifier.study, privacy=terms)


@pytest.fixture
def new_ledger(tmp_path):
    """Return a ledger whose cap has room for the study and two releases of metrics."""
    with contextlib.ExitStack() as open_ledgers:

        def new(name):
            cap = Cap(epsilon=8.5, delta=1e-3, metrics_epsilon=5.0)
            made = Ledger.create(tmp_path / name / "x.sqlite", site="A", cohort="rare", cap=cap)
            return open_ledgers.enter_context(made)

        yield new


@pytest.fixture
def rich_ledger(new_ledger):
    return new_ledger("rich")


def announcement(model, study, round=1, /, **changes):
    strategy = make_strategy(study)
    x = strategy.init(model.first_tensors(study.study.seed)).x
    tensors = {name: x[name] for name in strategy.trains(model.shapes, round)}
    terms = {"kind": "adapter", "study": study.digest(), "round": round, "site": ""}
    return encode(Message(**(terms | {"tensors": tensors} | changes)))


class Changed:
    """A trainer whose answers a test changes, one at a time."""

    def __init__(self, trainer):
        self.trainer, self.facts, self.released, self.update = trainer, {}, None, None
        self.error: HuizhenError | None = None

    def ready(self):
        if self.error is not None:
            raise self.error
        return dataclasses.replace(self.trainer.ready(), **self.facts)

    def train(self, announcement, round, kept):
        trained = self.trainer.train(announcement, round, kept)
        return dataclasses.replace(trained, update=self.update or trained.update)

    def metrics(self, announcement):
        return self.released or self.trainer.metrics(announcement)


@pytest.fixture
def changed(tiny_classifier, measuring, make_parts, rows, rich_ledger):
    """Return a site of a private study, and its trainer to change."""
    model = tiny_classifier
    examples, held = make_parts(model, rows, [(f"h{i}", "fever", "flu") for i in range(40)])
    first = model.first_tensors(0)
    trainer = Changed(LocalTrainer("A", measuring, examples, model, first, held_out=held))
    return Site("A", measuring, trainer, ledger=rich_ledger), trainer


@pytest.mark.parametrize("wrong", [{"site": "B"}, {"study": "00" * 32}])
def test_a_trainer_of_another_site_or_study_is_refused_before_anything_is_reserved(
    changed, measuring, new_ledger, wrong
):
    """As one of the same study without privacy would be, whose updates carry no noise."""
    _, trainer = changed
    trainer.facts, ledger = wrong, new_ledger("other")
    with pytest.raises(PrivacyError, match="made for another site or study"):
        Site("A", measuring, trainer, ledger=ledger)
    assert ledger.head().sequence == 1


def test_a_trainer_without_privacy_is_not_taken_for_a_private_study(
    tiny_classifier, measuring, with_terms, make_site, rows, new_ledger
):
    model, plain = tiny_classifier, with_terms(measuring, privacy={"unit": "none"})
    examples = make_site(model, rows)
    noiseless = LocalTrainer("A", plain, examples, model, model.first_tensors(0))
    with pytest.raises(PrivacyError, match="made for another site or study"):
        Site("A", measuring, noiseless, ledger=new_ledger("plain"))


@pytest.mark.parametrize("changes", [{"round": 2}, {"kind": "update"}, {"study": "00" * 32}])
def test_what_no_announcement_asks_for_is_not_paid_for(
    tiny_classifier, measuring, changed, rich_ledger, changes
):
    site, _ = changed
    with pytest.raises(ProtocolError):
        site.answer(announcement(tiny_classifier, measuring, 1, **changes), 1)
    assert rich_ledger.totals().epsilon_charged == 0
    for round in (1, 2):
        site.answer(announcement(tiny_classifier, measuring, round), round)
    with pytest.raises(ProtocolError):
        site.release_metrics(announcement(tiny_classifier, measuring, 3, **changes))
    assert rich_ledger.totals().metrics_epsilon == 0


def test_a_round_is_not_paid_for_where_the_trainer_is_not_ready_or_another(
    tiny_classifier, measuring, changed, rich_ledger
):
    site, trainer = changed
    asked = announcement(tiny_classifier, measuring)
    trainer.error = StorageError("no process to train")
    with pytest.raises(StorageError, match="no process to train"):
        site.answer(asked, 1)
    trainer.error, trainer.facts = None, {"num_units": 7}
    with pytest.raises(PrivacyError, match="other records or another base"):
        site.answer(asked, 1)
    assert rich_ledger.totals().epsilon_charged == 0
    trainer.facts = {}
    site.answer(asked, 1)
    site.answer(announcement(tiny_classifier, measuring, 2), 2)
    trainer.facts = {"num_units": 7}
    with pytest.raises(PrivacyError, match="other records or another base"):
        site.release_metrics(announcement(tiny_classifier, measuring, 3))
    assert rich_ledger.totals().metrics_epsilon == 0


def test_what_a_trainer_gives_beside_the_agreed_tensors_does_not_leave(
    tiny_classifier, measuring, changed, rich_ledger
):
    site, trainer = changed
    asked = announcement(tiny_classifier, measuring)
    trainer.update = {"patients": np.zeros(3, np.float32)}
    with pytest.raises(PrivacyError, match="agreement differ in tensor"):
        site.answer(asked, 1)
    assert rich_ledger.answered(measuring.digest(), 1) is None
    trainer.update = None
    envelope, _ = site.answer(asked, 1)  # under the same charge
    assert rich_ledger.totals().epsilon_charged == Mechanism.of(measuring).epsilon_after(1)
    assert site.answer(asked, 1) == (envelope, None)


@pytest.mark.parametrize("kind", ["exact", "longer", "other site", "other budget"])
def test_bytes_of_a_trainer_that_are_not_this_sites_noised_counts_never_leave(
    tiny_classifier, measuring, changed, rich_ledger, kind
):
    site, trainer = changed
    for round in (1, 2):
        site.answer(announcement(tiny_classifier, measuring, round), round)
    final = announcement(tiny_classifier, measuring, 3)
    data = trainer.trainer.metrics(final)
    trainer.released = {
        "exact": b"exact counts: 17 patients",
        "longer": data + b" ",
        "other site": data.replace(b'"site":"A"', b'"site":"B"'),
        "other budget": data.replace(b'"epsilon_counts":2', b'"epsilon_counts":9'),
    }[kind]
    assert trainer.released != data
    with pytest.raises(ProtocolError):
        site.release_metrics(final)
    assert rich_ledger.released(measuring.digest(), "held_out") is None
    assert not list(Outbox.beside(rich_ledger.path).folder.rglob("metrics.json"))
    with pytest.raises(ReleaseLostError):  # the charge stays spent, whatever was drawn
        site.release_metrics(final)


def test_the_site_itself_imports_no_torch():
    program = (
        "import sys, huizhen.client.site;"
        "heavy = {'torch', 'transformers', 'peft', 'opacus'} & sys.modules.keys();"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)  # noqa: S603  # our own command
