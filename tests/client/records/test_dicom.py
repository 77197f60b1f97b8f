"""DICOM files become records or are refused: no crash, no hang, no word of what they hold."""

import io
import logging
import re
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from huizhen.client.records.dicom import read_dicom
from huizhen.client.records.dicom_file import MAX_STEPS, load
from huizhen.client.records.dicom_pixels import read_pixels
from huizhen.client.records.record import MAX_ENTRY_BYTES, Image, Record, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError, HuizhenError

NAME = "Zhang^San"
PIXELS = np.arange(12, dtype=np.uint16).reshape(3, 4)
NATIVE = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
SYNTAXES = [*NATIVE, DeflatedExplicitVRLittleEndian]


def image(**values):
    dataset = Dataset()
    plain = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "PatientID": "P7",
        "PatientName": NAME,
        "Modality": "CT",
        "Rows": 3,
        "Columns": 4,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
    }
    for keyword, value in (plain | values).items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def written(dataset, syntax=ExplicitVRLittleEndian, pixels=PIXELS, is_file=True):
    dataset = Dataset(dataset)
    if pixels is not None:
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        raw = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        dataset.add_new(0x7FE00010, "OW", raw + b"\0" * (len(raw) % 2))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    if is_file:
        dcmwrite(out, dataset, enforce_file_format=True)
    else:
        del dataset.file_meta
        implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
        dcmwrite(out, dataset, implicit_vr=implicit, little_endian=little)
    return out.getvalue()


def read(data, **options):
    (entry,) = read_dicom(io.BytesIO(data), "a.dcm", **options)
    return entry


def element(tag, kind, value=b"", length=None):
    """Return an element in explicit little endian, perhaps with a length that is not its own."""
    size = len(value) if length is None else length
    if kind in (b"SQ", b"UN", b"UT", b"OB", b"OW"):
        return struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, kind, 0, size) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, kind, size) + value


def part10(body, syntax=b"1.2.840.10008.1.2.1\0"):
    meta = element(0x00020010, b"UI", syntax)
    return (
        b"\0" * 128
        + b"DICM"
        + element(0x00020000, b"UL", struct.pack("<I", len(meta)))
        + meta
        + body
    )


PATIENT = element(0x00100020, b"LO", b"P7")


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_a_header_becomes_a_record(syntax):
    header = image(
        AdmissionID="ZY20230011",
        AcquisitionDate="20230506",
        AcquisitionTime="083015.250000",
        TimezoneOffsetFromUTC="+0800",
        StudyDate="20230505",
        PatientSex="F",
        PatientBirthDate="19670102",
        PatientAge="056Y",
        PixelSpacing=[0.5, 0.25],
        SliceThickness="5",
        KVP="120",
        Manufacturer="Maker",
        BodyPartExamined="CHEST",
        StudyDescription="chest, for Zhang",
        NumberOfFrames="1",
    )
    record = read(written(header, syntax))
    assert isinstance(record, Record)
    assert (record.patient, record.encounter, record.kind) == ("P7", "ZY20230011", "image")
    assert (record.time, record.sex) == ("2023-05-06T08:30:15+08:00", "female")
    assert record.birth == "1967-01-02"
    assert record.text == "Study Description: chest, for Zhang"
    assert record.images == (Image(path="a.dcm", modality="CT", frames=1),)
    assert record.place == "a.dcm"
    assert record.fields == {
        "modality": "CT",
        "body_part": "CHEST",
        "manufacturer": "Maker",
        "photometric": "MONOCHROME2",
        "study": "1.2.3",
        "rows": 3,
        "columns": 4,
        "frames": 1,
        "samples": 1,
        "bits": 12,
        "slice_thickness": 5,
        "kvp": 120,
        "sop_class": "CT Image Storage",
        "syntax": syntax.name,
        "pixel_spacing": (0.5, 0.25),
        "age_years": 56.0,
    }


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.name)
def test_a_data_set_without_preamble_and_meta_is_read_alike(syntax):
    bare, whole = (written(image(), syntax, is_file=is_file) for is_file in (False, True))
    assert bare[128:132] != b"DICM"
    assert read(bare) == read(whole)


