"""Metrics have one encoding, state their errors, and are of the agreed study or refused."""

import json
from dataclasses import replace
from math import sqrt

import pytest
import rfc8785

from huizhen.protocol.errors import ConfigError, ProtocolError, WireError
from huizhen.protocol.metrics import (
    MAX_BYTES,
    SiteMetrics,
    budgets,
    cells_of,
    noise_deviation,
    parse_metrics,
)

LABELS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def study(make_study):
    return make_study(task={"labels": LABELS}, privacy={"metrics_epsilon": 0.5})


@pytest.fixture(scope="module")
def instruction(make_study):
    return make_study("instruction", privacy={"metrics_epsilon": 1.0, "metrics_minimum": 4})


@pytest.fixture(scope="module")
def value(study):
    return SiteMetrics(
        study=study.digest(),
        site="A",
        round=2,
        epsilon_counts=0.5,
        epsilon_loss=0.0,
        minimum=10,
        counts={"top1": 31, "top2_to_3": -2, "wrong": 9},
        loss=None,
    )


@pytest.fixture(scope="module")
def answers(instruction):
    return SiteMetrics(
        study=instruction.digest(),
        site="B",
        round=1,
        epsilon_counts=0.5,
        epsilon_loss=0.5,
        minimum=4,
        counts={"exact": 20, "wrong": 13},
        loss=-250,
    )


def test_a_reader_sees_the_patients_and_who_is_right_each_with_its_error(value):
    # ε = 1/2: √2 e^(-1/4) / (1 - e^(-1/2)) = 2.7992 per cell
    found = value.readings()
    assert {name: one.value for name, one in found.items()} == {
        "patients": 38,
        "top1": 31,
        "top3": 29,
    }
    assert value.count_deviation == pytest.approx(2.7992, abs=1e-4)
    for name, cells in {"patients": 3, "top1": 1, "top3": 2}.items():
        assert found[name].standard_error == pytest.approx(sqrt(cells) * 2.7992, abs=1e-3)


def test_a_loss_is_read_in_nats(answers):
    found = answers.readings()["loss"]
    assert found.value == pytest.approx(-250 * 5 / 1000)
    # about √2 · 1000 / 0.5 steps of 0.005 nats
    assert found.standard_error == pytest.approx(sqrt(2) * 10, rel=1e-6)


# Ghosh et al. 2009 and algorithms of the literature: 14.1, 5.6, 2.8 and 1.4 counts.
@pytest.mark.parametrize(("rate", "deviation"), [(0.1, 14.1), (0.25, 5.6), (0.5, 2.8), (1, 1.4)])
def test_the_deviation_of_the_noise_by_hand(rate, deviation):
    assert noise_deviation(rate) == pytest.approx(deviation, abs=0.06)


def test_every_value_comes_back_from_its_bytes(value, answers, study, instruction):
    for one, terms in ((value, study), (answers, instruction)):
        hidden = replace(one, counts=None, loss=None)
        assert parse_metrics(one.canonical(), terms) == one
        assert parse_metrics(hidden.canonical(), terms) == hidden


def test_the_bytes_say_all_that_a_reader_needs(answers):
    assert json.loads(answers.canonical()) == {
        "schema": 1,
        "study": answers.study,
        "site": "B",
        "round": 1,
        "epsilon_counts": 0.5,
        "epsilon_loss": 0.5,
        "minimum": 4,
        "counts": {"exact": 20, "wrong": 13},
        "loss": -250,
        "standard_errors": {"exact": 2.7992, "wrong": 2.7992, "loss": 2828.4271},
    }


def changed(value, **changes):
    table = json.loads(value.canonical()) | changes
    if "epsilon_counts" in changes:  # with the errors that would follow
        deviation = noise_deviation(max(0.1, changes["epsilon_counts"]))
        table["standard_errors"] = dict.fromkeys(table["counts"], round(deviation, 4))
    return rfc8785.dumps({k: v for k, v in table.items() if v != "gone"})


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": "1"},
        {"schema": "gone"},
        {"study": "AB" * 32},
        {"study": "ab"},
        {"site": 3},
        {"round": 0},
        {"round": 1.5},
        {"minimum": 0},
        {"epsilon_counts": 0},
        {"epsilon_counts": -0.5},
        {"epsilon_counts": 101},
        {"epsilon_loss": -0.1},
        {"epsilon_loss": 0.5},
        {"counts": {}},
        {"counts": {"top1": 31, "top2_to_3": -2, "wrong": -20}},
        {"counts": {"top1": 31.5, "top2_to_3": -2, "wrong": 9}},
        {"counts": {"top1": True, "top2_to_3": -2, "wrong": 19}},
        {"counts": [31, -2, 9]},
        {"counts": "gone"},
        {"loss": 4},
        {"standard_errors": {}},
        {"standard_errors": {"top1": 0.1, "top2_to_3": 2.7992, "wrong": 2.7992}},
        {"standard_errors": "gone"},
        {"more": 1},
    ],
)
def test_what_is_no_value_is_refused(value, study, changes):
    with pytest.raises(WireError):
        parse_metrics(changed(value, **changes), study)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b"nan",
        b"[" * 6000,
        b'{"schema":1,"schema":1}',
    ],
)
def test_bytes_that_are_no_metrics_are_refused(study, data):
    with pytest.raises(WireError):
        parse_metrics(data, study)


def test_too_many_bytes_are_refused_before_they_are_read(study):
    with pytest.raises(WireError, match=f"at most {MAX_BYTES}"):
        parse_metrics(b"{" + b" " * MAX_BYTES + b"}", study)


def test_another_encoding_of_the_same_value_is_refused(value, study):
    loose = json.dumps(json.loads(value.canonical())).encode()
    with pytest.raises(WireError, match="one canonical encoding"):
        parse_metrics(loose, study)
    with pytest.raises(WireError, match="one canonical encoding"):
        parse_metrics(value.canonical().replace(b"0.5", b"5e-1"), study)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "ab" * 32}, "another study"),
        ({"site": "C"}, "site or round"),
        ({"round": 3}, "site or round"),
        ({"epsilon_counts": 0.25}, "another epsilon"),
        ({"epsilon_counts": 0.25, "epsilon_loss": 0.25, "loss": 3}, "another epsilon"),
        ({"minimum": 2}, "not as agreed"),
        ({"counts": {"top1": 31, "wrong": 9}}, "other counts"),
        ({"counts": {"exact": 31, "wrong": 9}}, "other counts"),
    ],
)
def test_what_was_not_agreed_is_refused(value, study, changes, message):
    with pytest.raises(ProtocolError, match=message):
        parse_metrics(replace(value, **changes).canonical(), study)


def test_metrics_for_a_study_that_lets_none_out_are_refused(value, make_study):
    silent = make_study(task={"labels": LABELS})
    with pytest.raises(ConfigError, match="no metrics leave"):
        parse_metrics(replace(value, study=silent.digest()).canonical(), silent)


def test_an_instruction_shares_its_epsilon_between_counts_and_loss(study, instruction):
    assert budgets(study) == (0.5, 0.0)
    assert budgets(instruction) == (0.5, 0.5)


def test_among_three_classes_there_is_no_top_3(make_study, study, instruction):
    assert cells_of(make_study().task) == ("top1", "wrong")
    assert cells_of(study.task) == ("top1", "top2_to_3", "wrong")
    assert cells_of(instruction.task) == ("exact", "wrong")
