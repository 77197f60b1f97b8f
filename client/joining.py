"""How a hospital comes into an alliance: a folder with keys, an invitation, a certificate.

Every key is made here and stays here. What leaves is public keys, a certificate request, and the
proof that the identity key is held. From then on the invitation's pins decide whom to believe.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from huizhen.client.alliance import Admission, open_door
from huizhen.client.home import POLICY, SETTINGS, Home
from huizhen.client.policy import default_policy
from huizhen.client.standing import Standing
from huizhen.protocol.documents import public_of
from huizhen.protocol.errors import ConfigError, ProtocolError
from huizhen.protocol.invitation import Invitation
from huizhen.protocol.statements import (
    Enrolment,
    Renewal,
    Rotation,
    digest_of,
    moment,
    stamp,
)
from huizhen.protocol.trust import Trust
from huizhen.storage.audit import AuditLog
from huizhen.storage.files import make_folder, write_whole
from huizhen.storage.keys import (
    fingerprint,
    load_key,
    load_node_key,
    load_tls_key,
    make_key,
    make_node_key,
    make_tls_key,
)

RENEW_BEFORE = timedelta(days=4)
# a certificate runs for 7 days: so three days of trouble are no trouble
_TEXT = """# How Huizhen runs at this hospital. What the hospital allows stands in policy.toml.

[coordinator]                # filled in by 'huizhen site join'
fleet = "{fleet}"
service = "{service}"
door = "{door}"

[network]
proxy = ""                   # http://HOST:PORT of a CONNECT proxy, where the way out leads over one
chunk_kib = 5120             # of an update; 512 for lines under half a megabit per second

[worker]
threads = 1
memory_mib = 1024            # bound on what a private step holds at a time

