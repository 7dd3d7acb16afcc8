"""HTTPS: files that do not do are one sentence at the start, and those that do make TLS 1.2 or better."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.api import tls
from dwarfstar_engine.api.tls import client_context, server_tls
from dwarfstar_engine.errors import SettingsError
from support.api_keys import gate
from support.certificates import Files, self_signed
from support.fake_client import serve
from support.fake_engine import FakeEngine

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return self_signed(tmp_path_factory.mktemp("own"))


def refusal(certificate: Path, key: Path) -> str:
    with pytest.raises(SettingsError) as refused:
        server_tls(certificate, key, NOW)
    assert "\n" not in refused.value.message and "PRIVATE" not in refused.value.message
    return refused.value.message


def test_files_that_belong_together(own: Files) -> None:
    made = server_tls(own.certificate, own.key, NOW)
    assert made.context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert (made.certificate, made.notes) == (own.certificate, ())


def test_files_that_do_not(own: Files, tmp_path: Path) -> None:
    other = self_signed(tmp_path, "other")
    assert "is not the key of the first certificate" in refusal(own.certificate, other.key)
    # A chain in the wrong order: the server's own must come first.
    other.certificate.write_bytes(other.certificate.read_bytes() + own.certificate.read_bytes())
    assert "is not the key of the first certificate" in refusal(other.certificate, own.key)


def test_a_chain_may_follow_the_certificate(own: Files, tmp_path: Path) -> None:
    both = tmp_path / "both.crt"
    both.write_bytes(own.certificate.read_bytes() + self_signed(tmp_path, "other").certificate.read_bytes())
    server_tls(both, own.key, NOW)


def test_files_given_the_wrong_way_round(own: Files) -> None:
    assert "--tls-cert" in refusal(own.key, own.certificate) and "no certificate" in refusal(own.key, own.certificate)
    assert "no private key" in refusal(own.certificate, own.certificate)


def test_files_that_cannot_be_read(own: Files, tmp_path: Path) -> None:
    assert f"--tls-cert {tmp_path / 'no'} cannot be read (No such file" in refusal(tmp_path / "no", own.key)
    assert f"--tls-key {tmp_path} cannot be read" in refusal(own.certificate, tmp_path)
    large = tmp_path / "large"
    large.write_bytes(own.certificate.read_bytes() + b"\n" * tls.MAX_PEM_BYTES)
    assert "it is not a PEM file" in refusal(large, own.key)


def test_a_passphrase_is_not_asked_for(tmp_path: Path) -> None:
    files = self_signed(tmp_path, passphrase=b"secret words")
    assert "passphrase" in refusal(files.certificate, files.key)


def test_what_its_user_should_know(tmp_path: Path) -> None:
    for begins, told in ((NOW - timedelta(days=3), "ended at"), (NOW + timedelta(days=3), "begins at")):
        files = self_signed(tmp_path, begins=begins)
        (note,) = server_tls(files.certificate, files.key, NOW).notes
        assert told in note
    files = self_signed(tmp_path)
    files.key.chmod(0o644)
    (note,) = server_tls(files.certificate, files.key, NOW).notes
    assert "chmod 600" in note


@given(
    st.binary(max_size=300), st.sampled_from([b"%b", b"-----BEGIN CERTIFICATE-----\n%b\n-----END CERTIFICATE-----\n"])
)
def test_any_bytes_are_refused(
    own: Files, tmp_path_factory: pytest.TempPathFactory, content: bytes, form: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.pem"
    file.write_bytes(form % content)
    refusal(file, own.key)
    refusal(own.certificate, file)


async def test_https_with_a_key(own: Files, tmp_path: Path) -> None:
    context = server_tls(own.certificate, own.key, NOW).context
    trusting = ssl.create_default_context(cafile=own.certificate)
    async with serve(FakeEngine([b"x"]), tls=context, gate=gate("right")) as url:
        assert url.startswith("https://")
        for verify in (trusting, client_context(own.certificate)):
            async with httpx.AsyncClient(verify=verify, headers={"authorization": "Bearer right"}) as client:
                answer = await client.post(url + "/v1/completions", json={"prompt": "a"})
                assert answer.json()["choices"][0]["text"] == "x"
                assert (await client.get(url + "/v1/models", headers={"authorization": ""})).status_code == 401
        stranger = self_signed(tmp_path, "stranger")
        for verify in (ssl.create_default_context(), client_context(stranger.certificate)):
            async with httpx.AsyncClient(verify=verify) as client:
                with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
                    await client.get(url + "/health")


async def test_plain_http_and_nonsense_on_the_https_port_disturb_nobody(
    own: Files, caplog: pytest.LogCaptureFixture
) -> None:
    context = server_tls(own.certificate, own.key, NOW).context
    async with (
        serve(FakeEngine(), tls=context) as url,
        httpx.AsyncClient(verify=client_context(own.certificate)) as good,
    ):
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.TransportError):
                await client.get(url.replace("https:", "http:") + "/health")
        port = httpx.URL(url).port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port), timeout=5):  # says nothing at all
            assert (await good.get(url + "/health")).status_code == 200
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
