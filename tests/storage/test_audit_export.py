"""An export shows what is in the log, and whatever was done to it afterwards is found, offline."""

import json
from datetime import UTC, datetime

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huizhen.protocol.audit_checkpoints import only_key
from huizhen.protocol.audit_export import verify_export
from huizhen.protocol.documents import countersign, public_of
from huizhen.protocol.errors import AuditError, ConfigError, HuizhenError, ProtocolError
from huizhen.protocol.statements import Checkpoint, Head
from huizhen.storage import audit_export
from huizhen.storage.audit import AuditLog
from huizhen.storage.audit_export import export

S, T = "5" * 64, "7" * 64
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def keys(signers):
    """Return the public keys of owner and witness by name, at any time."""
    found = {"North": public_of(signers[0]), "coordinator": public_of(signers[1])}
    return lambda time: found


@pytest.fixture(scope="module")
def made(tmp_path_factory, signers):
    """A log of fourteen entries: seven witnessed, twelve signed, of two studies and of none."""
    owner, witness, *_ = signers
    path = tmp_path_factory.mktemp("made") / "site" / "audit.sqlite"
    with AuditLog.create(path, alliance="rare", log="North", clock=lambda: NOON) as log:
        for number in range(2, 15):
            if number % 3 == 0:
                log.append("work_paused", code="command")
            else:
                log.append(
                    "training_started", study=S if number % 2 else T, round=number, attempt=1
                )
            if number == 7:
                log.countersigned(countersign(log.checkpoint(owner), witness), [public_of(witness)])
            if number == 12:
                log.checkpoint(owner)
        yield log


@pytest.fixture(scope="module")
def whole(made, keys):
    return export(made, keys=keys(NOON))


def test_a_whole_export_shows_every_signed_entry(made, whole, keys):
    found = verify_export(whole, keys=keys)
    assert (found.alliance, found.log, found.study) == ("rare", "North", None)
    assert found.entries == tuple(made.entries(1, 12))
    assert found.is_whole
    assert found.head == Head(size=12, root=made.root(12))
    assert (found.signers, found.witnesses) == (("North",), ("coordinator",))
    assert found.witnessed == Head(size=7, root=made.root(7))
    assert verify_export(export(made), keys=keys) == found  # the listed keys change nothing


def test_a_range_shows_its_entries_and_no_others(made, keys):
    found = verify_export(export(made, first=4, last=9), keys=keys)
    assert [e.sequence for e in found.entries] == [4, 5, 6, 7, 8, 9]
    assert (found.first, found.last, found.is_whole) == (4, 9, False)


def test_a_study_s_export_shows_that_study_alone(made, keys):
    found = verify_export(export(made, study=S), keys=keys)
    assert [e.sequence for e in found.entries] == [5, 7, 11]
    assert {e.facts["study"] for e in found.entries} == {S}
    assert (found.study, found.is_whole) == (S, False)
    assert verify_export(export(made, study="9" * 64), keys=keys).entries == ()


def test_the_owner_s_key_alone_is_enough(whole, signers):
    found = verify_export(whole, keys=public_of(signers[0]))
    assert (found.signers, found.witnessed, found.witnesses) == (("North",), None, ())
    assert verify_export(whole, keys=only_key("North", public_of(signers[0]))) == found


def test_a_witnessed_head_alone_is_enough(made, whole):
    for size in (3, 7, 12):
        seen = Head(size=size, root=made.root(size))
        found = verify_export(whole, witnessed=seen)
        assert (found.signers, len(found.entries)) == ((), 12)


def test_against_nothing_nothing_is_verified(whole):
    with pytest.raises(ConfigError, match="nothing was given to check the export against"):
        verify_export(whole)


def test_an_export_of_another_s_log_is_refused(whole, signers):
    with pytest.raises(ProtocolError, match="signed by 0 of 1"):
        verify_export(whole, keys=public_of(signers[1]))
    with pytest.raises(ConfigError, match="no key of 'North'"):
        verify_export(whole, keys=only_key("South", public_of(signers[0])))


def test_what_somebody_else_saw_finds_an_older_copy_and_another_log(made, whole, keys):
    with pytest.raises(AuditError, match=r"^entry 13 of the audit log is missing: somebody saw 14"):
        verify_export(whole, keys=keys, witnessed=made.head())
    for size in (3, 7, 12):
        with pytest.raises(AuditError, match="this is another log"):
            verify_export(whole, keys=keys, witnessed=Head(size=size, root="a" * 64))
    part = export(made, first=2)
    for size in (7, 12):
        verify_export(part, keys=keys, witnessed=Head(size=size, root=made.root(size)))
    with pytest.raises(ConfigError, match="cannot be compared with its head at 3 entries: ask for"):
        verify_export(part, keys=keys, witnessed=Head(size=3, root=made.root(3)))


@pytest.mark.parametrize(
    "asked", [{"first": 0}, {"last": 13}, {"first": 9, "last": 8}, {"first": 13}]
)
def test_entries_under_no_checkpoint_are_not_exported(made, asked):
    with pytest.raises(ConfigError, match="the newest checkpoint speaks for 1 to 12"):
        export(made, **asked)


def test_a_log_without_a_checkpoint_is_not_exported(log):
    with pytest.raises(ConfigError, match="has no checkpoint: sign one"):
        export(log)


def test_an_export_that_no_reader_takes_is_not_made(made, monkeypatch):
    monkeypatch.setattr(audit_export, "MAX_BYTES", 5000)
    with pytest.raises(ConfigError, match="at most 5000 are read: take less"):
        export(made)


def test_keys_are_listed_only_if_they_have_signed(made, signers, keys):
    stranger = public_of(signers[3])
    shown = json.loads(export(made, keys={**keys(NOON), "East": stranger}))
    assert shown["keys"] == {name: key.raw.hex() for name, key in keys(NOON).items()}
    assert json.loads(export(made, keys={"coordinator": public_of(signers[1])}))["keys"] == {}


# Attacks: each finds its first bad entry by number


def altered(data, alter):
    value = json.loads(data)
    alter(value)
    return rfc8785.dumps(value)


numbers = st.integers(1, 12)
many = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(numbers)
def test_deleting_an_entry_of_an_export_is_found_and_named(whole, keys, number):
    data = altered(whole, lambda value: value["entries"].pop(number - 1))
    with pytest.raises(AuditError, match=f"^entry {number} of the audit log is missing"):
        verify_export(data, keys=keys)


@many
@given(numbers, st.sampled_from(["time", "event", "facts", "schema", "proof"]))
def test_editing_an_entry_of_an_export_is_found_and_named(whole, keys, number, what):
    def alter(value):
        item = value["entries"][number - 1]
        entry = item["entry"]
        changes = {
            "time": "2026-03-01T12:00:01Z",
            "event": "never_heard_of",
            "facts": {**entry["facts"], "round": 77},
            "schema": 2,
        }
        if what == "proof":
            item["proof"][0] = "0" * 64
        else:
            entry[what] = changes[what]

    with pytest.raises(AuditError, match=f"^entry {number} of the audit log is not the one that"):
        verify_export(altered(whole, alter), keys=keys)


@many
@given(numbers, numbers)
def test_reordering_entries_of_an_export_is_found_and_named(whole, keys, one, two):
    def alter(value):
        entries = value["entries"]
        entries[one - 1], entries[two - 1] = entries[two - 1], entries[one - 1]

    if one != two:
        first = min(one, two)
        with pytest.raises(AuditError, match=f"^entry {first} of the audit log is missing"):
            verify_export(altered(whole, alter), keys=keys)


@many
@given(st.integers(0, 11), st.booleans())
def test_truncating_an_export_is_found_and_named(whole, keys, size, hidden):
    def alter(value):
        del value["entries"][size:]
        if hidden:  # claiming less, under the same checkpoint, is what a range is
            value["last"] = size

    data = altered(whole, alter)
    if hidden:
        assert not verify_export(data, keys=keys).is_whole
    else:
        with pytest.raises(AuditError, match=f"^entry {size + 1} of the audit log is missing"):
            verify_export(data, keys=keys)


@many
@given(numbers, numbers)
def test_renumbering_or_copying_an_entry_is_found(whole, keys, source, target):
    def alter(value):
        copy = json.loads(json.dumps(value["entries"][source - 1]))
        copy["entry"]["sequence"] = target
        value["entries"][target - 1] = copy

    if source != target:
        with pytest.raises(AuditError, match=f"^entry {target} of the audit log is not the one"):
            verify_export(altered(whole, alter), keys=keys)


def test_entries_of_another_study_do_not_pass_for_those_of_this_one(made, keys):
    mixed = json.loads(export(made, study=S))
    mixed["entries"].append(json.loads(export(made, first=12, last=12))["entries"][0])
    with pytest.raises(AuditError, match="entry 12 of the audit log is not of study '555"):
        verify_export(rfc8785.dumps(mixed), keys=keys)
    mixed["entries"] = [mixed["entries"][1], mixed["entries"][0]]
    with pytest.raises(AuditError, match="entry 5 of the audit log is out of its place"):
        verify_export(rfc8785.dumps(mixed), keys=keys)


def test_a_checkpoint_of_a_shorter_or_other_log_is_found(made, whole, keys, signers):
    def other(size, root):
        said = Checkpoint(
            alliance="rare", log="North", size=size, root=root, issued="2026-03-01T12:00:00Z"
        )
        return json.loads(said.signed(signers[0]))

    for checkpoint in (
        other(12, made.root(11)),
        other(11, made.root(11)),
        other(13, made.root(13)),
    ):
        data = altered(whole, lambda value, new=checkpoint: value.update(checkpoint=new))
        with pytest.raises(AuditError):
            verify_export(data, keys=keys)


def test_a_witnessed_checkpoint_that_the_log_does_not_extend_is_found(whole, keys, signers):
    """The owner rewrote entries that a witness had signed, and signed the new log."""
    said = Checkpoint(
        alliance="rare", log="North", size=7, root="a" * 64, issued="2026-03-01T12:00:00Z"
    )
    forged = json.loads(said.signed(signers[0], signers[1]))
    data = altered(whole, lambda value: value["witnessed"].update(checkpoint=forged))
    with pytest.raises(AuditError, match="of 12 entries does not extend the 7 that witnesses"):
        verify_export(data, keys=keys)


def test_a_listed_key_that_has_not_signed_is_found(whole, keys, signers):
    stranger = public_of(signers[3]).raw.hex()
    for name in ("East", "coordinator"):
        data = altered(whole, lambda value, name=name: value["keys"].update({name: stranger}))
        with pytest.raises(HuizhenError):
            verify_export(data, keys=keys)
    moved = altered(whole, lambda value: value["keys"].update(East=value["keys"].pop("North")))
    with pytest.raises(AuditError, match="lists a key of 'East' that is not the one that signed"):
        verify_export(moved, keys=keys)
    with pytest.raises(AuditError, match="no Ed25519 key in hex"):
        verify_export(altered(whole, lambda value: value["keys"].update(East="x")), keys=keys)


@pytest.mark.parametrize(
    ("alter", "kind", "message"),
    [
        (lambda value: value.update(more=1), AuditError, "other fields"),
        (lambda value: value.update(format="huizhen audit 2"), ConfigError, "not of the format"),
        (lambda value: value.update(first="1"), AuditError, "a first of another type"),
        (lambda value: value.update(first=True), AuditError, "a first of another type"),
        (lambda value: value.update(first=0), AuditError, "entries 0 to 12, there are 12"),
        (lambda value: value.update(last=99), AuditError, "entries 1 to 99, there are 12"),
        (lambda value: value.update(log="South"), AuditError, "names another log"),
        (lambda value: value.update(entries=[1]), AuditError, "entry 1 .* has no proof"),
        (lambda value: value["entries"][0].update(entry=[]), AuditError, "has no number"),
        (lambda value: value["entries"][2].update(proof=["0"]), AuditError, "proof of entry 3"),
        (lambda value: value["entries"][2].update(proof="0"), AuditError, "proof of entry 3"),
        (lambda value: value.update(witnessed={}), AuditError, "with other fields"),
    ],
)
def test_a_file_of_another_form_is_refused(whole, keys, alter, kind, message):
    with pytest.raises(kind, match=message):
        verify_export(altered(whole, alter), keys=keys)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 99_999, b'{"format": "x"}'])
def test_bytes_that_are_no_export_are_refused(data, keys):
    with pytest.raises(ConfigError, match="export is not"):
        verify_export(data, keys=keys)


def test_an_export_in_another_encoding_is_refused(whole, keys):
    twice = b'{"alliance":"rare",' + whole[1:]
    for data in (whole + b" ", json.dumps(json.loads(whole), indent=1).encode(), twice):
        with pytest.raises(AuditError, match="is not in its one encoding"):
            verify_export(data, keys=keys)


@settings(max_examples=150)
@given(st.data())
def test_no_flipped_bit_of_an_export_is_accepted(whole, keys, data):
    broken = bytearray(whole)
    broken[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(HuizhenError):
        verify_export(bytes(broken), keys=keys)
