"""The hot path of a stage: ``native/src/stage.cpp`` bound to the installed llama.cpp.

A :class:`HotStage` makes all of a slice's llama.cpp calls: for :class:`~.llama.LlamaSlice` rows in and rows out, and
for the worker whole frames, bytes in and bytes out. It has two contexts, so that steps go before a prompt's rows. Why
it is not Python: a few dozen calls around a decode cost 35 µs warm and 200 µs after llama.cpp has streamed a slice
through the caches (measured), and a token passes every stage.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Collection, Sequence
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

_NAME, _OVERFLOW, _RANGE, _UNSUPPORTED, _DECODE, _GAP, _GUESS = -5, -6, -2, -9, -10, -11, -12
_SIZE, _MEMORY = -3, -8
_KV_FULL = 1  # llama_decode found no cells

_p = ctypes.c_void_p


class _Side(ctypes.Structure):
    """``ds_stage_context`` of dwarfstar_native.h."""

    _fields_ = (
        *((name, _p) for name in ("context", "memory", "tap")),
        *((name, ctypes.c_int32) for name in ("capacity", "outputs")),
    )


class _Config(ctypes.Structure):
    """``ds_stage_config`` of dwarfstar_native.h."""

    _fields_ = (
        ("steps", _Side),
        ("prompt", _Side),
        ("own", ctypes.POINTER(_Side)),
        *((name, _p) for name in ("decode", "logits", "seq_rm", "state_size", "state_get", "state_set")),
        *((name, _p) for name in ("whole_size", "whole_get", "sample")),
        *((name, _p) for name in ("chain_remove", "chain_add", "init_dist", "sampler_free")),
        *((name, _p) for name in ("to_float", "rows")),
        ("n_rows", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("n_embd", "n_vocab", "slots", "planes", "window")),
        *((name, ctypes.c_bool) for name in ("first", "last", "injects", "token_input")),
    )


@dataclass(frozen=True, slots=True)
class Side:
    """A context and what belongs to it; ``ds_stage_context``. context, memory: addresses.

    capacity: rows of a decode. outputs: rows of one whose logits are computed, on the last stage.
    """

    context: int
    memory: int
    tap: native.Tap
    capacity: int
    outputs: int

    def struct(self, taps: bool) -> _Side:
        tap = self.tap.user_data if taps else None
        return _Side(self.context, self.memory, tap, self.capacity, self.outputs)


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
    """Bound to its contexts, which must outlive it. Raises StageError if llama.cpp's batch is another.

    own: a context for each slot, or none: then ``steps`` has a sequence for each.
    """

    def __init__(
        self,
        *,
        steps: Side,
        prompt: Side,
        own: Sequence[Side] = (),
        n_embd: int,
        n_vocab: int,
        slots: int,
        planes: int,
        window: int,
        last: bool,
        injects: bool,
        token_input: bool,
        table: Table | None,
    ) -> None:
        config = _Config(
            steps=steps.struct(True),
            prompt=prompt.struct(True),
            own=(_Side * len(own))(*(side.struct(True) for side in own)) if own else None,
            decode=_function("llama_decode"),
            logits=_function("llama_get_logits_ith"),
            seq_rm=_function("llama_memory_seq_rm"),
            state_size=_function("llama_state_seq_get_size_ext"),
            state_get=_function("llama_state_seq_get_data_ext"),
            state_set=_function("llama_state_seq_set_data_ext"),
            whole_size=_function("llama_state_get_size"),
            whole_get=_function("llama_state_get_data"),
            sample=_function("llama_sampler_sample"),
            chain_remove=_function("llama_sampler_chain_remove"),
            chain_add=_function("llama_sampler_chain_add"),
            init_dist=_function("llama_sampler_init_dist"),
            sampler_free=_function("llama_sampler_free"),
            n_embd=n_embd,
            n_vocab=n_vocab,
            slots=slots,
            planes=planes,
            window=window,
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
        self._sides, self._own = (steps, prompt), own  # their taps are kept alive
        self._last, self._n_embd = last, n_embd
        self.tune(WireType.F32, batched=False)

    def tune(self, wire: WireType, *, batched: bool) -> None:
        """How frames go on: what hidden states are sent as, and whether rows of several slots are one decode."""
        status = self._library.ds_stage_tune(self._handle, wire, batched)
        assert status == 0, status
        capacity = self._sides[0].capacity
        self._room = FRAME_ROOM + capacity * ROW_ROOM
        self._room += 0 if self._last else native.encoded_size(wire, capacity, self._n_embd)
        self._out = ctypes.create_string_buffer(self._room)
        self._out_at = ctypes.addressof(self._out)
        self._feed = ctypes.c_uint64()
        self._feed_at = ctypes.addressof(self._feed)

    def step(
        self, rows: FloatRows, position: int, slot: int, wants: NDArray[np.uint8], *, prompt: bool
    ) -> FloatRows | None:
        """Rows of one slot through the slice: see ``LlamaSlice.step``."""
        n, side = rows.shape[0], self._own[slot] if self._own and not prompt else self._sides[prompt]
        if n > side.capacity:
            raise FrameError(f"a frame has {n} rows and this stage takes {side.capacity}: the setting chunk differs")
        if self._last and (wanted := int(np.count_nonzero(wants))) > side.outputs:  # llama.cpp has room for no more
            raise FrameError(f"a frame wants {wanted} tokens and this stage draws {side.outputs} at a time")
        assert rows.dtype == np.float32 and rows.shape == (n, self._n_embd) and rows.flags.c_contiguous
        assert wants.dtype == np.uint8 and len(wants) == n > 0
        out = None if self._last else np.empty((n, self._n_embd), np.float32)
        status = self._library.ds_stage_step(
            self._handle,
            prompt,
            n,
            rows.ctypes.data,
            position,
            slot,
            wants.ctypes.data,
            None if out is None else out.ctypes.data,
        )
        if status != 0:
            raise self._fault(status)
        return out

    def copy(self, source: int, target: int, position: int) -> None:
        """Let ``target`` hold what ``source`` holds before ``position``, and nothing else. Raises FrameError."""
        if (status := self._library.ds_stage_copy(self._handle, source, target, position)) != 0:
            raise self._fault(status)

    def give(self, slot: int, position: int) -> tuple[bytearray, int]:
        """What a slot holds before ``position``, for another process with this slice, and what that can be cut to. What
        it held from there on is forgotten. Raises FrameError or StageError: it stays."""
        size = int(self._library.ds_stage_give(self._handle, slot, position))
        if size < 0:
            raise self._moved(size)
        data = bytearray(size)
        status = self._library.ds_stage_given(self._handle, (ctypes.c_char * size).from_buffer(data), size)
        assert status == 0, status
        return data, self.held(slot)[1]

    def take(self, slot: int, position: int, floor: int, data: bytearray) -> None:
        """Let a slot hold what another process gave. Raises FrameError or StageError: then it holds nothing."""
        size = len(data)
        at = (ctypes.c_char * size).from_buffer(data)
        status = self._library.ds_stage_take(self._handle, slot, position, floor, at, size)
        if status != 0:
            raise self._moved(status)

    def forget(self, slot: int) -> None:
        """A slot is empty."""
        status = self._library.ds_stage_take(self._handle, slot, 0, 0, None, 0)
        assert status == 0, status

    def _moved(self, status: int) -> StageError | FrameError:
        if status == _UNSUPPORTED:
            return StageError("the cells of this model's slots do not move between processes")
        return self._fault(status)

    def clear(self) -> None:
        """Every slot is empty."""
        status = self._library.ds_stage_clear(self._handle)
        assert status == 0, status

    def held(self, slot: int) -> tuple[int, int]:
        """Positions that a slot holds, and how many it can be cut to at least, but for none. While nothing runs."""
        floor = ctypes.c_int32()
        held = int(self._library.ds_stage_held(self._handle, slot, ctypes.byref(floor)))
        assert held >= 0, held
        return held, floor.value

    @property
    def busy_s(self) -> float:
        """Seconds spent computing since it was made."""
        return int(self._library.ds_stage_busy_us(self._handle)) / 1e6

    def set_sampler(self, slot: int, *, chain: int | None, dist: int, seed: int, general: bool = False) -> None:
        """How a slot's tokens are drawn: greedily, or by a llama.cpp chain whose sampler ``dist`` draws (-1: none).

        general: its frames are not for ``run``: more is wanted of them than tokens.
        """
        mode = 1 if chain is None else 2
        status = self._library.ds_stage_sampler(self._handle, slot, mode, chain, dist, seed, general)
        assert status == 0, status

    def clear_sampler(self, slot: int) -> None:
        """Forget a slot's sampler, before its chain is freed."""
        self._library.ds_stage_sampler(self._handle, slot, 0, None, -1, 0, False)

    def draw(self, row: int, slot: int, position: int, *, guess: int = -1, prompt: bool = False) -> int | None:
        """The token behind a row of the last step; None if ``guess``, the row's own token, was a wrong one.

        Raises FrameError if the slot has no sampler.
        """
        token = int(self._library.ds_stage_draw(self._handle, prompt, row, slot, position, guess))
        if token == _GUESS:
            return None
        if token == _RANGE:
            raise FrameError(f"slot {slot} has no sampler on this stage")
        assert token >= 0, token
        return token

    def halt(self, slot: int) -> None:
        """A slot draws nothing any more, until its sampler is set."""
        status = self._library.ds_stage_halt(self._handle, slot)
        assert status == 0, status

    def end_at(self, tokens: Collection[int]) -> None:
        """Tokens behind which no row goes on by itself. Raises StageError if one is not in the vocabulary."""
        ids = np.array(sorted(tokens), np.int32)
        if self._library.ds_stage_ends(self._handle, ids.ctypes.data, len(ids)) != 0:
            raise StageError("the coordinator's model ends texts by tokens this slice does not have: its file differs")

    def run(self, frame: bytes, wait_us: int) -> tuple[bytes, bytes] | None:
        """The frame for the next hop, and the one with which the first stage goes on (empty: none).

        None if this frame needs the general way. Raises StageError.
        """
        wait_us = min(wait_us, 0xFFFFFFFF)  # over an hour: as good as for ever, and ctypes would wrap it
        size = self._library.ds_stage_run(
            self._handle, frame, len(frame), wait_us, self._out, self._room, self._feed_at
        )
        if size > 0:
            fed = self._feed.value
            return ctypes.string_at(self._out, size), ctypes.string_at(self._out_at + size, fed) if fed else b""
        if size == _UNSUPPORTED:
            return None
        raise self._fault(size)

    def close(self) -> None:
        """Let go of the contexts. Idempotent."""
        self._free()

    def _fault(self, status: int) -> StageError | FrameError:
        if status == _GAP:
            return FrameError("a frame's rows do not follow what their slot holds")
        if status == _SIZE:
            return StageError("this llama.cpp keeps cells in another way: install the llama-cpp-python release we pin")
        if status == _MEMORY:
            return StageError("this stage has no memory left to move a sequence", code="kv_full")
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
