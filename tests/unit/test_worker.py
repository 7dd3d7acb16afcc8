"""The stage worker on the toy backend: encoded frames in, encoded frames out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dwarfstar_engine import native
from dwarfstar_engine.errors import FrameError, StageError
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import toy
from dwarfstar_engine.stage.worker import ToyBackend, Worker
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import (
    CopySlot,
    FaultFrame,
    Frame,
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

LAYERS, SLOTS = 4, 3
PROMPT = [104, 101, 108, 108, 111]
WANT = toy.expected(PROMPT, 3, LAYERS)


def stage(a: int, b: int, wire: WireType = WireType.F32) -> Worker:
    return Worker(ToyBackend(a, b, LAYERS), SLOTS, wire)


def step(
    tokens: Sequence[int] = (), position: int = 0, slot: int = 0, ops: tuple[Op, ...] = (), **changes: Any
) -> StepFrame:
    """Rows of one sequence; the last one wants a token."""
    n = len(tokens)
    wants = np.zeros(n, np.uint8)
    wants[-1:] = 1
    fields: dict[str, Any] = {
        "epoch": 3,
        "lane": 1,
        "number": 42,
        "ops": ops,
        "slots": np.full(n, slot, np.uint16),
        "positions": np.arange(position, position + n, dtype=np.int32),
        "wants": wants,
        "payload": Payload.TOKENS,
        "data": np.array(tokens, np.int32),
        "cols": 0,
    }
    return StepFrame(**{**fields, **changes})


def run(workers: Sequence[Worker], frame: Frame) -> Frame:
    data = frames.encode(frame)
    for worker in workers:
        data = worker.run(data)
    return frames.decode(data)


def tokens_of(frame: Frame) -> list[int]:
    assert isinstance(frame, ResultFrame), frame
    return [row.token for row in frame.rows]


def fault(frame: Frame) -> str:
    assert isinstance(frame, FaultFrame), frame
    assert (frame.epoch, frame.lane, frame.number) == (3, 1, 42) and frame.code
    return frame.message


@pytest.mark.parametrize("bounds", [[0, 4], [0, 1, 4], [0, 1, 2, 3, 4]])
def test_a_ring_of_workers_draws_the_models_tokens(bounds: list[int]) -> None:
    workers = [stage(a, b) for a, b in pairwise(bounds)]
    result = run(workers, step(PROMPT, slot=2))
    assert isinstance(result, ResultFrame)
    assert (result.epoch, result.lane, result.number) == (3, 1, 42)
    assert result.rows == [SampledRow(2, WANT[0], 0.0, ())]
    assert len(result.timings) == len(workers)
    assert tokens_of(run(workers, step(WANT[:1], len(PROMPT), 2))) == WANT[1:2]


def test_only_rows_that_want_a_token_get_one() -> None:
    frame = step(PROMPT, wants=np.array([0, 1, 0, 0, 1], np.uint8))
    assert tokens_of(run([stage(0, LAYERS)], frame)) == [*toy.expected(PROMPT[:2], 1, LAYERS), WANT[0]]
    assert tokens_of(run([stage(0, LAYERS)], step(PROMPT, wants=np.zeros(5, np.uint8)))) == []


def test_a_stage_before_the_last_sends_its_rows_on() -> None:
    before = ((1, 2), (3, 4))
    out = run([stage(0, 2)], step(PROMPT, timings=before))
    assert isinstance(out, StepFrame)
    rows = np.stack([toy.to_row(toy.embed(token)) for token in PROMPT])
    want = toy.ToySlice(0, 2).step(rows, range(5), [0] * 5)
    assert (out.payload, out.cols) == (Payload.F32, toy.WIDTH)
    assert np.array_equal(np.frombuffer(out.data, np.float32).reshape(5, -1), want)
    assert out.wants.tolist() == [0, 0, 0, 0, 1] and out.positions.tolist() == [0, 1, 2, 3, 4]
    assert out.timings[:2] == before and len(out.timings) == 3


@pytest.mark.parametrize("wire", [WireType.F16, WireType.Q8])
def test_rows_are_encoded_for_the_wire_and_decoded_behind_it(wire: WireType) -> None:
    out = run([stage(0, 2, wire)], step(PROMPT))
    assert isinstance(out, StepFrame) and out.payload == Payload(wire)
    rows = np.stack([toy.to_row(toy.embed(token)) for token in PROMPT])
    exact = toy.ToySlice(0, 2).step(rows, range(5), [0] * 5)
    assert bytes(out.data) == native.encode(wire, exact).tobytes()
    seen = native.decode(wire, bytes(out.data), 5, toy.WIDTH)  # rounded: other states, and so other tokens
    states = [toy.from_row(row) for row in toy.ToySlice(2, LAYERS).step(seen, range(5), [0] * 5)]
    assert tokens_of(run([stage(2, LAYERS)], out)) == [toy.draw(states[-1])]


def test_operations_go_first_and_in_order() -> None:
    worker = stage(0, LAYERS)
    run([worker], step(PROMPT))
    fresh = step(PROMPT, ops=(FreeSlot(0),))
    assert tokens_of(run([worker], fresh)) == WANT[:1]  # unless freed first, the toy refuses the rows
    again = step(PROMPT[3:], 3, ops=(TrimSlot(0, 3),))
    assert tokens_of(run([worker], again)) == WANT[:1]
    copied = step(PROMPT[3:], 3, 1, ops=(CopySlot(0, 1, 3), FreeSlot(0)))
    assert tokens_of(run([worker], copied)) == WANT[:1]
    emptied = step(PROMPT[3:], 3, 2, ops=(FreeSlot(1), CopySlot(1, 2, 3)))
    assert "slot 2 holds 0 positions" in fault(run([worker], emptied))


def test_a_frame_of_operations_alone_goes_round() -> None:
    workers = [stage(0, 2), stage(2, LAYERS)]
    run(workers, step(PROMPT))
    result = run(workers, step(ops=(FreeSlot(0),), payload=Payload.NONE))
    assert tokens_of(result) == [] and isinstance(result, ResultFrame) and len(result.timings) == 2
    assert tokens_of(run(workers, step(PROMPT))) == WANT[:1]


def test_samplers_are_set_on_the_last_stage_only(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SamplerSpec(seed=5, temperature=0.5, top_k=3)
    workers, seen = [stage(0, 2), stage(2, LAYERS)], []
    for index, worker in enumerate(workers):
        monkeypatch.setattr(worker.backend, "set_sampler", lambda slot, spec, i=index: seen.append((i, slot, spec)))
    run(workers, step(PROMPT, ops=(SetSampler(1, spec.encode()),)))
    assert seen == [(1, 1, spec)]
    seen.clear()
    run(workers, step(ops=(FreeSlot(1),), payload=Payload.NONE))
    assert (1, 1, None) in seen


def test_a_sampler_that_is_none_is_a_fault() -> None:
    assert "sampler spec" in fault(run([stage(0, LAYERS)], step(PROMPT, ops=(SetSampler(0, b"123"),))))


@pytest.mark.parametrize(
    "op", [FreeSlot(SLOTS), TrimSlot(SLOTS, 1), CopySlot(0, SLOTS, 1), CopySlot(SLOTS, 0, 1), SetSampler(SLOTS, b"")]
)
def test_an_operation_on_a_slot_that_is_not_there_is_a_fault(op: Op) -> None:
    assert f"slot {SLOTS}" in fault(run([stage(0, 2)], step(PROMPT, ops=(op,))))


def test_a_row_of_a_slot_that_is_not_there_is_a_fault() -> None:
    assert f"slot {SLOTS}" in fault(run([stage(0, 2)], step(PROMPT, slot=SLOTS)))


def test_rows_of_another_width_are_a_fault() -> None:
    wide = np.zeros((1, toy.WIDTH + 1), np.float32)
    message = fault(run([stage(2, LAYERS)], step([1], payload=Payload.F32, data=wide, cols=toy.WIDTH + 1)))
    assert str(toy.WIDTH + 1) in message and str(toy.WIDTH) in message


def test_rows_for_the_first_stage_are_a_fault() -> None:
    rows = np.zeros((1, toy.WIDTH), np.float32)
    assert "input" in fault(run([stage(0, 2)], step([1], payload=Payload.F32, data=rows, cols=toy.WIDTH)))


def test_rows_without_a_payload_are_a_fault() -> None:
    assert "input" in fault(run([stage(2, LAYERS)], step([1], payload=Payload.NONE, data=b"")))


def test_tokens_for_a_later_stage_are_a_fault() -> None:
    assert fault(run([stage(2, LAYERS)], step([1])))


def test_what_the_backend_refuses_is_a_fault_and_the_next_frame_works() -> None:
    worker = stage(0, LAYERS)
    assert "holds 0 positions" in fault(run([worker], step(PROMPT, position=9)))
    assert tokens_of(run([worker], step(PROMPT))) == WANT[:1]


@pytest.mark.parametrize(
    "frame",
    [
        ResultFrame(3, 1, 42, [SampledRow(0, 5, -0.5, ((5, -0.5),))], ((1, 2),)),
        FaultFrame(3, 1, 42, "stage_failed", "it went wrong"),
    ],
)
def test_results_and_faults_pass_unchanged(frame: Frame) -> None:
    data = frames.encode(frame)
    assert stage(0, 2).run(data) == data
    assert stage(2, LAYERS).run(data) == data


def test_a_fault_reaches_the_end_of_the_ring() -> None:
    assert "slot" in fault(run([stage(0, 2), stage(2, LAYERS)], step(PROMPT, slot=SLOTS)))


@pytest.mark.parametrize("damage", [b"", b"x" * 100, frames.encode(step(PROMPT))[:-1]])
def test_what_is_no_frame_is_an_error(damage: bytes) -> None:
    with pytest.raises(FrameError):
        stage(0, 2).run(damage)


def test_a_backend_may_run_the_whole_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answers goes on as it is; it is given the time waited for the frame, and asked before all else."""
    worker, seen = stage(0, LAYERS), []

    def whole(frame: bytes, wait_us: int) -> bytes | None:
        seen.append((frame, wait_us))
        return b"done" if len(seen) > 1 else None

    monkeypatch.setattr(worker.backend, "run_frame", whole)
    data = frames.encode(step(PROMPT))
    assert tokens_of(frames.decode(worker.run(data))) == WANT[:1]  # None: the general way
    assert worker.run(data) == worker.run(b"not looked at") == b"done"
    assert [frame for frame, _ in seen] == [data, data, b"not looked at"] and all(wait >= 0 for _, wait in seen)


def test_what_a_backend_refuses_as_a_whole_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not run a second time: the backend may have done half of it."""
    worker = stage(0, LAYERS)

    def full(frame: bytes, wait_us: int) -> bytes | None:
        raise StageError("the KV cache of this stage is full", code="kv_full")

    monkeypatch.setattr(worker.backend, "run_frame", full)
    monkeypatch.setattr(worker.backend, "step", None)
    out = run([worker], step(PROMPT))
    assert fault(out) == "the KV cache of this stage is full" and isinstance(out, FaultFrame) and out.code == "kv_full"


def test_a_reset_empties_every_slot() -> None:
    worker = stage(0, LAYERS)
    for slot in range(SLOTS):
        run([worker], step(PROMPT, slot=slot))
    worker.reset()
    for slot in range(SLOTS):
        assert tokens_of(run([worker], step(PROMPT, slot=slot))) == WANT[:1]
