"""XML is read as it is meant, and what is made to harm is refused within 64 MB and a second."""

import codecs
import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.records.record import MAX_ENTRY_BYTES
from huizhen.client.records.xml import MAX_NODES, read_xml
from huizhen.protocol.errors import ConfigError, GovernanceError

CONTENT = "陈小明的秘密"

CHILD = """
import io, re, sys, time
from huizhen.client.records.cda import read_cda
from huizhen.protocol.errors import HuizhenError

class Endless(io.RawIOBase):
    def __init__(self, head, filling, size):
        self.head, self.block, self.left = head, filling * (1 + (1 << 18) // len(filling)), size
    def readable(self):
        return True
    def read(self, size=-1):
        assert 0 < size <= 1 << 24, "the stream is slurped"
        if self.head:
            head, self.head = self.head, b""
            return head
        block = self.block[: min(size, self.left)]
        self.left -= len(block)
        return block

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

GB, FULL = 1 << 30, (16 << 20) - (1 << 16)
CASES = {
    "an attribute of 1 GB": lambda: Endless(b'<a b="', b"x", GB),
    "a text of 1 GB": lambda: Endless(b"<a>", b"x", GB),
    "blanks of 1 GB": lambda: Endless(b"<a>", b" ", GB),
    "an attribute just under the limit": lambda: Endless(b'<a b="', b"x", FULL),
    "a text just under the limit": lambda: Endless(b"<a>", b"x", FULL),
    "a name without an end": lambda: Endless(b"<", b"a", FULL),
    "elements without an end": lambda: Endless(b"<a>", b"<a/>", FULL),
    "attributes without an end": lambda: Endless(b"<a", b" b=''", FULL),
    "comments without an end": lambda: Endless(b"", b"<!---->", FULL),
    "instructions without an end": lambda: Endless(b"<a>", b"<?a?>", FULL),
    "references without an end": lambda: Endless(b"<a>", b"&#65;", FULL),
    "a comment that is never closed": lambda: Endless(b"<!--", b"-", FULL),
    "a declaration that is never closed": lambda: Endless(b"<?xml", b" ", FULL),
    "UTF-16 without an end": lambda: Endless(b"\\xff\\xfe<\\0", b"\\0N", FULL),
    "100,000 levels": lambda: io.BytesIO(b"<a>" * 100_000 + b"</a>" * 100_000),
    "a billion laughs": lambda: io.BytesIO(
        b'<!DOCTYPE a [<!ENTITY a "ha">'
        + b"".join(b'<!ENTITY %c "%s">' % (c, b"&%c;" % (c - 1) * 10) for c in range(98, 110))
        + b"]><a>&m;</a>"
    ),
    "quadratic blow-up": lambda: io.BytesIO(
        b'<!DOCTYPE a [<!ENTITY a "' + b"x" * 100_000 + b'">]><a b="' + b"&a;" * 100_000 + b'"/>'
    ),
    "a document type after 1 MB of comments": lambda: io.BytesIO(
        b"<?xml version='1.0'?><!-- <a> -->" + b"<!-- x -->" * 100_000 + b"<!DOCTYPE a><a/>"
    ),
}
stream, before, begin = CASES[sys.argv[1]](), peak(), time.process_time()
try:
    list(read_cda(stream, "a.xml"))
except HuizhenError as error:
    print(type(error).__name__, peak() - before, time.process_time() - begin)
"""
BOMBS = [line.split('"')[1] for line in CHILD.splitlines() if line.startswith('    "')]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures by Linux's /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_within_64_mb_and_a_second(bomb):
    child = subprocess.run(  # noqa: S603 - our own text
        [sys.executable, "-c", CHILD, bomb], capture_output=True, text=True, timeout=60, check=True
    )
    error, megabytes, seconds = child.stdout.split()
    assert error in ("GovernanceError", "ConfigError")
    assert float(megabytes) < 64
    assert float(seconds) < 1


