"""The stage processes of a node: which there are, what they are told, and what is said of them.

Theory. A process holds one slice for as long as it lives; asked for that slice again, it is kept and only joins another
ring. One that is asked for something else is another process. A *spare* process waits with all of our code imported and
nothing loaded, which takes about as long as loading a small slice: when stages of a lost node are to be started here,
somebody waits for each of them.

Invariants. There is one process of a slice at most, and MAX_STAGES in all, also while one replaces another, and one
spare: assignments are carried out one at a time, and of an older epoch than the newest none is. Events of a stage that
was replaced are not heard. Stages end with the daemon, however that ends: they read the end of their stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.node.beside import CRASHED, NO_ROOM, RELEASED
from dwarfstar_engine.node.child import Child
from dwarfstar_engine.node.facts import Facts, is_loopback, shown_host
from dwarfstar_engine.node.files import find_file
from dwarfstar_engine.node.room import Held, given_up
from dwarfstar_engine.node.vitals import read_bytes, reported
from dwarfstar_engine.stage.toy import PREFIX as TOY
from dwarfstar_engine.wire.enrol import split_address
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.node")

SILENT_S = 5.0  # a stage tells each second that it lives; one that is silent for so long is stopped or hangs
SPARE_AFTER_S = 3.0  # a stage was started: what streams wait for is over then, mostly
MAX_WORDS = 200  # characters of a dead stage's last words that are passed on
STAGE = "dwarfstar_engine.stage.main"


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How this node works. cpus: cores its stage is pinned to; empty: any. spare: keep a process for the next stage.

    listen: address its stages listen on; empty: the one this machine has towards the coordinator. file: of the model
    served, or of another quantisation of it, where its owner has named one.
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
    spare: bool = True
    file: Path | None = None


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


class Stages:
    """See the module. post, told: say things to the coordinator. spawn: has a task run, and ended with the daemon."""

    def __init__(
        self,
        options: NodeOptions,
        post: Callable[[pb.StageEvent], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        told: Callable[[pb.Carried], None] = lambda _: None,
    ) -> None:
        self._options, self._post, self._spawn, self._told = options, post, spawn, told
        self._stages: list[_Stage] = []  # the one that was asked for longest ago first
        self._spare: Child | None = None
        self._sparing = False  # one is about to be started
        self._assigning = asyncio.Lock()
        self._host = self._coordinator = ""
        self._connection = 0  # to the coordinator; a count
        self._newest = 0  # epoch of the newest assignment of this connection
        self.epoch_seen = 0  # of all
        self.lent_bytes = 0  # as the coordinator says; 0: as this node was started

    # --- what the daemon tells ---

    def attached(self, host: str, coordinator: str) -> None:
        """A connection begins. host: where stages listen."""
        self._host, self._coordinator = host, coordinator
        self._connection += 1
        self._newest = self.lent_bytes = 0
        for stage in self._stages:
            stage.epoch = 0  # of this coordinator none has an assignment yet, and its numbers may begin anew

    def assign(self, assign: pb.Assign) -> None:
        if not assign.standby:
            self._newest = assign.epoch
            self.epoch_seen = max(self.epoch_seen, self._newest)
        self._spawn(self._assign(assign, self._connection))

    def release(self, release: pb.Release) -> None:
        self._spawn(self._release(release))

    @property
    def serving(self) -> bool:
        """Whether a stage is part of the newest epoch."""
        return any(self._needed(stage) for stage in self._stages)

    async def close(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await spare.stop()
        for stage in list(self._stages):
            await self._drop(stage)

    def check(self, now: float, awake: bool) -> None:
        """End stages that are silent; ``_on_exit`` tells. awake: this process was not the one that slept."""
        for stage in self._stages:
            if not awake:
                stage.heard = max(stage.heard, now)
            if now - stage.heard > SILENT_S:
                stage.heard = math.inf
                stage.silent = True
                stage.child.kill()

    def reports(self) -> list[pb.StageReport]:
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

    def _needed(self, stage: _Stage) -> bool:
        return not stage.standby and stage.epoch >= self._newest > 0  # 0: this coordinator has asked for nothing yet

    async def _assign(self, assign: pb.Assign, connection: int) -> None:
        """Hold the slice asked for: keep the process that has it, or start one. connection: over which it was."""
        async with self._assigning:
            if connection != self._connection or (not assign.standby and assign.epoch != self._newest):
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
            lent = self.lent_bytes or facts.override_bytes or facts.usable_bytes
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
        load, (spare, self._spare) = stage.load, (self._spare, None)
        child = spare if spare is not None and spare.alive else Child(STAGE)
        child.on_event = lambda event: self._on_event(stage, event)
        child.on_exit = lambda status: self._on_exit(stage, status)
        stage.child = child
        try:
            if child is not spare:
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

    async def _start_spare(self) -> None:
        await asyncio.sleep(SPARE_AFTER_S)
        self._sparing = False
        async with self._assigning:
            if self._spare is None or not self._spare.alive:
                spare = Child(STAGE)
                with contextlib.suppress(OSError):  # then there is none
                    await spare.start()
                    self._spare = spare

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
            "record": assign.options.record_bytes,
            "fingerprint": assign.model.fingerprint,
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
            options = self._options
            command["path"] = str(find_file(assign.model, options.models, options.file, options.name))
        return command

    def link(self, link: pb.Link) -> None:
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
            keep=link.keep,
        )

    def carry(self, carry: pb.Carry) -> None:
        """Have a stage give its cells, or take those of another node's. The one that gives may be of any epoch."""
        layers = (carry.layers.begin, carry.layers.end)
        stage = next((one for one in self._stages if one.layers == layers and one.ready), None)
        if stage is None or not stage.child.alive:
            gives = any(part.to_hop for part in carry.parts)
            for of in [part.layers for part in carry.parts] if gives else [carry.layers]:
                self._told(pb.Carried(epoch=carry.epoch, layers=of, given=gives, code="stage_gone"))
            return
        stage.child.send(
            command="carry",
            term=carry.term,
            epoch=carry.epoch,
            keep=carry.keep,
            within_s=carry.within_s,
            always=carry.always,
            parts=[
                {
                    "layers": (part.layers.begin, part.layers.end),
                    "to": self._seen_from_here(part.to_hop),
                    "sender": part.sender,
                    "cargo": [(one.slot, one.positions, one.bytes, one.most_bytes, one.replay_s) for one in part.cargo],
                }
                for part in carry.parts
            ],
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
                if self._options.spare and not self._sparing:
                    self._sparing = True
                    self._spawn(self._start_spare())
            case "linked":
                stage.state = pb.STAGE_STATE_LINKED
                stage.link = pb.LinkProfile(**event.get("link", {}))
                names = ("slot", "held", "floor", "recorded")
                slots = [pb.SlotCells(**dict(zip(names, one, strict=True))) for one in event.get("slots", ())]
                self._report(stage, pb.STAGE_STATE_LINKED, epoch=int(event["epoch"]), slots=slots)
            case "carried":
                fields = {name: value for name, value in event.items() if name not in ("event", "layers")}
                begin, end = event["layers"]
                self._told(pb.Carried(layers=pb.Slice(begin=begin, end=end), **fields))
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
        crashed = not stage.silent and status not in (-signal.SIGKILL, -signal.SIGTERM)
        self._report(stage, pb.STAGE_STATE_EXITED, told, CRASHED if crashed else "")

    def _report(
        self,
        stage: _Stage,
        state: pb.StageState.ValueType,
        message: str = "",
        code: str = "",
        share: float = 0.0,
        epoch: int | None = None,
        slots: Sequence[pb.SlotCells] = (),
    ) -> None:
        """epoch: that it speaks of, if another than its newest."""
        self._post(
            pb.StageEvent(
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
                slots=slots,
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
        "head_ms": known.head_ms,
        "together_ms": known.together_ms,
        "batched": known.batched,
        "window": known.window,
    }


def _profile(told: Mapping[str, Any]) -> pb.StageProfile:
    prompt = [pb.RowCost(rows=rows, ms=ms) for rows, ms in told.get("prompt", ())]
    figures = {name: told[name] for name in ("step_ms", "head_ms", "together_ms", "batched", "window") if name in told}
    return pb.StageProfile(prompt=prompt, **figures)
