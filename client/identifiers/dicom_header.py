"""What identifies in a DICOM header, removed; and images whose pixels may show it, found.

PS3.15 annex E, Basic Application Level Confidentiality Profile, by the table of
``dicom_profile.py`` and, stricter than it: private and unknown attributes, free text, names of
persons, overlays and curves go wherever they stand, also within sequences. Free text is not cleaned
but removed. A structured report loses its content (table: D), so take what it says before.

UIDs become UUIDs under the arc 2.25 (PS3.5 B.2), made under the site's key: the same UID always
gives the same, and what was made under the key is known again, so that doing it twice changes
nothing. No part of this looks at pixels: ``burned_in`` gives the reasons not to trust them.
"""

import contextlib
import hashlib
import hmac
import re
import uuid
from datetime import date, timedelta

from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag

from huizhen.client.identifiers.dicom_profile import ACTIONS, CHARACTERISTICS
from huizhen.client.records.dicom_file import PIXEL_TAGS, quiet
from huizhen.client.records.dicom_values import Header
from huizhen.protocol.errors import ConfigError, GovernanceError

METHOD = "PS3.15 E.1 Basic Profile 2026c"
MIN_KEY_BYTES = 32
_DUMMY = "REMOVED"
_DUMMIES = {"DA": "19000101", "DT": "19000101000000", "TM": "000000", "AS": "000Y", "AE": _DUMMY}
_TEXTS = frozenset({"LO", "SH", "ST", "LT", "UT", "UC", "PN", "CS"})
_FREE = frozenset({"LT", "ST", "UT", "PN", "UR"})
# what people type, which no table can list
_BIRTH = frozenset({0x00100030, 0x00100032})
_OWN = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_PROFILE = ("113100", "Basic Application Confidentiality Profile")
_SHIFTED = ("113107", "Retain Longitudinal Temporal Information Modified Dates Option")
_KEPT = ("113108", "Retain Patient Characteristics Option")
_OLDEST = 90
# years; higher ages are few enough to identify (45 CFR 164.514(b)(2)(i)(C))
_STANDARD_ROOT = "1.2.840.10008."
_SCREENS = frozenset({"US", "IVUS", "XA", "RF", "OT", "ES", "XC", "SC", "HC", "DOC", "BDUS", ""})
# modalities whose machines write names into the image, or that are pictures of screens and paper
_SECONDARY_CAPTURE = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.7(\.\d+)?")


def deidentify_header(
    dataset: Dataset,
    *,
    uid_key: bytes,
    days: int | None = None,
    keep_characteristics: bool = False,
    patient: str = "",
) -> Dataset:
    """Return a data set without what identifies, its pixels as they are.

    Args:
        dataset: as ``records.dicom_file.load`` gives it; it stays as it is.
        uid_key: the site's own secret, at least 32 bytes.
        days: by how many all dates move, one number for all of a patient's files; None removes
            dates and times. Dates of birth are removed either way.
        keep_characteristics: keep sex, age (90 for all above), size, weight, smoking, pregnancy.
        patient: what to call the patient, the same in all of the patient's files.

    Raises:
        ConfigError: the key is too short.
        GovernanceError: the header is damaged.
    """
    if len(uid_key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"uid_key has {len(uid_key)} bytes, expected at least {MIN_KEY_BYTES}: make another"
        )
    cleaning = _Cleaning(Uids(uid_key), days, keep_characteristics)
    clean = None
    with quiet("header"), contextlib.suppress(Exception):  # pydicom lets through what it meets
        clean = _made(dataset, cleaning, patient)
    if clean is None:  # not chained: what pydicom raises quotes values
        raise GovernanceError(
            "header has values that pydicom does not read, expected what the standard allows: "
            "leave the file out"
        )
    return clean


