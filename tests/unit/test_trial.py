"""A help is kept where it makes tokens come faster, and asked again later."""

from __future__ import annotations

import pytest

from dwarfstar_engine.batch.trial import HOLD, ROUNDS, WINDOW, Trial


def run(trial: Trial, tokens: int, with_s: float, without_s: float, now: float = 0.0) -> tuple[float, int]:
    """Draw tokens one by one at the rate of the way in use. The time after, and how many were drawn with the help."""
    used = 0
    for _ in range(tokens):
        now += with_s if trial.using else without_s
        used += trial.using
        trial.drawn(1, now)
    return now, used


@pytest.mark.parametrize(("with_s", "kept"), [(0.5, True), (0.99, False), (1.5, False)])
def test_the_faster_way_is_kept(with_s: float, kept: bool) -> None:
    trial = Trial()
    run(trial, 2 * ROUNDS * (WINDOW + 1), with_s, 1.0)
    assert trial.using is kept
    _, used = run(trial, HOLD - 1, with_s, 1.0)
    assert used == (HOLD - 1 if kept else 0)


def test_it_is_asked_again_after_a_while() -> None:
    trial = Trial()
    trial_tokens = 2 * ROUNDS * (WINDOW + 1)
    now, _ = run(trial, trial_tokens, 2.0, 1.0)
    assert not trial.using
    _, used = run(trial, HOLD + trial_tokens, 0.5, 1.0, now)
    assert used > 0 and trial.using


def test_time_without_work_does_not_count() -> None:
    trial = Trial()
    now = 0.0
    for _ in range(2 * ROUNDS):
        now, _ = run(trial, WINDOW // 2, 0.5, 1.0, now)
        trial.idle()
        now += 1000.0
        now, _ = run(trial, WINDOW + 1, 0.5, 1.0, now)
    assert trial.using
