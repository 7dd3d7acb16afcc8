"""What stage processes take, after work: no more than their slice, its KV cache and its buffers, and no file.

Weights and KV cache are what ``model.costs`` counts; compute and output buffers are what llama.cpp reports for the
same slice and options in another process. A slice has two contexts, so KV cells for one sequence more than it has
slots, and two compute buffers. The table of figures is printed (``pytest -s``).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import psutil
import pytest

from dwarfstar_engine.model.costs import model_costs, stage_bytes
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.node.child import Child
from dwarfstar_engine.wire import channel, frames, trust
from dwarfstar_engine.wire.frames import Payload, SetSampler, StepFrame
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.ring import RingReceiver, RingSender
from support import real_models
from support.engine_process import EngineProcess
from support.exactness import Worker
from support.real_models import GEMMA3, GREEDY, MIB, SMOLLM2

pytestmark = [pytest.mark.llama, pytest.mark.process, pytest.mark.timeout(300)]

STAGE = "dwarfstar_engine.stage.main"
SHARE, BASE_BYTES = 1.15, 150 * MIB  # the bar: 1.15 × (weights + KV + compute) + 150 MiB
DEADLINE_S = 60.0
CHUNK, PROMPT_TOKENS, STEPS = 256, 1536, 100
LARGE = {"context": 4096, "slots": 4}
SMALL = {"context": 512, "slots": 1}
COMMON = {"batch": CHUNK, "threads": 1}
STAGES = [
    (SMOLLM2, (0, 10), LARGE),
    (SMOLLM2, (10, 20), LARGE),
    (SMOLLM2, (20, 30), LARGE),
    (SMOLLM2, (0, 29), SMALL),
    (SMOLLM2, (29, 30), SMALL),
    (GEMMA3, (0, 6), LARGE),
    (GEMMA3, (6, 18), LARGE),
    (GEMMA3, (0, 16), SMALL),
    (GEMMA3, (16, 18), SMALL),
]


# --- one stage process -----------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A running stage process in a ring of its own: what it sends comes back here."""

    pid: int
    sender: RingSender
    replies: asyncio.Queue[bytes]
    width: int
    layers: tuple[int, int]
    _number: int = 0

    async def run(self, position: int, count: int, *, first: bool, slot: int = 0) -> None:
        """One frame of ``count`` rows of a sequence, there and back."""
        self._number += 1
        wants = np.zeros(count, np.uint8)
        wants[-1] = 1
        rng = np.random.default_rng(position)
        data: Any = b"" if first else rng.standard_normal((count, self.width), np.float32)
        frame = StepFrame(
            epoch=1,
            number=self._number,
            ops=(SetSampler(slot, GREEDY),) if position == 0 else (),
            slots=np.full(count, slot, np.uint16),
            positions=np.arange(position, position + count, dtype=np.int32),
            tokens=rng.integers(1000, 9000, count, np.int32),
            wants=wants,
            payload=Payload.NONE if first else Payload.F32,
            data=data,
            cols=0 if first else self.width,
            prompt=count > 1,
        )
        self.sender.send(frames.encode(frame))
        await self.sender.flush()
        reply = frames.decode(await asyncio.wait_for(self.replies.get(), DEADLINE_S))
        assert not isinstance(reply, frames.FaultFrame), reply
        assert reply.number == self._number


@asynccontextmanager
async def running_stage(
    path: Path, layers: tuple[int, int], options: dict[str, int], folder: Path
) -> AsyncIterator[Stage]:
    """Start the process as a node daemon does, load the slice, close the ring through this test."""
    authority = trust.create_authority(trust.utc_now())
    identity = trust.NodeFiles(folder / "trust")
    trust.issue_local(authority, identity, "n1", trust.utc_now())
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    child = Child(STAGE, events.put_nowait, lambda status: events.put_nowait({"event": "exited", "status": status}))
    replies: asyncio.Queue[bytes] = asyncio.Queue()
    receiver = RingReceiver(local_build(), "test", replies.put, lambda _: None, lambda *_: None)
    receiver.set_epoch(1, {"n1"})
    server = grpc.aio.server(options=channel.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((receiver.handler(),))
    port = server.add_secure_port("127.0.0.1:0", channel.server_credentials(identity))
    sender = RingSender(lambda reason: events.put_nowait({"event": "exited", "status": reason}))

    async def until(wanted: str) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            while (event := await events.get())["event"] != wanted:
                assert event["event"] not in ("exited", "failed", "broken"), (event, child.last_words)
            return event

    await server.start()
    await child.start()
    try:
        child.send(name="n1", host="127.0.0.1", trust=str(identity.folder), cpus=[])
        address = f"127.0.0.1:{(await until('listening'))['port']}"
        child.send(
            command="load", backend="llama", model="m", path=str(path), layers=list(layers), wire=1, ends=[],
            known=None, record=256 << 20,
            options={**COMMON, **options},
        )  # fmt: skip
        await until("ready")
        child.send(command="link", epoch=1, next=f"127.0.0.1:{port}", feed="", senders=["n1"], keep=0)
        await until("linked")
        await sender.open(address, channel.channel_credentials(identity), local_build(), 1, "test")
        yield Stage(child.pid, sender, replies, read_model(path).n_embd, layers)
    finally:
        await sender.close()
        await child.stop()
        await server.stop(None)


@pytest.fixture(scope="module")
def buffers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, int]]]:
    """What llama.cpp reports of a slice: ``buffers(path, layers, options)``."""
    worker = Worker(tmp_path_factory.mktemp("buffers"), "support.real_models")

    def ask(path: Path, layers: tuple[int, int], options: dict[str, int]) -> dict[str, int]:
        return worker.ask(check="buffers", path=str(path), layers=layers, options={**COMMON, **options})

    yield ask
    worker.close()


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[Any, ...]]]:
    """Rows of figures, printed at the end."""
    rows: list[tuple[Any, ...]] = []
    yield rows
    head = ("model", "layers", "cells", "weights", "KV", "steps", "prompt", "RSS", "private", "allowed")
    print("\n" + "  ".join(f"{name:>9}" for name in head) + "   (MiB)")
    for row in rows:
        print("  ".join(f"{cell / MIB:9.1f}" if isinstance(cell, float) else f"{cell:>9}" for cell in row))


