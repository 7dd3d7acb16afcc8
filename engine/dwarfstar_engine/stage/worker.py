"""The compute side of a stage: one frame in, one frame out. No sockets, no asyncio.

A frame's operations are applied in order before its rows: cells copied, samplers set. The rows then run through the
slice, those of one slot after those of another; a stage before the last sends hidden states on, the last one sends the
tokens drawn. A frame that cannot be run becomes a fault frame, so that the coordinator always hears of it.

Two threads may call: one with frames of prompts (``frames.is_prompt``), one with all others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import DwarfStarError, FrameError
from dwarfstar_engine.native import WireType
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.stage import toy
from dwarfstar_engine.stage.llama import Embedder, LlamaSlice
from dwarfstar_engine.stage.measure import FIRST_ROWS, Profile, measure
from dwarfstar_engine.stage.sampler import Sampler
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import (
    MAX_TIMINGS,
    CopySlot,
    FaultFrame,
    Halt,
    Payload,
    Resend,
    ResultFrame,
    SampledRow,
    SetSampler,
    StepFrame,
    Want,
)
from dwarfstar_engine.wire.sampler_spec import SamplerSpec

Rows = NDArray[np.float32]


class Backend(Protocol):
    """What runs rows. ``first``: it takes tokens; ``last``: it draws tokens."""

    first: bool
    last: bool
    width: int

    def run_frame(self, frame: bytes, wait_us: int) -> tuple[bytes, bytes] | None:
        """A whole frame at once, where the backend can: the next hop's frame and the one the first stage goes on with
        (empty: none), or None to go the general way."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds spent computing."""
        ...

    def embed(self, tokens: NDArray[np.int32]) -> Rows: ...
    def step(
        self, rows: Rows, position: int, slot: int, wants: NDArray[np.uint8], *, prompt: bool = False
    ) -> Rows | None: ...
    def draw(self, row: int, slot: int, position: int, guess: int, prompt: bool) -> SampledRow | None: ...
    def set_sampler(self, slot: int, spec: SamplerSpec | None) -> None: ...
    def halt(self, slot: int) -> None:
        """Draw nothing any more for a slot until its sampler is set."""
        ...

    def copy(self, source: int, target: int, position: int) -> None: ...
    def clear(self) -> None: ...
    def held(self, slot: int) -> tuple[int, int]:
        """Positions that a slot holds, and how many it can be cut to at least, but for none. While nothing runs."""
        ...

    def give(self, slot: int, positions: int, layers: Layers) -> tuple[bytearray, int]:
        """What a slot holds before ``positions`` of some layers of the slice, for a process that has these, and what it
        can be cut to. What it held from there on is forgotten. Raises FrameError or StageError."""
        ...

    def take(self, slot: int, positions: int, floor: int, parts: Mapping[Layers, bytearray]) -> None:
        """Let a slot hold what other processes gave of the slice's layers. Raises FrameError or StageError: then it
        holds nothing."""
        ...

    def measure(self, known: Profile | None = None) -> Profile:
        """What rows take, unless that is known; before any frame."""
        ...

    def tune(self, wire: WireType, *, batched: bool, ends: Collection[int]) -> None:
        """How ``run_frame`` goes on. Raises StageError if the model does not have these tokens."""
        ...

    def close(self) -> None: ...


