"""A stage's record: rows come back as they were sent, in the frames they were in, and never those of another text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dwarfstar_engine import native
from dwarfstar_engine.batch.restore import REPLAY_ROWS
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage.record import FOLD, SPARED, Record
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import UNASKED, CopySlot, FaultFrame, Op, Payload, ResultFrame, StepFrame

COLS = 8
ROW = 4 * COLS


def rows(tag: int, positions: Sequence[int], wire: WireType = WireType.F32) -> bytes:
    """Each row tells its text and its position."""
    values = np.array([[tag, at, *range(COLS - 2)] for at in positions], np.float32)
    return values.tobytes() if wire is WireType.F32 else native.encode(wire, values).tobytes()


def sent(
    tag: int,
    places: Sequence[tuple[int, int]],
    *,
    prompt: bool = False,
    ops: tuple[Op, ...] = (),
    wire: WireType = WireType.F32,
) -> bytes:
    """places: (slot, position) of each row."""
    n = len(places)
    return frames.encode(
        StepFrame(
            epoch=1,
            number=7,
            ops=ops,
            slots=np.array([slot for slot, _ in places], np.uint16),
            positions=np.array([position for _, position in places], np.int32),
            tokens=np.zeros(n, np.int32),
            wants=np.ones(n, np.uint8),
            payload=Payload(wire) if n else Payload.NONE,
            data=rows(tag, [position for _, position in places], wire) if n else b"",
            cols=COLS if n else 0,
            timings=((5, 6),),
            prompt=prompt,
        )
    )


def prompt(tag: int, slot: int, begin: int, end: int, **more: Any) -> bytes:
    return sent(tag, [(slot, at) for at in range(begin, end)], prompt=True, **more)


def again(record: Record, slot: int, begin: int, end: int, *, prompt: bool) -> list[tuple[int, int]]:
    """(first position, rows) of the frames; their rows are checked to be the slot's own."""
    found = []
    for frame in record.again(9, slot, begin, end, prompt=prompt, stages=2):
        assert (frame.epoch, frame.number, frame.stages, frame.prompt) == (9, UNASKED, 2, prompt)
        assert set(frame.slots.tolist()) == {slot} and not frame.wants.any()
        frames.decode(frames.encode(frame))
        found.append((int(frame.positions[0]), len(frame.positions)))
    return found


def tags(record: Record, slot: int, end: int) -> list[int]:
    """What the next stage has after all frames: of each position, whose row it is."""
    held: dict[int, int] = {}
    for kind in (True, False):
        for frame in record.again(9, slot, 0 if kind else PROMPT, PROMPT if kind else end, prompt=kind, stages=1):
            values = np.frombuffer(bytes(frame.data), np.float32).reshape(-1, COLS)
            held = {at: tag for at, tag in held.items() if at < frame.positions[0]}
            for position, row in zip(frame.positions.tolist(), values.tolist(), strict=True):
                assert row[1] == position
                held[position] = int(row[0])
    return [held[at] for at in sorted(held)]


PROMPT = 20  # rows of each prompt below


def record_of(*data: bytes, budget: int = 1 << 20) -> Record:
    record = Record(budget)
    for one in data:
        record.note(one)
    return record


def test_prompts_come_in_their_chunks_and_answers_as_steps() -> None:
    steps = [sent(1, [(0, at), (2, at - 20)]) for at in range(20, 40)]
    record = record_of(prompt(1, 0, 0, 16), prompt(1, 0, 16, 20), *steps)
    assert record.rows() == {0: 40, 2: 20}
    assert again(record, 0, 0, 20, prompt=True) == [(0, 16), (16, 4)]
    assert again(record, 0, 16, 20, prompt=True) == [(16, 4)], "a frame is asked for where it begins"
    assert again(record, 0, 20, 39, prompt=False) == [(20, 8), (28, 8), (36, 3)] and REPLAY_ROWS == 8
    assert again(record, 1, 0, 20, prompt=True) == []
    assert tags(record, 0, 40) == [1] * 40


