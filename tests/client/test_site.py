"""A site answers each round of its own study once, and nothing else; no text of a record leaves."""

import base64
import contextlib
import logging
import shutil

import numpy as np
import pytest

from huizhen.client.ledger import Ledger
from huizhen.client.local_trainer import LocalTrainer
from huizhen.client.metrics_release import release_metrics
from huizhen.client.outbox import Outbox
from huizhen.client.site import Site
from huizhen.client.trainer import DEFAULT_MEMORY_MIB
from huizhen.client.training import train_round
from huizhen.protocol.accounting import Spend, epsilon
from huizhen.protocol.errors import (
    BudgetExhaustedError,
    ConfigError,
    HuizhenError,
    PrivacyError,
    ProtocolError,
    ReleaseLostError,
)
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.metrics import parse_metrics
from huizhen.protocol.wire import Message, decode, encode
from huizhen.strategies.catalogue import make_strategy


@pytest.fixture(params=["none", "patient"])
def unit(request):
    return request.param


@pytest.fixture
def study(tiny_classifier, with_terms):
    return with_terms(tiny_classifier.study, privacy={"unit": "none"})


@pytest.fixture
def new_ledger(tmp_path):
    """Return a ledger of its own for each call; its cap covers the study once."""
    with contextlib.ExitStack() as open_ledgers:

        def new(epsilon=8.5):
            path = tmp_path / "site" / f"{len(list(tmp_path.rglob('*.sqlite')))}.sqlite"
            cap = Cap(epsilon=epsilon, delta=1e-3)
            return open_ledgers.enter_context(Ledger.create(path, site="A", cohort="rare", cap=cap))

        yield new


@pytest.fixture
def make(tiny_classifier, make_site, rows, new_ledger):
    """Return a site, in a private study with a ledger that nothing was spent of."""

    def make(study, own=rows, name="A", ledger=None):
        model, examples = tiny_classifier, make_site(tiny_classifier, own)
        if ledger is None and study.is_private:
            ledger = new_ledger()
        trainer = LocalTrainer(name, study, examples, model, model.first_tensors(0))
        return Site(name, study, trainer, ledger=ledger)

    return make


def announcement(model, study, round=1, /, **changes):
    strategy = make_strategy(study)
    x = strategy.init(model.first_tensors(study.study.seed)).x
    tensors = {name: x[name] for name in strategy.trains(model.shapes, round)}
    terms = {"kind": "adapter", "study": study.digest(), "round": round, "site": ""}
    return encode(Message(**(terms | {"tensors": tensors} | changes)))


def test_an_update_is_what_training_added_to_the_announced_adapter(tiny_classifier, study, make):
    site = make(study)
    envelope, report = site.answer(announcement(tiny_classifier, study), 1)
    names = make_strategy(study).trains(tiny_classifier.shapes, 1)
    shapes = {n: s for n, s in tiny_classifier.shapes.items() if n in names}
    update = decode(envelope.data, shapes=shapes)
    announced = decode(announcement(tiny_classifier, study), shapes=shapes)
    assert (update.kind, update.site, update.round) == ("update", "A", 1)
    after = tiny_classifier.read(names)
    for name in names:
        assert (update.tensors[name] == after[name] - announced.tensors[name]).all()
        assert not name.endswith(".lora_A")  # frozen under ffa_ortho: it does not travel
    assert any(value.any() for value in update.tensors.values())
    assert report.steps > 0


def test_a_repeated_round_without_privacy_is_refused(tiny_classifier, study, make):
    site = make(study)
    site.answer(announcement(tiny_classifier, study), 1)
    with pytest.raises(PrivacyError, match="round 1 is asked, the last answered is 1"):
        site.answer(announcement(tiny_classifier, study), 1)