class LlamaBackend:
    """A slice on llama.cpp."""

    def __init__(self, slice_: LlamaSlice, embedder: Embedder | None) -> None:
        self._slice, self._embedder = slice_, embedder
        self.first, self.last = slice_.file.first, slice_.file.last
        self.width = slice_.n_embd
        self._samplers: dict[int, Sampler] = {}

    def run_frame(self, frame: bytes, wait_us: int) -> tuple[bytes, bytes] | None:
        return self._slice.hot.run(frame, wait_us)

    @property
    def busy_s(self) -> float:
        return self._slice.hot.busy_s

    def embed(self, tokens: NDArray[np.int32]) -> Rows:
        assert self._embedder is not None, "only a first stage is given tokens"
        return self._embedder.rows(tokens)

    def step(
        self, rows: Rows, position: int, slot: int, wants: NDArray[np.uint8], *, prompt: bool = False
    ) -> Rows | None:
        return self._slice.step(rows, position, slot, wants, prompt=prompt)

    def draw(self, row: int, slot: int, position: int, guess: int, prompt: bool) -> SampledRow | None:
        sampler = self._samplers.get(slot)
        if sampler is None:
            raise FrameError(f"slot {slot} has no sampler on this stage")
        return sampler.sample(row, position, guess, prompt)

    def set_sampler(self, slot: int, spec: SamplerSpec | None) -> None:
        if (old := self._samplers.pop(slot, None)) is not None:
            old.close()
        if spec is not None:
            self._samplers[slot] = Sampler(spec, self._slice, slot)

    def halt(self, slot: int) -> None:
        self._slice.hot.halt(slot)

    def copy(self, source: int, target: int, position: int) -> None:
        self._slice.hot.copy(source, target, position)

    def clear(self) -> None:
        self._slice.hot.clear()

    def held(self, slot: int) -> tuple[int, int]:
        return self._slice.hot.held(slot)

    def give(self, slot: int, positions: int, layers: Layers) -> tuple[bytearray, int]:
        return self._slice.give(slot, positions, layers)

    def take(self, slot: int, positions: int, floor: int, parts: Mapping[Layers, bytearray]) -> None:
        self._slice.take(slot, positions, floor, parts)

    def measure(self, known: Profile | None = None) -> Profile:
        if known is None:
            return measure(self._slice, self._slice.options.threads)
        if not known.batched:
            self._slice.open_slots()
        return known

    def tune(self, wire: WireType, *, batched: bool, ends: Collection[int]) -> None:
        self._slice.hot.tune(wire, batched=batched)
        if self.last:
            self._slice.hot.end_at(ends)

    def close(self) -> None:
        for slot in list(self._samplers):
            self.set_sampler(slot, None)
        self._slice.close()


class ToyBackend:
    """A slice of the toy model, for tests of what surrounds llama.cpp. ``delay_s`` stands for compute."""

    def __init__(self, a: int, b: int, layers: int, delay_s: float = 0.0) -> None:
        self._slice = toy.ToySlice(a, b)
        self.first, self.last, self.width = a == 0, b == layers, toy.WIDTH
        self.busy_s = 0.0
        self._delay_s = delay_s
        self._computing = threading.Lock()
        self._rows: dict[bool, Rows] = {}  # of the last step, of a prompt or not
        self._drawn: dict[int, tuple[int, int]] = {}  # slot → position and token drawn last
        self._halted: set[int] = set()

    def run_frame(self, frame: bytes, wait_us: int) -> tuple[bytes, bytes] | None:
        return None

    def embed(self, tokens: NDArray[np.int32]) -> Rows:
        return np.stack([toy.to_row(toy.embed(int(token))) for token in tokens])

    def step(
        self, rows: Rows, position: int, slot: int, wants: NDArray[np.uint8], *, prompt: bool = False
    ) -> Rows | None:
        with self._computing:
            started = time.perf_counter()
            if self._delay_s:
                time.sleep(self._delay_s)
            out = self._rows[prompt] = self._slice.step(rows, position, slot)
            self.busy_s += time.perf_counter() - started
        return None if self.last else out

    def draw(self, row: int, slot: int, position: int, guess: int, prompt: bool) -> SampledRow | None:
        if slot in self._halted or (guess >= 0 and self._drawn.get(slot) != (position, guess)):
            return None
        token = toy.draw(toy.from_row(self._rows[prompt][row]))
        self._drawn[slot] = (position + 1, token)
        return SampledRow(slot, token, 0.0, ())

    def set_sampler(self, slot: int, spec: SamplerSpec | None) -> None:
        self._drawn.pop(slot, None)
        self._halted.discard(slot)

    def halt(self, slot: int) -> None:
        self._halted.add(slot)

    def copy(self, source: int, target: int, position: int) -> None:
        with self._computing:
            self._slice.copy(source, target, position)

    def clear(self) -> None:
        self._slice.clear()

    def held(self, slot: int) -> tuple[int, int]:
        return self._slice.held(slot), 0

    def give(self, slot: int, positions: int, layers: Layers) -> tuple[bytearray, int]:
        return self._slice.give(slot, positions, layers), 0

    def take(self, slot: int, positions: int, floor: int, parts: Mapping[Layers, bytearray]) -> None:
        self._slice.take(slot, positions, parts)

    def measure(self, known: Profile | None = None) -> Profile:
        ms = 1000 * self._delay_s
        return Profile(((FIRST_ROWS, ms),), ms, ms, batched=True)

    def tune(self, wire: WireType, *, batched: bool, ends: Collection[int]) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(slots=True)
