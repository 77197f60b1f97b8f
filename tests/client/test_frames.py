"""Frames between agent and worker: exactly what was written, bounded, and never shown."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.frames import (
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_PAYLOADS,
    CohortRecords,
    Frame,
    Start,
    read_frame,
    write_frame,
)
from huizhen.client.governance import SitePolicy
from huizhen.protocol.errors import ConfigError, WireError
from huizhen.protocol.strict import build

headers = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key != "sizes"),
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20),
    max_size=4,
)
payloads = st.lists(st.binary(max_size=300), max_size=MAX_PAYLOADS).map(tuple)


def written(*frames):
    stream = io.BytesIO()
    for frame in frames:
        write_frame(stream, frame)
    return stream.getvalue()


def raw(header, rest=b"", length=None):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MAGIC + (len(data) if length is None else length).to_bytes(4, "little") + data + rest


@given(st.lists(st.builds(Frame, headers, payloads), max_size=3))
def test_what_was_written_is_read_frame_by_frame(frames):
    stream = io.BytesIO(written(*frames))
    for frame in frames:
        assert read_frame(stream, max_bytes=300 * MAX_PAYLOADS) == frame
    assert read_frame(stream, max_bytes=0) is None


@given(st.builds(Frame, headers, payloads), st.data())
def test_a_frame_that_is_cut_short_is_refused(frame, data):
    whole = written(frame)
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(WireError):
        read_frame(io.BytesIO(whole[:cut]), max_bytes=300 * MAX_PAYLOADS)


@given(st.binary(min_size=1, max_size=60), st.booleans())
def test_any_other_bytes_are_refused_and_nothing_else_happens(data, begins_well):
    stream = io.BytesIO(raw(data) if begins_well else data)
    try:
        frame = read_frame(stream, max_bytes=10)
    except WireError:
        return
    assert frame is not None
    assert begins_well


class Counting(io.BytesIO):
    """Notes the most that was asked of it at once."""

    most = 0

    def read(self, size=-1):
        self.most = max(self.most, size)
        return super().read(size)


@pytest.mark.parametrize(
    "data",
    [
        raw(b"{}", length=MAX_HEADER_BYTES + 1),
        raw({"sizes": [], "x": "x" * MAX_HEADER_BYTES}),
        raw({"sizes": [11]}, b"x" * 11),
        raw({"sizes": [6, 5]}, b"x" * 11),
        raw({"sizes": [10**400]}),
        raw({"sizes": [2**60]}),
        raw({"sizes": [0] * (MAX_PAYLOADS + 1)}),
        raw({"sizes": [-1, 5]}),
        raw({"sizes": [True]}, b"x"),
        raw({"sizes": [1.0]}, b"x"),
        raw({"sizes": {"0": 1}}, b"x"),
        raw({}),
        raw([]),
        raw(b"[" * 100_000),
        raw(b"\xff\xfe"),
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_a_bomb_is_refused_before_memory_is_taken(data):
    stream = Counting(data)
    with pytest.raises(WireError):
        read_frame(stream, max_bytes=10)
    assert stream.most <= MAX_HEADER_BYTES


def test_a_large_payload_is_read_whole_and_in_parts():
    payload = bytes(range(256)) * (3 << 12)
    stream = Counting(written(Frame({}, (payload,))))
    assert read_frame(stream, max_bytes=len(payload)) == Frame({}, (payload,))
    assert stream.most <= 1 << 20


@pytest.mark.parametrize("header", [{"a": float("nan")}, {"a": b"x"}, {"a": "x" * 2**20}])
def test_a_header_that_no_reader_takes_is_not_written(header):
    stream = io.BytesIO()
    with pytest.raises(WireError):
        write_frame(stream, Frame(header))
    assert stream.getvalue() == b""


def test_no_record_shows_in_what_is_printed():
    records = CohortRecords(train=b"SECRET", held_out=b"SECRET")
    for value in (Frame({"a": "SECRET"}, (b"SECRET",)), records):
        assert "SECRET" not in repr(value) + str(value)


START = {"site": "A", "home": "/home", "base": "tiny", "patient": "id", "policy": {"site": "A"}}


def test_a_start_is_read_strictly():
    expected = Start(site="A", home="/home", base="tiny", patient="id", policy=SitePolicy(site="A"))
    assert build(Start, START, "start") == expected
    for change in ({"home": "home"}, {"threads": 0}, {"memory_mib": 0}, {"thread": 1}):
        with pytest.raises(ConfigError):
            build(Start, START | change, "start")
