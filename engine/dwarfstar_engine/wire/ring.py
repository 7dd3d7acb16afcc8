"""The hops of the ring: one gRPC stream each, frames as bytes, one direction.

Theory. A hop is a bidirectional stream ``/dwarfstar.v1.Data/Ring``. The first message either way is a hello; the
receiver answers with its own or refuses (another protocol, another llama.cpp build, a stale epoch). Then frames flow
from the sender to the receiver, and the stream's life is the hop's life: when either process dies, both ends learn
it at once. Order within a hop is the order of ``send``. Before the first frame the sender measures the link.

Bounds. ``SEND_QUEUE`` frames wait for a slow receiver; the coordinator keeps fewer than that in flight, so a full
queue is a fault and breaks the hop. A receiver that is one epoch behind its sender gets ``EPOCH_WAIT_S`` to catch up.
Of hops that end SPARE connections stay open for the next ring's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from dwarfstar_engine.errors import DwarfStarError, FrameError, PeerError, TrustError, VersionMismatch
from dwarfstar_engine.wire import channel, frames
from dwarfstar_engine.wire.generated import data_pb2
from dwarfstar_engine.wire.handshake import BuildInfo, check_peer
from dwarfstar_engine.wire.link import MAX_PROBES, PROBES, Link

log = logging.getLogger("dwarfstar.ring")

RING_METHOD = "Ring"
DATA_SERVICE = "dwarfstar.v1.Data"
SEND_QUEUE = 256  # frames; the scheduler keeps a few per stage in flight
PACED = 16  # of these, when one who sends many by itself (``RingSender.put``) waits
EPOCH_WAIT_S = 5.0  # stages are linked at the same moment; one may hear of it later
OPEN_DEADLINE_S = 10.0
SPARE = 4  # connections without a hop: a stage has two, and after a switch of rings two more

FrameSink = Callable[[bytes], Awaitable[None]]


def _hello(build: BuildInfo, epoch: int, sender: str, probes: int) -> bytes:
    return data_pb2.RingHello(
        protocol=build.protocol,
        llama_build=build.llama_build,
        version=build.version,
        abi=build.abi,
        epoch=epoch,
        sender=sender,
        probes=probes,
    ).SerializeToString()


def _build(hello: data_pb2.RingHello) -> BuildInfo:
    return BuildInfo(hello.protocol, hello.llama_build, hello.version, hello.abi)


@dataclass(slots=True)
class _Epoch:
    value: int
    changed: asyncio.Event


class RingReceiver:
    """The receiving end: a gRPC service. Frames of the current epoch's hop go to ``on_frame``, in order.

    ``on_open(epoch)`` and ``on_lost(epoch, sender)`` tell of hops, also of epochs that are over.
    """

    def __init__(
        self,
        build: BuildInfo,
        name: str,
        on_frame: FrameSink,
        on_open: Callable[[int], None],
        on_lost: Callable[[int, str], None],
    ) -> None:
        self._build, self._name = build, name
        self._on_frame, self._on_open, self._on_lost = on_frame, on_open, on_lost
        self._epoch = _Epoch(0, asyncio.Event())
        self._senders: frozenset[str] = frozenset()

    def set_epoch(self, epoch: int, senders: Collection[str]) -> None:
        """Accept hops of ``epoch`` from now on, of the nodes ``senders`` (the ids in their certificates); frames still
        coming over an older hop are refused."""
        self._senders = frozenset(senders)
        self._epoch.value = epoch
        self._epoch.changed.set()
        self._epoch.changed = asyncio.Event()

    @property
    def epoch(self) -> int:
        """Whose hops are accepted."""
        return self._epoch.value

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for ``grpc.aio.Server.add_generic_rpc_handlers``."""
        return _handler(self._ring)

    async def _ring(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        # ``read`` and ``write`` and not iteration: fewer steps of the event loop for each frame.
        await self.take(await context.read(), context)

    async def take(self, first: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Serve a hop. first: its first message."""
        hello = data_pb2.RingHello()
        try:
            hello.ParseFromString(first if isinstance(first, bytes) else b"")
            check_peer(self._build, _build(hello))
            await self._reach(hello.epoch)
            self._check_sender(channel.peer_node_id(context))
        except DwarfStarError as error:
            await context.write(data_pb2.RingWelcome(code=error.code, message=error.message).SerializeToString())
            return
        except DecodeError:
            refusal = data_pb2.RingWelcome(code="bad_hello", message="the hello is not one of ours")
            await context.write(refusal.SerializeToString())
            return
        epoch, sender = hello.epoch, hello.sender
        await context.write(data_pb2.RingWelcome(code="").SerializeToString())
        await answer_probes(context, hello.probes)
        self._on_open(epoch)
        try:
            while isinstance(data := await context.read(), bytes) and epoch == self._epoch.value:
                await self._on_frame(data)
        except FrameError as error:
            log.warning("closing the hop from %s: %s", sender, error.message)
        finally:
            self._on_lost(epoch, sender)

    def _check_sender(self, node_id: str) -> None:
        if node_id not in self._senders:
            raise TrustError(f"{self._name} takes no frames from {node_id} in this epoch", code="not_a_sender")

    async def _reach(self, epoch: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EPOCH_WAIT_S):
                while self._epoch.value < epoch:
                    await self._epoch.changed.wait()
        if self._epoch.value != epoch:
            raise PeerError(
                f"{self._name} serves epoch {self._epoch.value} and was offered epoch {epoch}", code="stale_epoch"
            )


class RingReceivers:
    """The receiving ends of several rings behind one service: a hop belongs to the one that awaits its epoch, and else
    to the first, which refuses it."""

    def __init__(self) -> None:
        self._receivers: list[RingReceiver] = []

    def add(self, receiver: RingReceiver) -> None:
        self._receivers.append(receiver)

    def handler(self) -> grpc.GenericRpcHandler:
        """As ``RingReceiver.handler``."""
        return _handler(self._ring)

    async def _ring(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        first, hello = await context.read(), data_pb2.RingHello()
        with contextlib.suppress(DecodeError):  # whoever takes it refuses it
            hello.ParseFromString(first if isinstance(first, bytes) else b"")
        awaited = (one for one in self._receivers if one.epoch == hello.epoch)
        await next(awaited, self._receivers[0]).take(first, context)


async def answer_probes(context: grpc.aio.ServicerContext[bytes, bytes], count: int) -> None:
    """Let the other end ``measure``."""
    for _ in range(min(count, MAX_PROBES)):
        if not isinstance(await context.read(), bytes):
            break  # it left; the next read says so too
        await context.write(b"")


def _handler(
    serve: Callable[[object, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[None]],
) -> grpc.GenericRpcHandler:
    method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(
        serve
    )  # no serialisers: bytes in, bytes out
    return grpc.method_handlers_generic_handler(DATA_SERVICE, {RING_METHOD: method})


def welcome_of(answer: object) -> data_pb2.RingWelcome:
    welcome = data_pb2.RingWelcome()
    if isinstance(answer, bytes):
        welcome.ParseFromString(answer)
    return welcome


async def measure(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> Link | None:
    """What the link is worth; None if the stream ended."""
    times_s = []
    for size in PROBES:
        started = time.perf_counter()
        await call.write(bytes(size))
        if not isinstance(await call.read(), bytes):
            return None
        times_s.append(time.perf_counter() - started)
    return Link.of(times_s)


class SpareChannels:
    """Connections of hops that ended, for hops to the same addresses: a TLS handshake takes 40 to 110 ms on busy cores,
    while streams wait. One that is not ready is closed, as is the one that waits longest beyond SPARE."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._closing: set[asyncio.Future[None]] = set()

    def take(self, address: str) -> grpc.aio.Channel | None:
        """A connection that is open, which is the caller's from now on."""
        kept = self._kept.pop(address, None)
        if kept is None or kept.get_state() is grpc.ChannelConnectivity.READY:
            return kept
        self._close(kept)
        return None

    def keep(self, address: str, channel: grpc.aio.Channel) -> None:
        """Take one that has no calls any more."""
        if channel.get_state() is not grpc.ChannelConnectivity.READY:
            self._close(channel)
            return
        if (other := self._kept.pop(address, None)) is not None:
            self._close(other)
        self._kept[address] = channel
        if len(self._kept) > SPARE:
            self._close(self._kept.popitem(last=False)[1])

    def _close(self, channel: grpc.aio.Channel) -> None:
        closing = asyncio.ensure_future(channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all."""
        while self._kept:
            self._close(self._kept.popitem()[1])
        await asyncio.gather(*self._closing)


class RingSender:
    """The sending end of a hop. ``on_lost`` is called once when the stream ends, unless ``close`` was first.

    spare: where its connection comes from and goes to, if there is one.
    """

    def __init__(self, on_lost: Callable[[str], None], spare: SpareChannels | None = None) -> None:
        self._on_lost, self._spare = on_lost, spare
        self._address = ""
        self._queue: deque[bytes] = deque()
        self._room = asyncio.Event()
        self._sending = False
        self._channel: grpc.aio.Channel | None = None
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._rest: asyncio.Task[None] | None = None  # writes what was queued while another call was sending
        self._closed = False

    async def open(
        self, address: str, credentials: grpc.ChannelCredentials, build: BuildInfo, epoch: int, sender: str
    ) -> Link:
        """Connect, shake hands and measure. Raises VersionMismatch or PeerError within OPEN_DEADLINE_S."""
        self._address = address
        kept = self._spare.take(address) if self._spare is not None else None
        self._channel = kept if kept is not None else channel.open_channel(address, credentials)
        call: grpc.aio.StreamStreamCall[bytes, bytes] = self._channel.stream_stream(f"/{DATA_SERVICE}/{RING_METHOD}")()
        try:
            async with asyncio.timeout(OPEN_DEADLINE_S):
                await call.write(_hello(build, epoch, sender, len(PROBES)))
                answer = await call.read()
                link = await measure(call) if isinstance(answer, bytes) and not welcome_of(answer).code else None
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            await self.close()
            if isinstance(error, asyncio.CancelledError):
                raise
            detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else "no answer in time"
            raise PeerError(f"the next stage at {address} cannot be reached: {detail}", code="hop_failed") from None
        welcome = welcome_of(answer)
        if link is None and not welcome.code:
            welcome.code, welcome.message = "hop_failed", f"the next stage at {address} closed the connection"
        if link is None:
            await self.close()
            kind = VersionMismatch if welcome.code == VersionMismatch.code else PeerError
            raise kind(welcome.message, code=welcome.code)
        self._call = call
        self._watcher = asyncio.create_task(self._watch(call), name="ring-watch")
        return link

    def send(self, frame: bytes) -> None:
        """Queue a frame; ``flush`` sends it. A full queue breaks the hop: the receiver has stopped."""
        if len(self._queue) >= SEND_QUEUE:
            self._lost("the next stage takes no frames")
        else:
            self._queue.append(frame)

    async def put(self, frame: bytes) -> None:
        """Send a frame when there is room for it; a hop that is closed drops it."""
        while len(self._queue) >= PACED and not self._closed:
            self._room.clear()
            await self._room.wait()
        if not self._closed:
            self.send(frame)
            await self.flush()

    async def flush(self) -> None:
        """Send what is queued; returns once it is on its way, or at once if another call is sending already. What
        others queue meanwhile is left to a task: who reads frames must not be kept from the next one by theirs."""
        if self._sending or self._call is None:
            return
        self._sending = True
        try:
            await self._write(len(self._queue))
        finally:
            self._sending = False
        if self._queue and not self._closed:
            self._sending = True
            self._rest = asyncio.create_task(self._write_rest(), name="ring-rest")

    async def _write_rest(self) -> None:
        try:
            while self._queue and not self._closed:
                await self._write(len(self._queue))
        finally:
            self._sending = False

    async def _write(self, count: int) -> None:
        """Send the first ``count`` frames of the queue, at least."""
        assert self._call is not None
        try:
            while count > 0 and self._queue and not self._closed:
                before = len(self._queue)
                message = self._message()
                count -= before - len(self._queue)
                await self._call.write(message)
                if len(self._queue) < PACED:
                    self._room.set()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._lost(str(error.details()) if isinstance(error, grpc.aio.AioRpcError) else "closed")
        except asyncio.CancelledError:
            # gRPC raises this also for a call that ``close`` ended. Then it is not the caller who is cancelled.
            task = asyncio.current_task()
            if not self._closed or task is None or task.cancelling():
                raise

    def _message(self) -> bytes:
        """What is to be written next: a frame, or all results that wait behind each other. A write is over turns of the
        event loop after it began, each of which may compute; one result at a time could not keep up."""
        frame = self._queue.popleft()
        results = [frame]
        while self._queue and frames.is_result(frame) and frames.is_result(self._queue[0]):
            if len(results) == frames.MAX_RESULTS:
                break
            results.append(self._queue.popleft())
        return frame if len(results) == 1 else b"".join(results)

    async def _watch(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        try:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await call.read()  # nothing is sent this way: it returns when the stream ends
        finally:  # a cancelled write cancels the call, and this read with it
            self._lost("the stream ended")

    def _lost(self, reason: str) -> None:
        if not self._closed:
            self._closed = True
            self._room.set()
            self._on_lost(reason)

    def release(self) -> None:
        """What of ``close`` waits for nothing. The connection may be taken again at once."""
        self._closed = True
        self._room.set()
        if self._call is not None and self._channel is not None and self._spare is not None:
            self._call.cancel()
            self._spare.keep(self._address, self._channel)
            self._channel = None

    async def close(self) -> None:
        """End the hop. Idempotent; ``on_lost`` is not called."""
        self.release()
        tasks = [task for task in (self._watcher, self._rest) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
