"""Results wait for each other only where others are due soon, never two of one stream, and none is lost or passed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.stage.held import HELD, HOLD_S, LANES, Held
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import ResultFrame, SampledRow


def result(number: int) -> bytes:
    return frames.encode(ResultFrame(1, number, [SampledRow(0, 5)], (), 3))


def messages(lanes: int, gap_s: float, turns: int = 20) -> list[int]:
    """Results in each message, of lanes that come in turn."""
    held, sizes = Held(), []
    for count in range(turns * lanes):
        if held.add(result(count % lanes), count * gap_s):
            sizes.append(len(held.take()))
    return sizes


def test_a_lane_alone_never_waits() -> None:
    assert messages(1, HOLD_S / 10) == [1] * 20


@pytest.mark.parametrize("lanes", range(2, 2 * HELD))
def test_lanes_travel_together_from_their_second_round_on(lanes: int) -> None:
    assert set(messages(lanes, HOLD_S / 100)[lanes + 1 : -1]) == {min(lanes, HELD)}


def test_nothing_waits_for_what_comes_later_than_it_may_wait() -> None:
    assert set(messages(4, 1.5 * HOLD_S)) == {1}
    assert set(messages(4, 0.4 * HOLD_S)[5:-1]) == {3}


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.0, 2 * HOLD_S)), max_size=200))
def test_all_come_in_their_order_and_few_of_them_wait(arrivals: list[tuple[int, float]]) -> None:
    held, now, came, left = Held(), 0.0, [], []
    for number, gap in arrivals:
        now += gap
        came.append(number)
        if held.add(result(number), now):
            left += [frames.number_of(one) for one in held.take()]
        assert len(held) < HELD
    left += [frames.number_of(one) for one in held.take()]
    assert left == came and len(held) == 0


def test_numbers_are_forgotten() -> None:
    held = Held()
    for number in range(10 * LANES):
        held.add(result(number), math.inf)
    assert len(held._seen) <= LANES
