"""Lines in the encoding that they are in, and nothing guessed where it could be another."""

import io
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.records import text as module
from huizhen.client.records.record import MAX_ENTRY_BYTES
from huizhen.client.records.text import Lines
from huizhen.protocol.errors import ConfigError, GovernanceError, HuizhenError

NOTE = "患者男,56岁,因反复咳嗽、咳痰3年入院。\n既往史:高血压病史10年。\nWBC 6.5×10^9/L\n"


def read(data, encoding="auto"):
    lines = Lines(io.BytesIO(data), "a.txt", encoding)
    return "".join(lines), lines.encoding


@pytest.mark.parametrize(
    ("codec", "found"),
    [
        ("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("gb18030", "gb18030"), ("gbk", "gb18030"),
        ("utf-16", "utf-16"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block_bytes", [33, 34, 1 << 18])
def test_the_encoding_is_found_wherever_a_block_ends(monkeypatch, codec, found, block_bytes):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    assert read(NOTE.encode(codec)) == (NOTE, found)


def test_text_that_is_ascii_for_long_is_decided_where_it_is_not(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    head = "id,text\n" * 40
    for codec in ("utf-8", "gb18030"):
        assert read((head + NOTE).encode(codec)) == (head + NOTE, codec)
    assert read(head.encode()) == (head, "utf-8")


def test_what_is_no_chinese_is_not_taken_for_gb18030():
    for codec, words in (("latin-1", "Fièvre, céphalée, à jeun\n"), ("cp1251", "Лихорадка\n")):
        with pytest.raises(ConfigError, match="neither UTF-8 nor UTF-16 nor GB18030: set encoding"):
            read(words.encode(codec) * 20)
        assert read(words.encode(codec), codec)[0] == words


@pytest.mark.parametrize("at", [0, 500, 5000])
def test_a_zero_byte_makes_no_utf_16_of_a_file(monkeypatch, at):
    """One stray byte must not turn the rest of a file into one unreadable line."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 1024)
    lines = ["7000,last\n"] * 1000
    lines[at // 10] = "7000,最\0后\n"
    for codec in ("utf-8", "gb18030"):
        found, encoding = read("".join(lines).encode(codec))
        assert found == "".join(lines)
        assert encoding == codec


def test_traditional_and_rare_characters_are_read_from_gb18030():
    words = "病人姓名𠮷野家，住院。发热、咳嗽、头痛。\n"
    assert read(words.encode("gb18030")) == (words, "gb18030")


def test_a_line_that_is_not_in_the_encoding_is_named(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 16)
    data = NOTE.encode() + "发热SECRET".encode("gb18030")
    with pytest.raises(ConfigError, match=r"^a\.txt:4: line is not utf-8, it looks like gb18030"):
        read(data, "utf-8")
    with pytest.raises(ConfigError, match=r"^a\.txt:4: ") as caught:
        read(data)
    assert "SECRET" not in str(caught.value)


def test_a_last_character_cut_in_half_is_refused():
    for codec in ("utf-8", "gb18030", "utf-16-le"):
        with pytest.raises(ConfigError, match=r"^a\.txt"):
            read((NOTE + "热").encode(codec)[:-1], codec)


@pytest.mark.parametrize("name", ["no-such", "", "rot13", "base64", "utf\0-8"])
def test_what_is_no_encoding_of_text_is_refused(name):
    with pytest.raises(ConfigError, match="encoding is"):
        read(b"x", name)


class Endless(io.BytesIO):
    """A gigabyte that is never on a disk."""

    def __init__(self, filling):
        super().__init__()
        self.left, self.filling, self.at = 1 << 30, filling * (1 << 19), 0

    def read(self, size=-1):
        begin, self.at = self.at, (self.at + size) % 3
        self.left -= size
        return self.filling[begin : begin + size]


@pytest.mark.parametrize("filling", [b"x", b"\xe7\x97\x85", b"\xb2\xa1", b"\0"])
def test_a_line_of_a_gigabyte_is_refused_before_it_fills_memory(filling):
    stream = Endless(filling)
    tracemalloc.start()
    try:
        with pytest.raises(GovernanceError, match=rf"^a\.txt:1: line has over {MAX_ENTRY_BYTES}"):
            list(Lines(stream, "a.txt"))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert stream.left > 900 << 20


@given(st.text(st.characters(codec="utf-8"), max_size=80), st.integers(1, 9))
def test_utf_8_is_read_as_it_is(words, size):
    before, module.BLOCK_BYTES = module.BLOCK_BYTES, size
    try:
        found, _ = read(words.encode(), "utf-8")
    finally:
        module.BLOCK_BYTES = before
    assert found == words.removeprefix("\ufeff")


@given(st.binary(max_size=120))
def test_any_bytes_are_text_or_refused(data):
    try:
        found, encoding = read(data)
    except HuizhenError:
        return
    assert found.encode(encoding).decode(encoding) == found
