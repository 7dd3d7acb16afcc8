"""Strangers at a port: who is named, how often; and that messages and members that do not belong are refused."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import DecodeError

from dwarfstar_engine.wire import channel, door, trust
from dwarfstar_engine.wire.door import Door, Visitors, source_of
from dwarfstar_engine.wire.trust import Authority, NodeFiles

LITTLE = sys.byteorder == "little"
NOW = trust.utc_now()  # TLS looks at the real clock


@pytest.mark.parametrize(
    ("peer", "source"),
    [
        ("ipv4:1.2.3.4:55", "1.2.3.4"),
        ("1.2.3.4", "1.2.3.4"),
        ("ipv6:%5B::1%5D:55", "::1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:55", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:1.2.3.4%5D:55", "1.2.3.4"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix:", "unix:"),
    ],
)
def test_a_source_is_a_machine(peer: str, source: str) -> None:
    assert source_of(peer) == source


def test_who_calls_is_no_stranger_and_who_does_not_is_named_after_a_while() -> None:
    visitors = Visitors()
    visitors.came({"member", "stranger"}, 0.0)
    visitors.called("member", 0.1)
    assert visitors.strangers(door.GRACE_S - 0.1) == []
    assert visitors.strangers(door.GRACE_S) == ["stranger"] and visitors.strangers(door.GRACE_S) == []
    visitors.came({"member"}, 50.0)
    assert visitors.strangers(100.0) == []
    visitors.came((str(number) for number in range(10_000)), 200.0)
    assert len(visitors.strangers(300.0)) == door.SOURCES


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_is_connected_to_a_port(family: socket.AddressFamily, host: str) -> None:
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} here")
    with listener, socket.create_server(("127.0.0.1", 0)) as other:
        port = listener.getsockname()[1]
        assert door._connected(port) == set(), "one that listens is not connected"
        with socket.create_connection((host, port)), socket.create_connection(other.getsockname()):
            assert door._connected(port) == {host}
    assert source_of(door._address("0000000000000000FFFF00000100007F" if LITTLE else "0" * 20 + "FFFF7F000001")) == (
        "127.0.0.1"
    )


def test_looking_takes_a_small_part_of_the_time_and_is_ready_for_a_burst() -> None:
    budget, looks, now = door.Budget(), 0, 100.0
    while now < 200.0:  # a flood: each look takes 30 ms, and the next connection is there at once
        if budget.allows(now):
            looks += 1
            budget.spend(0.03)
            now += 0.03
        now += 0.001
    assert door.LOOK_SHARE * 100 <= looks * 0.03 <= door.LOOK_SHARE * 100 + door.LOOK_SAVED_S + 0.03
    assert budget.allows(now + 60) and budget.left_s == door.LOOK_SAVED_S


# --- a server with a door --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Authority:
    return trust.create_authority(NOW)


def _parse(data: bytes) -> bytes:
    if data == b"rubbish":
        raise DecodeError("no message")
    return data


async def _say(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return b"said " + request


async def _write(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    while isinstance(data := await context.read(), bytes):
        await context.write(data)


async def _yield(
    requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
) -> AsyncIterator[bytes]:
    async for data in requests:
        yield data


@asynccontextmanager
async def serving(files: NodeFiles, removed: set[str], calls: list[str]) -> AsyncIterator[str]:
    keeper = Door(lambda node_id: f"{node_id} is out" if node_id in removed else None, calls.append)
    server = grpc.aio.server(options=channel.CONTROL_SERVER_OPTIONS, interceptors=(keeper,))
    methods: dict[str, Any] = {
        "Say": grpc.unary_unary_rpc_method_handler(_say, request_deserializer=_parse),
        "Write": grpc.stream_stream_rpc_method_handler(_write),
        "Yield": grpc.stream_stream_rpc_method_handler(_yield),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("T", methods),))
    port = server.add_secure_port("127.0.0.1:0", channel.server_credentials(files))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def ask(opened: grpc.aio.Channel, method: str, data: bytes = b"x") -> Any:
    if method == "Say":
        say: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/T/Say")
        return await say(data, timeout=10)
    stream: Any = opened.stream_stream(f"/T/{method}")(timeout=10)
    await stream.write(data)
    answer = await stream.read()
    if not isinstance(answer, bytes):
        raise grpc.aio.AioRpcError(await stream.code(), (), (), await stream.details())  # type: ignore[arg-type]
    stream.cancel()
    return answer


def identity(authority: Authority, folder: Path, node_id: str) -> NodeFiles:
    files = NodeFiles(folder / node_id)
    trust.issue_local(authority, files, node_id, NOW)
    return files


async def test_members_are_served_and_removed_ones_refused_at_every_kind_of_call(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    removed, calls = set[str](), list[str]()
    member = channel.channel_credentials(identity(authority, tmp_path, "n2"))
    async with (
        serving(identity(authority, tmp_path, "a"), removed, calls) as address,
        channel.open_channel(address, member) as opened,
    ):
        assert [await ask(opened, kind) for kind in ("Say", "Write", "Yield")] == [b"said x", b"x", b"x"]
        removed.add("n2")  # also on a connection that was open before
        for kind in ("Say", "Write", "Yield") * 2:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(opened, kind)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert refused.value.details() == "n2 is out"
    assert len(calls) == 9 and calls[0].startswith("ipv4:127.0.0.1:")
    assert len(caplog.records) == 1


async def test_messages_that_are_none_are_refused_without_a_traceback(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    member = channel.channel_credentials(identity(authority, tmp_path, "n2"))
    async with (
        serving(identity(authority, tmp_path, "a"), set(), []) as address,
        channel.open_channel(address, member) as opened,
    ):
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(opened, "Say", b"rubbish")
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await ask(opened, "Say") == b"said x"
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            other: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/T/Other")
            await other(b"", timeout=10)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert len(caplog.records) == 1 and "Traceback" not in caplog.text


async def test_a_server_takes_a_new_certificate_and_open_connections_go_on(
    authority: Authority, tmp_path: Path
) -> None:
    files, member = identity(authority, tmp_path, "a"), identity(authority, tmp_path, "n2")
    async with (
        serving(files, set(), []) as address,
        channel.open_channel(address, channel.channel_credentials(member)) as opened,
    ):
        assert await ask(opened, "Say") == b"said x"
        other = trust.create_authority(NOW)
        trust.issue_local(other, files, "a", NOW)  # nobody trusts this one: so it is seen which is served
        assert await ask(opened, "Say") == b"said x"
        async with channel.open_channel(address, channel.channel_credentials(member)) as late:
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(late, "Say")
        (files.folder / "node.pem").write_bytes(b"rubbish")  # cannot be used: what was served stays
        trust.issue_local(other, member, "n2", NOW)
        async with channel.open_channel(address, channel.channel_credentials(member)) as moved:
            assert await ask(moved, "Say") == b"said x"
