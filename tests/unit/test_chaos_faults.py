"""The choice of faults, and how what came of them is told."""

from __future__ import annotations

import random

import pytest

from dwarfstar_engine.bench import faults
from dwarfstar_engine.bench.faults import OF_ENGINE, OF_LINKS, Kind


def test_a_seed_replays_the_choice() -> None:
    one, again, other = (faults.strikes(random.Random(seed), 50, 3, links=True, own=True) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("own", [True, False])
def test_strikes_hit_what_is_there(seed: int, own: bool) -> None:
    strikes = faults.strikes(random.Random(seed), 60, 3, links=own, own=own)
    every = [fault for strike in strikes for fault in strike.faults]
    assert len(every) == 60 and {fault.node for fault in every} == set(range(0 if own else 1, 4))
    for strike in strikes:
        assert len({fault.node for fault in strike.faults}) == len(strike.faults) in (1, 2)
    for fault in every:
        assert fault.kind in OF_ENGINE if fault.node == 0 else fault.kind is not Kind.STOP_ENGINE
        assert own or fault.kind not in OF_LINKS


def test_a_stall_is_the_longest_silence_until_the_next_strike() -> None:
    struck = [(10.0, "a"), (20.0, "b"), (30.0, "a")]
    tokens = [9.0, 11.0, 15.0, 19.0, 21.0, 29.5]
    assert faults.stalls(struck, tokens, 33.0) == {"a": [4.0, 3.0], "b": [8.5]}
    assert faults.silences(tokens, 33.0)[:2] == [8.5, 4.0]


def test_growth_is_told_from_a_cache_that_fills() -> None:
    assert faults.grown([100.0] * 10 + [110.0] * 10 + [120.0] * 10, 0.05, 8)[2]
    assert not faults.grown([100.0] * 10 + [104.0] * 10 + [106.0] * 10, 0.05, 8)[2]
    assert faults.grown([1.0, 2.0, 3.0], 0.0, 1)[:2] == (1.0, 3.0)
