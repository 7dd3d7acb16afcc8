"""The compute side of a stage: one frame in, one frame out. No sockets, no asyncio; one thread calls it.

A frame's operations are applied in order before its rows: slots freed or trimmed, samplers set. The rows then run
through the slice; a stage before the last sends hidden states on, the last one sends the tokens drawn. A frame that
cannot be run becomes a fault frame, so that the coordinator always hears of it.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import DwarfStarError, FrameError
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import toy
from dwarfstar_engine.stage.llama import Embedder, LlamaSlice
from dwarfstar_engine.stage.sampler import Sampler
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import (
    CopySlot,
    FaultFrame,
    FreeSlot,
    Op,
    Payload,
    ResultFrame,
    SampledRow,
    SetSampler,
    StepFrame,
    TrimSlot,
)
from dwarfstar_engine.wire.sampler_spec import SamplerSpec

Rows = NDArray[np.float32]


class Backend(Protocol):
    """What runs rows. ``first``: it takes tokens; ``last``: it draws tokens."""

    first: bool
    last: bool
    width: int

    def run_frame(self, frame: bytes, wait_us: int) -> bytes | None:
        """A whole frame at once, where the backend can: the next hop's frame, or None to go the general way."""
        ...

    def embed(self, tokens: NDArray[np.int32]) -> Rows: ...
    def step(self, rows: Rows, frame: StepFrame) -> Rows | None: ...
    def draw(self, row: int, slot: int, position: int) -> SampledRow: ...
    def set_sampler(self, slot: int, spec: SamplerSpec | None) -> None: ...
    def trim(self, slot: int, position: int) -> None: ...
    def copy(self, source: int, target: int, position: int) -> None: ...
    def close(self) -> None: ...


class LlamaBackend:
    """A slice on llama.cpp."""

    def __init__(self, slice_: LlamaSlice, embedder: Embedder | None) -> None:
        self._slice, self._embedder = slice_, embedder
        self.first, self.last = slice_.file.first, slice_.file.last
        self.width = slice_.n_embd
        self._samplers: dict[int, Sampler] = {}
        self._general: set[int] = set()  # slots whose rows need more than a token: log-probabilities

    def run_frame(self, frame: bytes, wait_us: int) -> bytes | None:
        return None if self._general else self._slice.hot.run(frame, wait_us)

    def embed(self, tokens: NDArray[np.int32]) -> Rows:
        assert self._embedder is not None, "only a first stage is given tokens"
        return self._embedder.rows(tokens)

    def step(self, rows: Rows, frame: StepFrame) -> Rows | None:
        return self._slice.step(rows, frame.positions, frame.slots, frame.wants)

    def draw(self, row: int, slot: int, position: int) -> SampledRow:
        sampler = self._samplers.get(slot)
        if sampler is None:
            raise FrameError(f"slot {slot} has no sampler on this stage")
        return sampler.sample(row, position)

    def set_sampler(self, slot: int, spec: SamplerSpec | None) -> None:
        if (old := self._samplers.pop(slot, None)) is not None:
            old.close()
        self._general.discard(slot)
        if spec is not None:
            if spec.logprobs >= 0:
                self._general.add(slot)
            self._samplers[slot] = Sampler(spec, self._slice, slot)

    def trim(self, slot: int, position: int) -> None:
        self._slice.trim(slot, position)

    def copy(self, source: int, target: int, position: int) -> None:
        self._slice.copy(source, target, position)

    def close(self) -> None:
        for slot in list(self._samplers):
            self.set_sampler(slot, None)
        self._slice.close()


class ToyBackend:
    """A slice of the toy model, for tests of what surrounds llama.cpp. ``delay_s`` stands for compute."""

    def __init__(self, a: int, b: int, layers: int, delay_s: float = 0.0) -> None:
        self._slice = toy.ToySlice(a, b)
        self.first, self.last, self.width = a == 0, b == layers, toy.WIDTH
        self._delay_s = delay_s
        self._rows: Rows = np.empty((0, toy.WIDTH), np.float32)

    def run_frame(self, frame: bytes, wait_us: int) -> bytes | None:
        return None

    def embed(self, tokens: NDArray[np.int32]) -> Rows:
        return np.stack([toy.to_row(toy.embed(int(token))) for token in tokens])

    def step(self, rows: Rows, frame: StepFrame) -> Rows | None:
        if self._delay_s:
            time.sleep(self._delay_s)
        self._rows = self._slice.step(rows, frame.positions.tolist(), frame.slots.tolist())
        return None if self.last else self._rows

    def draw(self, row: int, slot: int, position: int) -> SampledRow:
        return SampledRow(slot, toy.draw(toy.from_row(self._rows[row])), 0.0, ())

    def set_sampler(self, slot: int, spec: SamplerSpec | None) -> None:
        pass

    def trim(self, slot: int, position: int) -> None:
        self._slice.trim(slot, position)

    def copy(self, source: int, target: int, position: int) -> None:
        self._slice.copy(source, target, position)

    def close(self) -> None:
        pass


