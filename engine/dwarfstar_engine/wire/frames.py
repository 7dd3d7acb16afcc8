"""Frames: what travels the ring. Pure bytes ⇄ dataclasses, once per frame and hop, so no Python object per row.

Theory. A **step** frame is one micro-batch: for each row its KV slot, position and whether a token is to be sampled
behind it, its token, and from stage to stage its encoded activations. Operations that must keep order with the rows
travel in the same frame and are applied first, in order. The last stage answers with a **result** frame; a stage that
cannot run a frame sends a **fault** frame instead, which later stages pass on.

Rows of a slot replace what it held from their position on, so a slot is given away, and wrong guesses are taken back,
by sending what is right. A frame of steps may go round by itself for a number of **rounds**: the last stage sends the
rows behind the tokens it drew to the first one, under the same number, without those that ended their text, and its
result says so. A row that was guessed (``Want.CHECKED``) is answered only if its token is the one that was drawn for
its position; else it was for nothing. Frames of a **prompt** may be overtaken by others inside a stage.

A frame that is a **replay** has rows again that were computed before, for the next ``stages`` stages, which have lost
them. The last of these sends on what is left without the rows: nothing, where nobody waits for an answer (``UNASKED``).
Layers further on have theirs still.

Layout, little endian: header (44 bytes) · positions i32[n] · tokens i32[n] · slots u16[n] · wants u8[n] · timings ·
operations · zeros to a multiple of 16 · payload · CRC32C over all before it. Result and fault frames have timings and a
payload only. A message holds one frame, or several results, one behind the other.

Invariants. A frame that decodes is whole, inside every bound below, and agrees with itself: counts match lengths, slots
and positions are in range. The CRC is the last thing in the frame, so the CRC over *all* bytes of a sound frame is one
constant, and checking needs no copy. Decoded arrays and payloads are read-only views of the bytes received.

Bounds are on what a peer may make us believe or allocate; faults of our own in building frames are assertions.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import FrameError
from dwarfstar_engine.serving import MAX_LOGPROBS
from dwarfstar_engine.wire.ops import (
    MAX_OPS,
    MAX_POSITION,
    MAX_SLOTS,
    MAX_STAGES,
    CopySlot,
    Halt,
    Op,
    Resend,
    SetSampler,
    decode_ops,
    encode_ops,
)
from dwarfstar_engine.wire.sampler_spec import MAX_SAMPLER_BYTES, SamplerSpec

__all__ = [
    "FRAME_VERSION",
    "MAX_COLS",
    "MAX_FRAME_BYTES",
    "MAX_OPS",
    "MAX_POSITION",
    "MAX_RESULTS",
    "MAX_ROUNDS",
    "MAX_ROWS",
    "MAX_SAMPLER_BYTES",
    "MAX_SLOTS",
    "MAX_TIMINGS",
    "UNASKED",
    "CopySlot",
    "FaultFrame",
    "Frame",
    "FrameKind",
    "Halt",
    "Op",
    "Payload",
    "Resend",
    "ResultFrame",
    "SampledRow",
    "SamplerSpec",
    "SetSampler",
    "StepFrame",
    "Want",
    "decode",
    "encode",
    "encode_tokens",
    "is_fault",
    "is_prompt",
    "is_replay",
    "is_result",
    "is_step",
    "is_unasked",
    "number_of",
    "outline",
    "split",
    "without_rows",
]

MAX_ROWS = 4096  # twice the largest chunk the settings allow; a longer prompt is cut into chunks
MAX_COLS = 1 << 16  # four times the width of the widest model of today
MAX_TIMINGS = MAX_STAGES
MAX_ROUNDS = 32  # a frame goes round by itself: what its stage may be wrong about is bounded by that
MAX_FRAME_BYTES = 160 << 20  # 2048 rows of 16384 f32, and room for operations
MAX_FAULT_CODE_BYTES = 64  # codes are identifiers
MAX_FAULT_MESSAGE_BYTES = 4096  # one sentence, perhaps with a path in it
MAX_RESULTS = 16  # in one message
FRAME_VERSION = 5  # of this layout and of the activation codecs
_ALIGNMENT = 16  # of the payload inside the frame, so that vector code may read it in place
_FEW_ROWS = 16  # below this, checking ranges over a Python list is quicker than by numpy

_MAGIC = b"DSf\x1a"
# magic, version, kind, payload type, zero, epoch, flags, timings, number,
# rows, cols, operations, rounds, bytes of operations, bytes of payload
_HEADER = struct.Struct("<4sBBBBIHHQIIHHII")
_CRC = struct.Struct("<I")
_RESIDUE = 0x48674BC7  # CRC32C of any bytes followed by their own CRC32C, little endian
_ROW_BYTES = 4 + 4 + 2 + 1
_PROMPT, _REPLAY = 1, 2  # flags of a step frame
UNASKED = (1 << 64) - 1  # number of a frame whose answer nobody waits for
_UNASKED = UNASKED.to_bytes(8, "little")
_KIND_AT, _FLAGS_AT, _TIMINGS_AT, _NUMBER_AT, _COUNT_AT, _PAYLOAD_AT = 5, 12, 14, 16, 24, 40
_TIMING_BYTES = 8

_RESULT_ROW = struct.Struct("<HHid")  # slot, entries of top, token, logprob
_TOP = struct.Struct("<id")

assert sys.byteorder == "little", "frames are built from arrays in place, which needs a little-endian machine"


class FrameKind(IntEnum):
    STEP = 1
    RESULT = 2
    FAULT = 3


class Payload(IntEnum):
    """What a step frame carries; the activation codecs have the numbers of ``native.WireType``."""

    NONE = 0
    F32 = 1
    F16 = 2
    Q8 = 3


class Want(IntEnum):
    """What is wanted behind a row."""

    NONE = 0
    DRAWN = 1  # a token
    CHECKED = 2  # a token, if the row's own was guessed rightly


Timings = tuple[tuple[int, int], ...]


@dataclass(slots=True, eq=False)
class StepFrame:
    """One micro-batch of n rows; n = 0 is legal when there are operations to carry.

    slots: u16[n]; positions, tokens: i32[n]; wants: u8[n], of ``Want``. prompt: the rows are of one prompt.
    data: for F32, F16, Q8 n encoded rows of ``cols`` values, contiguous; empty for NONE, towards the first stage.
    timings: per stage passed, (compute, wait for the frame) in µs. rounds: that it may go by itself after this one.
    stages: of a replay, those that are still to run it; 0: it is none. They travel in the place of the rounds.
    """

    epoch: int
    number: int
    ops: tuple[Op, ...]
    slots: NDArray[np.uint16]
    positions: NDArray[np.int32]
    tokens: NDArray[np.int32]
    wants: NDArray[np.uint8]
    payload: Payload = Payload.NONE
    data: memoryview | NDArray[Any] | bytes = b""
    cols: int = 0
    timings: Timings = ()
    prompt: bool = False
    rounds: int = 0
    stages: int = 0


@dataclass(frozen=True, slots=True)
class SampledRow:
    """One drawn token. logprob and top (best first, at most MAX_LOGPROBS) are natural logs; unasked: 0.0 and ()."""

    slot: int
    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class ResultFrame:
    """The last stage's answer to a step frame: a row for every wanted one but wrong guesses, in the step's order.

    rounds: above 0 if the last stage has sent the rows behind these on, but for those that end their text.
    """

    epoch: int
    number: int
    rows: list[SampledRow]
    timings: Timings = ()
    rounds: int = 0


@dataclass(slots=True)
class FaultFrame:
    """A stage could not run this frame. ``code``: of the error tree; ``message``: a sentence; both cut to size."""

    epoch: int
    number: int
    code: str
    message: str


Frame = StepFrame | ResultFrame | FaultFrame


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Raises FrameError if over MAX_FRAME_BYTES; other faults are ours and assert."""
    if isinstance(frame, StepFrame):
        return _encode_step(frame)
    if isinstance(frame, ResultFrame):
        rows = frame.rows
        assert len(rows) <= MAX_ROWS
        parts: list[bytes] = []
        for row in rows:
            assert 0 <= row.slot < MAX_SLOTS and len(row.top) <= MAX_LOGPROBS
            parts.append(_RESULT_ROW.pack(row.slot, len(row.top), row.token, row.logprob))
            parts.extend(_TOP.pack(token, logprob) for token, logprob in row.top)
        return _encode_other(FrameKind.RESULT, frame, len(rows), 0, b"".join(parts), frame.timings, frame.rounds)
    code = _cut_text(frame.code, MAX_FAULT_CODE_BYTES)
    message = _cut_text(frame.message, MAX_FAULT_MESSAGE_BYTES)
    return _encode_other(FrameKind.FAULT, frame, len(code), len(message), code + message, ())


