"""What the five screens have in common: header, body, footer, a filter, and how they are shown a state."""

from __future__ import annotations

from typing import ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer

from dwarfstar_tui import text
from dwarfstar_tui.header_lines import Badges
from dwarfstar_tui.host import Host
from dwarfstar_tui.store import State
from dwarfstar_tui.updates import Update
from dwarfstar_tui.widgets.filter_input import FilterInput
from dwarfstar_tui.widgets.header_bar import HeaderBar


class AppScreen(Screen[None]):
    """A screen is shown the state whenever it may have changed, and while it is the one that is seen."""

    NAME: ClassVar[str] = ""
    LESSON: ClassVar[str] = ""
    """What `?` says about the screen."""
    FILTERS: ClassVar[bool] = False
    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (60, "-narrow"), (80, "-medium"), (120, "-wide"), (150, "-huge")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (24, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [Binding("slash", "filter", "filter", id="screen.filter", show=False)]

    def compose(self) -> ComposeResult:
        yield HeaderBar(self.NAME)
        yield from self.body()
        if self.FILTERS:
            yield FilterInput()
        yield Footer(show_command_palette=False)

    def body(self) -> ComposeResult:
        raise NotImplementedError

    @property
    def host(self) -> Host:
        return cast(Host, self.app)

    def show(self, state: State) -> None:
        """Draw a state."""
        if not self.is_mounted:
            return
        host = self.host
        now = host.moment()
        badges = Badges(host.frozen, host.readonly, host.slow)
        self.query_one(HeaderBar).show(state, badges, now, host.glyphs)
        self.present(state, now)

    def present(self, state: State, now: float) -> None:
        raise NotImplementedError

    def take(self, update: Update) -> None:
        """News that is no part of the state."""

    def escape(self) -> bool:
        """What esc does here first; False: nothing."""
        return False

    def as_toml(self) -> dict[str, object] | None:
        """What `y` copies."""
        return None

    def on_mount(self) -> None:
        self.set_class(self.host.glyphs is text.ASCII, "-ascii")

    def on_screen_resume(self) -> None:
        self.call_after_refresh(lambda: self.show(self.host.state))

    def on_resize(self) -> None:
        self.call_after_refresh(lambda: self.show(self.host.state))

    # --- filter ---

    @property
    def wanted(self) -> str:
        return self.query_one(FilterInput).value if self.FILTERS else ""

    def action_filter(self) -> None:
        self.query_one(FilterInput).open()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.FILTERS if action == "filter" else super().check_action(action, parameters)

    @on(FilterInput.Changed, "#filter")
    def _filtered(self) -> None:
        self.show(self.host.state)

    @on(FilterInput.Over)
    def _filter_over(self) -> None:
        self.main_focus()
        self.show(self.host.state)

    def main_focus(self) -> None:
        """Give the focus to what the screen is about."""

    @on(HeaderBar.Chosen)
    def _chosen(self, event: HeaderBar.Chosen) -> None:
        self.host.go(event.name)