class Worker:
    """Runs frames on a backend, and keeps the figures of it."""

    def __init__(self, backend: Backend, slots: int, wire: WireType) -> None:
        self.backend, self._slots, self._wire = backend, slots, wire
        self._idle_since = time.perf_counter()

    def reset(self) -> None:
        """A new epoch: every slot is empty."""
        for slot in range(self._slots):
            self.backend.trim(slot, 0)
            self.backend.set_sampler(slot, None)
        self._idle_since = time.perf_counter()

    def run(self, data: bytes) -> bytes:
        """One frame in, the frame for the next hop out. Result and fault frames pass unchanged.

        Raises FrameError if ``data`` is not a frame at all: the connection that sent it must be closed.
        """
        started = time.perf_counter()
        wait_us = int(1e6 * (started - self._idle_since))
        fault: DwarfStarError | None = None
        try:
            done = self.backend.run_frame(data, wait_us)
            if done is not None:
                self._idle_since = time.perf_counter()
                return done
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
            return frames.encode(FaultFrame(frame.epoch, frame.lane, frame.number, error.code, error.message))
        self._idle_since = time.perf_counter()
        out.timings = (*frame.timings, (int(1e6 * (self._idle_since - started)), wait_us))
        return frames.encode(out)

    def _step(self, frame: StepFrame) -> StepFrame | ResultFrame:
        backend = self.backend
        for op in frame.ops:
            self._apply(op)
        n = len(frame.slots)
        if n == 0:
            if backend.last:
                return ResultFrame(frame.epoch, frame.lane, frame.number, [], frame.timings)
            return frame
        if int(frame.slots.max()) >= self._slots:
            raise FrameError(f"a frame names slot {int(frame.slots.max())} and this stage has {self._slots}")
        out = backend.step(self._input(frame, n), frame)
        if backend.last:
            rows = [
                backend.draw(int(row), int(frame.slots[row]), int(frame.positions[row]))
                for row in np.flatnonzero(frame.wants)
            ]
            return ResultFrame(frame.epoch, frame.lane, frame.number, rows, frame.timings)
        assert out is not None
        frame.payload = Payload(self._wire)
        frame.data = out if self._wire is WireType.F32 else native.encode(self._wire, out)
        frame.cols = backend.width
        return frame

    def _input(self, frame: StepFrame, n: int) -> Rows:
        if frame.payload is Payload.TOKENS:
            if not self.backend.first:
                raise FrameError("this stage is not the first and was sent token ids")
            return self.backend.embed(np.frombuffer(frame.data, np.int32))
        if frame.payload is Payload.NONE or self.backend.first:
            raise FrameError("a frame for this stage carries no usable input")
        if frame.cols != self.backend.width:
            raise FrameError(f"a frame is {frame.cols} wide and this model {self.backend.width}")
        if frame.payload is Payload.F32:
            return np.frombuffer(frame.data, np.float32).reshape(n, frame.cols)
        return native.decode(WireType(frame.payload), frame.data, n, frame.cols)

    def _apply(self, op: Op) -> None:
        slots = (op.source, op.target) if isinstance(op, CopySlot) else (op.slot,)
        if max(slots) >= self._slots:
            raise FrameError(f"an operation names slot {max(slots)} and this stage has {self._slots}")
        match op:
            case FreeSlot(slot):
                self.backend.trim(slot, 0)
                self.backend.set_sampler(slot, None)
            case TrimSlot(slot, position):
                self.backend.trim(slot, position)
            case CopySlot(source, target, position):
                self.backend.copy(source, target, position)
            case SetSampler(slot, spec):
                if self.backend.last:
                    self.backend.set_sampler(slot, SamplerSpec.decode(spec))

    def close(self) -> None:
        self.backend.close()
