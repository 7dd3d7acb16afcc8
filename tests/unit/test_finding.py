"""Finding a coordinator over real sockets and certificates, and what members remember of each other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from dwarfstar_engine.cli.lend import join_address
from dwarfstar_engine.cluster.candidates import Goal, Interface, Known, Source
from dwarfstar_engine.errors import PeerError, TrustError
from dwarfstar_engine.node import discovery, gossip
from dwarfstar_engine.node.discovery import Finder, attachable, find_joining, search
from dwarfstar_engine.node.gossip import MAX_LAST, MAX_PEERS, Gossip, Peer, PeerBook, from_wire, read_book, to_wire
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.wire import channel, trust
from dwarfstar_engine.wire.enrol import Enrolment, serve_enrolment
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.trust import Authority, NodeFiles
from support.control_base import UnexpectedControl

NOW = trust.utc_now()  # TLS looks at the real clock
LOOPBACK = (Interface("lo", "127.0.0.1", 8),)
LONG_S = 20.0  # a bound on the test, not what is expected


def here() -> tuple[Interface, ...]:
    return LOOPBACK


@pytest.fixture(scope="module")
def authority() -> Authority:
    return trust.create_authority(NOW)


def member(authority: Authority, folder: Path, node_id: str) -> NodeFiles:
    files = NodeFiles(folder)
    trust.issue_local(authority, files, node_id, NOW)
    return files


class Control(UnexpectedControl):
    """Answers as a coordinator does."""

    asked = 0

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StatusReply:
        self.asked += 1
        return pb.StatusReply(json=b"{}")


@asynccontextmanager
async def controlling(files: NodeFiles, service: Control | None) -> AsyncIterator[str]:
    """A server of the cluster; without a service, as a stage is."""
    server = grpc.aio.server(options=channel.CONTROL_SERVER_OPTIONS)
    if service is not None:
        control_pb2_grpc.add_ControlServicer_to_server(service, server)
    port = server.add_secure_port("127.0.0.1:0", channel.server_credentials(files))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def enrolling(authority: Authority, folder: Path) -> AsyncIterator[str]:
    service = Enrolment(authority, lambda secret, node_id, name: None, ":1", trust.utc_now)
    server, port = await serve_enrolment(service, "127.0.0.1", 0, member(authority, folder, "coordinator"))
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def silent() -> AsyncIterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@asynccontextmanager
async def talking(words: bytes) -> AsyncIterator[str]:
    """Some other program."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_of_all_that_answers_the_cluster_of_the_token_is_joined(authority: Authority, tmp_path: Path) -> None:
    foreign = trust.create_authority(NOW)
    async with AsyncExitStack() as stack:
        wrong = [
            await stack.enter_async_context(silent()),
            await stack.enter_async_context(talking(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
            await stack.enter_async_context(enrolling(foreign, tmp_path / "foreign")),
            "127.0.0.1:1",
        ]
        right = await stack.enter_async_context(enrolling(authority, tmp_path / "ours"))
        token = trust.new_token(authority)
        assert await find_joining(token, (*wrong, right), False, LONG_S, here) == right
        with pytest.raises(PeerError) as error:
            await find_joining(token, (wrong[2],), False, 0.5, here)
        assert error.value.code == "other_cluster" and "is not of the cluster" in error.value.message
        with pytest.raises(PeerError) as error:
            await find_joining(token, tuple(wrong[1:2]), False, 0.5, here)
        assert "what answers is not DwarfStar" in error.value.message


async def test_a_member_attaches_to_a_coordinator_and_to_no_stage_of_its_cluster(
    authority: Authority, tmp_path: Path
) -> None:
    ours, us = member(authority, tmp_path / "c", "coordinator"), member(authority, tmp_path / "n", "n1")
    foreign = member(trust.create_authority(NOW), tmp_path / "f", "coordinator")
    service = Control()
    async with (
        controlling(ours, None) as stage,
        controlling(foreign, Control()) as other,
        controlling(ours, service) as right,
    ):
        goal = Goal("x", False, 1, "0.1.0", browsing=False, timeout_s=LONG_S)
        known = [Known(one, Source.TYPED) for one in (stage, other, right)]
        assert await search(goal, known, attachable(us), lambda text: None, here) == right
        assert service.asked == 1
        soon = Goal("x", False, 1, "0.1.0", browsing=False, timeout_s=0.5)
        with pytest.raises(PeerError) as error:
            await search(soon, known[:2], attachable(us), lambda text: None, here)
        assert error.value.code == "other_cluster" and other in error.value.message


class Refusing(Control):
    """Answers as a coordinator does to a node that was removed."""

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StatusReply:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "This machine was removed from the cluster.")


async def test_a_coordinator_that_refuses_us_ends_the_search_and_says_why(authority: Authority, tmp_path: Path) -> None:
    ours, us = member(authority, tmp_path / "c", "coordinator"), member(authority, tmp_path / "n", "n1")
    async with controlling(ours, Refusing()) as address:
        finder = Finder(us, discovery=False, typed=(address,), timeout_s=LONG_S, look=here)
        with pytest.raises(TrustError, match="was removed from the cluster"):
            await finder.coordinator()


async def test_a_member_remembers_where_its_coordinator_was_and_who_else_may_be_one(
    authority: Authority, tmp_path: Path
) -> None:
    ours, us = member(authority, tmp_path / "c", "coordinator"), member(authority, tmp_path / "n", "n1")
    async with controlling(ours, Control()) as right:
        port = int(right.rpartition(":")[2])
        first = Finder(us, discovery=False, first="127.0.0.1:1", timeout_s=LONG_S, look=here)
        assert await first.coordinator() == "127.0.0.1:1", "where it has just joined"
        await first.attached("127.0.0.1:2")
        await first.told(
            to_wire([Peer(id="a", name="a", hosts=("10.255.255.1",)), Peer(id="b", name="b", hosts=(), control_port=1)])
        )
        book = read_book(us.folder)
        assert book.last == ("127.0.0.1:2",) and [one.id for one in book.peers] == ["a", "b"]
        gossip.write_book(
            us.folder, book.told([Peer(id="b", name="b", hosts=("127.0.0.1",), control_port=port, coordinator=True)])
        )
        again = Finder(us, discovery=False, timeout_s=LONG_S, look=here)
        assert await again.coordinator() == right
    (us.folder / gossip.FILE).write_text("{", "utf-8")
    assert read_book(us.folder) == PeerBook(), "a damaged book is an empty one"


async def test_a_search_that_is_cancelled_leaves_nothing_behind(authority: Authority) -> None:
    async with silent() as address:
        before = asyncio.all_tasks()
        task = asyncio.create_task(find_joining(trust.new_token(authority), (address,), False, None, here))
        while not any(one not in before and one is not task for one in asyncio.all_tasks()):  # noqa: ASYNC110
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert asyncio.all_tasks() == before


def test_a_clusters_id_is_the_beginning_of_its_tokens(authority: Authority) -> None:
    token = trust.new_token(authority)
    assert token.format().split(".")[1].startswith(discovery.cluster_id(token.fingerprint))


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("server", "server:8478"),
        ("10.0.0.1", "10.0.0.1:8478"),
        ("10.0.0.1:9001", "10.0.0.1:9001"),
        ("fd00::1", "[fd00::1]:8478"),
        ("[fd00::1]:9001", "[fd00::1]:9001"),
    ],
)
def test_an_address_given_by_hand_may_lack_its_port(given: str, address: str) -> None:
    assert join_address(given) == address