def test_a_private_round_is_answered_again_with_the_same_bytes_and_no_other_way(
    tiny_classifier, study, make, with_terms, new_ledger, randomised
):
    """By the same site, by one that was started anew, and after a later round never again."""
    private, ledger = with_terms(study, privacy={"unit": "patient"}), new_ledger()
    asked = announcement(tiny_classifier, private)
    site = make(private, ledger=ledger)
    first, report = site.answer(asked, 1)
    spent = ledger.totals().epsilon_charged
    for again in (site, make(private, ledger=ledger)):
        assert again.answer(asked, 1) == (first, None)
    tensors = {n: a + 1 for n, a in tiny_classifier.first_tensors(0).items()}
    names = make_strategy(private).trains(tiny_classifier.shapes, 1)
    other = announcement(tiny_classifier, private, tensors={name: tensors[name] for name in names})
    with pytest.raises(PrivacyError, match="answers another announcement"):
        make(private, ledger=ledger).answer(other, 1)
    assert ledger.totals().epsilon_charged == spent
    assert report is not None
    make(private, ledger=ledger).answer(announcement(tiny_classifier, private, 2), 2)
    with pytest.raises(ReleaseLostError, match="nothing else may be sent"):
        make(private, ledger=ledger).answer(asked, 1)


def test_an_answer_that_is_lost_is_not_trained_again(
    tiny_classifier, study, make, with_terms, new_ledger
):
    private, ledger = with_terms(study, privacy={"unit": "patient"}), new_ledger()
    make(private, ledger=ledger).answer(announcement(tiny_classifier, private), 1)
    shutil.rmtree(Outbox.beside(ledger.path).folder)
    with pytest.raises(ReleaseLostError, match="nothing else may be sent"):
        make(private, ledger=ledger).answer(announcement(tiny_classifier, private), 1)


def test_two_sites_on_one_ledger_send_one_update(
    tiny_classifier, study, make, with_terms, new_ledger, monkeypatch
):
    """Both are granted the charge, the slower one finds the round answered."""
    private, ledger = with_terms(study, privacy={"unit": "patient"}), new_ledger()
    asked = announcement(tiny_classifier, private)
    sites = [make(private, ledger=ledger) for _ in range(2)]
    sent = []

    def overtaken(*args, **kwargs):
        monkeypatch.setattr("huizhen.client.local_trainer.train_round", train_round)
        sent.append(sites[1].answer(asked, 1)[0])
        return train_round(*args, **kwargs)

    monkeypatch.setattr("huizhen.client.local_trainer.train_round", overtaken)
    with pytest.raises(PrivacyError, match="nothing more leaves for it"):
        sites[0].answer(asked, 1)
    assert sites[0].answer(asked, 1) == (sent[0], None)


def test_a_ledger_of_another_site_or_with_a_cap_that_binds_nothing_is_refused(
    study, make, with_terms, tmp_path
):
    private = with_terms(study, privacy={"unit": "patient"})
    for name, delta, message in (("Z", 1e-3, "ledger is of site 'Z'"), ("A", 0.125, "cap's delta")):
        cap = Cap(epsilon=8.5, delta=delta)
        path = tmp_path / name / "ledger.sqlite"
        with (
            Ledger.create(path, site=name, cohort="rare", cap=cap) as ledger,
            pytest.raises(PrivacyError, match=message),
        ):
            make(private, ledger=ledger)


def test_a_site_that_keeps_a_ledger_joins_no_study_without_privacy(study, make, new_ledger):
    with pytest.raises(PrivacyError, match="would leave without noise"):
        make(study, ledger=new_ledger())


def test_an_earlier_round_is_refused(tiny_classifier, study, make):
    site = make(study)
    site.answer(announcement(tiny_classifier, study, 2), 2)
    with pytest.raises(PrivacyError, match="a study does not go back"):
        site.answer(announcement(tiny_classifier, study, 1), 1)


@pytest.mark.parametrize("round", [3, 100, 0, -1])
def test_a_round_outside_the_study_is_refused(tiny_classifier, study, make, round):
    with pytest.raises(PrivacyError, match=f"round {round} is asked"):
        make(study).answer(announcement(tiny_classifier, study, 1), round)


