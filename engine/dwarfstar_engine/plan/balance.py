"""When layers should move between stages that run, from how busy they are. A pure state machine; time is passed in.

Theory. Under load a pipeline runs at its busiest stage's pace. A stage's rate is the weight bytes it holds over the
time it computes; so what a slice would take on another stage's node follows from that node's rate. If the busiest and
the idlest stage are ``GAP`` apart for ``GAP_S`` without a break, the busiest gives layers to the less busy of its
neighbours: half of what would make the two equal, as rates change with the slice. What it did is judged over
``JUDGE_S``: if tokens a second dropped by ``DROP``, the old cuts are advised again. After each move there is quiet for
``COOL_S``.

Invariants: nothing is advised of a pipeline that is not under load, of other cuts than were seen all the time, or
below ``LEAST_GAIN``. Whether advice is followed is the caller's affair: it is seen from the cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.model.costs import stage_bytes
from dwarfstar_engine.plan.cost import Costs
from dwarfstar_engine.plan.delta import clamp
from dwarfstar_engine.plan.proportional import StagePlan

GAP = 0.20  # of busy shares: less is noise
GAP_S = 180.0
JUDGE_S = 60.0
SETTLE_S = 10.0  # after a move streams are replayed: not counted
DROP = 0.10
COOL_S = 300.0  # after each move, kept or taken back
LEAST_GAIN = 0.03
UNDER_LOAD = 0.5  # the busiest stage is at least so busy: an idle pipeline says nothing about balance
SILENCE_S = 30.0  # without an observation a run of them is broken


@dataclass(frozen=True, slots=True)
class Observation:
    """stages: as they run now, on nodes by whatever tells them apart. busy: share of the time each computed, 0 … 1.
    tok_s: of the whole pipeline."""

    stages: tuple[StagePlan, ...]
    busy: tuple[float, ...]
    tok_s: float

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(stage.layers[1] for stage in self.stages[:-1])


@dataclass(frozen=True, slots=True)
class Move:
    """Layers that should move between neighbours, and the cuts that result. gain: of tokens a second, as a share."""

    source: str
    target: str
    layers: int
    cuts: tuple[int, ...]
    gain: float

    @property
    def sentence(self) -> str:
        return f"move {_layers(self.layers)} from {self.source} to {self.target}: {self.gain:+.0%}"


@dataclass(frozen=True, slots=True)
class RollBack:
    """The last move made it worse: back to these cuts. drop: of tokens a second, as a share."""

    cuts: tuple[int, ...]
    drop: float

    @property
    def sentence(self) -> str:
        return f"take the last move back: it cost {self.drop:.0%}"


@dataclass(frozen=True, slots=True)
class Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> Mean:
        return Mean(self.total + value, self.count + 1)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Trial:
    """A move that was advised and made: what it was before, and what has been seen since."""

    cuts: tuple[int, ...]
    tok_s: float
    since_s: float
    seen: Mean = Mean()


@dataclass(frozen=True, slots=True)
class Balance:
    """nodes, cuts: of the run of observations. gap_since_s: from when on the gap has been there; None: it is not.

    tok_s, busy: means over that gap. advised: cuts last advised, with the tokens a second before. quiet_until_s: no
    move is advised before.
    """

    nodes: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()
    last_s: float = 0.0
    gap_since_s: float | None = None
    tok_s: Mean = Mean()
    busy: tuple[Mean, ...] = ()
    advised: tuple[tuple[int, ...], float] | None = None
    trial: Trial | None = None
    quiet_until_s: float = 0.0


Present = Callable[[], tuple[Costs, Sequence[StagePlan]] | None]
"""Costs of the cluster, and the plan that runs in their terms; None: there is none now."""


def observe(
    state: Balance, seen: Observation, present: Present, now_s: float
) -> tuple[Balance, Move | RollBack | None]:
    """What to do after an observation. Call it every few seconds: ``present`` is asked when a gap has lasted only."""
    state = _followed(state, seen, now_s)
    if max(seen.busy) < UNDER_LOAD or now_s - state.last_s > SILENCE_S:
        return replace(_without_gap(state), last_s=now_s), None
    state = replace(state, last_s=now_s)
    if state.trial is not None:
        return _judge(state, seen, now_s)
    if len(seen.stages) < 2 or max(seen.busy) - min(seen.busy) <= GAP or now_s < state.quiet_until_s:
        return _without_gap(state), None
    since = now_s if state.gap_since_s is None else state.gap_since_s
    means = state.busy or (Mean(),) * len(seen.busy)
    state = replace(
        state,
        gap_since_s=since,
        tok_s=state.tok_s.add(seen.tok_s),
        busy=tuple(mean.add(busy) for mean, busy in zip(means, seen.busy, strict=True)),
    )
    if now_s - since < GAP_S:
        return state, None
    if (found := present()) is None:
        return state, None
    move = better(*found, [mean.value for mean in state.busy])
    before = state.tok_s.value
    state = replace(_without_gap(state), quiet_until_s=now_s + COOL_S)
    return (state, None) if move is None else (replace(state, advised=(move.cuts, before)), move)


def _without_gap(state: Balance) -> Balance:
    return replace(state, gap_since_s=None, tok_s=Mean(), busy=())


def _followed(state: Balance, seen: Observation, now_s: float) -> Balance:
    """Another plan begins another run of observations; if it is the one that was advised, a trial."""
    nodes = tuple(stage.node for stage in seen.stages)
    if nodes == state.nodes and seen.cuts == state.cuts:
        return state
    trial = None
    if state.advised is not None and nodes == state.nodes and seen.cuts == state.advised[0]:
        trial = Trial(state.cuts, state.advised[1], now_s)
    quiet = max(state.quiet_until_s, now_s + COOL_S) if state.nodes else state.quiet_until_s
    return Balance(nodes, seen.cuts, now_s, trial=trial, quiet_until_s=quiet)


def _judge(state: Balance, seen: Observation, now_s: float) -> tuple[Balance, RollBack | None]:
    trial = state.trial
    assert trial is not None
    if now_s - trial.since_s >= SETTLE_S:
        trial = replace(trial, seen=trial.seen.add(seen.tok_s))
    if now_s - trial.since_s < JUDGE_S:
        return replace(state, trial=trial), None
    state = replace(state, trial=None, advised=None)
    drop = 1 - trial.seen.value / trial.tok_s if trial.tok_s > 0 else 0.0
    return state, RollBack(trial.cuts, drop) if drop > DROP else None


def better(costs: Costs, stages: Sequence[StagePlan], busy: Sequence[float]) -> Move | None:
    """Half the way to balance between the busiest stage and the less busy of its neighbours, if that gains enough."""
    i = max(range(len(busy)), key=busy.__getitem__)
    j = min((k for k in (i - 1, i + 1) if 0 <= k < len(busy)), key=busy.__getitem__)
    left, right = min(i, j), max(i, j)
    rates = [stage.weights_bytes / max(one, 1e-6) for stage, one in zip(stages, busy, strict=True)]
    both = stages[i].weights_bytes + stages[j].weights_bytes
    surplus = stages[i].weights_bytes - both * rates[i] / (rates[i] + rates[j])
    layer_bytes = stages[i].weights_bytes / (stages[i].layers[1] - stages[i].layers[0])
    step = max(1, round(surplus / layer_bytes / 2))
    boundary = stages[left].layers[1]
    try:
        cut = clamp(costs, stages, left, boundary - step if i == left else boundary + step).cut
    except PlanError:
        return None
    moved = boundary - cut if i == left else cut - boundary
    if moved <= 0:
        return None
    gain = _gain(costs, stages, rates, busy, (left, right, cut))
    cuts = tuple(cut if k == left else stage.layers[1] for k, stage in enumerate(stages[:-1]))
    return Move(stages[i].node, stages[j].node, moved, cuts, gain) if gain >= LEAST_GAIN else None


def _gain(
    costs: Costs,
    stages: Sequence[StagePlan],
    rates: Sequence[float],
    busy: Sequence[float],
    change: tuple[int, int, int],
) -> float:
    """Of tokens a second, with the stages left and right of a boundary cut anew."""
    left, right, cut = change
    after = list(busy)
    for k, (a, b) in ((left, (stages[left].layers[0], cut)), (right, (cut, stages[right].layers[1]))):
        after[k] = stage_bytes(costs.nodes[stages[k].node].costs, a, b, last=b == costs.job.layers) / rates[k]
    return max(busy) / max(after) - 1


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"
