"""Hops over loopback with mutual TLS: frames in order, the handshake's refusals, and that a death is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
import pytest

from dwarfstar_engine.errors import FrameError, PeerError, VersionMismatch
from dwarfstar_engine.wire import channel, frames, ring, trust
from dwarfstar_engine.wire.frames import MAX_RESULTS, FaultFrame, ResultFrame
from dwarfstar_engine.wire.generated import data_pb2
from dwarfstar_engine.wire.handshake import BuildInfo, local_build
from dwarfstar_engine.wire.ring import (
    DATA_SERVICE,
    PACED,
    RING_METHOD,
    SEND_QUEUE,
    SPARE,
    RingReceiver,
    RingReceivers,
    RingSender,
    SpareChannels,
)
from dwarfstar_engine.wire.trust import NodeFiles, NodeIdentity

NOW = trust.utc_now()  # TLS looks at the real clock
EPOCH = 7
DEADLINE_S = 20.0
BAD = b"bad"
MIB = 1 << 20
T = TypeVar("T")
SENDERS = {"n1"}


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> NodeIdentity:
    return trust.issue_local(trust.create_authority(NOW), NodeFiles(tmp_path_factory.mktemp("trust")), "n1", NOW)


@dataclass
class End:
    """A receiving end and what it was told."""

    receiver: RingReceiver
    server: grpc.aio.Server
    address: str
    frames: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    opened: list[int] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: the receiver is busy with a frame
    lost: asyncio.Queue[tuple[int, str]] = field(default_factory=asyncio.Queue)


@asynccontextmanager
async def receiving(identity: NodeIdentity, build: BuildInfo | None = None, epoch: int = EPOCH) -> AsyncIterator[End]:
    async def take(data: bytes) -> None:
        await end.gate.wait()
        if data == BAD:
            raise FrameError("not a frame")
        end.frames.put_nowait(data)

    server = grpc.aio.server(options=channel.SERVER_OPTIONS)
    receiver = RingReceiver(
        build or local_build(),
        "the receiver",
        take,
        lambda epoch: end.opened.append(epoch),
        lambda epoch, sender: end.lost.put_nowait((epoch, sender)),
    )
    receiver.set_epoch(epoch, SENDERS)
    server.add_generic_rpc_handlers((receiver.handler(),))
    port = server.add_secure_port("127.0.0.1:0", channel.server_credentials(identity))
    end = End(receiver, server, f"127.0.0.1:{port}")
    end.gate.set()
    await server.start()
    try:
        yield end
    finally:
        end.gate.set()
        await server.stop(None)


@asynccontextmanager
async def sending(
    end: End, identity: NodeIdentity, *, build: BuildInfo | None = None, epoch: int = EPOCH
) -> AsyncIterator[tuple[RingSender, asyncio.Queue[str]]]:
    """A hop to ``end``, and the reasons for which it was lost."""
    lost: asyncio.Queue[str] = asyncio.Queue()
    sender = RingSender(lost.put_nowait)
    try:
        await sender.open(end.address, channel.channel_credentials(identity), build or local_build(), epoch, "n1")
        yield sender, lost
    finally:
        await sender.close()


async def soon(queue: asyncio.Queue[T]) -> T:
    return await asyncio.wait_for(queue.get(), DEADLINE_S)


async def test_frames_arrive_whole_and_in_order(identity: NodeIdentity) -> None:
    frames = [bytes([i % 256]) * (1 + i * 997 % 5000) for i in range(SEND_QUEUE - 1)] + [b"x" * (5 << 20)]
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        for frame in frames:
            sender.send(frame)
        await sender.flush()
        assert [await soon(end.frames) for _ in frames] == frames
        assert end.opened == [EPOCH] and lost.empty() and end.lost.empty()


async def test_several_rings_share_a_service_and_get_their_own_frames(identity: NodeIdentity) -> None:
    found: list[tuple[int, bytes]] = []
    both = RingReceivers()
    lost: asyncio.Queue[int] = asyncio.Queue()

    def receiver(epoch: int) -> None:
        async def take(data: bytes) -> None:
            found.append((epoch, data))

        made = RingReceiver(local_build(), "the receiver", take, lambda _: None, lambda told, _: lost.put_nowait(told))
        made.set_epoch(epoch, SENDERS)
        both.add(made)

    receiver(3)
    receiver(5)
    server = grpc.aio.server(options=channel.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((both.handler(),))
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', channel.server_credentials(identity))}"
    await server.start()
    senders = [RingSender(lambda _: None) for _ in range(3)]
    credentials = channel.channel_credentials(identity)
    try:
        for sender, epoch in zip(senders, (3, 5), strict=False):
            await sender.open(address, credentials, local_build(), epoch, "n1")
            sender.send(b"of %d" % epoch)
            await sender.flush()
        with pytest.raises(PeerError, match="serves epoch 3 and was offered epoch 2"):
            await senders[2].open(address, credentials, local_build(), 2, "n1")
        for sender in senders:
            await sender.close()
        assert {await soon(lost), await soon(lost)} == {3, 5}
        assert sorted(found) == [(3, b"of 3"), (5, b"of 5")]
    finally:
        await server.stop(None)


async def test_closing_tells_the_receiver_and_not_the_sender(identity: NodeIdentity) -> None:
    async with receiving(identity) as end:
        async with sending(end, identity) as (sender, lost):
            sender.send(b"1")
            await sender.flush()
            await soon(end.frames)
        assert await soon(end.lost) == (EPOCH, "n1")
        await sender.close()  # again
        assert lost.empty()


async def test_the_next_ring_takes_a_connection_that_is_open(
    identity: NodeIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[grpc.aio.Channel] = []
    real = channel.open_channel

    def counted(address: str, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
        opened.append(real(address, credentials))
        return opened[-1]

    monkeypatch.setattr(channel, "open_channel", counted)
    credentials, spare, lost = channel.channel_credentials(identity), SpareChannels(), asyncio.Queue[str]()
    async with receiving(identity) as end:
        for epoch in (EPOCH, EPOCH + 1, EPOCH + 2):
            end.receiver.set_epoch(epoch, SENDERS)
            sender = RingSender(lost.put_nowait, spare)
            await sender.open(end.address, credentials, local_build(), epoch, "n1")
            sender.send(b"%d" % epoch)
            await sender.flush()
            assert await soon(end.frames) == b"%d" % epoch
            sender.release()  # before it is closed, as the hop of the next ring opens meanwhile
            await sender.close()
            assert await soon(end.lost) == (epoch, "n1")
        assert len(opened) == 1 and lost.empty()
    ready = grpc.ChannelConnectivity.READY
    async with asyncio.timeout(DEADLINE_S):
        while opened[0].get_state() is ready:
            await opened[0].wait_for_state_change(ready)
    assert spare.take(end.address) is None, "the server is gone"
    await spare.close()


async def test_connections_that_are_kept_are_bounded(identity: NodeIdentity) -> None:
    credentials, spare = channel.channel_credentials(identity), SpareChannels()
    async with receiving(identity) as end:
        for number in range(SPARE + 3):
            link = channel.open_channel(end.address, credentials)
            await asyncio.wait_for(link.channel_ready(), DEADLINE_S)
            spare.keep(f"{number}", link)
        kept = [one for number in range(SPARE + 3) if (one := spare.take(f"{number}")) is not None]
        assert len(kept) == SPARE and spare.take(f"{SPARE}") is None
        for number, link in enumerate(kept):
            spare.keep(f"{number}", link)
        await spare.close()
        assert spare.take("0") is None


async def test_a_dead_receiver_is_noticed_once(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        await end.server.stop(None)
        assert await soon(lost)
        for _ in range(2 * SEND_QUEUE):  # sent into the void, without another report
            sender.send(b"1")
            await sender.flush()
        await end.server.wait_for_termination()
        assert lost.empty()


async def test_a_sender_that_vanishes_is_noticed(identity: NodeIdentity) -> None:
    """Its channel goes without a word, as when the process is killed."""
    async with receiving(identity) as end, sending(end, identity) as (sender, _):
        assert sender._channel is not None
        await sender._channel.close()
        assert await soon(end.lost) == (EPOCH, "n1")


async def test_a_bad_frame_closes_the_hop_on_both_ends(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        for frame in (b"1", BAD, b"2"):
            sender.send(frame)
        await sender.flush()
        assert await soon(end.lost) == (EPOCH, "n1")
        assert await soon(lost)
        assert await soon(end.frames) == b"1" and end.frames.empty()


async def test_a_queue_nobody_flushes_breaks_the_hop(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        for _ in range(SEND_QUEUE):
            sender.send(b"1")
        assert lost.empty()
        sender.send(b"1")
        assert await soon(lost) == "the next stage takes no frames"
        await sender.flush()  # sends nothing any more
        assert end.frames.empty()


async def test_nothing_leaves_before_the_flush(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        sender.send(b"1")
        sender.send(b"2")
        assert len(sender._queue) == 2
        await sender.flush()
        assert not sender._queue and [await soon(end.frames) for _ in range(2)] == [b"1", b"2"]
        assert lost.empty()


async def test_two_flushes_at_once_keep_the_order(identity: NodeIdentity) -> None:
    """The second returns at once; the first sends also what came meanwhile."""
    frames = [bytes([i]) * (1 << 18) for i in range(20)]
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        flushes = []
        for frame in frames:
            sender.send(frame)
            flushes.append(asyncio.create_task(sender.flush()))
            await asyncio.sleep(0)
        assert [await soon(end.frames) for _ in frames] == frames
        await asyncio.wait_for(asyncio.gather(*flushes), DEADLINE_S)
        assert lost.empty()


async def blocked(end: End, sender: RingSender) -> asyncio.Task[None]:
    """A flush that waits for a receiver which takes nothing."""
    end.gate.clear()
    for _ in range(SEND_QUEUE // 4):
        sender.send(bytes(MIB))
    task = asyncio.create_task(sender.flush())
    left = 0
    while left != len(sender._queue):  # gRPC's buffers fill up
        left = len(sender._queue)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(task), 0.2)
    assert left and not task.done()
    return task


async def test_a_receiver_that_takes_nothing_holds_the_sender_back(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        flushing = await blocked(end, sender)
        waiting = len(sender._queue)
        for _ in range(SEND_QUEUE - waiting):
            sender.send(b"1")
        assert lost.empty()
        sender.send(b"1")
        assert await soon(lost) == "the next stage takes no frames"
        end.gate.set()
        await asyncio.wait_for(flushing, DEADLINE_S)


async def test_who_sends_much_by_itself_waits_for_room(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        await blocked(end, sender)
        waiting = len(sender._queue)
        assert waiting >= PACED
        putting = asyncio.create_task(sender.put(b"last"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not putting.done() and len(sender._queue) == waiting
        end.gate.set()
        await asyncio.wait_for(putting, DEADLINE_S)
        for _ in range(SEND_QUEUE // 4):
            assert await soon(end.frames) == bytes(MIB)
        assert await soon(end.frames) == b"last" and lost.empty()


async def test_who_waits_for_room_is_let_go_when_the_hop_ends(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, _):
        await blocked(end, sender)
        putting = asyncio.create_task(sender.put(b"last"))
        await asyncio.sleep(0)
        await sender.close()
        await asyncio.wait_for(putting, DEADLINE_S)
        await asyncio.wait_for(sender.put(b"later"), DEADLINE_S)


async def test_a_slow_receiver_loses_nothing(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        flushing = await blocked(end, sender)
        end.gate.set()
        await asyncio.wait_for(flushing, DEADLINE_S)
        for _ in range(SEND_QUEUE // 4):
            assert await soon(end.frames) == bytes(MIB)
        assert lost.empty()


async def test_closing_ends_a_flush_that_waits(identity: NodeIdentity) -> None:
    """Whoever flushes is not to be cancelled: it goes on to the next epoch."""
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        flushing = await blocked(end, sender)
        await sender.close()
        await asyncio.wait_for(flushing, DEADLINE_S)
        assert lost.empty()


async def test_frames_of_an_epoch_that_is_over_are_refused(identity: NodeIdentity) -> None:
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        sender.send(b"1")
        await sender.flush()
        assert await soon(end.frames) == b"1"
        end.receiver.set_epoch(EPOCH + 1, SENDERS)
        sender.send(b"2")
        await sender.flush()
        assert await soon(end.lost) == (EPOCH, "n1")
        assert await soon(lost) and end.frames.empty()


async def test_an_old_epoch_is_refused(identity: NodeIdentity) -> None:
    async with receiving(identity) as end:
        with pytest.raises(PeerError, match="the receiver serves epoch 7 and was offered epoch 6") as refused:
            async with sending(end, identity, epoch=EPOCH - 1):
                pass
        assert refused.value.code == "stale_epoch"
        assert not end.opened and end.lost.empty()


async def test_a_member_that_does_not_come_before_in_the_ring_is_refused(identity: NodeIdentity) -> None:
    """Also one that was removed from the cluster: its certificate is good still."""
    async with receiving(identity) as end:
        end.receiver.set_epoch(EPOCH, {"n0", "n2"})
        with pytest.raises(PeerError, match="takes no frames from n1") as refused:
            async with sending(end, identity):
                pass
        assert refused.value.code == "not_a_sender" and not end.opened and end.lost.empty()


async def test_an_epoch_that_never_comes_is_refused(identity: NodeIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "EPOCH_WAIT_S", 0.05)
    async with receiving(identity) as end:
        with pytest.raises(PeerError, match="was offered epoch 8") as refused:
            async with sending(end, identity, epoch=EPOCH + 1):
                pass
        assert refused.value.code == "stale_epoch"


async def test_a_receiver_one_epoch_behind_catches_up(identity: NodeIdentity) -> None:
    async with receiving(identity) as end:

        async def follow() -> None:
            async with sending(end, identity, epoch=EPOCH + 1) as (sender, _):
                sender.send(b"1")
                await sender.flush()
                assert await soon(end.frames) == b"1"

        task = asyncio.create_task(follow())
        await asyncio.sleep(0)  # the sender has begun
        end.receiver.set_epoch(EPOCH + 1, SENDERS)
        await asyncio.wait_for(task, DEADLINE_S)
        assert end.opened == [EPOCH + 1]


@pytest.mark.parametrize(
    ("other", "both"),
    [
        (replace(local_build(), protocol=99), ("99.", f"{local_build().protocol}.{local_build().abi}")),
        (replace(local_build(), abi=98), (".98", f"{local_build().protocol}.{local_build().abi}")),
        (replace(local_build(), llama_build="llama-x 0.1"), ("llama-x 0.1", local_build().llama_build)),
    ],
)
async def test_another_version_is_refused_and_both_are_named(
    identity: NodeIdentity, other: BuildInfo, both: tuple[str, str]
) -> None:
    async with receiving(identity) as end:
        with pytest.raises(VersionMismatch) as refused:
            async with sending(end, identity, build=other):
                pass
        assert all(name in refused.value.message for name in both)
        assert refused.value.code == VersionMismatch.code and not end.opened


async def test_another_release_of_the_same_protocol_is_fine(identity: NodeIdentity) -> None:
    async with (
        receiving(identity) as end,
        sending(end, identity, build=replace(local_build(), version="9")) as (sender, _),
    ):
        sender.send(b"1")
        await sender.flush()
        assert await soon(end.frames) == b"1"  # the welcome may arrive before the receiver has gone on
        assert end.opened == [EPOCH]


async def test_another_clusters_certificate_is_refused_either_way(identity: NodeIdentity, tmp_path: Path) -> None:
    stranger = trust.issue_local(trust.create_authority(NOW), NodeFiles(tmp_path), "n1", NOW)
    for serves, calls in ((identity, stranger), (stranger, identity)):
        async with receiving(serves) as end:
            with pytest.raises(PeerError, match="cannot be reached") as refused:
                async with sending(end, calls):
                    pass
            assert refused.value.code == "hop_failed"
            assert not end.opened and end.lost.empty()


async def test_nobody_there(identity: NodeIdentity) -> None:
    async with receiving(identity) as end:
        pass  # its port was free a moment ago
    with pytest.raises(PeerError, match=end.address):
        async with sending(end, identity):
            pass


async def test_a_cancelled_flush_ends_the_hop_and_says_so(identity: NodeIdentity) -> None:
    """gRPC ends a call whose write is cancelled; nobody may believe the hop alive."""
    async with receiving(identity) as end, sending(end, identity) as (sender, lost):
        flushing = await blocked(end, sender)
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushing
        assert await soon(lost)
        await sender.flush()  # not the one that was cancelled: nothing to send to
        assert lost.empty()


@pytest.mark.parametrize("first", [b"\xff\xff\xff", b""])
async def test_a_caller_that_does_not_say_hello(identity: NodeIdentity, first: bytes) -> None:
    async with (
        receiving(identity) as end,
        channel.open_channel(end.address, channel.channel_credentials(identity)) as opened,
    ):
        call: grpc.aio.StreamStreamCall[bytes, bytes] = opened.stream_stream(f"/{DATA_SERVICE}/{RING_METHOD}")()
        await call.write(first)
        async with asyncio.timeout(DEADLINE_S):
            answer = await call.read()
        welcome = data_pb2.RingWelcome()
        assert isinstance(answer, bytes)
        welcome.ParseFromString(answer)
        assert welcome.code and welcome.message
        assert not end.opened and end.lost.empty()


@pytest.mark.parametrize("chosen", [None, "DEBUG"])
def test_grpc_is_quiet_unless_the_owner_chose(chosen: str | None) -> None:
    """Read by gRPC when it is first imported, which is after our package: asked of a fresh process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRPC_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"GRPC_VERBOSITY": chosen} if chosen else {})
    program = "import sys, os, dwarfstar_engine.wire; print(os.environ['GRPC_VERBOSITY'], 'grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [chosen or "ERROR", "False"]


