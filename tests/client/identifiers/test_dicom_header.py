"""Nothing planted in an attribute of the profile survives; UIDs stay consistent; twice is once."""

import io
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmwrite
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from huizhen.client.identifiers.dicom_header import Uids, burned_in, deidentify_header
from huizhen.client.identifiers.dicom_profile import ACTIONS, CHARACTERISTICS
from huizhen.client.records.dicom_file import load
from huizhen.protocol.errors import ConfigError, GovernanceError

KEY = b"a site's secret, 32 bytes long.."
PLANTED = {
    "DA": "19770707",
    "DT": "19770707111111",
    "TM": "071717",
    "UI": "9.9.9.9.7",
    "AS": "077Y",
    "DS": "7777777",
    "IS": "7777777",
    "AE": "PLANTED",
    "UR": "http://planted.example",
    "OB": b"PLANTED!",
    "OW": b"PLANTED!",
    "UN": b"PLANTED!",
    "US": 30583,  # "ww"
}
MARKS = [b"PLANTED", b"planted", b"19770707", b"071717", b"9.9.9.9", b"077Y", b"7777777", b"ww"]


def image(**values):
    dataset = Dataset()
    plain = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.66",  # raw data, which needs no pixels
        "SOPInstanceUID": "1.2.3.4.5",
        "StudyInstanceUID": "1.2.3",
        "Modality": "CT",
        "PatientName": "Zhang^San",
        "PatientID": "P7",
    }
    for keyword, value in (plain | values).items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def planted(depth=1):
    """Return a data set that has every attribute of the profile, each with a mark."""
    dataset = Dataset()
    for tag in ACTIONS:
        if not dictionary_has_tag(tag):
            dataset.add_new(tag, "LO", "PLANTED")
            continue
        vr = dictionary_VR(tag).split(" or ")[0]
        if vr == "SQ":
            dataset.add_new(tag, vr, [planted(depth - 1)] if depth else [])
        elif tag >> 16 not in (0, 2):
            dataset.add_new(tag, vr, PLANTED.get(vr, "PLANTED"))
    return dataset


def written(dataset, syntax=ExplicitVRLittleEndian):
    out = io.BytesIO()
    dataset.file_meta.TransferSyntaxUID = syntax
    dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


def clean(dataset, **options):
    return deidentify_header(dataset, uid_key=KEY, **options)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("is_read", [False, True], ids=["made", "read"])
def test_nothing_planted_in_the_profile_survives_in_the_written_bytes(syntax, is_read):
    dataset = image()
    dataset.update(planted())
    kept = Dataset()
    kept.update(planted(0))
    dataset.PixelMeasuresSequence = [kept]  # not of the table, so what it holds is cleaned
    before = written(dataset, syntax)
    assert all(mark in before for mark in MARKS)
    if is_read:
        dataset = load(io.BytesIO(before), "a.dcm")
    after = written(clean(dataset), syntax)
    assert [mark for mark in MARKS if mark in after] == []
    assert "PixelMeasuresSequence" in clean(dataset)


def test_what_no_table_lists_goes_too():
    dataset = image(Manufacturer="Maker")
    dataset.add_new(0x00090010, "LO", "PLANTED")
    dataset.add_new(0x00091001, "UN", b"PLANTED!")
    dataset.add_new(0x60003000, "OW", b"PLANTED!")
    dataset.add_new(0x60021500, "LO", "PLANTED")
    dataset.add_new(0x50000022, "LO", "PLANTED")
    dataset.add_new(0x00180015, "LT", "PLANTED")  # a text where the standard has none
    dataset.add_new(0x0008FFF1, "LO", "PLANTED")  # unknown to the dictionary
    dataset.CodingSchemeResponsibleOrganization = "PLANTED"
    dataset.file_meta.SourceApplicationEntityTitle = "PLANTED"
    assert b"PLANTED" in written(dataset)
    after = clean(dataset)
    assert b"PLANTED" not in written(after)
    assert after.Manufacturer == "Maker"


def test_the_table_says_what_the_standard_does():
    assert len(ACTIONS) == 652  # 655 rows, three of them repeating groups
    known = {0x00080050: "Z", 0x00184000: "X", 0x0008002A: "D", 0x00080022: "Z", 0x00181000: "D"}
    known |= {0x0040A730: "D", 0x00209161: "U", 0x00120031: "Z", 0x00380010: "X", 0x00181002: "U"}
    assert {tag: ACTIONS[tag] for tag in known} == known
    assert set(ACTIONS.values()) == {"X", "Z", "D", "U"}


def test_pixels_and_what_describes_them_stay():
    dataset = image(Rows=2, Columns=2, PixelSpacing=[1, 2], KVP="120")
    dataset.PixelData = b"1234"
    dataset["PixelData"].VR = "OB"
    after = clean(dataset)
    assert (after.PixelData, after.Rows, after.PixelSpacing, after.KVP) == (b"1234", 2, [1, 2], 120)
    assert dataset.PatientName == "Zhang^San"


def test_uids_are_consistent_across_the_files_of_a_study():
    first = clean(image(SOPInstanceUID="1.2.3.4.5"))
    reference = Dataset()
    reference.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    reference.ReferencedSOPInstanceUID = "1.2.3.4.5"
    second = clean(image(SOPInstanceUID="1.2.3.4.6", SourceImageSequence=[reference]))
    assert first.StudyInstanceUID == second.StudyInstanceUID != "1.2.3"
    assert first.SOPInstanceUID != second.SOPInstanceUID
    referred = second.SourceImageSequence[0]
    assert referred.ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert referred.ReferencedSOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert first.file_meta.MediaStorageSOPInstanceUID == first.SOPInstanceUID
    other = deidentify_header(image(), uid_key=b"another site's secret, 32 bytes.")
    assert other.StudyInstanceUID != first.StudyInstanceUID