def encode_tokens(
    epoch: int,
    number: int,
    ops: tuple[Op, ...],
    slots: Sequence[int],
    positions: Sequence[int],
    tokens: Sequence[int],
    wants: Sequence[int],
    prompt: bool,
    rounds: int = 0,
    stages: int = 0,
) -> bytes:
    """The bytes of a step frame for the first stage, from plain numbers: what ``encode`` of a StepFrame gives, in a
    third of the time. It lies between a result and the next frame of its stream."""
    n = len(tokens)
    assert n <= MAX_ROWS and len(slots) == len(positions) == len(wants) == n and len(ops) <= MAX_OPS
    op_data = encode_ops(ops) if ops else b""
    padding = -(_HEADER.size + n * _ROW_BYTES + len(op_data)) % _ALIGNMENT
    header = _HEADER.pack(
        _MAGIC, FRAME_VERSION, FrameKind.STEP, 0, 0, epoch, prompt | (_REPLAY if stages else 0), 0, number, n, 0,
        len(ops), stages or rounds, len(op_data), 0,
    )  # fmt: skip
    rows = struct.pack(f"<{2 * n}i{n}H{n}B", *positions, *tokens, *slots, *wants)
    body = b"".join((header, rows, op_data, bytes(padding)))
    return body + _CRC.pack(native.crc32c(body))