def _made(dataset: Dataset, cleaning: "_Cleaning", patient: str) -> Dataset:
    header = Header(dataset)
    if any(cleaning.uids.is_own(header.text(keyword)) for keyword in _OWN):
        cleaning.days = cleaning.days and 0  # the dates of what was made here have moved already
    clean = cleaning.cleaned(dataset)
    if patient:
        clean.PatientID = clean.PatientName = patient
    _mark(clean, cleaning)
    clean.file_meta = FileMetaDataset()
    clean.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    if "SOPClassUID" in clean and "SOPInstanceUID" in clean:
        clean.file_meta.MediaStorageSOPClassUID = clean.SOPClassUID
        clean.file_meta.MediaStorageSOPInstanceUID = clean.SOPInstanceUID
    return clean


def burned_in(dataset: Dataset) -> str | None:
    """Return why an image's pixels may show who the patient is; None where nothing says so.

    Equipment that says BurnedInAnnotation NO is believed, except of screens saved as images.
    """
    with quiet("header"):
        header = Header(dataset)
        annotated = header.text("BurnedInAnnotation").upper()
        types = {text.upper() for text in header.texts("ImageType")}
        modality = header.text("Modality").upper()
        sop_class = header.text("SOPClassUID")
    if annotated == "YES":
        return "BurnedInAnnotation is YES"
    if header.text("RecognizableVisualFeatures").upper() == "YES":
        return "RecognizableVisualFeatures is YES"
    if "SCREEN SAVE" in types:
        return "ImageType says that it is a screen"
    if any(tag >> 24 == 0x60 for tag in dataset.keys()):  # noqa: SIM118 - iterating converts
        return "it has overlays"
    if "EncapsulatedDocument" in dataset:
        return "it is a document"
    if annotated == "NO":
        return None
    if "SECONDARY" in types:
        return "ImageType is SECONDARY and BurnedInAnnotation is not NO"
    if _SECONDARY_CAPTURE.fullmatch(sop_class):
        return "it is a secondary capture and BurnedInAnnotation is not NO"
    if modality in _SCREENS:
        return f"Modality is {modality!r} and BurnedInAnnotation is not NO"
    return None


class Uids:
    """UIDs of a site's own, in place of those that lead back to it."""

    def __init__(self, key: bytes) -> None:
        """Take the site's secret."""
        self._key = key

    def __repr__(self) -> str:
        return "Uids(<masked>)"

    def own(self, uid: str) -> str:
        """Return the UID in place of another; the standard's, and the site's own, stay."""
        if not uid or uid.startswith(_STANDARD_ROOT) or self.is_own(uid):
            return uid
        return self._made(self._mac(b"uid", uid.encode())[:11])

    def is_own(self, uid: str) -> bool:
        """Return whether a UID was made under the key."""
        number = uid.removeprefix("2.25.")
        if number == uid or not re.fullmatch(r"[1-9][0-9]{0,38}", number) or int(number) >> 128:
            return False
        return hmac.compare_digest(self._made(int(number).to_bytes(16, "big")[:11]), uid)

    def _made(self, head: bytes) -> str:
        """Return a UUID of version 8 (RFC 9562 5.8): 82 bits, and 40 that prove the key."""
        bits = bytearray(head)
        bits[6] = bits[6] & 0x0F | 0x80
        bits[8] = bits[8] & 0x3F | 0x80
        return f"2.25.{uuid.UUID(bytes=bytes(bits) + self._mac(b'mark', bytes(bits))[:5]).int}"

    def _mac(self, purpose: bytes, data: bytes) -> bytes:
        return hmac.digest(self._key, b"huizhen dicom " + purpose + b"\0" + data, hashlib.sha256)


