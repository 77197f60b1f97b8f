"""What is appended is on the disk, in its order; checkpoints say how far the log had come."""

from datetime import timedelta

import pytest

from huizhen.protocol.documents import countersign, public_of
from huizhen.protocol.errors import AuditError, ProtocolError
from huizhen.protocol.merkle import is_extension, is_included, root_of
from huizhen.protocol.statements import Checkpoint, Head
from huizhen.storage.audit import AuditLog

S = "5" * 64


@pytest.fixture
def owner(signers):
    return signers[0]


@pytest.fixture
def witness(signers):
    return signers[1]


@pytest.fixture
def other(signers):
    return signers[2]


def test_what_was_appended_is_there_after_reopening(used, path, clock):
    entries, head = used.entries(), used.head()
    used.shut()
    with AuditLog.open(path, witnessed=head, clock=clock) as again:
        assert (again.alliance, again.log) == ("rare", "North")
        assert again.entries() == entries
        assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5, 6]
        assert entries[0].event == "log_opened"
        assert again.head() == head == Head(size=6, root=root_of([e.leaf() for e in entries]).hex())
        assert [e.sequence for e in again.entries(2, 4)] == [2, 3, 4]
        assert again.append("work_paused", code="command").sequence == 7


def test_the_entry_is_on_the_disk_when_append_returns(used, path, copied):
    assert used._file._execute("PRAGMA journal_mode") == [("wal",)]
    assert used._file._execute("PRAGMA synchronous") == [(2,)]  # FULL
    entry = used.append("work_stopped", code="kill_file")
    with AuditLog.open(copied(path)) as image:
        assert image.entries(7) == [entry]


def test_proofs_are_those_of_the_log(used):
    root = bytes.fromhex(used.root(6))
    for entry in used.entries():
        assert is_included(
            entry.leaf(), entry.sequence - 1, 6, root, used.inclusion(entry.sequence)
        )
    for earlier in range(1, 7):
        before = bytes.fromhex(used.root(earlier))
        assert is_extension(earlier, before, 6, root, used.proof(earlier))
    with pytest.raises(ValueError, match="of a log of 6"):
        used.inclusion(7)
    with pytest.raises(ValueError, match="of a log of 6"):
        used.proof(3, 9)


def test_what_is_no_event_is_not_written(used):
    head = used.head()
    with pytest.raises(ValueError, match="'patient_seen' is no event"):
        used.append("patient_seen")
    with pytest.raises(ValueError, match="wrong fact 'code'"):
        used.append("work_paused", code="the patient's name")
    assert used.head() == head
    assert used.append("work_paused", code="command").sequence == 7


def test_the_order_is_that_of_the_numbers_whatever_the_clock_says(used, clock):
    clock.now -= timedelta(days=3)
    assert used.append("work_paused", code="command").time == "2026-02-26T08:30:00Z"
    with AuditLog.open(used._file.path) as again:
        assert again.head().size == 7


# Checkpoints


def test_a_checkpoint_is_the_signed_head_and_is_kept(used, path, clock, owner):
    clock.now += timedelta(minutes=5)
    data = used.checkpoint(owner)
    said = Checkpoint.read(data, [public_of(owner)])
    assert (said.alliance, said.log, said.issued) == ("rare", "North", "2026-03-01T08:35:00Z")
    assert Head(size=said.size, root=said.root) == used.head()
    clock.now += timedelta(minutes=5)
    assert used.checkpoint(owner) == data  # nothing was added
    assert used.newest() == data
    used.append("work_paused", code="command")
    assert used.checkpoint(owner) != data
    used.shut()
    with AuditLog.open(path) as again:
        assert len(again.checkpoints()) == 3
        assert [Checkpoint.read(c, [public_of(owner)]).size for c in again.checkpoints()] == [
            7, 6, 4,
        ]  # fmt: skip


def test_a_new_key_signs_the_same_head_again(used, owner, other):
    assert used.checkpoint(owner) != used.checkpoint(other)
    assert Checkpoint.read(used.checkpoint(other), [public_of(other)]).size == 6


def test_the_largest_witnessed_checkpoint_is_told_with_its_witnesses(used, owner, witness, other):
    found = used.witnessed()
    assert found is not None
    assert found.head == Head(size=4, root=used.root(4))
    assert found.witnesses == (public_of(witness).id,)
    own = used.checkpoint(owner)
    assert used.witnessed() == found  # an own signature witnesses nothing
    first = used.countersigned(countersign(own, witness), [public_of(witness)])
    both = used.countersigned(countersign(own, other), [public_of(witness), public_of(other)])
    assert used.countersigned(first, [public_of(witness)]) == both
    assert used.newest() == both
    found = used.witnessed()
    assert found is not None
    assert (found.head.size, found.document) == (6, both)
    assert set(found.witnesses) == {public_of(witness).id, public_of(other).id}


def test_only_signatures_of_witnesses_are_kept(used, owner, witness, other):
    own = used.checkpoint(owner)
    with pytest.raises(ProtocolError, match="signed by 0 of 1"):
        used.countersigned(countersign(own, other), [public_of(witness)])
    kept = used.countersigned(countersign(own, other, witness), [public_of(witness)])
    assert kept == countersign(own, witness)


def test_before_the_first_checkpoint_there_is_none(log):
    assert log.newest() is None
    assert log.witnessed() is None
    assert log.checkpoints() == []


def test_a_witness_that_saw_more_or_something_else_shows_the_log_to_be_an_older_copy(
    used, path, copied, owner, witness
):
    """PB-5: a restored site learns it from the first witness it asks."""
    old = copied(path)
    used.append("work_paused", code="command")
    seen = countersign(used.checkpoint(owner), witness)
    used.shut()
    with AuditLog.open(old) as restored:
        with pytest.raises(AuditError, match="saw 7 entries, the audit log ends with 6"):
            restored.countersigned(seen, [public_of(witness)])
        restored.append("work_stopped", code="command")
        with pytest.raises(AuditError, match="this is another log"):
            restored.countersigned(seen, [public_of(witness)])
        assert restored.newest() != seen


def test_a_head_of_another_log_is_not_this_one_s(used, witness):
    said = Checkpoint(
        alliance="rare", log="South", size=6, root=used.root(6), issued="2026-03-01T08:30:00Z"
    )
    with pytest.raises(ProtocolError, match="log of 'South', expected 'North'"):
        used.countersigned(said.signed(witness), [public_of(witness)])