class Slow:
    """A call whose writes take a turn of the event loop each, while ``others`` go on queueing."""

    def __init__(self, sender: RingSender, others: list[bytes]) -> None:
        self.sender, self.others, self.written = sender, others, list[bytes]()

    async def write(self, data: bytes) -> None:
        self.written.append(data)
        if self.others:
            self.sender.send(self.others.pop(0))
        await asyncio.sleep(0)

    def cancel(self) -> None: ...


async def test_who_flushes_is_not_kept_by_what_others_queue() -> None:
    """Or a stage that goes on by itself would never read the coordinator's next frame."""
    sender = RingSender(lambda reason: None)
    others = [b"other %d" % number for number in range(50)]
    sender._call = call = cast(Any, Slow(sender, others.copy()))
    sender.send(b"mine")
    async with asyncio.timeout(5):
        await sender.flush()
        assert call.written == [b"mine"]
        sender.send(b"mine, too")
        await sender.flush()  # another call is sending
        assert sender._rest is not None
        await sender._rest
        assert sorted(call.written) == sorted([b"mine", b"mine, too", *others])
        assert call.written.index(b"mine, too") < 5
        sender.send(b"last")
        await sender.flush()
        assert call.written[-1] == b"last"
        await sender.close()


async def test_results_that_wait_behind_each_other_are_one_message() -> None:
    sender = RingSender(lambda reason: None)
    sender._call = call = cast(Any, Slow(sender, []))
    results = [frames.encode(ResultFrame(1, number, [])) for number in range(MAX_RESULTS + 3)]
    fault = frames.encode(FaultFrame(1, 9, "code", "why"))
    for data in (*results[:2], fault, *results[2:], fault):
        sender.send(data)
    await sender.flush()
    assert call.written == [
        b"".join(results[:2]), fault, b"".join(results[2 : 2 + MAX_RESULTS]), results[-1], fault,
    ]  # fmt: skip
    await sender.close()