class _Cleaning:
    """The cleaning of one data set and all that it holds."""

    def __init__(self, uids: Uids, days: int | None, keep_characteristics: bool) -> None:
        self.uids = uids
        self.days = days
        self.kept = CHARACTERISTICS if keep_characteristics else frozenset()

    def cleaned(self, dataset: Dataset) -> Dataset:
        clean = Dataset()
        for element in dataset.elements():
            tag = element.tag
            if tag in PIXEL_TAGS or (tag >> 16 == 0x7FE0 and tag.element):
                clean[tag] = element
            elif not _is_always_removed(tag):
                self._add(clean, dataset, tag, element.VR)
        implicit, little = dataset.original_encoding
        clean.set_original_encoding(implicit, little, dataset.original_character_set)
        return clean

    def _add(self, clean: Dataset, dataset: Dataset, tag: BaseTag, given: str | None) -> None:
        """Add what may stay of an element."""
        vr = dictionary_VR(tag)
        action = ACTIONS.get(tag)
        if tag in self.kept:
            action = None
        elif action is None and (vr in _FREE | {"DA", "DT"} or given in _FREE):
            action = "Z"
        if (stays := self._stays(dataset, tag, vr)) is not None:
            clean.add_new(tag, vr, stays)
        elif vr == "SQ" and action in (None, "U"):
            clean.add_new(tag, vr, [self.cleaned(item) for item in dataset[tag].value or ()])
        elif action == "U" or (action == "D" and vr == "UI"):
            clean.add_new(tag, vr, [self.uids.own(text) for text in _strings(dataset, tag)])
        elif action == "D":
            clean.add_new(tag, vr, _dummy(vr))
        elif action == "Z":
            clean.add_new(tag, vr, [] if vr == "SQ" else None)
        elif action is None:
            clean[tag] = dataset.get_item(tag)

    def _stays(self, dataset: Dataset, tag: BaseTag, vr: str) -> list[str] | None:
        """Return the values of a date, a time or an age that may stay in another form."""
        if vr == "AS" and tag in self.kept:
            return [_capped(text) for text in _strings(dataset, tag)]
        if self.days is None or tag in _BIRTH or vr not in ("DA", "DT", "TM"):
            return None
        texts = _strings(dataset, tag)
        if vr == "TM":
            is_time = all(re.fullmatch(r"\d{2,6}(\.\d{1,6})?", text) for text in texts)
            return texts if texts and is_time else None
        moved = [_moved(text, self.days) for text in texts]
        return moved if moved and all(moved) else None


def _is_always_removed(tag: BaseTag) -> bool:
    """Return whether a tag is private, unknown, a group's length, or of a curve or an overlay."""
    is_graphic = tag >> 24 in (0x50, 0x60)
    return tag.is_private or is_graphic or not tag.element or not dictionary_has_tag(tag)


def _dummy(vr: str) -> str | list[str] | bytes | None:
    if vr in ("DS", "IS"):
        return "0"
    return _DUMMIES.get(vr) or (_DUMMY if vr in _TEXTS else [] if vr == "SQ" else None)


def _strings(dataset: Dataset, tag: BaseTag) -> list[str]:
    """Return an element's values as they are written, without converting them."""
    value = dataset.get_item(tag).value
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\\")
    several = value if isinstance(value, list) or hasattr(value, "insert") else [value]
    return [text for one in several if one is not None and (text := str(one).strip("\0 "))]


def _moved(text: str, days: int) -> str:
    """Return a date, perhaps with a time, so many days later; empty where it is none."""
    found = re.fullmatch(r"(\d{4})(\d{2})(\d{2})((?:\d{2,6}(?:\.\d{1,6})?)?(?:[+-]\d{4})?)", text)
    if not found:
        return ""
    try:
        day = date(int(found[1]), int(found[2]), int(found[3])) + timedelta(days)
    except (ValueError, OverflowError):
        return ""
    return f"{day:%Y%m%d}".rjust(8, "0") + found[4]


def _capped(text: str) -> str:
    """Return an age in the standard's form, and none above 90; anything else is not kept."""
    if not re.fullmatch(r"\d{3}[DWMY]", text):
        return ""
    return f"{min(int(text[:3]), _OLDEST):03d}Y" if text[3] == "Y" else text


def _mark(clean: Dataset, cleaning: _Cleaning) -> None:
    """Say in a data set what was done with it (PS3.15 E.1.1, PS3.16 CID 7050)."""
    done = [_PROFILE]
    done += [_SHIFTED] if cleaning.days is not None else []
    done += [_KEPT] if cleaning.kept else []
    clean.PatientIdentityRemoved = "YES"
    clean.DeidentificationMethod = METHOD
    clean.LongitudinalTemporalInformationModified = (
        "REMOVED" if cleaning.days is None else "MODIFIED"
    )
    codes = []
    for value, meaning in done:
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
        codes.append(code)
    clean.DeidentificationMethodCodeSequence = codes
