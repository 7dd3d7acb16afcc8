"""Where the stages of a plan lie in a bar: layers to cells, and cells back to layers. Pure.

The bar is a line of ``width`` cells for all layers. A boundary between two stages is a cell of its own, so that it can
be seen, and taken hold of. Boundaries derive from layers at each width; nothing keeps cells. Each stage has at least
MIN_CELLS, taken from the widest, so that a stage of one layer in a hundred is still there.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

MIN_CELLS = 1


@dataclass(frozen=True, slots=True)
class Span:
    """Cells [begin, end) of one stage, and its layers [first, last)."""

    begin: int
    end: int
    first: int
    last: int

    @property
    def width(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Geometry:
    """spans: in order, a cell between each two for the boundary. width: of the bar."""

    width: int
    layers: int
    spans: tuple[Span, ...]

    def boundary_cell(self, index: int) -> int:
        """The cell of the boundary behind stage ``index``."""
        return self.spans[index].end

    def stage_at(self, cell: int) -> int:
        """The stage at a cell; a boundary belongs to the stage before it."""
        begins = [span.begin for span in self.spans]
        return max(0, bisect_right(begins, cell) - 1)

    def boundary_at(self, cell: int) -> int | None:
        """The boundary in this cell."""
        return next((index for index, span in enumerate(self.spans[:-1]) if span.end == cell), None)

    def layers_per_cell(self) -> float:
        return self.layers / max(1, self.width - len(self.spans) + 1)


def lay_out(stages: Sequence[tuple[int, int]], width: int) -> Geometry:
    """The geometry of stages [first, last) that follow each other. ``width`` must have room for MIN_CELLS of each."""
    assert stages and all(first < last for first, last in stages)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(stages))
    room = width - (len(stages) - 1)
    assert room >= MIN_CELLS * len(stages), (width, len(stages))
    cells = _shared_out([last - first for first, last in stages], room)
    spans, at = [], 0
    for (first, last), count in zip(stages, cells, strict=True):
        spans.append(Span(at, at + count, first, last))
        at += count + 1
    return Geometry(width, stages[-1][1] - stages[0][0], tuple(spans))


def _shared_out(counts: Sequence[int], room: int) -> list[int]:
    """``room`` cells in proportion to ``counts``, by largest remainder, none below MIN_CELLS."""
    total = sum(counts)
    exact = [count * room / total for count in counts]
    cells = [max(MIN_CELLS, int(share)) for share in exact]
    by_rest = sorted(range(len(counts)), key=lambda index: cells[index] - exact[index])
    for index in by_rest:
        if sum(cells) >= room:
            break
        cells[index] += 1
    while sum(cells) > room:
        cells[max(range(len(cells)), key=lambda index: (cells[index], index))] -= 1
    return cells


def fits(stages: int, width: int) -> bool:
    """Whether a bar of ``width`` can show so many stages at all."""
    return width >= stages * MIN_CELLS + stages - 1
