"""Operations on KV slots that travel in a step frame, because they must keep their order with the rows around them.

A stage applies the operations of a frame in order, before the frame's rows. Freeing needs none: rows of a slot replace
what it held from their position on. Encoded: kind u8, slot u16, then what the
kind needs. Every decoded operation names slots below MAX_SLOTS and positions in 0 … MAX_POSITION.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from dwarfstar_engine.errors import FrameError
from dwarfstar_engine.wire.sampler_spec import MAX_SAMPLER_BYTES

MAX_SLOTS = 256  # llama.cpp's LLAMA_MAX_SEQ
MAX_POSITION = (1 << 24) - 1  # sixteen times the longest context the settings allow
MAX_OPS = 2 * MAX_SLOTS  # each slot filled by a copy and given a sampler in one frame

_HEAD = struct.Struct("<BH")  # kind, slot; then by kind:
_TARGET = struct.Struct("<Hi")  # target, position
_LENGTH = struct.Struct("<I")
_ROWS = struct.Struct("<iiHH")  # begin, end, stage, until
_COPY, _SAMPLER, _HALT, _RESEND = 1, 2, 3, 4
MAX_STAGES = 256  # of a ring; each has at least one layer, and models have fewer


@dataclass(frozen=True, slots=True)
class CopySlot:
    """Let ``target`` hold ``source``'s KV cells before ``position``, and nothing else."""

    source: int
    target: int
    position: int


@dataclass(frozen=True, slots=True)
class SetSampler:
    """Give a slot a fresh sampler; ``spec`` is an encoded SamplerSpec. Only the last stage reads it."""

    slot: int
    spec: bytes


@dataclass(frozen=True, slots=True)
class Halt:
    """Draw nothing any more for a slot until it has another sampler: rows that go on by themselves end."""

    slot: int


@dataclass(frozen=True, slots=True)
class Resend:
    """Have a stage send again what it sent of a slot's rows ``begin`` to ``end``, ahead of this frame: the stages
    behind it and before ``until`` have lost theirs. Stages are counted along the ring, from 0."""

    slot: int
    begin: int
    end: int
    stage: int
    until: int


Op = CopySlot | SetSampler | Halt | Resend


def encode_ops(ops: tuple[Op, ...]) -> bytes:
    """The operations' bytes. One out of range is our fault and asserts."""
    return b"".join([_encode(op) for op in ops]) if ops else b""


def _encode(op: Op) -> bytes:
    match op:
        case CopySlot(source, target, position):
            _assert_cell(source, position)
            _assert_cell(target, position)
            return _HEAD.pack(_COPY, source) + _TARGET.pack(target, position)
        case SetSampler(slot, spec):
            _assert_cell(slot, 0)
            assert len(spec) <= MAX_SAMPLER_BYTES
            return _HEAD.pack(_SAMPLER, slot) + _LENGTH.pack(len(spec)) + spec
        case Halt(slot):
            _assert_cell(slot, 0)
            return _HEAD.pack(_HALT, slot)
        case Resend(slot, begin, end, stage, until):
            _assert_cell(slot, end)
            assert 0 <= begin <= end and 0 <= stage < until - 1 < MAX_STAGES, op
            return _HEAD.pack(_RESEND, slot) + _ROWS.pack(begin, end, stage, until)


def _assert_cell(slot: int, position: int) -> None:
    assert 0 <= slot < MAX_SLOTS and 0 <= position <= MAX_POSITION, f"slot {slot}, position {position}"


def decode_ops(data: bytes, start: int, end: int, count: int) -> tuple[Op, ...]:
    """``count`` operations from ``data[start:end]``, which they must fill. Raises FrameError."""
    if not count and start == end:
        return ()
    ops: list[Op] = []
    view = memoryview(data)[:end]  # so that unpacking past the operations fails
    try:
        for _ in range(count):
            op, start = _decode(view, start)
            ops.append(op)
    except struct.error:
        raise FrameError("A frame's operations end in the middle of one.") from None
    if start != end:
        raise FrameError("A frame's operations are shorter than its header says.")
    return tuple(ops)


def _decode(view: memoryview, at: int) -> tuple[Op, int]:
    kind, slot = _HEAD.unpack_from(view, at)
    at += _HEAD.size
    target, position = slot, 0
    op: Op
    if kind == _COPY:
        target, position = _TARGET.unpack_from(view, at)
        at += _TARGET.size
        op = CopySlot(slot, target, position)
    elif kind == _SAMPLER:
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if length > MAX_SAMPLER_BYTES or at + length > len(view):
            raise FrameError(f"A frame sets a sampler of {length} bytes, more than it may or does hold.")
        op = SetSampler(slot, bytes(view[at : at + length]))
        at += length
    elif kind == _HALT:
        op = Halt(slot)
    elif kind == _RESEND:
        begin, position, stage, until = _ROWS.unpack_from(view, at)
        at += _ROWS.size
        if not 0 <= begin <= position or not stage < until - 1 < MAX_STAGES:
            raise FrameError(f"A frame asks stage {stage} for rows {begin} to {position} up to {until}: out of range.")
        op = Resend(slot, begin, position, stage, until)
    else:
        raise FrameError(f"A frame has the unknown operation {kind}; run one release everywhere.")
    if max(slot, target) >= MAX_SLOTS or not 0 <= position <= MAX_POSITION:
        raise FrameError(
            f"A frame has an operation on slot {slot}, target {target}, position {position}: out of range."
        )
    return op, at
