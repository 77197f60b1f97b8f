"""A statement is what its kind has, all of it and nothing else; dates and names in one spelling."""

import base64
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.documents import public_of, sign, verify
from huizhen.protocol.errors import ProtocolError, WireError
from huizhen.protocol.statements import (
    Announcement,
    Approval,
    Board,
    Checkpoint,
    Counted,
    Enrolment,
    Former,
    Head,
    Member,
    Membership,
    Receipt,
    Record,
    Refusal,
    Refused,
    Release,
    Renewal,
    Rotation,
    Statement,
    StudyOffer,
    Update,
    Withdrawal,
    digest_of,
    moment,
    stamp,
)

KEY = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"\x0b" * 32)
PUBLIC = public_of(KEY)
HEX, S, D = PUBLIC.raw.hex(), "5" * 64, "d" * 64
TIME = "2026-01-31T09:00:00Z"
ASKED: dict[str, Any] = {"alliance": "rare", "study": S, "round": 3, "attempt": 2}
SITE: dict[str, Any] = {"alliance": "rare", "site": "北京", "issued": TIME}

KINDS: dict[str, Statement] = {
    one.kind: one
    for one in (
        Membership(
            alliance="rare", version=1, previous=None, issued=TIME, coordinator=HEX,
            board=Board(keys=(HEX,), threshold=1),
            members=(
                Member(site="North", identity=HEX, node_key="k", status="active", since=TIME,
                       until=None, former=(Former(identity=HEX, until=TIME),)),
            ),
        ),
        StudyOffer(alliance="rare", study={"format": 1}, digest=D, adapter=D, state=D,
                   issued=TIME, ends=TIME),
        Approval(**SITE, study=S, cohort="all", epsilon_cap=2.5, expires=TIME),
        Withdrawal(**SITE, study=S),
        Announcement(**ASKED, parent=D, adapter=D, membership=1, sites=("North",), issued=TIME,
                     deadline=TIME),
        Update(**ASKED, site="North", announcement=D, payload=D, ledger=Head(size=4, root=D)),
        Refusal(**ASKED, site="North", announcement=D, code="not_approved"),
        Receipt(**ASKED, site="North", payload=D, code=None, issued=TIME),
        Record(**ASKED, parent=D, adapter=D, result=D, closed=TIME,
               counted=(Counted(site="North", payload=D, document=D),),
               absent=(Refused(site="South", code="late"),)),
        Release(alliance="rare", study=S, record=D, adapter=D, certificate=None, issued=TIME),
        Checkpoint(alliance="rare", log="coordinator", size=3, root=D, issued=TIME),
        Enrolment(**SITE, identity=HEX, node_key="k", request="r", token=D),
        Renewal(**SITE, request="r"),
        Rotation(**SITE, old=HEX, new=public_of(OTHER).raw.hex()),
    )
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def body_of(kind) -> dict[str, Any]:
    return KINDS[kind].model_dump(mode="json", by_alias=True)


def read(kind, body, as_kind=None):
    return type(KINDS[kind]).read(sign(as_kind or kind, body, KEY), [PUBLIC])


def test_every_kind_is_tested():
    assert set(KINDS) == {one.kind for one in Statement.__subclasses__()}


@every_kind
def test_a_statement_comes_back_as_it_was_signed(kind):
    assert type(KINDS[kind]).read(KINDS[kind].signed(KEY), [PUBLIC]) == KINDS[kind]


@every_kind
def test_id_2_a_statement_that_somebody_else_signed_is_refused(kind):
    with pytest.raises(ProtocolError, match="0 of 1 known keys"):
        type(KINDS[kind]).read(KINDS[kind].signed(OTHER), [PUBLIC])


@every_kind
def test_a_statement_of_any_other_kind_does_not_pass(kind):
    for other in KINDS.keys() - {kind}:
        data = KINDS[other].signed(KEY)
        with pytest.raises(ProtocolError, match="expected"):
            type(KINDS[kind]).read(data, [PUBLIC])
        with pytest.raises(WireError, match=f"of kind '{other}', expected '{kind}'"):
            type(KINDS[kind]).of(verify(data, kind=other, keys=[PUBLIC]))


@every_kind
def test_an_unknown_key_refuses_the_whole(kind):
    with pytest.raises(WireError, match=f"{kind} has a wrong 'sql'"):
        read(kind, body_of(kind) | {"sql": ""})


@every_kind
def test_a_missing_key_refuses_the_whole(kind):
    for name in body_of(kind):
        body = body_of(kind)
        del body[name]
        with pytest.raises(WireError, match=f"{kind} has (a wrong|no) '{name}'"):
            read(kind, body)


OTHER_TYPES: list[Any] = [None, True, 3.5, "", "x" * 5000, [], ["../x"], {"x": 1}, -1, 0, "1"]
MEANT: dict[tuple[str, str], list[Any]] = {
    ("approval", "epsilon_cap"): [None, 3.5],
    ("checkpoint", "size"): [0],
    ("enrolment", "node_key"): ["", "1"],
    ("enrolment", "request"): ["", "1"],
    ("membership", "previous"): [None],
    ("membership", "members"): [[]],
    ("receipt", "code"): [None],
    ("record", "counted"): [[]],
    ("record", "absent"): [[]],
    ("release", "certificate"): [None],
    ("renewal", "request"): ["", "1"],
    ("study", "study"): [{"x": 1}],
    ("update", "ledger"): [None],
}


@every_kind
def test_a_value_of_another_type_refuses_the_whole(kind):
    """No coercion: "1" is no 1, true is no 1, null stands only where it is meant."""
    for name in body_of(kind):
        for other in OTHER_TYPES:
            body = body_of(kind) | {name: other}
            meant = MEANT.get((kind, name), [])
            is_name = name in ("alliance", "site", "log", "cohort") and other == "1"
            if is_name or any(type(one) is type(other) and one == other for one in meant):
                read(kind, body)
                continue
            with pytest.raises(WireError, match=f"(wrong|no) '{name}"):
                read(kind, body)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("announcement", "round", 1_000_001),
        ("announcement", "attempt", 1_000_001),
        ("announcement", "attempt", 0),
        ("announcement", "sites", []),
        ("announcement", "sites", ["North"] * 1001),
        ("announcement", "sites", ["../North"]),
        ("announcement", "study", "5" * 63),
        ("announcement", "study", "5" * 64 + "\n"),
        ("announcement", "study", "A" * 64),
        ("announcement", "deadline", "2026-01-31T09:00:00+00:00"),
        ("announcement", "deadline", "2026-1-31T09:00:00Z"),
        ("announcement", "deadline", "2026-01-31T09:00:60Z"),
        ("announcement", "alliance", "a\x00b"),
        ("announcement", "alliance", "a" * 101),
        ("refusal", "code", "KeyError('张三')"),
        ("refusal", "code", "patient 张三"),
        ("refusal", "code", "x" * 49),
        ("refusal", "code", ""),
        ("receipt", "code", "No"),
        ("approval", "epsilon_cap", 0),
        ("approval", "epsilon_cap", -1),
        ("membership", "coordinator", "0" * 63),
        ("update", "ledger", {"size": 4}),
        ("update", "ledger", {"size": 4, "root": D, "entry": "text"}),
        ("update", "ledger", {"size": -1, "root": D}),
        ("record", "counted", [{"site": "North", "payload": D, "document": D, "patients": 60}]),
        ("record", "absent", [{"site": "North", "code": "no_answer", "reason": "KeyError: 张三"}]),
        ("enrolment", "request", "r" * 4001),
        ("enrolment", "node_key", "k" * 1001),
    ],
)
def test_a_value_out_of_its_bounds_refuses_the_whole(kind, name, value):
    with pytest.raises(WireError, match=f"wrong '{name}"):
        read(kind, body_of(kind) | {name: value})


