"""KV slots: who has which, what each holds, and which one a new prompt is best put into. Pure.

Theory. A slot keeps the cells of its last sequence when that is over. A new prompt that begins alike goes on from
there: in the same slot, or in another one after the cells were copied, so that a system prompt is computed once
although many use it. The slot that was not used for the longest time is given away first.

With sliding attention the cells outside of the window are lost when stages move what a slot holds, as they do when a
prompt goes on in it. Then a slot has a floor, and is not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dwarfstar_engine.batch.chunks import STEP, WIDE, chunk_start, common_prefix, next_chunk

MIN_COPY = 32  # rows; copying fewer costs the stages about what computing them does
KEEP = 0.5  # a prompt takes a slot as it is only if it begins with so much of what is there; else it copies


@dataclass(slots=True)
class Slot:
    """tokens: what it holds, computed. wide: how many of them in wide blocks (``chunks``). owner: -1 when free."""

    number: int
    tokens: list[int] = field(default_factory=list)
    wide: int = 0
    owner: int = -1
    unread: list[int] = field(default_factory=list)  # what follows ``tokens``, cut away to be read again
    floor: int = 0  # rows it can be cut to at least, but for none
    used: int = 0  # when it was last given away or back, by a count


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt goes. ``keep`` rows are there, after those of ``copy_from`` were copied (-1: they are there)."""

    slot: int
    keep: int
    copy_from: int = -1


class Slots:
    """``keep(prompt, common, wide)`` says how many of the common rows may be kept: ``chunks.reusable``."""

    def __init__(
        self, count: int, keep: Callable[[int, int, int], int], *, cache: bool = True, windowed: bool = False
    ) -> None:
        self.slots = [Slot(number) for number in range(count)]
        self._keep, self._cache, self._windowed = keep, cache, windowed
        self._clock = 0

    @property
    def free(self) -> int:
        return sum(slot.owner < 0 for slot in self.slots)

    def cached(self, prompt: list[int]) -> int:
        """Rows of a prompt that some slot holds."""
        return max(common_prefix(slot.tokens, prompt) for slot in self.slots) if self._cache else 0

    def find(self, prompt: list[int], *, cache: bool = True) -> Place:
        """The place for a prompt. There must be a free slot."""
        oldest = min((s for s in self.slots if s.owner < 0), key=lambda s: (len(s.tokens) > 0, s.used))
        if not (cache and self._cache):
            return Place(oldest.number, 0)
        best, kept, common = oldest, 0, 0
        for slot in self.slots:
            shared = common_prefix(slot.tokens, prompt)
            keep = self._keep(len(prompt), shared, slot.wide) if shared else 0
            if keep < slot.floor or (self._windowed and slot.owner >= 0):
                continue
            if (keep, slot.owner < 0) > (kept, best.owner < 0):
                best, kept, common = slot, keep, shared
        if not kept:
            return Place(oldest.number, 0)
        spare = best.owner < 0 and (common >= KEEP * len(best.tokens) or oldest is best)
        if spare:
            return Place(best.number, kept)
        if kept < MIN_COPY or self._windowed:
            return Place(oldest.number, 0)
        return Place(oldest.number, kept, best.number)

    def take(self, place: Place, owner: int, prompt: list[int]) -> Slot:
        """Give the slot of ``place`` to ``owner``: it holds what is kept of the prompt."""
        slot = self.slots[place.slot]
        assert slot.owner < 0
        if place.copy_from >= 0:
            slot.wide = self.slots[place.copy_from].wide
        slot.tokens = prompt[: place.keep]
        slot.wide = min(slot.wide, place.keep)
        slot.floor = place.keep if self._windowed else 0
        slot.unread = []
        slot.owner = owner
        self._touch(slot)
        return slot

    def claim(self, number: int, owner: int, floor: int) -> Slot:
        """Give a slot to ``owner`` as it was left by another pipeline. Nobody may copy from it before that is whole."""
        slot = self.slots[number]
        assert slot.owner < 0
        slot.owner, slot.floor = owner, floor
        self._touch(slot)
        return slot

    def unread(self, chunk: int) -> tuple[int, int, list[int]] | None:
        """A chunk of a free slot's tokens that no prompt could keep as they are: slot, position and the tokens.

        They are taken to be read again from there on. None if there are too few for a wide chunk everywhere.
        """
        if not self._cache or chunk < WIDE:
            return None
        for slot in sorted(self.slots, key=lambda s: -s.used):
            if slot.owner >= 0:
                continue
            text = slot.tokens + slot.unread
            if len(text) < WIDE or len(text) - slot.wide < STEP:
                continue
            start = chunk_start(slot.wide, len(text))
            rows = next_chunk(start, len(text), WIDE)
            if rows < WIDE:
                continue  # a short last block: no prompt that goes on would compute it so
            slot.tokens, slot.unread = text[: start + rows], text[start + rows :]
            slot.wide = start + rows
            return slot.number, start, slot.tokens[start:]
        return None

    def set_aside(self, slot: Slot | None, rows: int) -> None:
        """A prompt of which so many rows were read will go on later: its cells are moved."""
        if slot is not None and self._windowed:
            slot.floor = rows

    def give_back(self, slot: Slot) -> None:
        slot.owner = -1
        if not self._cache:
            slot.tokens, slot.wide = [], 0
        self._touch(slot)

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock
