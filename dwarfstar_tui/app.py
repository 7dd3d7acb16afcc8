"""The Textual application: it takes what the session tells, reduces it to a state, and shows that to one screen.

Theory. News of the session waits in a mailbox. TICKS a second the app empties it, reduces, and shows the result; what a
person waits for (an answer, a token, an error) wakes it at once. Between two statuses the state is the same and only
the time is another, so ages run on. Frozen, the app goes on reducing and shows the state and the time it was frozen at.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import tomli_w
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen

from dwarfstar_tui import preferences, text, themes, updates
from dwarfstar_tui.header_lines import SCREENS
from dwarfstar_tui.mailbox import Mailbox
from dwarfstar_tui.options import AppOptions
from dwarfstar_tui.preferences import Preferences
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.screens.chat import ChatScreen
from dwarfstar_tui.screens.cluster import ClusterScreen
from dwarfstar_tui.screens.dialogs import AddMachine, Confirm
from dwarfstar_tui.screens.events import EventsScreen
from dwarfstar_tui.screens.help import HelpScreen, JumpScreen, about, jump_places, keys_of
from dwarfstar_tui.screens.models import ModelsScreen
from dwarfstar_tui.screens.plan import PlanScreen
from dwarfstar_tui.store import State, reduce
from dwarfstar_tui.text import Glyphs
from dwarfstar_tui.updates import Command, LinkState, Notice, Update
from dwarfstar_tui.widgets.first_start import FirstStart

TICK_S, SLOW_TICK_S = 0.25, 1.0
THEMES_S = 2.0  # between two looks at the person's theme files
FUNCTION_KEY = re.compile(r"f\d+")  # as they stand on keyboards, and in texts
BACK_MAX = 20  # screens that esc remembers
CHANGES = (
    updates.Drain, updates.Remove, updates.NameNode, updates.StopEngine, updates.StartEngine, updates.MakeToken,
    updates.CommitPlan, updates.UndoPlan, updates.SetLent, updates.PullModel, updates.LoadModel,
    updates.UnloadModel,
)  # fmt: skip


class DwarfStarApp(App[None]):
    """See the module. submit: gives commands to the session. clock: monotonic, as the session's; wall: since 1970."""

    TITLE = "DwarfStar"
    CSS_PATH: ClassVar[list[Path]] = [  # type: ignore[assignment]
        Path(__file__).parent / "app.tcss"
    ]
    MODES: ClassVar[dict[str, Callable[[], Screen[Any]]]] = {  # type: ignore[assignment]
        "cluster": ClusterScreen,
        "plan": PlanScreen,
        "chat": ChatScreen,
        "events": EventsScreen,
        "models": ModelsScreen,
    }
    DEFAULT_MODE = "cluster"
    COMMAND_PALETTE_BINDING = "ctrl+p"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"go('{name}')", title, show=False, id=f"app.{name}")
            for number, (name, title) in enumerate(SCREENS, 1)
        ),
        Binding("escape", "back", "back", id="app.back", show=False),
        Binding("question_mark,f1", "help", "help", id="app.help", show=False),
        Binding("colon", "command_palette", "commands", id="app.commands", show=False),
        Binding("semicolon", "jump", "jump", id="app.jump", show=False),
        Binding("p", "freeze", "freeze", id="app.freeze"),
        Binding("y", "copy_toml", "copy", id="app.copy", show=False),
        Binding("f8", "picture", "screenshot", id="app.picture", show=False),
        Binding("q", "quit", "quit", id="app.quit"),
    ]

    class Urgent(Message):
        """There is news that somebody waits for."""

    class Leave(Message):
        """Somebody else ends the app."""

    def __init__(
        self,
        options: AppOptions,
        mailbox: Mailbox,
        submit: Callable[[Command], None],
        *,
        liked: Preferences = Preferences(),  # noqa: B008 - frozen
        slow: bool = False,
        glyphs: Glyphs = text.FANCY,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        fresh_id: Callable[[], str] = lambda: secrets.token_hex(8),
        ticking: bool = True,
    ) -> None:
        super().__init__()
        self._options, self._mailbox, self._submit, self._liked = options, mailbox, submit, liked
        self._slow, self._glyphs, self._clock, self._wall, self._fresh = slow, glyphs, clock, wall, fresh_id
        self._ticking = ticking
        self._state = State()
        self._shown: tuple[State, float] | None = None  # what is frozen, and when
        self._back: list[str] = []
        self._stamps: dict[str, tuple[int, int]] = {}
        mailbox.on_urgent(self._wake)

    def _wake(self) -> None:
        self.post_message(self.Urgent())

    # --- what screens ask: Host ---

    @property
    def state(self) -> State:
        return self._shown[0] if self._shown is not None else self._state

    @property
    def glyphs(self) -> Glyphs:
        return self._glyphs

    @property
    def readonly(self) -> bool:
        return self._options.readonly

    @property
    def frozen(self) -> bool:
        return self._shown is not None

    @property
    def slow(self) -> bool:
        return self._slow

    @property
    def home_label(self) -> str:
        return self._options.attach or str(self._options.home)

    def moment(self) -> float:
        return self._shown[1] if self._shown is not None else self._clock()

    def wall(self) -> float:
        return self._wall()

    def fresh_id(self) -> str:
        return self._fresh()

    def submit(self, command: Command) -> None:
        if self.readonly and isinstance(command, CHANGES):
            self.tell("read-only: nothing is changed", "warning")
            return
        self._submit(command)

    def tell(self, text: str, severity: str = "information") -> None:
        level = severity if severity in ("information", "warning", "error") else "information"
        self.notify(text, severity=level, markup=False, timeout=10 if level == "error" else 5)  # type: ignore[arg-type]

    def copy(self, text: str, what: str) -> None:
        if text:
            self.copy_to_clipboard(text)
            self.tell(f"copied {what}")

    def go(self, name: str) -> None:
        self.action_go(name)

    # --- life ---

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return themes.role_defaults(self.current_theme)

    def on_mount(self) -> None:
        self._register_themes()
        self._choose_theme()
        known = self._binding_ids()
        liked = preferences.with_known_keys(self._liked, known)
        if liked.keys:
            self.set_keymap(dict(liked.keys))
        for problem in liked.problems[:5]:
            self.tell(problem, "warning")
        if self._options.note:
            self.tell(self._options.note)
        if self._options.start is not None:
            self._submit(updates.StartEngine(self._options.start))
        if self._ticking:
            self.set_interval(SLOW_TICK_S if self._slow else TICK_S, self.tick)
            self.set_interval(THEMES_S, self._reload_themes)

    def get_key_display(self, binding: Binding) -> str:
        if self._glyphs is text.ASCII:
            return binding.key_display or binding.key.replace("question_mark", "?")
        shown = super().get_key_display(binding)
        return shown.upper() if FUNCTION_KEY.fullmatch(shown) else shown

    def _binding_ids(self) -> frozenset[str]:
        """Of everything there is, as a keymap may name it."""
        from textual.dom import DOMNode

        classes: list[type[DOMNode]] = [type(self)]
        found: set[str] = set()
        todo: list[type] = [DOMNode]
        while todo:
            one = todo.pop()
            todo += one.__subclasses__()
            if one.__module__.startswith("dwarfstar_tui"):
                classes.append(one)
        for one in classes:
            for binding in one.__dict__.get("BINDINGS", ()):
                if isinstance(binding, Binding) and binding.id:
                    found.add(binding.id)
        return frozenset(found)

    def on_dwarf_star_app_leave(self) -> None:
        self.exit()

    def on_dwarf_star_app_urgent(self) -> None:
        self.tick()

    def tick(self) -> None:
        """Take what is there and show it."""
        for update in self._mailbox.take():
            self._take(update)
        if isinstance(self.screen, AppScreen):
            if self._shown is None:
                self.screen.show(self._state)
        elif self.screen_stack and isinstance(self.screen_stack[0], AppScreen):
            self.screen_stack[0].show(self.state)

    def _take(self, update: Update) -> None:
        before = self._state.link.state
        self._state = reduce(self._state, update)
        if isinstance(update, Notice):
            self.tell(update.text, update.severity)
        if isinstance(update, updates.TokenMade) and isinstance(self.screen, AddMachine):
            self.screen.made(update)
            return
        for name in self.MODES:
            with contextlib.suppress(KeyError):
                base = self._base_screen(name)
                if base is not None and base.is_mounted:
                    base.take(update)
        if before is not self._state.link.state and LinkState.UP in (before, self._state.link.state):
            self.refresh_bindings()

    def _base_screen(self, mode: str) -> AppScreen | None:
        """The screen of a mode that was visited."""
        stack = self._screen_stacks.get(mode) or []
        return stack[0] if stack and isinstance(stack[0], AppScreen) else None

    # --- themes ---

    @property
    def _own_themes(self) -> Path:
        return self._options.config / "themes"

    def _register_themes(self) -> None:
        for place in (themes.folder(), self._own_themes):
            found, problems = themes.load_folder(place)
            for theme in found:
                self.register_theme(theme)
            for problem in problems:
                self.tell(problem, "error")
        self._stamps = themes.stamps(self._own_themes)

    def _choose_theme(self) -> None:
        wanted = self._options.theme or self._liked.theme
        if wanted is not None and wanted not in self.available_themes:
            self.tell(f"there is no theme {wanted!r}: ctrl+p, Theme lists them", "warning")
            wanted = None
        few = self.console.color_system == "standard"  # colours would be put where the theme does not expect them
        self.theme = wanted or (themes.ANSI_DARK if few else themes.DEFAULT)

    def _reload_themes(self) -> None:
        """A theme file that was saved is shown at once; one with a mistake leaves what is shown."""
        stamps = themes.stamps(self._own_themes)
        changed = [name for name in stamps if self._stamps.get(name) != stamps[name]]
        self._stamps = stamps
        for name in changed:
            try:
                theme = themes.load(self._own_themes / name)
            except themes.ThemeError as error:
                self.tell(str(error), "error")
                continue
            self.register_theme(theme)
            if self.theme == theme.name:
                self._invalidate_css()
                self.refresh_css(animate=False)
                self._watch_theme(theme.name)

    # --- actions ---

    def action_go(self, name: str) -> None:
        if name == self.current_mode or not isinstance(self.screen, AppScreen):
            return
        self._back = [*self._back, self.current_mode][-BACK_MAX:]
        self.switch_mode(name)

    async def action_back(self) -> None:
        screen = self.screen
        if isinstance(screen, AppScreen) and screen.escape():
            return
        if isinstance(screen, AppScreen) and screen.FILTERS and screen.wanted:
            from dwarfstar_tui.widgets.filter_input import FilterInput

            screen.query_one(FilterInput).action_drop()
            return
        if self._back:
            self.switch_mode(self._back.pop())

    def action_freeze(self) -> None:
        self._shown = None if self._shown is not None else (self._state, self._clock())
        if isinstance(self.screen, AppScreen):
            self.screen.show(self.state)

    def action_help(self) -> None:
        screen = self.screen
        if isinstance(screen, AppScreen):
            lesson = text.spelled(screen.LESSON, ascii_only=self._glyphs is text.ASCII)
            self.push_screen(HelpScreen(lesson, about(screen.focused), keys_of(screen)))

    def action_jump(self) -> None:
        screen = self.screen
        if not isinstance(screen, AppScreen):
            return
        places = jump_places(screen)
        if not places:
            self.tell("there is one part here, and its keys work already")
            return
        corners = {key: (widget.region.x, widget.region.y) for key, widget in places.items()}

        def jumped(key: str | None) -> None:
            if key is not None and key in places:
                places[key].focus()

        self.push_screen(JumpScreen(corners), jumped)

    def action_copy_toml(self) -> None:
        found = self.screen.as_toml() if isinstance(self.screen, AppScreen) else None
        if found is None:
            self.tell("there is nothing to copy here")
        else:
            self.copy(tomli_w.dumps(found), "it as TOML")

    def action_picture(self) -> None:
        self.deliver_screenshot(path=str(self._options.home))
        self.tell(f"screenshot: an SVG file in {self._options.home}")

    def action_stop_engine(self) -> None:
        status = self._state.status
        name = status.model.name if status is not None and status.model is not None else ""
        why = "Every request ends, and the endpoint is gone until an engine is started again."
        self.push_screen(
            Confirm("Stop the cluster's engine?", why, "stop", typed="stop" if name else ""),
            lambda sure: self.submit(updates.StopEngine()) if sure else None,
        )

    def on_first_start_picked(self, event: FirstStart.Picked) -> None:
        self.submit(updates.StartEngine(event.arguments))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        for number, (name, title) in enumerate(SCREENS, 1):
            yield SystemCommand(title, f"go to {title} ({number})", lambda name=name: self.action_go(name))
        yield SystemCommand("Theme", "choose the colours", self.action_change_theme)
        yield SystemCommand("Freeze", "stop the view, or let it go on (p)", self.action_freeze)
        yield SystemCommand("Help", "what is seen, and every key (?)", self.action_help)
        yield SystemCommand("Copy as TOML", "what has the focus (y)", self.action_copy_toml)
        yield SystemCommand("Screenshot", "as an SVG file (F8)", self.action_picture)
        if not self.readonly and self._state.live:
            yield SystemCommand("Join token", "the line with which a machine joins (t)", self._token)
            yield SystemCommand("Stop the engine", "ends every request; asks first", self.action_stop_engine)
        yield SystemCommand("Quit", "the engine runs on (q)", self.exit)

    def _token(self) -> None:
        self.submit(updates.MakeToken())