def test_a_document_is_read_without_comments_and_instructions():
    root = read_xml(io.BytesIO(b"<?x y?><!-- c --><a b='1'>t<!-- d --><?e f?><c/></a>"), "a.xml")
    assert root.tag == "a"
    assert [child.tag for child in root] == ["c"]
    assert (root.text, root.get("b")) == ("t", "1")


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "gbk", "GB2312", "big5", "utf-16"])
def test_the_declared_encoding_is_used(encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?><a>中文</a>'
    assert read_xml(io.BytesIO(text.encode(encoding)), "a.xml").text == "中文"


def test_what_is_called_gb2312_may_be_gb18030_as_it_mostly_is():
    text = '<?xml version="1.0" encoding="GB2312"?><a>镕𠮷</a>'
    assert read_xml(io.BytesIO(text.encode("gb18030")), "a.xml").text == "镕𠮷"


@pytest.mark.parametrize(
    "data",
    [
        codecs.BOM_UTF8 + "<a>中</a>".encode(),
        "<a>中</a>".encode("utf-16-le"),
        "<a>中</a>".encode("utf-16-be"),
        "\ufeff<a>中</a>".encode("utf-16-be"),
        b"\r\n <a>&#x4e2d;</a>",
    ],
)
def test_marks_and_blanks_before_the_document_are_passed_over(data):
    assert read_xml(io.BytesIO(data), "a.xml").text == "中"


DOCUMENT_TYPES = [
    f"<!DOCTYPE a><a>{CONTENT}</a>",
    '<?xml version="1.0"?>\n<!-- x -->\n<!DOCTYPE a [<!ENTITY b "c">]><a d="&b;"/>',
    '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
    '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    '<!DOCTYPE a [<!ENTITY % b SYSTEM "http://127.0.0.1/b.dtd"> %b;]><a/>',
    "<?a <b>?><!-- > <b> --><!doctype a><a/>",
]


@pytest.mark.parametrize("text", DOCUMENT_TYPES)
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_document_type_is_refused_in_every_encoding(text, encoding):
    if encoding == "gb18030":
        text = '<?xml version="1.0" encoding="gb18030"?>' + text.removeprefix(
            '<?xml version="1.0"?>'
        )
    with pytest.raises(GovernanceError, match="a document type"):
        read_xml(io.BytesIO(text.encode(encoding)), "a.xml")


def test_a_document_type_in_a_comment_or_a_text_is_none():
    data = b"<!-- <!DOCTYPE a> --><a><![CDATA[<!DOCTYPE a>]]></a>"
    assert read_xml(io.BytesIO(data), "a.xml").text == "<!DOCTYPE a>"


def test_an_entity_that_nothing_declares_is_refused():
    with pytest.raises(GovernanceError, match=r"^a\.xml:1: not well-formed"):
        read_xml(io.BytesIO(b"<a>&b;</a>"), "a.xml")


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b"", ConfigError, "does not begin as XML"),
        (b'{"a": 1}', ConfigError, "does not begin as XML"),
        (b"\x1f\x8b\x08\0\0\0\0\0", ConfigError, "compressed"),
        (b"PK\x03\x04", ConfigError, "compressed"),
        (b'<?xml version="1.0" encoding="utf-7"?><a/>', ConfigError, "encoding 'utf-7'"),
        (b'<?xml version="1.0" encoding="no-such"?><a/>', ConfigError, "encoding 'no-such'"),
        ("<a>中</a>".encode("gb18030"), GovernanceError, "not well-formed"),
        (codecs.BOM_UTF16_LE + b"<\0a", GovernanceError, "not utf-16"),
        (b"<a/><a/>", GovernanceError, "not well-formed"),
        (b"<a>" * 300 + b"</a>" * 300, GovernanceError, "deeper"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(data, error, match):
    with pytest.raises(error, match=match):
        read_xml(io.BytesIO(data), "a.xml")


def test_an_error_names_the_line_and_shows_nothing():
    with pytest.raises(GovernanceError) as caught:
        read_xml(io.BytesIO(f"<a>\n<{CONTENT}>\n</b></a>".encode()), "a.xml")
    assert str(caught.value).startswith("a.xml:3: ")
    assert CONTENT not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_bounds_are_as_they_are_said_to_be():
    elements = b"<a>" + b"<b/>" * (MAX_NODES - 2) + b"</a>"
    assert len(read_xml(io.BytesIO(elements), "a.xml")) == MAX_NODES - 2
    with pytest.raises(GovernanceError, match="elements and attributes"):
        read_xml(io.BytesIO(elements.replace(b"</a>", b"<b/><b/><b/></a>")), "a.xml")
    with pytest.raises(GovernanceError, match=f"over {MAX_ENTRY_BYTES} bytes"):
        read_xml(io.BytesIO(b"<a>" + b" " * MAX_ENTRY_BYTES), "a.xml")


pieces = st.lists(
    st.sampled_from(
        [b"<", b">", b"a", b"<a>", b"</a>", b"<!--", b"-->", b"<?", b"?>", b"<!DOCTYPE"]
    )
    | st.sampled_from([b"<![CDATA[", b"]]>", b"&", b"&#0;", b"&lt;", b'"', b"=", b" xmlns:a='b'"])
    | st.sampled_from([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'<?xml version="1.0" encoding="'])
    | st.binary(max_size=4)
).map(b"".join)


@given(pieces | st.binary() | st.text().map(str.encode))
def test_any_bytes_are_a_document_or_a_clean_error(data):
    with contextlib.suppress(ConfigError, GovernanceError):
        assert read_xml(io.BytesIO(data), "a.xml").getroottree().docinfo.internalDTD is None
