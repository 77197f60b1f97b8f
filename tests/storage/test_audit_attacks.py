"""Whatever is done to the file, the head that somebody else has seen finds it, offline (AU-1)."""

import hashlib
import shutil
import sqlite3
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huizhen.protocol.audit import make_entry
from huizhen.protocol.errors import AuditError, ConfigError, HuizhenError
from huizhen.storage.audit import AuditLog
from huizhen.storage.audit_file import FORMAT

S = "5" * 64
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, signers):
    """A closed log of twelve entries, checkpoints of 4 and 9, and the head that a witness saw."""
    path = tmp_path_factory.mktemp("sealed") / "site" / "audit.sqlite"
    with AuditLog.create(path, alliance="rare", log="North", clock=lambda: NOON) as log:
        for number in range(2, 13):
            log.append("training_started", study=S, round=number, attempt=1)
            if number in (4, 9):
                log.checkpoint(signers[0])
        entries, head = log.entries(), log.head()
    return path, entries, head


@pytest.fixture(scope="module")
def rewritten(sealed, tamper):
    """Put rows in place of the file's own, as whoever owns the disk can, guards and all."""

    def rewrite(rows, checkpoints=True):
        path = sealed[0].with_name("copy.sqlite")
        path.unlink(missing_ok=True)
        shutil.copy2(sealed[0], path)
        statements = ["DELETE FROM entries", *([] if checkpoints else ["DELETE FROM checkpoints"])]
        inserts = [
            ("INSERT INTO entries VALUES (?, ?)", (number, data))
            for number, data in enumerate(rows, 1)
            if data is not None
        ]
        tamper(path, *statements, *inserts)
        return path

    return rewrite


@pytest.fixture(scope="module")
def is_refused(sealed, rewritten):
    """Open rows with the witnessed head alone: no key, no checkpoint, no network."""

    def refuse(rows):
        with pytest.raises(AuditError, match=r"entry|entries"):
            AuditLog.open(rewritten(rows, checkpoints=False), witnessed=sealed[2])

    return refuse


def edited(entry):
    """Return what somebody would rather have said, well formed and numbered as it was."""
    changes = {"log": "Nord", "study": "7" * 64}
    facts = {fact: changes.get(fact, value) for fact, value in entry.facts.items()}
    return make_entry(entry.event, facts, sequence=entry.sequence, now=NOON).canonical()


def renumbered(entries):
    return [
        make_entry(e.event, e.facts, sequence=n, now=NOON).canonical()
        for n, e in enumerate(entries, 1)
    ]


numbers = st.integers(1, 12)
few = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_witnessed_head_is_that_of_the_untouched_log(rewritten, sealed):
    rows = [e.canonical() for e in sealed[1]]
    with AuditLog.open(rewritten(rows, checkpoints=False), witnessed=sealed[2]) as log:
        assert log.entries() == sealed[1]


@few
@given(numbers, st.booleans())
def test_deleting_any_entry_is_found(is_refused, sealed, number, closed_up):
    rest = [e for e in sealed[1] if e.sequence != number]
    kept = [None if e.sequence == number else e.canonical() for e in sealed[1]]
    is_refused(renumbered(rest) if closed_up else kept)


@few
@given(numbers)
def test_editing_any_entry_is_found(is_refused, sealed, number):
    is_refused([edited(e) if e.sequence == number else e.canonical() for e in sealed[1]])


@few
@given(st.permutations(range(12)), st.booleans())
def test_reordering_entries_is_found(is_refused, sealed, order, as_new):
    moved = [sealed[1][n] for n in order]
    if moved == sealed[1]:
        return
    is_refused(renumbered(moved) if as_new else [e.canonical() for e in moved])


@few
@given(st.integers(0, 11))
def test_truncating_the_end_is_found(is_refused, sealed, size):
    is_refused([e.canonical() for e in sealed[1][:size]])


@few
@given(st.integers(1, 11))  # after the last one a log may grow
def test_inserting_an_entry_is_found(is_refused, sealed, number):
    is_refused(renumbered([*sealed[1][:number], sealed[1][3], *sealed[1][number:]]))


@pytest.mark.parametrize("number", range(1, 10))
def test_without_a_witness_own_checkpoints_bracket_an_edited_entry(rewritten, sealed, number):
    rows = [edited(e) if e.sequence == number else e.canonical() for e in sealed[1]]
    first, last = (1, 4) if number <= 4 else (5, 9)
    with pytest.raises(AuditError, match=f"^entry {first} .* or one from there to {last}, was"):
        AuditLog.open(rewritten(rows))


@pytest.mark.parametrize("number", range(1, 13))
def test_bytes_that_are_no_entry_are_named_by_number(rewritten, sealed, number):
    rows = [e.canonical() for e in sealed[1]]
    rows[number - 1] += b" "
    with pytest.raises(AuditError, match=f"^entry {number} of the audit log is not as it was"):
        AuditLog.open(rewritten(rows))


@pytest.mark.parametrize("number", range(1, 12))
def test_a_missing_row_is_named_by_number(rewritten, sealed, number):
    rows = [None if e.sequence == number else e.canonical() for e in sealed[1]]
    with pytest.raises(
        AuditError, match=f"^entry {number} of the audit log is missing, {number + 1}"
    ):
        AuditLog.open(rewritten(rows))


