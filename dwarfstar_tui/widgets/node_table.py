"""The machines, a line each: see :mod:`dwarfstar_tui.cluster_rows`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message

from dwarfstar_tui.cluster_rows import Moment, Runs, columns, heading, row_runs, second_runs
from dwarfstar_tui.store import NodeRow
from dwarfstar_tui.widgets.runs_view import RunsView

TALL_WIDTH = 76  # less has no room for what a machine is
TALL = 3  # lines of a machine where there is room for all: its row, what it is, a space


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
        self._at: int | None = None  # its place
        self._marks: frozenset[str] = frozenset()  # ids
        self._tall = 1  # lines of a machine

    def show(self, rows: Sequence[NodeRow], moment: Moment) -> None:
        self._rows = tuple(rows)
        self._marks &= {row.id for row in rows}  # what is not seen is not meant
        moment = replace(moment, marks=self._marks)
        shown = columns(self.scrollable_content_region.width)
        ids = [row.id for row in rows]
        if self._chosen not in ids:
            self._chosen = ids[min(self._at or 0, len(ids) - 1)] if ids else ""
        self._at = ids.index(self._chosen) if ids else None
        room = len(rows) * TALL - 1 <= self.size.height and self.size.width >= TALL_WIDTH
        self._tall = TALL if room else 1
        lines: list[Runs] = []
        for row in rows:
            lines.append(row_runs(row, shown, moment))
            if self._tall > 1:
                lines += [second_runs(row, self.scrollable_content_region.width, moment), ()]
        if lines and self._tall > 1:
            lines.pop()
        cursor = None if self._at is None or not self.has_focus else self._at * self._tall
        self.set_lines(lines, cursor)

    def heading(self, moment: Moment) -> str:
        return heading(columns(self.scrollable_content_region.width), moment.glyphs)

    @property
    def chosen(self) -> NodeRow | None:
        return next((row for row in self._rows if row.id == self._chosen), None)

    @property
    def marked(self) -> list[NodeRow]:
        return [row for row in self._rows if row.id in self._marks]

    def mark(self) -> None:
        """Mark the machine at the cursor, or take its mark; the cursor goes on."""
        if self._chosen:
            self._marks ^= {self._chosen}
            self.action_move(1)

    def unmark(self) -> None:
        self._marks = frozenset()

    def choose(self, index: int) -> None:
        if self._rows:
            self._at = max(0, min(index, len(self._rows) - 1))
            self._chosen = self._rows[self._at].id
            self.set_lines(self.lines, self._at * self._tall if self.has_focus else None)
            self.show_cursor()
            self.post_message(self.Moved())

    def action_move(self, by: int) -> None:
        self.choose((self._at or 0) + by)

    def action_open(self) -> None:
        self.post_message(self.Opened())

    def on_runs_view_pointed(self, event: RunsView.Pointed) -> None:
        event.stop()
        self.focus()
        self.choose(event.line // self._tall)
        if event.again:
            self.post_message(self.Opened())
