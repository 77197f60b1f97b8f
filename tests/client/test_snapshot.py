"""A snapshot is what went in, has one name, and shows nothing to who has not the key."""

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huizhen.client.clean import CleanRecord
from huizhen.client.records.record import Finding, Image, Lab
from huizhen.client.snapshot import BATCH, Snapshots, read_parquet
from huizhen.protocol.errors import ConfigError, DamagedError, GovernanceError, StorageError

KEY = bytes(range(32))
MADE_BY = {"terms": "1" * 64, "labs": "2" * 64}
WHOLE = CleanRecord(
    patient="a" * 32, is_held_out=True, place="a.csv:2", kind="note", encounter="b" * 32,
    time="2020-01-31T01:09:00", text="SECRET 发热", sex="female", age=56.5,
    findings=(Finding(code="J18.9", system="icd-10", name="肺炎", kind="condition"),),
    labs=(Lab(code="ldh", value=250.0, unit="U/L"), Lab(code="", text="阳性")),
    images=(Image(path="a.dcm", modality="CT", frames=3),),
    fields={"outcome": 1, "words": ["x", None], "rate": 0.5},
)  # fmt: skip


def many(count, text="note"):
    return [
        CleanRecord(
            patient=f"{i // 2:032x}", is_held_out=i % 10 < 2, place=f"a:{i}",
            text=f"{text} {i}", fields={"n": i},
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(tmp_path / "all", KEY, cohort="all")


def test_what_was_written_is_read(snapshots):
    records = [WHOLE, *many(2 * BATCH + 3)]
    manifest = snapshots.write(records, MADE_BY)
    assert list(read_parquet(snapshots.parquet())) == records
    assert snapshots.current() == manifest
    assert (manifest.records, manifest.patients) == (len(records), BATCH + 3)
    assert manifest.held_out == sum(one.is_held_out for one in records)
    assert manifest.made_by == MADE_BY


def test_an_older_snapshot_in_its_place_does_not_open(snapshots, tmp_path):
    """It may hold a patient who has withdrawn since."""
    folder = tmp_path / "all"
    old = (folder / f"{snapshots.write(many(4), MADE_BY).digest}.sealed").read_bytes()
    (folder / f"{snapshots.write(many(3), MADE_BY).digest}.sealed").write_bytes(old)
    with pytest.raises(DamagedError, match="is another file than was made"):
        snapshots.parquet()


def test_an_empty_snapshot_is_one(snapshots):
    assert snapshots.write([], MADE_BY).records == 0
    assert list(read_parquet(snapshots.parquet())) == []


def test_dq_2_the_same_records_have_the_same_digest(snapshots, tmp_path):
    first = snapshots.write(many(5), MADE_BY).digest
    assert snapshots.write(iter(many(5)), MADE_BY).digest == first
    other = Snapshots(tmp_path / "other", bytes(32), cohort="others")
    assert other.write(many(5), MADE_BY).digest == first
    changes = (many(4), many(5)[::-1], many(5, "Note"))
    assert len({first, *(other.write(change, MADE_BY).digest for change in changes)}) == 4
    assert other.write(many(5), MADE_BY | {"terms": "3" * 64}).digest != first


def test_nothing_of_a_record_stands_on_the_disk_in_the_clear(snapshots, tmp_path):
    snapshots.write([WHOLE], MADE_BY)
    data = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for word in ("SECRET", "发热", "J18.9", "PAR1"):
        assert word.encode() not in data


def test_a_new_snapshot_takes_the_place_of_the_old(snapshots, tmp_path):
    snapshots.write(many(3), MADE_BY)
    manifest = snapshots.write(many(4), MADE_BY)
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == sorted([f"{manifest.digest}.sealed", "current.json"])


def broken():
    yield from many(2 * BATCH + 1)
    raise GovernanceError("a:9: record is wrong")


def test_an_error_half_way_leaves_the_old_snapshot(snapshots):
    manifest = snapshots.write(many(3), MADE_BY)
    with pytest.raises(GovernanceError, match="a:9: record is wrong"):
        snapshots.write(broken(), MADE_BY)
    assert snapshots.current() == manifest
    assert list(read_parquet(snapshots.parquet())) == many(3)


def test_without_a_snapshot_it_is_said_how_to_make_one(snapshots):
    assert snapshots.current() is None
    with pytest.raises(ConfigError, match="holds no snapshot: make one first"):
        snapshots.parquet()


def test_another_key_or_cohort_does_not_open_it(snapshots, tmp_path):
    manifest = snapshots.write(many(3), MADE_BY)
    for key, cohort in ((bytes(32), "all"), (KEY, "others")):
        with pytest.raises(DamagedError, match="sealed with another key"):
            Snapshots(tmp_path / "all", key, cohort=cohort).parquet()
    (tmp_path / "all" / f"{manifest.digest}.sealed").unlink()
    with pytest.raises(StorageError, match="cannot read"):
        snapshots.parquet()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"digest": 1, "more": 2}'])
def test_a_damaged_manifest_is_named(snapshots, tmp_path, text):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "current.json").write_text(text)
    with pytest.raises(DamagedError, match="make the snapshot anew"):
        snapshots.current()


def test_what_is_no_snapshot_is_refused():
    for data in (b"", b"PAR1", os.urandom(100)):
        with pytest.raises(DamagedError, match="is no Parquet file"):
            list(read_parquet(data))


values = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"))
)
cleans = st.builds(
    CleanRecord,
    patient=st.text("0123456789abcdef", min_size=32, max_size=32),
    is_held_out=st.booleans(),
    place=st.just("a:1"),
    text=st.text(st.characters(codec="utf-8")),
    age=st.none() | st.floats(0, 90),
    labs=st.lists(
        st.builds(
            Lab,
            code=st.just("k"),
            value=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        )
    ).map(tuple),
    fields=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), values, max_size=3),
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(cleans, max_size=5))
def test_any_records_come_back_as_they_were(snapshots, records):
    snapshots.write(records, MADE_BY)
    found = list(read_parquet(snapshots.parquet()))
    assert found == records
    assert json.dumps([one.fields for one in found]) == json.dumps(
        [dict(sorted(one.fields.items())) for one in records]
    )


ENDLESS = """
import sys, itertools, time
from pathlib import Path
from huizhen.client.clean import CleanRecord
from huizhen.client.snapshot import Snapshots

def records():
    for i in itertools.count():
        if i == 5000:
            print("going", flush=True)
        yield CleanRecord(patient="a" * 32, is_held_out=False, place="a:1", fields={})

Snapshots(Path(sys.argv[1]), bytes(32), cohort="all").write(records(), {})
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_after_a_kill_there_is_the_old_snapshot_and_soon_no_draft(snapshots, tmp_path, number):
    manifest = snapshots.write(many(3), MADE_BY)
    with subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", ENDLESS, str(tmp_path / "all")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        process.send_signal(number)
        assert process.wait(60) != 0
    assert snapshots.current() == manifest
    assert len(list(read_parquet(snapshots.parquet()))) == 3
    snapshots.write(many(3), MADE_BY)
    assert len(list((tmp_path / "all").iterdir())) == 2
