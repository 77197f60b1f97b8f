"""Times in one form, whoever wrote them; what has two readings or no day is refused."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.records.times import day, iso, moment

WRITTEN = {
    "": "",
    " 2023 ": "2023",
    "2023-5": "2023-05",
    "202305": "2023-05",
    "2023-5-6": "2023-05-06",
    "2023/05/06": "2023-05-06",
    "2023.5.6": "2023-05-06",
    "20230506": "2023-05-06",
    "2023年5月6日": "2023-05-06",
    "2023年5月": "2023-05",
    "２０２３－０５－０６": "2023-05-06",
    "2023/1/10 8:30": "2023-01-10T08:30:00",
    "2023-05-06 08:30:15.250": "2023-05-06T08:30:15",
    "2023-05-06T08:30:15Z": "2023-05-06T08:30:15+00:00",
    "2023-05-06T08:30:15+0800": "2023-05-06T08:30:15+08:00",
    "2013-05-17 00:00:00+08": "2013-05-17T00:00:00+08:00",
    "20230506083015.1234-0500": "2023-05-06T08:30:15-05:00",
    "202305060830": "2023-05-06T08:30:00",
    "2023年5月6日8时30分": "2023-05-06T08:30:00",
    "2023年5月6日 8:30": "2023-05-06T08:30:00",
    "2024-02-29": "2024-02-29",
}
REFUSED = [
    "3/4/2023", "03-04-23", "2023-02-29", "2023-13-01", "2023-05-06 24:30", "1066-10-14",
    "5023-01-01", "2023-05-06T08:30:15+99:00", "yesterday", "今天", "12", "2023-05-06" * 9,
]  # fmt: skip


@pytest.mark.parametrize(("written", "wanted"), WRITTEN.items())
def test_a_time_is_as_precise_as_its_source(written, wanted):
    assert iso(written) == wanted
    assert iso(iso(written)) == wanted


@pytest.mark.parametrize("written", REFUSED)
def test_what_is_no_time_is_refused_and_not_shown(written):
    with pytest.raises(ValueError, match=r"^(is no time|is a day or hour|has a)") as caught:
        iso(written)
    assert written not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_time_or_refused(text):
    try:
        time = iso(text)
    except ValueError:
        return
    assert iso(time) == time
    assert not time or day(time) == moment(time).date()


@given(st.datetimes(datetime(1850, 1, 1), datetime(2200, 12, 31)))  # noqa: DTZ001
def test_every_moment_is_read_back(time):
    time = time.replace(microsecond=0)
    assert moment(iso(time.isoformat())) == time.replace(tzinfo=UTC)
    assert moment(iso(f"{time:%Y%m%d%H%M%S}" if time.year > 999 else "")) == time.replace(
        tzinfo=UTC
    )


def test_times_of_one_moment_with_two_offsets_are_equal():
    assert moment("2023-05-06T08:30:00+08:00") == moment("2023-05-06T00:30:00+00:00")
    assert moment("2023-05") == moment("2023-05-01") == moment("2023-05-01T00:00:00")