def test_what_names_the_patient_is_an_identifier_and_nowhere_else():
    other = Dataset()
    other.PatientID = "OLD5"
    header = image(
        PatientName="Wang^Jianguo=王^建国=ワン^ジェン",
        OtherPatientNames="Wang^Laosan",
        PatientMotherBirthName="Li^Mei",
        OtherPatientIDsSequence=[other],
        AccessionNumber="ACC9",
        PatientAddress="Some Road 8",
        PatientTelephoneNumbers="13800138000",
        InsurancePlanIdentification="INS6",
        SpecificCharacterSet="ISO_IR 192",
    )
    record = read(written(header))
    assert record.identifiers == {
        "name": ("Wang Jianguo", "王建国", "ワンジェン", "Wang Laosan"),
        "relative": ("Li Mei",),
        "mrn": ("P7", "OLD5"),
        "id": ("ACC9",),
        "phone": ("13800138000",),
        "address": ("Some Road 8",),
        "insurance": ("INS6",),
    }
    elsewhere = repr((record.fields, record.text, record.findings, record.labs))
    assert not any(one in elsewhere for many in record.identifiers.values() for one in many)


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("GB18030", "王^小东".encode("gb18030")),
        ("GBK", "王^小东".encode("gbk")),
        ("ISO_IR 192", "王^小东".encode()),
        (
            "ISO 2022 IR 6\\ISO 2022 IR 58",
            b"\x1b$)A" + "王".encode("gb2312") + b"^\x1b$)A" + "小东".encode("gb2312"),
        ),
        ("ISO-IR 192", "王^小东".encode()),
    ],
)
def test_names_are_read_in_the_declared_character_set(charset, name):
    padded = name + b" " * (len(name) % 2)
    declared = charset.encode() + b" " * (len(charset) % 2)
    data = part10(
        element(0x00080005, b"CS", declared) + element(0x00100010, b"PN", padded) + PATIENT
    )
    assert read(data).identifiers["name"] == ("王小东",)


@pytest.mark.parametrize("declared", [None, b"", b"ISO_IR 6", b"ISO_IR 192"])
def test_text_outside_its_declared_character_set_is_refused_until_the_right_one_is_given(declared):
    charset = b"" if declared is None else element(0x00080005, b"CS", declared)
    name = element(0x00100010, b"PN", "王^小东".encode("gb18030") + b" ")
    data = part10(charset + name + PATIENT)
    entry = read(data)
    assert isinstance(entry, Unreadable)
    assert "charset" in entry.problem
    assert read(data, charset="GB18030").identifiers["name"] == ("王小东",)


def test_the_given_character_set_also_holds_within_sequences():
    item = element(0x00100020, b"LO", "号".encode("gb18030"))
    item = struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item
    body = PATIENT + element(0x00101002, b"SQ", item)
    assert read(part10(body), charset="GB18030").identifiers["mrn"] == ("P7", "号")


def test_unknown_character_sets_are_refused():
    data = part10(element(0x00080005, b"CS", b"KLINGON ") + PATIENT)
    with pytest.raises(GovernanceError, match=r"no term of PS3\.3"):
        read(data)
    with pytest.raises(ConfigError, match="'latin-1', expected a DICOM term"):
        read(data, charset="latin-1")


@pytest.mark.parametrize(
    ("age", "years"), [("045Y", 45), ("006M", 0.5), ("003W", 0.06), ("010D", 0.03)]
)
def test_ages_are_years(age, years):
    assert read(written(image(PatientAge=age))).fields["age_years"] == years


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize(
    ("tag", "kind", "value", "keyword"),
    [
        (0x00101010, b"AS", b"45 Y", "PatientAge"),
        (0x00280008, b"IS", b"1A", "NumberOfFrames"),
        (0x00180050, b"DS", b"thin", "SliceThickness"),
        (0x00180050, b"DS", b"1e999 ", "SliceThickness"),
        (0x00080022, b"DA", b"20230230", "AcquisitionDate"),
        (0x00100030, b"DA", b"unknown ", "PatientBirthDate"),
    ],
)
def test_values_that_the_standard_does_not_allow_are_named_not_shown(tag, kind, value, keyword):
    record = read(part10(element(tag, kind, value) + PATIENT))
    assert record.fields["unreadable"] == (keyword,)
    assert value.decode().strip() not in repr(record.fields)


