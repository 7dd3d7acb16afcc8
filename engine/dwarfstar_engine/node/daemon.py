"""The node daemon: lends one machine to a coordinator. It loads no model; it supervises the stage process that does.

It keeps one control stream to the coordinator, opened from this side, and opens it again when it breaks. Over it come
assignments; back go heartbeats and what happens to the stage. A stage that dies is reported at once; whether it is
started again is the coordinator's decision (a new assignment). A stage that is asked for the slice it holds already
keeps its weights and only joins the ring of the new epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psutil

from dwarfstar_engine.errors import DwarfStarError, PeerError, VersionMismatch
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.node.child import Child
from dwarfstar_engine.node.facts import Facts, used_bytes
from dwarfstar_engine.node.source import find_model, fingerprint
from dwarfstar_engine.stage.toy import PREFIX as TOY
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import ControlStub
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.node")

HEARTBEAT_S = 1.0
RETRY_S = (0.2, 0.5, 1.0, 2.0)  # pauses between attempts to reach the coordinator; the last one repeats
OUTBOX = 1024  # messages waiting for the coordinator; more means it has stopped reading, and the stream is broken
STAGE = "dwarfstar_engine.stage.main"


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How this node works. listen: address its stages listen on. cpus: cores its stage is pinned to; empty: any."""

    name: str
    listen: str
    models: Path
    trust: NodeFiles
    facts: Facts
    threads: int
    cpus: tuple[int, ...] = ()
    gpu_layers: int = -1
    split_mode: str = "layer"


@dataclass(slots=True)
class _Stage:
    """The stage process and what it holds. ``load``: the assignment's part that decides its weights."""

    child: Child
    load: dict[str, Any]
    epoch: int
    port: int = 0
    ready: bool = False


