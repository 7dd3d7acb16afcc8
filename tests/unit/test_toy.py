"""The toy backend is worth something only if every mistake a pipeline can make changes its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dwarfstar_engine.errors import FrameError, ModelError
from dwarfstar_engine.stage import toy
from dwarfstar_engine.stage.toy import ToySlice

LAYERS, COUNT = 6, 24
PROMPT = [104, 101, 108, 108, 111]
Rows = NDArray[np.float32]


def generate(
    slices: Sequence[ToySlice],
    *,
    position_of: Callable[[int], int] = lambda position: position,
    before: Callable[[int], None] = lambda position: None,
) -> list[int]:
    """Tokens of a pipeline of ``slices``; ``before`` is called before each position."""
    known = list(PROMPT)
    for position in range(len(PROMPT) + COUNT - 1):
        before(position)
        row = toy.to_row(toy.embed(known[position]))[None, :]
        for part in slices:
            row = part.step(row, position_of(position), 0)
        if position >= len(PROMPT) - 1:
            known.append(toy.draw(toy.from_row(row[0])))
    return known[len(PROMPT) :]


def parts(*bounds: int) -> list[ToySlice]:
    return [ToySlice(a, b) for a, b in pairwise(bounds)]


WANT = toy.expected(PROMPT, COUNT, LAYERS)


@given(st.sets(st.integers(1, LAYERS - 1)))
def test_any_division_gives_the_undisturbed_tokens(cuts: set[int]) -> None:
    assert generate(parts(0, *sorted(cuts), LAYERS)) == WANT


def rows_of(tokens: Sequence[int]) -> Rows:
    return np.stack([toy.to_row(toy.embed(token)) for token in tokens])


def test_all_at_once_is_as_one_by_one() -> None:
    """A prompt in one batch, between another sequence's rows."""
    alone, both = ToySlice(0, LAYERS), ToySlice(0, LAYERS)
    rows = rows_of(PROMPT)
    one_by_one = np.concatenate([alone.step(rows[i : i + 1], i, 0) for i in range(len(rows))])
    first = both.step(rows[:2], 0, 1)
    assert np.array_equal(both.step(rows, 0, 0), one_by_one)
    assert np.array_equal(np.concatenate([first, both.step(rows[2:], 2, 1)]), one_by_one)


@pytest.mark.parametrize(
    "slices",
    [
        parts(1, LAYERS),
        parts(0, LAYERS - 1),
        [*parts(0, 2), *parts(3, LAYERS)],
        [*parts(0, 3), *parts(2, LAYERS)],
        [*parts(0, 3), *parts(0, LAYERS)],
        [*parts(0, 2), *parts(4, LAYERS), *parts(2, 4)],
        [*parts(3, LAYERS), *parts(0, 3)],
    ],
    ids=["no first", "no last", "skipped", "repeated", "first half twice", "swapped", "reversed"],
)
def test_a_wrong_row_of_layers_is_seen(slices: list[ToySlice]) -> None:
    assert generate(slices) != WANT


def test_another_model_length_is_seen() -> None:
    assert len({tuple(toy.expected(PROMPT, COUNT, layers)) for layers in range(1, 20)}) == 19


def test_a_wrong_position_is_seen() -> None:
    slices = parts(0, 3, LAYERS)
    with pytest.raises(FrameError, match="holds 8 positions"):
        generate(slices, position_of=lambda position: position + (position > 7))
    shifted = ToySlice(0, LAYERS)
    shifted.step(toy.to_row(0)[None, :], 0, 0)  # so that position 1 may follow
    assert generate([shifted], position_of=lambda position: position + 1) != WANT


