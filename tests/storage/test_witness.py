"""A witness signs one history of a log, remembers it first, and keeps the proof of two (AU-3)."""

import sqlite3
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huizhen.protocol.audit_checkpoints import check_head, claimed_checkpoint, key_ids
from huizhen.protocol.audit_tree import Tree
from huizhen.protocol.documents import countersign, public_of, verify
from huizhen.protocol.errors import (
    AuditError,
    ConfigError,
    ForkError,
    ProtocolError,
    StorageError,
    WireError,
)
from huizhen.protocol.merkle import leaf_hash
from huizhen.protocol.statements import Checkpoint, Head
from huizhen.storage import witness
from huizhen.storage.audit import AuditLog
from huizhen.storage.witness import WitnessBook


@pytest.fixture
def owner(signers):
    return signers[0]


@pytest.fixture
def key(signers):
    """The witness's own."""
    return signers[1]


@pytest.fixture
def place(tmp_path):
    return tmp_path / "coordinator" / "witness.sqlite"


@pytest.fixture
def book(place):
    with WitnessBook.create(place) as book:
        yield book


@pytest.fixture
def see(book, owner, key):
    """Show the book a checkpoint of the log of North, as its owner does."""

    def see(checkpoint, proof=(), **changes):
        values = {"alliance": "rare", "log": "North", "owner": [public_of(owner)], "key": key}
        return book.see(checkpoint, proof, **{**values, **changes})

    return see


def tree_of(*entries):
    tree = Tree()
    for entry in entries:
        tree.append(leaf_hash(str(entry).encode()))
    return tree


def checkpoint(tree, *keys, size=None, log="North", issued="2026-03-01T08:30:00Z", alliance="rare"):
    size = tree.size if size is None else size
    root = tree.root(size).hex()
    return Checkpoint(alliance=alliance, log=log, size=size, root=root, issued=issued).signed(*keys)


HISTORY = tree_of(*range(40))
FORKED = tree_of(*range(10), *"a fork of thirty other entries"[:30])


def test_a_log_that_only_grew_is_signed_each_time(see, book, owner, key):
    before = 0
    for size in (3, 8, 9, 40):
        shown = checkpoint(HISTORY, owner, size=size)
        seen = see(shown, HISTORY.consistency(before, size))
        assert seen.outcome == "signed"
        assert seen.document == countersign(shown, key) == book.last("North")
        before = size


def test_what_was_signed_is_remembered_after_reopening(see, book, place, owner, key):
    first = see(checkpoint(HISTORY, owner, size=8)).document
    book.shut()
    with WitnessBook(place) as again:
        [known] = again.known()
        assert (known.log, known.head) == ("North", Head(size=8, root=HISTORY.root(8).hex()))
        assert (known.document, known.unproven, known.fork) == (first, None, None)


def test_the_same_head_again_has_the_same_answer(see, owner):
    first = see(checkpoint(HISTORY, owner, size=8))
    again = checkpoint(HISTORY, owner, size=8, issued="2026-03-02T08:30:00Z")
    assert see(again) == first


def test_signatures_of_strangers_are_not_passed_on(see, owner, key, signers):
    shown = checkpoint(HISTORY, owner, signers[3], size=8)
    names = {public_of(one).id for one in (owner, key)}
    assert set(key_ids(see(shown).document)) == names


def test_a_forked_log_is_found_by_a_witness_and_both_documents_are_kept(see, book, place, owner):
    first = see(checkpoint(HISTORY, owner, size=20)).document
    fork = checkpoint(FORKED, owner, size=20)
    with pytest.raises(ForkError, match=r"log of 'North' has forked: .* 20 entries as") as caught:
        see(fork, HISTORY.consistency(20, 20))
    assert caught.value.evidence == (first, fork)
    for document in caught.value.evidence:  # proves it to anybody
        verify(document, kind="checkpoint", keys=[public_of(owner)])
    said = [claimed_checkpoint(one) for one in caught.value.evidence]
    assert said[0].size == said[1].size
    assert said[0].root != said[1].root
    book.shut()
    with WitnessBook(place) as again:
        assert again.known()[0].fork == (first, fork)