def is_prompt(data: bytes) -> bool:
    """Whether ``data``, if it is a frame at all, is one of a prompt."""
    return len(data) > _FLAGS_AT and data[_KIND_AT] == FrameKind.STEP and bool(data[_FLAGS_AT] & _PROMPT)


def is_replay(data: bytes) -> bool:
    """Whether ``data``, if it is a frame at all, is a replay."""
    return len(data) > _FLAGS_AT and data[_KIND_AT] == FrameKind.STEP and bool(data[_FLAGS_AT] & _REPLAY)


def is_step(data: bytes) -> bool:
    """Whether ``data``, if it is a frame at all, is a step frame."""
    return len(data) > _KIND_AT and data[_KIND_AT] == FrameKind.STEP


def is_result(data: bytes) -> bool:
    """Whether ``data``, if it is a frame at all, is a result."""
    return len(data) > _KIND_AT and data[_KIND_AT] == FrameKind.RESULT


def is_fault(data: bytes) -> bool:
    """Whether ``data``, if it is a frame at all, says that a stage could not run one."""
    return len(data) > _KIND_AT and data[_KIND_AT] == FrameKind.FAULT


def without_rows(data: bytes) -> bytes:
    """What is left of a step frame whose rows are not to go further: its operations, and that it is answered."""
    frame = decode(data)
    assert isinstance(frame, StepFrame)
    none, empty = np.empty(0, np.int32), np.empty(0, np.uint8)
    return encode(
        StepFrame(
            frame.epoch,
            frame.number,
            frame.ops,
            np.empty(0, np.uint16),
            none,
            none,
            empty,
            timings=frame.timings,
            prompt=frame.prompt,
        )
    )


def is_unasked(data: bytes) -> bool:
    """Whether nobody waits for the answer to this frame."""
    return data[_NUMBER_AT : _NUMBER_AT + 8] == _UNASKED


def outline(data: bytes) -> tuple[bool, tuple[int, ...], tuple[int, ...], tuple[Op, ...], Payload, int, int]:
    """Of a sound step frame: whether it is of a prompt, slots, positions, operations, what its payload is, of how many
    columns, and where it begins. Quicker than ``decode``: nothing is checked, no array is made."""
    _, _, _, payload, _, _, flags, timings, _, n, cols, ops, _, op_bytes, _ = _HEADER.unpack_from(data)
    slots = struct.unpack_from(f"<{n}H", data, _HEADER.size + 8 * n)
    positions = struct.unpack_from(f"<{n}i", data, _HEADER.size)
    ops_at = _HEADER.size + n * _ROW_BYTES + timings * _TIMING_BYTES
    end = ops_at + op_bytes
    done = decode_ops(data, ops_at, end, ops)
    return bool(flags & _PROMPT), slots, positions, done, _PAYLOADS[payload], cols, end + -end % _ALIGNMENT


