"""Cells of slots on their way from a stage to the process that takes its layers: a gRPC stream for each such pair.

Theory. The coordinator tells both ends. The one that gives connects to the one that takes, over the cluster's mutual
TLS; that one hears nobody but the nodes it was told of, and takes nothing but what it was told to expect: cells of
these layers of this file, of this term and epoch, of these slots and positions. A sequence arrives whole and with its
checksum before anybody looks at it; then it is answered, and the next one is sent. Whatever goes wrong ends the stream,
or leaves out one sequence; what is missing is computed again.

Bounds. PIECE_BYTES a message; of a sequence as many bytes as were expected at most; an expected stream is served
once. How long all takes is bounded by who opens a stream and who expects one. Of each one sequence is in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from dwarfstar_engine import native
from dwarfstar_engine.errors import DwarfStarError, FrameError, PeerError, TrustError
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import data_pb2
from dwarfstar_engine.wire.handshake import BuildInfo, check_peer
from dwarfstar_engine.wire.link import PROBES, Link
from dwarfstar_engine.wire.ring import DATA_SERVICE, answer_probes, measure, welcome_of

METHOD = "Carry"
PIECE_BYTES = 1 << 20  # large enough to cost little, small enough that a slow link is heard of in time
EXPECTED_WAIT_S = 5.0  # both ends are told at the same moment; one may hear of it later


@dataclass(frozen=True, slots=True)
class Written:
    """What cells belong to: they are of use to nobody who has another."""

    term: int
    epoch: int
    fingerprint: str
    layers: tuple[int, int]
    kv_type: str
    context: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """Cells of a slot's positions from 0 on. floor: it can be cut to so many at least, or to none."""

    slot: int
    positions: int
    floor: int
    data: bytearray


@dataclass(slots=True, eq=False)
class Expected:
    """A stream, at the end that takes. slots: of each the positions, and its bytes at most. over: the stream ended."""

    written: Written
    sender: str
    slots: Mapping[int, tuple[int, int]]
    take: Callable[[Sequence], Awaitable[None]]
    over: asyncio.Event = field(default_factory=asyncio.Event)
    begun: bool = False
    taken: set[int] = field(default_factory=set)


