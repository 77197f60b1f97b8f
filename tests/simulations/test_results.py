"""What a report says about the number of patients follows from measured points alone."""

from typing import Any, cast

import pytest
import torch

from huizhen.client.examples import Examples
from huizhen.simulations.results import Results, TestRecords, _crossing


@pytest.mark.parametrize(
    ("points", "target", "times"),
    [
        ([(1.0, 0.5), (4.0, 0.9)], 0.4, 1.0),  # reached with the patients there are
        ([(1.0, 0.5), (4.0, 0.9)], 0.7, 2.0),  # half way on a log scale
        ([(1.0, 0.5), (4.0, 0.6)], 0.7, None),  # not even with the most
        ([(0.5, 0.9), (1.0, 0.5), (4.0, 0.6)], 0.7, None),  # fewer patients do not count
        ([(9.0, 0.8), (1.0, 0.2), (3.0, 0.5)], 0.8, 9.0),
    ],
)
def test_the_patients_that_suffice_are_read_off_the_measured_points(points, target, times):
    assert _crossing(points, target) == (None if times is None else pytest.approx(times))


@pytest.mark.parametrize(
    ("labels", "share"),
    [({"A": (0, 1, 1), "B": (1, -1)}, 0.6), ({"A": (-1, -1), "B": ()}, 0.0), ({"A": (-1, 2)}, 0.5)],
)
def test_chance_is_the_share_of_the_commonest_class_that_the_study_lists(labels, share):
    def examples(found):
        rows = tuple(torch.zeros(1) for _ in found)
        return Examples(rows, rows, found, tuple(found), tuple(range(len(found))), 0)

    sites = {name: examples(found) for name, found in labels.items()}
    results = Results(cast(Any, None), TestRecords(cast(Any, None), sites))
    assert results._chance() == pytest.approx(share)
