"""An entry says one of the listed things with facts of the listed types, or it is not made."""

import contextlib
import json
import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.audit import EVENTS, Entry, make_entry, read_entry
from huizhen.protocol.errors import AuditError, ConfigError, HuizhenError
from huizhen.protocol.merkle import leaf_hash
from huizhen.protocol.statements import Head

S, D, KEY = "5" * 64, "d" * 64, "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
NOW = datetime(2026, 3, 1, 8, 30, 59, 999_999, tzinfo=UTC)
HEAD = {"size": 7, "root": D}

# One value for each fact that any event has: an event that is added needs its facts here.
FACTS = {
    "alliance": "rare disease", "log": "北京", "site": "Köln", "cohort": "all children",
    "purpose": "identity", "fingerprint": D, "old": KEY, "new": KEY, "identity": KEY,
    "authority": D, "until": "2026-09-01T00:00:00Z", "code": "not_approved",
    "document": D, "first": 1, "last": 9, "size": 7, "root": D, "seconds": -40, "version": 3,
    "study": S, "epsilon_cap": 2.5, "policy": D, "round": 3, "attempt": 2, "announcement": D,
    "ledger": HEAD, "payload": D, "bytes": 1234, "record": D, "result": D, "release": D,
    "adapter": D,
}  # fmt: skip
NULLABLE = {
    ("log_exported", "study"),
    ("approval_given", "epsilon_cap"),
    ("training_ended", "code"),
    ("receipt_received", "code"),
    *(("announcement_refused", fact) for fact in ("study", "round", "attempt")),
    *(("update_refused", f) for f in ("study", "round", "attempt", "site", "payload")),
}


def facts_of(event, **changes):
    return {fact: FACTS[fact] for fact in EVENTS[event]} | changes


def written(event="update_sent", sequence=5, **changes):
    return make_entry(event, facts_of(event, **changes), sequence=sequence, now=NOW)


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_is_written_and_read_back(event):
    entry = written(event)
    assert read_entry(entry.canonical(), 5) == entry
    assert json.loads(entry.canonical()) == {
        "schema": 1,
        "sequence": 5,
        "time": "2026-03-01T08:30:59Z",
        "event": event,
        "facts": facts_of(event),
    }
    assert entry.leaf() == leaf_hash(entry.canonical())


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_has_exactly_its_facts(event):
    facts = facts_of(event)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)+", event)
    for fact in facts:
        without = {name: value for name, value in facts.items() if name != fact}
        with pytest.raises(ValueError, match=f"{event!r} has a wrong fact {fact!r}: missing"):
            make_entry(event, without, sequence=5, now=NOW)
        if (event, fact) not in NULLABLE:
            with pytest.raises(ValueError, match=f"wrong fact {fact!r}"):
                make_entry(event, {**facts, fact: None}, sequence=5, now=NOW)
        else:
            assert written(event, **{fact: None}).facts[fact] is None
    with pytest.raises(ValueError, match="wrong fact 'more': extra_forbidden"):
        make_entry(event, {**facts, "more": 1}, sequence=5, now=NOW)


