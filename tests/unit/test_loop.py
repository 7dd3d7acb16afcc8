"""What a process does every so often is done at the same moments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.wire import loop


@given(began=st.floats(0, 1e6), passed=st.floats(0, 1e5), period_s=st.sampled_from([0.25, 0.5, 1.0]))
def test_longer_beats_fall_on_shorter_ones(began: float, passed: float, period_s: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_BEGAN", began)
        patch.setattr("dwarfstar_engine.wire.loop.time.monotonic", lambda: began + passed)
        left_s = loop.until_beat(period_s)
        assert 0 < left_s <= period_s
        patch.setattr("dwarfstar_engine.wire.loop.time.monotonic", lambda: began + passed + left_s)
        due = loop.until_beat(period_s / 2)  # just now, but for the last bits of a float
        assert min(due, period_s / 2 - due) < 1e-6
