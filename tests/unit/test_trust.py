"""Certificates, keys on disk and join tokens, without a network."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.wire import trust
from dwarfstar_engine.wire.trust import JoinToken, NodeFiles, NodeIdentity

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
PEM = serialization.Encoding.PEM


@pytest.fixture(scope="module")
def authority() -> trust.Authority:
    return trust.create_authority(NOW)


@pytest.fixture
def node(authority: trust.Authority, tmp_path: Path) -> NodeIdentity:
    return trust.issue_local(authority, NodeFiles(tmp_path / "node"), "n1", NOW)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_authority_is_made_once_and_kept_private(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "trust"
    first = trust.load_or_create_authority(folder, NOW)
    assert trust.load_or_create_authority(folder, NOW) == first
    assert mode(folder / "authority.pem") == 0o600 and mode(folder) == 0o700
    assert [path.name for path in folder.iterdir()] == ["authority.pem"]  # no temporary file stays


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    trust.load_or_create_authority(tmp_path, NOW)
    (tmp_path / "authority.pem").chmod(0o640)
    with pytest.raises(TrustError, match="chmod 600"):
        trust.load_or_create_authority(tmp_path, NOW)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"-----BEGIN CERTIFICATE-----\nAAAA", b"x" * 100_000])
def test_a_damaged_authority_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "authority.pem"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(TrustError):
        trust.load_or_create_authority(tmp_path, NOW)


def test_a_key_with_another_certificate_is_refused(tmp_path: Path, authority: trust.Authority) -> None:
    path = tmp_path / "authority.pem"
    path.touch(0o600)
    path.write_bytes(trust.create_authority(NOW).key_pem + authority.certificate_pem)
    with pytest.raises(TrustError, match="belong together"):
        trust.load_or_create_authority(tmp_path, NOW)


def test_a_node_certificate_says_what_it_is_for(node: NodeIdentity) -> None:
    certificate = trust.load_certificate(node.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"dwarfstar", "node-n1.dwarfstar", "localhost"}
    assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1"}
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert trust.certificate_node_id(node.certificate_pem) == "n1"


def test_a_request_may_not_choose_its_rights(authority: trust.Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    wish = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("bank.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    signed = trust.sign_request(authority, wish.public_bytes(PEM), "n2", NOW)
    certificate = trust.load_certificate(signed)
    assert trust.certificate_node_id(signed) == "n2"
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert "bank.example" not in str(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def test_requests_that_prove_nothing_are_refused(authority: trust.Authority, tmp_path: Path) -> None:
    good = NodeFiles(tmp_path).request("n1")
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1  # in the signature
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(PEM)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n1")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    other_kind = builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256()).public_bytes(PEM)
    other_curve = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()).public_bytes(PEM)
    for bad in (b"", good[:100], forged, other_kind, other_curve):
        with pytest.raises(TrustError):
            trust.sign_request(authority, bad, "n1", NOW)
    trust.sign_request(authority, good, "n1", NOW)


@pytest.mark.parametrize("node_id", ["", "UPPER", "a b", "-a", "a-", "a.b", "x" * 49, "é", "a\n", "*"])
def test_node_ids_that_could_deceive_are_refused(node_id: str) -> None:
    with pytest.raises(TrustError):
        trust.check_node_id(node_id)


def test_the_local_identity_is_kept_until_it_nears_its_end(authority: trust.Authority, tmp_path: Path) -> None:
    files = NodeFiles(tmp_path)
    first = trust.issue_local(authority, files, "n1", NOW)
    assert trust.issue_local(authority, files, "n1", NOW + timedelta(days=200)) == first == files.load()
    later = trust.issue_local(authority, files, "n1", NOW + timedelta(days=300))
    assert later.key_pem == first.key_pem and later.certificate_pem != first.certificate_pem
    other = trust.issue_local(authority, files, "n2", NOW + timedelta(days=300))
    assert trust.certificate_node_id(other.certificate_pem) == "n2"
    assert mode(tmp_path / "node.key") == 0o600


def test_a_new_authority_means_a_new_certificate(authority: trust.Authority, tmp_path: Path) -> None:
    files = NodeFiles(tmp_path)
    trust.issue_local(authority, files, "n1", NOW)
    fresh = trust.create_authority(NOW)
    assert trust.issue_local(fresh, files, "n1", NOW).ca_pem == fresh.certificate_pem


def test_renewal_is_due_at_two_thirds_of_the_life_and_before_the_begin(node: NodeIdentity) -> None:
    due = NOW + trust.NODE_LIFETIME * 2 / 3
    assert abs(trust.renew_at(node.certificate_pem) - due) < timedelta(seconds=2)  # dates have whole seconds
    assert not trust.renewal_due(node.certificate_pem, NOW)
    assert not trust.renewal_due(node.certificate_pem, due - timedelta(seconds=2))
    assert trust.renewal_due(node.certificate_pem, due + timedelta(seconds=2))
    assert trust.renewal_due(node.certificate_pem, NOW - timedelta(days=30))


def test_a_short_life_is_divided_alike(authority: trust.Authority, tmp_path: Path) -> None:
    held = trust.issue_local(authority, NodeFiles(tmp_path), "n1", NOW, timedelta(seconds=30))
    assert not trust.renewal_due(held.certificate_pem, NOW + timedelta(seconds=19))
    assert trust.renewal_due(held.certificate_pem, NOW + timedelta(seconds=21))


def test_a_holder_may_change_its_key_and_nobody_else(authority: trust.Authority, tmp_path: Path) -> None:
    name = NodeFiles(tmp_path / "old").key_id()
    fresh = NodeFiles(tmp_path / "new").request(name)
    with pytest.raises(TrustError, match="another key"):
        trust.sign_request(authority, fresh, name, NOW)
    assert trust.certificate_node_id(trust.sign_request(authority, fresh, name, NOW, proven=True)) == name


def test_identities_that_do_not_hold_together_are_refused(authority: trust.Authority, node: NodeIdentity) -> None:
    trust.check_identity(node, NOW)
    other_ca, other_key = trust.create_authority(NOW), trust.create_authority(NOW).key_pem
    for bad in (
        NodeIdentity(other_key, node.certificate_pem, node.ca_pem),
        NodeIdentity(node.key_pem, node.certificate_pem, other_ca.certificate_pem),
        NodeIdentity(node.key_pem, node.certificate_pem, b""),
    ):
        with pytest.raises(TrustError):
            trust.check_identity(bad, NOW)


def test_a_certificate_out_of_its_time_is_refused_with_the_dates(node: NodeIdentity) -> None:
    trust.check_identity(node, NOW - timedelta(hours=23))  # a clock that is behind
    with pytest.raises(TrustError, match=r"2026-11-20 to 2027-11-21.*set the clock\.$"):
        trust.check_identity(node, NOW - timedelta(days=2))
    with pytest.raises(TrustError, match=r"ended at 2027-11-21 12:00 UTC: join again with a new token") as refused:
        trust.check_identity(node, NOW + trust.NODE_LIFETIME)
    assert refused.value.code == trust.EXPIRED


def test_a_bad_answer_does_not_replace_what_is_there(authority: trust.Authority, tmp_path: Path) -> None:
    files = NodeFiles(tmp_path)
    held = trust.issue_local(authority, files, "n1", NOW)
    stranger = trust.issue_local(authority, NodeFiles(tmp_path / "other"), "n2", NOW)
    with pytest.raises(TrustError):
        files.store(stranger.certificate_pem, authority.certificate_pem, NOW)
    assert files.load() == held


def test_files_that_are_missing_or_no_files_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"node\.key"):
        NodeFiles(tmp_path).load()
    (tmp_path / "node.key").mkdir()
    with pytest.raises(TrustError):
        NodeFiles(tmp_path).request("n1")


def test_a_second_creator_takes_the_first_ones_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes find no authority at the same moment: both must end with the same one."""
    first = trust.load_or_create_authority(tmp_path, NOW)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert trust.load_or_create_authority(tmp_path, NOW) == first


