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
from dwarfstar_engine.stage.measure import Profile
from dwarfstar_engine.stage.worker import Rows, ToyBackend, Worker
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import (
    CopySlot,
    FaultFrame,
    Frame,
    Halt,
    Op,
    Payload,
    ResultFrame,
    SampledRow,
    SetSampler,
    StepFrame,
    Want,
)
from dwarfstar_engine.wire.sampler_spec import SamplerSpec

LAYERS, SLOTS = 4, 3
EOG = frozenset({122})  # "z"
SPEC = SamplerSpec(seed=1)
PROMPT = [104, 101, 108, 108, 111]
WANT = toy.expected(PROMPT, 3, LAYERS)


def stage(a: int, b: int, wire: WireType = WireType.F32) -> Worker:
    return Worker(ToyBackend(a, b, LAYERS), SLOTS, wire, EOG)


def step(
    tokens: Sequence[int] = (), position: int = 0, slot: int = 0, ops: tuple[Op, ...] = (), **changes: Any
) -> StepFrame:
    """Rows of one sequence; the last one wants a token."""
    n = len(tokens)
    wants = np.zeros(n, np.uint8)
    wants[-1:] = 1
    fields: dict[str, Any] = {
        "epoch": 3,
        "number": 42,
        "ops": ops,
        "slots": np.full(n, slot, np.uint16),
        "positions": np.arange(position, position + n, dtype=np.int32),
        "tokens": np.array(tokens, np.int32),
        "wants": wants,
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
    assert (frame.epoch, frame.number) == (3, 42) and frame.code
    return frame.message


@pytest.mark.parametrize("bounds", [[0, 4], [0, 1, 4], [0, 1, 2, 3, 4]])
def test_a_ring_of_workers_draws_the_models_tokens(bounds: list[int]) -> None:
    workers = [stage(a, b) for a, b in pairwise(bounds)]
    result = run(workers, step(PROMPT, slot=2))
    assert isinstance(result, ResultFrame)
    assert (result.epoch, result.number) == (3, 42)
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
    want = toy.ToySlice(0, 2).step(rows, 0, 0)
    assert (out.payload, out.cols) == (Payload.F32, toy.WIDTH)
    assert np.array_equal(np.frombuffer(out.data, np.float32).reshape(5, -1), want)
    assert out.wants.tolist() == [0, 0, 0, 0, 1] and out.positions.tolist() == [0, 1, 2, 3, 4]
    assert out.tokens.tolist() == PROMPT and not out.prompt
    assert out.timings[:2] == before and len(out.timings) == 3


@pytest.mark.parametrize("wire", [WireType.F16, WireType.Q8])
def test_rows_are_encoded_for_the_wire_and_decoded_behind_it(wire: WireType) -> None:
    out = run([stage(0, 2, wire)], step(PROMPT))
    assert isinstance(out, StepFrame) and out.payload == Payload(wire)
    rows = np.stack([toy.to_row(toy.embed(token)) for token in PROMPT])
    exact = toy.ToySlice(0, 2).step(rows, 0, 0)
    assert bytes(out.data) == native.encode(wire, exact).tobytes()
    seen = native.decode(wire, bytes(out.data), 5, toy.WIDTH)  # rounded: other states, and so other tokens
    states = [toy.from_row(row) for row in toy.ToySlice(2, LAYERS).step(seen, 0, 0)]
    assert tokens_of(run([stage(2, LAYERS)], out)) == [toy.draw(states[-1])]


@pytest.mark.parametrize("prompt", [False, True])
def test_rows_replace_what_their_slot_held(prompt: bool) -> None:
    workers = [stage(0, 2), stage(2, LAYERS)]
    for _ in range(2):
        assert tokens_of(run(workers, step(PROMPT, prompt=prompt))) == WANT[:1]
    assert tokens_of(run(workers, step(WANT[:1], 5))) == WANT[1:2]
    assert tokens_of(run(workers, step(PROMPT[3:], 3, prompt=prompt))) == WANT[:1]
    other = step([1, 2], 1, prompt=prompt)
    assert tokens_of(run(workers, other)) == toy.expected([PROMPT[0], 1, 2], 1, LAYERS)
    assert "holds 3 positions" in fault(run(workers, step(PROMPT[4:], 4)))


def test_operations_go_first_and_in_order() -> None:
    worker = stage(0, LAYERS)
    run([worker], step(PROMPT))
    copied = step(PROMPT[3:], 3, 1, ops=(CopySlot(0, 1, 3),))
    assert tokens_of(run([worker], copied)) == WANT[:1]
    twice = step(PROMPT[2:], 2, 2, ops=(CopySlot(1, 0, 0), CopySlot(1, 0, 4), CopySlot(0, 2, 2)))
    assert tokens_of(run([worker], twice)) == WANT[:1]
    emptied = step(PROMPT[3:], 3, 2, ops=(CopySlot(0, 1, 0), CopySlot(1, 2, 3)))
    assert "slot 1 holds 0 positions" in fault(run([worker], emptied))


def test_a_frame_of_operations_alone_goes_round() -> None:
    workers = [stage(0, 2), stage(2, LAYERS)]
    run(workers, step(PROMPT))
    result = run(workers, step(ops=(CopySlot(0, 1, 4),)))
    assert tokens_of(result) == [] and isinstance(result, ResultFrame) and len(result.timings) == 2
    assert tokens_of(run(workers, step(PROMPT[4:], 4, 1))) == WANT[:1]


def test_rows_of_several_slots_are_those_of_each_alone() -> None:
    """In the order of the frame, also where a slot comes twice."""
    workers = [stage(0, 1), stage(1, LAYERS)]
    rows = [(1, p, t) for p, t in enumerate(PROMPT[:3])] + [(0, p, t) for p, t in enumerate(PROMPT)]
    rows += [(1, 3, PROMPT[3]), (1, 4, PROMPT[4]), (2, 0, 7), (1, 4, 8)]
    slots, positions, tokens = zip(*rows, strict=True)
    frame = step(tokens, slots=np.array(slots, np.uint16), positions=np.array(positions, np.int32))
    frame.wants[:] = [0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    alone = [PROMPT[:3], PROMPT, PROMPT, [7], [*PROMPT[:4], 8]]
    drawn = [
        SampledRow(slot, toy.expected(text, 1, LAYERS)[0]) for slot, text in zip((1, 0, 1, 2, 1), alone, strict=True)
    ]
    result = run(workers, frame)
    assert isinstance(result, ResultFrame) and result.rows == drawn


@pytest.mark.parametrize("batched", [False, True])
def test_guesses_are_answered_while_they_are_right(batched: bool) -> None:
    workers, text = [stage(0, 2), stage(2, LAYERS)], toy.expected(PROMPT, 8, LAYERS)
    for worker in workers:
        worker.profile = Profile(batched=batched)
    assert tokens_of(run(workers, step(PROMPT))) == text[:1]

    def guesses(at: int, tokens: Sequence[int], first: Want = Want.CHECKED) -> list[int]:
        """Tokens for ``at`` and on; the first one is known, or a guess, too."""
        wants = np.full(len(tokens), Want.CHECKED, np.uint8)
        wants[0] = first
        return tokens_of(run(workers, step(tokens, len(PROMPT) + at, wants=wants)))

    assert guesses(0, text[0:3], Want.DRAWN) == text[1:4]
    assert guesses(3, [text[3], 1, text[5]]) == text[4:5]  # what follows a wrong one is for nothing
    assert guesses(6, text[6:7]) == []  # sent before that was known
    assert guesses(4, text[4:5], Want.DRAWN) == text[5:6]
    assert guesses(5, [1]) == []
    assert guesses(5, text[5:7]) == text[6:8]


def test_rows_of_steps_run_one_by_one_unless_batches_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp has other last bits for several rows: both ways of a frame must run the same decodes."""
    seen: list[int] = []
    worker = stage(0, LAYERS)
    run_rows = worker.backend.step

    def counted(rows: Rows, *place: Any, prompt: bool) -> Rows | None:
        seen.append(len(rows))
        return run_rows(rows, *place, prompt=prompt)

    monkeypatch.setattr(worker.backend, "step", counted)
    for prompt, batched in ((False, False), (True, False), (False, True)):
        worker.profile = Profile(batched=batched)
        assert tokens_of(run([worker], step(PROMPT, prompt=prompt))) == WANT[:1]
    assert seen == [1] * 5 + [5, 5]


def test_what_was_measured_decides_how_frames_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, tuned = stage(0, LAYERS), []
    monkeypatch.setattr(worker.backend, "tune", lambda wire, batched, ends: tuned.append((wire, batched, ends)))
    assert worker.measure() is worker.profile and worker.profile.batched
    worker.use_wire(WireType.Q8)
    assert tuned == [(WireType.F32, True, EOG), (WireType.Q8, True, EOG)]


def test_steps_go_on_by_themselves_for_as_many_rounds_as_they_have() -> None:
    """The last stage sends what it drew to the first, and says so, until a text ends or its slot is halted."""
    workers = [stage(0, 2), stage(2, LAYERS)]
    tokens = tokens_of(run(workers, step(PROMPT, prompt=True)))
    assert not workers[1].take_feed()
    data, told = frames.encode(step(tokens, len(PROMPT), rounds=3)), []
    while data:
        for worker in workers:
            data = worker.run(data)
        result = frames.decode(data)
        assert isinstance(result, ResultFrame) and (result.number, len(result.timings)) == (42, 2)
        told.append(result.rounds)
        tokens += tokens_of(result)
        data = workers[1].take_feed()
    assert tokens == toy.expected(PROMPT, 5, LAYERS) and told == [3, 2, 1, 0]


def test_a_text_that_ends_and_a_slot_that_is_halted_do_not_go_on() -> None:
    worker = stage(0, LAYERS)
    prompts = {slot: [97 + slot, 98] for slot in range(SLOTS)}
    first = {slot: tokens_of(run([worker], step(prompt, slot=slot))) for slot, prompt in prompts.items()}
    slots = [slot for slot, (token,) in first.items() if token not in EOG]
    assert len(slots) >= 2
    worker._ends = frozenset(toy.expected(prompts[slots[0]], 2, LAYERS)[1:])
    fields: dict[str, Any] = {
        "slots": np.array(slots, np.uint16),
        "positions": np.full(len(slots), 2, np.int32),
        "tokens": np.array([first[slot][0] for slot in slots], np.int32),
        "wants": np.ones(len(slots), np.uint8),
    }
    result = run([worker], step(rounds=2, ops=(Halt(slots[1]),), **fields))
    assert isinstance(result, ResultFrame) and [row.slot for row in result.rows] == [slots[0], *slots[2:]]
    feed = worker.take_feed()
    if len(slots) == 2:
        assert not feed and result.rounds == 0
    else:
        going = frames.decode(feed)
        assert isinstance(going, StepFrame) and going.slots.tolist() == slots[2:] and going.rounds == 1
    run([worker], step(PROMPT, slot=slots[1], ops=(SetSampler(slots[1], SPEC.encode()),)))
    assert tokens_of(run([worker], step([97], 3, slot=slots[1])))  # it has a sampler again


def test_prompts_go_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = stage(0, LAYERS)
    monkeypatch.setattr(worker.backend, "run_frame", None)
    assert tokens_of(run([worker], step(PROMPT, prompt=True))) == WANT[:1]


def test_samplers_are_set_on_the_last_stage_only(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SamplerSpec(seed=5, temperature=0.5, top_k=3)
    workers, seen = [stage(0, 2), stage(2, LAYERS)], []
    for index, worker in enumerate(workers):
        monkeypatch.setattr(worker.backend, "set_sampler", lambda slot, spec, i=index: seen.append((i, slot, spec)))
    run(workers, step(PROMPT, ops=(SetSampler(1, spec.encode()),)))
    assert seen == [(1, 1, spec)]


def test_a_sampler_that_is_none_is_a_fault() -> None:
    assert "sampler spec" in fault(run([stage(0, LAYERS)], step(PROMPT, ops=(SetSampler(0, b"123"),))))


@pytest.mark.parametrize("op", [CopySlot(0, SLOTS, 1), CopySlot(SLOTS, 0, 1), SetSampler(SLOTS, b"")])
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
    assert "takes tokens" in fault(run([stage(0, 2)], step([1], payload=Payload.F32, data=rows, cols=toy.WIDTH)))


def test_rows_without_a_payload_are_a_fault() -> None:
    assert "no hidden states" in fault(run([stage(2, LAYERS)], step([1])))


def test_what_the_backend_refuses_is_a_fault_and_the_next_frame_works() -> None:
    worker = stage(0, LAYERS)
    assert "holds 0 positions" in fault(run([worker], step(PROMPT, position=9)))
    assert tokens_of(run([worker], step(PROMPT))) == WANT[:1]


@pytest.mark.parametrize(
    "frame",
    [
        ResultFrame(3, 42, [SampledRow(0, 5, -0.5, ((5, -0.5),))], ((1, 2),)),
        FaultFrame(3, 42, "stage_failed", "it went wrong"),
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

    def whole(frame: bytes, wait_us: int) -> tuple[bytes, bytes] | None:
        seen.append((frame, wait_us))
        return (b"done", b"feed") if len(seen) > 1 else None

    monkeypatch.setattr(worker.backend, "run_frame", whole)
    data = frames.encode(step(PROMPT))
    assert tokens_of(frames.decode(worker.run(data))) == WANT[:1]  # None: the general way
    assert worker.take_feed() == b""
    assert worker.run(data) == worker.run(b"not looked at") == b"done"
    assert worker.take_feed() == b"feed" and worker.take_feed() == b""
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
