"""What frames of steps take in a ring, from what was measured of its stages and links. Pure."""

from __future__ import annotations

from dataclasses import dataclass

FED_MS = 0.4  # that a row saves which goes on by itself, estimated: a hop, and what the coordinator does between two
HOP_MS = 0.25  # what a hop takes beside its link: a process wakes, and its caches are cold
TOGETHER = 4  # rows of the batch that stages measure beside as many decodes


@dataclass(frozen=True, slots=True)
class StageCost:
    """step_ms: one row. together_ms: TOGETHER rows as one batch; 0 where a stage runs each by itself."""

    step_ms: float
    together_ms: float = 0.0

    def rows(self, rows: int) -> float:
        """The time of so many rows, in ms."""
        more = (self.together_ms - self.step_ms) / (TOGETHER - 1) if self.together_ms else self.step_ms
        return self.step_ms + (rows - 1) * more


@dataclass(frozen=True, slots=True)
class RingCosts:
    """``speculate.Costs``. round_trips_ms: of each link between stages. feeds: rows may go on by themselves."""

    stages: tuple[StageCost, ...]
    round_trips_ms: tuple[float, ...] = ()
    feeds: bool = False

    def cost(self, rows: int) -> float:
        return max((stage.rows(rows) for stage in self.stages), default=0.0) or 1e-3

    @property
    def saved(self) -> float:
        return FED_MS if self.feeds else 0.0

    def latency(self, rows: int) -> float:
        hops = HOP_MS * (len(self.stages) + 1) + sum(self.round_trips_ms) / 2
        return sum(stage.rows(rows) for stage in self.stages) + hops
