"""Advice to move layers comes after minutes of imbalance, in half steps, and is taken back if it made things worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest

from dwarfstar_engine.plan.balance import (
    COOL_S,
    GAP_S,
    JUDGE_S,
    SILENCE_S,
    Balance,
    Move,
    Observation,
    RollBack,
    better,
    observe,
)
from dwarfstar_engine.plan.cluster import Cluster
from dwarfstar_engine.plan.cost import Costs, cluster_costs
from dwarfstar_engine.plan.predict import plan_of
from dwarfstar_engine.plan.proportional import StagePlan
from support.clusters import even_job, gpu

COSTS = cluster_costs(Cluster((gpu("a", 24, 68), gpu("b", 24, 120), gpu("c", 24, 120))), even_job(36, 11))
EVERY_S = 5.0


def present(seen: Observation) -> tuple[Costs, Sequence[StagePlan]]:
    return COSTS, seen.stages


@dataclass
class Run:
    """A pipeline with a virtual clock. rates: layers a second of each node; load: how busy its slowest stage is."""

    rates: Sequence[float]
    cuts: tuple[int, ...]
    load: float = 1.0
    now_s: float = 1000.0
    tok_s: Callable[[float], float] = lambda slowest: 1 / slowest
    state: Balance = field(default_factory=Balance)
    heard: list[tuple[float, Move | RollBack]] = field(default_factory=list)

    def seen(self) -> Observation:
        bounds = [0, *self.cuts, 36]
        slices = [(name, a, b) for name, a, b in zip("abc", bounds[:-1], bounds[1:], strict=False)]
        times = [(b - a) / rate for (_, a, b), rate in zip(slices, self.rates, strict=True)]
        busy = tuple(self.load * one / max(times) for one in times)
        return Observation(plan_of(COSTS, slices).stages, busy, self.tok_s(max(times)))

    def go(self, seconds: float, *, follow: bool = False) -> list[Move | RollBack]:
        """Observe for a while; the advice heard in it. follow: do what is advised."""
        before, end = len(self.heard), self.now_s + seconds
        while self.now_s < end:
            seen = self.seen()
            self.state, advice = observe(self.state, seen, partial(present, seen), self.now_s)
            if advice is not None:
                self.heard.append((self.now_s, advice))
                if follow:
                    self.cuts = advice.cuts
            self.now_s += EVERY_S
        return [advice for _, advice in self.heard[before:]]


def lopsided() -> Run:
    """18/18 of an M1 and an M4, which should be about 12/24: 93 % busy and 51 % were seen."""
    return Run((68.0, 120.0), (18,))


def test_advice_comes_after_three_minutes_and_says_what_it_gains() -> None:
    run = lopsided()
    assert run.go(GAP_S - EVERY_S) == []
    (move,) = run.go(4 * EVERY_S)
    assert isinstance(move, Move)
    assert (move.source, move.target, move.layers, move.cuts) == ("a", "b", 2, (16,))
    assert move.gain == pytest.approx(18 / 16 - 1)
    assert move.sentence == "move 2 layers from a to b: +12%"


def test_half_steps_lead_to_balance_and_then_nothing_more_is_said() -> None:
    run = lopsided()
    run.go(3600, follow=True)
    assert 12 <= run.cuts[0] <= 15
    seen = run.seen().busy
    assert max(seen) - min(seen) <= 0.21
    assert all(isinstance(advice, Move) and advice.source == "a" for _, advice in run.heard)
    settled = len(run.heard)
    run.go(7200, follow=True)
    assert len(run.heard) == settled


def test_between_moves_there_is_quiet() -> None:
    run = lopsided()
    run.go(7200)  # nobody follows: it is said again, and not more often
    times = [at for at, _ in run.heard]
    assert len(times) > 2
    assert all(later - earlier >= COOL_S + GAP_S for earlier, later in pairwise(times))


def test_a_gap_that_comes_and_goes_is_noise() -> None:
    run = lopsided()
    for _ in range(20):
        run.rates = (68.0, 120.0)
        assert run.go(GAP_S - 20) == []
        run.rates = (100.0, 100.0)
        assert run.go(EVERY_S) == []


def test_a_pipeline_without_load_says_nothing_about_balance() -> None:
    run = lopsided()
    run.load = 0.4
    assert run.go(3600) == []


def test_silence_breaks_a_run_of_observations() -> None:
    run = lopsided()
    for _ in range(30):
        assert run.go(GAP_S / 2) == []
        run.now_s += SILENCE_S + EVERY_S


def test_a_move_that_made_it_worse_is_taken_back() -> None:
    run = lopsided()
    (move,) = run.go(GAP_S + 2 * EVERY_S, follow=True)
    before = 1 / (18 / 68)
    run.tok_s = lambda _: 0.8 * before  # whatever the reason: the other node was throttled
    assert run.go(JUDGE_S - 3 * EVERY_S, follow=True) == []
    (back,) = run.go(5 * EVERY_S, follow=True)
    assert isinstance(back, RollBack) and run.cuts == (18,) and isinstance(move, Move)
    assert back.drop == pytest.approx(0.2) and back.sentence == "take the last move back: it cost 20%"
    quiet = run.now_s
    run.go(COOL_S - 2 * EVERY_S)
    assert all(at < quiet for at, _ in run.heard)


def test_a_small_drop_is_no_reason() -> None:
    run = lopsided()
    run.go(GAP_S + 2 * EVERY_S, follow=True)
    run.tok_s = lambda _: 0.92 / (18 / 68)
    assert not any(isinstance(advice, RollBack) for advice in run.go(JUDGE_S * 3, follow=True))


def test_a_plan_of_others_is_not_judged() -> None:
    run = lopsided()
    run.go(GAP_S + 2 * EVERY_S)
    run.cuts = (10,)  # not what was advised
    run.tok_s = lambda _: 0.1
    assert run.go(JUDGE_S * 3) == []


def test_layers_go_to_the_less_busy_neighbour() -> None:
    run = Run((100.0, 50.0, 100.0), (10, 24))
    (move,) = run.go(GAP_S + 2 * EVERY_S)
    assert isinstance(move, Move) and (move.source, move.target) == ("b", "a")
    assert move.cuts == (10 + move.layers, 24)


def test_no_advice_that_would_not_fit() -> None:
    tight = cluster_costs(Cluster((gpu("a", 24, 68), gpu("b", 5.6, 120))), even_job(36, 11))
    stages = plan_of(tight, [("a", 0, 18), ("b", 18, 36)]).stages
    assert better(tight, stages, (0.93, 0.51)) is None


def test_a_pipeline_of_one_stage_is_balanced() -> None:
    run = Run((100.0,), ())
    assert run.go(3600) == []
