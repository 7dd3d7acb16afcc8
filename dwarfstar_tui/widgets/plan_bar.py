"""A plan as a bar: see :mod:`dwarfstar_tui.plan_geometry` for where things are and ``plan_lines`` for what.

Where it is editable a boundary is taken hold of with the mouse. The bar says where it was dragged to, in layers; what
becomes of that is shown to it again, so it keeps nothing but what is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual import events
from textual.message import Message

from dwarfstar_engine.views import StatusView
from dwarfstar_tui import plan_lines
from dwarfstar_tui.plan_geometry import Geometry
from dwarfstar_tui.plan_lines import Shown
from dwarfstar_tui.store import NodeRow
from dwarfstar_tui.text import Glyphs
from dwarfstar_tui.widgets.runs_view import RunsView

HEIGHT = 3
NEAR = 1  # cells beside a boundary that take hold of it, too


@dataclass(frozen=True, slots=True)
class Hold:
    """boundary: that is held, which was at ``layer`` when the mouse was at ``x`` of the screen."""

    boundary: int
    layer: int
    x: int
    layers_per_cell: float


class PlanBar(RunsView):
    """Three lines, as wide as the widget; none when there is no plan, or no room. Of several pipelines each has three,
    under its title, and nothing can be moved."""

    class Chosen(Message):
        """A boundary was taken hold of, or a stage clicked; the other is None."""

        def __init__(self, *, boundary: int | None = None, stage: int | None = None) -> None:
            super().__init__()
            self.boundary, self.stage = boundary, stage

    class Dragged(Message):
        """A boundary that is held is wanted at a layer. first: since it was taken hold of."""

        def __init__(self, boundary: int, layer: int, *, first: bool) -> None:
            super().__init__()
            self.boundary, self.layer, self.first = boundary, layer, first

    def __init__(self, *, id: str | None = None, editable: bool = False) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self._editable = editable
        self._geometry: Geometry | None = None
        self._hold: Hold | None = None
        self._told: int | None = None  # the layer that was told last of what is held

    @property
    def geometry(self) -> Geometry | None:
        """Of what is shown; None: there is no plan, or no room for it, or there are several pipelines."""
        return self._geometry

    def show(self, stages: Sequence[Shown], glyphs: Glyphs, chosen: int | None = None) -> None:
        width = self.size.width
        self._geometry = plan_lines.geometry([stage.layers for stage in stages], width) if width else None
        self.styles.height = HEIGHT
        self.set_lines(plan_lines.bar_lines(stages, width, glyphs, chosen) if width else [])

    def show_several(self, view: StatusView, rows: Sequence[NodeRow], glyphs: Glyphs) -> None:
        """All pipelines, one below the other."""
        width, self._geometry = self.size.width, None
        lines = plan_lines.titled(
            view, lambda chain: plan_lines.bar_lines(plan_lines.of_status(chain, rows), width, glyphs, None)
        )
        self.display = True  # or it would never have a width
        self.styles.height = max(HEIGHT, len(lines))
        self.set_lines(lines if width else [])

    def _near(self, cell: int) -> int | None:
        """The boundary at a cell, or beside it."""
        plan = self._geometry
        if not self._editable or plan is None:
            return None
        places = [plan.boundary_at(cell + by) for by in sorted(range(-NEAR, NEAR + 1), key=abs)]
        return next((place for place in places if place is not None), None)

    def on_mouse_down(self, event: events.MouseDown) -> None:
        plan, boundary = self._geometry, self._near(event.x)
        if not self._editable or plan is None:
            return
        if boundary is None:
            self.post_message(self.Chosen(stage=plan.stage_at(event.x)))
            return
        self._hold = Hold(boundary, plan.spans[boundary].last, round(event.screen_x), plan.layers_per_cell())
        self._told = None
        self.capture_mouse()
        self.post_message(self.Chosen(boundary=boundary))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        hold = self._hold
        if hold is None:
            self.styles.pointer = "ew-resize" if self._near(event.x) is not None else "default"
            return
        layer = hold.layer + round((event.screen_x - hold.x) * hold.layers_per_cell)
        if layer != (hold.layer if self._told is None else self._told):
            self.post_message(self.Dragged(hold.boundary, layer, first=self._told is None))
            self._told = layer

    def on_mouse_up(self) -> None:
        if self._hold is not None:
            self._hold = None  # now: the next movement may come before the release is told
            self.release_mouse()

    def on_mouse_release(self) -> None:
        self._hold = None