@every_kind
def test_a_second_encoding_of_the_same_statement_is_refused(kind):
    data = KINDS[kind].signed(KEY)
    value = json.loads(data)
    loose = json.dumps(json.loads(base64.b64decode(value["payload"])), ensure_ascii=False).encode()
    for other in (
        data + b"\n",
        json.dumps(value).encode(),
        rfc8785.dumps(value | {"payload": base64.b64encode(loose).decode()}),
    ):
        with pytest.raises(WireError):
            type(KINDS[kind]).read(other, [PUBLIC])


def test_a_signature_under_a_key_that_is_no_point_is_no_key():
    with pytest.raises(WireError, match="wrong 'identity'"):
        read("enrolment", body_of("enrolment") | {"identity": "zz" * 32})


def test_eg_3_an_error_of_parsing_repeats_nothing_of_what_came():
    """What did not parse may be anything; the line about it goes to logs and to the sender."""
    words = "张三 110101199003074477"
    for name in body_of("refusal"):
        with pytest.raises(WireError) as caught:
            read("refusal", body_of("refusal") | {name: {"x": words}})
        assert words not in str(caught.value)


def test_an_update_has_a_place_for_no_number_of_patients():
    """UP-6: weights follow from the public sizes of the study; nothing that a site says adds."""
    assert set(body_of("update")) == {
        "schema", "alliance", "study", "round", "attempt", "site", "announcement", "payload",
        "ledger",
    }  # fmt: skip


# The study that is offered.


@pytest.fixture(scope="module")
def offer(make_study):
    study = make_study()
    body = body_of("study") | {"study": study.resolved(), "digest": study.digest()}
    return study, read("study", body)


def test_an_offered_study_is_the_one_that_was_resolved(offer):
    study, made = offer
    assert made.agreed() == study


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        ("privacy", {"epsilon": 800.0}),
        ("rounds", {"local_steps": 3}),
        ("study", {"purpose": "Another purpose."}),
        ("sites", {"C": {"patients_public": 8}}),
        ("task", {"text": "{text} {name}"}),
    ],
)
def test_code_2_a_study_that_was_changed_under_its_digest_is_refused(offer, table, changes):
    study, made = offer
    tables = study.resolved()
    forged = tables | {table: dict(tables[table]) | changes}
    with pytest.raises(ProtocolError):
        made.model_copy(update={"study": forged}).agreed()


@pytest.mark.parametrize(
    "changes",
    [{"format": 2}, {"format": None}, {"run": {"epsilon": 9}}, {"privacy": {"noise": 0}}],
)
def test_code_2_a_study_of_another_format_or_with_more_in_it_is_refused(offer, changes):
    study, made = offer
    with pytest.raises(ProtocolError):
        made.model_copy(update={"study": study.resolved() | changes}).agreed()


# Times.


def test_a_time_has_one_spelling():
    east = timezone(timedelta(hours=8))
    assert stamp(datetime(2026, 1, 31, 17, 0, 0, 999_999, tzinfo=east)) == TIME
    assert moment(TIME) == datetime(2026, 1, 31, 9, tzinfo=UTC)
    for text in ("2026-01-31 09:00:00Z", "2026-01-31T09:00:00", "2026-01-31T9:00:00Z", ""):
        with pytest.raises(ValueError, match="time"):
            moment(text)


@given(st.integers(-(10**10), 10**11).map(lambda s: datetime.fromtimestamp(s, UTC)))
def test_any_moment_comes_back_to_the_second(time):
    assert moment(stamp(time)) == time


def test_a_digest_is_sha_256():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_of(b"") == empty
