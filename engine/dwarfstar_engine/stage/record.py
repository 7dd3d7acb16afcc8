"""What a stage sent, so that a stage behind it that loses its cells gets its rows again.

Theory. The rows of a slot are kept as they were encoded, in *pieces*: a frame of a prompt as it was, as llama.cpp's
bits depend on which rows went together, and steps, each of which is computed alone, one behind the other. Rows replace
what their slot had from their position on, here as in the KV cache, and operations apply in order. A frame of a prompt
of which only a beginning is left stays whole: it is sent again whole, and what replaced its end comes after it.

Frames are noted as they leave, which costs a stage next to nothing between two tokens, and looked into FOLD at a time.

Bounds. ``budget`` bytes of rows, and FOLD frames that were not looked into. Beyond it, the slot that was used least
lately is forgotten, of several the largest; it is recorded again from when it begins anew. What was told of (``rows``)
is not forgotten before it is written again, or SPARED folds have passed: it is about to be asked for.

Invariants. What is recorded of a slot begins at position 0 and has no gap; a slot with a gap has no record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dwarfstar_engine import native
from dwarfstar_engine.batch.restore import REPLAY_ROWS
from dwarfstar_engine.native import WireType
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import UNASKED, CopySlot, Payload, StepFrame

FOLD = 32  # frames: together they take a fraction of one token's time, and their code is warm then
SPARED = 256  # folds: a sequence is brought back within a few
LARGE = 256 << 10  # bytes: frames of prompts, which wait for nobody, and would be many bytes together


@dataclass(slots=True)
class _Piece:
    """Rows from ``start`` on, the first ``rows`` of which count. wide: they went together, as rows of a prompt."""

    start: int
    rows: int
    wide: bool
    payload: Payload
    cols: int
    row_bytes: int
    data: bytearray

    @property
    def end(self) -> int:
        return self.start + self.rows


@dataclass(slots=True)
class _Slot:
    """used: when it was written last, by a count of folds."""

    pieces: list[_Piece] = field(default_factory=list)
    used: int = 0

    @property
    def end(self) -> int:
        return self.pieces[-1].end if self.pieces else 0

    @property
    def bytes(self) -> int:
        return sum(len(piece.data) for piece in self.pieces)

    def cut(self, position: int) -> None:
        while self.pieces and self.pieces[-1].start >= position:
            self.pieces.pop()
        if self.pieces and self.pieces[-1].end > position:
            last = self.pieces[-1]
            last.rows = position - last.start
            if not last.wide:
                del last.data[last.rows * last.row_bytes :]


class Record:
    """See the module. All calls come from one thread."""

    def __init__(self, budget: int) -> None:
        self._budget, self._bytes, self._folds = budget, 0, 0
        self._told = -SPARED  # the fold at which somebody was told what there is
        self._fresh: list[bytes] = []
        self._slots: dict[int, _Slot] = {}

    def note(self, data: bytes) -> None:
        """A frame that was sent on."""
        self._fresh.append(data)
        if len(self._fresh) >= FOLD or len(data) > LARGE:
            self._fold()

    def clear(self) -> None:
        self._fresh.clear()
        self._slots.clear()
        self._bytes = 0

    def rows(self) -> dict[int, int]:
        """Of each slot, how many positions are recorded."""
        self._fold()
        self._told = self._folds
        return {number: slot.end for number, slot in self._slots.items()}

    def again(self, epoch: int, slot: int, begin: int, end: int, *, prompt: bool, stages: int) -> Iterator[StepFrame]:
        """The rows of a slot's frames that begin in [begin, end), for the next ``stages`` stages, in the shapes they
        had. prompt: they are those of a prompt. Rows that are not recorded are missing."""
        self._fold()
        for piece in list(self._slots[slot].pieces) if slot in self._slots else ():
            if piece.wide and prompt:
                if begin <= piece.start < end:
                    rows = len(piece.data) // piece.row_bytes
                    yield _frame(epoch, slot, piece, 0, rows, prompt, stages)
                continue
            first, last = max(begin, piece.start), min(end, piece.end)
            for at in range(first, last, REPLAY_ROWS):
                yield _frame(epoch, slot, piece, at - piece.start, min(REPLAY_ROWS, last - at), prompt, stages)

    # --- looking into frames ---

    def _fold(self) -> None:
        fresh, self._fresh = self._fresh, []
        self._folds += 1
        for data in fresh:
            self._take(data)
        while self._bytes > self._budget:
            told = self._told if self._folds - self._told < SPARED else -1
            loose = [number for number, slot in self._slots.items() if slot.used > told]
            self._forget(min(loose, key=lambda one: (self._slots[one].used, -self._slots[one].bytes)))

    def _take(self, data: bytes) -> None:
        if not frames.is_step(data):
            return
        prompt, slots, positions, ops, payload, cols, at = frames.outline(data)
        for op in ops:
            if isinstance(op, CopySlot):
                self._copy(op)
        if not slots or payload is Payload.NONE:
            return
        row_bytes = native.encoded_size(WireType(payload), 1, cols)
        view = memoryview(data)
        if prompt:  # of one slot, one behind the other
            rows = len(slots)
            self._put(
                _Piece(positions[0], rows, True, payload, cols, row_bytes, bytearray(view[at : at + rows * row_bytes])),
                slots[0],
            )
            return
        for slot, position in zip(slots, positions, strict=True):
            self._put(_Piece(position, 1, False, payload, cols, row_bytes, bytearray(view[at : at + row_bytes])), slot)
            at += row_bytes

    def _put(self, piece: _Piece, number: int) -> None:
        slot = self._slots.get(number)
        if slot is None:
            if piece.start:
                return  # forgotten
            slot = self._slots[number] = _Slot()
        slot.used = self._folds
        if piece.start < slot.end:
            before = slot.bytes
            slot.cut(piece.start)
            self._bytes -= before - slot.bytes
        if piece.start > slot.end:
            self._forget(number)
            return
        self._bytes += len(piece.data)
        last = slot.pieces[-1] if slot.pieces else None
        like = last is not None and not last.wide and not piece.wide
        if like and last is not None and (last.payload, last.cols) == (piece.payload, piece.cols):
            last.data += piece.data
            last.rows += 1
        else:
            slot.pieces.append(piece)

    def _copy(self, op: CopySlot) -> None:
        source = self._slots.get(op.source)
        if op.source == op.target:
            return
        self._forget(op.target)
        if source is None or not op.position:
            return
        target = self._slots[op.target] = _Slot(used=self._folds)
        for piece in source.pieces:
            target.pieces.append(
                _Piece(piece.start, piece.rows, piece.wide, piece.payload, piece.cols, piece.row_bytes, piece.data[:])
            )
        target.cut(op.position)
        self._bytes += target.bytes

    def _forget(self, number: int) -> None:
        slot = self._slots.pop(number, None)
        if slot is not None:
            self._bytes -= slot.bytes


def _frame(epoch: int, slot: int, piece: _Piece, first: int, rows: int, prompt: bool, stages: int) -> StepFrame:
    start, row_bytes = piece.start + first, piece.row_bytes
    return StepFrame(
        epoch=epoch,
        number=UNASKED,
        ops=(),
        slots=np.full(rows, slot, np.uint16),
        positions=np.arange(start, start + rows, dtype=np.int32),
        tokens=np.zeros(rows, np.int32),
        wants=np.zeros(rows, np.uint8),
        payload=piece.payload,
        data=bytes(piece.data[first * row_bytes : (first + rows) * row_bytes]),
        cols=piece.cols,
        prompt=prompt,
        stages=stages,
    )
