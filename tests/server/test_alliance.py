"""What members and strangers may ask of the alliance service, and what they cannot make of it."""

import contextlib
import logging
from datetime import timedelta

import grpc
import pytest
from sqlalchemy import event
from tests.federation.lying_federation import ALLIANCE, FIRST, KEYS, SIZES, LyingSite, make_study
from tests.server.test_registry import Clock, Hospital
from tests.server.test_studies import ENDS, founded, join

from huizhen.client.alliance import AllianceError, open_door
from huizhen.protocol.documents import claimed
from huizhen.protocol.rpc import alliance_pb2 as wire
from huizhen.protocol.statements import Approval, Withdrawal, stamp
from huizhen.server import store_studies
from huizhen.server.alliance import MAX_DOOR_BYTES, AllianceService, DoorService, make_servers
from huizhen.server.authority import pem
from huizhen.server.desk import now
from huizhen.server.open_round import OpenRound
from huizhen.server.store_sites import StoredHead
from huizhen.server.studies import change, find, offer
from huizhen.server.supervisor import prepare
from huizhen.simulations.live import free_ports
from huizhen.storage.audit import AuditLog


class AbortedError(Exception):
    """What ends a call in gRPC."""


class Caller:
    """The context of a call from a site, whose certificate TLS has verified."""

    def __init__(self, certificate=b""):
        self.certificate = certificate

    def auth_context(self):
        return {"x509_pem_cert": [self.certificate]}

    def abort(self, code, text):
        raise AbortedError(code, text)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def desk(tmp_path, clock):
    with founded(tmp_path / "c", clock) as desk:
        desk.registry.found()
        join(desk, clock)
        yield desk


@pytest.fixture
def service(desk):
    return AllianceService(desk)


@pytest.fixture
def north(desk, clock):
    request = Hospital("North", 11, clock).request
    return Caller(pem(desk.keys.authority.for_site("North", request, clock())))


@pytest.fixture
def study(desk):
    made = offer(desk, make_study(), FIRST, ends=ENDS)
    change(desk, find(desk, made.digest), "open")
    return made


def approval(study, clock, cohort="all"):
    return Approval(
        alliance=ALLIANCE, study=study.digest, site="North", cohort=cohort, epsilon_cap=2.0,
        issued=stamp(clock()), expires=stamp(clock() + timedelta(days=30)),
    ).signed(KEYS["North"])  # fmt: skip


def withdrawal(study, time):
    return Withdrawal(
        alliance=ALLIANCE, study=study.digest, site="North", issued=stamp(time)
    ).signed(KEYS["North"])


def submit(service, caller, document):
    service.Submit(wire.Document(data=document), caller)


def refused(service, caller, desk, document, match):
    """Check that a document is refused and leaves nothing behind, in the log neither."""
    study = claimed(document)["study"]
    before = desk.audit.head(), desk.store.studies.consents(study, "North")
    with pytest.raises(AbortedError, match=match):
        submit(service, caller, document)
    assert (desk.audit.head(), desk.store.studies.consents(study, "North")) == before


def test_a_member_does_not_fill_the_disk_with_approvals_and_can_always_withdraw(
    service, north, desk, study, clock, monkeypatch
):
    monkeypatch.setattr(store_studies, "MAX_APPROVALS", 3)
    monkeypatch.setattr(store_studies, "MAX_CONSENTS", 5)
    for number in range(3):
        submit(service, north, approval(study, clock, f"cohort {number}"))
    refused(service, north, desk, approval(study, clock, "one more"), "has said 3 things")
    submit(service, north, approval(study, clock, "cohort 1"))  # known, so that nothing is written
    for minutes in (1, 2):
        submit(service, north, withdrawal(study, clock() + timedelta(minutes=minutes)))
    last = withdrawal(study, clock() + timedelta(minutes=3))
    refused(service, north, desk, last, "withdrawals are taken after fewer than 5")
    assert desk.store.studies.standing(study.digest)["North"].kind == "withdrawal"
    events = [one.event for one in desk.audit.entries()]
    assert (events.count("approval_received"), events.count("withdrawal_received")) == (3, 2)


def test_an_approval_from_before_the_withdrawal_is_not_even_logged(
    service, north, desk, study, clock
):
    submit(service, north, withdrawal(study, clock()))
    for number in range(3):
        old = approval(study, clock, f"cohort {number}")
        refused(service, north, desk, old, "it must approve anew")