def test_rows_replace_what_their_slot_held() -> None:
    record = record_of(
        prompt(1, 0, 0, 16), prompt(1, 0, 16, 20), *(sent(1, [(0, at)]) for at in range(20, 30)), sent(2, [(0, 25)])
    )
    assert record.rows() == {0: 26} and tags(record, 0, 26) == [1] * 25 + [2]
    record.note(prompt(3, 0, 10, 20))
    assert record.rows() == {0: 20}
    assert again(record, 0, 0, 20, prompt=True) == [(0, 16), (10, 10)], "a chunk stays whole, for its bits"
    assert tags(record, 0, 20) == [1] * 10 + [3] * 10
    record.note(prompt(4, 0, 0, 4))
    assert record.rows() == {0: 4} and tags(record, 0, 4) == [4] * 4


def test_a_copy_is_its_own_from_then_on() -> None:
    record = record_of(prompt(1, 0, 0, 20), sent(1, [(0, 20)]), sent(1, [(0, 21)]))
    record.note(prompt(2, 1, 21, 23, ops=(CopySlot(0, 1, 21),)))
    record.note(sent(3, [(0, 22)]))
    assert record.rows() == {0: 23, 1: 23}
    assert tags(record, 0, 23) == [1] * 22 + [3] and tags(record, 1, 23)[:21] == [1] * 21
    record.note(prompt(4, 1, 0, 2, ops=(CopySlot(0, 1, 0), CopySlot(2, 0, 5))))
    assert record.rows() == {1: 2}, "a copy of nothing is nothing"


def test_a_slot_with_a_gap_has_no_record_until_it_begins_anew() -> None:
    record = record_of(prompt(1, 0, 0, 10), sent(1, [(0, 12)]), sent(1, [(1, 5)]))
    assert record.rows() == {}
    record.note(sent(1, [(0, 13)]))
    assert record.rows() == {}
    record.note(prompt(2, 0, 0, 3))
    assert record.rows() == {0: 3}


@pytest.mark.parametrize("wire", list(WireType))
def test_rows_are_kept_as_they_travelled(wire: WireType) -> None:
    record = record_of(prompt(1, 0, 0, 3, wire=wire), sent(1, [(0, 3)], wire=wire), sent(1, [(0, 4)], wire=wire))
    first, rest = record.again(1, 0, 0, 3, prompt=True, stages=1), record.again(1, 0, 3, 5, prompt=False, stages=1)
    assert [bytes(frame.data) for frame in first] == [rows(1, [0, 1, 2], wire)]
    assert [bytes(frame.data) for frame in rest] == [rows(1, [3, 4], wire)]


def test_a_wire_that_changes_begins_a_new_frame() -> None:
    record = record_of(prompt(1, 0, 0, 3), sent(1, [(0, 3)]), sent(1, [(0, 4)], wire=WireType.F16))
    assert again(record, 0, 3, 5, prompt=False) == [(3, 1), (4, 1)]


def fold(record: Record) -> None:
    """Have it look into what it was given."""
    for _ in range(FOLD):
        record.note(b"")


def test_beyond_the_budget_the_slot_that_was_not_used_goes_first() -> None:
    record = Record(25 * ROW)
    for slot in (0, 1, 2):
        record.note(prompt(1, slot, 0, 10))
        fold(record)
    assert record.rows() == {1: 10, 2: 10}
    same = record_of(prompt(1, 0, 0, 9), prompt(1, 1, 0, 10), prompt(1, 2, 0, 9), budget=25 * ROW)
    assert same.rows() == {0: 9, 2: 9}, "of those used together the largest"


@pytest.mark.parametrize("late", [False, True])
def test_what_was_told_of_is_spared_for_a_while(late: bool) -> None:
    record = record_of(prompt(1, 0, 0, 10), prompt(1, 1, 0, 10), budget=25 * ROW)
    assert record.rows() == {0: 10, 1: 10}
    for _ in range(SPARED if late else 0):
        fold(record)
    for at in range(10, 20):
        record.note(sent(1, [(1, at)]))
    assert record.rows() == ({1: 20} if late else {0: 10})


def test_what_is_no_step_leaves_no_trace() -> None:
    record = record_of(
        frames.encode(FaultFrame(1, 2, "x", "y")), frames.encode(ResultFrame(1, 2, [])), sent(1, []), b""
    )
    assert record.rows() == {}
    record.note(prompt(1, 0, 0, 4))
    record.clear()
    assert record.rows() == {} and again(record, 0, 0, 4, prompt=True) == []
