"""What a stage takes for its rows, measured once after loading: the scheduler's chunks and lanes follow from it.

Theory. Two questions. How long do so many rows of a prompt take, so that chunks are large enough to be efficient and
small enough to follow each other through the stages? And are rows of several slots better run together? On a GPU a
batch of eight costs little more than one row. On a CPU it may cost as much as eight, and give other last bits, because
llama.cpp has other kernels for it: then it must be worth it.

A step is measured where steps will run: once that is decided, and a slot's own context is open if it has one. One
thread on a processor is measured by its own time, not by the clock: stages of one machine are loaded at the same time,
and beside those that serve, and a wait for a core is no cost of the slice. Several threads, and a GPU, are measured by
the clock. Before each step the caches are filled with something else: between two frames other stages, the coordinator
or the system have used them, so weights come from memory also where a slice would fit into the caches.

Hidden states are noise: what llama.cpp takes does not depend on the values. All slots are empty afterwards.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dwarfstar_engine.batch.costs import TOGETHER
from dwarfstar_engine.native import FloatRows, WireType
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llama import LlamaSlice
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import Payload, StepFrame, Want

FIRST_ROWS = 64  # llama.cpp's attention has another kernel from here on, for prompts
BUDGET_S = 0.3  # of a load; larger chunks are tried while they take less
ROUNDS = 5
WARM = 2  # steps before these: llama.cpp lays out a graph, and uses it again
CACHES_BYTES = 64 << 20  # more than the caches of most processors
ALWAYS = 1.5  # so much faster together: then it is worth other last bits, unless they are to be exact
WORTH = 1.05  # so much faster, and the same bits

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True, slots=True)
class Profile:
    """prompt: (rows, ms) of frames of a prompt. step_ms: one row. together_ms: TOGETHER rows of as many slots.

    head_ms: of step_ms, what the last stage takes for logits. window: of the model's sliding attention; 0: it has none.
    """

    prompt: tuple[tuple[int, float], ...] = ()
    step_ms: float = 0.0
    together_ms: float = 0.0
    batched: bool = False
    window: int = 0
    head_ms: float = 0.0


def measure_clock(threads: int) -> Clock:
    """What the cost of a slice is told by; see the module."""
    return time.thread_time if threads == 1 and not llamacpp.gpu_offload() else time.perf_counter


def measure(slice_: LlamaSlice, threads: int) -> Profile:
    """Run rows through a loaded slice and see; open the contexts that suit what is seen. It takes BUDGET_S, and what
    FIRST_ROWS and a few rows take."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((slice_.options.batch, slice_.n_embd), dtype=np.float32)
    clock = measure_clock(threads)
    try:
        prompt = _prompt(slice_, noise, clock)
        profile = _together(slice_, noise, prompt[0][0] if prompt else 0, threads, clock)
        slice_.hot.clear()
        if not profile.batched:
            slice_.open_slots()
        step_ms = _step(slice_, noise[:1], clock)
        bare_ms = _step(slice_, noise[:1], clock, wanted=False) if slice_.file.last else step_ms
        head_ms = max(0.0, step_ms - bare_ms)
        return replace(profile, prompt=prompt, step_ms=step_ms, head_ms=head_ms, window=slice_.window)
    finally:
        slice_.hot.tune(WireType.F32, batched=False)
        slice_.hot.clear()


def _together(slice_: LlamaSlice, noise: FloatRows, held: int, threads: int, clock: Clock) -> Profile:
    """Whether rows of TOGETHER slots, each of which holds ``held``, are better run as one batch."""
    together = min(TOGETHER, slice_.options.slots)
    if together < TOGETHER:
        return Profile()
    for slot in range(1, together):
        slice_.hot.copy(0, slot, held)
    apart_ms, apart = _frames(slice_, noise[:together], held, clock, batched=False)
    together_ms, joined = _frames(slice_, noise[:together], held, clock, batched=True)
    gain = apart_ms / together_ms
    same = apart == joined and threads == 1  # with more threads long contexts take yet another kernel
    batched = (gain >= ALWAYS and not slice_.options.exact) or (gain >= WORTH and same)
    return Profile(together_ms=together_ms, batched=batched)


def _prompt(slice_: LlamaSlice, noise: FloatRows, clock: Clock) -> tuple[tuple[int, float], ...]:
    """Ever larger frames, as time allows. The slot holds FIRST_ROWS in the end, where steps can follow."""
    wants = np.zeros(len(noise), np.uint8)

    def run(rows: int, wanted: bool = False) -> float:
        wants[rows - 1] = wanted
        started = clock()
        slice_.step(noise[:rows], 0, 0, wants[:rows], prompt=True)
        wants[rows - 1] = 0
        return clock() - started

    sizes = [rows for rows in (FIRST_ROWS << n for n in range(6)) if rows <= min(len(noise), slice_.options.context)]
    first = sizes[0] if sizes else min(len(noise), slice_.options.context)
    out, spent = [], run(first)  # the first one also touches all memory
    for rows in sizes or [first]:
        took = run(rows)
        out.append((rows, 1000 * took))
        spent += took
        if spent + 2 * took > BUDGET_S:
            break
    run(first, wanted=True)
    return tuple(out)


def _step(slice_: LlamaSlice, row: FloatRows, clock: Clock, *, wanted: bool = True) -> float:
    """One row of a slot that holds next to nothing, in ms. The last stage makes no logits of one that is not wanted."""
    times, other = [], np.zeros(CACHES_BYTES, np.uint8)
    for position in range(WARM + ROUNDS):
        other += 1
        started = clock()
        slice_.step(row, position, 0, np.full(1, wanted, np.uint8))
        times.append(clock() - started)
    return 1000 * statistics.median(times[WARM:])


def _frames(slice_: LlamaSlice, rows: FloatRows, position: int, clock: Clock, *, batched: bool) -> tuple[float, bytes]:
    """A row for each slot: the time of a frame in ms, and the bits that come out."""
    hot, n = slice_.hot, len(rows)
    hot.tune(WireType.F32, batched=batched)
    if slice_.file.last:
        for slot in range(n):
            hot.set_sampler(slot, chain=None, dist=-1, seed=0)

    def frame(slots: range) -> bytes:
        count = len(slots)
        first = slice_.embeds
        return frames.encode(
            StepFrame(
                epoch=0,
                number=0,
                ops=(),
                slots=np.array(slots, np.uint16),
                positions=np.full(count, position, np.int32),
                tokens=np.zeros(count, np.int32),
                wants=np.full(count, Want.DRAWN, np.uint8),
                payload=Payload.NONE if first else Payload.F32,
                data=b"" if first else rows[slots.start : slots.stop],
                cols=0 if first else slice_.n_embd,
            )
        )

    def bits(slots: range) -> bytes:
        done = hot.run(frame(slots), 0)
        assert done is not None, "a frame of steps"
        out, _ = done
        if not slice_.file.last:
            sent = frames.decode(out)
            assert isinstance(sent, StepFrame)
            return bytes(sent.data)
        return b"".join(
            ctypes.string_at(slice_.logits(row), 4 * slice_.vocab_size)
            for row in (range(len(slots)) if batched else range(1))
        )

    times, whole = [], frame(range(n))
    for _ in range(ROUNDS):
        started = clock()
        hot.run(whole, 0)
        times.append(clock() - started)
    together = bits(range(n)) if batched else b"".join(bits(range(slot, slot + 1)) for slot in range(n))
    for slot in range(n):
        hot.clear_sampler(slot)
    return 1000 * statistics.median(times), together
