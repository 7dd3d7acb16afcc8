"""Which stages a node gives up for another one. Pure.

A stage that is needed comes before those that wait: it is never refused, as the coordinator has planned for what the
node lends. One that is to wait gives up nothing, and is refused where it does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_STAGES = 3  # processes of a node: what it serves, a copy for another node, and what the next plan asks of it


@dataclass(frozen=True, slots=True)
class Held:
    """A stage that a node has. need_bytes 0: not known, it is taken for all that the node lends.

    needed: it is part of the newest epoch.
    """

    need_bytes: int
    needed: bool


def takes(need_bytes: int, lent_bytes: int) -> int:
    """What to count for a stage."""
    return need_bytes or lent_bytes


def given_up(held: Sequence[Held], need_bytes: int, lent_bytes: int, *, standby: bool) -> list[int] | None:
    """Indices of the stages to end before one of ``need_bytes`` begins, the first held first; None: it has no room."""
    left, count = lent_bytes - sum(takes(one.need_bytes, lent_bytes) for one in held), len(held)
    wanted, dropped = takes(need_bytes, lent_bytes), []
    for index, one in enumerate(held):
        if left >= wanted and count < MAX_STAGES:
            break
        if not one.needed and not standby:
            dropped.append(index)
            left, count = left + takes(one.need_bytes, lent_bytes), count - 1
    if standby and (left < wanted or count >= MAX_STAGES):
        return None
    return dropped