def test_times_fall_back_to_what_is_known():
    assert read(written(image(StudyDate="20230506"))).time == "2023-05-06"
    assert read(written(image(StudyDate="20230506", StudyTime="07"))).time == "2023-05-06"
    assert read(written(image(ContentDate="20230507", StudyDate="20230506"))).time == "2023-05-07"
    moment = read(written(image(AcquisitionDateTime="20230506083015.123456+0800")))
    assert moment.time == "2023-05-06T08:30:15+08:00"


def test_a_data_set_without_patient_or_with_a_name_beyond_bounds_is_no_record():
    assert "PatientID" in read(written(image(PatientID=None))).problem
    long = element(0x00100010, b"UN", b"\\" * 200_000)
    assert "PatientName cannot be read" in read(part10(PATIENT + long)).problem


def test_waveforms_tell_channels_and_frequency(samples):
    record = read((samples / "dicom_samples/waveform_ecg.dcm").read_bytes())
    assert (record.kind, record.encounter, record.images) == ("waveform", "13002689", ())
    names = ("channels", "frequency", "seconds")
    assert [record.fields[name] for name in names] == [12, 1000, 10.0]
    measured = {lab.name: (lab.value, lab.unit) for lab in record.labs}
    assert measured["QRS Duration"] == (75.0, "ms")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("chrX1.dcm", ("Wang XiaoDong", "王小東")),
        ("chrX2.dcm", ("Wang XiaoDong", "王小东")),
        ("CT_small.dcm", ("CompressedSamples CT1",)),
        ("JPEG2000.dcm", ("CompressedSamples NM1",)),
        ("liver_1frame.dcm", ("JANCT000",)),
        ("badVR.dcm", ("Lastname Firstname",)),
    ],
)
def test_real_samples_are_read(samples, name, names):
    record = read((samples / "dicom_samples" / name).read_bytes())
    assert record.identifiers["name"] == names
    assert record.kind == "image"


def test_a_real_sample_that_lost_its_first_bytes_is_no_dicom(samples):
    with pytest.raises(ConfigError, match="no DICOM"):
        read((samples / "dicom_samples/no_meta.dcm").read_bytes())


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7" * 40, b"\x08\x00", b"PK\x03\x04" * 50])
def test_other_files_are_no_dicom(data):
    with pytest.raises(ConfigError, match=r"a\.dcm: file is no DICOM"):
        read(data)


def test_a_file_cut_anywhere_before_its_pixels_is_refused():
    data = written(image(StudyDescription="x" * 30))
    pixels = data.index(struct.pack("<HH", 0x7FE0, 0x0010))
    assert isinstance(read(data), Record)
    for end in range(132, pixels):
        with pytest.raises(HuizhenError):
            read(data[:end])


def test_what_pydicom_says_of_a_file_is_counted_not_quoted(caplog, recwarn):
    with caplog.at_level(logging.DEBUG):
        # implicit where explicit is declared: pydicom warns, and reads on
        implicit = written(image(), ImplicitVRLittleEndian, is_file=False)
        assert isinstance(read(part10(implicit)), Record)
    assert "dicom_departs_from_standard file=a.dcm times=1" in caplog.text
    assert not list(recwarn)
    assert "Zhang" not in caplog.text


# ---- hostile files ----


ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
OPEN_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
ITEM_END = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
MANY = 1_000_000


def deflated(body):
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


