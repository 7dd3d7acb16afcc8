"""The node daemon: lends one machine to a coordinator. It loads no model; it supervises the stage process that does.

It keeps one control stream to the coordinator, opened from this side, and opens it again when it breaks, for as long as
it takes. Over it come assignments; back go heartbeats and what happens to the stage. A stage that dies is reported at
once; whether it is started again is the coordinator's decision (a new assignment). A slice that is held already keeps
its weights and only joins the ring of the new epoch.

There may be several stages (``stages``): those that the newest epoch needs, and others that wait, for a plan to come or
for the loss of another node (``room`` says which fit beside each other).

While the coordinator is away the stage and its weights stay: a coordinator that returns serves again within moments,
where loading may take minutes. Nothing that happens meanwhile needs to be told afterwards, because a coordinator begins
with an assignment, which is answered with the stage's state of that moment. The memory comes back when the daemon ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import secrets
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import grpc.aio

from dwarfstar_engine.errors import PeerError, TrustError, VersionMismatch
from dwarfstar_engine.node import renewal
from dwarfstar_engine.node.discovery import FOREIGN, Fixed, Seek
from dwarfstar_engine.node.facts import interfaces, is_any, local_host
from dwarfstar_engine.node.files import offer
from dwarfstar_engine.node.roster import REMOVED
from dwarfstar_engine.node.stages import SILENT_S, NodeOptions, Stages
from dwarfstar_engine.node.vitals import Vitals
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.trust import check_identity, utc_now

log = logging.getLogger("dwarfstar.node")

HEARTBEAT_S = 1.0  # until the coordinator has said how often; it bounds what it may say, too:
LEAST_BEAT_S, MOST_BEAT_S = 0.05, 10.0
RETRY_S = (0.2, 0.5, 1.0, 2.0)  # pauses between attempts to reach the coordinator; the last one repeats
UNFIT = ("model_differs", "model_not_found")  # refusals that end when somebody copies a file here:
UNFIT_S = 15.0  # between looks through the models folder, which may be on a slow disk
STEADY_S = 10.0  # a connection that lived so long was sound: the pauses begin anew
ANSWER_S = 10.0  # until a coordinator that was reached has welcomed or refused us
RETELL_S = 600.0  # the same trouble with the coordinator is worth a line in the log this often
OUTBOX = 1024  # messages waiting for the coordinator; more means it has stopped reading, and the stream is broken
MAX_WORDS = 200  # characters of a dead stage's last words that are passed on
STAGE = "dwarfstar_engine.stage.main"
FINAL = (REMOVED, "identity_copied")  # refusals after which this node ends: trying on would change nothing


class NodeDaemon:
    """One machine's daemon. ``run`` serves a coordinator until cancelled."""

    def __init__(self, node_id: str, options: NodeOptions) -> None:
        self._id, self._options = node_id, options
        self._stages = Stages(
            options,
            lambda event: self._post(stage_event=event),
            self._spawn,
            lambda carried: self._post(carried=carried),
        )
        self._instance = secrets.token_hex(8)
        self._outbox: asyncio.Queue[pb.NodeMessage | None] = asyncio.Queue(OUTBOX)  # None: its connection has ended
        self._coordinator = ""
        self._seek: Seek = Fixed("")
        self._host = options.listen
        self._welcomed = False
        self._leaving: asyncio.Event | None = None  # set: drained
        self.control_port = 0  # where it would be a coordinator; 0: it would not
        self._tasks: set[asyncio.Task[None]] = set()
        self._vitals = Vitals(options.facts.kind)
        self._beat_s = HEARTBEAT_S
        self._beats_changed = asyncio.Event()
        self._told = ("", float("-inf"))  # what was last said of the coordinator, and when

    @property
    def id(self) -> str:
        return self._id

    async def run(self, where: str | Seek) -> None:
        """Attach to the coordinator, again and again; ``where``: its host:port, or how it is found.

        Raises VersionMismatch, and TrustError if this node was removed or its identity is in use elsewhere: waiting
        would not help; PeerError when the coordinator is not found in the time given for that.
        """
        self._seek = Fixed(where) if isinstance(where, str) else where
        loop, attempt = asyncio.get_running_loop(), 0
        renew = renewal.from_coordinator(lambda: self._coordinator, utc_now)
        self._spawn(renewal.keep_renewed(self._options.trust, renew, utc_now, random.random))
        try:
            while True:
                self._coordinator = coordinator = await self._seek.coordinator()
                began, self._welcomed, refusal = loop.time(), False, ""
                try:
                    await self._while_it_leads(coordinator)
                    self._tell(f"the coordinator at {coordinator} ended the connection")
                except VersionMismatch:
                    raise
                except PeerError as error:
                    if error.code in FINAL:
                        raise
                    self._tell(error.message)
                    refusal = error.code
                steady = self._welcomed and loop.time() - began > STEADY_S
                attempt = 0 if steady else attempt + 1
                await asyncio.sleep(pause_s(attempt, refusal))
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._stages.close()

    def _tell(self, trouble: str) -> None:
        now = asyncio.get_running_loop().time()
        if trouble != self._told[0] or now - self._told[1] > RETELL_S:
            log.warning("%s; trying on", trouble)
            self._told = (trouble, now)

    async def _while_it_leads(self, coordinator: str) -> None:
        """``_attach``, which ends also when this node obeys another coordinator."""
        attached, over = asyncio.ensure_future(self._attach(coordinator)), asyncio.ensure_future(self._seek.over())
        try:
            await asyncio.wait({attached, over}, return_when=asyncio.FIRST_COMPLETED)
            if attached.done():
                attached.result()
        finally:
            for task in (attached, over):
                task.cancel()
            await asyncio.gather(attached, over, return_exceptions=True)

    async def _attach(self, coordinator: str) -> None:
        """One life of the control stream. Raises PeerError: not reached, not answering, or it refuses us."""
        self._host = self._options.listen or await local_host(coordinator, ANSWER_S)
        self._outbox = asyncio.Queue(OUTBOX)
        self._beat_s = HEARTBEAT_S
        self._stages.attached(self._host, coordinator)
        check_identity(await asyncio.to_thread(self._options.trust.load), utc_now())
        self._post(hello=self._hello())
        beat = asyncio.gather(self._beat(), self._vitals.watch())
        try:
            async with channel.open_channel(coordinator, channel.channel_credentials(self._options.trust)) as link:
                stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(link)
                async with asyncio.timeout(ANSWER_S) as deadline:
                    async for message in stub.Attach(self._messages()):
                        deadline.reschedule(None)
                        self._handle(message)
        except TimeoutError:
            raise PeerError(f"the coordinator at {coordinator} does not answer") from None
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise TrustError(str(error.details()), code=REMOVED) from None
            raise PeerError(_trouble(coordinator, error, self._welcomed)) from None
        finally:
            with contextlib.suppress(asyncio.QueueFull):  # else it is read to its end
                self._outbox.put_nowait(None)  # gRPC does not end what it reads with the call
            beat.cancel()
            with contextlib.suppress(asyncio.QueueFull):  # then nobody waits for a message
                self._outbox.put_nowait(None)
            if self._leaving is not None:
                self._leaving.set()  # who would answer is gone
            await asyncio.gather(beat, return_exceptions=True)

    def _hello(self) -> pb.NodeHello:
        build, facts = local_build(), self._options.facts
        return pb.NodeHello(
            node_id=self._id,
            name=self._options.name,
            data_host="" if is_any(self._host) else self._host,
            instance=self._instance,
            epoch_seen=self._stages.epoch_seen,
            control_port=self.control_port,
            hosts=[one.host for one in interfaces()],
            build=pb.Build(
                protocol=build.protocol, llama_build=build.llama_build, version=build.version, abi=build.abi
            ),
            device=pb.Device(
                kind=facts.kind,
                description=facts.device,
                memory_total_bytes=facts.memory_bytes,
                memory_usable_bytes=facts.usable_bytes,
                effective_vram_bytes=facts.override_bytes,
                override=facts.override,
                bandwidth_gb_s=facts.bandwidth_gb_s,
                threads=self._options.threads,
                cores=facts.cores,
            ),
        )

    async def _messages(self) -> AsyncIterator[pb.NodeMessage]:
        outbox = self._outbox
        while (message := await outbox.get()) is not None:  # or gRPC's task that reads this would wait for ever
            yield message

    def _post(self, **what: Any) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # a coordinator that does not read will miss heartbeats and know
            self._outbox.put_nowait(pb.NodeMessage(**what))

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        for number in itertools.count(1):
            beat_s = self._beat_s
            with contextlib.suppress(TimeoutError):  # the welcome may ask for others than we began with
                async with asyncio.timeout(beat_s):
                    await self._beats_changed.wait()
                self._beats_changed.clear()
            awake, last = loop.time() - last < beat_s + SILENT_S / 2, loop.time()
            self._stages.check(last, awake)
            self._post(heartbeat=self._vitals.heartbeat(number, self._stages.reports()))

    def _use_beats(self, told_ms: int) -> None:
        beat_s = min(max(told_ms / 1000, LEAST_BEAT_S), MOST_BEAT_S) if told_ms else HEARTBEAT_S
        if beat_s != self._beat_s:
            self._beat_s = beat_s
            self._beats_changed.set()

    async def leave(self, within_s: float) -> None:
        """Ask the coordinator to move this node's layers away; returns when it has, after ``within_s`` at most, or at
        once if there are none."""
        if not self._welcomed or not self._stages.serving:
            return
        log.info("this node is asked to end: its layers move to others first, within %.0f s", within_s)
        self._leaving = asyncio.Event()
        self._post(leave_wish=pb.LeaveWish(within_s=within_s))
        try:
            async with asyncio.timeout(within_s):
                await self._leaving.wait()
        except TimeoutError:
            log.warning("its layers were not moved within %.0f s: it leaves", within_s)
        self._post(leave=pb.Leave(reason="its owner ends it"))

    async def _offer(self, look: pb.Look) -> None:
        """Tell what this machine has of a model."""
        outbox = self._outbox
        told = await asyncio.to_thread(offer, look, self._options.models, self._options.file)
        if outbox is self._outbox:  # else it was asked over another connection
            self._post(offer=told)

    def _drained(self, told: pb.Drained) -> None:
        if told.code:
            log.warning("this node's layers cannot be moved: %s", told.message)
            return
        log.info("this node is drained: it holds no layers and may leave")
        if self._leaving is not None:
            self._leaving.set()

    def _handle(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("message"):
            case "assign" | "link" | "carry" | "release" if not self._seek.obeys(_term(message)):
                raise PeerError(f"the coordinator at {self._coordinator} leads no more")
            case "assign":
                self._stages.assign(message.assign)
            case "link":
                self._stages.link(message.link)
            case "carry":
                self._stages.carry(message.carry)
            case "release":
                self._stages.release(message.release)
            case "look":
                self._spawn(self._offer(message.look))
            case "drained":
                self._drained(message.drained)
            case "lend":
                self._stages.lent_bytes = message.lend.bytes
            case "refused":
                if message.refused.code == VersionMismatch.code:
                    raise VersionMismatch(message.refused.message)
                if message.refused.code in FINAL:
                    raise TrustError(message.refused.message, code=message.refused.code)
                raise PeerError(
                    f"the coordinator at {self._coordinator} refuses this node: {message.refused.message}",
                    code=message.refused.code,
                )
            case "welcome":
                self._welcomed = True
                self._use_beats(message.welcome.heartbeat_ms)
                self._told = ("", float("-inf"))
                log.info("attached to the coordinator at %s", self._coordinator)
                self._spawn(self._seek.attached(self._coordinator))
            case "peers":
                self._spawn(self._seek.told(message.peers))
            case _:
                pass  # a newer coordinator may say more than this release knows; the handshake has agreed to that

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fault of the node daemon", exc_info=error)


def pause_s(attempt: int, refusal: str) -> float:
    """Before the next attempt to reach the coordinator. refusal: the code of the last one; empty: it was none."""
    return UNFIT_S if refusal in UNFIT else RETRY_S[min(attempt, len(RETRY_S) - 1)]


def _term(message: pb.CoordinatorMessage) -> int:
    terms = {"assign": message.assign.term, "link": message.link.term, "carry": message.carry.term}
    return terms.get(message.WhichOneof("message") or "", message.release.term)


def _trouble(coordinator: str, error: grpc.aio.AioRpcError, welcomed: bool) -> str:
    detail = error.details() or str(error.code())
    if welcomed:
        return f"the connection to the coordinator at {coordinator} was lost ({detail})"
    if FOREIGN in detail:
        return (
            f"what answers at {coordinator} is not of the cluster this node joined: "
            "if the coordinator was set up anew, join again with a new token"
        )
    return f"the coordinator at {coordinator} is not reached ({detail})"
