"""Frames survive the trip unchanged, and nothing that is not exactly a frame is taken for one."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwarfstar_engine import native
from dwarfstar_engine.errors import FrameError
from dwarfstar_engine.serving import MAX_LOGIT_BIAS, MAX_LOGPROBS, Sampling
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import (
    MAX_OPS,
    MAX_POSITION,
    MAX_RESULTS,
    MAX_ROUNDS,
    MAX_ROWS,
    MAX_SLOTS,
    MAX_TIMINGS,
    UNASKED,
    CopySlot,
    FaultFrame,
    Halt,
    Op,
    Payload,
    Resend,
    ResultFrame,
    SampledRow,
    SamplerSpec,
    SetSampler,
    StepFrame,
    Want,
)
from dwarfstar_engine.wire.sampler_spec import MAX_ANSWER, MAX_PROMPT_TAIL, MAX_SAMPLER_BYTES

COLS = 6
HEADER_BYTES = 44


def reference_crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, from its definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sealed(data: bytes | bytearray) -> bytes:
    """A frame with its CRC put right: what a peer that means harm, or has a fault, would send."""
    body = bytes(data[:-4])
    return body + struct.pack("<I", reference_crc32c(body))


def patched(data: bytes, at: int, layout: str, value: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(layout, out, at, value)
    return sealed(out)


slots = st.integers(0, MAX_SLOTS - 1)
positions = st.integers(0, MAX_POSITION)
finite = st.floats(allow_nan=False, allow_infinity=False)
tokens = st.integers(0, 2**31 - 1)
u32 = st.integers(0, 2**32 - 1)
heads = st.fixed_dictionaries({"epoch": u32, "number": st.integers(0, 2**64 - 1)})
timings = st.lists(st.tuples(u32, u32), max_size=4).map(tuple)
rounds = st.integers(0, MAX_ROUNDS)
ops = st.lists(
    st.one_of(
        st.builds(CopySlot, slots, slots, positions),
        st.builds(SetSampler, slots, st.binary(max_size=40)),
        st.builds(Halt, slots),
        st.builds(
            lambda slot, rows, stages: Resend(slot, min(rows), max(rows), min(stages), max(stages) + 2),
            slots,
            st.tuples(positions, positions),
            st.tuples(st.integers(0, MAX_TIMINGS - 2), st.integers(0, MAX_TIMINGS - 2)),
        ),
    ),
    max_size=4,
).map(tuple)


@st.composite
def steps(draw: st.DrawFn) -> StepFrame:
    n = draw(st.sampled_from([0, 1, 2, 15, 16, 40]))
    seed = np.random.default_rng(draw(st.integers(0, 2**32)))
    payload = draw(st.sampled_from(Payload))
    data = b""
    replays = draw(st.booleans())
    if payload is not Payload.NONE and n > 0:
        data = seed.bytes(native.encoded_size(native.WireType(payload), n, COLS))
    return StepFrame(
        **draw(heads),
        ops=draw(ops),
        slots=seed.integers(0, MAX_SLOTS, n).astype(np.uint16),
        positions=seed.integers(0, MAX_POSITION + 1, n).astype(np.int32),
        tokens=seed.integers(0, 2**31, n).astype(np.int32),
        wants=seed.integers(0, len(Want), n).astype(np.uint8),
        payload=payload,
        data=data,
        cols=COLS,
        timings=draw(timings),
        prompt=draw(st.booleans()),
        rounds=0 if replays else draw(rounds),
        stages=draw(st.integers(1, MAX_TIMINGS)) if replays else 0,
    )


results = st.builds(
    lambda head, rows, times, rounds: ResultFrame(**head, rows=rows, timings=times, rounds=rounds),
    heads,
    st.lists(
        st.builds(
            SampledRow,
            slots,
            tokens,
            finite,
            st.lists(st.tuples(tokens, finite), max_size=MAX_LOGPROBS).map(tuple),
        ),
        max_size=4,
    ),
    timings,
    rounds,
)
faults = st.builds(
    lambda head, code, message: FaultFrame(**head, code=code, message=message),
    heads,
    st.text("abc_", max_size=64),
    st.text(st.characters(codec="utf-8"), max_size=200),
)
specs = st.builds(
    SamplerSpec,
    seed=st.integers(0, 2**64 - 1),
    temperature=finite,
    top_p=finite,
    top_k=tokens,
    min_p=finite,
    frequency_penalty=finite,
    presence_penalty=finite,
    repeat_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
    repeat_last_n=st.integers(0, MAX_PROMPT_TAIL),
    logit_bias=st.lists(st.tuples(tokens, finite), max_size=5).map(tuple),
    logprobs=st.integers(-1, MAX_LOGPROBS),
    prompt_tail=st.lists(tokens, max_size=9).map(tuple),
    answer=st.lists(tokens, max_size=9).map(tuple),
)


def step(*, ops: tuple[Op, ...] = (), rows: int = 1, slot: int = 0, position: int = 0) -> StepFrame:
    return StepFrame(
        epoch=7,
        number=99,
        ops=ops,
        slots=np.full(rows, slot, np.uint16),
        positions=np.full(rows, position, np.int32),
        tokens=np.arange(rows, dtype=np.int32),
        wants=np.ones(rows, np.uint8),
    )


def content(frame: StepFrame) -> bytes:
    return frame.data.tobytes() if isinstance(frame.data, np.ndarray) else bytes(frame.data)


def assert_same_step(got: frames.Frame, want: StepFrame) -> None:
    assert isinstance(got, StepFrame)
    for name in ("epoch", "number", "ops", "payload", "cols", "timings", "prompt", "rounds", "stages"):
        assert getattr(got, name) == getattr(want, name), name
    for name in ("slots", "positions", "tokens", "wants"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    assert content(got) == content(want)


@given(steps())
@settings(max_examples=60, deadline=None)
def test_a_step_survives_the_trip(frame: StepFrame) -> None:
    assert_same_step(frames.decode(frames.encode(frame)), frame)


@given(results | faults)
@settings(max_examples=60, deadline=None)
def test_results_and_faults_survive_the_trip(frame: ResultFrame | FaultFrame) -> None:
    assert frames.decode(frames.encode(frame)) == frame


@given(steps() | results | faults, st.data())
@settings(max_examples=80, deadline=None)
def test_any_flipped_bit_is_refused(frame: frames.Frame, data: st.DataObject) -> None:
    good = frames.encode(frame)
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        frames.decode(bytes(bad))


@given(steps() | results | faults, st.data())
@settings(max_examples=60, deadline=None)
def test_a_cut_or_lengthened_frame_is_refused_even_with_a_right_checksum(
    frame: frames.Frame, data: st.DataObject
) -> None:
    good = frames.encode(frame)
    size = data.draw(st.integers(0, len(good) - 1))
    for bad in (good[:size], good + b"\0", sealed(good[:size] + bytes(4)) if size != len(good) - 4 else b""):
        with pytest.raises(FrameError):
            frames.decode(bad)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_rubbish_with_a_right_header_and_checksum_is_refused_or_sound(rubbish: bytes) -> None:
    """Whatever the counts say, decoding ends in a frame or in FrameError, never in another error."""
    for kind in (1, 2, 3):
        try:
            frame = frames.decode(sealed(frames.encode(step())[:5] + bytes([kind]) + rubbish + bytes(4)))
        except FrameError:
            continue
        assert isinstance(frame, StepFrame | ResultFrame | FaultFrame)


def test_the_checksum_is_crc32c() -> None:
    assert reference_crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue
    good = frames.encode(step())
    assert struct.unpack("<I", good[-4:])[0] == reference_crc32c(good[:-4])


def test_the_payload_is_aligned_and_not_copied() -> None:
    frame = replace(step(rows=3), payload=Payload.F32, cols=COLS, data=np.ones((3, COLS), np.float32))
    data = frames.encode(frame)
    got = frames.decode(data)
    assert isinstance(got, StepFrame) and isinstance(got.data, memoryview)
    assert got.data.obj is data and got.data.readonly
    assert (len(data) - 4 - got.data.nbytes) % 16 == 0


def test_a_frame_of_operations_only_is_legal() -> None:
    frame = step(ops=(CopySlot(1, 2, 5), SetSampler(2, b"x")), rows=0)
    assert_same_step(frames.decode(frames.encode(frame)), frame)


def test_the_largest_counts_are_legal() -> None:
    frame = step(
        ops=(CopySlot(0, MAX_SLOTS - 1, MAX_POSITION),) * MAX_OPS,
        rows=MAX_ROWS,
        slot=MAX_SLOTS - 1,
        position=MAX_POSITION,
    )
    assert_same_step(frames.decode(frames.encode(frame)), frame)


@pytest.mark.parametrize("rows", [1, 40])  # both ways of checking ranges
@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [(0, "<i", -1), (0, "<i", MAX_POSITION + 1), (4, "<i", -1), (8, "<H", MAX_SLOTS), (10, "<B", len(Want))],
    ids=["position negative", "position high", "token", "slot", "want"],
)
def test_rows_out_of_range_are_refused(rows: int, offset: int, layout: str, value: int) -> None:
    at = HEADER_BYTES + rows * offset  # the last row's field would do as well
    with pytest.raises(FrameError, match="out of range"):
        frames.decode(patched(frames.encode(step(rows=rows)), at, layout, value))


@pytest.mark.parametrize(
    ("at", "layout", "value", "problem"),
    [
        (4, "<B", 1, "version 1"),
        (5, "<B", 9, "unknown kind"),
        (6, "<B", 4, "payload type 4"),
        (6, "<B", Payload.F32, "cannot be sent"),
        (12, "<H", 4, "flags 4"),
        (12, "<H", 2, "flags 2, 0 rounds"),
        (14, "<H", 257, "out of bounds"),
        (34, "<H", MAX_ROUNDS + 1, f"{MAX_ROUNDS + 1} rounds"),
        (24, "<I", MAX_ROWS + 1, "out of bounds"),
        (24, "<I", 3, "length"),
        (28, "<I", (1 << 16) + 1, "out of bounds"),
        (32, "<H", MAX_OPS + 1, "out of bounds"),
        (32, "<H", 3, "middle of one"),
        (32, "<H", 1, "shorter"),
        (36, "<I", 2**32 - 1, "length"),
        (40, "<I", 2**32 - 1, "length"),
        (HEADER_BYTES + 11, "<B", 9, "unknown operation"),
        (HEADER_BYTES + 12, "<H", MAX_SLOTS, "out of range"),
        (HEADER_BYTES + 14, "<H", MAX_SLOTS, "out of range"),
        (HEADER_BYTES + 16, "<i", -1, "out of range"),
        (HEADER_BYTES + 16, "<i", MAX_POSITION + 1, "out of range"),
        (HEADER_BYTES + 23, "<I", MAX_SAMPLER_BYTES + 1, "sampler"),
        (HEADER_BYTES + 23, "<I", 4, "sampler"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(at: int, layout: str, value: int, problem: str) -> None:
    good = frames.encode(step(ops=(CopySlot(1, 2, 3), SetSampler(1, b"xyz"))))
    frames.decode(sealed(good))
    with pytest.raises(FrameError, match=problem):
        frames.decode(patched(good, at, layout, value))


@pytest.mark.parametrize(
    ("at", "layout", "value"),
    [
        (24, "<I", 2),
        (24, "<I", 0),
        (24, "<I", MAX_ROWS + 1),
        (HEADER_BYTES, "<H", MAX_SLOTS),
        (HEADER_BYTES + 2, "<H", MAX_LOGPROBS + 1),
        (HEADER_BYTES + 2, "<H", 2),
        (HEADER_BYTES + 4, "<i", -1),
        (HEADER_BYTES + 8, "<Q", 0x7FF8_0000_0000_0000),  # not a number
        (14, "<H", 1),
        (40, "<I", 1),
    ],
)
def test_a_result_that_lies_is_refused(at: int, layout: str, value: int) -> None:
    good = frames.encode(ResultFrame(7, 1, [SampledRow(1, 5, -0.5, ((5, -0.5),))]))
    frames.decode(sealed(good))
    with pytest.raises(FrameError):
        frames.decode(patched(good, at, layout, value))


def test_a_long_fault_is_cut_at_a_character() -> None:
    got = frames.decode(frames.encode(FaultFrame(1, 1, "c" * 100, "é" * 5000)))
    assert isinstance(got, FaultFrame)
    assert (got.code, got.message) == ("c" * 64, "é" * 2048)


def test_faults_of_our_own_are_assertions() -> None:
    for frame in (
        step(ops=(CopySlot(MAX_SLOTS, 0, 0),)),
        step(rows=MAX_ROWS + 1),
        replace(step(), wants=np.ones(2, np.uint8)),
        replace(step(), data=np.zeros(2, np.float32)),
        replace(step(), tokens=np.zeros(2, np.int32)),
        replace(step(), tokens=np.zeros(1, np.int64)),
        replace(step(), slots=np.zeros(1, np.int64)),
    ):
        with pytest.raises(AssertionError):
            frames.encode(frame)


@given(specs)
@settings(max_examples=60, deadline=None)
def test_a_sampler_spec_survives_the_trip(spec: SamplerSpec) -> None:
    assert SamplerSpec.decode(spec.encode()) == spec


def test_the_largest_sampler_spec_fits_its_bound() -> None:
    biases, tail, said = ((1, 1.0),) * MAX_LOGIT_BIAS, (1,) * MAX_PROMPT_TAIL, (1,) * MAX_ANSWER
    spec = SamplerSpec(1, logit_bias=biases, prompt_tail=tail, answer=said)
    assert len(spec.encode()) == MAX_SAMPLER_BYTES


@pytest.mark.parametrize(
    ("at", "layout", "value"),
    [
        (8, "<Q", 0x7FF0_0000_0000_0000),  # temperature infinite
        (48, "<Q", 0),  # repeat_penalty 0.0
        (56, "<i", -1),  # top_k
        (60, "<i", MAX_PROMPT_TAIL + 1),
        (64, "<b", MAX_LOGPROBS + 1),
        (64, "<b", -2),
        (66, "<H", 2),
        (68, "<H", 2),
        (70, "<I", 1),  # tokens said
        (74, "<i", -1),  # the bias's token
        (78, "<Q", 0x7FF8_0000_0000_0000),
        (86, "<i", -1),  # the tail's token
    ],
)
def test_a_sampler_spec_out_of_bounds_is_refused(at: int, layout: str, value: int) -> None:
    data = bytearray(SamplerSpec(1, logit_bias=((3, 0.5),), prompt_tail=(4,)).encode())
    struct.pack_into(layout, data, at, value)
    with pytest.raises(FrameError):
        SamplerSpec.decode(bytes(data))


def test_a_cut_sampler_spec_is_refused() -> None:
    good = SamplerSpec(1, prompt_tail=(4, 5)).encode()
    for size in range(len(good)):
        with pytest.raises(FrameError):
            SamplerSpec.decode(good[:size])


def test_the_spec_of_a_request_fixes_what_the_request_left_open() -> None:
    prompt = tuple(range(MAX_PROMPT_TAIL + 10))
    plain = SamplerSpec.of(Sampling(), prompt, fresh_seed=11)
    assert (plain.seed, plain.logprobs, plain.prompt_tail) == (11, -1, ())
    said = SamplerSpec.of(Sampling(repeat_penalty=1.1, repeat_last_n=3, presence_penalty=1.0), prompt, 11, [7, 8])
    assert said.prompt_tail == (prompt[-1], 7, 8) and said.answer == (7, 8)
    repeat = SamplerSpec.of(Sampling(seed=-1, repeat_penalty=1.1, repeat_last_n=3, logprobs=0), prompt, fresh_seed=11)
    assert (repeat.seed, repeat.logprobs, repeat.prompt_tail) == (2**64 - 1, 0, prompt[-3:])
    for last_n in (-1, MAX_PROMPT_TAIL + 1):
        endless = SamplerSpec.of(Sampling(repeat_penalty=1.1, repeat_last_n=last_n), prompt, fresh_seed=0)
        assert endless.prompt_tail == prompt[-MAX_PROMPT_TAIL:] and endless.encode()
    assert SamplerSpec.of(Sampling(repeat_penalty=1.1, repeat_last_n=0), prompt, fresh_seed=0).prompt_tail == ()


@given(steps())
@settings(max_examples=60, deadline=None)
def test_the_short_way_to_a_token_frame_gives_the_same_bytes(frame: StepFrame) -> None:
    plain = replace(frame, payload=Payload.NONE, data=b"", cols=0, timings=())
    short = frames.encode_tokens(
        plain.epoch,
        plain.number,
        plain.ops,
        plain.slots.tolist(),
        plain.positions.tolist(),
        plain.tokens.tolist(),
        plain.wants.tolist(),
        plain.prompt,
        plain.rounds,
        plain.stages,
    )
    assert short == frames.encode(plain)


@given(steps() | results | faults)
@settings(max_examples=60, deadline=None)
def test_frames_of_prompts_are_known_by_their_bytes(frame: frames.Frame) -> None:
    assert frames.is_prompt(frames.encode(frame)) == (isinstance(frame, StepFrame) and frame.prompt)


def test_what_is_no_frame_is_of_no_prompt() -> None:
    data = frames.encode(replace(step(), prompt=True))
    assert frames.is_prompt(data)
    assert not any(frames.is_prompt(data[:size]) for size in range(13))


@given(steps())
@settings(max_examples=60, deadline=None)
def test_an_outline_is_what_the_frame_says(frame: StepFrame) -> None:
    data = frames.encode(frame)
    prompt, at_slots, at_positions, done, payload, cols, at = frames.outline(data)
    assert (prompt, list(at_slots), list(at_positions)) == (
        frame.prompt,
        frame.slots.tolist(),
        frame.positions.tolist(),
    )
    assert (done, payload, cols) == (frame.ops, frame.payload, frame.cols) and data[at:-4] == content(frame)
    assert frames.is_step(data) and frames.is_replay(data) == bool(frame.stages)
    assert frames.is_unasked(data) == (frame.number == UNASKED)


@given(steps())
@settings(max_examples=30, deadline=None)
def test_what_is_left_without_rows_is_answered(frame: StepFrame) -> None:
    left = frames.decode(frames.without_rows(frames.encode(frame)))
    assert isinstance(left, StepFrame) and len(left.slots) == 0 and not frames.is_replay(frames.encode(left))
    assert (left.epoch, left.number, left.ops, left.timings, left.prompt) == (
        frame.epoch,
        frame.number,
        frame.ops,
        frame.timings,
        frame.prompt,
    )


def test_only_step_frames_are_replays() -> None:
    for frame in (ResultFrame(1, 2, []), FaultFrame(1, 2, "x", "y")):
        data = frames.encode(frame)
        assert not frames.is_step(data) and not frames.is_replay(data)
        assert frames.is_fault(data) == isinstance(frame, FaultFrame)
    assert not frames.is_step(b"") and not frames.is_replay(b"DSf") and not frames.is_fault(b"")


@pytest.mark.parametrize("begin, end, stage, until", [(5, 4, 0, 2), (-1, 4, 0, 2), (0, 4, 1, 2), (0, 4, 2, 1)])
def test_a_request_for_rows_out_of_range_is_refused(begin: int, end: int, stage: int, until: int) -> None:
    data = bytearray(frames.encode(step(ops=(Resend(0, 1, 2, 3, 5),), rows=0)))
    at = data.index(struct.pack("<iiHH", 1, 2, 3, 5))
    struct.pack_into("<iiHH", data, at, begin, end, stage, until)
    with pytest.raises(FrameError, match="out of range"):
        frames.decode(sealed(data))


def result(number: int, rows: int) -> bytes:
    drawn = [SampledRow(slot, 5, -0.5, ((5, -0.5),) * (slot % 3)) for slot in range(rows)]
    return frames.encode(ResultFrame(1, number, drawn, ((number, 2),) * (number % 3)))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=MAX_RESULTS))
def test_results_in_one_message_come_apart_as_they_were(rows: list[int]) -> None:
    parts = [result(number, count) for number, count in enumerate(rows)]
    assert frames.split(b"".join(parts)) == parts
    assert [frames.number_of(part) for part in parts] == list(range(len(rows)))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=4), st.data())
def test_results_that_are_cut_off_are_refused(rows: list[int], data: st.DataObject) -> None:
    parts = [result(number, count) for number, count in enumerate(rows)]
    whole = b"".join(parts)
    bounds = {sum(map(len, parts[:count])) for count in range(len(parts) + 1)}
    cut = data.draw(st.integers(1, len(whole) - 1).filter(lambda at: at not in bounds))
    with pytest.raises(FrameError):
        for part in frames.split(whole[:cut]):
            frames.decode(part)


def test_too_many_results_are_refused() -> None:
    with pytest.raises(FrameError, match="too many"):
        frames.split(result(1, 1) * (MAX_RESULTS + 1))


@given(st.one_of(steps(), faults))
def test_what_is_no_result_is_one_frame(frame: frames.Frame) -> None:
    data = frames.encode(frame)
    assert frames.split(data) == [data]
    assert frames.split(data[:7]) == [data[:7]]
