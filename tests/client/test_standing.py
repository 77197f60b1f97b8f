"""What a site takes from the alliance service is verified, kept once, and in the log first."""

import contextlib
import dataclasses
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.federation.lying_coordinator import (
    SITES,
    approve,
    join,
    lying_coordinator,
    make_study,
    standing_of,
)
from tests.federation.lying_federation import LyingSite

from huizhen.client.alliance import AllianceError, open_alliance
from huizhen.client.joining import join as use_invitation
from huizhen.client.joining import rotate
from huizhen.protocol.audit_checkpoints import COORDINATOR, claimed_checkpoint
from huizhen.protocol.documents import countersign, public_of
from huizhen.protocol.errors import AuditError, ForkError, HuizhenError, ProtocolError, StorageError
from huizhen.protocol.rpc import alliance_pb2 as wire
from huizhen.protocol.statements import Checkpoint, Receipt, Record, digest_of
from huizhen.protocol.trust import TrustError
from huizhen.server.desk import now
from huizhen.server.open_round import OpenRound
from huizhen.simulations.live import edit, free_ports
from huizhen.storage.audit import AuditLog
from huizhen.storage.keys import load_key

BAD = "\x00" * 9
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x42" * 32)


@pytest.fixture(scope="module")
def alliance(tmp_path_factory):
    """A coordinator, and three sites that have joined and approved a study."""
    with lying_coordinator(tmp_path_factory.mktemp("alliance")) as made:
        folder = tmp_path_factory.mktemp("sites")
        homes = {site: join(made, folder, site) for site in SITES}
        offered = made.offer(make_study())
        approve(homes["North"], offered)
        yield made, homes, offered


@pytest.fixture
def coordinator(alliance):
    yield alliance[0]
    alliance[0].be_honest()


@pytest.fixture
def home(alliance):
    return alliance[1]["North"]


@pytest.fixture
def offered(alliance):
    return alliance[2]


@pytest.fixture
def standing(home):
    with standing_of(home) as made:
        yield made


def refresh(standing):
    standing.refresh(version="1", codes=["idle"])


def last(standing):
    """Return the log's last entry: its event and its code."""
    entry = standing._audit.entries()[-1]
    return entry.event, entry.facts.get("code")


def events(standing):
    return [one.event for one in standing._audit.entries()]


def test_an_honest_coordinator_is_followed(standing, coordinator, home):
    refresh(standing)
    assert standing.trust.membership.version == 4
    assert standing._audit.witnessed() is not None  # the coordinator has countersigned the log
    before = events(standing)
    refresh(standing)
    assert events(standing) == before  # what was taken is not taken again


# Memberships. ID-3.


def next_membership(coordinator, signer=None, **changes):
    held = coordinator.desk.registry.trust()
    values = {"version": held.membership.version + 1, "previous": held.digest, **changes}
    made = held.membership.model_copy(update=values)
    return made.signed(signer or coordinator.desk.keys.board[0])


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        (lambda c: next_membership(c, STRANGER), "not_signed"),
        (lambda c: next_membership(c, c.desk.keys.identity), "not_signed"),
        (lambda c: next_membership(c, version=9), "gap"),
        (lambda c: next_membership(c, previous="a" * 64), "fork"),
        (lambda c: next_membership(c, members=()), "fork"),
        (lambda c: next_membership(c, alliance="common"), "wrong_alliance"),
        (lambda c: next_membership(c, issued="2099-01-01T00:00:00Z"), "from_the_future"),
    ],
    ids=["forged", "by the coordinator", "skipped", "forked", "forgotten", "alliance", "future"],
)
def test_id_3_a_membership_that_does_not_follow_is_refused_and_logged(
    standing, coordinator, home, lie, code
):
    refresh(standing)
    held, files = standing.trust.digest, home.memberships()
    coordinator.tell("Memberships", lambda _: wire.Documents(data=[lie(coordinator)]))
    with pytest.raises(TrustError) as caught:
        standing.follow(99)
    assert caught.value.code == code
    assert last(standing) == ("membership_refused", code)
    assert (standing.trust.digest, home.memberships()) == (held, files)


