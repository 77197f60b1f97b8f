"""The ledger's file: what it keeps, what it refuses, and what it says of a disk in trouble."""

import hashlib
import json
import resource
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from huizhen.client import ledger_file
from huizhen.client.ledger import Ledger
from huizhen.protocol.accounting import Spend
from huizhen.protocol.errors import (
    BudgetExhaustedError,
    ConfigError,
    HuizhenError,
    PrivacyError,
    StorageError,
)
from huizhen.protocol.ledger_entries import Cap, Head
from huizhen.protocol.ledger_statement import totals, verify_export

S, T = "5" * 64, "7" * 64
CAP = Cap(epsilon=1.05, delta=1e-5, metrics_epsilon=1.0)
SPEND = Spend(noise_multiplier=20.0, sampling_rate=1.0, steps=2)


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = datetime(2020, 11, 22, 8, 30, tzinfo=UTC)

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "site" / "ledger.sqlite"


@pytest.fixture
def ledger(path, clock):
    with Ledger.create(path, site="A", cohort="rare", cap=CAP, clock=clock) as ledger:
        yield ledger


@pytest.fixture
def used(ledger):
    """A ledger of five entries."""
    ledger.reserve(S, SPEND, 4)
    ledger.charge(S, 1)
    ledger.charge(S, 2)
    ledger.charge_metrics(S, "top1", 0.25)
    return ledger