def number_of(data: bytes) -> int:
    """The number of a sound frame."""
    return int.from_bytes(data[_NUMBER_AT : _NUMBER_AT + 8], "little")


def split(data: bytes) -> list[bytes]:
    """The frames of a message, unchecked but for their lengths. Raises FrameError if results are cut off, or too many.

    What is no result is one frame, sound or not.
    """
    found: list[bytes] = []
    at, size = 0, len(data)
    while len(found) < MAX_RESULTS:
        if size - at < _HEADER.size or data[at + _KIND_AT] != FrameKind.RESULT:
            end = size
        else:
            timings = int.from_bytes(data[at + _TIMINGS_AT : at + _NUMBER_AT], "little")
            payload = int.from_bytes(data[at + _PAYLOAD_AT : at + _HEADER.size], "little")
            end = at + _HEADER.size + timings * _TIMING_BYTES + payload + _CRC.size
        if end == size:
            found.append(data[at:] if at else data)
            return found
        if end > size:
            break
        found.append(data[at:end])
        at = end
    raise FrameError("Results in one message are cut off or too many; the connection is restarted.")


def count_rows(data: bytes) -> int:
    """Rows that a step frame says it has; 0 for other frames, and what is none."""
    if len(data) < _HEADER.size or data[_KIND_AT] != FrameKind.STEP:
        return 0
    return int.from_bytes(data[_COUNT_AT : _COUNT_AT + 4], "little")


def decode(data: bytes) -> Frame:
    """The frame in ``data``, whose arrays and payload are views of it. Raises FrameError naming what is wrong."""
    size = len(data)
    if size < _HEADER.size + _CRC.size:
        raise FrameError(f"A frame of {size} bytes is too short to be one; the connection is restarted.")
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"A frame of {size} bytes is over the bound of {MAX_FRAME_BYTES}; lower the setting chunk.")
    header = _HEADER.unpack_from(data)
    if header[0] != _MAGIC:
        raise FrameError("A message is not a DwarfStar frame; check that the peer's address is a stage's.")
    if header[1] != FRAME_VERSION:
        raise FrameError(
            f"A frame has version {header[1]}, this build speaks {FRAME_VERSION}; run one release everywhere."
        )
    if native.crc32c(data) != _RESIDUE:
        raise FrameError("A frame's checksum is wrong: it was damaged on the way; the connection is restarted.")
    kind = header[2]
    if kind == FrameKind.STEP:
        return _decode_step(data, header)
    if kind == FrameKind.RESULT:
        return _decode_result(data, header)
    if kind == FrameKind.FAULT:
        return _decode_fault(data, header)
    raise FrameError(f"A frame has the unknown kind {kind}; run one release everywhere.")


# --- step ------------------------------------------------------------------------------------------------------------


def _encode_step(frame: StepFrame) -> bytes:
    n, ops, timings = len(frame.positions), frame.ops, frame.timings
    data: Any = frame.data  # any buffer; numpy's types do not say that arrays are
    assert n <= MAX_ROWS and len(frame.slots) == n == len(frame.wants), "one slot, position and want per row"
    assert frame.positions.dtype == frame.tokens.dtype == np.int32 and len(frame.tokens) == n
    assert frame.slots.dtype == np.uint16 and frame.wants.dtype == np.uint8
    assert 0 <= frame.rounds <= MAX_ROUNDS and 0 <= frame.stages <= MAX_STAGES and not (frame.rounds and frame.stages)
    assert len(ops) <= MAX_OPS and len(timings) <= MAX_TIMINGS and frame.cols <= MAX_COLS
    payload_bytes = len(data) if isinstance(data, bytes) else data.nbytes
    problem = _payload_problem(frame.payload, n, frame.cols, payload_bytes)
    assert not problem, problem
    op_data = encode_ops(ops)
    middle = n * _ROW_BYTES + len(timings) * _TIMING_BYTES + len(op_data)
    padding = -(_HEADER.size + middle) % _ALIGNMENT
    _check_size(_HEADER.size + middle + padding + payload_bytes + _CRC.size)
    flags = frame.prompt | (_REPLAY if frame.stages else 0)
    header = _HEADER.pack(
        _MAGIC, FRAME_VERSION, FrameKind.STEP, frame.payload, 0, frame.epoch, flags, len(timings),
        frame.number, n, frame.cols, len(ops), frame.stages or frame.rounds, len(op_data), payload_bytes,
    )  # fmt: skip
    rows = (frame.positions.tobytes(), frame.tokens.tobytes(), frame.slots.tobytes(), frame.wants.tobytes())
    head = b"".join((header, *rows, _encode_timings(timings), op_data, bytes(padding)))
    # The payload is read twice (CRC, join) and copied once.
    return b"".join((head, data, _CRC.pack(native.crc32c(data, native.crc32c(head)))))


