"""A certificate says what the authority was asked for, and never what the request says."""

import datetime as dt
import ipaddress

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from huizhen.protocol.errors import ProtocolError
from huizhen.server.authority import SERVER_DAYS, SITE_DAYS, Authority, fingerprint, pem, site_of

NOW = dt.datetime(2026, 3, 1, 9, tzinfo=dt.UTC)
KEY = ec.generate_private_key(ec.SECP256R1())
BUILDER = x509.CertificateSigningRequestBuilder()


@pytest.fixture(scope="module")
def authority():
    return Authority.make("罕见病 rare", ec.generate_private_key(ec.SECP384R1()), NOW)


def request(key=KEY, name="huizhen", extensions=(), digest=None):
    made = BUILDER.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
    for one, is_critical in extensions:
        made = made.add_extension(one, critical=is_critical)
    signed = made.sign(key, digest or hashes.SHA256())
    return signed.public_bytes(Encoding.PEM).decode()


def ends_of(certificate):
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind)


def test_a_site_s_certificate_names_the_member_for_seven_days(authority):
    made = authority.for_site("北京/North 1", request(), NOW)
    assert site_of(pem(made)) == "北京/North 1"
    assert made.public_key() == KEY.public_key()
    begin, end = ends_of(made)
    assert begin == NOW - dt.timedelta(minutes=10)
    assert end == NOW + dt.timedelta(days=SITE_DAYS)
    [purpose] = extension(made, x509.ExtendedKeyUsage).value
    assert purpose == ExtendedKeyUsageOID.CLIENT_AUTH
    made.verify_directly_issued_by(authority.certificate)


def test_the_coordinator_s_certificate_has_its_names_and_is_no_client_s(authority):
    made = authority.for_server(["fl.example", "10.0.0.1", "::1"], KEY.public_key(), NOW)
    names = extension(made, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example"]
    found = names.get_values_for_type(x509.IPAddress)
    assert found == [ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("::1")]
    [purpose] = extension(made, x509.ExtendedKeyUsage).value
    assert purpose == ExtendedKeyUsageOID.SERVER_AUTH
    assert ends_of(made)[1] == NOW + dt.timedelta(days=SERVER_DAYS)
    with pytest.raises(ProtocolError, match="names no site"):
        site_of(pem(made))  # it passes for no member at the alliance service


def test_no_certificate_but_the_authority_s_own_signs_others(authority):
    own = extension(authority.certificate, x509.BasicConstraints)
    assert own.critical
    assert (own.value.ca, own.value.path_length) == (True, 0)
    assert not extension(authority.certificate, x509.KeyUsage).value.digital_signature
    for made in (
        authority.for_site("North", request(), NOW),
        authority.for_server(["x"], KEY.public_key(), NOW),
    ):
        basic, usage = extension(made, x509.BasicConstraints), extension(made, x509.KeyUsage)
        assert basic.critical
        assert usage.critical
        assert not basic.value.ca
        assert not usage.value.key_cert_sign
        assert usage.value.digital_signature


def test_serial_numbers_are_drawn_anew(authority):
    made = [authority.for_site("North", request(), NOW) for _ in range(3)]
    assert len({one.serial_number for one in made}) == 3
    assert len({fingerprint(one) for one in made}) == 3


def test_an_authority_does_not_sign_for_another(authority):
    other = Authority.make("罕见病 rare", ec.generate_private_key(ec.SECP384R1()), NOW)
    with pytest.raises(InvalidSignature):
        other.for_site("North", request(), NOW).verify_directly_issued_by(authority.certificate)


def test_only_the_key_is_taken_from_a_request(authority):
    """Another site's name, the powers of an authority, other purposes: all of it is left out."""
    wishes = [
        (x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:huizhen:site:South"),
                                      x509.DNSName("fl.example")]), True),
        (x509.BasicConstraints(ca=True, path_length=None), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), True),
        (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True),
    ]  # fmt: skip
    plain = authority.for_site("North", request(), NOW)
    made = authority.for_site("North", request(name="South", extensions=wishes), NOW)
    assert site_of(pem(made)) == "North"
    assert made.subject == plain.subject
    assert [one.value for one in made.extensions] == [one.value for one in plain.extensions]


def other_curve():
    """A request whose curve has a number that nobody knows."""
    der = x509.load_pem_x509_csr(request().encode()).public_bytes(Encoding.DER)
    known = bytes.fromhex("06082a8648ce3d030107")  # P-256, X9.62
    assert der.count(known) == 1
    return as_pem(der.replace(known, known[:-1] + b"\x7f"))


def as_pem(der):
    import base64

    text = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"


def with_another_key():
    """A request with the key of somebody else, who has not signed it."""
    der = x509.load_pem_x509_csr(request().encode()).public_bytes(Encoding.DER)
    stolen = ec.generate_private_key(ec.SECP256R1()).public_key()

    def raw(key):
        from cryptography.hazmat.primitives.serialization import PublicFormat

        return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    return as_pem(der.replace(raw(KEY.public_key()), raw(stolen)))


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: "", "not PKCS #10"),
        (lambda: "-----BEGIN CERTIFICATE REQUEST-----\n!\n", "not PKCS #10"),
        (lambda: as_pem(b"\x30\x03\x02\x01\x00"), "not PKCS #10"),
        (lambda: request() [:-40] + "-----END CERTIFICATE REQUEST-----\n", "not PKCS #10"),
        (other_curve, "certificate request"),
        (with_another_key, "not signed by a key"),
        (lambda: request(rsa.generate_private_key(65537, 2048)), "on a NIST curve"),
        (lambda: BUILDER.subject_name(x509.Name([])).sign(Ed25519PrivateKey.generate(), None)
         .public_bytes(Encoding.PEM).decode(), "on a NIST curve"),
        (lambda: request(ec.generate_private_key(ec.SECP521R1())), "not for P-256 or P-384"),
        (lambda: request(ec.generate_private_key(ec.SECP256K1())), "not for P-256 or P-384"),
    ],
    ids=["empty", "no base64", "other DER", "cut off", "unknown curve", "another's key", "RSA",
         "Ed25519", "P-521", "secp256k1"],
)  # fmt: skip
def test_a_request_that_is_no_proof_of_a_key_is_refused(authority, made, match):
    with pytest.raises(ProtocolError, match=match):
        authority.for_site("North", made(), NOW)


def test_a_certificate_is_no_request(authority):
    with pytest.raises(ProtocolError, match="not PKCS #10"):
        authority.for_site("North", pem(authority.certificate).decode(), NOW)


def test_a_certificate_without_one_site_s_name_is_nobody_s(authority):
    with pytest.raises(ProtocolError, match="names no site"):
        site_of(pem(authority.certificate))
    with pytest.raises(ProtocolError, match="names no site"):
        site_of(b"nothing")


def test_id_6_the_authority_s_repr_shows_no_key(authority):
    assert "EllipticCurvePrivateKey" not in repr(authority)
    assert repr(authority).startswith("<")