@given(st.from_regex(r"[0-2](\.(0|[1-9][0-9]{0,9})){1,5}", fullmatch=True))
def test_every_uid_becomes_a_valid_uuid_that_only_the_key_recognises(uid):
    uids = Uids(KEY)
    own = uids.own(uid)
    assert UID(own).is_valid
    assert uuid.UUID(int=int(own.removeprefix("2.25."))).version == 8
    assert uids.is_own(own)
    assert uids.own(own) == own
    assert not Uids(b"another site's secret, 32 bytes.").is_own(own)


@pytest.mark.parametrize(
    "uid", ["", "2.25.", "2.25.0", "2.25.x", "2.25." + "9" * 39, "2.25.٣", "1.2.3", "2.25.-1"]
)
def test_other_uids_are_not_the_sites_own(uid):
    assert not Uids(KEY).is_own(uid)


@pytest.mark.parametrize("days", [None, -40])
def test_twice_is_once(days):
    dataset = image(StudyDate="20230506", StudyTime="083000", PatientAge="095Y")
    options = {"days": days, "patient": "Q1", "keep_characteristics": True}
    once = clean(dataset, **options)
    assert written(clean(once, **options)) == written(once)
    assert written(clean(load(io.BytesIO(written(once)), "a"), **options)) == written(once)


def test_dates_move_by_as_many_days_or_go():
    dataset = image(
        StudyDate="20230301",
        StudyTime="083000",
        AcquisitionDateTime="20230301083000.5+0800",
        PatientBirthDate="19770707",
    )
    moved = clean(dataset, days=-1)
    assert (moved.StudyDate, moved.StudyTime) == ("20230228", "083000")
    assert moved.AcquisitionDateTime == "20230228083000.5+0800"
    assert not moved.PatientBirthDate
    assert moved.LongitudinalTemporalInformationModified == "MODIFIED"
    gone = clean(dataset)
    assert not gone.StudyDate
    assert not gone.StudyTime
    assert gone.LongitudinalTemporalInformationModified == "REMOVED"


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize("value", ["2023.03.01", "PLANTED", "20230230", "99991231", "202303"])
def test_a_date_that_cannot_move_goes(value):
    dataset = image(StudyDate=value, StudyTime=value)
    after = clean(dataset, days=400)
    assert not after.StudyDate
    assert after.StudyTime in (None, "202303")


def test_characteristics_stay_when_asked_for_and_no_age_above_90():
    dataset = image(PatientSex="F", PatientAge="093Y", PatientWeight="60")
    assert "PatientWeight" not in clean(dataset)
    kept = clean(dataset, keep_characteristics=True)
    assert (kept.PatientSex, kept.PatientAge, kept.PatientWeight) == ("F", "090Y", 60)
    assert set(ACTIONS) > CHARACTERISTICS


def test_what_was_done_is_said():
    done = clean(image(), days=3, keep_characteristics=True, patient="Q1")
    assert done.PatientIdentityRemoved == "YES"
    assert "PS3.15" in done.DeidentificationMethod
    codes = [code.CodeValue for code in done.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113107", "113108"]
    assert (done.PatientID, done.PatientName) == ("Q1", "Q1")


def test_a_header_that_cannot_be_read_is_refused_without_a_word_of_it():
    dataset = image()
    dataset[0x00100040] = RawDataElement(BaseTag(0x00100040), "Q\x01", 6, b"secret", 0, False, True)
    dataset.file_meta = FileMetaDataset()  # and no transfer syntax
    with pytest.raises(GovernanceError, match="leave the file out") as refused:
        clean(dataset)
    assert refused.value.__context__ is None


def test_a_short_key_is_refused_and_a_key_is_not_shown():
    with pytest.raises(ConfigError, match="uid_key has 5 bytes"):
        deidentify_header(image(), uid_key=b"short")
    assert "secret" not in repr(Uids(KEY))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, None),
        ({"BurnedInAnnotation": "YES"}, "BurnedInAnnotation is YES"),
        ({"RecognizableVisualFeatures": "YES"}, "RecognizableVisualFeatures"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "screen"),
        (
            {"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"], "BurnedInAnnotation": "NO"},
            "screen",
        ),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "SECONDARY"),
        ({"ImageType": ["DERIVED", "SECONDARY"], "BurnedInAnnotation": "NO"}, None),
        ({"Modality": "US"}, "'US'"),
        ({"Modality": "US", "BurnedInAnnotation": "NO"}, None),
        ({"Modality": ""}, "Modality is ''"),
        ({"Modality": "XA"}, "'XA'"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}, "secondary capture"),
        ({"EncapsulatedDocument": b"%PDF"}, "document"),
    ],
)
def test_images_that_may_show_names_are_found(values, reason):
    found = burned_in(image(**values))
    assert (found is None) is (reason is None)
    assert reason is None or reason in (found or "")


def test_overlays_are_reasons_not_to_trust_an_image():
    dataset = image(BurnedInAnnotation="NO")
    dataset.add_new(0x60003000, "OW", b"1234")
    assert "overlays" in (burned_in(dataset) or "")