def test_rounds_that_were_stored_are_not_answered_again(tiny_classifier, study, make):
    site = make(study)
    site.skip_to(2)
    with pytest.raises(PrivacyError):
        site.answer(announcement(tiny_classifier, study, 1), 1)
    site.skip_to(1)  # never back
    with pytest.raises(PrivacyError):
        site.answer(announcement(tiny_classifier, study, 1), 1)
    site.answer(announcement(tiny_classifier, study, 2), 2)


def test_an_announcement_of_another_study_is_refused(tiny_classifier, study, make, with_terms):
    other = with_terms(study, rounds={"learning_rate": 0.5})
    with pytest.raises(ProtocolError, match="another study or round"):
        make(study).answer(announcement(tiny_classifier, other), 1)


@pytest.mark.parametrize("changes", [{"round": 2}, {"kind": "update"}, {"study": "00" * 32}])
def test_an_announcement_of_another_kind_round_or_study_is_refused(
    tiny_classifier, study, make, changes
):
    site = make(study)
    with pytest.raises(ProtocolError):
        site.answer(announcement(tiny_classifier, study, **changes), 1)
    site.answer(announcement(tiny_classifier, study), 1)  # and did not use up the round


def test_an_announcement_of_other_tensors_is_refused(tiny_classifier, study, make):
    tensors = {name: np.zeros(s, np.float32) for name, s in tiny_classifier.shapes.items()}
    with pytest.raises(ProtocolError):
        make(study).answer(announcement(tiny_classifier, study, tensors=tensors), 1)


def test_a_site_that_the_study_does_not_list_is_refused(study, make):
    with pytest.raises(ProtocolError, match="'C' is not in the study"):
        make(study, name="C")


def test_a_delta_not_below_one_over_the_true_patients_is_refused(study, make, with_terms, rows):
    many = [(f"{patient}-{k}", text, disease) for patient, text, disease in rows for k in range(4)]
    patients = len({row[0] for row in many})  # 32; the public size says 8
    private = with_terms(study, privacy={"unit": "patient", "delta": 1 / patients})
    with pytest.raises(PrivacyError, match="not below one over the patients of site 'A'"):
        make(private, own=many)


def test_the_mechanism_spends_the_epsilon_of_the_study_and_no_more(study, with_terms):
    private = with_terms(study, privacy={"unit": "patient"})
    found = Mechanism.of(private)
    spent = [found.epsilon_after(rounds) for rounds in (0, 1, 2)]
    assert spent[0] == 0 < spent[1] < spent[2] <= 8.0
    assert spent[2] > 7.9
    four = Spend(noise_multiplier=found.noise_multiplier, sampling_rate=0.5, steps=4)
    assert spent[2] == epsilon([four], 1e-3)  # 2 rounds of 2 steps
    assert make_strategy(private).trains({"a.lora_A": (1,)}, 1) == frozenset()


def test_a_private_update_is_noised_in_every_tensor(
    tiny_classifier, study, make, with_terms, monkeypatch
):
    """Every patient is in every step with all records: nothing but noise is left to differ."""
    terms = {"unit": "patient", "sampling_rate": 1.0, "records_per_patient": 4}
    private = with_terms(study, privacy=terms)
    names = make_strategy(private).trains(tiny_classifier.shapes, 1)
    shapes = {n: s for n, s in tiny_classifier.shapes.items() if n in names}

    def two():
        found = []
        for _ in range(2):
            envelope, _ = make(private).answer(announcement(tiny_classifier, private), 1)
            found.append(decode(envelope.data, shapes=shapes).tensors)
        return [float((found[0][name] != found[1][name]).mean()) for name in names]

    assert min(two()) > 0.9
    monkeypatch.setattr("huizhen.client.randomness.normals", np.zeros)
    assert max(two()) == 0


def test_a_private_round_is_protected_as_the_study_asks(
    tiny_classifier, study, make, with_terms, monkeypatch
):
    given = []

    def noted(*args, **kwargs):
        given.append(kwargs["protection"])
        return train_round(*args, **kwargs)

    monkeypatch.setattr("huizhen.client.local_trainer.train_round", noted)
    make(study).answer(announcement(tiny_classifier, study), 1)
    private = with_terms(study, privacy={"unit": "patient"})
    make(private).answer(announcement(tiny_classifier, private), 1)
    assert given[0] is None
    assert given[1].noise_multiplier == Mechanism.of(private).noise_multiplier
    assert given[1].memory.limit == DEFAULT_MEMORY_MIB * 2**20


