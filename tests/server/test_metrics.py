"""Noised metrics of several sites become one estimate whose interval holds what it promises."""

from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest
from scipy.stats import binom

from huizhen.protocol.errors import AggregationError, ProtocolError
from huizhen.protocol.metrics import LOSS_BOUND, LOSS_STEPS, SiteMetrics
from huizhen.server.metrics import join_metrics


def site(name, counts, *, epsilon=0.5, loss=None, round=3):
    return SiteMetrics(
        study="ab" * 32,
        site=name,
        round=round,
        epsilon_counts=epsilon if loss is None else epsilon / 2,
        epsilon_loss=0.0 if loss is None else epsilon / 2,
        minimum=10,
        counts=counts,
        loss=loss,
    )


def cells(top1, second, wrong):
    return {"top1": top1, "top2_to_3": second, "wrong": wrong}


def test_the_sites_patients_are_added_up():
    found = join_metrics([site("A", cells(30, 10, 10)), site("B", cells(60, -5, 45))])
    assert (found.sites, found.suppressed, found.round) == (("A", "B"), (), 3)
    assert found.patients == 150
    # six cells, each with 2.7992
    assert found.patients_standard_error == pytest.approx(sqrt(6) * 2.7992, abs=1e-3)
    assert found.rates["top1"].value == pytest.approx(90 / 150)
    assert found.rates["top3"].value == pytest.approx(95 / 150)
    assert found.rates.keys() == {"top1", "top3"}
    assert found.loss is None


def test_without_noise_the_interval_is_wilsons():
    found = join_metrics([site("A", cells(30, 0, 20), epsilon=100)]).rates["top1"]
    z, n, p = log(20) / sqrt(2), 50, 0.6
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.low == pytest.approx(middle - half, rel=1e-9)
    assert found.high == pytest.approx(middle + half, rel=1e-9)


def test_the_interval_ends_where_the_numbers_contradict_a_rate():
    found = join_metrics([site("A", cells(40, 5, 55)), site("B", cells(25, 5, 20))])
    deviation = 2.7992
    for p in (found.rates["top1"].low, found.rates["top1"].high):
        # T - pN = (1-p) (two cells of top1) - p (four other cells)
        noise = deviation**2 * (2 * (1 - p) ** 2 + 4 * p**2)
        spread = sqrt(150 * p * (1 - p) + noise)
        assert abs(65 - 150 * p) == pytest.approx(log(20) / sqrt(2) * spread, rel=1e-4)


def test_a_loss_is_a_mean_over_the_patients_with_its_own_noise():
    found = join_metrics([site("A", {"exact": 30, "wrong": 30}, loss=12_000, epsilon=100)])
    assert found.rates.keys() == {"exact_match"}
    assert found.loss is not None
    assert found.loss.value == pytest.approx(12_000 / LOSS_STEPS / 60 * LOSS_BOUND)
    assert found.loss.low < found.loss.value < found.loss.high <= LOSS_BOUND
    noisy = join_metrics([site("A", {"exact": 30, "wrong": 30}, loss=12_000, epsilon=1)])
    assert noisy.loss is not None
    assert noisy.loss.high - noisy.loss.low > 1.2 * (found.loss.high - found.loss.low)


@pytest.mark.parametrize(
    ("counts", "value"),
    [(cells(-4, 0, 24), 0.0), (cells(31, -1, -9), 1.0), (cells(12, 1, 1), 12 / 14)],
)
def test_where_noise_swamps_the_counts_the_interval_says_so(counts, value):
    found = join_metrics([site("A", counts, epsilon=0.05)]).rates["top1"]
    assert (found.value, found.low, found.high) == (value, 0.0, 1.0)


@pytest.mark.parametrize(
    ("counts", "epsilon", "value"),
    [
        (cells(90, 0, -60), 1, 1.0),
        (cells(-3, 0, 13), 1, 0.0),
        ({"top1": -139, "wrong": 149}, 0.02, 0.0),
    ],
)
def test_counts_that_no_rate_explains_give_no_false_confidence(counts, epsilon, value):
    found = join_metrics([site("A", counts, epsilon=epsilon)]).rates["top1"]
    assert (found.value, found.low, found.high) == (value, 0.0, 1.0)


@pytest.mark.parametrize("counts", [cells(0, 0, 40), cells(40, 0, 0), cells(1, 0, 39)])
def test_the_estimate_is_inside_its_interval(counts):
    for epsilon in (0.3, 1.0, 50.0):
        for rate in join_metrics([site("A", counts, epsilon=epsilon)]).rates.values():
            assert 0 <= rate.low <= rate.value <= rate.high <= 1
            assert rate.high - rate.low < 0.7


def test_sites_that_kept_their_counts_are_named_and_left_out():
    silent = replace(site("B", cells(9, 9, 9)), counts=None)
    found = join_metrics([silent, site("A", cells(30, 10, 10)), replace(silent, site="C")])
    assert (found.sites, found.suppressed, found.patients) == (("A",), ("B", "C"), 50)
    with pytest.raises(AggregationError, match="2 sites sent metrics and none"):
        join_metrics([silent, replace(silent, site="C")])
    with pytest.raises(AggregationError, match="0 sites"):
        join_metrics([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "A"}, "came twice"),
        ({"study": "cd" * 32}, "different studies"),
        ({"round": 4}, "different studies"),
        ({"epsilon_counts": 0.25}, "different studies"),
    ],
)
def test_what_has_no_common_mean_is_refused(changes, message):
    other = replace(site("B", cells(30, 10, 10)), **changes)
    with pytest.raises(ProtocolError, match=message):
        join_metrics([site("A", cells(30, 10, 10)), other])


# True rates 0.55 and 0.75 and a mean loss of 1.5 nats. A coverage of 95 % or more falls below the
# bound in one of 10⁹ runs; the widths keep out an interval that is always 0 to 1.
@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "epsilon"), [((40, 60, 200), 1.0), ((40,), 1.0), ((300,), 0.2)])
def test_the_intervals_cover_the_truth(sizes, epsilon):
    generator = np.random.default_rng(2026)
    truth = {"top1": 0.55, "top3": 0.75, "loss": 0.3 * LOSS_BOUND}
    covered, width, runs = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0.0), 4000

    def noised(number, rate):
        one, other = generator.geometric(1 - np.exp(-rate), 2)  # the difference is two-sided
        return int(number) + int(one - other)

    for _ in range(runs):
        ranked, answered = [], []
        for number, size in enumerate(sizes):
            exact = generator.multinomial(size, [0.55, 0.2, 0.25])
            counts = cells(*(noised(count, epsilon) for count in exact))
            ranked.append(site(str(number), counts, epsilon=epsilon))
            steps = (generator.beta(0.6, 1.4, size) * LOSS_STEPS).round().sum()
            counts = {name: noised(size / 2, epsilon / 2) for name in ("exact", "wrong")}
            loss = noised(steps, epsilon / 2 / LOSS_STEPS)
            answered.append(site(str(number), counts, epsilon=epsilon, loss=loss))
        loss_interval = join_metrics(answered).loss
        assert loss_interval is not None
        for what, interval in {**join_metrics(ranked).rates, "loss": loss_interval}.items():
            covered[what] += interval.low <= truth[what] <= interval.high
            width[what] += (interval.high - interval.low) / runs
    least = binom.ppf(1e-9, runs, 0.95)
    assert all(count >= least for count in covered.values()), covered
    assert width["top1"] < 0.5, width
    assert width["loss"] < 0.75 * LOSS_BOUND, width