def test_tokens_survive_pasting(authority: trust.Authority) -> None:
    token = trust.new_token(authority)
    text = token.format()
    assert text.startswith("ds1.") and JoinToken.parse(text) == token == JoinToken.parse(f" {text.upper()}\n")
    assert trust.new_token(authority).secret != token.secret


def test_what_is_no_token_is_refused_without_repeating_it(authority: trust.Authority) -> None:
    text = trust.new_token(authority).format()
    prefix, fingerprint, secret = text.split(".")
    bad = [
        "",
        "ds1",
        "ds1..",
        text[:-1],
        text + "a" * 8,
        f"ds2.{fingerprint}.{secret}",
        f"{prefix}.{secret}.{fingerprint}",
    ]
    bad += [f"{prefix}.{fingerprint}.{secret[:-1]}1", f"{prefix}.{fingerprint}.{secret[:-1]}é"]
    for wrong in bad:
        with pytest.raises(TrustError) as refused:
            JoinToken.parse(wrong)
        assert secret[:8] not in refused.value.message


def test_only_the_hash_of_a_secret_is_needed_to_know_it(authority: trust.Authority) -> None:
    token = trust.new_token(authority)
    stored = trust.secret_hash(token.secret)
    assert token.secret.hex() not in stored and token.format().split(".")[2] not in repr(token)
    assert trust.secret_matches(token.secret, stored)
    assert not trust.secret_matches(os.urandom(20), stored) and not trust.secret_matches(token.secret, "")


def test_a_token_names_one_cluster(authority: trust.Authority) -> None:
    token = trust.new_token(authority)
    trust.check_fingerprint(token, authority.certificate_pem)
    with pytest.raises(TrustError, match="in between"):
        trust.check_fingerprint(token, trust.create_authority(NOW).certificate_pem)
