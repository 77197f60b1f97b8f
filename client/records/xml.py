"""XML as a tree, read within bounds whatever its bytes claim: the one way to parse it here.

A document type is refused before the parser sees a byte (OWASP, "XML External Entity Prevention"),
and without one XML has no entities but five characters (XML 1.0, 4.6): nothing can be expanded and
nothing outside be read. Trees take memory by their nodes, not by their bytes, so these are bounded
too; libxml2 itself bounds the depth (256) and the length of a text (10 MB) unless told otherwise.
"""

import codecs
import re
from typing import Any, BinaryIO

from lxml import etree

from huizhen.client.records.record import MAX_ENTRY_BYTES
from huizhen.protocol.errors import ConfigError, GovernanceError

MAX_NODES = 400_000
# elements, attributes and comments; a clinical document has one in 30 bytes
BLOCK_BYTES = 1 << 18
_ENCODINGS = {
    "utf-8": "utf-8",
    "us-ascii": "utf-8",
    "ascii": "utf-8",
    "gb18030": "gb18030",
    "gbk": "gb18030",  # which holds the others, and is often what is meant by their names
    "gb2312": "gb18030",
    "cp936": "gb18030",
    "big5": "big5",
    "iso-8859-1": "iso-8859-1",
    "windows-1252": "windows-1252",
}
# In each a byte below 0x40 is the ASCII character, so that markup can be found in the bytes.
_WIDE = (
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)
_DECLARATION = re.compile(
    rb"""<\?xml\s[^>]{0,200}?\bencoding\s*=\s*["']([A-Za-z][A-Za-z0-9._-]{0,39})["']"""
)


def read_xml(stream: BinaryIO, name: str) -> etree._Element:
    """Return the root of a document; comments and processing instructions are left out.

    Args:
        stream: an open file, read to its end unless it is too large.
        name: what to call it in errors.

    Raises:
        ConfigError: it is no XML, compressed, or in an encoding that is not known.
        GovernanceError: it is not well-formed, has a document type, or is beyond the bounds.
        OSError: the stream cannot be read.
    """
    data, encoding = _bytes_of(_read(stream, name), name)
    _refuse_document_type(data, name)
    nodes = data.count(b"<") - data.count(b"</") + data.count(b"=")
    if nodes > MAX_NODES:
        raise GovernanceError(
            f"{name} has about {nodes} elements and attributes, at most {MAX_NODES} are read: "
            "split it"
        )
    try:
        root = etree.fromstring(data, _parser(encoding))
    except etree.XMLSyntaxError as error:  # its text may quote the document
        raise GovernanceError(
            f"{name}:{error.lineno or 1}: not well-formed XML, or deeper or longer than is read: "
            "mend the export"
        ) from None
    if root.getroottree().docinfo.internalDTD is not None:
        raise _document_type(name)
    return root


def line_of(element: etree._Element) -> int:
    """Return the line on which an element begins."""
    line: Any = element.sourceline  # which the stubs leave open
    return line or 1


def _parser(encoding: str) -> etree.XMLParser:
    return etree.XMLParser(
        encoding=encoding,
        resolve_entities=False,
        load_dtd=False,
        dtd_validation=False,
        no_network=True,
        huge_tree=False,
        recover=False,
        collect_ids=False,
        remove_comments=True,
        remove_pis=True,
    )


def _read(stream: BinaryIO, name: str) -> bytes:
    blocks, size = [], 0
    while block := stream.read(BLOCK_BYTES):
        blocks.append(block)
        size += len(block)
        if size > MAX_ENTRY_BYTES:
            raise GovernanceError(f"{name} has over {MAX_ENTRY_BYTES} bytes: split it")
    return b"".join(blocks)


def _bytes_of(data: bytes, name: str) -> tuple[bytes, str]:
    """Return a document in an encoding in which ASCII bytes are ASCII, and that encoding."""
    for mark, encoding in _WIDE:
        if data.startswith(mark):
            try:
                return data.decode(encoding).removeprefix("\ufeff").encode(), "utf-8"
            except UnicodeError as error:
                raise GovernanceError(f"{name} is not {encoding}: mend the export") from error
    if data.startswith(b"\x1f\x8b") or data.startswith(b"PK\x03\x04"):
        raise ConfigError(f"{name} is compressed, expected XML: unpack it")
    data = data.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if not data.startswith(b"<"):
        raise ConfigError(f"{name} does not begin as XML does, expected '<'")
    declared = _DECLARATION.match(data)
    if declared is None:
        return data, "utf-8"
    given = declared[1].decode().lower()
    if given not in _ENCODINGS:
        raise ConfigError(f"{name} declares encoding {given!r}, expected utf-8 or gb18030")
    return data, _ENCODINGS[given]


def _refuse_document_type(data: bytes, name: str) -> None:
    """Refuse a document type: it stands before the root, after comments and instructions."""
    at = 0
    while (at := data.find(b"<", at)) >= 0:
        if data.startswith(b"<?", at):
            end = data.find(b"?>", at)
        elif data.startswith(b"<!--", at):
            end = data.find(b"-->", at + 4)
        elif data.startswith(b"<!", at):
            raise _document_type(name)
        else:
            return
        if end < 0:
            return  # cut short, as the parser will find
        at = end


def _document_type(name: str) -> GovernanceError:
    return GovernanceError(f"{name} has a document type (DOCTYPE), none is read: remove it")
