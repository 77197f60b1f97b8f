"""Units: one spelling, and straight lines between them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.client.quality.units import MAX_UNIT, Conversion, conversion, spelling

# From one unit to another and back; factors by hand from the definitions.
PAIRS = [
    ("mg/dL", "g/L", 0, 0, 0.01),
    ("mg/dL", "mmol/L", 180.156, 0, 10 / 180.156),
    ("mg/dL", "umol/L", 113.12, 0, 10_000 / 113.12),
    ("mg/mmol", "mg/g", 113.12, 0, 1000 / 113.12),
    ("meq/L", "mmol/L", 40.078, 2, 0.5),
    ("meq/L", "mmol/L", 0, 1, 1.0),
    ("/uL", "10*9/L", 0, 0, 0.001),
    ("10*4/uL", "10*9/L", 0, 0, 10.0),
    ("L/L", "%", 0, 0, 100.0),
    ("kPa", "mm[Hg]", 0, 0, 7.50061575846),
    ("ukat/L", "U/L", 0, 0, 60.0),
    ("ng/mL", "ng/L", 0, 0, 1000.0),
    ("[lb_av]", "kg", 0, 0, 0.45359237),
    ("u[IU]/mL", "m[IU]/L", 0, 0, 1.0),
]


@pytest.mark.parametrize(("source", "target", "molar_mass", "valence", "factor"), PAIRS)
def test_a_conversion_has_the_factor_that_its_units_define(
    source, target, molar_mass, valence, factor
):
    way = conversion(source, target, molar_mass=molar_mass, valence=valence)
    assert way is not None
    assert way.factor == pytest.approx(factor, rel=1e-9)
    assert way.offset == 0


def test_temperatures_have_an_offset():
    way = conversion("[degF]", "Cel")
    assert way is not None
    assert way.of(98.6) == pytest.approx(37.0)
    assert way.of(-40) == pytest.approx(-40)
    kelvin = conversion("K", "Cel")
    assert kelvin is not None
    assert kelvin.of(310.15) == pytest.approx(37.0)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("[IU]/L", "U/L"),  # arbitrary units are what a preparation defines
        ("/[HPF]", "%"),  # pint alone takes a field of view for one
        ("/[HPF]", "/[LPF]"),
        ("mg/L{DDU}", "mg/L{FEU}"),
        ("mg/L", "mg/L{FEU}"),
        ("mosm/kg", "mmol/kg"),
        ("meq/L", "mmol/L"),  # without a valence
        ("mg/dL", "mmol/L"),  # without a molar mass
        ("U/L", "mmol/L"),
        ("{ratio}", "1"),
        ("[pH]", "1"),
        ("", "mmol/L"),
        ("mmol/L", ""),
        ("10*9999/L", "10*9/L"),
        ("m" * (MAX_UNIT + 1), "m"),
        ("毫摩", "mol"),
    ],
)
def test_what_is_not_the_same_kind_is_never_guessed(source, target):
    assert conversion(source, target) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10^9/L", "10*9/L"),
        ("×10⁹/L", "10*9/L"),
        ("10⁹/L", "10*9/L"),
        ("x10E9/L", "10*9/L"),
        ("*10^12/L", "10*12/L"),
        ("10 9/L", "10*9/L"),
        ("μmol/L", "umol/L"),
        ("µmol / L", "umol/L"),
        ("ｍｇ／ｄＬ", "mg/dL"),
        ("per uL", "/uL"),
        ("mL/min/1.73m²", "mL/min/1.73m2"),
        ("毫摩尔/升", "mmol/L"),
        ("100mL", "100mL"),
        ("10/L", "10/L"),
    ],
)
def test_units_are_brought_to_one_spelling(text, expected):
    assert spelling(text, {"毫摩尔": "mmol", "升": "L"}) == expected


@given(
    st.sampled_from(PAIRS),
    st.floats(-1e9, 1e9, allow_nan=False),
    st.floats(-1e9, 1e9, allow_nan=False),
)
def test_conversions_are_linear_and_lead_back(pair, x, y):
    source, target, molar_mass, valence, _ = pair
    way = conversion(source, target, molar_mass=molar_mass, valence=valence)
    assert way is not None
    together = way.of(x + y) - way.of(0)
    apart = way.of(x) - way.of(0) + way.of(y) - way.of(0)
    assert together == pytest.approx(apart, rel=1e-9, abs=1e-3)
    if not valence:  # equivalents are read, never written
        back = conversion(target, source, molar_mass=molar_mass)
        assert back is not None
        assert back.of(way.of(x)) == pytest.approx(x, rel=1e-9, abs=1e-9)


@given(st.text(max_size=80) | st.text("[]{}()./*^10gmLUe-", max_size=40))
@settings(max_examples=300)
def test_any_text_as_a_unit_gives_a_finite_line_or_none(text):
    way = conversion(spelling(text, {}), "mmol/L", molar_mass=180.0, valence=1)
    assert way is None or (math.isfinite(way.factor) and way.factor)
    assert way is None or isinstance(way, Conversion)
