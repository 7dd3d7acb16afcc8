"""The machines, a line each: see :mod:`dwarfstar_tui.cluster_rows`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message

from dwarfstar_tui.cluster_rows import Moment, columns, heading, row_runs
from dwarfstar_tui.store import NodeRow
from dwarfstar_tui.widgets.runs_view import RunsView


class NodeTable(RunsView, can_focus=True):
    """The cursor stays with its machine when others come and go."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "up", show=False, id="table.up"),
        Binding("down,j", "move(1)", "down", show=False, id="table.down"),
        Binding("home,g", "move(-9999)", "first", show=False, id="table.first"),
        Binding("end,G", "move(9999)", "last", show=False, id="table.last"),
        Binding("pageup", "move(-10)", "page up", show=False, id="table.page-up"),
        Binding("pagedown", "move(10)", "page down", show=False, id="table.page-down"),
        Binding("enter", "open", "details", id="table.open"),
    ]
    HELP = "The machines of the cluster. Up and down choose one; its details are in the pane beside or below."

    class Moved(Message):
        """Another machine has the cursor."""

    class Opened(Message):
        """Its details are wanted, or not any more."""

    def __init__(self) -> None:
        super().__init__(id="nodes")
        self._rows: tuple[NodeRow, ...] = ()
        self._chosen = ""  # id

    def show(self, rows: Sequence[NodeRow], moment: Moment) -> None:
        self._rows = tuple(rows)
        shown = columns(self.scrollable_content_region.width)
        ids = [row.id for row in rows]
        if self._chosen not in ids:
            self._chosen = ids[min(self.cursor or 0, len(ids) - 1)] if ids else ""
        cursor = ids.index(self._chosen) if ids else None
        self.set_lines([row_runs(row, shown, moment) for row in rows], cursor if self.has_focus else None)
        self._at = cursor

    _at: int | None = None

    def heading(self, moment: Moment) -> str:
        return heading(columns(self.scrollable_content_region.width), moment.glyphs)

    @property
    def chosen(self) -> NodeRow | None:
        return next((row for row in self._rows if row.id == self._chosen), None)

    def choose(self, index: int) -> None:
        if self._rows:
            self._chosen = self._rows[max(0, min(index, len(self._rows) - 1))].id
            self.post_message(self.Moved())

    def action_move(self, by: int) -> None:
        self.choose((self._at or 0) + by)

    def action_open(self) -> None:
        self.post_message(self.Opened())

    def on_runs_view_pointed(self, event: RunsView.Pointed) -> None:
        event.stop()
        self.focus()
        self.choose(event.line)
        if event.again:
            self.post_message(self.Opened())
