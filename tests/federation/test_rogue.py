"""A member that lies over real ports, and strangers at every door of a running coordinator.

North and South are honest sites with processes of their own; East has joined, and this process
speaks with its keys.
"""

import contextlib
import http.client
import json
import os
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from tests.federation.conftest import records
from tests.federation.loopback import flower, make_node_key, server_superlink, site_flower

from huizhen.client.alliance import AllianceError, open_alliance
from huizhen.client.home import Home as SiteHome
from huizhen.client.joining import request_of
from huizhen.protocol.documents import public_of
from huizhen.protocol.statements import Announcement, Receipt, Record, Update, digest_of
from huizhen.server.authority import Authority, pem
from huizhen.server.edge import FLEET_PATHS, MAX_BODY_BYTES
from huizhen.server.home import Home
from huizhen.simulations.live import Live
from huizhen.storage.keys import load_key, load_node_key

pytestmark = [
    pytest.mark.slow,
    # Flower builds a bundle with names that its library has deprecated.
]
SITES = ("North", "South", "East")
STUDY = """
[study]
name = "rogue"
[base]
name = "tiny"
[adapter]
rank = 2
target_modules = ["q_proj"]
[task]
kind = "classification"
text = "{text}"
label = "label"
labels = ["A", "B"]
max_tokens = 16
[privacy]
unit = "none"
[strategy]
name = "fedavg"
[rounds]
count = 200
quorum = 2
batch_size = 16
deadline_minutes = 0.15
[sites.North]
patients_public = 30
[sites.South]
patients_public = 30
[sites.East]
patients_public = 30
"""
# Reports what would run bytes as code once the file HUIZHEN_TEST_ARMED is there: what imports do
# apart, which load the installed files.
HOOK = """
import os, sys

ARMED, LOG = os.environ.get("HUIZHEN_TEST_ARMED", ""), os.environ.get("HUIZHEN_TEST_LOG", "")


def hook(event, arguments):
    if event not in ("pickle.find_class", "marshal.loads", "exec") or not os.path.exists(ARMED):
        return
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return
        frame = frame.f_back
    text = f"{os.getpid()} {event} {str(arguments)[:200]} {sys.argv[:3]}\\n"
    descriptor = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, text.encode())
    os.close(descriptor)


if ARMED:
    sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def hooked(tmp_path_factory):
    """Put the hook into every process that is started from here; return its two files."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("HUIZHEN_TEST_ARMED", str(folder / "armed"))
        patch.setenv("HUIZHEN_TEST_LOG", str(folder / "log"))
        yield folder / "armed", folder / "log"


@pytest.fixture(scope="module")
def live(tmp_path_factory, home, hooked):
    folder = tmp_path_factory.mktemp("live")
    with Live(folder, bases=home) as made:
        made.found()
        for site in SITES:
            place = folder / f"{site}.jsonl"
            place.write_text(records(site, 30), "utf-8")
            made.add_site(site, place, unit="none", min_sites=2)
            if site != "East":
                made.start_site(site)
        yield made


@pytest.fixture(scope="module")
def study(live):
    digest = live.offer(STUDY)
    live.wait_for(digest, 1, seconds=150)
    return digest


@pytest.fixture(scope="module")
def coordinator(live):
    return Home(live.folder / "coordinator-home" / "coordinator")


@pytest.fixture(scope="module")
def east(live):
    return SiteHome(live.home_of("East") / "site")


def at(live, number):
    return f"127.0.0.1:{live.port + number}"


def node_of(home):
    try:
        return int((home.run / "node").read_text("ascii"))
    except OSError:
        return None


@contextlib.contextmanager
def connected(live, home):
    with site_flower.connect(
        at(live, 0), ca=home.authority, key=load_node_key(home.key("node")), last_node=node_of(home)
    ) as fleet:
        (home.run).mkdir(parents=True, exist_ok=True)
        (home.run / "node").write_text(str(fleet.node), "ascii")
        yield fleet


