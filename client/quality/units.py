"""Units as hospitals write them, in UCUM, and the way from one to another.

UCUM: The Unified Code for Units of Measure, version 2.2 (https://ucum.org/ucum). What is written is
first brought to one spelling, then looked up among the aliases of the table of labs; what is still
not UCUM has no meaning here. Three things that dimensions alone would let through are refused:
arbitrary units (``[IU]``, ``[HPF]``) become nothing but themselves, annotations (``{FEU}``) are
part of a unit, and equivalents need a valence.
"""

import functools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_UNIT = 64
# characters; no unit is longer

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED = re.compile("(?<=[0-9])(?=[⁰¹²³⁴⁵⁶⁷⁸⁹])")
_SIGNS = str.maketrans({"µ": "u", "μ": "u", "×": "x", "·": ".", "－": "-", "∕": "/"})
_POWER = re.compile(
    r"^[xX*]?10(?:(?:\^|\*\*|\*|[eE])(?P<power>-?\d{1,2})|(?P<lost>\d{1,2})(?=/))(?![\d.])"
)
# "109/L" is 10⁹/L whose superscript was lost
_DIGITS = re.compile(r"\d{4}")
_APART = re.compile(r"\[(?!Hg\]|H2O\]|degF\]|lb_av\]|in_i\])[^\]]*\]|\{[^}]*\}|osm")
# what only becomes itself
_EQUIVALENTS = re.compile(r"(?<![a-z])([munp]?)eq(?![a-z])")


class Conversion(NamedTuple):
    """A straight line from one unit to another."""

    factor: float
    offset: float = 0.0

    def of(self, value: float) -> float:
        """Return a value in the other unit."""
        return value * self.factor + self.offset


def spelling(text: str, words: Mapping[str, str]) -> str:
    """Return a unit in one spelling, which may still be an alias.

    Args:
        text: as the source writes it.
        words: what to put for the words of another language, longest first.
    """
    text = _RAISED.sub("^", text)
    text = unicodedata.normalize("NFKC", text.translate(_SUPERSCRIPTS)).translate(_SIGNS)
    text = "".join(text.split())
    if not text.isascii():
        for word, symbol in words.items():
            text = text.replace(word, symbol)
    if text[:3].lower() == "per":
        text = "/" + text[3:]
    return _POWER.sub(lambda found: f"10*{found['power'] or found['lost']}", text)


def conversion(
    source: str, target: str, *, molar_mass: float = 0.0, valence: int = 0
) -> Conversion | None:
    """Return the way from one UCUM unit to another; None where there is none.

    Args:
        source: the unit that a result is in.
        target: the unit that it shall be in.
        molar_mass: in g/mol, between masses and amounts; 0 where there is no such way.
        valence: of the ion, between equivalents and amounts; 0 where there is no such way.
    """
    if source == target:
        return Conversion(1.0)
    if max(len(source), len(target)) > MAX_UNIT or not source.isascii():
        return None
    factor = 1.0
    if valence:
        changed = _EQUIVALENTS.sub(r"\1mol", source)
        factor = 1.0 / valence if changed != source else 1.0
        source = changed
    if _EQUIVALENTS.search(source) or sorted(_APART.findall(source)) != sorted(
        _APART.findall(target)
    ):
        return None
    way = _convert(source, target, molar_mass)
    return None if way is None else Conversion(way.factor * factor, way.offset)


@functools.cache
def _registry() -> Any:
    """Return the one pint registry; quantities of two registries cannot be mixed.

    It takes over half a second, so the first unit that needs it pays.
    """
    from ucumvert import PintUcumRegistry  # type: ignore[import-untyped]  # it ships no types

    return PintUcumRegistry()


def _quantity(unit: str) -> Any:
    """Return one of a unit as pint has it; None where it is no UCUM."""
    if _DIGITS.search(unit):  # 10*9999 would be computed
        return None
    try:
        quantity = _registry().from_ucum(unit)
        return quantity if hasattr(quantity, "dimensionality") else None
    except Exception:  # noqa: BLE001 - its parser and pint raise some twenty types, all mean no
        return None


def _convert(source: str, target: str, molar_mass: float) -> Conversion | None:
    from pint.errors import PintError

    one, goal = _quantity(source), _quantity(target)
    if one is None or goal is None:
        return None
    try:
        if one.dimensionality != goal.dimensionality:
            return _through_moles(one, goal, molar_mass)
        zero = type(one)(0.0, one.units).to(goal.units).magnitude if _is_temperature(one) else 0.0
        factor = (one.to(goal.units).magnitude - zero) / goal.magnitude
    except (PintError, ArithmeticError):  # such as a power of a temperature
        return None
    return _line(factor, zero / goal.magnitude)


def _is_temperature(quantity: Any) -> bool:
    return str(quantity.dimensionality) == "[temperature]"


def _through_moles(one: Any, goal: Any, molar_mass: float) -> Conversion | None:
    """Return the way between a mass and an amount of substance, the rest being equal."""
    if not molar_mass:
        return None
    per_mole = molar_mass * _registry().from_ucum("g/mol")
    for changed in (one / per_mole, one * per_mole):
        if changed.dimensionality == goal.dimensionality:
            return _line(changed.to(goal.units).magnitude / goal.magnitude, 0.0)
    return None


def _line(factor: float, offset: float) -> Conversion | None:
    if not (0 < abs(factor) < 1e30 and abs(offset) < 1e30):
        return None
    return Conversion(float(f"{factor:.12g}"), float(f"{offset:.12g}"))