[records]
patient = "patient"          # the field that names the patient
"""


@dataclass(frozen=True, slots=True)
class Joined:
    """What joining gave."""

    trust: Trust
    until: datetime
    # the certificate's end; it renews itself


def init(home: Home, site: str) -> None:
    """Make a site's folder with its settings, its policy and its keys.

    Raises:
        ConfigError: there is a site already, or the name cannot be a site's.
        StorageError: it cannot be written.
    """
    if (home.folder / SETTINGS).exists():
        raise ConfigError(f"{str(home.folder)!r} holds a site already: choose another --home")
    policy = default_policy(site)
    try:
        make_folder(home.folder, mode=0o700)
        home.folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot make {str(home.folder)!r}: {error.strerror}") from error
    make_keys(home)
    write_whole(home.folder / POLICY, policy.encode())
    (home.folder / POLICY).chmod(0o600)
    write_whole(home.folder / SETTINGS, _TEXT.format(fleet="", service="", door="").encode())


def make_keys(home: Home) -> None:
    """Make the keys that are not there yet."""
    for name, make in (("identity", make_key), ("node", make_node_key), ("tls", make_tls_key)):
        if not home.key(name).exists():
            make(home.key(name))


def join(home: Home, invitation: Invitation, clock: Callable[[], datetime]) -> Joined:
    """Use an invitation; again is free while it is valid.

    Raises:
        ConfigError: the invitation is for another site, has expired, or the site is in another
            alliance.
        AllianceError: the coordinator cannot be reached, or refuses; ``waiting_for_board``: ask
            again when the board has signed.
        ProtocolError: what came back is not what the invitation pins.
    """
    policy, now = home.policy(), clock()
    if invitation.site != policy.site:
        raise ConfigError(
            f"invitation is for site {invitation.site!r}, policy.toml says {policy.site!r}"
        )
    if moment(invitation.expires) <= now:
        raise ConfigError(f"invitation expired {invitation.expires}: ask for another")
    _refuse_other(home, invitation)
    identity = load_key(home.key("identity"))
    node = load_node_key(home.key("node")).public_key()
    statement = Enrolment(
        alliance=invitation.pins.alliance,
        site=invitation.site,
        identity=public_of(identity).raw.hex(),
        node_key=node.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
        request=request_of(home),
        token=digest_of(invitation.token.encode()),
        issued=stamp(now),
    )
    with open_door(invitation.door, invitation.pins.authority.encode()) as door:
        admission = door.enrol(statement.signed(identity), invitation.token)
    trust = _check(admission, invitation, public_of(identity).raw.hex(), now)
    home.keep_pins(invitation.pins)
    for version, document in enumerate(admission.memberships, 1):
        home.keep_membership(version, document)
    until = keep_certificate(home, admission.certificate)
    if not home.audit.exists():
        _begin_log(home, invitation, clock)
    _write_addresses(home, invitation)
    return Joined(trust, until)


def renew(home: Home, clock: Callable[[], datetime]) -> datetime:
    """Fetch a new certificate and return its end.

    Raises:
        AllianceError: the coordinator cannot be reached, or refuses.
    """
    pins, settings = home.pins(), home.settings()
    statement = Renewal(
        alliance=pins.alliance,
        site=home.policy().site,
        request=request_of(home),
        issued=stamp(clock()),
    )
    with open_door(settings.coordinator.door, pins.authority.encode()) as door:
        admission = door.renew(statement.signed(load_key(home.key("identity"))))
    return keep_certificate(home, admission.certificate)


def rotate(home: Home, standing: Standing, clock: Callable[[], datetime]) -> str:
    """Replace the identity key, and return the new one's public half in hex.

    The new key lies beside the old one until the coordinator has taken the change; asked again
    after a crash, the same new key is offered again.

    Raises:
        AllianceError: the coordinator cannot be reached, or refuses.
    """
    place, draft = home.key("identity"), home.key("identity-new")
    old = load_key(place)
    new = load_key(draft) if draft.exists() else make_key(draft)
    statement = Rotation(
        alliance=standing.alliance,
        site=standing.site,
        old=public_of(old).raw.hex(),
        new=public_of(new).raw.hex(),
        issued=stamp(clock()),
    )
    standing.rotated(statement.signed(old, new), old=statement.old, new=statement.new)
    place.rename(home.key(f"identity-until-{clock():%Y%m%dT%H%M%SZ}"))
    draft.rename(place)
    return statement.new


def needs_renewal(home: Home, now: datetime) -> bool:
    """Whether the certificate ends soon, or has ended."""
    found = home.has_certificate()
    return found is None or found.not_valid_after_utc - now < RENEW_BEFORE


def request_of(home: Home) -> str:
    """Return a certificate request (PKCS #10) for the TLS key, PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "huizhen")])
    key = load_tls_key(home.key("tls"))
    made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return made.public_bytes(Encoding.PEM).decode()


def keep_certificate(home: Home, data: bytes) -> datetime:
    """Keep a certificate for the TLS key, and return its end.

    Raises:
        ProtocolError: it is none for this key.
    """
    try:
        found = x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise ProtocolError("the coordinator sent no certificate") from error
    if found.public_key() != load_tls_key(home.key("tls")).public_key():
        raise ProtocolError("the coordinator sent a certificate for another key")
    write_whole(home.certificate, data)
    return found.not_valid_after_utc


def _check(admission: Admission, invitation: Invitation, identity: str, now: datetime) -> Trust:
    """Return the trust that the memberships give, from the pinned board on."""
    if not admission.memberships:
        raise ProtocolError("the coordinator sent no membership")
    first, *later = admission.memberships
    trust = Trust.begin(
        first, alliance=invitation.pins.alliance, board=invitation.pins.board, now=now
    )
    for document in later:
        trust = trust.follow(document, now=now)
    if trust.member(invitation.site).identity != identity:
        raise ProtocolError("the membership names another key for this site")
    return trust


def _refuse_other(home: Home, invitation: Invitation) -> None:
    try:
        held = home.pins()
    except ConfigError:
        return
    if held != invitation.pins:
        raise ConfigError(
            f"this site is in alliance {held.alliance!r} with other pins: use another --home"
        )


def _begin_log(home: Home, invitation: Invitation, clock: Callable[[], datetime]) -> None:
    identity = public_of(load_key(home.key("identity")))
    authority = x509.load_pem_x509_certificate(invitation.pins.authority.encode())
    with AuditLog.create(
        home.audit, alliance=invitation.pins.alliance, log=invitation.site, clock=clock
    ) as log:
        for purpose, key in (
            ("identity", load_key(home.key("identity")).public_key()),
            ("node", load_node_key(home.key("node")).public_key()),
            ("tls", load_tls_key(home.key("tls")).public_key()),
        ):
            log.append("key_made", purpose=purpose, fingerprint=fingerprint(key))
        log.append(
            "alliance_joined",
            identity=identity.raw.hex(),
            authority=authority.fingerprint(hashes.SHA256()).hex(),
        )
        log.append("policy_changed", policy=home.policy().digest())


def _write_addresses(home: Home, invitation: Invitation) -> None:
    """Put the coordinator's addresses into site.toml, and leave all else there as it is."""
    place: Path = home.folder / SETTINGS
    lines, section = [], ""
    for line in place.read_text("utf-8").splitlines():
        if line.startswith("["):
            section = line.partition("]")[0][1:]
        name = line.partition("=")[0].strip()
        if section == "coordinator" and name in ("fleet", "service", "door"):
            line = f"{name} = {json.dumps(getattr(invitation, name))}"
        lines.append(line)
    write_whole(place, ("\n".join(lines) + "\n").encode())