def test_a_cut_end_is_found_by_an_own_checkpoint(rewritten, sealed):
    rows = [e.canonical() for e in sealed[1][:7]]
    with pytest.raises(AuditError, match=r"entry 8 .* is missing, it has a checkpoint of 9"):
        AuditLog.open(rewritten(rows))


def test_an_older_copy_and_a_fork_are_found_with_the_witnessed_head(used, path, copied):
    old = copied(path)
    used.append("work_paused", code="command")
    head = used.head()
    with pytest.raises(AuditError, match="saw 7 entries, the audit log ends with 6: this is an ol"):
        AuditLog.open(old, witnessed=head)
    with AuditLog.open(old) as forked:  # nobody can tell without a witness
        forked.append("work_stopped", code="command")
    with pytest.raises(AuditError, match=r"saw the first 7 entries as .*: this is another log"):
        AuditLog.open(old, witnessed=head)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET entry = '' WHERE sequence = 2",
        "DELETE FROM entries WHERE sequence = 6",
        "INSERT OR REPLACE INTO entries SELECT 6, entry FROM entries WHERE sequence = 4",
        "INSERT INTO entries SELECT 9, entry FROM entries WHERE sequence = 4",
        "UPDATE checkpoints SET checkpoint = ''",
        "DELETE FROM checkpoints",
        "INSERT INTO checkpoints SELECT 9, size, root, owner, 3, checkpoint FROM checkpoints",
    ],
)
def test_the_file_itself_refuses_to_change(used, path, tamper, statement):
    used.shut()
    with pytest.raises(sqlite3.IntegrityError, match="an audit log is append-only"):
        tamper(path, statement, guarded=True)
    with AuditLog.open(path) as again:
        assert again.head().size == 6


@pytest.mark.parametrize(
    "statement",
    ["DROP TRIGGER entries_never_go", "DROP TRIGGER checkpoints_never_go", "CREATE TABLE more (a)"],
)
def test_a_file_without_its_guards_is_refused(used, path, tamper, statement):
    used.shut()
    tamper(path, statement, guarded=True)
    with pytest.raises(AuditError, match="other tables or triggers than an audit log"):
        AuditLog.open(path)


def test_the_text_of_the_schema_is_part_of_the_format():
    text = "\n".join(FORMAT.statements).encode()
    assert hashlib.sha256(text).hexdigest() == (
        "95cd6e11edf78c0df41e14c7056034c0fc4c28496e51ef342477842b6b76e651"
    )


def test_a_flipped_bit_anywhere_in_the_file_is_found_or_changes_nothing(used, path, signers):
    used.checkpoint(signers[0])
    head, entries = used.head(), used.entries()
    used.shut()
    whole, found = path.read_bytes(), 0
    text = whole.index(b'{"event"')
    for place in [*range(0, len(whole), 997), *range(text, text + 400, 11)]:
        broken = bytearray(whole)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        try:
            with AuditLog.open(path) as again:
                assert again.head() == head
                assert again.entries() == entries
        except HuizhenError:
            found += 1
    assert found > 30


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_an_older_copy_put_in_place_of_an_open_log_is_found(used, path, copied, signers, how):
    old = copied(path)
    with AuditLog.open(old):
        pass  # its write-ahead log goes into the file
    used.append("work_paused", code="command")
    if how == "renamed":
        old.replace(path)
    else:
        path.unlink()
    for use in (
        lambda: used.append("work_resumed", code="command"),
        used.head,
        used.entries,
        lambda: used.checkpoint(signers[0]),
    ):
        with pytest.raises(AuditError, match="is no longer the audit log that was opened"):
            use()


@pytest.mark.parametrize("number", [2, 6])
def test_an_entry_changed_under_an_open_log_is_found(used, path, tamper, number):
    data = edited(used.entries()[number - 1])
    tamper(path, ("UPDATE entries SET entry = ? WHERE sequence = ?", (data, number)))
    found = (
        "entry 2 of the audit log was changed since" if number == 2 else "is no longer the audit"
    )
    with pytest.raises(AuditError, match=found):
        used.entries()


def test_another_kind_of_file_is_refused(path):
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    path.write_bytes(b"not a database, but longer than the header of one" * 9)
    with pytest.raises(ConfigError, match="is not an audit log: name another file"):
        AuditLog.open(path)
    with pytest.raises(ConfigError, match="no audit log at"):
        AuditLog.open(path.with_name("none.sqlite"))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"open to others .*: chmod 600"):
        AuditLog.open(path)


def test_a_log_is_made_once_and_for_its_owner_alone(used, path):
    with pytest.raises(ConfigError, match="exists: an audit log is made once"):
        AuditLog.create(path, alliance="rare", log="North")
    assert used.head().size == 6
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    assert {file.name.split(".")[0] for file in path.parent.iterdir()} == {"audit"}


@pytest.mark.parametrize("names", [("a\nb", "North"), ("rare", "No/rth"), ("", "North")])
def test_a_name_that_is_none_makes_no_file(path, names):
    with pytest.raises(ValueError, match="event 'log_opened' has a wrong fact"):
        AuditLog.create(path, alliance=names[0], log=names[1])
    assert not path.parent.exists()
