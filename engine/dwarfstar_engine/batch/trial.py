"""Is a help worth its cost? Tried by turns, with and without, by the rate that comes of it. Pure: time is passed in.

A draft model runs on somebody's processor, perhaps on one that a stage needs. What it gains and what it takes away show
in the tokens per second only. So windows with it and without it alternate, the better way is kept for a while, and then
it is asked again, as texts and machines change.
"""

from __future__ import annotations

WINDOW = 48  # tokens
ROUNDS = 2  # windows of each kind in a trial
HOLD = 4096  # tokens until the next trial
MIN_GAIN = 1.03


class Trial:
    """``using`` says whether to use the help now; ``drawn`` tells of tokens that came."""

    def __init__(self) -> None:
        self.using = True
        self._tokens = 0
        self._since: float | None = None
        self._windows = 0
        self._spent = {True: 0.0, False: 0.0}  # seconds of windows of each kind
        self._hold = 0

    def idle(self) -> None:
        """Nothing runs: the window that was begun does not count."""
        self._since, self._tokens = None, 0

    def drawn(self, tokens: int, now: float) -> None:
        """So many tokens came. ``now``: of any monotonic clock, in seconds."""
        if self._hold > 0:
            self._hold -= tokens
            return
        if self._since is None:
            self._since, self._tokens = now, 0
            return
        self._tokens += tokens
        if self._tokens < WINDOW:
            return
        self._spent[self.using] += (now - self._since) / self._tokens
        self._windows += 1
        self._since, self._tokens = None, 0
        self.using = not self.using
        if self._windows == 2 * ROUNDS:
            self.using = self._spent[False] > MIN_GAIN * self._spent[True]
            self._spent = {True: 0.0, False: 0.0}
            self._windows, self._hold = 0, HOLD