@pytest.mark.parametrize(("name", "layers", "options"), STAGES)
async def test_a_stage_process_stays_within_the_bar(
    name: str,
    layers: tuple[int, int],
    options: dict[str, int],
    buffers: Callable[..., dict[str, int]],
    table: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    path = real_models.path_of(name)
    model = read_model(path)
    costs, last = model_costs(model), layers[1] == model.n_layers
    weights = stage_bytes(costs, *layers, last=last)
    cells = options["context"] * (options["slots"] + (options["slots"] > 1))
    kv = cells * sum(costs.kv_bytes_per_token[slice(*layers)])
    reported = buffers(path, layers, options)
    compute = reported["steps"] + reported["prompt"]
    async with running_stage(path, layers, options, tmp_path) as stage:
        first, prompt = layers[0] == 0, min(PROMPT_TOKENS, options["context"] - STEPS - 1)
        for slot in range(options["slots"]):  # every cell that a prompt can reach was moved to
            for start in range(0, prompt, CHUNK):
                await stage.run(start, min(CHUNK, prompt - start), first=first, slot=slot)
        for step in range(STEPS):
            await stage.run(prompt + step, 1, first=first)
        process = psutil.Process(stage.pid)
        memory = process.memory_full_info()
        files = held_files(process)
    allowed = SHARE * (weights + kv + compute) + BASE_BYTES
    shown = (float(x) for x in (weights, kv, reported["steps"], reported["prompt"], memory.rss, memory.uss, allowed))
    table.append((name, f"{layers[0]}-{layers[1]}", cells, *shown))
    assert abs(reported["weights"] - weights) < 0.02 * weights + MIB  # the planner counts what llama.cpp allocates
    assert abs(reported["kv"] - kv) < 0.02 * kv + MIB
    assert memory.rss <= allowed
    assert files <= {str(path.resolve())}


def held_files(process: psutil.Process) -> set[str]:
    """Data files a process has open or mapped, deleted ones and memory files too: all but programs and their logs."""
    held = {file.path for file in process.open_files()}
    if hasattr(process, "memory_maps"):
        held |= {region.path for region in process.memory_maps() if region.path.startswith("/")}
    installed = ("/usr/", "/lib", "/etc/", sys.base_prefix)
    return {path for path in held if not (path.startswith(installed) or ".so" in path or path.endswith(".log"))}


# --- a whole engine --------------------------------------------------------------------------------------------------


def test_no_process_of_an_engine_holds_the_model(tmp_path: Path) -> None:
    """With a short context weights outweigh all else, so private memory tells who holds how much of the model.

    A node daemon runs the same interpreter and libraries without weights: what it takes privately is the base.
    """
    path = real_models.path_of(SMOLLM2)
    whole = model_costs(read_model(path)).total
    (scratch := tmp_path / "scratch").mkdir()
    home = tmp_path / "home"
    arguments = ("--demo", "--context", "512", "--slots", "1")
    with EngineProcess(home, *arguments, variables={"TMPDIR": str(scratch)}) as engine:
        engine.wait_serving()
        body = {"prompt": "The quick brown fox jumps over the lazy dog. " * 30, "max_tokens": STEPS, "temperature": 0}
        answer = engine.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        stages = {stage.pid: stage.layers for stage in engine.status().stages}
        assert len(stages) == 3
        processes = {process.pid: process for process in engine.processes()}
        private = {pid: process.memory_full_info().uss for pid, process in processes.items()}
        files = {pid: held_files(process) for pid, process in processes.items()}
        written = sum(file.stat().st_size for folder in (home, scratch) for file in folder.rglob("*") if file.is_file())
    base = min(private.values())
    print(f"\nthe model {whole / MIB:.1f} MiB, base {base / MIB:.1f} MiB")
    for pid, size in private.items():
        print(f"{size / MIB:8.1f} MiB private  " + (f"stage {stages[pid]}" if pid in stages else "no stage"))
    spares = len(processes) - (1 + 1 + 3 + 3)  # engine, vocabulary, nodes, stages
    assert set(stages) <= set(processes) and 0 <= spares <= 3  # a node's is started when it is not busy
    assert max(private.values()) - base < whole
    for pid, held in files.items():
        outside = {file for file in held if not file.startswith(str(home))}  # in the home there are locks and logs
        assert outside <= {str(path.resolve())}, processes[pid]
    assert written < MIB  # the smallest slice has twenty times as much
