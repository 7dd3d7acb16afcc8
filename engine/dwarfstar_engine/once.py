"""Whether something is worth a line in the log: strangers must not be able to fill a disk. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

TOLD = 256  # things that are remembered, the least recent forgotten first
TOLD_S = 3600.0
LINES = 20
LINES_S = 60.0


@dataclass(slots=True)
class Once:
    """Each thing is worth a line in ``told_s``, and all together ``lines`` in LINES_S."""

    told_s: float = TOLD_S
    lines: int = LINES
    _told: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _begin: float = float("-inf")
    _written: int = 0

    def worth(self, what: str, now: float) -> bool:
        """True the first time in ``told_s``, unless there were too many others. ``now``: a monotonic time, s."""
        told = self._told.get(what)
        if told is not None and now - told < self.told_s:
            self._told.move_to_end(what)
            return False
        if now - self._begin >= LINES_S:
            self._begin, self._written = now, 0
        if self._written >= self.lines:
            return False
        self._written += 1
        self._told[what] = now
        self._told.move_to_end(what)
        if len(self._told) > TOLD:
            self._told.popitem(last=False)
        return True
