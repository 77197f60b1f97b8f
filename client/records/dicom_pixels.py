"""The pixels of a DICOM file as an array, decoded only after their size is known to be bounded.

Transfer syntaxes are those that pydicom decodes by itself (native, deflated, RLE) and those that
installed decoders add; with Pillow that is JPEG 8-bit and JPEG 2000. PS3.3 C.7.6.3 gives the
pixels, C.11.1 what the values mean, C.11.2 how they are shown. A dose stays in its grid's scale.
"""

import math
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array
from pydicom.uid import JPEG2000TransferSyntaxes, RLELossless

from huizhen.client.records.dicom_file import PIXEL_TAGS, load, quiet
from huizhen.client.records.dicom_values import Header
from huizhen.protocol.errors import ConfigError, GovernanceError

MAX_PIXEL_BYTES = 512 << 20
Scale = Literal["stored", "modality", "window"]
Pixels = npt.NDArray[Any]


def read_pixels(
    stream: BinaryIO,
    name: str,
    *,
    scale: Scale = "modality",
    window: tuple[float, float] | None = None,
    max_bytes: int = MAX_PIXEL_BYTES,
) -> Pixels:
    """Return an image, shape (frames, rows, columns), a coloured one (frames, rows, columns, 3).

    Args:
        stream: the file.
        name: what to call it.
        scale: ``stored`` as the file has the values, brighter being more (MONOCHROME1 is inverted);
            ``modality`` as float32 in the modality's unit, such as Hounsfield's, never inverted;
            ``window`` as float32 from 0 to 1, as a display would show it. Coloured images have no
            unit, and their window is all that their bits can hold.
        window: centre and width, in the modality's unit, in place of those that the file gives.
        max_bytes: how large the decoded image may be.

    Raises:
        ConfigError: it is no DICOM, or nothing installed decodes its transfer syntax.
        GovernanceError: it is damaged or too large, or gives no window where one is needed.
    """
    header = Header(load(stream, name, pixels=lambda dataset: _size(dataset, name, max_bytes)))
    if not PIXEL_TAGS.intersection(header.dataset.keys()):
        raise GovernanceError(f"{name}: data set holds no pixels, expected some: leave it out")
    try:
        with quiet(name):
            decoded = _decoded(header)
            return (
                _stored(header, decoded)
                if scale == "stored"
                else _scaled(header, decoded, scale, window)
            )
    except _NoWindowError:
        problem = "image gives no window, expected one: give a centre and width"
    except Exception:  # noqa: BLE001 - decoders let through whatever they meet
        problem = "pixels cannot be decoded, expected as many as the header says: export it again"
    raise GovernanceError(f"{name}: {problem}")  # not chained: what decoders raise quotes values


class _NoWindowError(Exception):
    """A window was asked for and there is none."""


