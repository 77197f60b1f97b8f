"""``huizhen coordinator doctor``: why a coordinator would not work, before it does not."""

import socket
import ssl
from collections.abc import Iterator
from datetime import timedelta

import httpx
from cryptography import x509

from huizhen.server.desk import Desk
from huizhen.storage.findings import Check, Finding, disk, run_checks

TIMEOUT_SECONDS = 5.0


def examine(desk: Desk) -> Iterator[Finding]:
    """Give what is found, one after the other; nothing is changed."""
    listen = desk.settings.listen
    checks: dict[str, Check] = {
        "keys": lambda: Finding("keys", "ok", "identity, authority and store open"),
        "members": lambda: _members(desk),
        "audit": lambda: _audit(desk),
        "disk": lambda: disk(desk.home.folder),
        "certificate": lambda: _certificate(desk),
        "names": lambda: _names(desk),
        "running": lambda: _running(listen.status),
        "edge": lambda: _edge(desk),
    }
    yield from run_checks(checks)


def _members(desk: Desk) -> Finding:
    trust = desk.registry.trust()
    return Finding(
        "members", "ok", f"membership {trust.membership.version}: {len(trust.active)} sites"
    )


def _audit(desk: Desk) -> Finding:
    head, seen = desk.audit.head(), desk.audit.witnessed()
    witnessed = "none of them is witnessed" if seen is None else f"{seen.head.size} are witnessed"
    return Finding("audit", "ok", f"{head.size} entries follow each other, {witnessed}")


def _certificate(desk: Desk) -> Finding:
    if not desk.home.certificate.exists():
        return Finding("certificate", "warning", "there is none yet", "huizhen coordinator up")
    found = x509.load_pem_x509_certificate(desk.home.certificate.read_bytes())
    left = found.not_valid_after_utc - desk.clock()
    text = f"the server's runs for {left.days} days"
    if left < timedelta(days=1):
        return Finding("certificate", "warning", text, "huizhen coordinator up makes a new one")
    return Finding("certificate", "ok", text)


def _names(desk: Desk) -> Finding:
    for name in desk.settings.public.names:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            return Finding(
                "names", "warning", f"{name!r} has no address here ({error.strerror})",
                "sites must be able to look it up: mend DNS, or [public] names",
            )  # fmt: skip
    return Finding("names", "ok", ", ".join(desk.settings.public.names))


def _running(status: str) -> Finding:
    try:
        found = httpx.get(f"http://{status}/health", timeout=TIMEOUT_SECONDS, trust_env=False)
    except httpx.TransportError:
        return Finding("running", "warning", "it does not run", "huizhen coordinator up")
    parts = found.json()["parts"]
    down = [name for name, is_up in parts.items() if not is_up]
    if down:
        return Finding("running", "failure", f"{', '.join(down)} is down", "look into run/*.log")
    return Finding("running", "ok", f"{', '.join(parts)} are up")


def _edge(desk: Desk) -> Finding:
    """Ask the public edge for what it must not give."""
    port = desk.settings.listen.fleet.rpartition(":")[2]
    context = ssl.create_default_context(cafile=str(desk.home.authority))
    try:
        found = httpx.get(
            f"https://127.0.0.1:{port}/v1/control/list-runs",
            verify=context, timeout=TIMEOUT_SECONDS, trust_env=False,
        )  # fmt: skip
    except httpx.TransportError:
        return Finding("edge", "warning", "it does not answer", "huizhen coordinator up")
    if found.status_code != httpx.codes.NOT_FOUND:
        return Finding(
            "edge", "failure", f"Flower's Control API answers {found.status_code} on port {port}",
            "stop the coordinator: anybody who reaches this port commands the alliance",
        )  # fmt: skip
    return Finding("edge", "ok", "Flower's Control API is not to be had through it")
