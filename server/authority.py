"""The alliance's certificate authority: who may speak over TLS, for a short time.

Certificates prove the ends of a connection and no more: what a site says counts by the signature of
its identity key. An authority signs for the coordinator's own names, and for sites that the
membership names; a site's key is made at the site, only its request (PKCS #10) comes here. X.509 as
in RFC 5280; a site's name is a URI among the subject's alternative names.
"""

import ipaddress
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from huizhen.protocol.errors import ProtocolError

CA_YEARS = 10
SERVER_DAYS = 90
SITE_DAYS = 7
_MARGIN = timedelta(minutes=10)  # a certificate is valid a little before it is made
_URI = "urn:huizhen:site:"


@dataclass(frozen=True, slots=True, repr=False)
class Authority:
    """The alliance's certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, alliance: str, key: ec.EllipticCurvePrivateKey, now: datetime) -> "Authority":
        """Return a new authority with this key; it signs end certificates only."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, alliance[:64])])
        made = (
            _builder(name, name, key.public_key(), now, timedelta(days=365 * CA_YEARS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA384())
        )
        return cls(made, key)

    def for_server(
        self, names: Sequence[str], public: ec.EllipticCurvePublicKey, now: datetime
    ) -> x509.Certificate:
        """Return a certificate for the coordinator's host names and addresses."""
        found: list[x509.GeneralName] = []
        for name in names:
            try:
                found.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                found.append(x509.DNSName(name))
        return self._sign(public, found, ExtendedKeyUsageOID.SERVER_AUTH, now, SERVER_DAYS)

    def for_site(self, site: str, request: str, now: datetime) -> x509.Certificate:
        """Return a certificate for a site's key.

        Args:
            site: its name in the membership.
            request: PKCS #10, PEM; only its public key is taken from it.
            now: the present time.

        Raises:
            ProtocolError: it is no request for a P-256 or P-384 key, signed by that key.
        """
        public = requested_key(request)
        name = x509.UniformResourceIdentifier(_URI + urllib.parse.quote(site, safe=""))
        return self._sign(public, [name], ExtendedKeyUsageOID.CLIENT_AUTH, now, SITE_DAYS)

    def _sign(
        self,
        public: ec.EllipticCurvePublicKey,
        names: Sequence[x509.GeneralName],
        purpose: x509.ObjectIdentifier,
        now: datetime,
        days: int,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "huizhen")])
        issuer = self.certificate.subject
        return (
            _builder(subject, issuer, public, now, timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA384())
        )


def requested_key(request: str) -> ec.EllipticCurvePublicKey:
    """Return the key for which a certificate is asked.

    Args:
        request: PKCS #10, PEM.

    Raises:
        ProtocolError: it is no request for a P-256 or P-384 key, signed by that key.
    """
    try:
        asked = x509.load_pem_x509_csr(request.encode())
        public = asked.public_key()
        is_signed = asked.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ProtocolError("certificate request is not PKCS #10, PEM") from error
    if not is_signed or not isinstance(public, ec.EllipticCurvePublicKey):
        raise ProtocolError("certificate request is not signed by a key on a NIST curve")
    if not isinstance(public.curve, ec.SECP256R1 | ec.SECP384R1):
        raise ProtocolError("certificate request is not for P-256 or P-384")
    return public


def site_of(certificate: bytes) -> str:
    """Return the site that a certificate of the authority names.

    Args:
        certificate: PEM; TLS has verified it.

    Raises:
        ProtocolError: it names none.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        [uri] = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise ProtocolError("certificate names no site") from error
    if not uri.startswith(_URI):
        raise ProtocolError("certificate names no site")
    return urllib.parse.unquote(uri.removeprefix(_URI))


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate in PEM."""
    return certificate.public_bytes(Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate in hex, for people to compare."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime,
    length: timedelta,
) -> x509.CertificateBuilder:
    now = now.astimezone(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _MARGIN)
        .not_valid_after(now + length)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