def test_id_7_memberships_that_were_taken_are_not_taken_again(standing, coordinator, home):
    refresh(standing)
    old = [path.read_bytes() for path in home.memberships()]
    coordinator.tell("Memberships", lambda _: wire.Documents(data=[old[-1]]))
    standing.follow(99)
    before = events(standing)
    coordinator.tell("Memberships", lambda _: wire.Documents(data=old))
    with pytest.raises(TrustError, match="version 1"):
        standing.follow(99)
    assert events(standing)[:-1] == before
    assert standing.trust.membership.version == 4


# Offers.


def offer_signed_by(coordinator, offered, *keys, **changes):
    return offered.model_copy(update=changes).signed(*keys)


@pytest.mark.parametrize(
    "case", ["coordinator", "stranger", "alliance", "changed study", "other words"]
)
def test_an_offer_that_the_board_did_not_make_is_not_kept(
    standing, coordinator, home, offered, case, caplog
):
    board = coordinator.desk.keys.board[0]
    study = dict(offered.study) | {"privacy": {"unit": "none", "epsilon": 1e9}}
    data = {
        "coordinator": offered.signed(coordinator.desk.keys.identity),
        "stranger": offered.signed(STRANGER),
        "alliance": offer_signed_by(coordinator, offered, board, alliance="common"),
        "changed study": offer_signed_by(coordinator, offered, board, study=study),
        "other words": offer_signed_by(coordinator, offered, board, ends="2099-01-01T00:00:00Z"),
    }[case]
    before = {one.digest: one.offer_bytes() for one in home.studies()}
    item = wire.StudyItem(document=data, state="open")
    coordinator.tell("Studies", lambda _: wire.StudyList(studies=[item]))
    assert standing.offers() == []
    assert f"not taken: what=offer {digest_of(data)[:12]}" in caplog.text
    assert {one.digest: one.offer_bytes() for one in home.studies()} == before


def test_a_new_offer_is_logged_before_it_is_kept(standing, coordinator, home, monkeypatch):
    made = coordinator.offer(make_study(study={"purpose": "New."}))

    def full(self, event, /, **facts):
        raise StorageError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", full)
        assert made.digest not in {offer.digest for offer, _ in standing.offers()}
    assert home.study(made.digest).offer_bytes() is None
    standing.offers()
    assert last(standing) == ("study_offered", None)
    assert home.study(made.digest).offer_bytes() is not None


# Records and receipts.


@pytest.fixture
def closed(alliance, coordinator):
    """Another study whose first round is closed, approved by North."""
    _, homes, _ = alliance
    number = len(coordinator.desk.store.studies.studies())
    made = coordinator.offer(make_study(study={"purpose": f"Closed {number}."}))
    approve(homes["North"], made)
    first = coordinator.open(made)
    answer(first, homes, coordinator)
    return made, first


def answer(open_round: OpenRound, homes, coordinator):
    for site in SITES:
        liar = LyingSite(site)
        payload = liar.update(open_round)
        document, _ = liar.signed(open_round, payload, key=load_key(homes[site].key("identity")))
        assert open_round.receive(site, document, payload) is None
    open_round.close()


def test_a_record_that_follows_is_taken_once(standing, closed, home):
    made, _ = closed
    assert standing.catch_up(made.digest).round == 1
    before = events(standing)
    assert standing.catch_up(made.digest).round == 1
    assert events(standing) == before
    assert (home.study(made.digest).folder / "record-000001.json").exists()


def test_co_1_a_second_history_is_refused_and_logged(standing, closed, coordinator, home):
    """The coordinator was restored from a backup, and closes the round again."""
    made, _ = closed
    chain = standing.catch_up(made.digest)
    key = coordinator.desk.keys.identity
    honest = coordinator.desk.store.rounds.last_record(made.digest).document
    other = Record.read(honest, [public_of(key)]).model_copy(update={"attempt": 7})
    coordinator.tell("Records", lambda _: wire.Documents(data=[other.signed(key)]))
    with pytest.raises(ProtocolError, match="another than was accepted"):
        standing.catch_up(made.digest)
    assert last(standing) == ("record_refused", "fork")
    assert standing.chain(made.digest) == chain


