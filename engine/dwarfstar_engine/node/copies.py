"""Whether a node that comes under the id of one that is here is the same node again, or a copy of its identity. Pure.

Theory. Each process of a node names its instance, which is random. The same instance again is the same process, over a
new connection. Another instance is either a node that was started again, whose old connection we have not seen break
(its power was cut), or a second machine with a copied home folder. The two differ in one thing: in the second case the
old one goes on speaking. So the newcomer waits until the old one has spoken since, which makes it a copy, or has been
silent for longer than a node that lives ever is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

MARGIN_S = 0.5  # what came sooner after the newcomer may have been on its way already
PATIENCE_S = 2.5  # a node speaks every second; it is called late after this time, too


@dataclass(frozen=True, slots=True)
class Presence:
    """A node that is here. heard: monotonic time of its last message, s."""

    instance: str
    heard: float


class Verdict(Enum):
    ADMIT = auto()  # in the place of the old one, if there is any
    WAIT = auto()  # ask again soon
    COPY = auto()  # both live: the newcomer is refused


def judge(held: Presence | None, instance: str, came: float, now: float) -> Verdict:
    """What to do at ``now`` with a process called ``instance`` that came at ``came`` (monotonic times, s).

    held: who is here under the same id at this moment.
    """
    if held is None or held.instance == instance:
        return Verdict.ADMIT
    if held.heard > came + MARGIN_S:
        return Verdict.COPY
    return Verdict.ADMIT if now - came >= PATIENCE_S else Verdict.WAIT
