"""One identity at two places: told apart from a node that comes back. Times are written down, nothing waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.node.copies import MARGIN_S, PATIENCE_S, Presence, Verdict, judge

BEAT_S = 1.0  # heartbeats of a node that lives
CAME = 100.0


def outcome(old: Presence | None, beats: list[float], instance: str = "new") -> tuple[Verdict, float]:
    """The verdict on a newcomer, and how long it took; ``beats``: when the old one is heard."""
    now = CAME
    while True:
        heard = [beat for beat in beats if beat <= now]
        held = Presence(old.instance, heard[-1]) if old is not None and heard else old
        verdict = judge(held, instance, CAME, now)
        if verdict is not Verdict.WAIT:
            return verdict, now - CAME
        now += 0.1
        assert now < CAME + PATIENCE_S + 0.2, "it is decided in time"


def test_a_node_that_nobody_knows_is_admitted_at_once() -> None:
    assert outcome(None, []) == (Verdict.ADMIT, 0)


def test_the_same_process_over_a_new_connection_is_admitted_at_once() -> None:
    assert outcome(Presence("same", CAME), [CAME + 0.9], "same") == (Verdict.ADMIT, 0)


@given(st.floats(0, 1))
def test_a_copy_is_refused_as_soon_as_the_other_has_spoken(phase: float) -> None:
    beats = [CAME - 1 + phase + BEAT_S * number for number in range(6)]
    verdict, took = outcome(Presence("old", beats[0]), beats)
    assert verdict is Verdict.COPY and took <= BEAT_S + MARGIN_S + 0.2


@given(st.floats(0, 5), st.floats(0, MARGIN_S))
def test_a_node_started_again_takes_its_own_place(silent_s: float, late_s: float) -> None:
    """Its last word may have been on its way when it came back."""
    verdict, took = outcome(Presence("old", CAME - silent_s), [CAME - silent_s, CAME + late_s])
    assert verdict is Verdict.ADMIT and took >= PATIENCE_S - 0.001


def test_an_old_connection_that_breaks_meanwhile_decides_it() -> None:
    assert judge(Presence("old", CAME), "new", CAME, CAME + 0.1) is Verdict.WAIT
    assert judge(None, "new", CAME, CAME + 0.2) is Verdict.ADMIT


def test_a_living_node_speaks_often_enough_to_be_seen() -> None:
    assert pytest.importorskip("dwarfstar_engine.node.daemon").HEARTBEAT_S + MARGIN_S < PATIENCE_S
