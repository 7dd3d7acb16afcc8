"""A slice is measured by what it computes: waiting for a core, as beside other stages, is no cost of it."""

from __future__ import annotations

import time

import pytest

from dwarfstar_engine.native import FloatRows
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.measure import ROUNDS, WARM, _step, measure_clock

WAIT_S = 0.02


class Slice:
    """One whose steps take nothing but a wait for somebody else."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, rows: FloatRows, position: int, slot: int, wants: object, *, prompt: bool = False) -> None:
        assert position == self.steps
        self.steps += 1
        time.sleep(WAIT_S)


@pytest.mark.parametrize("threads", [1, 4])
def test_waits_count_only_where_they_cannot_be_told_from_work(threads: int) -> None:
    alone = threads == 1 and not llamacpp.gpu_offload()
    assert measure_clock(threads) is (time.thread_time if alone else time.perf_counter)
    slice_ = Slice()
    ms = _step(slice_, None, measure_clock(threads))  # type: ignore[arg-type]
    assert slice_.steps == WARM + ROUNDS
    assert (ms < 1000 * WAIT_S) == alone