class NodeDaemon:
    """One machine's daemon. ``run`` serves a coordinator until cancelled."""

    def __init__(self, node_id: str, options: NodeOptions) -> None:
        self._id, self._options = node_id, options
        self._stage: _Stage | None = None
        self._outbox: asyncio.Queue[pb.NodeMessage] = asyncio.Queue(OUTBOX)
        self._coordinator = ""
        self._stats: dict[str, Any] = {}
        self._assigning = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, coordinator: str) -> None:
        """Attach to the coordinator at host:port, again and again. Raises VersionMismatch: waiting would not help."""
        self._coordinator = coordinator
        attempt = 0
        try:
            while True:
                try:
                    attempt = 0 if await self._attach(coordinator) else attempt + 1
                except VersionMismatch:
                    raise
                except PeerError as error:
                    attempt += 1
                    if attempt <= len(RETRY_S):
                        log.warning("%s", error.message)
                await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
        finally:
            await self._drop_stage()

    async def _attach(self, coordinator: str) -> bool:
        """One life of the control stream. Returns whether it was ever established."""
        self._outbox = asyncio.Queue(OUTBOX)
        self._post(hello=self._hello())
        established = False
        beat = asyncio.create_task(self._beat())
        try:
            async with channel.open_channel(coordinator, channel.channel_credentials(self._options.trust)) as link:
                call = ControlStub(link).Attach(self._messages())
                async for message in call:
                    established = True
                    self._handle(message)
        except grpc.aio.AioRpcError as error:
            raise PeerError(f"the coordinator at {coordinator} is not reached: {error.details()}") from None
        finally:
            beat.cancel()
        return established

    def _hello(self) -> pb.NodeHello:
        build, facts = local_build(), self._options.facts
        return pb.NodeHello(
            node_id=self._id,
            name=self._options.name,
            build=pb.Build(
                protocol=build.protocol, llama_build=build.llama_build, version=build.version, abi=build.abi
            ),
            device=pb.Device(
                kind=facts.kind,
                description=facts.device,
                memory_total_bytes=facts.memory_bytes,
                memory_usable_bytes=facts.usable_bytes,
                effective_vram_bytes=facts.override_bytes,
                threads=self._options.threads,
            ),
        )

    async def _messages(self) -> AsyncIterator[pb.NodeMessage]:
        outbox = self._outbox
        while True:
            yield await outbox.get()

    def _post(self, **what: Any) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # a coordinator that does not read will miss heartbeats and know
            self._outbox.put_nowait(pb.NodeMessage(**what))

    async def _beat(self) -> None:
        for number in itertools.count(1):
            await asyncio.sleep(HEARTBEAT_S)
            self._post(
                heartbeat=pb.Heartbeat(
                    number=number,
                    memory_used_bytes=used_bytes(),
                    load=psutil.cpu_percent() / 100,
                    stages=self._stage_reports(),
                )
            )

    def _stage_reports(self) -> list[pb.StageReport]:
        if self._stage is None or not self._stats:
            return []
        stats = self._stats
        return [
            pb.StageReport(epoch=self._stage.epoch, busy=stats["busy"], rss_bytes=stats["rss"], frames=stats["frames"])
        ]

    def _handle(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("message"):
            case "assign":
                self._spawn(self._assign(message.assign))
            case "link":
                self._link(message.link)
            case "release":
                self._spawn(self._drop_stage())
            case "refused":
                if message.refused.code == VersionMismatch.code:
                    raise VersionMismatch(message.refused.message)
                raise PeerError(message.refused.message, code=message.refused.code)
            case "welcome":
                log.info("joined the coordinator at %s", self._coordinator)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _assign(self, assign: pb.Assign) -> None:
        """Hold the slice asked for: keep the process that has it, or replace it."""
        async with self._assigning:
            try:
                load = self._load_command(assign)
            except (DwarfStarError, OSError) as error:
                self._report(assign.epoch, pb.STAGE_STATE_FAILED, str(error), getattr(error, "code", "stage_failed"))
                return
            stage = self._stage
            if stage is not None and stage.child.alive and stage.load == load:
                stage.epoch = assign.epoch
                if stage.ready:
                    self._report(assign.epoch, pb.STAGE_STATE_READY)
                return
            await self._drop_stage()
            child = Child(STAGE, self._on_event, self._on_exit)
            self._stage = _Stage(child, load, assign.epoch)
            try:
                await child.start()
            except OSError as error:
                self._report(
                    assign.epoch, pb.STAGE_STATE_FAILED, f"the stage process cannot be started: {error.strerror}"
                )
                return
            options = self._options
            child.send(name=options.name, host=options.listen, trust=str(options.trust.folder), cpus=list(options.cpus))
            child.send(command="load", **load)
            self._report(assign.epoch, pb.STAGE_STATE_LOADING)

    def _load_command(self, assign: pb.Assign) -> dict[str, Any]:
        """The part of an assignment that decides what is loaded. Raises ModelError if this node has no such file."""
        command: dict[str, Any] = {
            "backend": "llama",
            "layers": [assign.layer_begin, assign.layer_end],
            "model": assign.model.name,
            "wire": assign.options.wire_type,
            "options": {
                "cells": assign.options.context * assign.options.slots,
                "slots": assign.options.slots,
                "batch": assign.options.batch,
                "threads": self._options.threads,
                "gpu_layers": self._options.gpu_layers,
                "split_mode": self._options.split_mode,
                "flash_attention": assign.options.flash_attention,
                "kv_type": assign.options.kv_type,
            },
        }
        if assign.model.name.startswith(TOY):
            command["backend"] = "toy"
        else:
            command["path"] = str(self._find(assign.model))
        return command

    def _find(self, wanted: pb.ModelRef) -> Path:
        hint = Path(wanted.path_hint)
        path = hint if hint.is_file() else find_model(wanted.name, self._options.models)
        model = read_model(path)
        if fingerprint(model) != wanted.fingerprint:
            raise DwarfStarError(
                f"{path} on {self._options.name} is not the file the coordinator serves: copy that one here",
                code="model_differs",
            )
        return path

    def _link(self, link: pb.Link) -> None:
        stage = self._stage
        if stage is None or stage.epoch != link.epoch or not stage.child.alive:
            self._report(link.epoch, pb.STAGE_STATE_FAILED, "the stage was gone when the ring was closed")
            return
        stage.child.send(command="link", epoch=link.epoch, next=link.next_hop or self._coordinator)

    def _on_event(self, event: dict[str, Any]) -> None:
        stage = self._stage
        if stage is None:
            return
        match event["event"]:
            case "listening":
                stage.port = int(event["port"])
            case "loading":
                self._report(stage.epoch, pb.STAGE_STATE_LOADING, share=float(event["share"]))
            case "ready":
                stage.ready = True
                self._report(stage.epoch, pb.STAGE_STATE_READY)
            case "linked":
                self._report(int(event["epoch"]), pb.STAGE_STATE_LINKED)
            case "broken":
                self._report(int(event["epoch"]), pb.STAGE_STATE_BROKEN, event["message"], event.get("code", ""))
            case "failed":
                self._report(stage.epoch, pb.STAGE_STATE_FAILED, event["message"], event["code"])
            case "stats":
                self._stats = event

    def _on_exit(self, status: int) -> None:
        stage = self._stage
        if stage is None:
            return
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        words = f": {stage.child.last_words[-1]}" if stage.child.last_words else ""
        log.error("the stage process %d ended with %s%s", stage.child.pid, cause, words)
        self._stage = None
        self._report(
            stage.epoch, pb.STAGE_STATE_EXITED, f"the stage process on {self._options.name} ended with {cause}"
        )

    def _report(
        self, epoch: int, state: pb.StageState.ValueType, message: str = "", code: str = "", share: float = 0.0
    ) -> None:
        stage = self._stage
        self._post(
            stage_event=pb.StageEvent(
                epoch=epoch,
                state=state,
                detail=message,
                code=code,
                share=share,
                port=stage.port if stage else 0,
                pid=stage.child.pid if stage else 0,
            )
        )

    async def _drop_stage(self) -> None:
        stage, self._stage = self._stage, None
        if stage is not None:
            await stage.child.stop()
