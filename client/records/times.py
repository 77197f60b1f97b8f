"""Times as hospitals write them, in one form: ISO 8601, as precise as the source.

Read are ISO 8601, HL7 v2's digits (HL7 v2.5.1, 2.A.22 TS), Chinese dates, and year first with
slashes or dots. What could be read in two ways (3/4/2023) is not read.
"""

import re
from datetime import UTC, date, datetime, timedelta, timezone

_ISO = re.compile(
    r"(?P<year>\d{4})(?:[-/.](?P<month>\d{1,2})(?:[-/.](?P<day>\d{1,2})"
    r"(?:[T ]\s*(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,]\d+)?)?"
    r"\s*(?P<zone>Z|[+-]\d{2}(?::?\d{2})?)?)?)?)?"
)
_DIGITS = re.compile(
    r"(?P<year>\d{4})(?:(?P<month>\d{2})(?:(?P<day>\d{2})"
    r"(?:(?P<hour>\d{2})(?P<minute>\d{2})(?:(?P<second>\d{2})(?:\.\d{1,4})?)?"
    r"(?P<zone>[+-]\d{4})?)?)?)?"
)
_CHINESE = re.compile(
    r"(?P<year>\d{4})年(?:(?P<month>\d{1,2})月(?:(?P<day>\d{1,2})[日号]"
    r"(?:\s*(?P<hour>\d{1,2})[时点:](?P<minute>\d{1,2})?分?(?::?(?P<second>\d{1,2})秒?)?)?)?)?"
)
_FULL_WIDTH = str.maketrans("０１２３４５６７８９：／－．　", "0123456789:/-. ")
FIRST_YEAR, LAST_YEAR = 1850, 2200


def iso(text: str) -> str:
    """Return a time in the one form; empty for an empty text.

    Parts of a second are cut off; an offset stays as it is, ``Z`` becomes ``+00:00``.

    Raises:
        ValueError: it is no time, or no day that exists; the message does not show it.
    """
    text = text.translate(_FULL_WIDTH).strip()
    if not text:
        return ""
    if len(text) > 40:
        raise ValueError("is no time, expected such as 2023-05-06 08:30")
    for form in (_ISO, _DIGITS, _CHINESE):
        if found := form.fullmatch(text):
            return _written(found)
    raise ValueError("is no time, expected such as 2023-05-06 08:30")


def moment(time: str) -> datetime:
    """Return the earliest moment that a time in the one form may be.

    A time without an offset is taken as UTC: two of one hospital compare rightly.
    """
    year, month, day = (*time[:10].split("-"), "1", "1")[:3]
    begin = datetime(int(year), int(month), int(day), tzinfo=UTC)
    return datetime.fromisoformat(time).replace(tzinfo=_zone(time)) if "T" in time else begin


def day(time: str) -> date:
    """Return the first day that a time in the one form may lie on."""
    return moment(time).date()


def _zone(time: str) -> timezone:
    if time[-6] not in "+-":
        return UTC
    hours, minutes = int(time[-5:-3]), int(time[-2:])
    offset = timedelta(hours=hours, minutes=minutes)
    return timezone(-offset if time[-6] == "-" else offset)


def _written(found: re.Match[str]) -> str:
    year, month, day, hour, minute, second = (
        int(found[name] or 0) for name in ("year", "month", "day", "hour", "minute", "second")
    )
    if not FIRST_YEAR <= year <= LAST_YEAR:
        raise ValueError(f"has a year outside {FIRST_YEAR} to {LAST_YEAR}")
    try:
        datetime(year, month or 1, day or 1, hour, minute, second)  # noqa: DTZ001 - checked only
    except ValueError as error:
        raise ValueError("is a day or hour that does not exist") from error
    if not found["month"]:
        return f"{year:04d}"
    if not found["day"]:
        return f"{year:04d}-{month:02d}"
    if not found["hour"]:
        return f"{year:04d}-{month:02d}-{day:02d}"
    zone = (found.groupdict().get("zone") or "").replace(":", "")
    offset = "+00:00" if zone == "Z" else f"{zone[:3]}:{zone[3:] or '00'}" if zone else ""
    if offset and (int(offset[1:3]) > 14 or int(offset[4:]) > 59):
        raise ValueError("has an offset that does not exist")
    return f"{year:04d}-{month:02d}-{day:02d}T{hour:02d}:{minute:02d}:{second:02d}{offset}"