def test_of_a_forked_log_nothing_is_signed_any_more(see, owner):
    see(checkpoint(HISTORY, owner, size=20))
    with pytest.raises(ForkError):
        see(checkpoint(FORKED, owner, size=20))
    for size in (20, 30):
        with pytest.raises(ForkError) as caught:
            see(checkpoint(HISTORY, owner, size=size), HISTORY.consistency(20, size))
        assert len(caught.value.evidence) == 2


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_witness_signs_two_branches(tmp_path_factory, owner, key, data):
    """Whatever an owner shows of two histories, and in whatever order, one alone is signed."""
    place = tmp_path_factory.mktemp("book") / "w" / "witness.sqlite"
    signed = []
    with WitnessBook.create(place) as book:
        for _ in range(data.draw(st.integers(1, 8))):
            tree = data.draw(st.sampled_from([HISTORY, FORKED]))
            size = data.draw(st.integers(11, 40))
            base = data.draw(st.integers(0, size))
            try:
                seen = book.see(
                    checkpoint(tree, owner, size=size),
                    tree.consistency(base, size),
                    alliance="rare",
                    log="North",
                    owner=[public_of(owner)],
                    key=key,
                )
            except ForkError:
                continue
            signed.append(claimed_checkpoint(seen.document))
        for branch in (HISTORY, FORKED):
            if signed[0].root == branch.root(signed[0].size).hex():
                for said in signed:
                    check_head(branch, Head(size=said.size, root=said.root))
    assert signed


def test_a_log_that_went_back_is_answered_with_what_was_seen(see, owner):
    last = see(checkpoint(HISTORY, owner, size=20)).document
    seen = see(checkpoint(HISTORY, owner, size=12))
    assert (seen.outcome, seen.document) == ("behind", last)


def test_a_fork_at_an_earlier_size_that_was_seen_is_found(see, owner):
    see(checkpoint(HISTORY, owner, size=12))
    see(checkpoint(HISTORY, owner, size=20), HISTORY.consistency(12, 20))
    with pytest.raises(ForkError, match="signed 12 entries as"):
        see(checkpoint(FORKED, owner, size=12))


def test_a_head_that_nothing_joins_is_not_signed_and_kept(see, book, owner):
    last = see(checkpoint(HISTORY, owner, size=20)).document
    for shown, proof in (
        (checkpoint(FORKED, owner, size=30), FORKED.consistency(20, 30)),
        (checkpoint(HISTORY, owner, size=30), []),
        (checkpoint(HISTORY, owner, size=30), HISTORY.consistency(12, 30)),
        (checkpoint(HISTORY, owner, size=30), HISTORY.consistency(20, 31)),
    ):
        seen = see(shown, proof)
        assert (seen.outcome, seen.document) == ("unproven", last)
        [known] = book.known()
        assert (known.head.size, known.unproven) == (20, shown)
    assert see(shown, HISTORY.consistency(20, 30)).outcome == "signed"
    assert book.known()[0].unproven is None


def test_a_restored_site_learns_from_the_answer_that_it_is_behind(see, copied, used, path, owner):
    """PB-5 for logs, end to end: the site's log, its backup, the witness's answer."""
    old = copied(path)
    used.append("work_paused", code="command")
    see(used.checkpoint(owner))
    used.shut()
    with AuditLog.open(old) as restored:
        answer = see(restored.checkpoint(owner)).document
        with pytest.raises(AuditError, match="this is an older copy"):
            restored.countersigned(answer, [public_of(owner)])


def test_nobody_accuses_another_of_a_fork(see, signers, owner):
    """A checkpoint counts for the log of the one who signed it, never for another's."""
    see(checkpoint(HISTORY, owner, size=20))
    villain = signers[2]
    with pytest.raises(
        ProtocolError, match="log of 'North' in 'rare', expected the log of 'South'"
    ):
        see(checkpoint(FORKED, villain, size=20), log="South", owner=[public_of(villain)])
    with pytest.raises(ProtocolError, match="signed by 0 of 1"):
        see(checkpoint(FORKED, villain, size=20))
    assert see(checkpoint(HISTORY, owner, size=21), HISTORY.consistency(20, 21)).outcome == "signed"


@pytest.mark.parametrize(
    ("shown", "message"),
    [({"alliance": "other"}, "in 'other', expected"), ({"size": 0}, "is of 0 entries")],
)
def test_a_checkpoint_of_another_alliance_or_of_nothing_is_refused(see, owner, shown, message):
    with pytest.raises(ProtocolError, match=message):
        see(checkpoint(HISTORY, owner, **shown))


def test_bytes_that_are_no_checkpoint_or_no_proof_are_refused(see, owner):
    with pytest.raises(WireError):
        see(b"{}")
    see(checkpoint(HISTORY, owner, size=8))
    with pytest.raises(WireError, match="not of hashes of 32 bytes"):
        see(checkpoint(HISTORY, owner, size=9), [b"x" * 31])


