"""Who may take part: a cluster's own CA, a certificate per node, join tokens.

Theory. Each cluster has a CA (ECDSA P-256) kept by its coordinator. Every node has a key that never leaves it and a
certificate signed by the CA, good for serving and for calling. Peers trust exactly the holders of such certificates:
addresses do not matter, because every node certificate carries the DNS name ``dwarfstar`` (SERVER_NAME), which callers
expect instead of a host name. Which node it is stands in the common name.

A node joins with a token, ``ds1.<CA fingerprint>.<secret>``: the fingerprint lets the node know the cluster, the secret
lets the cluster know the node. Only the secret's hash is stored; the secret has 160 random bits, so a plain SHA-256 is
enough. Of a signing request only the public key is used: the CA chooses name, use and lifetime.

A node of another machine is named after its key (``k-`` and a hash of it), which is made at its first start and kept.
So a token lets a machine in, but never in the place of another: no list of ids is needed to keep them from being taken.

Invariants. A certificate for an id ``k-…`` is signed for the key of that name, or for the next key of a caller who
proved to hold a certificate of that id. Private keys are files of mode 0600 in folders of mode 0700, and refused
otherwise. Files appear whole or not at all; two processes that create the same one agree on the first. Time is an
argument, always aware of its zone.

Renewal. A certificate is renewed when RENEW_AT of its life is over, over a connection that the old one secures: its
holder gets another for the same id, and the same key or a new one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.wire.private_files import create_private, read_private, read_public, replace_file

SERVER_NAME = "dwarfstar"
CA_LIFETIME = timedelta(days=3650)  # renewing it means joining every node again
NODE_LIFETIME = timedelta(days=365)
RENEW_AT = 2 / 3  # of a certificate's life: a machine switched on a few times a year still renews in time
CLOCK_SKEW = timedelta(days=1)  # certificates begin this much earlier: clocks of machines at home are often wrong
MAX_PEM_BYTES = 16384  # ours have under 1500
SECRET_BYTES = 20
OWNER = "coordinator"  # id of the CA's holder, which alone may administer
KEY_ID = "k-"  # begins the ids that name a key
KEY_ID_CHARS = 24  # 120 bits of the key's hash
EXPIRED = "certificate_expired"
_PREFIX = "ds1"
_NODE_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?")  # a DNS label with room for "node-"


@dataclass(frozen=True, slots=True)
class Authority:
    """The cluster's CA: its certificate and private key, both PEM."""

    certificate_pem: bytes
    key_pem: bytes


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What a process shows its peers (key and certificate) and trusts in them (the CA's certificate), all PEM."""

    key_pem: bytes
    certificate_pem: bytes
    ca_pem: bytes


# --- authority -------------------------------------------------------------------------------------------------------


def create_authority(now: datetime) -> Authority:
    """A new CA, valid from ``now`` for CA_LIFETIME."""
    key = ec.generate_private_key(ec.SECP256R1())
    cluster = secrets.token_hex(4)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"DwarfStar cluster {cluster}")])
    certificate = (
        _builder(name, name, key.public_key(), now, CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def load_or_create_authority(folder: Path, now: datetime) -> Authority:
    """The CA in ``folder``/authority.pem, made if there is none. Raises TrustError."""
    path = folder / "authority.pem"  # key and certificate in one file: they cannot come from two creators
    if not path.exists():
        fresh = create_authority(now)
        create_private(path, fresh.key_pem + fresh.certificate_pem)
    key, mark, certificate = read_private(path, MAX_PEM_BYTES).partition(b"-----BEGIN CERTIFICATE-----")
    authority = Authority(mark + certificate, key)
    if _load_key(authority.key_pem).public_key() != load_certificate(authority.certificate_pem).public_key():
        raise TrustError(f"{path} holds a key and a certificate that do not belong together: restore it from a backup.")
    return authority


def sign_request(
    authority: Authority,
    csr_pem: bytes,
    node_id: str,
    now: datetime,
    lifetime: timedelta = NODE_LIFETIME,
    *,
    proven: bool = False,
) -> bytes:
    """A node certificate (PEM) for the public key of a signing request, whose other contents are ignored.

    proven: the caller holds a valid certificate of this id, and so may change its key. Raises TrustError if the
    request is not one, is not signed by its own key, the key is not on P-256, or the id names another key.
    """
    check_node_id(node_id)
    try:
        csr = x509.load_pem_x509_csr(csr_pem[:MAX_PEM_BYTES])
        valid, key = csr.is_signature_valid, csr.public_key()
    except (ValueError, TypeError, InvalidSignature) as error:
        raise TrustError(f"The signing request cannot be read ({error}): let the node make a new one.") from None
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError("The signing request is not signed by a P-256 key of its own: let the node make a new one.")
    if node_id.startswith(KEY_ID) and node_id != _key_id(key) and not proven:
        raise TrustError("The node id in the signing request names another key: let the node make a new one.")
    ca, ca_key = load_certificate(authority.certificate_pem), _load_key(authority.key_pem)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)])
    names: list[x509.GeneralName] = [
        x509.DNSName(SERVER_NAME),
        x509.DNSName(f"node-{node_id}.{SERVER_NAME}"),
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(subject, ca.subject, key, now, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


# --- nodes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """A node's identity on disk: ``node.key``, ``node.pem``, ``ca.pem`` in one folder."""

    folder: Path

    def request(self, node_id: str) -> bytes:
        """A signing request (PEM) for this node's key, which is made if there is none. Raises TrustError."""
        check_node_id(node_id)
        key = self._key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        return csr.public_bytes(serialization.Encoding.PEM)

    def key_id(self) -> str:
        """The node id that names this node's key, which is made if there is none. Raises TrustError."""
        return _key_id(self._key().public_key())

    def _key(self) -> ec.EllipticCurvePrivateKey:
        path = self.folder / "node.key"
        if not path.exists():
            create_private(path, _key_pem(ec.generate_private_key(ec.SECP256R1())))
        return _load_key(read_private(path, MAX_PEM_BYTES))

    def store(self, certificate_pem: bytes, ca_pem: bytes, now: datetime) -> NodeIdentity:
        """Keep what the CA answered, once it is found to be sound. Raises TrustError, and keeps what was there."""
        identity = NodeIdentity(read_private(self.folder / "node.key", MAX_PEM_BYTES), certificate_pem, ca_pem)
        check_identity(identity, now)
        replace_file(self.folder / "ca.pem", ca_pem)
        replace_file(self.folder / "node.pem", certificate_pem)
        return identity

    def load(self) -> NodeIdentity:
        """The identity as it lies on disk; ``check_identity`` says whether it is good. Raises TrustError."""
        return NodeIdentity(
            read_private(self.folder / "node.key", MAX_PEM_BYTES),
            read_public(self.folder / "node.pem", MAX_PEM_BYTES),
            read_public(self.folder / "ca.pem", MAX_PEM_BYTES),
        )

    def stamp(self) -> tuple[int, ...]:
        """Changes when the files are replaced. Never raises: what is not there has the stamp 0."""
        stamps = []
        for name in ("node.key", "node.pem", "ca.pem"):
            try:
                found = (self.folder / name).stat()
                stamps += [found.st_mtime_ns, found.st_ino]
            except OSError:
                stamps.append(0)
        return tuple(stamps)

    def exists(self) -> bool:
        """Whether this node has joined a cluster."""
        return (self.folder / "node.pem").exists()


def issue_local(
    authority: Authority, files: NodeFiles, node_id: str, now: datetime, lifetime: timedelta = NODE_LIFETIME
) -> NodeIdentity:
    """The identity of a node that shares the CA's machine: loaded if it is good for a while, else signed anew."""
    if files.exists():
        held = files.load()
        same = held.ca_pem == authority.certificate_pem and certificate_node_id(held.certificate_pem) == node_id
        if same and not renewal_due(held.certificate_pem, now):
            check_identity(held, now)
            return held
    certificate = sign_request(authority, files.request(node_id), node_id, now, lifetime)
    return files.store(certificate, authority.certificate_pem, now)


def check_identity(identity: NodeIdentity, now: datetime) -> None:
    """Raise TrustError unless key, certificate and CA belong together and are valid at ``now``."""
    certificate, ca = load_certificate(identity.certificate_pem), load_certificate(identity.ca_pem)
    if certificate.public_key() != _load_key(identity.key_pem).public_key():
        raise TrustError("This node's certificate is for another key: remove its trust folder and join again.")
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise TrustError("This node's certificate was not signed by its cluster's CA: join again.") from None
    for what, held in (("certificate", certificate), ("cluster's CA", ca)):
        begin, end = held.not_valid_before_utc, held.not_valid_after_utc
        if now < begin:
            raise TrustError(
                f"This node's {what} is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d} and the clock says "
                f"{now:%Y-%m-%d}: set the clock."
            )
        if now >= end:
            raise TrustError(
                f"This node's {what} ended at {end:%Y-%m-%d %H:%M} UTC: join again with a new token from "
                "`dwarfstar token` on the coordinator's machine, or set the clock if it is wrong.",
                code=EXPIRED,
            )


def renew_at(certificate_pem: bytes) -> datetime:
    """When a certificate is to be renewed: at RENEW_AT of its life, which began CLOCK_SKEW after its first date."""
    certificate = load_certificate(certificate_pem)
    signed, end = certificate.not_valid_before_utc + CLOCK_SKEW, certificate.not_valid_after_utc
    return signed + (end - signed) * RENEW_AT


def renewal_due(certificate_pem: bytes, now: datetime) -> bool:
    """Whether a certificate is to be renewed at ``now``, or has not begun."""
    return now >= renew_at(certificate_pem) or now < load_certificate(certificate_pem).not_valid_before_utc


def certificate_node_id(certificate_pem: bytes) -> str:
    """The node a certificate names. Raises TrustError if it names none."""
    names = load_certificate(certificate_pem).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return check_node_id(str(names[0].value) if len(names) == 1 else "")


def check_node_id(node_id: str) -> str:
    """``node_id`` itself: lower-case letters, digits and inner hyphens, at most 48. Raises TrustError if it is not."""
    if not _NODE_ID.fullmatch(node_id):
        raise TrustError(f"{node_id[:64]!r} is not a node id: use up to 48 lower-case letters, digits and hyphens.")
    return node_id


# --- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JoinToken:
    """fingerprint: SHA-256 of the CA's certificate (DER), 32 bytes. secret: SECRET_BYTES random bytes."""

    fingerprint: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"JoinToken({_base32(self.fingerprint)}, secret hidden)"

    def format(self) -> str:
        """The text that ``dwarfstar token`` prints; it is a secret."""
        return f"{_PREFIX}.{_base32(self.fingerprint)}.{_base32(self.secret)}"

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """The token a user pasted; case and surrounding space do not matter. Raises TrustError, without the secret."""
        parts = text.strip().lower().split(".")
        if len(parts) == 3 and parts[0] == _PREFIX:
            fingerprint, secret = (_from_base32(part) for part in parts[1:])
            if len(fingerprint) == hashlib.sha256().digest_size and len(secret) == SECRET_BYTES:
                return cls(fingerprint, secret)
        raise TrustError("This is not a join token: copy all of the line that `dwarfstar token` prints.")


def new_token(authority: Authority) -> JoinToken:
    """A token with a fresh secret. Store ``secret_hash`` of it, never the token."""
    return JoinToken(fingerprint(authority.certificate_pem), secrets.token_bytes(SECRET_BYTES))


def secret_hash(secret: bytes) -> str:
    """What to keep of a secret: its SHA-256, in hex."""
    return hashlib.sha256(secret).hexdigest()


def secret_matches(secret: bytes, hashed: str) -> bool:
    """Whether ``secret`` is the one of ``hashed``, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(secret_hash(secret).encode(), hashed.encode())


def check_fingerprint(token: JoinToken, ca_pem: bytes) -> None:
    """Raise TrustError unless ``ca_pem`` is the CA that the token names."""
    if not hmac.compare_digest(fingerprint(ca_pem), token.fingerprint):
        raise TrustError(
            "The cluster at this address is not the one the join token is for, or somebody is in between: "
            "check the address, or get a new token from the coordinator."
        )


def fingerprint(certificate_pem: bytes) -> bytes:
    """SHA-256 of a certificate's DER, 32 bytes."""
    return load_certificate(certificate_pem).fingerprint(hashes.SHA256())


# --- small parts -----------------------------------------------------------------------------------------------------


def utc_now() -> datetime:
    """The clock, for those at the edge who pass time on."""
    return datetime.now(UTC)


def load_certificate(pem: bytes) -> x509.Certificate:
    """The first certificate of a PEM text. Raises TrustError."""
    try:
        return x509.load_pem_x509_certificate(pem[:MAX_PEM_BYTES])
    except ValueError:
        raise TrustError("A certificate cannot be read: remove this node's trust folder and join again.") from None


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise TrustError("A private key cannot be read: remove this node's trust folder and join again.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError("A private key is not an elliptic one: remove this node's trust folder and join again.")
    return key


def _key_id(key: ec.EllipticCurvePublicKey) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return KEY_ID + _base32(hashlib.sha256(der).digest())[:KEY_ID_CHARS]


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _key_usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _from_base32(text: str) -> bytes:
    try:
        return base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except (ValueError, UnicodeError):
        return b""
