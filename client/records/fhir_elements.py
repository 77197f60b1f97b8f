"""The data types of FHIR R4 that records are made of (https://hl7.org/fhir/R4/datatypes.html).

An element that is not what FHIR says is an ``UnfitError``; an absent one is empty.
"""

import base64
import binascii
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from huizhen.client.records.codings import Concept, best_concept, system_name
from huizhen.client.records.naming import Naming, identifier_kind, name_forms
from huizhen.client.records.record import Comparator, Finding, Image, Lab
from huizhen.client.records.results import range_of
from huizhen.client.records.times import iso

JsonObject = dict[str, Any]
_COMPARATORS: Final[dict[str, Comparator]] = {"": "", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
_MEDIA_TYPE: Final = re.compile(
    r"\s*([\w.+-]{1,40}/[\w.+-]{1,80})\s*(?:;(.*))?", re.DOTALL | re.ASCII
)
_CHARSET: Final = re.compile(r"charset\s*=\s*\"?([\w.:-]{1,40})", re.IGNORECASE)
_CHARSETS: Final = {  # a list of our own: some of Python's codecs take quadratic time
    "utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "windows-1252", "utf-16", "gb18030", "gbk",
    "gb2312", "big5",
}  # fmt: skip
_BLOCK: Final = re.compile(r"<(?:/(?:p|div|tr|li|h[1-6]|table|ul|ol)|br)\b[^<>]*>", re.IGNORECASE)
_CELL: Final = re.compile(r"</t[dh]\s*>", re.IGNORECASE)
_TAG: Final = re.compile(r"<[^<>]*>")
_NOTHING: Final = Concept()
_TEXT_TYPES: Final = ("", "text/plain", "text/markdown")
_HTML_TYPES: Final = ("text/html", "application/xhtml+xml", "text/xhtml")


class UnfitError(ValueError):
    """A resource cannot be read; the message shows nothing of its content."""


@dataclass(slots=True)
class Content:
    """What a resource says, without whose it is."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    time: str = ""
    text: str = ""
    findings: tuple[Finding, ...] = ()
    labs: tuple[Lab, ...] = ()
    images: tuple[Image, ...] = ()
    problems: list[str] = field(default_factory=list)
    # of parts that could not be read, such as an attachment

    def __repr__(self) -> str:
        return f"Content(<masked>, {self.kind})"


def string(parent: JsonObject, key: str) -> str:
    """Return an element that is a text."""
    value = parent.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnfitError(f"element {key!r} is not text, FHIR R4 has text there: mend the export")
    return value


def objects(parent: JsonObject, key: str) -> list[JsonObject]:
    """Return an element that repeats; one alone counts as a list of one."""
    value = parent.get(key)
    if value is None:
        return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UnfitError(f"element {key!r} is no list of objects, as FHIR R4 has it: mend it")
    return value


def one(parent: JsonObject, key: str) -> JsonObject:
    """Return an element that is an object; the first where it repeats."""
    return found[0] if (found := objects(parent, key)) else {}


def strings(parent: JsonObject, key: str) -> list[str]:
    """Return an element that is a list of texts; FHIR lets one of them be null."""
    value = parent.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str | None) for item in value):
        raise UnfitError(f"element {key!r} is no list of texts, as FHIR R4 has it: mend it")
    return [item for item in value if item]


def number(parent: JsonObject, key: str) -> float | None:
    """Return an element that is a number."""
    value = parent.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnfitError(f"element {key!r} is no number, FHIR R4 has one there: mend the export")
    return float(value)


def time(parent: JsonObject, *keys: str) -> str:
    """Return the first of some elements that is a time, or a period that has a start."""
    for key in keys:
        value = parent.get(key)
        if isinstance(value, dict):
            value = string(value, "start")
        if not value:
            continue
        try:
            return iso(value if isinstance(value, str) else "?")
        except ValueError as error:
            raise UnfitError(f"element {key!r} {error}: mend the export") from error
    return ""


def concept(value: JsonObject, prefer: str = "") -> Concept:
    """Return what a CodeableConcept means.

    Args:
        value: the element; empty where it is absent.
        prefer: the system whose code counts; otherwise the first well-known one.
    """
    if not value:
        return _NOTHING
    codings = [
        (string(item, "code"), system_name(string(item, "system")), string(item, "display"))
        for item in objects(value, "coding")
    ]
    return best_concept(codings, string(value, "text"), prefer)


def words(value: JsonObject) -> str:
    """Return a CodeableConcept as a person reads it: its text, its name or its code."""
    found = concept(value)
    return found.text or found.name or found.code


def quantity(value: JsonObject) -> tuple[float | None, Comparator, str]:
    """Return a Quantity's value, comparator and unit; of a unit in UCUM its code."""
    sign = string(value, "comparator")
    if sign not in _COMPARATORS:
        raise UnfitError("element 'comparator' is none of <, <=, >=, >: mend the export")
    unit, code = string(value, "unit"), string(value, "code")
    is_ucum = system_name(string(value, "system")) == "ucum"
    return number(value, "value"), _COMPARATORS[sign], code if code and is_ucum else unit or code


def reference_range(parent: JsonObject) -> tuple[float | None, float | None, str]:
    """Return the ends of the first referenceRange, and its text where it has no ends."""
    given = one(parent, "referenceRange")
    low, high = number(one(given, "low"), "value"), number(one(given, "high"), "value")
    text = string(given, "text")
    if low is None and high is None:
        low, high = range_of(text)
    return low, high, text if low is None and high is None else ""


def plain(markup: str) -> str:
    """Return the text of XHTML; its blocks end lines.

    No expression here can look at a character twice over: a tag ends at the next "<" at the latest.
    """
    text = _TAG.sub("", _CELL.sub("\t", _BLOCK.sub("\n", markup)))
    lines = (" ".join(line.split()) for line in html.unescape(text).split("\n"))
    return "\n".join(line for line in lines if line)


def attachment_text(value: JsonObject) -> str:
    """Return the text of an Attachment.

    Raises:
        UnfitError: it is another kind of document, a link, or damaged.
    """
    found = _MEDIA_TYPE.fullmatch(string(value, "contentType"))
    kind = found[1].lower() if found else ""
    if kind not in (*_TEXT_TYPES, *_HTML_TYPES):
        raise UnfitError(f"attachment is {kind!r}, expected text/plain: export its text")
    if not (data := string(value, "data")):
        raise UnfitError("attachment is a link or empty, expected its text inside: export it")
    charset = _CHARSET.search(found[2] or "") if found else None
    encoding = charset[1].lower() if charset else "utf-8"
    if encoding not in _CHARSETS:
        raise UnfitError("attachment is in a charset that is not read, expected utf-8: export it")
    try:
        raw = base64.b64decode("".join(data.split()), validate=True)
        text = raw.decode(encoding).removeprefix("\ufeff")
    except (binascii.Error, ValueError) as error:
        raise UnfitError(
            "attachment is not base64 of text in its charset, expected UTF-8: mend the export"
        ) from error
    return plain(text) if kind in _HTML_TYPES else text


def name_person(person: JsonObject, naming: Naming, kind: str = "name") -> None:
    """Gather what names a Patient, a RelatedPerson or a contact."""
    for name in objects(person, "name"):
        forms = name_forms(string(name, "family"), strings(name, "given"), string(name, "text"))
        naming.add(kind, *forms)
    for number_ in objects(person, "identifier"):
        types = [string(coding, "code") for coding in objects(one(number_, "type"), "coding")]
        naming.add(identifier_kind(types[0] if types else ""), string(number_, "value"))
    for telecom in objects(person, "telecom"):
        is_email = string(telecom, "system") == "email"
        naming.add("email" if is_email else "phone", string(telecom, "value"))
    for address in objects(person, "address"):
        naming.add("address", *_address_forms(address))


def _address_forms(address: JsonObject) -> Iterator[str]:
    lines = strings(address, "line")
    parts = [string(address, key) for key in ("city", "district", "state", "postalCode")]
    yield string(address, "text")
    yield " ".join(part for part in (*lines, *parts) if part)
    yield from (line for line in lines if len(line) > 3)


def filled(fields: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Keep what is not empty."""
    fields.update((key, value) for key, value in values.items() if value)
    return fields


def notes(resource: JsonObject) -> str:
    """Return the texts of its annotations."""
    return "\n".join(text for note in objects(resource, "note") if (text := string(note, "text")))


def category(resource: JsonObject) -> str:
    """Return the codes or names of its categories."""
    found = [concept(item) for item in objects(resource, "category")]
    return "; ".join(item.code or item.name for item in found if item.code or item.name)
