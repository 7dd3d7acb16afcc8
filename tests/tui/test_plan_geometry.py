"""Layers to cells and back."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from dwarfstar_tui.plan_geometry import MIN_CELLS, fits, lay_out


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[int, int]]:
    counts = draw(st.lists(st.integers(1, 100), min_size=1, max_size=12))
    stages, at = [], 0
    for count in counts:
        stages.append((at, at + count))
        at += count
    return stages


@given(plans(), st.integers(20, 220))
def test_spans_fill_the_bar_with_a_cell_for_each_boundary(stages: list[tuple[int, int]], width: int) -> None:
    assume(fits(len(stages), width))
    plan = lay_out(stages, width)
    assert plan.spans[0].begin == 0
    assert plan.spans[-1].end == width
    assert all(right.begin == left.end + 1 for left, right in zip(plan.spans, plan.spans[1:], strict=False))
    assert all(span.width >= MIN_CELLS for span in plan.spans)


@given(plans(), st.integers(40, 220))
def test_every_cell_is_a_stage_or_a_boundary(stages: list[tuple[int, int]], width: int) -> None:
    assume(fits(len(stages), width))
    plan = lay_out(stages, width)
    for cell in range(width):
        boundary = plan.boundary_at(cell)
        span = plan.spans[plan.stage_at(cell)]
        assert (boundary is not None) == (cell == span.end)
        if boundary is not None:
            assert plan.boundary_cell(boundary) == cell


@given(plans(), st.integers(60, 220))
def test_a_stage_with_more_layers_is_never_narrower(stages: list[tuple[int, int]], width: int) -> None:
    assume(fits(len(stages), width))
    spans = lay_out(stages, width).spans
    for left in spans:
        for right in spans:
            if left.last - left.first > right.last - right.first:
                assert left.width >= right.width - 1


def test_equal_stages_are_equal() -> None:
    assert [span.width for span in lay_out([(0, 10), (10, 20)], 41).spans] == [20, 20]