def test_receipts_are_taken_in_order_and_once(standing, closed, home):
    made, _ = closed
    refresh(standing)
    mine = [one for one in standing._audit.entries() if one.event == "receipt_received"]
    assert made.digest in {one.facts["study"] for one in mine}
    refresh(standing)
    again = [one for one in standing._audit.entries() if one.event == "receipt_received"]
    assert again == mine


@pytest.mark.parametrize("case", ["another site's", "forged"])
def test_a_receipt_that_is_not_this_site_s_from_the_coordinator_is_not_taken(
    standing, closed, coordinator, home, case, caplog
):
    refresh(standing)
    before, events_before = home.last_receipt(), events(standing)
    receipt = Receipt(
        alliance="rare", study=closed[0].digest, round=1, attempt=1,
        site="South" if case == "another site's" else "North", payload="a" * 64, code=None,
        issued="2026-03-01T09:00:00Z",
    )  # fmt: skip
    key = STRANGER if case == "forged" else coordinator.desk.keys.identity
    coordinator.tell(
        "Receipts",
        lambda _: wire.Numbered(
            documents=[wire.NumberedDocument(number=999, data=receipt.signed(key))]
        ),
    )
    refresh(standing)
    assert "not taken: what=receipts" in caplog.text
    assert home.last_receipt() == before
    assert events(standing) == events_before


# Witnesses. AU-3.


def test_au_3_a_forked_log_of_the_coordinator_is_refused_and_logged(standing, coordinator):
    refresh(standing)
    seen = claimed_checkpoint(standing._book.last(COORDINATOR))
    forged = Checkpoint(
        alliance="rare", log=COORDINATOR, size=seen.size, root="a" * 64,
        issued="2026-03-01T09:00:00Z",
    ).signed(coordinator.desk.keys.identity)  # fmt: skip
    coordinator.tell(
        "Heads", lambda _: wire.LogHeads(heads=[wire.LogHead(checkpoint=forged, proof=[])])
    )
    coordinator.tell("Report", lambda notice: wire.Notice(
        time=notice.time, membership=notice.membership, witness=[COORDINATOR]))  # fmt: skip
    with pytest.raises(ForkError):
        standing._witness(alliance_of(standing), COORDINATOR)
    assert last(standing) == ("witness_refused", "fork")


def alliance_of(standing):
    class Once:
        """The service, connected for each call."""

        def __getattr__(self, name):
            def call(*arguments):
                with standing._open() as alliance:
                    return getattr(alliance, name)(*arguments)

            return call

    return Once()


def test_a_countersignature_that_is_not_the_coordinator_s_is_not_taken(
    standing, coordinator, caplog
):
    standing._audit.append("work_resumed", code="started")

    def forge(document):
        own = claimed_checkpoint(document.data)
        bare = own.signed(load_key(standing._home.key("identity")))
        return wire.Document(data=countersign(bare, STRANGER))

    held = standing._audit.witnessed()
    coordinator.tell("Witness", forge)
    refresh(standing)
    [line] = [one for one in caplog.messages if one.startswith("not taken: what=own log")]
    assert "must have signed" in line
    assert standing._audit.witnessed() == held


def test_au_1_a_log_that_the_coordinator_has_seen_longer_is_an_older_copy(
    standing, coordinator, home, caplog
):
    """What comes back for an older copy of the log is a head that it never had."""
    refresh(standing)
    longer = Checkpoint(
        alliance="rare", log="North", size=10_000, root="a" * 64, issued="2026-03-01T09:00:00Z"
    ).signed(load_key(home.key("identity")), coordinator.desk.keys.identity)
    standing._audit.append("work_resumed", code="started")
    coordinator.tell("Witness", lambda _: wire.Document(data=longer))
    with pytest.raises(AuditError):
        standing._show_log(alliance_of(standing))
    refresh(standing)
    assert "not taken: what=own log" in caplog.text


