"""DICOM files as data sets, read within bounds whatever their bytes claim.

PS3.10 section 7 gives the file, PS3.5 section 7 the encoding. pydicom parses; this module bounds
what it may read: bytes, steps and depth. Lengths that the file claims are never believed, and all
sequences are opened here, under the same bounds, so that nothing is left to unfold later.

pydicom's settings and Python's warnings belong to the process: read DICOM in one thread at a time.
"""

import contextlib
import logging
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from pydicom import config
from pydicom.charset import convert_encodings, python_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_sequence
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from huizhen.client.records.record import MAX_ENTRY_BYTES
from huizhen.protocol.errors import ConfigError, GovernanceError

MAX_STEPS = 120_000
# reads of a tag, a length or a value: an enhanced series takes about 60 for each of its images, a
# plain image some hundreds; a hostile file gets under 64 MiB and a second out of so many
MAX_DEPTH = 32
# of sequences within sequences; structured reports rarely pass ten
BLOCK_BYTES = 64 << 10
PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_DEFLATED = frozenset({DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95"})
_ESSENTIAL = {
    "Image Storage": "Rows",
    " SR Storage": "ContentSequence",
    "Waveform Storage": "WaveformSequence",
}
# what an object of such a class cannot lack (PS3.3 A), and comes late in its file
_CHARACTER_SET = BaseTag(0x00080005)

_logger = logging.getLogger(__name__)
logging.getLogger("pydicom").propagate = False
# its warnings quote values, which no log may hold; quiet() counts them instead


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Hold back what pydicom says of a file, which may quote it, and log how often it spoke."""
    with warnings.catch_warnings(record=True) as said, config.disable_value_validation():
        warnings.simplefilter("always")
        # Pillow names no value here, and what it warns of must not be decoded
        warnings.filterwarnings("error", message="Image size .* exceeds limit")
        yield
    if said:
        _logger.warning("dicom_departs_from_standard file=%s times=%d", name, len(said))


def load(
    stream: BinaryIO,
    name: str,
    *,
    charset: str = "",
    pixels: Callable[[Dataset], int] | None = None,
) -> Dataset:
    """Return a file's data set, with ``file_meta``; its pixels only when they are asked for.

    Args:
        stream: the file, with the preamble or without.
        name: what to call it.
        charset: a defined term of PS3.3 C.12.1.1.2, such as ``GB18030``, that takes the place of
            what the file declares; for equipment that declares none, or a wrong one.
        pixels: given the header, says how many bytes the pixels may have, or refuses; without it
            the reading stops before them.

    Raises:
        ConfigError: it is no DICOM, or ``charset`` is no such term.
        GovernanceError: it is cut short, damaged, or larger than a header may be.
    """
    if charset and charset not in python_encoding:
        raise ConfigError(f"charset is {charset[:80]!r}, expected a DICOM term such as 'GB18030'")
    steps = _Steps()
    try:
        with quiet(name):
            return _Reading(name, steps, charset, pixels).read(stream)
    except (ConfigError, GovernanceError):
        raise
    except RecursionError:
        problem = "sequences lie too deep"
    except Exception:  # noqa: BLE001 - pydicom lets through whatever its parsing meets
        problem = steps.problem or "file is no whole DICOM data set"
    # not chained: what pydicom raises quotes values
    raise GovernanceError(f"{name}: {problem}, expected a whole file: export it again")


@dataclass(slots=True)
class _Steps:
    """How much was read of one file, over all its windows."""

    count: int = 0
    problem: str = ""

    def refuse(self, problem: str) -> None:
        self.problem = problem
        raise ValueError(problem)


@dataclass(slots=True)
class _Window:
    """A file as pydicom reads it, which uses only these three verbs of a file."""

    blocks: Iterator[bytes]
    steps: _Steps
    limit: int = MAX_ENTRY_BYTES
    position: int = 0
    ends_ragged: bool = False
    held: bytearray = field(default_factory=bytearray)

    def read(self, size: int = -1) -> bytes:
        self.steps.count += 1
        if self.steps.count > MAX_STEPS:
            self.steps.refuse(f"data set has over {MAX_STEPS} parts")
        end = self.position + size
        if not self.position <= end:
            self.steps.refuse("file is read out of order")
        while len(self.held) < end and (block := next(self.blocks, b"")):
            self.held += block
            if len(self.held) > self.limit + BLOCK_BYTES:
                self.steps.refuse(f"data set has over {self.limit} bytes")
        data = bytes(memoryview(self.held)[self.position : end])
        self.ends_ragged = 0 < len(data) < size
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset if whence == 0 else self.position + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def peek(self, size: int) -> bytes:
        data = self.read(size)
        self.position -= len(data)
        return data


@dataclass(slots=True)
class _Reading:
    """The reading of one file."""

    name: str
    steps: _Steps
    charset: str
    pixels: Callable[[Dataset], int] | None

    def read(self, stream: BinaryIO) -> Dataset:
        window = _Window(iter(lambda: stream.read(BLOCK_BYTES), b""), self.steps)
        start = window.read(132)
        window.seek(132 if start[128:] == b"DICM" else 0)
        if start[128:] != b"DICM" and not _is_plainly_dicom(start):
            raise ConfigError(f"{self.name}: file is no DICOM: leave it out, or name its kind")
        meta = FileMetaDataset()
        if window.peek(2) == b"\x02\x00":
            found = read_dataset(_file(window), False, True, stop_when=_after_group_2)
            meta = FileMetaDataset(found)
        syntax = UID(str(meta.get("TransferSyntaxUID", "")).strip("\0 ")) or _guess(window.peek(8))
        if syntax in _DEFLATED:
            window = _Window(_inflated(window), self.steps)
        meta.TransferSyntaxUID = syntax
        return self._body(window, syntax, meta)

    def _body(self, window: _Window, syntax: UID, meta: FileMetaDataset) -> Dataset:
        implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
        stopped: list[int] = []

        def at_pixels(tag: BaseTag, _vr: str | None, _length: int) -> bool:
            if tag in PIXEL_TAGS or tag > 0x7FE00010:
                stopped.append(tag)
            return bool(stopped)

        dataset = read_dataset(_file(window), implicit, little, stop_when=at_pixels)
        if not dataset:
            self.steps.refuse("data set is empty")
        has_pixels = bool(PIXEL_TAGS.intersection(stopped))
        if (not stopped and (window.ends_ragged or window.peek(1))) or _is_short(dataset):
            self.steps.refuse("file is cut short")
        kind = UID(str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID", ""))).name
        for ending, keyword in _ESSENTIAL.items():
            if kind.endswith(ending) and keyword not in dataset:
                self.steps.refuse("file is cut short")
        if "Rows" in dataset and not has_pixels and "PixelDataProviderURL" not in dataset:
            self.steps.refuse("file is cut short before its pixels")
        dataset.file_meta = meta
        self._open(dataset, 0, convert_encodings(self.charset))
        if self.pixels and has_pixels:
            # half as much again for compression that fails to, and a few bytes a frame
            window.limit = window.position + self.pixels(dataset) * 3 // 2 + (1 << 20)
            rest = read_dataset(_file(window), implicit, little, stop_when=_after_pixels)
            if _is_short(rest) or not PIXEL_TAGS.intersection(rest.keys()):
                self.steps.refuse("file is cut short within its pixels")
            dataset.update(rest)
        return dataset

    def _open(self, dataset: Dataset, depth: int, encoding: list[str]) -> None:
        """Read all sequences of a data set, which pydicom leaves as bytes until they are used."""
        if depth > MAX_DEPTH:
            self.steps.refuse("sequences lie too deep")
        encoding = self._encoding(dataset) or encoding
        for element in list(dataset.elements()):
            if isinstance(element, RawDataElement) and _is_sequence(element):
                window = _Window(iter([element.value or b""]), self.steps)
                items = read_sequence(
                    _file(window),
                    element.is_implicit_VR,
                    element.is_little_endian,
                    len(element.value or b""),
                    encoding,
                )
                dataset[element.tag] = DataElement(element.tag, "SQ", items)
            elif isinstance(element, DataElement) and element.VR == "SQ":
                items = element.value
            else:
                continue
            for item in items:
                if _is_short(item):
                    self.steps.refuse("sequence is cut short")
                self._open(item, depth + 1, encoding)

    def _encoding(self, dataset: Dataset) -> list[str]:
        """Make a data set's character set one that Python knows; others would garble every name."""
        terms = [self.charset]
        if not self.charset:
            if _CHARACTER_SET not in dataset:
                return []
            value = dataset.get_item(_CHARACTER_SET).value
            text = value.decode("latin-1") if isinstance(value, bytes) else ""
            terms = [_spelled(term) for term in text.split("\\")]
        if len(terms) > 8 or any(term not in python_encoding for term in terms):
            raise GovernanceError(
                f"{self.name}: SpecificCharacterSet is no term of PS3.3 C.12.1.1.2, "
                "expected such as GB18030: give the file's own as charset"
            )
        encoding = convert_encodings(terms)
        dataset.add_new(_CHARACTER_SET, "CS", terms)
        implicit, little = dataset.original_encoding
        dataset.set_original_encoding(implicit, little, encoding)
        return encoding


def _file(window: _Window) -> BinaryIO:
    return cast(BinaryIO, window)


def _after_group_2(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return bool(tag >> 16 != 2)


def _after_pixels(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return bool(tag > 0x7FE00010)


def _is_plainly_dicom(start: bytes) -> bool:
    """Return whether bytes without a preamble begin as a data set does, with group 2 or 8."""
    if len(start) < 8 or start[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return False
    if re.match(rb"[A-Z]{2}", start[4:6]):
        return True
    length = int.from_bytes(start[4:8], "little")
    return start[:2] == b"\x08\x00" and start[3] == 0 and length <= 1 << 10


def _guess(start: bytes) -> UID:
    """Return the transfer syntax of a data set that names none; big endian only where it shows."""
    if not re.match(rb"[A-Z]{2}", start[4:6]):
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if start[:1] == b"\0" else ExplicitVRLittleEndian


def _inflated(window: _Window) -> Iterator[bytes]:
    """Yield what deflated bytes hold (PS3.5 A.5), a block at a time however much they unfold to."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    while not inflater.eof:
        packed = inflater.unconsumed_tail or window.read(BLOCK_BYTES)
        block = inflater.decompress(packed, BLOCK_BYTES)
        if block:
            yield block
        elif not packed:
            raise ValueError("deflated data end early")


def _is_short(dataset: Dataset) -> bool:
    """Return whether a value has fewer bytes than its element claims: the file ends within it."""
    return any(
        isinstance(element, RawDataElement)
        and element.length != 0xFFFFFFFF
        and len(element.value or b"") != element.length
        for element in dataset.elements()
    )


def _is_sequence(element: RawDataElement) -> bool:
    if element.VR == "SQ":
        return True
    if element.VR not in (None, "UN") or element.tag.is_private:
        return False
    try:
        return dictionary_VR(element.tag) == "SQ"
    except KeyError:
        return False


def _spelled(term: str) -> str:
    """Return a character set's term as the standard spells it: 'ISO-IR 192' is 'ISO_IR 192'."""
    term = term.strip("\0 ")
    term = re.sub(r"^ISO[ _-]2022[ _-]IR[ _-]", "ISO 2022 IR ", term)
    return re.sub(r"^ISO[ _-]IR[ _-]", "ISO_IR ", term)
