"""Nodes that the one before them in the ring does not reach, though both reach the coordinator. Pure.

Theory. A firewall that lets out and not in, or a switch that failed, makes a node useless for some others, and no
heartbeat tells. What tells is a hop that cannot be opened. Once is no proof: the stage may just have died or been
stopped, and is replaced. After TIMES in a row the node that was not reached is left out of plans for AVOID_S, if the
model fits the others; then it is tried again. Each such failure leaves out one node more, so the attempts end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TIMES = 2
AVOID_S = 120.0  # a stage is tried again when somebody may have repaired it; each attempt costs its streams a pause
FRESH_S = 60.0  # failures that are older than this belong to another story; an attempt takes 10 s and a pause


@dataclass(slots=True)
class _Seen:
    times: int
    last: float


@dataclass(slots=True)
class Hops:
    """Times are monotonic, s. Bound: an entry for each node that is here; ``forget`` those that are not."""

    _failed: dict[str, _Seen] = field(default_factory=dict)

    def failed(self, target: str, now: float) -> bool:
        """The node ``target`` was not reached. Whether it is left out from now on."""
        seen = self._failed.get(target)
        if seen is None or now - seen.last > FRESH_S:
            seen = self._failed[target] = _Seen(0, now)
        seen.times, seen.last = seen.times + 1, now
        return seen.times == TIMES

    def closed(self) -> None:
        """A ring was closed: what failed just once has passed."""
        self._failed = {target: seen for target, seen in self._failed.items() if seen.times >= TIMES}

    def forget(self, target: str) -> None:
        """It is gone, or comes anew."""
        self._failed.pop(target, None)

    def avoided(self, now: float) -> set[str]:
        """Nodes to leave out of a plan, if it is possible without them."""
        return {target for target, seen in self._failed.items() if seen.times >= TIMES and now - seen.last <= AVOID_S}
