"""What may stand in a ledger, and as which event; whatever else is refused by name."""

import dp_accounting
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.accounting import Spend, from_event, merge, to_event
from huizhen.protocol.errors import PrivacyError


def spend(sigma, q, steps, cap=None, bound=None):
    return Spend(
        noise_multiplier=sigma, sampling_rate=q, steps=steps, batch_cap=cap, patients_bound=bound
    )


def test_so_many_rounds_of_a_spend_are_one_spend():
    assert spend(1.3, 0.2, 4).times(10) == spend(1.3, 0.2, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier is nan"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier is inf"),
        ({"sampling_rate": 0.0}, "sampling_rate is 0.0"),
        ({"sampling_rate": 1.01}, "sampling_rate is 1.01"),
        ({"sampling_rate": float("nan")}, "sampling_rate is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": -2}, "steps is -2"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"steps": True}, "steps is True"),
        ({"steps": None}, "steps is None"),
        ({"batch_cap": 0, "patients_bound": 9}, "batch_cap is 0"),
        ({"batch_cap": 5, "patients_bound": 0}, "patients_bound is 0"),
        ({"batch_cap": 5}, "no price without a bound"),
        ({"patients_bound": 5}, "expected both or neither"),
    ],
)
def test_what_has_no_price_is_no_spend(change, message):
    terms = {"noise_multiplier": 1.0, "sampling_rate": 0.5, "steps": 1}
    with pytest.raises(PrivacyError, match=message):
        Spend(**terms | change)


caps = st.one_of(st.just((None, None)), st.tuples(st.integers(1, 1000), st.integers(1, 100_000)))


@given(st.floats(0.1, 1e6), st.floats(1e-6, 1), st.integers(1, 10**6), caps)
def test_a_spend_comes_back_from_its_event(sigma, q, steps, cap):
    assert from_event(to_event(spend(sigma, q, steps, *cap))) == (spend(sigma, q, steps, *cap),)


def test_nested_events_are_added_up():
    step = PoissonSampledDpEvent(0.2, GaussianDpEvent(1.3))
    event = dp_accounting.ComposedDpEvent(
        [
            SelfComposedDpEvent(dp_accounting.ComposedDpEvent([step, GaussianDpEvent(4.0)]), 3),
            dp_accounting.NoOpDpEvent(),
            step,
        ]
    )
    assert from_event(event) == merge([spend(1.3, 0.2, 4), spend(4.0, 1.0, 3)])


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (dp_accounting.NonPrivateDpEvent(), "NonPrivateDpEvent"),
        (dp_accounting.UnsupportedDpEvent(), "UnsupportedDpEvent"),
        (dp_accounting.LaplaceDpEvent(1.0), "LaplaceDpEvent"),
        (dp_accounting.ZCDpEvent(0.1), "ZCDpEvent"),
        (MixtureOfGaussiansDpEvent(1.0, [0, 1], [0.5, 0.5]), "MixtureOfGaussians"),
        (
            PoissonSampledDpEvent(0.1, dp_accounting.LaplaceDpEvent(1.0)),
            "PoissonSampledDpEvent of LaplaceDpEvent",
        ),
        (
            dp_accounting.SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(1.0)),
            "SampledWithoutReplacementDpEvent of GaussianDpEvent",
        ),
        (
            SelfComposedDpEvent(dp_accounting.ComposedDpEvent([dp_accounting.ZCDpEvent(0.1)]), 2),
            "ZCDpEvent",
        ),
        ("no event", "event str"),
    ],
)
def test_an_event_that_is_not_known_is_refused_by_name(event, name):
    with pytest.raises(PrivacyError, match=name):
        from_event(event)


@pytest.mark.parametrize("sigma", [0.0, -1.0])
def test_an_event_without_noise_is_refused(sigma):
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        from_event(GaussianDpEvent(sigma))