# Names that the parties chose for themselves are the only facts with letters of their own.
NAMES = {"alliance", "log", "site", "cohort"}
SENTENCES = [
    "patient 7 has a seizure", "张三，男，34岁", "Zhang San 1990-01-01", "a\nb", "A", "é", "",
    "x" * 65, {"text": "x"}, ["x"], 1.5, True, b"x",
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_au_4_no_sentence_of_a_record_fits_into_any_fact(event):
    """AU-4: what a careless caller passes is refused, and not repeated in the message."""
    for fact in set(EVENTS[event]) - NAMES:
        for text in SENTENCES:
            if isinstance(text, float) and fact == "epsilon_cap":
                continue
            with pytest.raises(ValueError, match=f"^event {event!r} has a wrong fact") as caught:
                written(event, **{fact: text})
            told = str(caught.value)
            assert not any(word in told for word in ("patient", "张三", "Zhang", "x" * 65))
            assert caught.value.__cause__ is None


@given(
    st.sampled_from(sorted(EVENTS)),
    st.data(),
    st.one_of(st.text(max_size=80), st.floats(), st.integers(), st.none(), st.binary(max_size=9)),
)
def test_whatever_is_passed_an_entry_reads_back_or_is_not_made(event, data, value):
    fact = data.draw(st.sampled_from(sorted(EVENTS[event])))
    try:
        entry = written(event, **{fact: value})
    except ValueError:
        return
    assert read_entry(entry.canonical(), 5) == entry
    assert fact in NAMES or not isinstance(value, str) or re.fullmatch(r"[a-z0-9_:TZ-]*", value)


def test_a_head_may_be_passed_as_a_statement_has_it():
    assert written("ledger_charged", ledger=Head(size=7, root=D)).facts["ledger"] == HEAD


def test_an_unknown_event_is_refused():
    with pytest.raises(ValueError, match="'patient_seen' is no event"):
        make_entry("patient_seen", {}, sequence=1, now=NOW)


def test_time_is_utc_in_whole_seconds():
    east = timezone(timedelta(hours=8))
    entry = make_entry(
        "work_paused", {"code": "stop"}, sequence=1, now=NOW.replace(microsecond=0).astimezone(east)
    )
    assert entry.time == "2026-03-01T08:30:59Z"


VALID = written().to_json()


def changed(**changes):
    return rfc8785.dumps({**VALID, **changes})


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", AuditError, "is not as it was written"),
        (b"[]", AuditError, "is not as it was written"),
        (b"\xff", AuditError, "is not as it was written"),
        (b"[" * 4000, AuditError, "is not as it was written"),
        (b"NaN", AuditError, "is not as it was written"),
        (rfc8785.dumps(VALID) + b" ", AuditError, "is not as it was written"),
        (json.dumps(VALID).encode(), AuditError, "is not as it was written"),
        (changed(more="x" * 5000), AuditError, "is not as it was written"),
        (changed(more=1), AuditError, "other fields"),
        (rfc8785.dumps({k: v for k, v in VALID.items() if k != "time"}), AuditError, "other field"),
        (changed(schema=2), ConfigError, "another schema than 1: upgrade"),
        (changed(schema=True), ConfigError, "another schema"),
        (changed(event="scanner_connected"), ConfigError, "unknown to this version: upgrade"),
        (changed(sequence=6), AuditError, "is missing, number 6 stands in its place"),
        (changed(sequence="5"), AuditError, "is missing, something else"),
        (changed(sequence=True), AuditError, "is missing, something else"),
        (changed(event=1), AuditError, "of another type"),
        (changed(facts=[]), AuditError, "of another type"),
        (changed(time="2026-03-01"), AuditError, "of another type"),
        (changed(time="2026-3-01T08:30:59Z"), AuditError, "of another type"),
        (changed(time=5), AuditError, "of another type"),
        (changed(facts={}), AuditError, "wrong fact 'study': missing"),
        (changed(facts={**VALID["facts"], "round": 0}), AuditError, "wrong fact 'round'"),
        (changed(facts={**VALID["facts"], "round": "3"}), AuditError, "wrong fact 'round'"),
        (changed(facts={**VALID["facts"], "text": "x"}), AuditError, "wrong fact 'text'"),
    ],
)
def test_bytes_that_are_no_entry_are_refused_by_number(data, kind, message):
    with pytest.raises(kind, match=rf"^entry 5 of the audit log.*{message}"):
        read_entry(data, 5)


@given(st.integers(0, len(written().canonical()) - 1), st.integers(1, 255))
def test_no_flipped_bit_gives_the_same_entry(place, flip):
    data = bytearray(written().canonical())
    data[place] ^= flip
    with contextlib.suppress(HuizhenError):
        assert read_entry(bytes(data), 5).leaf() != written().leaf()


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data):
    with pytest.raises(HuizhenError):
        read_entry(data, 1)


def test_an_entry_is_a_value():
    assert isinstance(written(), Entry)
    with pytest.raises(AttributeError):
        setattr(written(), "event", "work_paused")  # noqa: B010 - what must not be possible
