"""What a report says about the number of patients follows from measured points alone."""

import pytest

from huizhen.simulations.results import _crossing


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
