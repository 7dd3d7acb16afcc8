"""The node daemon: lends one machine to a coordinator. It loads no model; it supervises the stage process that does.

It keeps one control stream to the coordinator, opened from this side, and opens it again when it breaks, for as long as
it takes. Over it come assignments; back go heartbeats and what happens to the stage. A stage that dies is reported at
once; whether it is started again is the coordinator's decision (a new assignment). A slice that is held already keeps
its weights and only joins the ring of the new epoch.

There may be several stages: those that the newest epoch needs, and others that wait, for a plan to come or for the
loss of another node (``room`` says which fit beside each other).

While the coordinator is away the stage and its weights stay: a coordinator that returns serves again within moments,
where loading may take minutes. Nothing that happens meanwhile needs to be told afterwards, because a coordinator begins
with an assignment, which is answered with the stage's state of that moment. The memory comes back when the daemon ends.

Invariants. There is one process of a slice at most, and MAX_STAGES in all, also while one replaces another:
assignments are carried out one at a time, and of an older epoch than the newest none is. Events of a stage that was
replaced are not heard. Stages end with the daemon, however that ends: they read the end of their stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import secrets
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from dwarfstar_engine.errors import DwarfStarError, ModelError, PeerError, TrustError, VersionMismatch
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.node import renewal
from dwarfstar_engine.node.beside import NO_ROOM, RELEASED
from dwarfstar_engine.node.child import Child
from dwarfstar_engine.node.discovery import FOREIGN, Fixed, Seek
from dwarfstar_engine.node.facts import Facts, interfaces, is_any, is_loopback, local_host, shown_host
from dwarfstar_engine.node.room import Held, given_up
from dwarfstar_engine.node.roster import REMOVED
from dwarfstar_engine.node.source import DEMO, find_model, fingerprint
from dwarfstar_engine.node.vitals import Vitals, read_bytes, reported
from dwarfstar_engine.stage.toy import PREFIX as TOY
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.enrol import split_address
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.trust import NodeFiles, check_identity, utc_now

log = logging.getLogger("dwarfstar.node")

HEARTBEAT_S = 1.0  # until the coordinator has said how often; it bounds what it may say, too:
LEAST_BEAT_S, MOST_BEAT_S = 0.05, 10.0
SILENT_S = 5.0  # a stage tells each second that it lives; one that is silent for so long is stopped or hangs
RETRY_S = (0.2, 0.5, 1.0, 2.0)  # pauses between attempts to reach the coordinator; the last one repeats
STEADY_S = 10.0  # a connection that lived so long was sound: the pauses begin anew
ANSWER_S = 10.0  # until a coordinator that was reached has welcomed or refused us
RETELL_S = 600.0  # the same trouble with the coordinator is worth a line in the log this often
OUTBOX = 1024  # messages waiting for the coordinator; more means it has stopped reading, and the stream is broken
MAX_WORDS = 200  # characters of a dead stage's last words that are passed on
STAGE = "dwarfstar_engine.stage.main"
FINAL = (REMOVED, "identity_copied")  # refusals after which this node ends: trying on would change nothing


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How this node works. cpus: cores its stage is pinned to; empty: any.

    listen: address its stages listen on; empty: the one this machine has towards the coordinator.
    """

    name: str
    listen: str
    models: Path
    trust: NodeFiles
    facts: Facts
    threads: int
    cpus: tuple[int, ...] = ()
    gpu_layers: int = -1
    split_mode: str = "layer"


@dataclass(slots=True, eq=False)
class _Stage:
    """A stage process and what it holds. ``load``: what it was told, which only a new process could do otherwise.

    asked: the assignment as far as it decides that. standby: it waits. need_bytes: it takes; 0: not known.
    """

    load: dict[str, Any]
    epoch: int
    asked: bytes = b""
    standby: bool = False
    need_bytes: int = 0
    pid: int = 0
    child: Child = field(init=False)
    port: int = 0
    state: pb.StageState.ValueType = pb.STAGE_STATE_LOADING
    ready: bool = False  # its weights are loaded
    profile: pb.StageProfile = field(default_factory=pb.StageProfile)
    link: pb.LinkProfile = field(default_factory=pb.LinkProfile)
    stats: dict[str, Any] = field(default_factory=dict)
    frames: int = 0
    heard: float = math.inf  # the loop's time of its last event, once it is loaded
    silent: bool = False  # it was ended for that

    @property
    def layers(self) -> tuple[int, int]:
        begin, end = self.load["layers"]
        return begin, end

    @property
    def slice(self) -> pb.Slice:
        return pb.Slice(begin=self.layers[0], end=self.layers[1])