def test_a_private_site_without_memory_for_its_longest_record_is_refused(
    minilm_classifier, make_site, rows, new_ledger
):
    model, study, ledger = minilm_classifier, minilm_classifier.study, new_ledger()
    examples, first = make_site(model, rows), model.first_tensors(0)

    def trainer(memory_mib):
        return LocalTrainer("A", study, examples, model, first, memory_mib=memory_mib)

    with pytest.raises(ConfigError, match=r"needs about \d+ MiB to train, memory_mib is 1"):
        Site("A", study, trainer(memory_mib=1), ledger=ledger)
    assert ledger.head().sequence == 1  # nothing was reserved
    Site("A", study, trainer(memory_mib=4), ledger=ledger)


def test_a_model_that_couples_records_is_refused_where_it_matters_and_before_it_is_paid(
    tiny_classifier, study, make, new_ledger, with_terms, monkeypatch
):
    plain = tiny_classifier.losses

    def per_token(batch):
        losses, counts = plain(batch)
        return losses / batch.mask.sum(), counts

    monkeypatch.setattr(tiny_classifier, "losses", per_token)
    ledger = new_ledger()
    with pytest.raises(PrivacyError, match="cannot be trained privately"):
        make(with_terms(study, privacy={"unit": "patient"}), ledger=ledger)
    assert ledger.head().sequence == 1
    make(study)


def test_a_private_site_without_a_ledger_is_refused(
    tiny_classifier, study, make_site, rows, with_terms
):
    model = tiny_classifier
    private = with_terms(study, privacy={"unit": "patient"})
    examples = make_site(model, rows)
    trainer = LocalTrainer("A", private, examples, model, model.first_tensors(0))
    with pytest.raises(PrivacyError, match="joins a private study without its ledger"):
        Site("A", private, trainer)


def test_a_study_that_the_cap_does_not_cover_is_refused(study, make, new_ledger, with_terms):
    with pytest.raises(BudgetExhaustedError):
        make(with_terms(study, privacy={"unit": "patient"}), ledger=new_ledger(epsilon=7.5))


def test_each_round_is_charged_before_its_first_gradient(
    tiny_classifier, study, make, new_ledger, with_terms, monkeypatch
):
    private, ledger = with_terms(study, privacy={"unit": "patient"}), new_ledger()
    site = make(private, ledger=ledger)
    seen = []

    def noted(*args, **kwargs):
        seen.append(ledger.totals().epsilon_charged)
        return train_round(*args, **kwargs)

    monkeypatch.setattr("huizhen.client.local_trainer.train_round", noted)
    assert ledger.totals().epsilon_charged == 0
    for round in (1, 2):
        site.answer(announcement(tiny_classifier, private, round), round)
    assert seen == [Mechanism.of(private).epsilon_after(rounds) for rounds in (1, 2)]


@pytest.fixture
def rich_ledger(tmp_path):
    """A ledger whose cap has room for two releases of metrics."""
    cap = Cap(epsilon=8.5, delta=1e-3, metrics_epsilon=5.0)
    with Ledger.create(tmp_path / "rich.sqlite", site="A", cohort="rare", cap=cap) as ledger:
        yield ledger


HELD_OUT = [(f"h{i}", "fever", "flu") for i in range(40)]


@pytest.fixture
def measuring(study, with_terms):
    return with_terms(study, privacy={"unit": "patient", "metrics_epsilon": 2.0})


@pytest.fixture
def join(tiny_classifier, make_parts, rows, rich_ledger):
    """Return a site with held-out patients in a study."""

    def join(study, held_out=HELD_OUT):
        model = tiny_classifier
        examples, held = make_parts(model, rows, held_out)
        first = model.first_tensors(0)
        trainer = LocalTrainer("A", study, examples, model, first, held_out=held)
        return Site("A", study, trainer, ledger=rich_ledger)

    return join


