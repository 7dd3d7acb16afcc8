"""How many guesses are worth sending: the controller of speculative decoding.

Theory. A sequence that decodes waits for its last row to come round the ring. Guesses of the tokens to come can travel
with it: a right one saves a round, a wrong one costs the time its row took, never a token. Guesses may share the
frame of the real row, where they cost what more rows cost, or follow in frames of their own, where they cost nothing
as long as stages would have been idle. :class:`Depth` says how many, and how many rows make a frame.

What a choice is worth follows from the chance p that a guess is right. Let frames have m rows and F of them be in
flight for each of R running sequences, N in all at most; L = latency(m), c = cost(m). The ring returns a frame every
max(c, L ÷ N), so one comes back after T = max(L, R·F·c, R·F·L ÷ N), and one of each sequence every T ÷ F. A run of
right guesses ends at each token with probability 1 - p, and the next run begins when the row that ended it is back.
That makes, for a token,

    (1 - p) · (T + T ÷ F · q ÷ (1 - q))        with q = p^m,

which is T without guesses, T ÷ (F·m) with right ones only, and T · (1 - p) ÷ (1 - p^m) for one frame at a time. Rows
without guesses may go on by themselves, which saves a part of L. Frames of more rows slow down all others: frames pass
stages in order, so all queue behind the widest (simulated: sequences that widen their frames each for its own good lost
up to 20 % together). What others then take for a token, T if they guess nothing, counts as much as the own gain. The
least mean is chosen, if it wins enough over no guesses.

p is a decaying mean over the sequence's guesses. It begins with what guesses were worth in the pipeline lately, so
that a hundred short requests do not each find out that guessing fails. When no choice wins, a sequence makes none for
some tokens, then a small try; each try that fails doubles the pause. So what is lost on texts that cannot be guessed
is a shrinking share.

Pure: costs are given, time is counted in tokens. One :class:`Speculation` for a pipeline, an :class:`Acceptance` for
each sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

Mode = Literal["auto", "on", "off"]

MAX_DEPTH = 16  # guesses of one sequence in flight: so many in a row are right on copied text only
PRIOR = 0.5  # chance given to the first guesses of a pipeline
MAX_CHANCE = 0.98  # believed at most: the formula divides by what is missing to 1
PRIOR_GUESSES = 2  # that the prior counts for: a few failures bring a fair chance down to a poor one
WEIGHT = 1 / 8  # least weight of one guess in its sequence's mean: less would follow the text too slowly
PIPELINE_WEIGHT = 1 / 32  # of one guess in what new sequences begin with
MIN_GAIN = 1.08  # predicted, below which guessing is not worth the errors of the prediction
FIRST_PAUSE, MAX_PAUSE = 16, 512  # tokens without guesses after a try that failed: doubled from the one to the other
TRY_DEPTH, TRY_CHANCE = 2, 0.7  # guesses of a try, and the chance assumed: where even that wins nothing, none is made
LEVELS = 16  # steps in which chances are told apart, so that choices can be kept
MAX_CHOICES = 4096  # choices kept; beyond it they are computed anew


class Costs(Protocol):
    """What frames cost, in ms, as measured. Stages that share a machine count as one: neither is idle for the other."""

    def cost(self, rows: int) -> float:
        """On the slowest stage: a ring full of such frames returns one in so many ms. Must be above 0."""
        ...

    def latency(self, rows: int) -> float:
        """From sending a frame into an empty ring to its result."""
        ...

    @property
    def saved(self) -> float:
        """Of that, what a row does without that goes on by itself, as only rows without guesses may."""
        ...


@dataclass(frozen=True, slots=True)
class Depth:
    """Guesses to have in flight beyond the last known token, and rows of a frame.

    The frame with the known token's row holds ``rows`` - 1 guesses, those behind it ``rows`` each.
    """

    guesses: int = 0
    rows: int = 1


NONE = Depth()


@dataclass(slots=True)
class Acceptance:
    """How guesses of one sequence fared. chance: that the next is right. pause: tokens until the next try."""

    chance: float
    judged: int = 0
    pause: int = 0
    next_pause: int = FIRST_PAUSE
    trying: bool = False


class Speculation:
    """The guesses of one pipeline. ``on`` sends the best number even where none is best; ``off`` sends none."""

    def __init__(self, mode: Mode, costs: Costs) -> None:
        self.mode = mode
        self._costs = costs
        self._prior = PRIOR
        self._choices: dict[tuple[int, int, int, int], Depth] = {}

    def measured(self, costs: Costs) -> None:
        """Costs are now known to be these."""
        self._costs = costs
        self._choices.clear()

    def begin(self) -> Acceptance:
        """A new sequence. Where guesses failed lately, its first try comes after a pause."""
        return Acceptance(self._prior, pause=0 if self._prior >= PRIOR / 2 else FIRST_PAUSE)

    def depth(self, state: Acceptance, running: int, lanes: int, available: int) -> Depth:
        """What to send for a sequence now.

        running: sequences that decode, this one included. lanes: frames that may be in flight, of all sequences.
        available: guesses at hand.
        """
        assert running > 0 and lanes > 0
        available = min(available, MAX_DEPTH)
        if self.mode == "off" or available <= 0:
            return NONE
        if self.mode == "on":
            return self._choice(max(state.chance, PRIOR), running, lanes, available)
        best = self._choice(state.chance, running, lanes, available)
        if best is NONE and state.pause == 0:
            best = self._choice(TRY_CHANCE, running, lanes, min(available, TRY_DEPTH))
            state.trying = best is not NONE
        return best

    def record(self, state: Acceptance, proposed: int, accepted: int) -> None:
        """A frame's result is known: of the guesses it judged, the first ``accepted`` were right.

        To be called for frames that judged none too, with 0 and 0: they let pauses pass. Better, where guesses cost
        nothing to make: with 1 and whether the guess at hand, which was not sent, would have been right.
        """
        assert 0 <= accepted <= proposed
        failed = accepted < proposed  # those behind the first wrong one were not judged
        for right in [1.0] * accepted + [0.0] * failed:
            state.judged += 1
            state.chance += max(WEIGHT, 1 / (state.judged + PRIOR_GUESSES)) * (right - state.chance)
            self._prior += PIPELINE_WEIGHT * (right - self._prior)
        if accepted:
            state.next_pause = FIRST_PAUSE
        if failed and state.trying:
            state.trying = False
            state.pause = state.next_pause
            state.next_pause = min(2 * state.next_pause, MAX_PAUSE)
        else:
            state.pause = max(0, state.pause - accepted - 1)

    def _choice(self, chance: float, running: int, lanes: int, available: int) -> Depth:
        key = (int(chance * LEVELS), running, lanes, available)
        if key not in self._choices:
            if len(self._choices) >= MAX_CHOICES:
                self._choices.clear()
            self._choices[key] = self._best(min(key[0] / LEVELS, MAX_CHANCE), running, lanes, available)
        return self._choices[key]

    def _best(self, chance: float, running: int, lanes: int, available: int) -> Depth:
        best, least = NONE, math.inf if self.mode == "on" else self._token_ms(chance, running, lanes, 1, 1) / MIN_GAIN
        for frames in range(1, max(1, lanes // running) + 1):
            for rows in range(1, (available + 1) // frames + 1):
                if frames * rows > 1 and (time := self._token_ms(chance, running, lanes, frames, rows)) < least:
                    best, least = Depth(frames * rows - 1, rows), time
        return best

    def _token_ms(self, chance: float, running: int, lanes: int, frames: int, rows: int) -> float:
        """Time between tokens of a sequence, a mean over all that run, as the module's head derives it."""
        cost, latency = self._costs.cost(rows), self._costs.latency(rows)
        if frames * rows == 1:
            latency -= self._costs.saved
        round_ms = max(latency, running * frames * max(cost, latency / lanes))
        right = chance**rows
        own_ms = (1 - chance) * round_ms * (1 + right / (1 - right) / frames)
        others_ms = own_ms if rows == 1 else round_ms
        return running / (1 / own_ms + (running - 1) / others_ms)
