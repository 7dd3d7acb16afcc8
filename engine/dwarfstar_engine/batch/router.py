"""Which of several pipelines gets a request. Pure.

Theory. A request goes where it is soonest done: to the pipeline that has least to do for its speed. But one that holds
the beginning of the prompt already need not read it, which is worth waiting for, within bounds: a pipeline that has
BEARABLE times as much to do as the least is left for another, which from then on holds that beginning, too. So one chat
stays where it is, and a system prompt that all share spreads over the pipelines as they fill up.

Invariants. A request waits for a slot only where no pipeline has one free. Of equally fast pipelines without cached
beginnings none has two requests more than another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BEARABLE = 2.0
LEAST_ROWS = 32  # cached; fewer are read again in no time


@dataclass(frozen=True, slots=True)
class Load:
    """A pipeline that serves. active, queued: its requests. cached: rows of the prompt that one of its slots holds.
    speed: tokens a second, in any unit that all have in common."""

    number: int
    slots: int
    active: int
    queued: int
    cached: int = 0
    speed: float = 1.0

    @property
    def free(self) -> int:
        return max(0, self.slots - self.active - self.queued)

    @property
    def excess(self) -> int:
        """Requests for which there is no slot."""
        return max(0, self.active + self.queued - self.slots)

    @property
    def burden(self) -> float:
        """What one request more would have to share."""
        return (self.active + self.queued + 1) / self.speed


def route(loads: Sequence[Load], *, waits: bool = True) -> int | None:
    """The number of the one that is to take a request. waits: it may wait for a slot; else None if none is free."""
    open_ones = [load for load in loads if load.free] or (list(loads) if waits else [])
    if not open_ones:
        return None
    least = min(load.burden for load in open_ones)
    holding = [one for one in open_ones if one.cached >= LEAST_ROWS and one.burden <= BEARABLE * least]
    if holding:
        return min(holding, key=lambda one: (-one.cached, one.burden, one.number)).number
    return min(open_ones, key=lambda one: (one.burden, one.number)).number