class CarryReceiver:
    """The end that takes: a gRPC service. Between ``expect`` and ``forget`` it serves the streams expected."""

    def __init__(self, build: BuildInfo, name: str) -> None:
        self._build, self._name = build, name
        self._expected: tuple[Expected, ...] = ()
        self._changed = asyncio.Event()

    def expect(self, expected: Iterable[Expected]) -> None:
        self._expected = tuple(expected)
        self._changed.set()

    def forget(self) -> None:
        """Nothing is taken from now on, also of a stream that is open."""
        self._expected = ()
        self._changed.clear()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for ``grpc.aio.Server.add_generic_rpc_handlers``."""
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._serve)
        return grpc.method_handlers_generic_handler(DATA_SERVICE, {METHOD: method})

    async def _serve(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        try:
            expected, probes = await self._greet(await context.read(), context)
        except DwarfStarError as error:
            await context.write(_answer(error))
            return
        try:
            await context.write(_answer())
            await answer_probes(context, probes)
            await context.write(_answer())
            while isinstance(data := await context.read(), bytes):
                await self._take(expected, data, context)
        except FrameError as error:
            await context.write(_answer(error))
        finally:
            expected.over.set()

    async def _greet(self, first: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> tuple[Expected, int]:
        """What is expected of a caller, and how many probes it sends. Raises DwarfStarError: nothing is."""
        hello = data_pb2.CarryHello()
        try:
            hello.ParseFromString(first if isinstance(first, bytes) else b"")
        except DecodeError:
            raise PeerError("the hello is not one of ours", code="bad_hello") from None
        check_peer(self._build, BuildInfo(hello.protocol, hello.llama_build, hello.version, hello.abi))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXPECTED_WAIT_S):
                await self._changed.wait()
        node_id, theirs = channel.peer_node_id(context), _written(hello)
        awaited = [one for one in self._expected if one.sender == node_id]
        if not awaited:
            raise TrustError(f"{self._name} takes no cells from {node_id} now", code="not_a_sender")
        expected = next((one for one in awaited if one.written == theirs), None)
        if expected is None:
            wanted = " or ".join(str(one.written) for one in awaited)
            raise PeerError(f"{self._name} takes cells of {wanted}, not of {theirs}", code="cells_differ")
        if expected.begun:
            raise PeerError(f"{self._name} is given these cells already", code="given_twice")
        expected.begun = True
        return expected, hello.probes

    async def _take(self, expected: Expected, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """One sequence, and the answer to it. Raises FrameError: what comes is not what was said."""
        head = data_pb2.CarryHead()
        try:
            head.ParseFromString(data)
        except DecodeError:
            raise FrameError("this is not the head of a sequence") from None
        positions, most = expected.slots.get(head.slot, (0, 0))
        if head.slot in expected.taken or head.positions != positions or not 0 < head.bytes <= most:
            raise FrameError(f"{head.bytes} bytes of {head.positions} positions of slot {head.slot} are not expected")
        if head.floor > head.positions:
            raise FrameError(f"slot {head.slot} has {head.positions} positions and cannot be cut to {head.floor}")
        cells = bytearray()
        while len(cells) < head.bytes:
            piece = await context.read()
            if not isinstance(piece, bytes):
                raise FrameError("the stream ended in the middle of a sequence")
            if not 0 < len(piece) <= min(PIECE_BYTES, head.bytes - len(cells)):
                raise FrameError(f"a piece of {len(piece)} bytes is not one of ours")
            cells += piece
        try:
            if native.crc32c(cells) != head.crc32c:
                raise FrameError(f"the cells of slot {head.slot} were damaged on their way", code="damaged")
            if expected not in self._expected:
                raise PeerError(f"{self._name} waits for no cells any more", code="too_late")
            await expected.take(Sequence(head.slot, head.positions, head.floor, cells))
        except DwarfStarError as error:
            await context.write(_answer(error))
            return
        expected.taken.add(head.slot)
        await context.write(_answer())


class CarrySender:
    """The end that gives: opened, then ``send`` for each sequence, then closed."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None

    async def open(self, credentials: grpc.ChannelCredentials, build: BuildInfo, written: Written, sender: str) -> Link:
        """Connect, shake hands and measure. Raises PeerError."""
        self._channel = channel.open_channel(self._address, credentials)
        self._call = self._channel.stream_stream(f"/{DATA_SERVICE}/{METHOD}")()
        try:
            await self._call.write(_hello(build, written, sender))
            self._check(await self._call.read())
            link = await measure(self._call)
            self._check(await self._call.read())
        except grpc.aio.AioRpcError as error:
            raise self._lost(str(error.details())) from None
        if link is None:
            raise self._lost("it ended the connection")
        return link

    async def send(self, cells: Sequence) -> None:
        """Returns when it is taken. Raises PeerError: it is not; another one may be, unless the stream ended."""
        size, view = len(cells.data), memoryview(cells.data)
        head = data_pb2.CarryHead(
            slot=cells.slot,
            positions=cells.positions,
            floor=cells.floor,
            bytes=size,
            crc32c=native.crc32c(cells.data),
        )
        try:
            await self._call.write(head.SerializeToString())
            for at in range(0, size, PIECE_BYTES):
                await self._call.write(bytes(view[at : at + PIECE_BYTES]))
            answer = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._lost(str(error.details()) if isinstance(error, grpc.aio.AioRpcError) else "closed") from None
        self._check(answer)

    async def close(self) -> None:
        """End the stream. Idempotent."""
        opened, self._channel = self._channel, None
        if opened is not None:
            self._call.cancel()
            await opened.close()

    def _check(self, answer: object) -> None:
        if not isinstance(answer, bytes):
            raise self._lost("it ended the connection")
        if (told := welcome_of(answer)).code:
            raise PeerError(told.message, code=told.code)

    def _lost(self, why: str) -> PeerError:
        return PeerError(f"the stage at {self._address} takes no cells: {why}", code=HOP_ENDED)


HOP_ENDED = "hop_failed"  # code: nothing more can be sent


def _hello(build: BuildInfo, written: Written, sender: str) -> bytes:
    return data_pb2.CarryHello(
        protocol=build.protocol,
        llama_build=build.llama_build,
        version=build.version,
        abi=build.abi,
        sender=sender,
        probes=len(PROBES),
        term=written.term,
        epoch=written.epoch,
        fingerprint=written.fingerprint,
        layer_begin=written.layers[0],
        layer_end=written.layers[1],
        kv_type=written.kv_type,
        context=written.context,
    ).SerializeToString()


def _written(hello: data_pb2.CarryHello) -> Written:
    layers = (hello.layer_begin, hello.layer_end)
    return Written(hello.term, hello.epoch, hello.fingerprint, layers, hello.kv_type, hello.context)


def _answer(error: DwarfStarError | None = None) -> bytes:
    if error is None:
        return data_pb2.RingWelcome().SerializeToString()
    return data_pb2.RingWelcome(code=error.code, message=error.message).SerializeToString()
