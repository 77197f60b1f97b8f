"""``huizhen site doctor``: why a hospital's agent would not work, before it does not.

Everything that needs the network goes the way that the agent goes: the same proxy, the same pinned
authority, the same certificate.
"""

import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from huizhen.client.alliance import open_alliance
from huizhen.client.home import Home
from huizhen.client.ledger import Ledger
from huizhen.client.sandbox import LEVELS, probe
from huizhen.learning.bases import cache_folder, resolve
from huizhen.learning.catalogue import entry
from huizhen.protocol.documents import claimed
from huizhen.protocol.statements import moment, stamp
from huizhen.storage.audit import AuditLog
from huizhen.storage.findings import Check, Finding, disk, run_checks
from huizhen.storage.keys import load_key, load_node_key, load_tls_key

FAST_LIMIT = timedelta(seconds=4)
# Flower refuses a node whose clock is 5 s fast
SLOW_LIMIT = timedelta(seconds=240)
# and one whose clock is 305 s slow
TIMEOUT_SECONDS = 10.0

_TODOS = {
    "keys": "chmod 600 on the keys that are here; for one that is lost, join anew",
    "policy": "mend policy.toml, or restore it",
    "sandbox": "mend policy.toml, or restore it",
    "disk": "mount the disk of the site's folder",
    "audit": "stop the agent, keep everything, and look who changed the log",
    "ledgers": "huizhen site ledger create makes a missing one; else restore the newest copy",
    "bases": "huizhen models fetch the base again",
    "proxy": "mend [network] proxy in site.toml, or the proxy",
    "certificate": "huizhen site join INVITATION",
    "clock": "see to the connection to the service first, then look again",
}
# where a check cannot be made


def examine(home: Home, clock: Callable[[], datetime]) -> Iterator[Finding]:
    """Give what is found, one after the other; nothing is changed."""
    settings = home.settings()
    terms = settings.coordinator
    todos = dict(_TODOS)
    checks: dict[str, Check] = {
        "keys": lambda: _keys(home),
        "policy": lambda: _policy(home),
        "sandbox": lambda: _sandbox(home),
        "disk": lambda: disk(home.folder),
        "audit": lambda: _audit(home),
        "ledgers": lambda: _ledgers(home),
        "bases": lambda: check_bases(home),
    }
    if settings.network.proxy:
        checks["proxy"] = lambda: _proxy(settings.network.proxy)
    for name, address in (
        ("fleet", terms.fleet),
        ("service", terms.service),
        ("door", terms.door),
    ):
        if address:
            checks[f"dns {name}"] = lambda n=name, a=address: _dns(n, a, settings.network.proxy)  # type: ignore[misc]
            checks[f"tls {name}"] = lambda n=name, a=address: _tls(  # type: ignore[misc]
                n, a, home, settings.network.proxy
            )
    checks["certificate"] = lambda: _certificate(home, clock())
    checks["clock"] = lambda: _clock(home, clock)
    for name in ("fleet", "service", "door"):
        todos[f"tls {name}"] = "restore alliance/ and keys/, or join anew"
    yield from run_checks(checks, todos)


def _keys(home: Home) -> Finding:
    load_key(home.key("identity"))
    load_node_key(home.key("node"))
    load_tls_key(home.key("tls"))
    return Finding("keys", "ok", "three keys are here, for their owner alone")


def _policy(home: Home) -> Finding:
    policy = home.policy()
    open_cohorts = [name for name, one in policy.cohorts.items() if one.epsilon is not None]
    if not open_cohorts:
        return Finding(
            "policy", "warning", "no cohort has an epsilon, every private study is refused",
            "write an epsilon for a cohort into policy.toml",
        )  # fmt: skip
    missing = [n for n in policy.cohorts if not policy.data_file(home.folder, n).exists()]
    if missing:
        place = policy.data_file(home.folder, missing[0])
        return Finding("policy", "failure", f"{str(place)!r} is not there", "export the records")
    return Finding("policy", "ok", f"cohorts {', '.join(policy.cohorts)}")


def _sandbox(home: Home) -> Finding:
    walls, least = probe(), home.policy().sandbox.require
    if LEVELS.index(walls.level) > LEVELS.index(least):
        return Finding(
            "sandbox", "failure", f"walls are {walls.level!r}, policy.toml requires {least!r}",
            "install bubblewrap, and allow user namespaces",
        )  # fmt: skip
    if walls.level != "full":
        return Finding("sandbox", "warning", walls.sentence, "install bubblewrap")
    return Finding("sandbox", "ok", walls.sentence)


def _audit(home: Home) -> Finding:
    if not home.audit.exists():
        return Finding("audit", "warning", "there is no log yet", "join an alliance")
    with AuditLog.open(home.audit) as log:
        head, seen = log.head(), log.witnessed()
    witnessed = "none of them is witnessed" if seen is None else f"{seen.head.size} are witnessed"
    return Finding("audit", "ok", f"{head.size} entries follow each other, {witnessed}")


