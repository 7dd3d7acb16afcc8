"""The header of every screen: see :mod:`dwarfstar_tui.header_lines`."""

from __future__ import annotations

from textual import events
from textual.message import Message

from dwarfstar_tui.header_lines import Badges, status_line, tab_line
from dwarfstar_tui.store import State
from dwarfstar_tui.text import Glyphs
from dwarfstar_tui.widgets.runs_view import RunsView


class HeaderBar(RunsView):
    """Two lines. A click on a screen's name goes there."""

    class Chosen(Message):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    def __init__(self, active: str) -> None:
        super().__init__()
        self._active = active
        self._places: tuple[tuple[int, int, str], ...] = ()

    def show(self, state: State, badges: Badges, now: float, glyphs: Glyphs) -> None:
        width = self.size.width
        tabs, self._places = tab_line(self._active, width, glyphs)
        self.set_lines([status_line(state, badges, now, width, glyphs), tabs])

    async def _on_click(self, event: events.Click) -> None:
        event.stop()
        for begin, end, name in self._places:
            if event.y == 1 and begin <= event.x < end:
                self.post_message(self.Chosen(name))