def _size(dataset: Dataset, name: str, max_bytes: int) -> int:
    """Return how many bytes an image will have, by its header alone.

    Raises:
        ConfigError: its pixels cannot be decoded here.
        GovernanceError: it will have more than ``max_bytes``, or its header does not say.
    """
    _check_decoder(dataset, name)
    header = Header(dataset)
    with quiet(name):
        counts = [header.number(one) for one in ("Rows", "Columns", "BitsAllocated")]
        frames = header.number("NumberOfFrames")
        samples = header.number("SamplesPerPixel")
        palette = 6 if "PALETTE" in header.text("PhotometricInterpretation") else 1
    counts += [1 if one is None else one for one in (frames, samples)]
    if header.unreadable or not all(isinstance(one, int) and one > 0 for one in counts):
        raise GovernanceError(
            f"{name}: header does not say how large the image is, "
            "expected rows, columns, bits and frames above 0: export it again"
        )
    rows, columns, bits, frames, samples = (int(one or 0) for one in counts)
    size = rows * columns * frames * samples * palette * -(-bits // 8)
    if size > max_bytes:
        raise GovernanceError(
            f"{name}: image would have {size} bytes, at most {max_bytes} are decoded: leave it out"
        )
    return size


def _check_decoder(dataset: Dataset, name: str) -> None:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ConfigError(
            f"{name}: pixels are in {syntax.name[:80]!r}, expected a transfer syntax that pydicom "
            "reads: convert it"
        ) from None
    if not decoder.is_available:
        ways = "; ".join(decoder.missing_dependencies)
        raise ConfigError(
            f"{name}: pixels are in {syntax.name!r}, which nothing installed decodes: "
            f"install one of {ways}"
        )


def _decoded(header: Header) -> Pixels:
    """Return the values as stored, colours as red, green and blue."""
    dataset = header.dataset
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == RLELossless or syntax in JPEG2000TransferSyntaxes:
        plane = int(header.number("Rows") or 0) * int(header.number("Columns") or 0)
        count = int(header.number("NumberOfFrames") or 1)
        for frame in generate_frames(dataset.PixelData, number_of_frames=count):
            _check_runs(frame, plane) if syntax == RLELossless else _check_boxes(frame)
    decoded = pixel_array(dataset)
    if header.text("PhotometricInterpretation") == "PALETTE COLOR":
        decoded = apply_color_lut(decoded, dataset)
    colours = decoded.shape[-1:] if _is_coloured(header) else ()
    rows, columns = header.number("Rows"), header.number("Columns")
    return decoded.reshape((-1, int(rows or 0), int(columns or 0), *colours))


def _is_coloured(header: Header) -> bool:
    return not header.text("PhotometricInterpretation").startswith("MONOCHROME")


def _check_runs(frame: bytes, plane: int) -> None:
    """Refuse run lengths that unfold to more than their image (PS3.5 annex G: 1 byte makes 64)."""
    words = np.frombuffer(frame[:64], "<u4")
    starts = [int(word) for word in words[1 : 1 + min(15, int(words[0]))]]
    for start, end in zip(starts, [*starts[1:], len(frame)], strict=True):
        at, size = start, 0
        while at < end:
            run = frame[at]
            at += 2 if run > 128 else run + 2 if run < 128 else 1
            size += 257 - run if run > 128 else run + 1 if run < 128 else 0
            if size > 2 * plane + 256:
                raise ValueError("frame unfolds beyond its image")


def _check_boxes(frame: bytes) -> None:
    """Refuse a JPEG 2000 file, as a frame, with boxes without end, at which pydicom 3.0 hangs."""
    at = 12 if frame.startswith(b"\0\0\0\x0cjP  ") else len(frame)
    while at < len(frame) and frame[at + 4 : at + 8] != b"jp2c":
        length = int.from_bytes(frame[at : at + 4], "big")
        if length < 8:
            raise ValueError("box has no length")
        at += length


def _stored(header: Header, decoded: Pixels) -> Pixels:
    """Return stored values; of MONOCHROME1, which shows low ones bright, turned over."""
    bits = int(header.number("BitsStored") or 0)
    if header.text("PhotometricInterpretation") != "MONOCHROME1" or decoded.dtype.kind == "f":
        return decoded
    if header.number("PixelRepresentation"):
        return ~decoded  # -1 - x: the lowest of two's complement becomes the highest
    highest = decoded.dtype.type((1 << bits) - 1)
    turned: Pixels = highest - np.minimum(decoded, highest)
    return turned


def _scaled(
    header: Header, decoded: Pixels, scale: Scale, window: tuple[float, float] | None
) -> Pixels:
    scaled = np.empty(decoded.shape, np.float32)
    if _is_coloured(header):
        highest = np.iinfo(decoded.dtype).max if scale == "window" else 1
        return np.divide(decoded, highest, out=scaled, casting="unsafe")
    inverted = header.text("PhotometricInterpretation") == "MONOCHROME1" and scale == "window"
    shared = header.items("SharedFunctionalGroupsSequence")[:1]
    frames = header.items("PerFrameFunctionalGroupsSequence")
    for index, frame in enumerate(decoded):
        groups = frames[index : index + 1] + shared
        rescale = _group(groups, "PixelValueTransformationSequence") or header
        values = apply_modality_lut(frame, rescale.dataset)
        if scale == "window":
            values = _shown(values, _group(groups, "FrameVOILUTSequence") or header, window)
        scaled[index] = 1 - values if inverted else values
    return scaled


def _group(groups: list[Header], keyword: str) -> Header | None:
    """Return a functional group's item: a frame's own, or the one that all frames share."""
    return next((item for group in groups for item in group.items(keyword)[:1]), None)


def _shown(values: Pixels, header: Header, window: tuple[float, float] | None) -> Pixels:
    """Return values from 0 to 1 as a window, or else a table, shows them (PS3.3 C.11.2.1)."""
    for table in header.items("VOILUTSequence")[:1] if window is None else ():
        bits = int(table.numbers("LUTDescriptor")[2])
        shown: Pixels = apply_voi(np.rint(values).astype(np.int32), header.dataset)
        return shown / float((1 << bits) - 1)
    centres, widths = header.numbers("WindowCenter"), header.numbers("WindowWidth")
    if window is None and centres and widths:
        window = centres[0], widths[0]
    if window is None or not all(map(math.isfinite, window)) or window[1] <= 0:
        raise _NoWindowError
    centre, width = map(float, window)
    match header.text("VOILUTFunction"):
        case "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
        case "LINEAR_EXACT":
            return np.clip((values - centre) / width + 0.5, 0, 1)
        case _:  # LINEAR: the window's ends are pixel values, not what lies between two
            return np.clip((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1)