def tamper(path, *statements, guarded=False):
    """Write to the file as somebody with SQLite would; the triggers are put back after it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        triggers = database.execute(query).fetchall()
        if not guarded:
            for name, _ in triggers:
                database.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            database.execute(*statement if isinstance(statement, tuple) else (statement,))
        if not guarded:
            for _, sql in triggers:
                database.execute(sql)


def copied(path, folder):
    """Copy the file as a backup does, with what is only in its log."""
    folder.mkdir(mode=0o700)
    for name in ("ledger.sqlite", "ledger.sqlite-wal"):
        if path.with_name(name).exists():
            shutil.copy2(path.with_name(name), folder / name)
    return folder / "ledger.sqlite"


def test_what_was_charged_is_there_after_reopening(used, path):
    before, head = used.totals(), used.head()
    used.shut()
    with Ledger.open(path, witnessed=head) as again:
        assert again.totals() == before
        assert again.head() == head
        assert again.charge(S, 2).sequence == 4
        assert again.charge(S, 3).sequence == 6
        assert again.verify().studies[0].rounds_charged == 3


def test_the_file_is_on_the_disk_when_charge_returns(used, path, tmp_path):
    assert used._execute("PRAGMA journal_mode") == [("wal",)]
    assert used._execute("PRAGMA synchronous") == [(2,)]  # FULL
    used.charge(S, 3)
    with Ledger.open(copied(path, tmp_path / "after")) as image:
        assert image.totals().studies[0].last_round == 3


def test_the_same_round_again_returns_its_entry_and_writes_nothing(used):
    head = used.head()
    assert used.charge(S, 2).body == {"study": S, "round": 2}
    assert used.charge(S, 2).sequence == 4
    assert used.reserve(S, SPEND, 4).sequence == 2
    assert used.head() == head
    assert used.close(S).sequence == used.close(S).sequence == 6


def test_would_exceed_answers_as_reserve_does_and_writes_nothing(used):
    head = used.head()
    assert not used.would_exceed(S, SPEND, 4)
    assert not used.would_exceed(T, SPEND, 11)
    assert used.would_exceed(T, SPEND, 12)
    with pytest.raises(PrivacyError, match="other terms"):
        used.would_exceed(S, SPEND, 5)
    assert used.head() == head
    with pytest.raises(BudgetExhaustedError, match=": 11 of its rounds would fit"):
        used.reserve(T, SPEND, 12)
    assert used.head() == head
    used.reserve(T, SPEND, 11)


def test_closing_frees_what_was_not_charged(used):
    with pytest.raises(BudgetExhaustedError):
        used.reserve(T, SPEND, 13)
    used.close(S)
    used.reserve(T, SPEND, 13)
    with pytest.raises(PrivacyError, match="was closed"):
        used.charge(S, 3)


def test_a_changed_cap_is_an_entry_and_counts_after_reopening(used, path):
    assert used.change_cap(Cap(epsilon=0.3, delta=1e-5)).sequence == 6
    with Ledger.open(path) as again:
        assert again.totals().cap.epsilon == 0.3
        assert again.would_exceed(T, SPEND, 1)
        with pytest.raises(BudgetExhaustedError, match="allows 0 "):
            again.charge_metrics(S, "more", 0.1)


def test_a_ledger_has_one_unit_of_privacy_and_keeps_it(used, path):
    assert used.unit == used.totals().unit == "patient"
    other = path.with_name("records.sqlite")
    Ledger.create(other, site="A", cohort="rare", cap=CAP, unit="record").shut()
    with Ledger.open(other) as again:
        assert again.unit == again.verify().unit == "record"
    with pytest.raises(
        PrivacyError, match="unit is 'hospital', expected one of 'patient', 'record'"
    ):
        Ledger.create(
            path.with_name("c.sqlite"),
            site="A",
            cohort="c",
            cap=CAP,
            unit="hospital",  # type: ignore[arg-type]  # what a careless caller may pass
        )
    assert not path.with_name("c.sqlite").exists()


def test_only_the_owner_can_enter_and_read(used, path):
    assert path.parent.stat().st_mode & 0o777 == 0o700
    names = {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"}
    assert {file.name for file in path.parent.iterdir()} == names
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


@pytest.mark.parametrize(("mode", "of_folder"), [(0o640, False), (0o604, False), (0o750, True)])
def test_a_file_or_folder_open_to_others_is_refused(used, path, mode, of_folder):
    used.shut()
    place = path.parent if of_folder else path
    place.chmod(mode)
    with pytest.raises(ConfigError, match=f"open to others .*mode {mode:o}.*: chmod"):
        Ledger.open(path)
    if of_folder:
        with pytest.raises(ConfigError, match="open to others"):
            Ledger.create(path.with_name("b.sqlite"), site="A", cohort="b", cap=CAP)
        assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite"]


def test_a_ledger_is_made_once(used, path):
    with pytest.raises(ConfigError, match="exists: a ledger is made once"):
        Ledger.create(path, site="A", cohort="rare", cap=CAP)
    assert used.head().sequence == 5
    assert not list(path.parent.glob(".ledger-*"))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET entry = '' WHERE sequence = 2",
        "DELETE FROM entries WHERE sequence = 5",
        "DELETE FROM entries",
        "INSERT OR REPLACE INTO entries SELECT 5, entry FROM entries WHERE sequence = 4",
        "REPLACE INTO entries SELECT 2, entry FROM entries WHERE sequence = 3",
        "INSERT INTO entries SELECT 9, entry FROM entries WHERE sequence = 4",
        "INSERT INTO entries SELECT 0, entry FROM entries WHERE sequence = 4",
        "INSERT INTO entries (entry) VALUES (x'00')",
        "INSERT INTO entries SELECT 5, '' ON CONFLICT DO UPDATE SET entry = ''",
    ],
)
def test_the_file_itself_refuses_to_change(used, path, statement):
    used.shut()
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        tamper(path, statement, guarded=True)
    with Ledger.open(path) as again:
        assert again.head().sequence == 5


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TRIGGER entries_never_change",
        "CREATE TABLE more (a)",
        "DROP TABLE entries",
        "CREATE TRIGGER entries_vanish AFTER INSERT ON entries BEGIN SELECT 1; END",
    ],
)
def test_a_file_without_its_guards_is_refused(used, path, statement):
    used.shut()
    tamper(path, statement, guarded=True)
    with pytest.raises(PrivacyError, match="other tables or triggers than a ledger"):
        Ledger.open(path)


def test_the_text_of_the_schema_is_part_of_the_format():
    """Opening compares it, so another text would refuse every ledger that there is."""
    text = "\n".join(ledger_file._SCHEMA).encode()
    assert (
        hashlib.sha256(text).hexdigest()
        == "21f240b6abf5d1430d8a5d384f96c4a4b8f3d3bf4a520d519608e3704a93a946"
    )


def test_each_changed_row_is_found_and_named(used, path):
    used.shut()
    whole = path.read_bytes()
    for number in range(1, 6):
        for old, new in [("20-11", "20-10"), ('"previous"', '"Previous"'), ('":', '": ')]:
            path.write_bytes(whole)
            sql = "UPDATE entries SET entry = CAST(replace(CAST(entry AS TEXT), ?, ?) AS BLOB) "
            tamper(path, (sql + "WHERE sequence = ?", (old, new, number)))
            with pytest.raises(PrivacyError, match=f"^entry {number} of the ledger"):
                Ledger.open(path)


@pytest.mark.parametrize(
    ("statements", "number"),
    [
        (["DELETE FROM entries WHERE sequence = 3"], 3),
        (["UPDATE entries SET sequence = 6 WHERE sequence = 5"], 6),
        (["DELETE FROM entries WHERE sequence = 1"], 1),
        (["UPDATE entries SET entry = CAST(entry AS TEXT) WHERE sequence = 4"], 4),
        (["UPDATE entries SET entry = x'ff' WHERE sequence = 2"], 2),
        (
            [
                "UPDATE entries SET entry = NULL || 'x' || 1.5 WHERE 0",
                "UPDATE entries SET entry = 1.5",
            ],
            1,
        ),
    ],
    ids=["deleted", "renumbered", "first deleted", "text", "not UTF-8", "numbers"],
)
def test_other_rows_are_found_and_named(used, path, statements, number):
    used.shut()
    tamper(path, *statements)
    with pytest.raises(PrivacyError, match=f"^entry {number} of the ledger"):
        Ledger.open(path)


def test_a_flipped_bit_anywhere_in_the_file_is_found_or_changes_nothing(used, path):
    used.shut()
    whole, found = path.read_bytes(), 0
    text = whole.index(b'{"body"')
    for place in [*range(0, len(whole), 397), *range(text, text + 200, 7)]:
        broken = bytearray(whole)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        try:
            with Ledger.open(path) as again:
                assert again.head().sequence == 5
                assert [e.sequence for e in again._account.entries] == [1, 2, 3, 4, 5]
        except HuizhenError:
            found += 1
    assert found > 30


def test_an_older_copy_is_found_with_the_witnessed_head(used, path, tmp_path):
    old = copied(path, tmp_path / "backup")
    used.charge(S, 3)
    head = used.head()
    used.shut()
    with Ledger.open(path, witnessed=head):
        pass
    with pytest.raises(PrivacyError, match="saw entry 6, the ledger ends with 5: this is an older"):
        Ledger.open(old, witnessed=head)
    with Ledger.open(old) as forked:  # nobody can tell without a witness
        forked.charge(S, 4)
    with pytest.raises(PrivacyError, match=r"saw entry 6 as .*: this is another ledger"):
        Ledger.open(old, witnessed=head)
    with pytest.raises(PrivacyError, match="saw entry 7"):
        Ledger.open(path, witnessed=Head(7, head.digest))


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_an_older_copy_put_in_place_of_an_open_ledger_is_found(used, path, tmp_path, how):
    old = copied(path, tmp_path / "backup")
    with Ledger.open(old):
        pass  # its log goes into the file
    used.charge(S, 3)
    if how == "renamed":
        old.replace(path)
    else:
        path.unlink()
    for use in (lambda: used.charge(S, 4), used.totals):
        with pytest.raises(PrivacyError, match="is no longer the ledger that was opened"):
            use()


def test_another_process_s_entries_are_seen(used, path, clock):
    with Ledger.open(path, clock=clock) as other:
        other.charge(S, 3)
        assert used.charge(S, 3).sequence == 6
        used.charge(S, 4)
        with pytest.raises(BudgetExhaustedError, match="all 4 rounds"):
            other.charge(S, 5)
        assert used.head() == other.head()


def test_a_process_that_keeps_the_ledger_gives_a_clear_error(used, path, monkeypatch):
    monkeypatch.setattr(ledger_file, "BUSY_SECONDS", 0.2)
    with Ledger.open(path) as other, closing(sqlite3.connect(path)) as holder:
        holder.isolation_level = None
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match=r"held by another process .*: try again later"):
            other.charge(S, 3)
        holder.execute("ROLLBACK")
        assert other.charge(S, 3).sequence == 6


def test_a_clock_that_went_back_refuses_to_write(used, clock):
    clock.now -= timedelta(seconds=11)
    for write in (
        lambda: used.charge(S, 3),
        lambda: used.charge_metrics(S, "more", 0.1),
        lambda: used.reserve(T, SPEND, 1),
        lambda: used.change_cap(Cap(epsilon=2.0, delta=1e-5)),
        lambda: used.close(S),
    ):
        with pytest.raises(
            PrivacyError, match=r"says 2020-11-22T08:29:49Z, .* 2020-11-22T08:30:00Z"
        ):
            write()
    assert used.head().sequence == 5
    clock.now += timedelta(seconds=1)
    assert used.charge(S, 3).time == "2020-11-22T08:30:00Z"


def test_a_full_disk_charges_nothing_and_says_so(used, path):
    [[pages]] = used._execute("PRAGMA page_count")
    used._execute(f"PRAGMA max_page_count = {pages}")

    def fill():
        for n in range(100):
            used.charge_metrics(S, f"{n:0100d}", 1e-6)

    with pytest.raises(StorageError, match="disk is full: make room, nothing was charged"):
        fill()
    used._execute("PRAGMA max_page_count = 1000000")
    before = used.head()
    assert used.charge(S, 3).sequence == before.sequence + 1
    with Ledger.open(path, witnessed=before) as again:
        assert again.head().sequence == before.sequence + 1


FILL = """
import resource, sys
from pathlib import Path
from huizhen.client.ledger import Ledger
from huizhen.protocol.errors import StorageError
with Ledger.open(Path(sys.argv[1])) as ledger:
    ledger.charge(sys.argv[2], 3)
    size = Path(sys.argv[1] + "-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
    try:
        ledger.charge(sys.argv[2], 4)
    except StorageError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(ledger.charge(sys.argv[2], 4).sequence)
"""


def test_a_write_that_the_system_cuts_short_charges_nothing(used, path):
    used.shut()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", FILL, path, S], check=True, capture_output=True, text=True
    )
    message, sequence = done.stdout.splitlines()
    assert message == f"{str(path)!r} cannot be read or written, the disk fails or is full"
    assert sequence == "7"


def test_a_read_only_disk_charges_nothing_and_says_so(used):
    used._execute("PRAGMA query_only = 1")  # SQLite answers as on a read-only disk
    with pytest.raises(StorageError, match="read-only: nothing was charged"):
        used.charge(S, 3)
    used._execute("PRAGMA query_only = 0")
    assert used.charge(S, 3).sequence == 6


def test_a_place_that_cannot_be_written_gives_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*ledger.sqlite"):
        Ledger.create(tmp_path / "file" / "ledger.sqlite", site="A", cohort="rare", cap=CAP)


def test_no_ledger_is_made_by_opening_one(path):
    with pytest.raises(ConfigError, match="no ledger at"):
        Ledger.open(path)
    path.parent.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="no ledger at"):
        Ledger.open(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"not a database, but longer than the header of one" * 9])
def test_a_file_that_is_not_a_ledger_is_refused(path, data):
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is not a ledger"):
        Ledger.open(path)
    assert path.read_bytes() == data


def test_another_database_is_refused_and_left_as_it_is(path):
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE patients (name)")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is not a ledger: name another file"):
        Ledger.open(path)
    assert path.read_bytes() == before


def test_a_newer_schema_asks_for_an_upgrade(used, path):
    used.shut()
    tamper(path, "PRAGMA user_version = 2")
    with pytest.raises(ConfigError, match="has schema 2, this version reads 1: upgrade huizhen"):
        Ledger.open(path)


def test_a_torn_file_is_refused(used, path):
    used.shut()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(StorageError, match="is damaged"):
        Ledger.open(path)


def test_an_export_is_checked_without_the_file(used, path):
    data, head = json.dumps(used.export()).encode(), used.head()
    used.shut()
    path.unlink()
    account = verify_export(data, head)
    assert totals(account).studies[0].rounds_charged == 2
    with pytest.raises(PrivacyError, match=r"^entry 5 of the ledger was changed"):
        verify_export(data.replace(b'"top1"', b'"top9"'))


def test_verify_prices_what_opening_only_links(ledger, path, monkeypatch):
    monkeypatch.setattr(type(ledger._account), "check_budget", lambda account, body: None)
    ledger.reserve(S, SPEND, 400)
    monkeypatch.undo()
    with Ledger.open(path) as again:
        with pytest.raises(
            BudgetExhaustedError, match=r"^entry 2 of the ledger: epsilon would reach"
        ):
            again.verify()
        assert again.would_exceed(T, SPEND, 1)


def test_a_name_that_is_none_makes_no_file(path):
    with pytest.raises(PrivacyError, match="cohort is"):
        Ledger.create(path, site="A", cohort="a\nb", cap=CAP)
    assert not path.parent.exists()