def test_one_stale_cell_in_one_layer_is_seen() -> None:
    """A cell that a stage did not drop, of another sequence that was there before."""
    clean, stale = ToySlice(0, LAYERS), ToySlice(0, LAYERS)
    stale.step(toy.to_row(toy.embed(33))[None, :], 0, 1)

    def mix(position: int) -> None:
        if position == 1:  # the first cell of slot 0 comes from slot 1
            stale.trim(0, 0)
            stale.copy(1, 0, 1)

    assert generate([clean]) == WANT
    assert generate([stale], before=mix) != WANT


def test_a_missing_cell_is_an_error() -> None:
    broken = ToySlice(0, LAYERS)
    with pytest.raises(FrameError, match="slot 0 holds 7 positions at layer 0, not 8"):
        generate([broken], before=lambda position: broken.trim(0, 7) if position == 8 else None)


def test_rows_replace_what_their_slot_held() -> None:
    """From their position on, and nothing before it."""
    used, rows = ToySlice(0, LAYERS), rows_of(PROMPT)
    want = used.step(rows, 0, 0)
    assert generate([used]) == WANT  # from the start once more
    assert np.array_equal(used.step(rows[3:], 3, 0), want[3:])
    other = used.step(rows[:1], 2, 0)
    assert not np.array_equal(other, want[2:3])
    assert not np.array_equal(used.step(rows[3:], 3, 0), want[3:])
    with pytest.raises(FrameError, match="holds 5 positions"):
        used.step(rows[:1], 6, 0)


def test_every_token_of_the_past_counts() -> None:
    for changed in range(len(PROMPT)):
        other = [token + (index == changed) for index, token in enumerate(PROMPT)]
        assert toy.expected(other, COUNT, LAYERS) != WANT


def test_a_copied_prefix_goes_on_as_its_source() -> None:
    part, rows = ToySlice(0, LAYERS), rows_of(PROMPT)
    want = part.step(rows, 0, 0)
    part.copy(0, 5, 2)
    assert np.array_equal(part.step(rows[2:], 2, 5), want[2:])
    assert np.array_equal(part.step(rows[4:], 4, 0), want[4:])  # the source is as it was
    with pytest.raises(FrameError):
        part.step(rows[:1], len(PROMPT) + 1, 5)


def test_a_copy_replaces_what_the_target_held() -> None:
    part = ToySlice(0, 1)
    row = toy.to_row(1)[None, :]
    part.step(np.concatenate([row] * 3), 0, 1)
    part.step(row, 0, 0)
    part.copy(0, 1, 1)
    with pytest.raises(FrameError):
        part.step(row, 2, 1)
    part.copy(7, 1, 0)  # from an empty slot
    part.step(row, 0, 1)


def test_a_copy_of_more_than_there_is_is_an_error_and_changes_nothing() -> None:
    part, rows = ToySlice(0, LAYERS), rows_of(PROMPT)
    want = part.step(rows, 0, 0)
    for source in (0, 7):
        with pytest.raises(FrameError, match=f"slot {source} holds {5 if source == 0 else 0} positions, not 6"):
            part.copy(source, 0, 6)
    part.copy(0, 0, 3)
    assert np.array_equal(part.step(rows[3:], 3, 0), want[3:])


@given(st.integers(0, 2**64 - 1))
def test_a_hidden_state_is_exact_in_f32(state: int) -> None:
    assert toy.from_row(toy.to_row(state)) == state


@pytest.mark.parametrize(
    ("name", "want"),
    [("toy:1", (1, 0.0)), ("toy:30", (30, 0.0)), ("toy:5:20", (5, 0.02)), ("toy:256:10000", (256, 10.0))],
)
def test_names(name: str, want: tuple[int, float]) -> None:
    assert toy.parse(name) == want


@pytest.mark.parametrize(
    "name", ["toy:", "toy:0", "toy:-1", "toy:257", "toy:x", "toy:1:x", "toy:1:-1", "toy:1:10001", "toy:1:2:3"]
)
def test_names_of_no_toy_model(name: str) -> None:
    with pytest.raises(ModelError, match="toy:LAYERS"):
        toy.parse(name)