class Counted:
    """Frames of generated tokens since the start: rows, and seconds computed and waited for them. frames: how many."""

    rows: int = 0
    frames: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0

    def add(self, rows: int, compute_s: float, wait_s: float) -> None:
        self.rows += rows
        self.frames += 1
        self.compute_s += compute_s
        self.wait_s += wait_s

    def until(self, later: Counted, span_s: float) -> dict[str, float]:
        """Means between two counts that are ``span_s`` apart; empty if no frame was run."""
        rows, frames = later.rows - self.rows, later.frames - self.frames
        if rows <= 0 or frames <= 0:
            return {"rows_s": 0.0}
        return {
            "rows_s": round(rows / span_s, 2),
            "compute_ms": round(1000 * (later.compute_s - self.compute_s) / rows, 4),
            "wait_ms": round(1000 * (later.wait_s - self.wait_s) / frames, 4),
        }


class Worker:
    """Runs frames on a backend, and keeps the figures of it. ends: tokens behind which no row goes on by itself."""

    def __init__(self, backend: Backend, slots: int, wire: WireType, ends: Collection[int] = ()) -> None:
        self.backend, self._slots, self._ends = backend, slots, frozenset(ends)
        self._feed = b""
        self._asked: dict[bool, list[Resend]] = {True: [], False: []}  # by frames of a prompt, and by others
        self.counted = Counted()
        self.profile = Profile()
        self.use_wire(wire)
        now = time.perf_counter()
        self._idle_since = {True: now, False: now}  # the one who reads prompts, and the other

    def use_wire(self, wire: WireType) -> None:
        """What hidden states are sent as from now on."""
        self.wire = wire
        self.backend.tune(wire, batched=self.profile.batched, ends=self._ends)

    def measure(self, known: Profile | None = None) -> Profile:
        """See what rows take, unless it is known, and whether rows of several slots are better run together. Before any
        frame."""
        self.profile = self.backend.measure(known)
        self.use_wire(self.wire)
        return self.profile

    def held(self) -> dict[int, tuple[int, int]]:
        """Of each slot that holds something: its positions, and how many it can be cut to at least, but for none."""
        found = {slot: self.backend.held(slot) for slot in range(self._slots)}
        return {slot: held for slot, held in found.items() if held[0]}

    def reset(self) -> None:
        """A new epoch: every slot is empty."""
        self.backend.clear()
        for slot in range(self._slots):
            self.backend.set_sampler(slot, None)
        self._asked = {True: [], False: []}
        now = time.perf_counter()
        self._idle_since = {True: now, False: now}

    def run(self, data: bytes) -> bytes:
        """One frame in, the frame for the next hop out. Result and fault frames pass unchanged.

        Raises FrameError if ``data`` is not a frame at all: the connection that sent it must be closed.
        """
        started, prompt = time.perf_counter(), frames.is_prompt(data)
        wait_s = started - self._idle_since[prompt]
        wait_us = int(1e6 * wait_s)
        fault: DwarfStarError | None = None
        if not prompt:
            try:
                done = self.backend.run_frame(data, wait_us)
                if done is not None:
                    now = self._idle_since[False] = time.perf_counter()
                    self.counted.add(frames.count_rows(data), now - started, wait_s)
                    out_data, self._feed = done
                    return out_data
            except DwarfStarError as error:
                fault = error
        frame = frames.decode(data)
        if not isinstance(frame, StepFrame):
            return data
        try:
            if fault is not None:
                raise fault
            out = self._step(frame)
        except DwarfStarError as error:
            return frames.encode(FaultFrame(frame.epoch, frame.number, error.code, error.message))
        now = self._idle_since[prompt] = time.perf_counter()
        if not prompt:
            self.counted.add(len(frame.slots), now - started, wait_s)
        out.timings = (*frame.timings, (int(1e6 * (now - started)), wait_us))
        return frames.encode(out)

    def take_feed(self) -> bytes:
        """What the first stage goes on with after the frame of steps that was run last; empty: nothing."""
        feed, self._feed = self._feed, b""
        return feed

    def take_asked(self, prompt: bool) -> list[Resend]:
        """What the last frame of a prompt, or the last other one, asks this stage to send again."""
        asked = self._asked[prompt]
        if asked:
            self._asked[prompt] = []
        return asked

    def _step(self, frame: StepFrame) -> StepFrame | ResultFrame:
        backend = self.backend
        if len(frame.timings) >= MAX_TIMINGS:
            raise FrameError(f"a frame has passed {len(frame.timings)} stages, more than there can be")
        for op in frame.ops:
            if not isinstance(op, Resend):
                self._apply(op)
            elif op.stage == len(frame.timings):  # so many stages were passed
                self._asked[frame.prompt].append(op)
        n = len(frame.slots)
        if n == 0:
            if backend.last:
                return ResultFrame(frame.epoch, frame.number, [], frame.timings)
            return frame
        if int(frame.slots.max()) >= self._slots:
            raise FrameError(f"a frame names slot {int(frame.slots.max())} and this stage has {self._slots}")
        rows, outs, drawn = self._input(frame, n), [], []
        for start, end in _runs(frame, together=frame.prompt or self.profile.batched):
            position, slot = int(frame.positions[start]), int(frame.slots[start])
            out = backend.step(rows[start:end], position, slot, frame.wants[start:end], prompt=frame.prompt)
            if out is not None:
                outs.append(out)
                continue
            for row in np.flatnonzero(frame.wants[start:end]).tolist():
                guess = int(frame.tokens[start + row]) if frame.wants[start + row] == Want.CHECKED else -1
                if (sampled := backend.draw(row, slot, position + row, guess, frame.prompt)) is not None:
                    drawn.append(sampled)
        if backend.last:
            return ResultFrame(frame.epoch, frame.number, drawn, frame.timings, self._go_on(frame, drawn))
        frame.stages = max(0, frame.stages - 1)
        frame.payload = Payload(self.wire)
        out = outs[0] if len(outs) == 1 else np.concatenate(outs)
        frame.data = out if self.wire is WireType.F32 else native.encode(self.wire, out)
        frame.cols = backend.width
        return frame

    def _go_on(self, frame: StepFrame, drawn: list[SampledRow]) -> int:
        """Let the rows behind tokens that end no text go on, as ``ds_stage::go_on`` does; the result's rounds."""
        going = [row for row in drawn if row.token not in self._ends]
        if frame.prompt or not frame.rounds or not going or Want.CHECKED in frame.wants:
            return 0
        position = dict(zip(frame.slots.tolist(), frame.positions.tolist(), strict=True))
        self._feed = frames.encode_tokens(
            frame.epoch,
            frame.number,
            (),
            [row.slot for row in going],
            [position[row.slot] + 1 for row in going],
            [row.token for row in going],
            [Want.DRAWN] * len(going),
            False,
            frame.rounds - 1,
        )
        return frame.rounds

    def _input(self, frame: StepFrame, n: int) -> Rows:
        if self.backend.first:
            if frame.payload is not Payload.NONE:
                raise FrameError("the first stage was sent hidden states, and takes tokens")
            return self.backend.embed(frame.tokens)
        if frame.payload is Payload.NONE:
            raise FrameError("this stage is not the first and was sent no hidden states")
        if frame.cols != self.backend.width:
            raise FrameError(f"a frame is {frame.cols} wide and this model {self.backend.width}")
        if frame.payload is Payload.F32:
            return np.frombuffer(frame.data, np.float32).reshape(n, frame.cols)
        return native.decode(WireType(frame.payload), frame.data, n, frame.cols)

    def _apply(self, op: CopySlot | SetSampler | Halt) -> None:
        slots = (op.source, op.target) if isinstance(op, CopySlot) else (op.slot,)
        if max(slots) >= self._slots:
            raise FrameError(f"an operation names slot {max(slots)} and this stage has {self._slots}")
        match op:
            case CopySlot(source, target, position):
                self.backend.copy(source, target, position)
            case SetSampler(slot, spec):
                if self.backend.last:
                    self.backend.set_sampler(slot, SamplerSpec.decode(spec))
            case Halt(slot):
                if self.backend.last:
                    self.backend.halt(slot)

    def close(self) -> None:
        self.backend.close()


def _runs(frame: StepFrame, *, together: bool) -> Iterator[tuple[int, int]]:
    """Rows of one slot at positions that follow each other, as ranges of row numbers.

    Not together: each row alone, as ``run_frame`` runs them, because llama.cpp has other last bits for several.
    """
    if not together:
        return pairwise(range(len(frame.slots) + 1))
    breaks = (np.diff(frame.slots.astype(np.int32)) != 0) | (np.diff(frame.positions) != 1)
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(frame.slots)]
    return pairwise(bounds)