def test_metrics_leave_once_after_the_last_round_and_are_charged_before_the_noise(
    tiny_classifier, measuring, join, rich_ledger, monkeypatch
):
    site, seen = join(measuring), []

    def noted(*args, **kwargs):
        seen.append(rich_ledger.totals().metrics_epsilon)
        return release_metrics(*args, **kwargs)

    monkeypatch.setattr("huizhen.client.local_trainer.release_metrics", noted)
    final = announcement(tiny_classifier, measuring, 3)
    site.answer(announcement(tiny_classifier, measuring, 1), 1)
    with pytest.raises(PrivacyError, match="has not answered the last round"):
        site.release_metrics(final)
    site.answer(announcement(tiny_classifier, measuring, 2), 2)
    data = site.release_metrics(final)
    assert seen == [2.0]
    found = parse_metrics(data, measuring)
    assert (found.site, found.round, found.epsilon) == ("A", 2, 2.0)
    assert found.readings()["patients"].value == pytest.approx(len(HELD_OUT), abs=15)
    assert site.release_metrics(final) == data  # asked again: the same bytes, nothing more is paid
    assert rich_ledger.totals().metrics_epsilon == 2.0
    assert join(measuring).release_metrics(final) == data  # also after a restart
    names = make_strategy(measuring).trains(tiny_classifier.shapes, 3)
    tensors = {name: tiny_classifier.first_tensors(0)[name] + 1 for name in names}
    with pytest.raises(PrivacyError, match="of another announcement"):
        site.release_metrics(announcement(tiny_classifier, measuring, 3, tensors=tensors))
    [kept] = Outbox.beside(rich_ledger.path).folder.rglob("metrics.json")
    kept.write_bytes(b"exact counts: 17 patients")
    with pytest.raises(ReleaseLostError, match="was changed: nothing was sent"):
        site.release_metrics(final)
    kept.unlink()
    with pytest.raises(ReleaseLostError, match="nothing else may be sent"):
        join(measuring).release_metrics(final)
    assert rich_ledger.totals().metrics_epsilon == 2.0


def test_metrics_whose_noise_was_lost_are_not_drawn_again(
    tiny_classifier, measuring, join, rich_ledger, monkeypatch
):
    """Under a cap that has room for two."""
    site = join(measuring)
    for round in (1, 2):
        site.answer(announcement(tiny_classifier, measuring, round), round)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    final = announcement(tiny_classifier, measuring, 3)
    monkeypatch.setattr("huizhen.client.local_trainer.release_metrics", fail)
    with pytest.raises(KeyboardInterrupt):
        site.release_metrics(final)
    monkeypatch.undo()
    with pytest.raises(ReleaseLostError, match="they leave once"):
        join(measuring).release_metrics(final)
    assert rich_ledger.totals().metrics_epsilon == 2.0


def test_bytes_that_the_ledger_does_not_name_never_leave_as_metrics(
    tiny_classifier, measuring, join, rich_ledger
):
    site = join(measuring)
    Outbox.beside(rich_ledger.path).keep_metrics(measuring.digest(), b"exact counts: 17 patients")
    with pytest.raises(PrivacyError, match="has not answered the last round"):
        site.release_metrics(announcement(tiny_classifier, measuring, 3))


def test_metrics_are_of_the_final_adapter_alone(tiny_classifier, measuring, join, rich_ledger):
    site = join(measuring)
    for round in (1, 2):
        site.answer(announcement(tiny_classifier, measuring, round), round)
    for round in (1, 2):
        with pytest.raises(ProtocolError, match="another study or round"):
            site.release_metrics(announcement(tiny_classifier, measuring, round))
    assert rich_ledger.totals().metrics_epsilon == 0


def test_a_patient_who_is_trained_on_and_held_out_is_refused_before_the_first_round(
    measuring, join, rows, rich_ledger, with_terms
):
    with pytest.raises(PrivacyError, match="also a training patient"):
        join(measuring, held_out=[*HELD_OUT, rows[0]])
    join(with_terms(measuring, privacy={"metrics_epsilon": None}), held_out=[*HELD_OUT, rows[0]])


