"""Connections on loopback: who gets in, who does not, and that a secret goes only to the right cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from dwarfstar_engine.errors import PeerError, TrustError
from dwarfstar_engine.wire import channel, enrol, trust
from dwarfstar_engine.wire.generated import control_pb2, control_pb2_grpc
from dwarfstar_engine.wire.trust import Authority, JoinToken, NodeFiles, NodeIdentity

NOW = trust.utc_now()  # TLS looks at the real clock
METHOD = "/dwarfstar.v1.Test/Who"
LIMIT = 4096


@pytest.fixture(scope="module")
def authority() -> Authority:
    return trust.create_authority(NOW)


def identity(authority: Authority, folder: Path, node_id: str) -> NodeIdentity:
    return trust.issue_local(authority, NodeFiles(folder / node_id), node_id, NOW)


async def _who(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return channel.peer_node_id(context).encode() + b" " + request


@asynccontextmanager
async def serving(server_identity: NodeIdentity, mutual: bool = True) -> AsyncIterator[str]:
    """A server that tells callers who they are; yields its address."""
    server = grpc.aio.server(options=channel.server_options(LIMIT))
    who: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(_who)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("dwarfstar.v1.Test", {"Who": who}),))
    make = channel.server_credentials if mutual else channel.enrolment_credentials
    port = server.add_secure_port("127.0.0.1:0", make(server_identity))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def ask(address: str, credentials: grpc.ChannelCredentials, size: int = 3) -> bytes:
    async with channel.open_channel(address, credentials, 4 * LIMIT) as opened:
        who: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary(METHOD)
        return await who(b"x" * size, timeout=10)


async def test_nodes_of_a_cluster_know_each_other(authority: Authority, tmp_path: Path) -> None:
    async with serving(identity(authority, tmp_path, "a")) as address:
        caller = channel.channel_credentials(identity(authority, tmp_path, "b-2"))
        assert await ask(address, caller) == b"b-2 xxx"
        assert await ask(address.replace("127.0.0.1", "localhost"), caller) == b"b-2 xxx"
        assert await ask(address, channel.channel_credentials(NodeFiles(tmp_path / "b-2"))) == b"b-2 xxx"


async def test_strangers_are_not_served_and_not_trusted(authority: Authority, tmp_path: Path) -> None:
    stranger = identity(trust.create_authority(NOW), tmp_path / "other", "b")
    member = identity(authority, tmp_path, "a")
    no_certificate = grpc.ssl_channel_credentials(authority.certificate_pem)
    claims = NodeIdentity(stranger.key_pem, stranger.certificate_pem, authority.certificate_pem)
    async with serving(member) as address:
        for caller in (no_certificate, channel.channel_credentials(claims), channel.channel_credentials(stranger)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(address, caller)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    async with serving(stranger) as address:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(address, channel.channel_credentials(member))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_plaintext_is_not_served(authority: Authority, tmp_path: Path) -> None:
    async with serving(identity(authority, tmp_path, "a")) as address, grpc.aio.insecure_channel(address) as plain:
        who: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = plain.unary_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await who(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_message_over_the_limit_is_refused(authority: Authority, tmp_path: Path) -> None:
    async with serving(identity(authority, tmp_path, "a")) as address:
        caller = channel.channel_credentials(identity(authority, tmp_path, "b"))
        assert await ask(address, caller, LIMIT - 100)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(address, caller, LIMIT + 1)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_caller_without_a_certificate_has_no_node_id(authority: Authority, tmp_path: Path) -> None:
    async with serving(identity(authority, tmp_path, "a"), mutual=False) as address:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(address, grpc.ssl_channel_credentials(authority.certificate_pem))
        assert "shows no node certificate" in str(refused.value.details())


@asynccontextmanager
async def enrolling(
    shown: Authority, signed_by: NodeIdentity, secret: bytes
) -> AsyncIterator[tuple[str, list[tuple[bytes, str]]]]:
    """A cluster to join: its address, and the (secret, node) of each who tried."""
    seen: list[tuple[bytes, str]] = []
    hashed = trust.secret_hash(secret)

    def admit(given: bytes, node_id: str, name: str) -> None:
        seen.append((given, node_id))
        if not trust.secret_matches(given, hashed):
            raise TrustError("the token is not known here")

    server = grpc.aio.server(options=channel.CONTROL_SERVER_OPTIONS)
    control_pb2_grpc.add_EnrolmentServicer_to_server(enrol.Enrolment(shown, admit, ":77", trust.utc_now), server)
    port = server.add_secure_port("127.0.0.1:0", channel.enrolment_credentials(signed_by))
    await server.start()
    try:
        yield f"127.0.0.1:{port}", seen
    finally:
        await server.stop(None)


async def test_a_node_joins_with_a_token_and_is_then_a_member(authority: Authority, tmp_path: Path) -> None:
    token = trust.new_token(authority)
    own = identity(authority, tmp_path, "a")
    files = NodeFiles(tmp_path / "new")
    async with enrolling(authority, own, token.secret) as (address, seen):
        attach = await enrol.join(address, JoinToken.parse(token.format()), "n9", "laptop", files, NOW)
    assert attach == "127.0.0.1:77" and seen == [(token.secret, "n9")]
    async with serving(own) as address:
        assert await ask(address, channel.channel_credentials(files)) == b"n9 xxx"


async def test_a_wrong_secret_is_refused_and_nothing_is_kept(authority: Authority, tmp_path: Path) -> None:
    files = NodeFiles(tmp_path / "new")
    async with enrolling(authority, identity(authority, tmp_path, "a"), bytes(20)) as (address, _):
        with pytest.raises(TrustError, match="not known here"):
            await enrol.join(address, trust.new_token(authority), "n9", "laptop", files, NOW)
    assert not files.exists()


async def test_another_cluster_never_sees_the_secret(authority: Authority, tmp_path: Path) -> None:
    other = trust.create_authority(NOW)
    token = trust.new_token(authority)
    async with enrolling(other, identity(other, tmp_path, "a"), token.secret) as (address, seen):
        with pytest.raises(TrustError, match="in between"):
            await enrol.join(address, token, "n9", "laptop", NodeFiles(tmp_path / "new"), NOW)
    assert seen == []


async def test_an_impostor_that_repeats_the_true_ca_never_sees_the_secret(authority: Authority, tmp_path: Path) -> None:
    token = trust.new_token(authority)
    impostor = identity(trust.create_authority(NOW), tmp_path, "a")
    async with enrolling(authority, impostor, token.secret) as (address, seen):
        with pytest.raises(PeerError):
            await enrol.join(address, token, "n9", "laptop", NodeFiles(tmp_path / "new"), NOW)
    assert seen == []


def request(folder: Path, node_id: str = "n9", secret: str = "00" * 20) -> control_pb2.JoinRequest:
    csr = NodeFiles(folder / "new").request(node_id)
    return control_pb2.JoinRequest(token_secret=secret, csr_pem=csr, node_id=node_id, name="x")


@asynccontextmanager
async def joining(authority: Authority, address: str) -> AsyncIterator[control_pb2_grpc.EnrolmentAsyncStub]:
    trusted = grpc.ssl_channel_credentials(authority.certificate_pem)
    async with channel.open_channel(address, trusted, channel.MAX_CONTROL_BYTES) as opened:
        yield control_pb2_grpc.EnrolmentStub(opened)


async def denied(
    stub: control_pb2_grpc.EnrolmentAsyncStub, bad: control_pb2.JoinRequest
) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Join(bad)
    return refused.value.code(), str(refused.value.details())


async def test_bad_join_requests_are_refused(authority: Authority, tmp_path: Path) -> None:
    async with (
        enrolling(authority, identity(authority, tmp_path, "a"), bytes(20)) as (address, _),
        joining(authority, address) as stub,
    ):
        assert (await stub.Join(request(tmp_path))).certificate_pem
        for field, value in (("token_secret", "zz"), ("token_secret", "00"), ("node_id", "../a"), ("csr_pem", b"")):
            bad = request(tmp_path)
            setattr(bad, field, value)
            assert (await denied(stub, bad))[0] is grpc.StatusCode.PERMISSION_DENIED


async def test_a_replayed_join_is_refused_and_a_machine_that_asks_again_is_not(
    authority: Authority, tmp_path: Path
) -> None:
    async with (
        enrolling(authority, identity(authority, tmp_path, "a"), bytes(20)) as (address, _),
        joining(authority, address) as stub,
    ):
        sent = request(tmp_path)
        assert (await stub.Join(sent)).certificate_pem
        code, said = await denied(stub, sent)
        assert code is grpc.StatusCode.PERMISSION_DENIED and "answered already" in said
        assert (await stub.Join(request(tmp_path))).certificate_pem, "its first answer may have been lost"


async def test_a_source_of_wrong_secrets_has_to_wait(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        enrolling(authority, identity(authority, tmp_path, "a"), bytes(20)) as (address, seen),
        joining(authority, address) as stub,
    ):
        for _ in range(enrol.WRONG_FREE):
            assert (await denied(stub, request(tmp_path, secret="11" * 20)))[0] is grpc.StatusCode.PERMISSION_DENIED
        for secret in ("11" * 20, "00" * 20):  # a right one, too: else there would be no limit
            code, said = await denied(stub, request(tmp_path, secret=secret))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "wait 10 s" in said
        assert len(seen) == enrol.WRONG_FREE
    assert len([record for record in caplog.records if "refused to let" in record.message]) == 1
    assert "11" * 20 not in caplog.text


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:0", "host:65536"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(TrustError, match="host:port"):
        enrol.split_address(address)


def test_addresses() -> None:
    assert enrol.split_address("[::1]:5") == ("::1", 5)
    assert enrol.split_address("box.local:8477") == ("box.local", 8477)


async def test_nobody_there_is_said_plainly(authority: Authority, tmp_path: Path) -> None:
    async with serving(identity(authority, tmp_path, "a")) as address:
        pass  # a port that was free a moment ago
    with pytest.raises(PeerError, match="check the address"):
        await enrol.join(address, trust.new_token(authority), "n9", "laptop", NodeFiles(tmp_path / "new"), NOW)