# One thing that fails keeps nothing else back.


def test_an_offer_that_this_version_cannot_read_hides_no_other(standing, coordinator, caplog):
    known = {offer.digest for offer, _ in standing.offers()}
    board = coordinator.desk.keys.board[0]
    first = standing.offers()[0][0]
    newer = first.model_copy(update={"study": dict(first.study) | {"format": 99}}).signed(board)
    item = wire.StudyItem(document=newer, state="open")
    coordinator.tell("Studies", lambda one: wire.StudyList(studies=[item, *one.studies]))
    assert {offer.digest for offer, _ in standing.offers()} == known
    assert "this version reads" in caplog.text


def test_a_refresh_goes_on_after_each_thing_that_fails(
    standing, closed, coordinator, home, caplog, monkeypatch
):
    """A study without records, a forked log and offers that nobody reads: the rest is taken."""
    made, _ = closed
    for call in ("Studies", "Receipts"):
        coordinator.tell(call, lambda _: wire.Document(data=b"neither"))
    coordinator.tell("Report", lambda notice: wire.Notice(
        time=notice.time, membership=0, witness=["nobody", COORDINATOR]))  # fmt: skip
    missing = home.study("0" * 64)  # sorted first, and the coordinator does not have it
    missing.keep_offer(home.study(made.digest).offer_bytes())
    missing.keep_approval(b"{}")
    seen: list[str] = []
    monkeypatch.setattr(standing, "_witness", _witness_of(standing, seen))
    try:
        refresh(standing)
    finally:
        shutil.rmtree(missing.folder)
    assert standing.chain(made.digest).round == 1
    assert seen == ["nobody", COORDINATOR]
    for what in ("offers", "records 000000000000", "receipts", "log 'nobody'"):
        assert f"not taken: what={what} " in caplog.text


def _witness_of(standing, seen):
    honest = standing._witness

    def witness(alliance, log):
        seen.append(log)
        honest(alliance, log)

    return witness


def test_a_refusal_that_comes_again_and_again_is_in_the_log_once(standing, closed, coordinator):
    made, _ = closed
    before = len(standing._audit.entries())
    refresh(standing)
    seen = claimed_checkpoint(standing._book.last(COORDINATOR))
    key = coordinator.desk.keys.identity
    honest = coordinator.desk.store.rounds.last_record(made.digest).document
    other = Record.read(honest, [public_of(key)]).model_copy(update={"attempt": 7}).signed(key)
    coordinator.tell("Records", lambda _: wire.Documents(data=[other]))
    forged = Checkpoint(
        alliance="rare", log=COORDINATOR, size=seen.size, root="a" * 64,
        issued="2026-03-01T09:00:00Z",
    ).signed(key)  # fmt: skip
    coordinator.tell(
        "Heads", lambda _: wire.LogHeads(heads=[wire.LogHead(checkpoint=forged, proof=[])])
    )
    coordinator.tell(
        "Memberships", lambda _: wire.Documents(data=[next_membership(coordinator, STRANGER)])
    )
    coordinator.tell("Report", lambda notice: wire.Notice(
        time=notice.time, membership=99, witness=[COORDINATOR]))  # fmt: skip
    for _ in range(3):
        refresh(standing)
    refused = [one for one in standing._audit.entries()[before:] if "refused" in one.event]
    assert {one.event for one in refused} == {
        "membership_refused", "record_refused", "witness_refused",
    }  # fmt: skip
    assert len({(one.event, *one.facts.values()) for one in refused}) == len(refused)