def _ledgers(home: Home) -> Finding:
    policy, found = home.policy(), []
    for cohort, terms in policy.cohorts.items():
        if terms.unit == "none":
            continue
        with Ledger.open(policy.ledger_file(home.folder, cohort)) as ledger:
            totals = ledger.totals()
        found.append(f"{cohort}: epsilon {totals.epsilon_left:.3g} left of {totals.cap.epsilon:g}")
    return Finding("ledgers", "ok", "; ".join(found) or "no cohort needs one")


def check_bases(home: Home) -> Finding:
    """Compare the base models of approved studies with what is on this disk; fetch none."""
    folder = home.settings().worker.bases
    place = Path(folder) if folder else home.folder.parent
    found = []
    for study in home.studies():
        data = study.offer_bytes()
        if study.approval() is None or data is None:
            continue
        base = claimed(data)["study"].get("base")
        if base is None:
            continue
        is_folder, todo = Path(base["name"]).is_absolute(), f"huizhen models fetch {base['name']}"
        if not is_folder and not cache_folder(entry(base["name"]), place).is_dir():
            return Finding(
                "bases", "failure",
                f"base {base['name']!r} of study {study.digest[:12]} is not here", todo,
            )  # fmt: skip
        here = resolve(base["name"], home=place).digests
        for name, digest in base["digests"].items():
            if here.get(name) != digest:
                return Finding(
                    "bases", "failure", f"file {name!r} of base {base['name']!r} differs from "
                    f"study {study.digest[:12]}", todo,
                )  # fmt: skip
        found.append(base["name"])
    return Finding("bases", "ok", f"checked: {', '.join(sorted(set(found))) or 'none is needed'}")


def _proxy(proxy: str) -> Finding:
    parts = urlsplit(proxy)
    with socket.create_connection((parts.hostname or "", parts.port or 3128), TIMEOUT_SECONDS):
        return Finding("proxy", "ok", f"{proxy} takes connections")


def _dns(name: str, address: str, proxy: str) -> Finding:
    host = address.rpartition(":")[0].strip("[]")
    if proxy:
        return Finding(f"dns {name}", "ok", f"{host} is looked up by the proxy")
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        return Finding(
            f"dns {name}", "failure", f"{host!r} has no address ({error.strerror})",
            "mend DNS, or write an address into site.toml",
        )  # fmt: skip
    return Finding(f"dns {name}", "ok", f"{host} is {found[0][4][0]}")


def _tls(name: str, address: str, home: Home, proxy: str) -> Finding:
    """Shake hands, trusting the pinned authority alone."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cafile=str(home.authority))
    if name == "service" and home.certificate.exists():
        context.load_cert_chain(home.certificate, home.key("tls"))
    try:
        with (
            _connect(host, int(port), proxy) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            version = tls.version()
    except ssl.SSLCertVerificationError as error:
        return Finding(
            f"tls {name}", "failure", f"{address} does not prove to be the coordinator "
            f"({error.verify_message})",
            "look for a proxy that opens TLS, or ask the coordinator for its fingerprint",
        )  # fmt: skip
    except OSError as error:
        return Finding(
            f"tls {name}", "failure", f"{address} cannot be reached ({error.strerror or error})",
            "open the way out to this port in the firewall",
        )  # fmt: skip
    return Finding(f"tls {name}", "ok", f"{address} proves to be the coordinator, {version}")


def _connect(host: str, port: int, proxy: str) -> socket.socket:
    """Return a connection, through a CONNECT proxy where there is one."""
    if not proxy:
        return socket.create_connection((host, port), TIMEOUT_SECONDS)
    parts = urlsplit(proxy)
    raw = socket.create_connection((parts.hostname or "", parts.port or 3128), TIMEOUT_SECONDS)
    raw.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < 65_536:
        part = raw.recv(4096)
        if not part:
            break
        answer += part
    if b" 200 " not in answer.split(b"\r\n", 1)[0]:
        raw.close()
        raise OSError(None, f"the proxy answers {answer[:60]!r}")
    return raw


def _certificate(home: Home, now: datetime) -> Finding:
    found = home.has_certificate()
    if found is None:
        return Finding("certificate", "failure", "there is none", "huizhen site join INVITATION")
    left = found.not_valid_after_utc - now
    text = f"it ends {stamp(found.not_valid_after_utc)}"
    if left <= timedelta(0):
        return Finding("certificate", "warning", text, "start the agent: it fetches a new one")
    return Finding("certificate", "ok", f"{text}; the agent renews it")


def _clock(home: Home, clock: Callable[[], datetime]) -> Finding:
    terms = home.settings().coordinator
    with open_alliance(
        terms.service,
        ca=home.authority.read_bytes(),
        key=home.key("tls"),
        certificate=home.certificate,
    ) as alliance:
        notice = alliance.report(
            version="",
            codes=[],
            time=stamp(clock()),
            studies=[],  # nothing is kept of it
        )
    skew = clock() - moment(notice.time)
    text = f"{skew.total_seconds():+.0f} s from the coordinator's"
    if skew > FAST_LIMIT or -skew > SLOW_LIMIT:
        return Finding("clock", "failure", text, "start a time service (chrony, ntpd) here")
    return Finding("clock", "ok", text)