def receive(fleet, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (request := fleet.receive()) is not None:
            return request
        time.sleep(0.05)
    raise AssertionError("no message came")


# ID-4: the doors.


def request(live, method, path, *, body=b"", headers=None, port=0):
    """Send a request whose path is sent exactly as it is given, and return the status."""
    context = ssl.create_default_context(
        cafile=str(live.folder / "coordinator-home" / "coordinator" / "authority.pem")
    )
    connection = http.client.HTTPSConnection(
        "127.0.0.1", live.port + port, context=context, timeout=20
    )
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (headers or {"content-length": str(len(body))}).items():
            connection.putheader(name, value)
        connection.endheaders()
        with contextlib.suppress(OSError):  # a server may refuse before it has read all
            connection.send(body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def openapi(live):
    """Every path of the SuperLink itself, as it tells on loopback."""
    status, body = request(live, "GET", "/openapi.json", port=4)
    assert status == 200
    return sorted(json.loads(body)["paths"])


def test_id_4_of_all_that_flower_serves_only_the_fleet_list_answers(live, openapi):
    """Fails when Flower adds a path that the edge lets out, or drops one that agents use."""
    assert {one.split("/")[2] for one in openapi if one.startswith("/v1/")} >= {
        "fleet", "control", "runtime",
    }  # fmt: skip
    assert set(openapi) >= FLEET_PATHS
    for path in [*openapi, "/", "/docs", "/redoc", "/openapi.json", "/health", "/v1", "/v1/fleet/"]:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"):
            status, _ = request(live, method, path)
            is_open = method == "POST" and path in FLEET_PATHS
            assert (status != 404) == is_open, (method, path, status)


def spellings(path):
    """Return other spellings of a path that some server might take for it."""
    first, last = path.rsplit("/", 1)
    return [
        "/" + path,
        path.replace("/v1/", "//v1/"),
        path.replace("/v1/", "/v1//"),
        path + "/",
        path + "?",
        path + "?x=1",
        path + ";x",
        path + "%00",
        path + "%20",
        path.replace("/v1", "/./v1"),
        path.replace("/v1/", "/v1/fleet/../"),
        "/v1/fleet/activate-node/../../.." + path,
        "/v1/fleet/activate-node/%2e%2e/%2e%2e/%2e%2e" + path,
        "/v1/fleet/activate-node%2f..%2f..%2f.." + path,
        f"{first}/%{ord(last[0]):02x}{last[1:]}",
        f"{first}%2f{last}",
        path.upper(),
        "\\".join(path.split("/")) if path.count("/") else path,
        f"https://127.0.0.1{path}",
    ]


def test_id_4_no_other_spelling_of_any_path_gets_through(live, openapi):
    for path in openapi:
        for other in spellings(path):
            if path in FLEET_PATHS and other in (path + "?", f"https://127.0.0.1{path}"):
                continue  # without a query, and in the absolute form of RFC 9112: the path itself
            for method in ("GET", "POST"):
                status, _ = request(live, method, other)
                assert status in (400, 404), (method, other, status)


def test_a_body_over_the_limit_is_refused(live):
    path = "/v1/fleet/push-object"
    status, _ = request(live, "POST", path, headers={"content-length": str(MAX_BODY_BYTES + 1)})
    assert status == 413
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    status, _ = request(
        live, "POST", path, body=chunk * 17 + b"0\r\n\r\n", headers={"transfer-encoding": "chunked"}
    )
    assert status == 413
    for length in ("-1", "1e9", "0x10", " "):
        status, _ = request(live, "POST", path, headers={"content-length": length})
        assert status in (400, 413)


def test_f4_without_a_signature_the_fleet_answers_401_or_less(live):
    for path in FLEET_PATHS:
        status, _ = request(live, "POST", path)
        assert status in (400, 401, 415, 422), (path, status)


def test_a_node_key_that_nobody_registered_gets_nothing(live, east):
    with (
        pytest.raises(site_flower.FleetError) as caught,
        site_flower.connect(at(live, 0), ca=east.authority, key=make_node_key()),
    ):
        pass
    assert caught.value.trouble in ("not_admitted", "still_online")


def test_id_5_without_the_secret_nobody_becomes_the_coordinator(live, coordinator, tmp_path):
    wrong = tmp_path / "secret"
    wrong.write_bytes(b"\x00" * 32)
    link = server_superlink.Link(at(live, 4), coordinator.authority, wrong, tmp_path)
    with (
        pytest.raises(server_superlink.FlowerRefusedError, match="Authentication"),
        flower.connect(link),
    ):
        pass


# The alliance service.


@pytest.mark.parametrize("who", ["nobody", "another authority", "expired", "not yet"])
def test_a_certificate_that_is_none_opens_no_service(live, coordinator, east, tmp_path, who):
    own = Authority(
        x509.load_pem_x509_certificate(coordinator.authority.read_bytes()),
        load_node_key(coordinator.key("authority")),
    )
    now = datetime.now(UTC)
    signer, then = {
        "nobody": (None, now),
        "another authority": (
            Authority.make("Demo", ec.generate_private_key(ec.SECP384R1()), now),
            now,
        ),
        "expired": (own, now - timedelta(days=8)),
        "not yet": (own, now + timedelta(days=1)),
    }[who]
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_bytes(
        b"" if signer is None else pem(signer.for_site("East", request_of(east), then))
    )
    key.write_bytes(b"" if signer is None else east.key("tls").read_bytes())
    with (
        open_alliance(
            at(live, 1), ca=east.authority.read_bytes(), key=key, certificate=certificate
        ) as service,
        pytest.raises(AllianceError),
    ):
        service.studies()


def test_the_same_certificate_in_order_opens_it(live, east):
    with open_alliance(
        at(live, 1),
        ca=east.authority.read_bytes(),
        key=east.key("tls"),
        certificate=east.certificate,
    ) as service:
        service.studies()


# A member that lies.


CODES = {
    "too large": "too_large",
    "bomb": "malformed",
    "claims 2^40": "malformed",
    "another's signature": "no_answer",
    "nothing": "no_answer",
}


def lie_about(lie, got, identity, east, north):
    """Return the round that was asked, and the document and payload of a lie about it."""
    asked = Announcement.read(got.document, identity)
    key, site, payload = load_key(east.key("identity")), "East", b"junk"
    if lie == "bomb":
        payload = got.payload[:4] + b"\xff\xff\xff\xff" + got.payload[8:]
    elif lie == "claims 2^40":
        payload = got.payload.replace(b'"tensors":{', b'"tensors":{"a":[1099511627776],', 1)
    elif lie == "another's signature":
        key, site = load_key(north.key("identity")), "North"
    elif lie == "too large":
        payload = os.urandom(24 << 20)
    document = Update(
        alliance=asked.alliance,
        study=asked.study,
        round=asked.round,
        attempt=asked.attempt,
        site=site,
        announcement=digest_of(got.document),
        payload=digest_of(payload),
        ledger=None,
    ).signed(key)
    return asked.round, document, payload


def test_up_4_and_id_8_a_member_that_lies_in_every_round_stops_none(live, study, coordinator, east):
    """Each round another lie over the real way; each is recorded with its code, and none counts."""
    identity = [public_of(load_key(coordinator.key("identity")))]
    north, told, last = SiteHome(live.home_of("North") / "site"), {}, 0
    with connected(live, east) as fleet:
        for lie in CODES:
            while True:  # what it is asked again about an earlier round is of no interest
                got = receive(fleet)
                round, document, payload = lie_about(lie, got, identity, east, north)
                if round > last:
                    break
            if lie == "too large":  # may be refused by its size before all of it has come
                with contextlib.suppress(site_flower.FleetError):
                    fleet.reply(got, document, payload)
            elif lie != "nothing":
                fleet.reply(got, document, payload)
            told[lie], last = (round, digest_of(payload)), round
            live.wait_for(study, round, seconds=60)
    found: dict[str, str] = {}
    receipts: dict[tuple[int, str], list[str | None]] = {}
    with live.store() as store:
        records_kept = {one.round: one.document for one in store.rounds.records(study)}
        for one in store.updates.receipts("East", limit=10_000):
            receipt = Receipt.read(one.document, identity)
            receipts.setdefault((receipt.round, receipt.payload), []).append(receipt.code)
    for lie, (round, payload) in told.items():
        record = Record.read(records_kept[round], identity)
        assert {one.site for one in record.counted} == {"North", "South"}
        found[lie] = {one.site: one.code for one in record.absent}["East"]
        expected = {"bomb": "malformed", "claims 2^40": "malformed",
                    "another's signature": "not_signed"}.get(lie)  # fmt: skip
        assert receipts.get((round, payload)) == (None if expected is None else [expected])
    assert found == CODES


def test_up_8_no_pickle_no_marshal_and_no_exec_through_whole_rounds(live, study, hooked):
    """Both sides, our processes but the walled-off trainer, which gets frames and no objects."""
    armed, log = hooked
    begin = live.round_of(study)[0]
    armed.touch()
    try:
        live.wait_for(study, begin + 3, seconds=90)
    finally:
        armed.unlink()
    found = log.read_text("utf-8") if log.exists() else ""
    assert live.round_of(study)[0] >= begin + 3
    assert found == ""


def test_up_8_the_hook_sees_what_it_looks_for(hooked):
    """The test above can fail: the same hook reports each of the three."""
    armed, log = hooked
    armed.touch()
    code = (
        "import pickle, marshal, collections\n"
        "pickle.loads(pickle.dumps(collections.OrderedDict()))\n"
        "exec(marshal.loads(marshal.dumps(compile('1', 'x', 'exec'))))\n"
    )
    try:
        subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 - our interpreter
        found = log.read_text("utf-8")
    finally:
        armed.unlink()
        log.unlink(missing_ok=True)
    for event in ("pickle.find_class", "marshal.loads", "exec"):
        assert f" {event} " in found


# ID-1, at last: it ends a site.


def test_id_1_a_revoked_site_pulls_nothing_pushes_nothing_and_its_agent_ends(live, study):
    south = SiteHome(live.home_of("South") / "site")
    process = live._running["South"]
    live.coordinator("revoke", "South")
    assert process.wait(60) == 76
    live._running.pop("South")
    with pytest.raises(site_flower.FleetError) as caught, connected(live, south):
        pass
    assert caught.value.trouble in ("not_admitted", "still_online")
    with open_alliance(
        at(live, 1), ca=south.authority.read_bytes(), key=south.key("tls"),
        certificate=south.certificate,
    ) as service, pytest.raises(AllianceError) as refused:  # fmt: skip
        service.studies()
    assert refused.value.code == "revoked"