def _decode_step(data: bytes, header: tuple[int, ...]) -> StepFrame:
    _, _, _, payload, _, epoch, flags, timing_count, number, n, cols, op_count, rounds, op_bytes, payload_bytes = header
    if n > MAX_ROWS or cols > MAX_COLS or op_count > MAX_OPS or timing_count > MAX_TIMINGS:
        raise FrameError(
            f"A frame is out of bounds: {n} rows of {cols}, {op_count} operations, {timing_count} timings."
        )
    tokens_at = _HEADER.size + 4 * n
    slots_at = tokens_at + 4 * n
    wants_at = slots_at + 2 * n
    timings_at = wants_at + n
    ops_at = timings_at + timing_count * _TIMING_BYTES
    ops_end = ops_at + op_bytes
    payload_at = ops_end + -ops_end % _ALIGNMENT
    if payload_at + payload_bytes + _CRC.size != len(data):
        raise FrameError(f"A frame of {len(data)} bytes does not have the length that its counts give.")
    replay = bool(flags & _REPLAY)
    unknown = flags > _PROMPT | _REPLAY or not replay <= rounds <= (MAX_STAGES if replay else MAX_ROUNDS)
    if payload > Payload.Q8 or unknown:
        raise FrameError(
            f"A frame has payload type {payload}, flags {flags}, {rounds} rounds: unknown; run one release everywhere."
        )
    if problem := _payload_problem(payload, n, cols, payload_bytes):
        raise FrameError(problem)
    positions = np.frombuffer(data, np.int32, n, _HEADER.size)
    tokens = np.frombuffer(data, np.int32, n, tokens_at)
    slots = np.frombuffer(data, np.uint16, n, slots_at)
    wants = np.frombuffer(data, np.uint8, n, wants_at)
    if n and not _rows_in_range(positions, tokens, slots, wants):
        raise FrameError("A frame has a row whose slot, position or output mark is out of range.")
    body = memoryview(data)[payload_at : payload_at + payload_bytes]
    return StepFrame(
        epoch, number, decode_ops(data, ops_at, ops_end, op_count), slots, positions, tokens, wants,
        _PAYLOADS[payload], body, cols, _decode_timings(data, timings_at, timing_count), bool(flags & _PROMPT),
        0 if replay else rounds, rounds if replay else 0,
    )  # fmt: skip


_PAYLOADS = tuple(Payload)  # by number: quicker than calling the enum


def _payload_problem(payload: int, n: int, cols: int, size: int) -> str:
    """Why ``size`` bytes cannot be n rows of ``cols`` values; empty when they can."""
    encoded = payload != Payload.NONE and n > 0
    expected = native.encoded_size(native.WireType(payload), n, cols) if encoded else 0
    if size == expected:
        return ""
    return f"A frame's payload has {size} bytes where {n} rows of {cols} values (type {payload}) have {expected}."


def _rows_in_range(
    positions: NDArray[np.int32], tokens: NDArray[np.int32], slots: NDArray[np.uint16], wants: NDArray[np.uint8]
) -> bool:
    if len(positions) < _FEW_ROWS:
        held = positions.tolist()
        low, high, slot, want = min(held), max(held), max(slots.tolist()), max(wants.tolist())
        token = min(tokens.tolist())
    else:
        low, high, slot, want = int(positions.min()), int(positions.max()), int(slots.max()), int(wants.max())
        token = int(tokens.min())
    return bool(low >= 0 and high <= MAX_POSITION and token >= 0 and slot < MAX_SLOTS and want <= Want.CHECKED)