def test_a_fork_that_the_store_finds_is_told_and_logged_as_one(
    service, north, desk, clock, tmp_path, caplog
):
    with AuditLog.create(
        tmp_path / "north" / "audit.sqlite", alliance=ALLIANCE, log="North", clock=clock
    ) as audit:
        checkpoint = audit.checkpoint(KEYS["North"])
    desk.store.sites.add_head(
        StoredHead(log="North", size=1, root="a" * 64, document=b"before", received=clock())
    )
    with caplog.at_level(logging.ERROR), pytest.raises(AbortedError, match="forked: ") as caught:
        service.Witness(wire.LogHead(checkpoint=checkpoint), north)
    assert caught.value.args[0] == grpc.StatusCode.PERMISSION_DENIED
    assert "a log has forked: log 'North'" in caplog.text


def test_a_site_gets_its_last_updates_and_the_store_is_asked_once_per_study(
    service, north, desk, study, clock
):
    for _ in range(2):
        opened = OpenRound(desk.parts, study, desk.registry.trust(), tuple(SIZES))
        for site in SIZES:
            assert opened.receive(site, *LyingSite(site, (0.25, -0.5)).honest(opened)) is None
        opened.close()
    others = {name: one for name, one in make_study().sites.items() if name != "North"}
    without = make_study(study={"name": "others"})
    object.__setattr__(without, "sites", others)
    offer(desk, without, FIRST, ends=ENDS)
    asked = []
    engine = desk.store._database._readers
    event.listen(engine, "before_cursor_execute", lambda *facts: asked.append(facts[2]))
    [found] = service.LastUpdates(wire.Nothing(), north).data
    assert found == desk.store.updates.last_update(study.digest, "North").document
    assert claimed(found)["round"] == 2
    assert len([one for one in asked if "FROM updates" in one]) == 2  # the test's own, and one
    assert not [one for one in asked if "FROM records" in one]


@pytest.mark.parametrize("call", ["Enrol", "Renew"])
def test_a_stranger_s_large_document_is_refused_before_it_is_parsed(desk, call):
    def ask(size):
        document = b"x" * size
        message = {
            "Enrol": wire.EnrolRequest(document=document, token=""),
            "Renew": wire.Document(data=document),
        }[call]
        getattr(DoorService(desk), call)(message, Caller())

    with pytest.raises(AbortedError, match=f"at most {MAX_DOOR_BYTES} are taken at the door"):
        ask(MAX_DOOR_BYTES + 1)
    with pytest.raises(AbortedError, match="document is not JSON"):
        ask(MAX_DOOR_BYTES)


def test_the_door_does_not_hold_a_stranger_s_megabytes(tmp_path):
    with founded(tmp_path / "c", now) as desk, contextlib.ExitStack() as stack:
        desk.registry.found()
        prepare(desk)
        first, ca = free_ports(2), desk.home.authority.read_bytes()
        servers = make_servers(
            desk,
            door=f"127.0.0.1:{first}",
            service=f"127.0.0.1:{first + 1}",
            key=desk.home.key("server").read_bytes(),
            certificate=desk.home.certificate,
            authority=ca,
        )
        for server in servers:
            server.start()
            stack.callback(server.stop, grace=None)
        door = stack.enter_context(open_door(f"127.0.0.1:{first}", ca))
        with pytest.raises(AllianceError, match="taken at the door"):
            door.renew(b"x" * (MAX_DOOR_BYTES + 1))
        with pytest.raises(AllianceError, match="larger than max"):
            door.renew(b"x" * (1 << 20))


def test_what_a_site_reports_of_itself_commands_no_terminal(service, north, desk, study):
    service.Report(
        wire.Status(
            version="1.2\x1b[2J\x07\u202e3",
            codes=["disk_low", "\x1b]0;x\x07", "\x00", "clock\nskew", "磁盘"],
            time="2026-03-01T09:00:00Z",
            studies=[wire.StudyStatus(study=study.digest, code="train\x9bing")],
        ),
        north,
    )
    [status] = desk.store.sites.statuses()
    assert status.version == "1.2[2J3"
    assert status.codes == ("disk_low", "]0;x", "clockskew", "磁盘")
    [progress] = desk.store.sites.progress(study.digest)
    assert progress.code == "training"