@pytest.mark.parametrize("what", ["records", "memberships", "offers"])
def test_two_threads_that_ask_for_the_same_write_no_false_evidence(
    alliance, coordinator, tmp_path, what
):
    """Both ask before either has kept what came: the slower one would see an older history."""
    home = join(coordinator, tmp_path, {"records": "R", "memberships": "M", "offers": "O"}[what])
    made = coordinator.offer(study_of(home, f"Two threads, {what}."))
    with standing_of(home) as standing:
        call, take = {
            "records": ("Records", lambda: standing.catch_up(made.digest)),
            "memberships": ("Memberships", lambda: standing.follow(99)),
            "offers": ("Studies", standing.offers),
        }[what]
        if what != "offers":
            standing.offers()
        if what == "records":
            documents = records_of(made, coordinator)
            coordinator.tell(
                call, lambda _: wire.Documents(data=documents[standing.chain(made.digest).round :])
            )
        if what == "memberships":
            join(coordinator, tmp_path, "Y")
            join(coordinator, tmp_path, "Z")
        together = threading.Barrier(2)
        honest = coordinator.service.lies.get(call, lambda one: one)

        def wait(answer):
            told = honest(answer)
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(1.0)
            return told

        coordinator.tell(call, wait)
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(take), pool.submit(take)]:
                with contextlib.suppress(HuizhenError):
                    done.result()
        found = events(standing)
    assert [one for one in found if "refused" in one] == []
    assert len([one for one in found if one == "study_offered"]) == 1


def study_of(home, purpose):
    """Return a study of a hospital that has just joined, and two others."""
    study = make_study(study={"purpose": purpose})
    names = (home.policy().site, "South", "East")
    return dataclasses.replace(study, sites=dict.fromkeys(names, study.sites["South"]))


def records_of(made, coordinator):
    """Return records that follow each other, as the coordinator signs them."""
    records, parent, adapter = [], made.digest, made.adapter
    for number in range(1, 9):
        record = Record(
            alliance="rare", study=made.digest, round=number, attempt=1, parent=parent,
            adapter=adapter, counted=(), absent=(), result="b" * 64, closed="2026-03-01T09:00:00Z",
        )  # fmt: skip
        records.append(record.signed(coordinator.desk.keys.identity))
        parent, adapter = digest_of(records[-1]), record.result
    return records


# A withdrawal holds here at once, and is told when it can be.


@contextlib.contextmanager
def nobody_there(home):
    """Have the site look for the coordinator where nobody listens."""
    place = home.folder / "site.toml"
    text = place.read_text("utf-8")
    service = home.settings().coordinator.service
    place.write_text(text.replace(service, f"127.0.0.1:{free_ports(1)}"), "utf-8")
    try:
        yield
    finally:
        place.write_text(text, "utf-8")


@pytest.fixture
def consented(alliance, coordinator):
    """Another study that North has approved."""
    number = len(coordinator.desk.store.studies.studies())
    made = coordinator.offer(make_study(study={"purpose": f"Consented {number}."}))
    approve(alliance[1]["North"], made)
    return made


def consent(coordinator, study):
    return coordinator.desk.store.studies.standing(study)["North"].kind


def test_a_withdrawal_without_the_coordinator_holds_and_is_told_later(
    standing, coordinator, home, consented
):
    folder = home.study(consented.digest)
    with nobody_there(home):
        standing.withdraw(folder)
        assert folder.approval() is None
        with pytest.raises(AllianceError, match="cannot be reached"):
            standing.tell_withdrawal(folder)
        with pytest.raises(AllianceError, match="cannot be reached"):
            refresh(standing)
        assert last(standing) == ("approval_withdrawn", None)
    assert consent(coordinator, consented.digest) == "approval"
    refresh(standing)
    assert consent(coordinator, consented.digest) == "withdrawal"
    assert not (folder.folder / "withdrawal.json").exists()
    size = coordinator.desk.audit.head().size
    refresh(standing)
    assert coordinator.desk.audit.head().size - size <= 1  # the own log's head, and nothing twice


def test_a_withdrawal_that_was_not_told_does_not_undo_a_later_approval(
    standing, coordinator, home, consented
):
    folder = home.study(consented.digest)
    standing.withdraw(folder)
    time.sleep(1.1)  # times are whole seconds, an approval must be later than the withdrawal
    approve(home, consented)
    refresh(standing)
    assert consent(coordinator, consented.digest) == "approval"
    kinds = [one.kind for one in coordinator.desk.store.studies.consents(consented.digest, "North")]
    assert kinds == ["approval", "withdrawal", "approval"]