# --- result and fault ------------------------------------------------------------------------------------------------


def _encode_other(
    kind: FrameKind,
    frame: ResultFrame | FaultFrame,
    rows: int,
    cols: int,
    payload: bytes,
    timings: Timings,
    rounds: int = 0,
) -> bytes:
    assert len(timings) <= MAX_TIMINGS
    _check_size(_HEADER.size + len(timings) * _TIMING_BYTES + len(payload) + _CRC.size)
    head = _HEADER.pack(
        _MAGIC, FRAME_VERSION, kind, Payload.NONE, 0, frame.epoch, 0, len(timings), frame.number,
        rows, cols, 0, rounds, 0, len(payload),
    )  # fmt: skip
    body = b"".join((head, _encode_timings(timings), payload))
    return body + _CRC.pack(native.crc32c(body))


def _decode_result(data: bytes, header: tuple[int, ...]) -> ResultFrame:
    _, _, _, _, _, epoch, _, timing_count, number, n, _, _, rounds, _, payload_bytes = header
    at, end = _other_payload(data, timing_count, payload_bytes)
    if n > MAX_ROWS or rounds > MAX_ROUNDS:
        raise FrameError(f"A result has {n} rows and {rounds} rounds, more than any frame.")
    rows: list[SampledRow] = []
    for _ in range(n):
        if at + _RESULT_ROW.size > end:
            raise FrameError("A result ends in the middle of a row.")
        slot, top_count, token, logprob = _RESULT_ROW.unpack_from(data, at)
        at += _RESULT_ROW.size
        top_end = at + top_count * _TOP.size
        if slot >= MAX_SLOTS or top_count > MAX_LOGPROBS or token < 0 or logprob != logprob or top_end > end:
            raise FrameError(f"A result has a row out of range: slot {slot}, token {token}, logprob {logprob}.")
        top = tuple(_TOP.iter_unpack(data[at:top_end])) if top_count else ()
        rows.append(SampledRow(slot, token, logprob, top))
        at = top_end
    if at != end:
        raise FrameError("A result is longer than its rows.")
    return ResultFrame(epoch, number, rows, _decode_timings(data, _HEADER.size, timing_count), rounds)


def _decode_fault(data: bytes, header: tuple[int, ...]) -> FaultFrame:
    _, _, _, _, _, epoch, _, timing_count, number, code_bytes, message_bytes, _, _, _, payload_bytes = header
    at, end = _other_payload(data, timing_count, payload_bytes)
    if (
        code_bytes > MAX_FAULT_CODE_BYTES
        or message_bytes > MAX_FAULT_MESSAGE_BYTES
        or end - at != code_bytes + message_bytes
    ):
        raise FrameError("A fault frame's text does not have the length its header gives.")
    text = data[at : at + code_bytes], data[at + code_bytes : end]
    code, message = (part.decode("utf-8", "replace") for part in text)
    return FaultFrame(epoch, number, code, message)


def _other_payload(data: bytes, timing_count: int, payload_bytes: int) -> tuple[int, int]:
    at = _HEADER.size + timing_count * _TIMING_BYTES
    if timing_count > MAX_TIMINGS or at + payload_bytes + _CRC.size != len(data):
        raise FrameError(f"A frame of {len(data)} bytes does not have the length that its counts give.")
    return at, at + payload_bytes


def _encode_timings(timings: Timings) -> bytes:
    return struct.pack(f"<{2 * len(timings)}I", *_flat(timings)) if timings else b""


def _flat(timings: Timings) -> Iterable[int]:
    return (min(value, 0xFFFFFFFF) for pair in timings for value in pair)  # over an hour: as good as for ever


def _decode_timings(data: bytes, at: int, count: int) -> Timings:
    if not count:
        return ()
    values = struct.unpack_from(f"<{2 * count}I", data, at)
    return tuple(zip(values[::2], values[1::2], strict=True))


def _cut_text(text: str, limit: int) -> bytes:
    data = text.encode("utf-8", "replace")
    return data if len(data) <= limit else data[:limit].decode("utf-8", "ignore").encode()


def _check_size(size: int) -> None:
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"A frame of {size} bytes is over the bound of {MAX_FRAME_BYTES}; lower the setting chunk.")
