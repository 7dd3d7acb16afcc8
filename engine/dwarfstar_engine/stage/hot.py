"""The hot path of a stage: ``native/src/stage.cpp`` bound to the installed llama.cpp.

A :class:`HotStage` makes all of a slice's llama.cpp calls: for :class:`~.llama.LlamaSlice` rows in and rows out, and
for the worker whole frames, bytes in and bytes out. Why it is not Python: a few dozen calls around a decode cost 35 µs
warm and 200 µs after llama.cpp has streamed a slice through the caches (measured), and a token passes every stage.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import FrameError, StageError
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llamacpp import llama

FloatRows = NDArray[np.float32]
FRAME_ROOM = 1 << 12  # bytes of a frame beside its activations: header, rows, timings, tokens drawn; see HotStage.run
ROW_ROOM = 32  # of these, for each row

_NAME, _OVERFLOW, _RANGE, _UNSUPPORTED, _DECODE = -5, -6, -2, -9, -10
_KV_FULL = 1  # llama_decode found no cells

_p = ctypes.c_void_p


class _Config(ctypes.Structure):
    """``ds_stage_config`` of dwarfstar_native.h."""

    _fields_ = (
        *((name, _p) for name in ("context", "decode", "logits", "sample")),
        *((name, _p) for name in ("chain_remove", "chain_add", "init_dist", "sampler_free")),
        *((name, _p) for name in ("tap", "to_float", "rows")),
        ("n_rows", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("n_embd", "n_vocab", "capacity", "slots", "planes", "wire")),
        *((name, ctypes.c_bool) for name in ("first", "last", "injects", "token_input")),
    )


@dataclass(frozen=True, slots=True)
class Table:
    """Where embedding rows lie in memory, as ``native.embed_rows`` takes them."""

    to_float: int
    base: int
    n_rows: int
    row_bytes: int
    scale: float


def _function(name: str) -> int:
    value = ctypes.cast(getattr(llama._lib, name), _p).value
    assert value, name
    return value


class HotStage:
    """Bound to one context; everything given must outlive it. Raises StageError if llama.cpp's batch is another."""

    def __init__(
        self,
        *,
        context: int,
        tap: native.Tap | None,
        n_embd: int,
        n_vocab: int,
        capacity: int,
        slots: int,
        planes: int,
        wire: WireType,
        last: bool,
        injects: bool,
        token_input: bool,
        table: Table | None,
    ) -> None:
        config = _Config(
            context=context,
            decode=_function("llama_decode"),
            logits=_function("llama_get_logits_ith"),
            sample=_function("llama_sampler_sample"),
            chain_remove=_function("llama_sampler_chain_remove"),
            chain_add=_function("llama_sampler_chain_add"),
            init_dist=_function("llama_sampler_init_dist"),
            sampler_free=_function("llama_sampler_free"),
            tap=tap.user_data if tap is not None else None,
            n_embd=n_embd,
            n_vocab=n_vocab,
            capacity=capacity,
            slots=slots,
            planes=planes,
            wire=wire,
            first=table is not None,
            last=last,
            injects=injects,
            token_input=token_input,
        )
        if table is not None:
            config.to_float, config.rows, config.scale = table.to_float, table.base, table.scale
            config.n_rows, config.row_bytes = table.n_rows, table.row_bytes
        self._library = native.library()
        handle = _p()
        batch_bytes = ctypes.sizeof(llama.llama_batch)
        if self._library.ds_stage_new(ctypes.byref(config), batch_bytes, ctypes.byref(handle)) != 0:
            raise StageError("this llama.cpp has another batch structure: install the llama-cpp-python release we pin")
        self._handle = handle.value
        self._free = weakref.finalize(self, self._library.ds_stage_free, self._handle)
        self._tap = tap  # kept alive
        self._last, self._n_embd, self._capacity, self._slots = last, n_embd, capacity, slots
        self._room = FRAME_ROOM + capacity * ROW_ROOM + (0 if last else native.encoded_size(wire, capacity, n_embd))
        self._out = ctypes.create_string_buffer(self._room)

    def step(
        self, rows: FloatRows, positions: NDArray[np.int32], slots: NDArray[np.uint16], wants: NDArray[np.uint8]
    ) -> FloatRows | None:
        """Rows through the slice: see ``LlamaSlice.step``."""
        n = rows.shape[0]
        if n > self._capacity:
            raise FrameError(f"a frame has {n} rows and this stage takes {self._capacity}: the setting chunk differs")
        if n and int(slots.min()) != int(slots.max()):
            raise FrameError("a frame has rows of several slots, and llama.cpp would reorder them")
        if self._last and int(wants.sum()) > self._slots:  # llama.cpp has room for so many rows of logits, and aborts
            raise FrameError(
                f"a frame wants {int(wants.sum())} tokens and this stage draws one per slot: {self._slots}"
            )
        assert rows.dtype == np.float32 and rows.shape == (n, self._n_embd) and rows.flags.c_contiguous
        assert positions.dtype == np.int32 and slots.dtype == np.uint16 and wants.dtype == np.uint8
        assert len(positions) == len(slots) == len(wants) == n
        out = None if self._last else np.empty((n, self._n_embd), np.float32)
        status = self._library.ds_stage_step(
            self._handle,
            n,
            rows.ctypes.data,
            positions.ctypes.data,
            slots.ctypes.data,
            wants.ctypes.data,
            None if out is None else out.ctypes.data,
        )
        if status != 0:
            raise self._fault(status)
        return out

    def set_sampler(self, slot: int, *, chain: int | None, dist: int, seed: int) -> None:
        """How a slot's tokens are drawn: greedily, or by a llama.cpp chain whose sampler ``dist`` draws (-1: none)."""
        mode = 1 if chain is None else 2
        status = self._library.ds_stage_sampler(self._handle, slot, mode, chain, dist, seed)
        assert status == 0, status

    def clear_sampler(self, slot: int) -> None:
        """Forget a slot's sampler, before its chain is freed."""
        self._library.ds_stage_sampler(self._handle, slot, 0, None, -1, 0)

    def draw(self, row: int, slot: int, position: int) -> int:
        """The token behind a batch row of the last step. Raises FrameError if the slot has no sampler."""
        token = int(self._library.ds_stage_draw(self._handle, row, slot, position))
        if token == _RANGE:
            raise FrameError(f"slot {slot} has no sampler on this stage")
        assert token >= 0, token
        return token

    def run(self, frame: bytes, wait_us: int) -> bytes | None:
        """The frame for the next hop; None if this frame needs the general way. Raises StageError."""
        wait_us = min(wait_us, 0xFFFFFFFF)  # over an hour: as good as for ever, and ctypes would wrap it
        size = self._library.ds_stage_run(self._handle, frame, len(frame), wait_us, self._out, self._room)
        if size > 0:
            return ctypes.string_at(self._out, size)
        if size == _UNSUPPORTED:
            return None
        raise self._fault(size)

    def _fault(self, status: int) -> StageError:
        if status == _DECODE:
            code = self._library.ds_stage_error(self._handle)
            if code == _KV_FULL:
                return StageError("the KV cache of this stage is full", code="kv_full")
            return StageError(f"llama.cpp failed to run a frame (code {code}): {llamacpp.log_tail()}")
        if status in (_NAME, _OVERFLOW):
            return StageError(
                "hidden states were not found where they should be: this llama.cpp build names its tensors differently",
                code="capture_failed",
            )
        raise AssertionError(f"native stage: status {status}")


def draw_seed(seed: int, position: int) -> int:
    """32 bits for llama.cpp's generator from a 64-bit seed and a position; never 0xFFFFFFFF."""
    return int(native.library().ds_draw_seed(seed, position))