def bombs():
    yield "items", PATIENT + element(0x0040A730, b"SQ", ITEM * MANY), "parts"
    yield "open items", PATIENT + element(0x0040A730, b"SQ", ITEM * MANY, 0xFFFFFFFF), "parts"
    both = (OPEN_ITEM + ITEM_END) * MANY
    yield "delimited", PATIENT + element(0x0040A730, b"SQ", both[: 15 << 20], 0xFFFFFFFF), "parts"
    tags = ((0x0011 << 16) + index for index in range(MANY))
    yield "elements", PATIENT + b"".join(element(tag, b"LO") for tag in tags), "parts"
    deeper = element(0x0040A730, b"SQ", b"", 0xFFFFFFFF) + OPEN_ITEM
    yield "depth", PATIENT + deeper * 100_000, "expected a whole file"
    yield "length", PATIENT + element(0x0040A160, b"UT", b"x", 0xFFFFFFF0), "cut short"
    yield "sequence", PATIENT + element(0x0040A730, b"SQ", b"x", 0xFFFFFFF0), "cut short"


ALONE = """
import sys
from pathlib import Path
from huizhen.client.records.dicom import read_dicom
from huizhen.protocol.errors import GovernanceError

def peak():  # of this program alone: what getrusage gives is inherited from the one that starts it
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

path = Path(sys.argv[1])
with path.open("rb") as stream:
    before = peak()
    try:
        list(read_dicom(stream, path.name))
    except GovernanceError as error:
        print(peak() - before, error)
"""


@pytest.mark.parametrize(("body", "problem"), [pytest.param(*c[1:], id=c[0]) for c in bombs()])
def test_bombs_are_refused_in_bounded_memory(tmp_path, body, problem):
    """In a process of its own: what other tests have left in memory is not the reader's."""
    path = tmp_path / "bomb.dcm"
    path.write_bytes(part10(body))
    start = time.perf_counter()
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True, check=True
    )
    grown, _, error = done.stdout.partition(" ")
    assert re.search(problem, error)
    assert int(grown) < 64 << 10  # KiB
    assert time.perf_counter() - start < 10  # about 0.7 s where nothing else runs


def test_sequences_within_sequences_have_a_depth():
    body = b""
    for _ in range(60):
        body = element(0x0040A730, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(body)) + body)
    with pytest.raises(GovernanceError, match="too deep"):
        read(part10(PATIENT + body))


def test_a_deflated_bomb_is_not_unfolded():
    body = PATIENT + element(0x0040A160, b"UT", b"", 1 << 29)
    bomb = part10(deflated(body + b"\0" * (1 << 27)), b"1.2.840.10008.1.2.1.99")
    assert len(bomb) < 1 << 18
    with pytest.raises(GovernanceError, match=f"over {MAX_ENTRY_BYTES} bytes"):
        read(bomb)


def test_an_endless_file_is_read_no_further_than_a_header_may_go():
    class Endless(io.BytesIO):
        given = 0

        def read(self, size=-1):
            first, self.given = self.given == 0, self.given + size
            return (
                part10(PATIENT + element(0x0040A160, b"UT", b"", 1 << 30)) if first else b"x" * size
            )

    endless = Endless()
    with pytest.raises(GovernanceError, match="over"):
        list(read_dicom(endless, "a.dcm"))
    assert endless.given < 2 * MAX_ENTRY_BYTES


def test_pixels_are_not_read_with_the_header():
    class Counting(io.BytesIO):
        given = 0

        def read(self, size=-1):
            data = super().read(size)
            self.given += len(data)
            return data

    stream = Counting(written(image(), pixels=np.zeros((2000, 2000), np.uint16)))
    assert isinstance(next(read_dicom(stream, "a.dcm")), Record)
    assert stream.given < 200_000


def refusals(data):
    """Return how a file is refused as a record and as an image; anything but a refusal escapes."""
    refused = []
    for reading in (read, lambda one: read_pixels(io.BytesIO(one), "a.dcm")):
        try:
            reading(data)
        except (ConfigError, GovernanceError) as error:
            refused.append(error)
    return refused


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=400))
@example(b"\x08\x00\x05\x00CS\xff\xff")
@example(b"\x02\x00\x10\x00UI\x04\x001.2\0")
def test_any_bytes_give_a_record_or_a_clean_error(data):
    for whole in (data, part10(data), part10(PATIENT + data), part10(data, b"1.2.840.10008.1.2\0")):
        for error in refusals(whole):
            assert str(error).startswith("a.dcm: ")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_real_file_with_bytes_changed_gives_a_record_or_a_clean_error(data):
    kind = data.draw(st.sampled_from([*SYNTAXES]))
    broken = bytearray(written(image(StudyDescription="d", PixelSpacing=[1, 2]), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(128, len(broken) - 1))] = data.draw(st.integers(0, 255))
    for error in refusals(bytes(broken)):
        assert "Zhang" not in str(error)
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None