def test_a_withdrawal_is_told_before_its_key_is_replaced(coordinator, tmp_path):
    home = join(coordinator, tmp_path, "Rotating")
    made = coordinator.offer(study_of(home, "Rotating."))
    approve(home, made)
    with standing_of(home) as standing:
        standing.withdraw(home.study(made.digest))
        rotate(home, standing, now)
    assert coordinator.desk.store.studies.standing(made.digest)["Rotating"].kind == "withdrawal"


def test_only_an_approval_in_force_is_reported_as_one(standing, home, consented):
    assert consented.digest in standing._approved()
    place = home.folder / "policy.toml"
    text = place.read_text("utf-8")
    people = 'people = 1\n[approval.stewards]\nLi = "' + public_of(STRANGER).raw.hex() + '"\n#'
    try:
        edit(place, {"people = 0 ": people})
        assert standing._approved() == []  # its steward has not signed
        place.write_text("nothing of a policy", "utf-8")
        assert standing._approved() == []
    finally:
        place.write_text(text, "utf-8")


# Joining, and who may call.


def test_an_invitation_of_another_authority_reaches_nobody(coordinator, tmp_path):
    """The pins decide whom to believe, whatever the address says."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from huizhen.client import joining
    from huizhen.client.home import Home
    from huizhen.server.authority import Authority, pem

    home = Home(tmp_path / "site")
    joining.init(home, "West")
    registry = coordinator.desk.registry
    honest = registry.invite("West", coordinator.desk.settings.public, days=7)
    other = Authority.make("rare", ec.generate_private_key(ec.SECP384R1()), now())
    pins = honest.pins.model_copy(update={"authority": pem(other.certificate).decode()})
    with pytest.raises(AllianceError, match="cannot be reached"):
        use_invitation(home, honest.model_copy(update={"pins": pins}), now)
    assert not (home.folder / "alliance").exists()


def test_an_invitation_that_pins_another_board_is_found_out(coordinator, tmp_path):
    from huizhen.client import joining
    from huizhen.client.home import Home
    from huizhen.protocol.statements import Board

    home = Home(tmp_path / "site")
    joining.init(home, "West")
    registry = coordinator.desk.registry
    honest = registry.invite("West", coordinator.desk.settings.public, days=7)
    board = Board(keys=(public_of(STRANGER).raw.hex(),), threshold=1)
    forged = honest.model_copy(update={"pins": honest.pins.model_copy(update={"board": board})})
    with pytest.raises(TrustError):
        use_invitation(home, forged, now)
    assert not home.certificate.exists()


@pytest.mark.parametrize("who", ["nobody", "another authority", "expired", "the server's own"])
def test_without_a_certificate_of_the_authority_the_service_is_shut(
    coordinator, alliance, tmp_path, who
):
    from datetime import timedelta

    from cryptography.hazmat.primitives.asymmetric import ec

    from huizhen.client.joining import request_of
    from huizhen.server.authority import Authority, pem

    home = alliance[1]["East"]
    desk = coordinator.desk
    signer = {
        "another authority": Authority.make("rare", ec.generate_private_key(ec.SECP384R1()), now()),
        "expired": desk.keys.authority,
    }.get(who)
    key, certificate = home.key("tls"), tmp_path / "certificate.pem"
    if signer is not None:
        then = now() - timedelta(days=8) if who == "expired" else now()
        certificate.write_bytes(pem(signer.for_site("East", request_of(home), then)))
    elif who == "the server's own":
        key, certificate = desk.home.key("server"), desk.home.certificate
    else:
        key = tmp_path / "none.pem"
        key.write_bytes(b"")
        certificate.write_bytes(b"")
    terms = home.settings().coordinator
    before = list(coordinator.service.calls)
    with (
        open_alliance(
            terms.service, ca=home.authority.read_bytes(), key=key, certificate=certificate
        ) as service,
        pytest.raises(HuizhenError),
    ):
        service.memberships(0)
    reached = coordinator.service.calls[len(before) :]
    assert reached == ([] if who != "the server's own" else reached)


def test_id_1_a_revoked_member_s_valid_certificate_opens_nothing(tmp_path):
    with lying_coordinator(tmp_path / "alliance") as coordinator:
        home = join(coordinator, tmp_path / "sites", "North")
        coordinator.desk.registry.revoke("North")
        with standing_of(home) as standing:
            for ask in (
                lambda: refresh(standing),
                standing.offers,
                lambda: standing.follow(99),
                lambda: standing.witnessed_ledger("all"),
            ):
                with pytest.raises(AllianceError) as caught:
                    ask()
                assert caught.value.code == "revoked"


def test_a_member_sees_no_study_and_no_record_of_others(coordinator, alliance, home):
    """A study without North: its offer, its records and its receipts are not North's."""
    sites = {site: {"patients_public": 60} for site in ("South", "East")}
    study = make_study(study={"purpose": "Without North."})
    terms = {name: one for name, one in study.sites.items() if name in sites}
    other = coordinator.offer(dataclasses.replace(study, sites=terms))
    with standing_of(home) as standing:
        assert other.digest not in {offer.digest for offer, _ in standing.offers()}
        with pytest.raises(AllianceError, match="does not name site 'North'"):
            alliance_of(standing).records(other.digest, 0)


