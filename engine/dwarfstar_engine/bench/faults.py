"""Which faults strike when, and how their outcome is told. Pure: a seed replays a run's choice of faults.

A *strike* is one fault or two at once, on different nodes. Node 0 is the engine's own: its daemon is part of the
engine, which may be stopped for a while and is not killed. Room is left on every node, so a stream may end with an
error in one case only: it was carried over as often as is allowed.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

TWICE = 0.15  # share of strikes that are two faults at once
MIN_PAUSE_S, MAX_PAUSE_S = 0.3, 6.0  # between strikes: some hit a pipeline that is just being brought up
PATIENT = 0.6  # share of strikes that wait until the model is served again: else no stream would go on
MIN_HOLD_S, MAX_HOLD_S = 0.5, 8.0  # a stop or a cut: shorter and longer than the time-outs of 2.5 and 5 s


class Kind(Enum):
    """What is done to a node or to its stage."""

    KILL_STAGE = "kill -9 of a stage"
    KILL_NODE = "kill -9 of a node"
    STOP_STAGE = "SIGSTOP of a stage"
    STOP_NODE = "SIGSTOP of a node"
    RESTART = "restart of a node"
    CUT = "link cut"
    DEAF = "link cut one way"
    STOP_ENGINE = "SIGSTOP of the engine"


ON_STAGES = frozenset({Kind.KILL_STAGE, Kind.STOP_STAGE})
OF_LINKS = frozenset({Kind.CUT, Kind.DEAF})
OF_ENGINE = frozenset({*ON_STAGES, Kind.STOP_ENGINE})


@dataclass(frozen=True, slots=True)
class Fault:
    """node: its index. hold_s: until a stop or cut ends, or a killed node is started again."""

    kind: Kind
    node: int
    hold_s: float


@dataclass(frozen=True, slots=True)
class Strike:
    """faults: one or two. pause_s: after the strike before. patient: and not before the model is served again."""

    faults: tuple[Fault, ...]
    pause_s: float
    patient: bool

    @property
    def name(self) -> str:
        return self.faults[0].kind.value if len(self.faults) == 1 else "two at once"


def strikes(rng: random.Random, count: int, nodes: int, *, links: bool, own: bool, haste: float = 1.0) -> list[Strike]:
    """Strikes with ``count`` faults in all, on the nodes 1 to ``nodes``. links: they can be cut. own: the engine's
    process is a node as well, number 0. haste: by how much pauses and holds are shorter."""
    kinds = [kind for kind in Kind if links or kind not in OF_LINKS]
    chosen: list[Strike] = []
    while count:
        many = 2 if count > 1 and rng.random() < TWICE else 1
        targets = rng.sample(range(0 if own else 1, nodes + 1), many)
        faults = []
        for target in targets:
            kind = rng.choice([k for k in kinds if (k is not Kind.STOP_ENGINE if target else k in OF_ENGINE)])
            faults.append(Fault(kind, target, round(rng.uniform(MIN_HOLD_S, MAX_HOLD_S) / haste, 2)))
        pause_s = round(rng.uniform(MIN_PAUSE_S, MAX_PAUSE_S) / haste, 2)
        chosen.append(Strike(tuple(faults), pause_s, rng.random() < PATIENT))
        count -= many
    return chosen


def stalls(struck: Sequence[tuple[float, str]], tokens: Sequence[float], end: float) -> dict[str, list[float]]:
    """The longest silence of all streams together after each strike and before the next one, by the strike's name, s.

    struck: times and names. tokens: times at which any stream got something, increasing. end: of the run.
    """
    found: dict[str, list[float]] = {}
    for index, (at, name) in enumerate(struck):
        until = struck[index + 1][0] if index + 1 < len(struck) else end
        times = [at, *(time for time in tokens if at < time < until), until]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        found.setdefault(name, []).append(max(gaps))
    return found


def silences(tokens: Sequence[float], end: float) -> list[float]:
    """Pauses of all streams together, however many strikes fell into one; the longest first, s."""
    return sorted((later - earlier for earlier, later in itertools.pairwise([*tokens, end])), reverse=True)


def table(found: Mapping[str, Sequence[float]]) -> str:
    """The stalls for people; none is longer than the time to the next strike."""
    lines = [f"{'strike':22}{'count':>6}{'median s':>10}{'p99 s':>8}{'worst s':>9}"]
    everything = [gap for gaps in found.values() for gap in gaps]
    for name, gaps in (*sorted(found.items()), ("all", everything)):
        if gaps:
            worst = sorted(gaps)
            p99 = worst[min(len(worst) - 1, int(0.99 * len(worst)))]
            lines.append(f"{name:22}{len(gaps):6}{statistics.median(gaps):10.2f}{p99:8.2f}{worst[-1]:9.2f}")
    return "\n".join(lines)


def grown(samples: Sequence[float], share: float, allowance: float) -> tuple[float, float, bool]:
    """Medians of the first and the last third, and whether the last exceeds the first by more than ``share`` of it
    and ``allowance``: a leak grows with every fault, a cache fills once."""
    third = max(1, len(samples) // 3)
    first, last = statistics.median(samples[:third]), statistics.median(samples[-third:])
    return first, last, last > first * (1 + share) + allowance
