"""Windows by a slow twin, and where clocks jump."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.windows import ALWAYS, DAYS, day_begins, window, zone

MONDAY = datetime(2026, 11, 23)  # noqa: DTZ001  a wall clock has no zone
WEEK = 7 * 24 * 60


def minutes(text):
    """All minutes of a week that a window holds, by walking through it minute by minute."""
    days, times = text.split(" ")
    first, _, last = days.partition("-")
    begin, end = (int(t[:2]) * 60 + int(t[3:]) for t in times.split("-"))
    found, day = set(), DAYS.index(first)
    while True:
        minute = day * 1440 + begin
        while True:
            found.add(minute % WEEK)
            minute += 1
            if minute % 1440 == end % 1440:
                break
        if DAYS[day] == (last or first):
            return found
        day = (day + 1) % 7


clock = st.integers(0, 1439).map(lambda m: f"{m // 60:02}:{m % 60:02}")
texts = st.builds(
    "{}{} {}-{}".format,
    st.sampled_from(DAYS),
    st.just("") | st.sampled_from(DAYS).map("-{}".format),
    clock,
    clock | st.just("24:00"),
).filter(lambda text: text[-11:-6] != text[-5:])


@given(texts, st.integers(0, WEEK - 1), st.integers(0, 59))
def test_a_window_holds_what_a_walk_through_the_week_finds(text, minute, second):
    at = MONDAY + timedelta(minutes=minute, seconds=second)
    assert window(text).holds(at) == (minute in minutes(text))


def holds(text, day, time):
    at = datetime.strptime(time, "%H:%M:%S").replace(year=2026, month=11, day=23 + DAYS.index(day))  # noqa: DTZ007
    return window(text).holds(at)


@pytest.mark.parametrize(
    ("text", "day", "time", "inside"),
    [
        ("Mon-Fri 20:00-06:00", "Mon", "19:59:59", False),
        ("Mon-Fri 20:00-06:00", "Mon", "20:00:00", True),
        ("Mon-Fri 20:00-06:00", "Tue", "05:59:59", True),
        ("Mon-Fri 20:00-06:00", "Tue", "06:00:00", False),
        ("Mon-Fri 20:00-06:00", "Mon", "05:00:00", False),  # Sunday's night
        ("Mon-Fri 20:00-06:00", "Sat", "05:00:00", True),  # Friday's night
        ("Mon-Fri 20:00-06:00", "Sat", "20:00:00", False),
        ("Sat-Sun 00:00-24:00", "Fri", "23:59:59", False),
        ("Sat-Sun 00:00-24:00", "Sat", "00:00:00", True),
        ("Sat-Sun 00:00-24:00", "Sun", "23:59:59", True),
        ("Sat-Sun 00:00-24:00", "Mon", "00:00:00", False),
        ("Sun 22:00-02:00", "Mon", "01:59:59", True),  # over the end of the week
        ("Fri-Mon 08:00-09:00", "Sun", "08:30:00", True),
        ("Fri-Mon 08:00-09:00", "Tue", "08:30:00", False),
        ("Wed 00:00-00:01", "Wed", "00:00:59", True),
        ("Wed 18:00-24:00", "Wed", "23:59:59", True),
        ("Wed 18:00-24:00", "Thu", "00:00:00", False),
        ("Wed 18:00-00:00", "Thu", "00:00:00", False),
    ],
)
def test_a_window_is_half_open_and_may_cross_midnight(text, day, time, inside):
    assert holds(text, day, time) is inside


@pytest.mark.parametrize("day", DAYS)
@pytest.mark.parametrize("time", ["00:00:00", "12:00:00", "23:59:59"])
def test_always_is_always(day, time):
    assert holds(ALWAYS, day, time)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mon",
        "Mon 8:00-9:00",
        "mon 08:00-09:00",
        "Monday 08:00-09:00",
        "Mon 08:00-09:60",
        "Mon 24:00-25:00",
        "Mon 24:00-08:00",
        "Mon 08:00-24:30",
        "Mon 08:00 - 09:00",
        "Mon 08:00-09:00 ",
        "Mon,Tue 08:00-09:00",
        "Mon-Tue-Wed 08:00-09:00",
        "Mon ٠٨:00-09:00",
        "周一 08:00-09:00",
    ],
)
def test_what_is_no_window_is_refused(text):
    with pytest.raises(ValueError, match="expected as 'Mon-Fri 20:00-06:00'"):
        window(text)


@pytest.mark.parametrize("text", ["Mon 08:00-08:00", "Mon-Sun 00:00-00:00"])
def test_a_window_without_an_extent_is_refused(text):
    with pytest.raises(ValueError, match="write 00:00-24:00 for whole days"):
        window(text)


@pytest.mark.parametrize("name", ["", "China", "Asia", "Asia/shangHai!", "../etc/passwd", "/etc"])
def test_an_unknown_timezone_is_refused(name):
    with pytest.raises(ValueError, match="timezone is"):
        zone(name)


# Berlin leaves out 02:00-03:00 on 29 March 2026 and has it twice on 25 October; both are Sundays.
@pytest.mark.parametrize(
    ("utc", "inside"),
    [
        ("03-29T00:59", False),  # 01:59
        ("03-29T01:00", False),  # 03:00: the window of that day never came
        ("10-24T23:59", False),  # 01:59 on the 25th
        ("10-25T00:00", True),  # 02:00, summer
        ("10-25T00:59", True),
        ("10-25T01:00", True),  # 02:00 again, winter
        ("10-25T01:59", True),
        ("10-25T02:00", False),  # 03:00
        ("11-01T01:30", True),  # 02:30, an ordinary Sunday
    ],
)
def test_where_summer_time_changes_the_wall_clock_decides(utc, inside):
    now = datetime.fromisoformat(f"2026-{utc}Z")
    assert window("Sun 02:00-03:00").holds(now.astimezone(zone("Europe/Berlin"))) is inside


@pytest.mark.parametrize(
    ("name", "now", "expected"),
    [
        ("UTC", "2026-11-23T00:00", "2026-11-23T00:00"),
        ("UTC", "2026-11-23T23:59", "2026-11-23T00:00"),
        ("Asia/Shanghai", "2026-11-23T15:59", "2026-11-22T16:00"),
        ("Asia/Shanghai", "2026-11-23T16:00", "2026-11-23T16:00"),
        ("Europe/Berlin", "2026-03-29T12:00", "2026-03-28T23:00"),  # a day of 23 hours
        ("Europe/Berlin", "2026-03-29T22:00", "2026-03-29T22:00"),
        ("Europe/Berlin", "2026-10-25T22:59", "2026-10-24T22:00"),  # a day of 25
        ("America/New_York", "2026-01-01T04:59", "2025-12-31T05:00"),
    ],
)
def test_the_day_begins_at_the_hospitals_midnight(name, now, expected):
    found = day_begins(datetime.fromisoformat(f"{now}Z"), name)
    assert found == datetime.fromisoformat(f"{expected}Z")


def test_a_day_that_begins_with_a_jump_begins_with_it():
    """Beirut leaves out 00:00-01:00 on 29 March 2026."""
    found = day_begins(datetime(2026, 3, 29, 12, tzinfo=UTC), "Asia/Beirut")
    assert found == datetime(2026, 3, 28, 22, tzinfo=UTC)
