"""Events: what happened in the cluster, and why; it follows what comes unless one looks back."""

from __future__ import annotations

from datetime import tzinfo
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical

from dwarfstar_engine.views import EventView
from dwarfstar_tui import text
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.event_lines import event_line, wanted_events
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.store import State
from dwarfstar_tui.widgets.runs_view import RunsView


class Timeline(RunsView, can_focus=True):
    """Events by line. At the end it follows; a step up stops that, the end takes it up again."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "up", show=False, id="timeline.up"),
        Binding("down,j", "move(1)", "down", show=False, id="timeline.down"),
        Binding("pageup", "move(-10)", "page up", show=False, id="timeline.page-up"),
        Binding("pagedown", "move(10)", "page down", show=False, id="timeline.page-down"),
        Binding("home,g", "move(-99999)", "first", show=False, id="timeline.first"),
        Binding("end,G", "move(99999)", "follow", id="timeline.end"),
    ]
    HELP = "What happened, newest last. Up and down read single events in full below; end follows again."

    def __init__(self) -> None:
        super().__init__(id="timeline")
        self.events: tuple[EventView, ...] = ()
        self.number: int | None = None  # of the event with the cursor; None: the newest, whatever it is
        self._drawn: dict[int, Runs] = {}
        self._drawn_for: tuple[object, ...] = ()

    def show(self, events: tuple[EventView, ...], zone: tzinfo | None, look: tuple[object, ...]) -> None:
        """look: what lines depend on beside their events; when it changes they are all made anew."""
        self.events = events
        width = self.scrollable_content_region.width
        if (width, *look) != self._drawn_for:
            self._drawn, self._drawn_for = {}, (width, *look)
        glyphs = look[0]
        assert isinstance(glyphs, text.Glyphs)
        drawn = {
            event.number: self._drawn.get(event.number) or event_line(event, width, zone, glyphs) for event in events
        }
        self._drawn = drawn
        self.set_lines(list(drawn.values()), self._index())
        if self.number is None:
            self.follow()

    def follow(self) -> None:
        """Scroll to the newest. Not with ``scroll_end``, which counts on a height that may not be known yet."""
        height = self.scrollable_content_region.height
        if height:
            self.scroll_to(y=max(0, len(self.events) - height), animate=False, immediate=True)

    def _index(self) -> int | None:
        if not self.events:
            return None
        if self.number is None:
            return len(self.events) - 1
        return next((i for i, event in enumerate(self.events) if event.number >= self.number), len(self.events) - 1)

    @property
    def chosen(self) -> EventView | None:
        index = self._index()
        return None if index is None else self.events[index]

    def action_move(self, by: int) -> None:
        self.choose((self._index() or 0) + by)

    def choose(self, index: int) -> None:
        if not self.events:
            return
        last = len(self.events) - 1
        self.number = None if index >= last else self.events[max(0, index)].number
        self.set_lines(self.lines, self._index())
        self.show_cursor()
        self.post_message(self.Pointed(self, self._index() or 0, 0, again=False))


class EventsScreen(AppScreen):
    NAME = "events"
    FILTERS = True
    LESSON = (
        "What happened in the cluster, and why, oldest first. ● good news, ◐ worth knowing, ○ trouble. The list "
        "follows what comes until you go up; end follows again. Below the list is the chosen event in full."
    )

    zone: ClassVar[tzinfo | None] = None  # the local one

    def body(self) -> ComposeResult:
        with Vertical(id="events-body"):
            yield Timeline()
            yield RunsView(id="event")

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one(Timeline).focus()

    def main_focus(self) -> None:
        self.query_one(Timeline).focus()

    def present(self, state: State, now: float) -> None:
        timeline = self.query_one(Timeline)
        events = tuple(wanted_events(state.events, self.wanted))
        timeline.show(events, self.zone, (self.host.glyphs, self.wanted))
        self._present_event(state)

    def _present_event(self, state: State) -> None:
        view, timeline = self.query_one("#event", RunsView), self.query_one(Timeline)
        event, width = timeline.chosen, max(20, self.size.width - 4)
        lines: list[Runs] = []
        if event is None:
            words = "no event matches the filter" if state.events else "nothing has happened yet"
            lines.append(((words, "muted"),))
        else:
            following = "following" if timeline.number is None else "end follows again"
            lines.append(
                ((f"{event.number}  {event.kind}", "name"), (f"  {text.clean(event.node)}  ", "accent"),
                 (following, "muted"))
            )  # fmt: skip
            lines += [((line, "plain"),) for line in text.wrapped(text.clean(event.cause), width)[:4]]
            details = "  ".join(f"{key} {value}" for key, value in event.details.items())
            lines += [((line, "muted"),) for line in text.wrapped(text.clean(details), width)[:2]]
        if state.missed:
            lines.append(((f"{state.missed} older events are not kept", "muted"),))
        view.set_lines(lines)

    @on(Timeline.Pointed)
    def _pointed(self, event: Timeline.Pointed) -> None:
        timeline = self.query_one(Timeline)
        timeline.focus()
        last = len(timeline.events) - 1
        timeline.number = None if event.line >= last else timeline.events[event.line].number
        self.show(self.host.state)

    def as_toml(self) -> dict[str, object] | None:
        event = self.query_one(Timeline).chosen
        return None if event is None else {"event": event.model_dump()}