def test_each_log_has_a_history_of_its_own(see, book, owner, signers):
    see(checkpoint(HISTORY, owner, size=20))
    other = signers[2]
    south = checkpoint(FORKED, other, size=20, log="South")
    assert see(south, log="South", owner=[public_of(other)]).outcome == "signed"
    assert [one.log for one in book.known()] == ["North", "South"]
    assert book.last("East") is None


def test_another_witness_can_follow_from_what_is_passed_on(see, book, owner, signers, tmp_path):
    def show(*sizes):
        for before, size in pairwise(sizes):
            see(checkpoint(HISTORY, owner, size=size), HISTORY.consistency(before, size))

    show(0, 3, 8, 20, 33)
    assert [claimed_checkpoint(one).size for one, _ in book.heads("North", 0)] == [33]
    names = {"alliance": "rare", "log": "North", "owner": [public_of(owner)], "key": signers[2]}
    with WitnessBook.create(tmp_path / "site" / "witness.sqlite") as other:
        [(document, proof)] = book.heads("North", 0)
        assert other.see(document, proof, **names).outcome == "signed"
        show(33, 36, 40)
        following = book.heads("North", 33)
        assert [claimed_checkpoint(one).size for one, _ in following] == [36, 40]
        for document, proof in following:
            assert other.see(document, proof, **names).outcome == "signed"
        assert other.known()[0].head.size == 40
    assert book.heads("North", 40) == []


def test_only_so_many_checkpoints_of_a_log_are_kept(see, book, owner, monkeypatch):
    monkeypatch.setattr(witness, "MAX_SEEN", 5)
    for size in range(1, 13):
        see(checkpoint(HISTORY, owner, size=size), HISTORY.consistency(size - 1, size))
    assert [claimed_checkpoint(c).size for c, _ in book.heads("North", 1)] == [8, 9, 10, 11, 12]
    with pytest.raises(ForkError):
        see(checkpoint(tree_of(*"forked at 9"[:9]), owner))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE seen SET root = ''",
        "DELETE FROM seen WHERE size = 20",
        "INSERT OR REPLACE INTO seen SELECT log, size, '', checkpoint, proof FROM seen",
        "INSERT INTO seen SELECT log, 7, '', checkpoint, proof FROM seen",
        "UPDATE forks SET log = 'South'",
        "DELETE FROM forks",
        "INSERT OR REPLACE INTO forks SELECT log, second, first FROM forks",
    ],
)
def test_the_file_itself_forgets_nothing(see, book, place, owner, tamper, statement):
    see(checkpoint(HISTORY, owner, size=20))
    with pytest.raises(ForkError):
        see(checkpoint(FORKED, owner, size=20))
    book.shut()
    with pytest.raises(sqlite3.IntegrityError, match="a witness forgets nothing"):
        tamper(place, statement, guarded=True)


def test_a_book_is_made_once_and_another_file_is_refused(book, place, path, log):
    with pytest.raises(ConfigError, match="exists: a witness book is made once"):
        WitnessBook.create(place)
    with pytest.raises(ConfigError, match="no witness book at"):
        WitnessBook(place.with_name("none.sqlite"))
    log.shut()
    with pytest.raises(ConfigError, match="is not a witness book: name another file"):
        WitnessBook(path)


def test_what_cannot_be_written_down_is_not_signed(see, book, owner):
    book._execute("PRAGMA query_only = 1")
    with pytest.raises(StorageError, match="read-only: nothing was signed"):
        see(checkpoint(HISTORY, owner, size=8))
    book._execute("PRAGMA query_only = 0")
    assert book.last("North") is None
    assert see(checkpoint(HISTORY, owner, size=8)).outcome == "signed"


KILLED = """
import os, signal, sys
from pathlib import Path
from huizhen.storage.witness import WitnessBook
class Dying(WitnessBook):
    def _execute(self, statement, *values):
        found = super()._execute(statement, *values)
        if statement.startswith(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return found
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from huizhen.protocol.documents import public_of
owner, key = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2))
shown = bytes.fromhex(sys.stdin.read())
Dying(Path(sys.argv[1])).see(
    shown, (), alliance="rare", log="North", owner=[public_of(owner)], key=key
)
"""


@pytest.mark.parametrize(("moment", "size"), [("INSERT", None), ("COMMIT", 8)])
def test_killed_around_the_commit_it_remembers_whatever_may_have_left(
    book, place, owner, moment, size
):
    book.shut()
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", KILLED, place, moment],
        input=checkpoint(HISTORY, owner, size=8).hex(),
        check=False,
        text=True,
    )
    assert done.returncode == -9
    with WitnessBook(place) as again:
        assert [one.head.size for one in again.known()] == ([] if size is None else [size])