class NodeDaemon:
    """One machine's daemon. ``run`` serves a coordinator until cancelled."""

    def __init__(self, node_id: str, options: NodeOptions) -> None:
        self._id, self._options = node_id, options
        self._stages: list[_Stage] = []  # the one that was asked for longest ago first
        self._instance = secrets.token_hex(8)
        self._outbox: asyncio.Queue[pb.NodeMessage | None] = asyncio.Queue(OUTBOX)  # None: its connection has ended
        self._coordinator = ""
        self._seek: Seek = Fixed("")
        self._host = options.listen
        self._welcomed = False
        self._leaving: asyncio.Event | None = None  # set: drained
        self._epoch_seen = 0
        self.control_port = 0  # where it would be a coordinator; 0: it would not
        self._newest = 0  # epoch of the newest assignment of this connection
        self._assigning = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lent_bytes = 0  # as the coordinator says; 0: as this node was started
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
                began, self._welcomed = loop.time(), False
                try:
                    await self._while_it_leads(coordinator)
                    self._tell(f"the coordinator at {coordinator} ended the connection")
                except VersionMismatch:
                    raise
                except PeerError as error:
                    if error.code in FINAL:
                        raise
                    self._tell(error.message)
                steady = self._welcomed and loop.time() - began > STEADY_S
                attempt = 0 if steady else attempt + 1
                await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for stage in list(self._stages):
                await self._drop(stage)

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
        self._outbox, self._newest, self._lent_bytes = asyncio.Queue(OUTBOX), 0, 0
        self._beat_s = HEARTBEAT_S
        for stage in self._stages:
            stage.epoch = 0  # of this coordinator none has an assignment yet, and its numbers may begin anew
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
            epoch_seen=self._epoch_seen,
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
                await asyncio.wait_for(self._beats_changed.wait(), beat_s)
                self._beats_changed.clear()
            awake, last = loop.time() - last < beat_s + SILENT_S / 2, loop.time()
            self._check_stages(last, awake)
            self._post(heartbeat=self._vitals.heartbeat(number, self._stage_reports()))

    def _use_beats(self, told_ms: int) -> None:
        beat_s = min(max(told_ms / 1000, LEAST_BEAT_S), MOST_BEAT_S) if told_ms else HEARTBEAT_S
        if beat_s != self._beat_s:
            self._beat_s = beat_s
            self._beats_changed.set()

    def _check_stages(self, now: float, awake: bool) -> None:
        """End stages that are silent; ``_on_exit`` tells. awake: this process was not the one that slept."""
        for stage in self._stages:
            if not awake:
                stage.heard = max(stage.heard, now)
            if now - stage.heard > SILENT_S:
                stage.heard = math.inf
                stage.silent = True
                stage.child.kill()

    def _stage_reports(self) -> list[pb.StageReport]:
        return [
            pb.StageReport(
                epoch=stage.epoch,
                state=stage.state,
                **reported(stage.stats),
                frames=stage.frames,
                layers=stage.slice,
            )
            for stage in self._stages
        ]

    async def leave(self, within_s: float) -> None:
        """Ask the coordinator to move this node's layers away; returns when it has, after ``within_s`` at most, or at
        once if there are none."""
        if not self._welcomed or not any(self._needed(stage) for stage in self._stages):
            return
        log.info("this node is asked to end: its layers move to others first, within %.0f s", within_s)
        self._leaving = asyncio.Event()
        self._post(leave_wish=pb.LeaveWish(within_s=within_s))
        try:
            await asyncio.wait_for(self._leaving.wait(), within_s)
        except TimeoutError:
            log.warning("its layers were not moved within %.0f s: it leaves", within_s)
        self._post(leave=pb.Leave(reason="its owner ends it"))

    def _drained(self, told: pb.Drained) -> None:
        if told.code:
            log.warning("this node's layers cannot be moved: %s", told.message)
            return
        log.info("this node is drained: it holds no layers and may leave")
        if self._leaving is not None:
            self._leaving.set()

    def _handle(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("message"):
            case "assign" | "link" | "release" if not self._seek.obeys(_term(message)):
                raise PeerError(f"the coordinator at {self._coordinator} leads no more")
            case "assign":
                if not message.assign.standby:
                    self._newest = message.assign.epoch
                    self._epoch_seen = max(self._epoch_seen, self._newest)
                self._spawn(self._assign(message.assign, self._outbox))
            case "link":
                self._link(message.link)
            case "release":
                self._spawn(self._release(message.release))
            case "drained":
                self._drained(message.drained)
            case "lend":
                self._lent_bytes = message.lend.bytes
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

    def _needed(self, stage: _Stage) -> bool:
        return not stage.standby and stage.epoch >= self._newest > 0  # 0: this coordinator has asked for nothing yet

    async def _assign(self, assign: pb.Assign, outbox: asyncio.Queue[pb.NodeMessage | None]) -> None:
        """Hold the slice asked for: keep the process that has it, or start one. outbox: of who asked."""
        async with self._assigning:
            if outbox is not self._outbox or (not assign.standby and assign.epoch != self._newest):
                return  # a newer one waits behind us, or the coordinator that sent it is gone
            stage = await self._find_stage(assign)
            if stage is None:
                return
            if stage in self._stages:
                if assign.standby and self._needed(stage):
                    return  # it does more than it is asked to
                stage.epoch, stage.standby = assign.epoch, assign.standby
                stage.state = pb.STAGE_STATE_READY if stage.ready else pb.STAGE_STATE_LOADING
                self._stages.sort(key=lambda one: one is stage)
                self._report(stage, stage.state)
                return
            held = [Held(one.need_bytes, self._needed(one)) for one in self._stages]
            facts = self._options.facts
            lent = self._lent_bytes or facts.override_bytes or facts.usable_bytes
            victims = given_up(held, stage.need_bytes, lent, standby=stage.standby)
            if victims is None:
                message = f"{self._options.name} has no room for layers {stage.layers[0]}–{stage.layers[1] - 1} as well"
                self._report(stage, pb.STAGE_STATE_FAILED, message, NO_ROOM)
                return
            for victim in [self._stages[index] for index in victims]:
                await self._drop(victim)
                self._report(victim, pb.STAGE_STATE_EXITED, "its place was needed", RELEASED)
            await self._start_stage(stage, _known(assign))

    async def _find_stage(self, assign: pb.Assign) -> _Stage | None:
        """The stage that lives and is what is asked for, or a new one that is not started; None: that was refused."""
        bare = pb.Assign(
            model=assign.model, layer_begin=assign.layer_begin, layer_end=assign.layer_end, options=assign.options
        )
        asked = self._host.encode() + bare.SerializeToString(deterministic=True)
        for stage in self._stages:
            if stage.asked == asked and stage.child.alive:
                return stage  # what a file's directory says need not be read again
        try:
            load = await asyncio.to_thread(self._load_command, assign)
        except (DwarfStarError, OSError) as error:
            refused = _Stage({"layers": [assign.layer_begin, assign.layer_end]}, assign.epoch, standby=assign.standby)
            code = getattr(error, "code", "stage_failed")
            self._report(refused, pb.STAGE_STATE_FAILED, str(error), code)
            return None
        for stage in self._stages:
            if stage.load == load and stage.child.alive:
                stage.asked = asked
                return stage
        return _Stage(load, assign.epoch, asked, assign.standby, assign.bytes)

    async def _start_stage(self, stage: _Stage, known: dict[str, Any] | None) -> None:
        load = stage.load
        child = Child(STAGE, lambda event: self._on_event(stage, event), lambda status: self._on_exit(stage, status))
        stage.child = child
        try:
            await child.start()
        except OSError as error:
            words = f"the stage process cannot be started: {error.strerror}"
            self._report(stage, pb.STAGE_STATE_FAILED, words)
            return
        stage.pid = child.pid
        self._stages.append(stage)
        options = self._options
        child.send(name=options.name, host=load["host"], trust=str(options.trust.folder), cpus=list(options.cpus))
        child.send(command="load", **load, known=known)
        self._report(stage, pb.STAGE_STATE_LOADING)

    async def _release(self, release: pb.Release) -> None:
        async with self._assigning:
            keep = [(one.begin, one.end) for one in release.keep]
            if release.rest:
                self._newest = max(self._newest, release.epoch)  # an epoch that went on without this node
            named = (release.layers.begin, release.layers.end) if release.HasField("layers") else None
            for stage in list(self._stages):
                if stage.epoch > release.epoch:
                    continue
                if release.rest:
                    ended = not self._needed(stage) and stage.layers not in keep
                else:
                    ended = named is None or stage.layers == named
                if ended:
                    await self._drop(stage)
                    self._report(stage, pb.STAGE_STATE_EXITED, "it was released", RELEASED)

    def _load_command(self, assign: pb.Assign) -> dict[str, Any]:
        """The part of an assignment that decides what is loaded. Raises ModelError if this node has no such file.

        It reads files: call it in a thread.
        """
        command: dict[str, Any] = {
            "backend": "llama",
            "host": shown_host(self._host),
            "layers": [assign.layer_begin, assign.layer_end],
            "model": assign.model.name,
            "wire": assign.options.wire_type,
            "ends": list(assign.options.ends),
            "options": {
                "context": assign.options.context,
                "slots": assign.options.slots,
                "batch": assign.options.batch,
                "threads": self._options.threads,
                "gpu_layers": self._options.gpu_layers,
                "split_mode": self._options.split_mode,
                "flash_attention": assign.options.flash_attention,
                "kv_type": assign.options.kv_type,
                "exact": assign.options.exact,
            },
        }
        if assign.model.name.startswith(TOY):
            command["backend"] = "toy"
        else:
            command["path"] = str(self._find(assign.model))
        return command

    def _find(self, wanted: pb.ModelRef) -> Path:
        """This machine's file of a model: of several of its name, the one that the coordinator serves.

        Looked for in the models folder, in the demo's package, and last where the coordinator found its own.
        """
        candidates = [Path(wanted.path_hint)] if Path(wanted.path_hint).is_file() else []
        for name in (DEMO, wanted.name):
            with contextlib.suppress(ModelError):  # not there
                path = find_model(name, self._options.models)
                if name == wanted.name or path.stem == wanted.name:
                    candidates.insert(0, path)
        for path in candidates:
            if fingerprint(read_model(path)) == wanted.fingerprint:
                return path
        if candidates:
            raise DwarfStarError(
                f"{candidates[0]} on {self._options.name} is not the file the coordinator serves: copy that one here",
                code="model_differs",
            )
        raise ModelError(
            f"{self._options.name} has no file of the model {wanted.name}: copy it into {self._options.models} there",
            code="model_not_found",
        )

    def _link(self, link: pb.Link) -> None:
        layers = (link.layers.begin, link.layers.end)
        stage = next((one for one in self._stages if one.epoch == link.epoch and one.layers == layers), None)
        if stage is None or not stage.child.alive:
            gone = stage or _Stage({"layers": list(layers)}, link.epoch)
            self._report(gone, pb.STAGE_STATE_FAILED, "the stage was gone when the ring was closed")
            return
        stage.child.send(
            command="link",
            epoch=link.epoch,
            next=self._seen_from_here(link.next_hop) or self._coordinator,
            feed=self._seen_from_here(link.feed_hop),
            senders=list(link.senders),
        )

    def _seen_from_here(self, hop: str) -> str:
        """Where a hop is reached: a loopback address is one of the coordinator's machine, which has another for us."""
        if not hop:
            return ""
        host, port = split_address(hop)
        return f"{shown_host(split_address(self._coordinator)[0])}:{port}" if is_loopback(host) else hop

    def _on_event(self, stage: _Stage, event: dict[str, Any]) -> None:
        if stage not in self._stages:
            return
        if stage.ready:
            stage.heard = asyncio.get_running_loop().time()
        match event["event"]:
            case "listening":
                stage.port = int(event["port"])
            case "loading":
                self._report(stage, pb.STAGE_STATE_LOADING, share=float(event["share"]))
            case "ready":
                stage.ready, stage.state = True, pb.STAGE_STATE_READY
                stage.profile = _profile(event.get("profile", {}))
                self._report(stage, pb.STAGE_STATE_READY)
            case "linked":
                stage.state = pb.STAGE_STATE_LINKED
                stage.link = pb.LinkProfile(**event.get("link", {}))
                self._report(stage, pb.STAGE_STATE_LINKED, epoch=int(event["epoch"]))
            case "broken":
                stage.state = pb.STAGE_STATE_BROKEN
                code = event.get("code", "")
                self._report(stage, pb.STAGE_STATE_BROKEN, event["message"], code, epoch=int(event["epoch"]))
            case "failed":
                self._report(stage, pb.STAGE_STATE_FAILED, event["message"], event["code"])
                self._spawn(self._discard(stage))
            case "stats":
                stage.stats = event
                stage.frames += int(event["frames"])

    async def _discard(self, stage: _Stage) -> None:
        """End a stage that could not load: asked again for the same slice, a new process tries again."""
        async with self._assigning:
            if stage in self._stages:
                await self._drop(stage)

    def _on_exit(self, stage: _Stage, status: int) -> None:
        if stage not in self._stages:
            return
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        if stage.silent:
            cause += f", as it had not been heard of for {SILENT_S:.0f} s"
        words = f": {stage.child.last_words[-1][:MAX_WORDS]}" if stage.child.last_words else ""
        log.error("the stage process %d ended with %s%s", stage.child.pid, cause, words)
        self._stages.remove(stage)
        told = f"the stage process on {self._options.name} ended with {cause}{words}"
        self._report(stage, pb.STAGE_STATE_EXITED, told)

    def _report(
        self,
        stage: _Stage,
        state: pb.StageState.ValueType,
        message: str = "",
        code: str = "",
        share: float = 0.0,
        epoch: int | None = None,
    ) -> None:
        """epoch: that it speaks of, if another than its newest."""
        self._post(
            stage_event=pb.StageEvent(
                epoch=stage.epoch if epoch is None else epoch,
                state=state,
                detail=message,
                code=code,
                share=share,
                profile=stage.profile if state == pb.STAGE_STATE_READY else None,
                link=stage.link if state == pb.STAGE_STATE_LINKED else None,
                port=stage.port,
                pid=stage.pid,
                read_bytes=read_bytes(stage.pid) if state == pb.STAGE_STATE_READY else 0,
                layers=stage.slice,
                standby=stage.standby,
            )
        )

    async def _drop(self, stage: _Stage) -> None:
        self._stages.remove(stage)
        await stage.child.stop()


def _known(assign: pb.Assign) -> dict[str, Any] | None:
    """The profile that the stage is to take as its own, as ``stage.measure.Profile`` has it."""
    if not assign.HasField("known"):
        return None
    known = assign.known
    return {
        "prompt": [(cost.rows, cost.ms) for cost in known.prompt],
        "step_ms": known.step_ms,
        "together_ms": known.together_ms,
        "batched": known.batched,
        "window": known.window,
    }


def _term(message: pb.CoordinatorMessage) -> int:
    return {"assign": message.assign.term, "link": message.link.term}.get(
        message.WhichOneof("message") or "", message.release.term
    )


def _profile(told: Mapping[str, Any]) -> pb.StageProfile:
    prompt = [pb.RowCost(rows=rows, ms=ms) for rows, ms in told.get("prompt", ())]
    figures = {name: told[name] for name in ("step_ms", "together_ms", "batched", "window") if name in told}
    return pb.StageProfile(prompt=prompt, **figures)


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
