"""The stage process: one slice of a model behind one gRPC port, driven by its daemon over a pipe.

Threads. The asyncio thread owns the sockets and the pipe and runs frames of generated tokens where they arrive: a
thread of their own was measured and costs two hand-overs a frame (about 80 µs). While such a frame runs nothing is
read, so gRPC's flow control holds the sender back; keepalive is answered by gRPC's own threads. Prompts have a thread
of their own, as they take long: their frames wait in a bounded queue, run in order, and let the others go before them,
also in the middle (``native/src/gate.h``). Loading comes before any frame and has a thread too.

A stage that goes from one ring to the next keeps what its slots hold, and the record of what it sent, if it is told to:
then it says what that is. Its old hops end, the new ones open and its slots are looked at or emptied at the same time.

Between two rings it may give what its slots hold to the processes that have its layers in the next one, or take it from
those that had them (``stage/carry.py``). One that took cells of an epoch counts as one that was in its ring.

Commands: ``load`` a slice (once), ``carry`` cells, ``link`` it into an epoch's ring. Events: ``listening``,
``loading``, ``ready``, ``carried``, ``linked``, ``broken`` (a hop ended), ``failed``, ``stats``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import psutil

from dwarfstar_engine.errors import DwarfStarError, FrameError
from dwarfstar_engine.model.arch import rules
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import carry, toy
from dwarfstar_engine.stage.llama import Embedder, LlamaOptions, LlamaSlice
from dwarfstar_engine.stage.measure import Profile
from dwarfstar_engine.stage.outlet import Outlet
from dwarfstar_engine.stage.pipe import STAGE_NAME, ChildPipe
from dwarfstar_engine.stage.record import Record
from dwarfstar_engine.stage.worker import Backend, Counted, LlamaBackend, ToyBackend, Worker
from dwarfstar_engine.wire import channel, frames, loop
from dwarfstar_engine.wire.carry import CarryReceiver, Written
from dwarfstar_engine.wire.door import Door, Watch
from dwarfstar_engine.wire.frames import Resend
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.link import Link, choose_wire
from dwarfstar_engine.wire.ring import RingReceiver, RingSender, SpareChannels
from dwarfstar_engine.wire.trust import NodeFiles

_T = TypeVar("_T")

log = logging.getLogger("dwarfstar.stage")

STATS_EVERY_S = 1.0
PROGRESS_STEP = 0.05  # of a load; finer news is of no use to anybody
PROMPT_FRAMES = 256  # waiting to be run; the coordinator keeps a few in flight, so more are a fault
SOCKET_TURNS = 3  # of the event loop, until a message that came is read or a write is known to be over
PROMPT_NICE = 5  # the thread that reads prompts yields the core to the one that answers the network


class StageProcess:
    """Everything of one stage process. ``trust``: certificates of the node this stage belongs to."""

    def __init__(self, pipe: ChildPipe, name: str, trust: NodeFiles) -> None:
        self._pipe, self._name, self._trust = pipe, name, trust
        self._loop = asyncio.get_running_loop()
        self._build = local_build()
        self._receiver = RingReceiver(self._build, name, self._on_frame, lambda _: None, self._on_hop_lost)
        self._carried = CarryReceiver(self._build, name)
        self._loaded: dict[str, Any] = {}  # as it was told
        self._outlet: Outlet | None = None
        self._feeder: RingSender | None = None  # of the last stage, to the first one
        self._worker: Worker | None = None
        self._record: Record | None = None
        self._epoch = self._since = 0  # since: the epoch in which its slots were emptied
        self._emptying = ThreadPoolExecutor(1, "slots")  # one thread: so links do it one after the other
        self._closing: set[asyncio.Future[None]] = set()  # hops of rings that are gone
        self._spare = SpareChannels()
        self._taken = asyncio.Event()  # a prompt's frame was run
        self._wire = 0  # as set; 0: by the link
        self._frames = 0
        self._prompts: queue.Queue[tuple[int, bytes]] = queue.Queue(PROMPT_FRAMES)
        self._reading = threading.Lock()  # held while a prompt's frame runs
        threading.Thread(target=self._read_prompts, name="prompts", daemon=True).start()

    async def run(self, host: str) -> None:
        """Listen and serve until the parent is gone."""
        watch = Watch()
        server = grpc.aio.server(options=channel.SERVER_OPTIONS, interceptors=(Door(None, watch.called),))
        server.add_generic_rpc_handlers((self._receiver.handler(), self._carried.handler()))
        port = server.add_secure_port(f"{host}:0", channel.server_credentials(self._trust, watch.handshake))
        watch.watch(port)
        await server.start()
        self._pipe.emit("listening", port=port, pid=os.getpid())
        threading.Thread(target=self._stats, name="stats", daemon=True).start()
        work: asyncio.Task[None] | None = None
        while True:
            command = await self._pipe.command()  # always awaited: its end is how we learn that the parent is gone
            if work is not None and command["command"] != "load":
                work.cancel()  # an older link, perhaps still trying to connect; loading is over before the first one
            work = asyncio.create_task(self._obey(command))
            work.add_done_callback(_end_on_fault)

    async def _obey(self, command: dict[str, Any]) -> None:
        match command["command"]:
            case "load":
                await asyncio.to_thread(self._load, command)
            case "carry":
                await self._carry(command)
            case _:
                await self._link(command)

    async def _on_frame(self, data: bytes) -> None:
        if self._worker is None or self._outlet is None:
            raise FrameError("this stage is not part of a ring yet")
        self._frames += 1
        if frames.is_prompt(data):
            await self._on_prompt(data)
            return
        outlet, feeder = self._outlet, self._feeder
        out = self._worker.run(data)
        asked = self._worker.take_asked(False)
        if feed := self._worker.take_feed():  # first: the ring waits for it
            outlet.pass_on_later(out)
            if feeder is not None:
                feeder.send(feed)
                await feeder.flush()
            else:
                self._feed_self(self._epoch, feed)
        else:
            outlet.pass_on(data, out, asked)
        await outlet.flush()  # of this ring: ``_outlet`` may be another one's by now

    async def _on_prompt(self, data: bytes) -> None:
        epoch = self._epoch
        while frames.is_replay(data) and self._prompts.full():  # the stage before sends as many as there is room for
            self._taken.clear()
            await self._taken.wait()
        if epoch == self._epoch:
            try:
                self._prompts.put_nowait((epoch, data))
            except queue.Full:
                raise FrameError(f"{PROMPT_FRAMES} frames of prompts wait already") from None

    def _read_prompts(self) -> None:
        """The thread of prompts."""
        with contextlib.suppress(OSError, AttributeError):  # a kindness, not a need
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PROMPT_NICE)
        while True:
            epoch, data = self._prompts.get()
            try:
                with self._reading:
                    if epoch != self._epoch or self._worker is None:
                        continue  # of a ring that is gone
                    out, asked = self._worker.run(data), self._worker.take_asked(True)
                self._loop.call_soon_threadsafe(self._send_on, epoch, data, out, asked)
            except FrameError as error:
                self._loop.call_soon_threadsafe(self._break, epoch, error.message)
            except BaseException:
                log.exception("a prompt's frame failed")
                os._exit(1)

    def _send_on(self, epoch: int, data: bytes, out: bytes, asked: list[Resend]) -> None:
        self._taken.set()
        if self._outlet is not None and epoch == self._epoch:
            self._outlet.pass_on(data, out, asked)
            self._outlet.flush_soon()

    def _feed_self(self, epoch: int, feed: bytes) -> None:
        """The only stage of a ring goes on by itself, after what waits on its sockets. It never rests: a message would
        take a frame's time for each turn of the event loop that it needs."""
        self._feeding = self._loop.create_task(self._go_on(epoch, feed))

    async def _go_on(self, epoch: int, feed: bytes) -> None:
        if frames.count_rows(feed) > 1:  # else that many turns would be felt
            for _ in range(SOCKET_TURNS):
                await asyncio.sleep(0)
        if epoch == self._epoch:
            try:
                await self._on_frame(feed)
            except FrameError as error:
                self._break(epoch, error.message)

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
        except OSError as error:
            self._pipe.emit("failed", code="model_file_invalid", message=f"{command['path']}: {error.strerror}")
            return
        self._loaded = command
        slots = int(command["options"]["slots"])
        self._wire = int(command["wire"])
        worker = Worker(backend, slots, WireType(self._wire or WireType.F32), command["ends"])
        known = command["known"]
        profile = worker.measure(Profile(**known) if known else None)
        budget = int(command["record"])
        self._record = Record(budget) if budget and not backend.last else None
        self._worker = worker
        gc.collect()
        gc.freeze()  # what is here now stays: collections between frames need not walk it
        self._pipe.emit("ready", rss=psutil.Process().memory_info().rss, profile=asdict(profile))

    def _progress(self) -> Callable[[float], None]:
        told = 0.0

        def tell(share: float) -> None:
            nonlocal told
            if share - told >= PROGRESS_STEP:
                told = share
                self._pipe.emit("loading", share=round(share, 2))

        return tell

    async def _link(self, command: dict[str, Any]) -> None:
        """Join the ring of an epoch: keep its slots or empty them, accept its frames, connect to the next hop.

        keep: the epoch whose slots are to be kept; this stage was in its ring, and has not been emptied since. 0: none.
        """
        epoch = int(command["epoch"])
        keeps = self._has(int(command["keep"]))
        if not keeps:
            self._since = epoch
        self._receiver.set_epoch(epoch, set(command["senders"]))  # from here on no old frame is run
        closing = self._leave_ring(epoch)
        told = "the hop to the next stage ended"
        sender = RingSender(lambda reason: self._break(epoch, f"{told}: {reason}"), self._spare)
        work = (
            asyncio.ensure_future(self._slots(keeps)),
            asyncio.ensure_future(self._open(sender, epoch, str(command["next"]))),
            asyncio.ensure_future(self._open_feeder(epoch, str(command["feed"]))),
        )
        try:
            slots, link, feeder = await asyncio.gather(*work)
            await asyncio.shield(closing)
        except BaseException as error:  # also a newer link, which knows nothing of these hops
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            opened = work[2].result() if not work[2].cancelled() and work[2].exception() is None else None
            await _close(sender, opened)
            if not isinstance(error, DwarfStarError):
                raise
            self._pipe.emit("broken", epoch=epoch, code=error.code, message=error.message)
            return
        self._outlet, self._feeder = Outlet(sender, self._record, epoch, _end_on_fault), feeder
        wire = self._choose_wire(link)
        self._pipe.emit(
            "linked",
            epoch=epoch,
            link={
                "round_trip_ms": 1000 * link.round_trip_s,
                "mb_s": link.bytes_s / 1e6,
                "wire_type": int(wire),
                "feeds": feeder is not None or self._alone,
            },
            slots=slots,
        )

    def _has(self, epoch: int) -> bool:
        """Whether it was in an epoch's ring, or took the cells of one that was, and has not been emptied since."""
        return 0 < self._since <= epoch <= self._epoch

    def _leave_ring(self, epoch: int) -> asyncio.Future[None]:
        """No frame of an older epoch is run any more. Returns the closing of the hops there were."""
        self._epoch = epoch
        self._taken.set()
        olds, self._outlet, self._feeder = (self._outlet, self._feeder), None, None
        for old in olds:
            if old is not None:
                old.release()
        closing = asyncio.ensure_future(_close(*olds))
        self._closing.add(closing)  # it goes on when a newer link takes this one's place
        closing.add_done_callback(self._closing.discard)
        return closing

    async def _carry(self, command: dict[str, Any]) -> None:
        """Give or take cells of the epoch ``keep``, before the ring of ``epoch`` is closed."""
        began, keep, worker, parts = time.perf_counter(), int(command["keep"]), self._worker, command["parts"]
        has, gives = self._has(keep), any(part["to"] for part in parts)
        begin, end = self._loaded.get("layers", (0, 0))
        if worker is None or (gives and not has):
            outcome = carry.Outcome(code="stage_emptied", message="this stage has no cells of that epoch")
            for layers in [part["layers"] for part in parts] if gives else [(begin, end)]:
                self._pipe.emit("carried", **carry.event(command, layers, outcome, began, given=gives))
            return
        self._receiver.set_epoch(0, ())  # hops of the ring to come wait for the link
        self._leave_ring(keep)  # not that of ``epoch``: a stage that gives is not in it, and has nothing of it later
        with contextlib.suppress(queue.Empty):
            while True:
                self._prompts.get_nowait()
        options = self._loaded["options"]
        written = Written(
            int(command["term"]),
            keep,
            str(self._loaded["fingerprint"]),
            (begin, end),
            str(options["kv_type"]),
            int(options["context"]),
        )
        if gives:
            await asyncio.gather(*(self._give(command, part, written, worker.backend, began) for part in parts))
            return
        if not has:
            await self._slots(keeps=False)
            self._since = keep
        outcome = await carry.take(command, written, worker.backend, self._quiet, self._carried)
        self._pipe.emit("carried", **carry.event(command, (begin, end), outcome, began))

    async def _give(
        self, command: dict[str, Any], part: dict[str, Any], written: Written, backend: Backend, began: float
    ) -> None:
        outcome = await carry.give(command, part, written, backend, self._quiet, self._build, self._name, self._trust)
        self._pipe.emit("carried", **carry.event(command, part["layers"], outcome, began, given=True))

    async def _quiet(self, work: Callable[[], _T]) -> _T:
        """Do this in the thread of slots, when no frame of a prompt runs."""
        return await self._loop.run_in_executor(self._emptying, self._between, work)

    async def _open(self, sender: RingSender, epoch: int, address: str) -> Link:
        credentials = channel.channel_credentials(self._trust)
        return await sender.open(address, credentials, self._build, epoch, self._name)

    async def _open_feeder(self, epoch: int, address: str) -> RingSender | None:
        """Connect the last stage to the first one at ``address``, so that rows may go on without the coordinator."""
        backend = self._worker.backend if self._worker is not None else None
        if backend is None or not backend.last or backend.first or not address:
            return None
        told = "the hop to the first stage ended"
        feeder = RingSender(lambda reason: self._break(epoch, f"{told}: {reason}"), self._spare)
        try:
            await self._open(feeder, epoch, address)
        except DwarfStarError as error:
            log.warning("every token goes by the coordinator, as the first stage is not reached: %s", error.message)
            return None
        return feeder

    @property
    def _alone(self) -> bool:
        """It is the only stage, and goes on by itself."""
        return self._worker is not None and self._worker.backend.first and self._worker.backend.last

    async def _slots(self, keeps: bool) -> list[tuple[int, int, int, int]]:
        """What is kept: of each slot the positions held, what it can be cut to, and the positions recorded."""
        worker, record = self._worker, self._record
        if worker is None:
            return []
        look = worker.held if keeps else worker.reset
        held = await self._quiet(look)
        if held is None:
            if record is not None:
                record.clear()
            return []
        recorded = record.rows() if record is not None else {}
        return [(slot, *cells, recorded.get(slot, 0)) for slot, cells in held.items()]

    def _choose_wire(self, link: Link) -> WireType:
        """What hidden states travel as from here: as set, or by the link and the time that rows take here."""
        worker = self._worker
        if worker is None or worker.backend.last:
            return WireType.F32  # nothing of the kind leaves
        if not self._wire and worker.profile.prompt:
            row_s = min(ms / rows for rows, ms in worker.profile.prompt) / 1000
            worker.use_wire(choose_wire(link, worker.backend.width, row_s))
        return worker.wire

    def _between(self, work: Callable[[], _T]) -> _T:
        """Do this when the frame of a prompt that runs still, at most one, is over."""
        with self._reading:
            return work()

    @property
    def _busy_s(self) -> float:
        return self._worker.backend.busy_s if self._worker is not None else 0.0

    @property
    def _steps(self) -> Counted:
        return self._worker.counted if self._worker is not None else Counted()

    def _stats(self) -> None:
        """Tell that this process lives. A thread, as the event loop's may compute for seconds on a slow machine."""
        process = psutil.Process()
        while True:
            busy, count, steps = self._busy_s, self._frames, replace(self._steps)
            time.sleep(STATS_EVERY_S)
            self._pipe.emit(
                "stats",
                busy=round(min(1.0, (self._busy_s - busy) / STATS_EVERY_S), 4),
                frames=self._frames - count,
                rss=process.memory_info().rss,
                **steps.until(self._steps, STATS_EVERY_S),
            )


async def _close(*hops: Outlet | RingSender | None) -> None:
    await asyncio.gather(*(hop.close() for hop in hops if hop is not None))


def _end_on_fault(task: asyncio.Task[None]) -> None:
    """A fault of our own ends the process: the daemon sees it, a stage that only hangs would be waited for."""
    if not task.cancelled() and (fault := task.exception()) is not None:
        log.error("%s", fault, exc_info=fault)
        os._exit(1)


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
    embedder = Embedder(token_embedding(model, arch)) if file.first else None
    return LlamaBackend(LlamaSlice(file, arch, model.n_embd, options, on_progress, embedder=embedder), embedder)


def _take_name() -> None:
    """So that a stage is told from a process that only waits to be one; where there is such a file."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(STAGE_NAME)


async def _run(pipe: ChildPipe) -> None:
    first = await pipe.command()
    _take_name()
    if first.get("cpus") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, first["cpus"])
    await StageProcess(pipe, first["name"], NodeFiles(Path(first["trust"]))).run(first["host"])


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    loop.run(_run(ChildPipe()))


if __name__ == "__main__":
    main()