# Whatever a member sends, the service answers with a code.


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("memberships", [2**64 - 1]),
        ("records", ["x", 2**63]),
        ("records", [BAD, 0]),
        ("receipts", ["", 2**64 - 1]),
        ("submit", [b""]),
        ("submit", [b"{}"]),
        ("submit", [b"x" * (5 << 20)]),
        ("witness", [b"", []]),
        ("witness", [b"{}", [b"x" * 33]]),
        ("heads", ["\x00", 2**64 - 1]),
        ("heads", ["nobody", 0]),
        ("countersigned", [b"junk"]),
    ],
)
def test_junk_from_a_member_gets_an_answer_or_a_code(standing, coordinator, name, arguments):
    before = coordinator.desk.audit.head().size
    with contextlib.ExitStack() as stack:
        is_refused = name in ("submit", "witness", "countersigned") or arguments[0] in ("x", BAD)
        if is_refused:
            caught = stack.enter_context(pytest.raises(AllianceError))
        getattr(alliance_of(standing), name)(*arguments)
    if is_refused:
        assert (caught.value.trouble, caught.value.code) == ("refused", "refused")
    assert coordinator.desk.audit.head().size == before


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({"time": "now"}, True),
        ({"time": ""}, True),
        ({"codes": ["two words", "x" * 9999, "\x00"]}, False),
        ({"studies": [("x", "y")]}, True),
        ({"studies": [("5" * 64, "y z")]}, True),
        ({"version": "v" * 9999}, False),
    ],
)
def test_a_report_of_junk_gets_an_answer_or_a_code(standing, coordinator, changes, is_refused):
    values = {"version": "1", "codes": ["idle"], "time": "2026-03-01T09:00:00Z", "studies": []}
    with standing._open() as alliance:
        if not is_refused:
            alliance.report(**values | changes)
            return
        with pytest.raises(AllianceError) as caught:
            alliance.report(**values | changes)
    assert caught.value.code == "refused"


def test_id_7_an_approval_handed_in_again_changes_nothing(standing, coordinator, home, offered):
    document = home.study(offered.digest).approval()
    before = coordinator.desk.audit.head().size
    consents = coordinator.desk.store.studies.consents(offered.digest, "North")
    standing.submit(document)
    assert coordinator.desk.audit.head().size == before
    assert coordinator.desk.store.studies.consents(offered.digest, "North") == consents


def test_id_2_an_approval_that_another_member_hands_in_is_refused(alliance, coordinator, offered):
    document = alliance[1]["North"].study(offered.digest).approval()
    before = coordinator.desk.audit.head().size
    with standing_of(alliance[1]["South"]) as south, pytest.raises(AllianceError, match="another"):
        south.submit(document)
    assert coordinator.desk.audit.head().size == before
