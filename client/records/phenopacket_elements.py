"""The elements of a phenopacket: fields by either of their names, and ages.

https://phenopacket-schema.readthedocs.io: Age, AgeRange, TimeElement. What is of another type than
the schema says is as if it were not there.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

_DURATION: Final = re.compile(
    r"P(?=[\dT])(?:(?P<years>\d{1,3}(?:\.\d{1,6})?)Y)?(?:(?P<months>\d{1,4}(?:\.\d{1,6})?)M)?"
    r"(?:(?P<weeks>\d{1,5}(?:\.\d{1,6})?)W)?(?:(?P<days>\d{1,6}(?:\.\d{1,6})?)D)?"
    r"(?:T(?=\d)(?:\d{1,6}H)?(?:\d{1,6}M)?(?:\d{1,6}(?:\.\d{1,6})?S)?)?"
)


def age_of(element: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return an age, or the two of a range, as durations, and in years, of a range its middle."""
    between = object_of(element, "ageRange") or element
    ends = [_duration(object_of(between, end)) for end in ("start", "end")]
    given = [end for end in ends if end] or [_duration(object_of(element, "age") or element)]
    years = [_years(each) for each in given]
    found = [each for each in years if each is not None]
    if not found or len(found) < len(years):
        return "", None
    return "/".join(given), round(sum(found) / len(found), 2)


def _duration(age: Mapping[str, Any]) -> str:
    """Return the duration of an age: ``iso8601duration``, in version 1 ``age``."""
    return text_of(age.get("iso8601duration")) or text_of(age.get("age"))


def _years(duration: str) -> float | None:
    found = _DURATION.fullmatch(duration)
    if not found:
        return None
    number = {part: float(found[part] or 0) for part in ("years", "months", "weeks", "days")}
    days = number["weeks"] * 7 + number["days"]
    return number["years"] + number["months"] / 12 + days / 365.25


def value_of(holder: Mapping[str, Any], name: str) -> Any:
    """Return a field by its JSON name, or by the schema's own with underscores."""
    if name in holder:
        return holder[name]
    return holder.get(_underscored(name))


@cache
def _underscored(name: str) -> str:
    return re.sub(r"([A-Z])", lambda found: "_" + found[1].lower(), name)


def object_of(holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object by its name, empty where it is none."""
    value = value_of(holder, name)
    return value if isinstance(value, dict) else {}


def list_of(holder: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list by its name, empty where it is none."""
    value = value_of(holder, name)
    return value if isinstance(value, list) else []


def objects_of(holder: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a list."""
    return (each for each in list_of(holder, name) if isinstance(each, dict))


def flag_of(holder: Mapping[str, Any], name: str) -> bool:
    """Tell whether a flag is set; a text counts too, for what is excluded must never be found."""
    value = value_of(holder, name)
    return value is True or text_of(value).lower() == "true"


def text_of(value: Any) -> str:
    """Return a text, empty where it is none."""
    return value.strip() if isinstance(value, str) else ""


def number_in(value: Any) -> float | None:
    """Return a number, None where it is none or has no end."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