def test_metrics_of_a_study_that_lets_none_out_are_refused(
    tiny_classifier, measuring, join, make, with_terms
):
    silent = with_terms(measuring, privacy={"metrics_epsilon": None})
    with pytest.raises(ConfigError, match="no metrics leave"):
        join(silent).release_metrics(announcement(tiny_classifier, silent, 3))
    with pytest.raises(PrivacyError, match="no held-out patients"):
        make(measuring).release_metrics(announcement(tiny_classifier, measuring, 3))


CANARIES = ["zyxKANARIE", "密语金丝雀"]


def spellings(text):
    """Return the bytes in which a text could leave."""
    plain = [text.encode(codec) for codec in ("utf-8", "gb18030", "utf-16-le", "utf-16-be")]
    shifted = [base64.b64encode(b"\0" * k + data)[4:-4] for data in plain for k in range(3)]
    return [*plain, *shifted, *(data.hex().encode() for data in plain), repr(text).encode()[1:-1]]


def is_found(text, data):
    return any(spelling in data.lower() for s in spellings(text) for spelling in (s.lower(),))


@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("canary", CANARIES)
def test_the_search_finds_planted_canaries(canary, codec):
    data = f"before {canary} after".encode(codec)
    for planted in (data, base64.b64encode(data), data.hex().encode(), data.hex().upper().encode()):
        assert is_found(canary, b"\x01\x02" + planted + b"\x03")
    assert not is_found(canary, b"nothing of the kind")


def test_no_text_of_a_record_leaves_or_is_logged(
    tiny_classifier, study, make, with_terms, unit, rows, caplog, capfd
):
    caplog.set_level(logging.DEBUG)
    study = with_terms(study, privacy={"unit": unit})
    own = [(f"{p} {CANARIES[0]}", f"{t} {' '.join(CANARIES)}", d) for p, t, d in rows]
    site = make(study, own=own)
    said = [repr(site.trainer.examples), str(site.trainer.ready())]
    for round in (1, 2):
        envelope, report = site.answer(announcement(tiny_classifier, study, round), round)
        said += [repr(report), repr(envelope)]
        for canary in CANARIES:
            assert not is_found(canary, envelope.data)
    out = "".join([caplog.text, *capfd.readouterr(), *said]).encode()
    assert not any(is_found(canary, out) for canary in CANARIES)


def test_no_text_of_a_record_is_in_metrics_or_on_the_disk(
    tiny_classifier, measuring, join, rich_ledger
):
    held_out = [(f"{p} {CANARIES[0]}", f"{t} {' '.join(CANARIES)}", d) for p, t, d in HELD_OUT]
    site = join(measuring, held_out=held_out)
    for round in (1, 2):
        site.answer(announcement(tiny_classifier, measuring, round), round)
    site.release_metrics(announcement(tiny_classifier, measuring, 3))
    files = [path for path in rich_ledger.path.parent.rglob("*") if path.is_file()]
    assert {".update", ".json", ".sqlite"} <= {path.suffix for path in files}
    for path in files:
        data = path.read_bytes() + path.name.encode()
        assert not any(is_found(canary, data) for canary in CANARIES), path


@pytest.mark.parametrize("field", ["text", "disease"])
def test_no_text_of_a_record_is_in_an_error(make, study, rows, field, caplog):
    caplog.set_level(logging.DEBUG)
    own = [(CANARIES[0], CANARIES[1], CANARIES[0]), *rows]
    empty = (CANARIES[0], "" if field == "text" else CANARIES[1], "" if field != "text" else "x")
    with pytest.raises(HuizhenError) as caught:
        make(study, own=[*own, empty])
    said = caplog.text
    error: BaseException | None = caught.value
    while error is not None:
        said += f"{error} {error!r}"
        error = error.__cause__ or error.__context__
    assert "rows:" in said
    assert not any(is_found(canary, said.encode()) for canary in CANARIES)
