"""Lines of runs, drawn by ``render_line``: the one way figures get onto the screen.

Theory. A table of stock widgets costs a layout for each figure that changes. Here a line is a tuple of (text, role);
lines that are equal to what is shown are not drawn again, and a role is one style looked up once for each theme. So 64
machines four times a second cost a few hundredths of a core, and a terminal gets what has changed and no more.

A role is a variable of the theme, see ROLES. They are no component classes: Textual would work out each of those anew
for every widget and every change of size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.color import Color
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from dwarfstar_tui.cluster_rows import Runs

ROLES: dict[str, tuple[str, str]] = {  # role: variable of the theme, how it is written
    "plain": ("foreground", ""),
    "muted": ("ds-muted", ""),
    "name": ("foreground", "bold"),
    "heading": ("ds-muted", ""),
    "ok": ("ds-ok", ""),
    "late": ("ds-late", "bold"),
    "lost": ("ds-lost", "bold"),
    "gone": ("ds-muted", "dim"),
    "drained": ("accent", ""),
    "used": ("ds-used", ""),
    "planned": ("ds-planned", ""),
    "lent": ("ds-lent", ""),
    "rest": ("ds-lent", ""),
    "slowest": ("ds-late", "bold"),
    "spark": ("ds-spark", ""),
    "weights": ("ds-used", ""),
    "kv": ("ds-planned", ""),
    "compute": ("ds-spark", ""),
    "free": ("ds-lent", ""),
    "boundary": ("ds-muted", ""),
    "key": ("accent", "bold"),
    "brand": ("accent", "bold"),
    "tab": ("foreground", "bold reverse"),
    "badge": ("ds-late", "bold reverse"),
    "accent": ("accent", ""),
    "error": ("ds-lost", ""),
    "warning": ("ds-late", ""),
}


def differ_until(before: Runs, now: Runs) -> int:
    """The cell behind the last one in which two lines may differ: Textual writes a line from its beginning anyway."""
    at = last = 0
    for old, new in zip_longest(before, now, fillvalue=("", "")):
        width = cell_len(new[0])
        if width != cell_len(old[0]):
            return max(sum(cell_len(part) for part, _ in line) for line in (before, now))
        at += width
        if old != new:
            last = at
    return last


def merged(segments: Iterable[Segment]) -> list[Segment]:
    """With as few changes of style as will do: each costs some forty bytes on the way to the terminal.

    Spaces take the style before them, which only differs in what spaces do not show.
    """
    found: list[Segment] = []
    for segment in segments:
        last = found[-1] if found else None
        if last is not None and (segment.style == last.style or _only_background(segment, last)):
            found[-1] = Segment(last.text + segment.text, last.style)
        else:
            found.append(segment)
    return found


def _only_background(segment: Segment, last: Segment) -> bool:
    if segment.text.strip(" ") or segment.style is None or last.style is None:
        return False
    return segment.style.bgcolor == last.style.bgcolor and not (last.style.reverse or segment.style.reverse)


class RunsView(ScrollView, can_focus=False):
    """See the module. A cursor, where one is wanted, is a line number; None: there is none."""

    DEFAULT_CSS = """
    RunsView {
        background: transparent;
        scrollbar-size-vertical: 1;
        scrollbar-size-horizontal: 0;
        overflow-x: hidden;
    }
    """
    ALLOW_SELECT = False

    class Pointed(Message):
        """A line was clicked, at a cell of it. again: it had the cursor already."""

        def __init__(self, view: RunsView, line: int, x: int, *, again: bool) -> None:
            super().__init__()
            self.view, self.line, self.x, self.again = view, line, x, again

        @property
        def control(self) -> RunsView:
            return self.view

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id, classes=classes)
        self._lines: list[Runs] = []
        self._cursor: int | None = None
        self._styles: dict[str, Style] = {}
        self._base: Style | None = None
        self._variables: dict[str, str] = {}

    @property
    def lines(self) -> Sequence[Runs]:
        return self._lines

    @property
    def cursor(self) -> int | None:
        return self._cursor

    @property
    def text(self) -> str:
        """What is shown, without colours."""
        return "\n".join("".join(part for part, _ in line) for line in self._lines)

    def set_lines(self, lines: Sequence[Runs], cursor: int | None = None) -> None:
        """Show these; only lines that differ are drawn."""
        old, self._lines = self._lines, list(lines)
        moved, self._cursor = {self._cursor, cursor}, cursor
        if len(old) != len(lines):
            self.virtual_size = Size(self._width(), len(lines))
            self.refresh()
            return
        if self.virtual_size.width != self._width():
            self.virtual_size = Size(self._width(), len(lines))
        top = self.scroll_offset.y
        seen = range(top, min(len(lines), top + self.size.height))  # a long list may move as a whole
        changed = [
            Region(0, index - top, differ_until(old[index], lines[index]), 1)
            for index in seen
            if old[index] != lines[index]
        ]
        if changed:
            self.refresh(*changed)
        if len(moved) > 1:
            for line in moved:
                if line is not None:
                    self.refresh_line(line)

    def _width(self) -> int:
        return self.scrollable_content_region.width

    def show_cursor(self) -> None:
        """Scroll so that the line with the cursor is seen."""
        if self._cursor is None:
            return
        top, height = self.scroll_offset.y, self.scrollable_content_region.height
        if self._cursor < top:
            self.scroll_to(y=self._cursor, animate=False)
        elif self._cursor >= top + height > 0:
            self.scroll_to(y=self._cursor - height + 1, animate=False)

    def notify_style_update(self) -> None:
        self._base = None
        super().notify_style_update()

    def _background(self) -> Style:
        """What lines are drawn on. Worked out once for each theme, as Textual asks all ancestors; styles go with it."""
        variables = self.app.theme_variables
        if self._base is None or self._variables is not variables:
            self._base, self._variables, self._styles = self.rich_style, variables, {}
        return self._base

    def _style(self, role: str) -> Style:
        style = self._styles.get(role)
        if style is None:
            style = self._styles[role] = self._made(role, self._variables, self._background())
        return style

    def _made(self, role: str, variables: dict[str, str], base: Style) -> Style:
        if role == "cursor":  # a background only: what is under it keeps its colour
            return Style(bgcolor=Color.parse(variables["ds-cursor"]).rich_color)
        name, how = ROLES[role]
        return base + Style.parse(how) + Style(color=Color.parse(variables[name]).rich_color)

    def render_line(self, y: int) -> Strip:
        index = y + self.scroll_offset.y
        width, base = self.size.width, self._background()
        if not 0 <= index < len(self._lines):
            return Strip.blank(width, base)
        if index == self._cursor:
            cursor = self._style("cursor")
            segments = [Segment(part, self._style(role) + cursor) for part, role in self._lines[index]]
            return Strip(merged(segments)).adjust_cell_length(width, base + cursor)
        segments = [Segment(part, self._style(role)) for part, role in self._lines[index]]
        return Strip(merged(segments)).adjust_cell_length(width, base)

    async def _on_click(self, event: events.Click) -> None:
        line = event.y + self.scroll_offset.y
        if 0 <= line < len(self._lines):
            self.post_message(self.Pointed(self, line, round(event.x), again=line == self._cursor))