@pytest.mark.parametrize("given", ["", "server:", ":80", "server:x", "server:70000"])
def test_what_is_no_address_is_said(given: str) -> None:
    with pytest.raises(TrustError, match="write host:port"):
        join_address(given)


# --- gossip ---


def attached(node_id: str, *hosts: str, port: int = 0) -> Member:
    return Member(node_id, node_id.upper(), "10.0.0.1", pb.Device(), hosts=hosts, control_port=port)


def told(to: Member) -> list[list[str]]:
    """Which members each message waiting for one names."""
    return [[peer.id for peer in to.outbox.get_nowait().peers.peers] for _ in range(to.outbox.qsize())]


def test_members_are_told_of_each_other_and_only_of_changes() -> None:
    talk, a, b = Gossip(), attached("a", "10.0.0.2"), attached("b", "10.0.0.3", port=8477)
    talk.changed(Peer(id="coordinator", name="head", hosts=("10.0.0.1",), control_port=8477, coordinator=True))
    for _ in range(3):
        talk.tell(a, [a])
    assert told(a) == [["coordinator"]]
    talk.changed()
    for _ in range(3):
        talk.tell(a, [a, b])
        talk.tell(b, [a, b])
    assert told(a) == [["coordinator", "b"]] and told(b) == [["coordinator", "a"]]
    talk.forget(a)
    talk.tell(a, [a, b])
    assert told(a) == [["coordinator", "b"]], "it has come again"


def test_a_member_that_does_not_read_is_told_later() -> None:
    talk, a = Gossip(), attached("a")
    while not a.outbox.full():
        a.send(pb.CoordinatorMessage())
    talk.tell(a, [a])
    while not a.outbox.empty():
        a.outbox.get_nowait()
    talk.tell(a, [a])
    assert a.outbox.qsize() == 1


def test_a_large_cluster_is_told_within_bounds_and_those_that_may_coordinate_first() -> None:
    many = [attached(f"n{number}", *(f"10.0.{number % 250}.{n}" for n in range(16))) for number in range(1000)]
    many.append(attached("capable", "10.1.1.1", port=8477))
    talk, a = Gossip(), attached("a")
    talk.tell(a, many)
    message = a.outbox.get_nowait()
    assert len(message.peers.peers) == MAX_PEERS and message.peers.peers[0].id == "capable"
    assert message.ByteSize() < channel.MAX_CONTROL_BYTES


def test_what_peers_say_is_cut_to_what_is_sound() -> None:
    hostile = pb.Peers(
        peers=[
            pb.Peer(id="x" * 1000, name="y" * 1000, hosts=["127.0.0.1", "evil.example", "0.0.0.0", "10.0.0.1", "::1"]),
            pb.Peer(id="z", control_port=70000),
            *(pb.Peer(id=f"n{number}", hosts=["10.0.0.2"] * 100) for number in range(1000)),
        ]
    )
    sound = from_wire(hostile)
    assert len(sound) < MAX_PEERS and (len(sound[0].id), len(sound[0].name)) == (64, 64)
    assert sound[0].hosts == ("10.0.0.1",) and "z" not in [one.id for one in sound]
    assert all(len(one.hosts) <= 16 for one in sound)
    book = PeerBook().told(sound)
    assert PeerBook.model_validate_json(book.model_dump_json()) == book


def test_last_addresses_are_bounded_and_the_newest_first() -> None:
    book = PeerBook()
    for number in range(MAX_LAST + 5):
        book = book.attached(f"10.0.0.1:{number + 1}")
    book = book.attached("10.0.0.1:10")
    assert len(book.last) == MAX_LAST and book.last[0] == "10.0.0.1:10" and len(set(book.last)) == MAX_LAST
