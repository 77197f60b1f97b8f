"""Weekly windows in a hospital's own time, such as ``Mon-Fri 20:00-06:00``.

A window begins on each of its days and holds from its first minute to just before its last one. One
that ends at or before its begin ends on the next day: ``Fri 20:00-06:00`` holds on Saturday until
06:00. ``24:00`` is the end of the day.

What counts is what the clock on the wall shows. Where summer time begins, the minutes that the
clock leaves out are in no window; where it ends, the hour that comes twice is in its window twice.
"""

import functools
import re
import zoneinfo
from dataclasses import dataclass
from datetime import UTC, datetime, time

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
ALWAYS = "Mon-Sun 00:00-24:00"
_DAY, _TIME = "|".join(DAYS), r"([01][0-9]|2[0-3]):([0-5][0-9])"
_WINDOW = re.compile(rf"({_DAY})(?:-({_DAY}))? {_TIME}-(?:{_TIME}|24:00)")
_WHOLE_DAY = 24 * 60


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time that comes back every week."""

    days: frozenset[int]
    # on which it begins; Monday is 0
    begin: int
    # minutes after midnight
    end: int
    # minutes after midnight; at or before ``begin``, of the next day

    def holds(self, local: datetime) -> bool:
        """Tell whether the wall clock, which shows ``local``, is inside."""
        minute, today = local.hour * 60 + local.minute, local.weekday()
        if self.begin < self.end:
            return today in self.days and self.begin <= minute < self.end
        yesterday = (today - 1) % 7
        return (today in self.days and minute >= self.begin) or (
            yesterday in self.days and minute < self.end
        )


@functools.cache
def window(text: str) -> Window:
    """Return the window that a text says.

    Raises:
        ValueError: it says none, or one without an extent.
    """
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(
            f"window is {text[:60]!r}, expected as 'Mon-Fri 20:00-06:00' or 'Sat 00:00-24:00'"
        )
    first = DAYS.index(found[1])
    last = DAYS.index(found[2] or found[1])
    begin = int(found[3]) * 60 + int(found[4])
    end = _WHOLE_DAY if found[5] is None else int(found[5]) * 60 + int(found[6])
    if begin == end:
        raise ValueError(
            f"window is {text!r}, which ends as it begins: write 00:00-24:00 for whole days"
        )
    count = (last - first) % 7 + 1  # Fri-Mon runs over the end of the week
    return Window(frozenset((first + day) % 7 for day in range(count)), begin, end)


@functools.cache
def zone(name: str) -> zoneinfo.ZoneInfo:
    """Return a time zone of the IANA database; each is read once in a process.

    Raises:
        ValueError: there is none of this name.
    """
    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"timezone is {name[:60]!r}, expected a name such as 'Asia/Shanghai' that this "
            "machine's time zone database has"
        ) from error


def day_begins(now: datetime, timezone: str) -> datetime:
    """Return when the present day began in a time zone, in UTC.

    Args:
        now: with a zone of its own.
        timezone: a name of the IANA database.
    """
    local = now.astimezone(zone(timezone))
    return datetime.combine(local.date(), time.min, zone(timezone)).astimezone(UTC)
