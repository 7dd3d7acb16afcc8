"""What of a sequence is computed again after a loss, and by which stages. Pure.

Theory. A stage that lives keeps the cells of its slots, and of what it sent a record. The coordinator knows the tokens
of which results came; the rows of all but the last one went through every stage, as did the chunks of a prompt that
were answered. So a stage that can be cut to these needs nothing. One that cannot, because it is another process or was
in the middle of being brought back, gets its rows again from the record of the stage before it, or as tokens if it is
the first one; if that record is not whole, the stage before computes its rows again, too, and so on. What lies between
two stages that have theirs is a *run*.

A run computes the rows in the frames they came in, the prompt's as those of a prompt and the answer's as steps, so
every bit is as it was. Frames of steps overtake those of prompts inside a stage: so they come in two *waves*, the
second one when all of the first was answered.

Invariant. A slot is spoken of only while it is its sequence's own at every stage: from the first answer to a chunk of
its prompt on (``Scheduler.settled``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dwarfstar_engine.batch.chunks import LARGEST, next_chunk

RESENT_ROWS = LARGEST  # of a prompt that one frame asks a stage for: it is not longer on its way than a chunk would be
RESENT_STEPS = 16  # of an answer: a few streams' are on their way at a time, and a frame has a deadline
REPLAY_ROWS = 8  # of an answer, in a frame: stages work at the same time, and others wait no longer for each

Run = tuple[int, int]  # stages [begin, end)


@dataclass(frozen=True, slots=True)
class Cells:
    """What a stage has of a slot. held: positions. floor: it can be cut to so many at least, or to none. recorded:
    positions of which it has what it sent."""

    held: int = 0
    floor: int = 0
    recorded: int = 0

    def reach(self, positions: int) -> bool:
        """Whether the slot can go on from there."""
        return positions == self.held or self.floor <= positions < self.held


NO_CELLS = Cells()


@dataclass(frozen=True, slots=True)
class Kept:
    """A sequence's slot, the rows with which it goes on there, the runs that are missing of them, and what the slot can
    be cut to."""

    slot: int
    positions: int
    runs: tuple[Run, ...]
    floor: int = 0


def missing(positions: int, stages: Sequence[Cells]) -> tuple[Run, ...]:
    """The runs of stages that are to compute ``positions`` rows of a slot again, in the order of the ring."""
    again = [not cells.reach(positions) for cells in stages]
    for stage in range(len(stages) - 1, 0, -1):
        if again[stage] and stages[stage - 1].recorded < positions:
            again[stage - 1] = True
    runs: list[Run] = []
    for stage, missed in enumerate(again):
        if not missed:
            continue
        if runs and runs[-1][1] == stage:
            runs[-1] = (runs[-1][0], stage + 1)
        else:
            runs.append((stage, stage + 1))
    return tuple(runs)


def kept(slot: int, positions: int, stages: Sequence[Cells]) -> Kept | None:
    """What is kept of a sequence; None if it must go through all stages again, which needs no slot of before."""
    runs = missing(positions, stages)
    if runs == ((0, len(stages)),):
        return None
    return Kept(slot, positions, runs, max(cells.floor for cells in stages))


@dataclass(frozen=True, slots=True)
class Part:
    """A frame that brings a sequence back. rows from ``start`` on are for the first ``stages``; resends: (begin, end,
    stage, until), as ``wire.ops.Resend`` has them. first: of all its parts."""

    prompt: bool
    start: int = 0
    rows: int = 0
    stages: int = 0
    resends: tuple[tuple[int, int, int, int], ...] = ()
    first: bool = False


class Restore:
    """The parts of one sequence of which ``positions`` rows were through, ``prompt`` of them its prompt's."""

    def __init__(self, runs: Sequence[Run], prompt: int, positions: int, chunk: int) -> None:
        head = runs[0][1] if runs and runs[0][0] == 0 else 0
        gaps = [run for run in runs if run[0] > 0]
        parts: list[Part] = []
        start = 0
        while head and start < prompt:
            rows = next_chunk(start, prompt, chunk)
            parts.append(Part(True, start, rows, head))
            start += rows
        parts += _asked(True, 0, prompt, gaps)
        steps: list[Part] = []
        if head:
            starts = range(prompt, positions, REPLAY_ROWS)
            steps += [Part(False, at, min(REPLAY_ROWS, positions - at), head) for at in starts]
        steps += _asked(False, prompt, positions, gaps)
        waves = [deque(wave) for wave in (parts, steps) if wave] or [deque([Part(False)])]
        one = waves[0].popleft()
        waves[0].appendleft(Part(one.prompt, one.start, one.rows, one.stages, one.resends, first=True))
        self._waves = deque(waves)
        self.in_flight = 0

    @property
    def next(self) -> Part | None:
        """What is to be sent now; None: nothing before answers came."""
        return self._waves[0][0] if self._waves and self._waves[0] else None

    @property
    def over(self) -> bool:
        return not self._waves

    def sent(self) -> None:
        self._waves[0].popleft()
        self.in_flight += 1

    def answered(self) -> None:
        self.in_flight -= 1
        if not self.in_flight and self._waves and not self._waves[0]:
            self._waves.popleft()


def _asked(prompt: bool, begin: int, end: int, gaps: Sequence[Run]) -> list[Part]:
    size = RESENT_ROWS if prompt else RESENT_STEPS
    return [
        Part(
            prompt,
            resends=tuple((at, min(at + size, end), first - 1, until) for first, until in gaps),
        )
        for at in range(begin, end, size)
        if gaps
    ]