# ---- pixels ----


def pixels(data, **options):
    return read_pixels(io.BytesIO(data), "a.dcm", **options)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_pixels_are_what_was_written(syntax):
    assert (pixels(written(image(), syntax), scale="stored") == PIXELS).all()


def test_run_lengths_are_read():
    dataset = image()
    dataset.PixelData = PIXELS.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.compress(RLELossless, generate_instance_uid=False)
    assert (pixels(written(dataset, RLELossless, pixels=None), scale="stored") == PIXELS).all()


RUN = bytes([129, 7]) * 60_000  # each 2 bytes are 128
UNFOLDING = struct.pack("<16I", 2, 64, 64 + len(RUN), *[0] * 13) + RUN + RUN
BOXES = b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20)


@pytest.mark.parametrize(
    ("syntax", "frame"),
    [(RLELossless, UNFOLDING), (JPEG2000Lossless, BOXES)],
    ids=["run lengths", "boxes without end"],
)
def test_frames_that_would_unfold_without_end_are_refused(syntax, frame):
    dataset = image()
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    with pytest.raises(GovernanceError, match="pixels cannot be decoded"):
        pixels(written(dataset, syntax, pixels=None))


def test_values_are_scaled_in_the_modalitys_unit():
    found = pixels(written(image(RescaleSlope="2", RescaleIntercept="-1024")))
    assert found.dtype == np.float32
    assert found.shape == (1, 3, 4)
    assert (found == PIXELS * 2.0 - 1024).all()


def test_a_window_shows_values_from_0_to_1():
    data = written(image(WindowCenter="6", WindowWidth="5"))
    # PS3.3 C.11.2.1.2.1: (x - 5.5) / 4 + 0.5
    expected = np.clip((PIXELS - 5.5) / 4 + 0.5, 0, 1)
    assert pixels(data, scale="window")[0] == pytest.approx(expected)
    exact = written(image(WindowCenter="6", WindowWidth="5", VOILUTFunction="LINEAR_EXACT"))
    assert pixels(exact, scale="window")[0] == pytest.approx(
        np.clip((PIXELS - 6.0) / 5 + 0.5, 0, 1)
    )
    sigmoid = written(image(WindowCenter="6", WindowWidth="5", VOILUTFunction="SIGMOID"))
    curve = 1 / (1 + np.exp(-4 * (PIXELS - 6.0) / 5))
    assert pixels(sigmoid, scale="window")[0] == pytest.approx(curve)
    assert pixels(data, scale="window", window=(2, 3))[0, 0] == pytest.approx([0, 0.25, 0.75, 1])


def test_a_window_that_nobody_gives_is_asked_for():
    with pytest.raises(GovernanceError, match="gives no window"):
        pixels(written(image()), scale="window")


def test_monochrome1_is_turned_over_where_it_is_shown():
    dark = image(PhotometricInterpretation="MONOCHROME1", WindowCenter="6", WindowWidth="5")
    bright = image(WindowCenter="6", WindowWidth="5")
    assert (pixels(written(dark), scale="stored") == 4095 - PIXELS).all()
    assert (pixels(written(dark)) == PIXELS).all()
    shown = pixels(written(dark), scale="window")
    assert shown == pytest.approx(1 - pixels(written(bright), scale="window"))


def test_signed_monochrome1_is_turned_over_too():
    values = np.array([[-2048, -1, 0, 2047]] * 3, np.int16)
    dark = image(PhotometricInterpretation="MONOCHROME1", PixelRepresentation=1)
    assert (
        pixels(written(dark, pixels=values), scale="stored")[0, 0] == [2047, 0, -1, -2048]
    ).all()


