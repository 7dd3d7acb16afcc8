"""The stage process: one slice of a model behind one gRPC port, driven by its daemon over a pipe.

Threads. One compute thread owns the backend and runs jobs in order: frames, loading, a new epoch. The asyncio thread
owns the sockets and the pipe. One bounded queue lies between. Results go back with ``call_soon_threadsafe``.

Commands: ``load`` a slice (once), ``link`` it into an epoch's ring. Events: ``listening``, ``loading``, ``ready``,
``linked``, ``broken`` (a hop ended), ``failed``, ``stats``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psutil

from dwarfstar_engine.errors import DwarfStarError, FrameError
from dwarfstar_engine.model.arch import rules
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import toy
from dwarfstar_engine.stage.llama import Embedder, LlamaOptions, LlamaSlice
from dwarfstar_engine.stage.pipe import ChildPipe
from dwarfstar_engine.stage.worker import Backend, LlamaBackend, ToyBackend, Worker
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.ring import RingReceiver, RingSender
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.stage")

JOBS = 256  # frames waiting for the compute thread; the scheduler keeps a few per stage in flight
STATS_EVERY_S = 1.0
PROGRESS_STEP = 0.05  # of a load; finer news is of no use to anybody


@dataclass(frozen=True, slots=True)
class Job:
    """Work for the compute thread: a frame of an epoch, or a function."""

    epoch: int
    frame: bytes = b""
    call: Callable[[], None] | None = None


class StageProcess:
    """Everything of one stage process. ``trust``: certificates of the node this stage belongs to."""

    def __init__(self, pipe: ChildPipe, name: str, trust: NodeFiles) -> None:
        self._pipe, self._name, self._trust = pipe, name, trust
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.Queue[Job] = queue.Queue(JOBS)
        self._build = local_build()
        self._receiver = RingReceiver(self._build, name, self._on_frame, lambda _: None, self._on_hop_lost)
        self._sender: RingSender | None = None
        self._worker: Worker | None = None
        self._epoch = 0
        self._busy_s = 0.0
        self._frames = 0

    async def run(self, host: str) -> None:
        """Listen and serve until the parent is gone."""
        server = grpc.aio.server(options=channel.SERVER_OPTIONS)
        server.add_generic_rpc_handlers((self._receiver.handler(),))
        port = server.add_secure_port(f"{host}:0", channel.server_credentials(self._trust))
        await server.start()
        threading.Thread(target=self._compute, name="compute", daemon=True).start()
        self._pipe.emit("listening", port=port, pid=os.getpid())
        self._stats_task = asyncio.create_task(self._stats())
        while True:
            command = await self._pipe.command()
            if command["command"] == "load":
                self._jobs.put_nowait(Job(0, call=lambda c=command: self._load(c)))  # type: ignore[misc]
            else:
                await self._link(command)

    def _compute(self) -> None:
        while True:
            job = self._jobs.get()
            if job.call is not None:
                job.call()
            elif job.epoch == self._epoch and self._worker is not None:
                started = self._loop.time()
                try:
                    out = self._worker.run(job.frame)
                except FrameError as error:
                    self._loop.call_soon_threadsafe(self._break, job.epoch, f"a bad frame: {error.message}")
                    continue
                self._busy_s += self._loop.time() - started
                self._frames += 1
                self._loop.call_soon_threadsafe(self._send, job.epoch, out)

    def _send(self, epoch: int, frame: bytes) -> None:
        if epoch == self._epoch and self._sender is not None:
            self._sender.send(frame)

    def _on_frame(self, data: bytes) -> None:
        try:
            self._jobs.put_nowait(Job(self._epoch, data))
        except queue.Full:
            raise FrameError(f"more than {JOBS} frames wait for this stage") from None

    def _on_hop_lost(self, epoch: int, sender: str) -> None:
        self._break(epoch, f"the hop from {sender} ended")

    def _break(self, epoch: int, reason: str) -> None:
        if epoch == self._epoch:
            self._pipe.emit("broken", epoch=epoch, message=reason)

    def _load(self, command: dict[str, Any]) -> None:
        try:
            backend = open_backend(command, self._progress())
        except DwarfStarError as error:
            self._pipe.emit("failed", code=error.code, message=error.message)
            return
        slots = int(command["options"]["slots"])
        self._worker = Worker(backend, slots, WireType(command["wire"]))
        self._pipe.emit("ready", rss=psutil.Process().memory_info().rss)

    def _progress(self) -> Callable[[float], None]:
        told = 0.0

        def tell(share: float) -> None:
            nonlocal told
            if share - told >= PROGRESS_STEP:
                told = share
                self._pipe.emit("loading", share=round(share, 2))

        return tell

    async def _link(self, command: dict[str, Any]) -> None:
        """Join the ring of an epoch: forget all sequences, accept its frames, connect to the next hop."""
        epoch = int(command["epoch"])
        if self._sender is not None:
            await self._sender.close()
        self._epoch = epoch
        reset = asyncio.Event()

        def forget() -> None:
            if self._worker is not None:
                self._worker.reset()
            self._loop.call_soon_threadsafe(reset.set)

        await asyncio.to_thread(self._jobs.put, Job(epoch, call=forget))
        await reset.wait()
        self._receiver.set_epoch(epoch)
        sender = RingSender(lambda reason: self._break(epoch, f"the hop to the next stage ended: {reason}"))
        try:
            await sender.open(
                str(command["next"]), channel.channel_credentials(self._trust), self._build, epoch, self._name
            )
        except DwarfStarError as error:
            self._pipe.emit("broken", epoch=epoch, code=error.code, message=error.message)
            return
        self._sender = sender
        self._pipe.emit("linked", epoch=epoch)

    async def _stats(self) -> None:
        process = psutil.Process()
        while True:
            busy, frames = self._busy_s, self._frames
            await asyncio.sleep(STATS_EVERY_S)
            self._pipe.emit(
                "stats",
                busy=round((self._busy_s - busy) / STATS_EVERY_S, 4),
                frames=self._frames - frames,
                rss=process.memory_info().rss,
            )


def open_backend(command: dict[str, Any], on_progress: Callable[[float], None] | None = None) -> Backend:
    """The backend a ``load`` command asks for. Raises ModelError or StageError."""
    a, b = command["layers"]
    if command["backend"] == "toy":
        layers, delay_s = toy.parse(command["model"])
        return ToyBackend(a, b, layers, delay_s)
    model = read_model(Path(command["path"]))
    arch = rules(model)
    options = LlamaOptions(**command["options"])
    file = slice_file(model, arch, a, b)
    slice_ = LlamaSlice(file, arch, model.n_embd, options, on_progress)
    return LlamaBackend(slice_, Embedder(token_embedding(model, arch)) if file.first else None)


async def _run(pipe: ChildPipe) -> None:
    first = await pipe.command()
    if first.get("cpus") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, first["cpus"])
    await StageProcess(pipe, first["name"], NodeFiles(Path(first["trust"]))).run(first["host"])


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(_run(ChildPipe()))


if __name__ == "__main__":
    main()
