"""TLS for the HTTP API: the certificate and key its user brings, checked before anything starts.

The files are PEM; the certificate's may hold a chain, the server's own first. TLS 1.2 or newer. Mistakes are found here
rather than by the first client: a key that belongs to another certificate, a passphrase that nobody is there to type.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from dwarfstar_engine.errors import SettingsError

MAX_PEM_BYTES = 256 << 10  # the longest chains in use have a tenth of it
OTHERS_READ = 0o004


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What the server is set up with. ``certificate``: the file. ``notes``: what its user should know, a line each."""

    context: ssl.SSLContext
    certificate: Path
    notes: tuple[str, ...]


def server_tls(certificate: Path, key: Path, now: datetime) -> ServerTls:
    """TLS with these two files. Raises SettingsError naming the option and the file at fault."""
    certificate, key = certificate.absolute(), key.absolute()
    own, secret = _first(certificate), _private_key(key)
    try:
        matches = own.public_key() == secret.public_key()
    except (ValueError, UnsupportedAlgorithm):
        matches = False
    if not matches:
        raise SettingsError(
            f"--tls-key {key} is not the key of the first certificate in --tls-cert {certificate}: give the two files "
            "that were made together"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password="")  # else OpenSSL asks the terminal
    except (ssl.SSLError, OSError) as error:  # a key too short for OpenSSL's security level, for instance
        reason = getattr(error, "reason", None) or error.strerror
        raise SettingsError(f"--tls-cert {certificate} cannot be used ({reason}): make a new one") from None
    return ServerTls(context, certificate, tuple(_notes(own, key, now)))


def client_context(certificate: Path) -> ssl.SSLContext:
    """For a client of an engine on this machine: trusts the first certificate of that file, whatever names it has.

    Raises SettingsError.
    """
    own = _first(certificate).public_bytes(serialization.Encoding.PEM).decode("ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # it is this very certificate or none
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the issuer of it counts for nothing
    context.load_verify_locations(cadata=own)
    return context


def _notes(certificate: x509.Certificate, key: Path, now: datetime) -> Iterator[str]:
    ends, begins = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    if now >= ends:
        yield f"the certificate of --tls-cert ended at {ends:%Y-%m-%d %H:%M} UTC, and clients will refuse it: renew it"
    elif now < begins:
        yield f"the certificate of --tls-cert begins at {begins:%Y-%m-%d %H:%M} UTC: is this machine's clock right?"
    if os.name == "posix" and key.stat().st_mode & OTHERS_READ:
        yield f"every user of this machine may read --tls-key {key}: run chmod 600 on it"


def _first(path: Path) -> x509.Certificate:
    """The first certificate of a file: the server's own; those of its issuers may follow."""
    try:
        return x509.load_pem_x509_certificates(_read(path, "--tls-cert"))[0]
    except ValueError:
        raise SettingsError(f"--tls-cert {path} is no certificate in PEM form: give the file that has one") from None


def _private_key(path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(_read(path, "--tls-key"), None)
    except TypeError:
        raise SettingsError(
            f"--tls-key {path} is protected by a passphrase, which nobody types when an engine starts: give a key "
            "without one"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"--tls-key {path} is no private key in PEM form: give the file that has one") from None


def _read(path: Path, option: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{option} {path} cannot be read ({error.strerror}): check its path and owner") from None
    if len(data) > MAX_PEM_BYTES:
        raise SettingsError(f"{option} {path} has more than {MAX_PEM_BYTES} bytes: it is not a PEM file")
    return data