def test_each_frame_of_an_enhanced_image_has_its_own_scale():
    groups = []
    for slope in ("2", "3"):
        transformation, group = Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, "1"
        group.PixelValueTransformationSequence = [transformation]
        groups.append(group)
    header = image(NumberOfFrames="2", PerFrameFunctionalGroupsSequence=groups)
    found = pixels(written(header, pixels=np.stack([PIXELS, PIXELS])))
    assert (found == np.stack([PIXELS * 2.0 + 1, PIXELS * 3.0 + 1])).all()


def test_colours_come_last():
    values = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    header = image(
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
    )
    data = written(header, pixels=values)
    assert (pixels(data, scale="stored") == values[None]).all()
    assert pixels(data, scale="window") == pytest.approx(values[None] / 255)


@pytest.mark.parametrize(
    "claim",
    [
        {"Rows": 60_000, "Columns": 60_000, "NumberOfFrames": "10000"},
        {"NumberOfFrames": "99999999"},
    ],
)
def test_an_image_that_claims_too_much_is_refused_at_once(claim):
    start = time.perf_counter()
    with pytest.raises(GovernanceError, match=r"image would have \d+ bytes, at most"):
        pixels(written(image(**claim)))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("claim", [{"Rows": 0}, {"NumberOfFrames": "-1"}, {"BitsAllocated": None}])
def test_an_image_that_does_not_say_how_large_it_is_is_refused(claim):
    with pytest.raises(GovernanceError, match="how large"):
        pixels(written(image(**claim)))


def test_pixels_that_end_early_are_refused():
    data = written(image())
    with pytest.raises(GovernanceError, match="cut short within its pixels"):
        pixels(data[:-3])
    with pytest.raises(GovernanceError, match="as many as the header says"):
        pixels(written(image(Rows=5)))


def test_more_pixels_than_the_header_says_are_not_taken_in():
    with pytest.raises(GovernanceError, match="over"):
        pixels(written(image(), pixels=np.zeros((1200, 1200), np.uint16)))


def test_a_transfer_syntax_that_nothing_decodes_is_named_with_what_would():
    data = bytearray(written(image()))
    plain, wanted = ExplicitVRLittleEndian.encode() + b"\0", JPEGLSLossless.encode()
    meta = element(0x00020010, b"UI", wanted)
    body = bytes(data)[bytes(data).index(plain) + len(plain) :]
    body = body[body.index(b"\x08\x00\x16\x00") :]
    data = b"\0" * 128 + b"DICM" + meta + body
    with pytest.raises(ConfigError, match=r"'JPEG-LS Lossless.*pylibjpeg"):
        pixels(data)
    unknown = b"\0" * 128 + b"DICM" + element(0x00020010, b"UI", b"1.2.3.4.5.6\0") + body
    with pytest.raises(ConfigError, match=r"'1\.2\.3\.4\.5\.6', expected a transfer syntax"):
        pixels(unknown)


def test_a_data_set_without_an_image_has_no_pixels():
    with pytest.raises(GovernanceError, match="holds no pixels"):
        pixels(part10(PATIENT))


@pytest.mark.parametrize(
    ("name", "shape", "highest"),
    [
        ("CT_small.dcm", (1, 128, 128), 1167),
        ("MR_small.dcm", (1, 64, 64), 2145),
        ("liver_1frame.dcm", (1, 512, 512), 1),
        ("examples_rgb_color.dcm", (1, 240, 320, 3), 255),
    ],
)
def test_real_pixels_are_decoded(samples, name, shape, highest):
    found = pixels((samples / "dicom_samples" / name).read_bytes())
    assert found.shape == shape
    assert found.max() == highest


def test_a_loaded_data_set_leaves_nothing_to_unfold():
    item = Dataset()
    item.PatientID = "OLD5"
    data = written(image(OtherPatientIDsSequence=[item]), ImplicitVRLittleEndian)
    dataset = load(io.BytesIO(data), "a.dcm")
    assert dataset.get_item(0x00101002).VR == "SQ"
    assert MAX_STEPS < 1_000_000
