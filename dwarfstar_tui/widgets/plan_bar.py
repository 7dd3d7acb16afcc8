"""The running plan as a bar: see :mod:`dwarfstar_tui.plan_geometry` for where things are and ``plan_lines`` for what.

It shows and nothing else; ``geometry`` says which layers are where, for whoever lets them be moved.
"""

from __future__ import annotations

from dwarfstar_tui import plan_lines
from dwarfstar_tui.plan_geometry import Geometry
from dwarfstar_tui.store import State
from dwarfstar_tui.text import Glyphs
from dwarfstar_tui.widgets.runs_view import RunsView

HEIGHT = 3


class PlanBar(RunsView):
    """Three lines, as wide as the widget, and of each pipeline a title more where there are several. Nothing where
    there is no plan."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self._geometry: Geometry | None = None

    @property
    def geometry(self) -> Geometry | None:
        """Of what is shown; None: there is no plan, or no room for it, or there are several pipelines."""
        return self._geometry

    def show(self, state: State, glyphs: Glyphs) -> None:
        width = self.size.width
        if state.status is None or not width:
            self._geometry = None
            self.set_lines([])
            return
        self._geometry = plan_lines.geometry(state.status, width)
        lines = plan_lines.titled(state.status, lambda chain: plan_lines.bar_lines(chain, state.rows, width, glyphs))
        self.styles.height = max(HEIGHT, len(lines))
        self.set_lines(lines)
