"""Help for what has the focus, and jump mode: letters on everything that can have it."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widget import Widget
from textual.widgets import Static

from dwarfstar_tui.text import wrapped

JUMP_KEYS = "asdfghjklqwertyuiopzxcvbnm"


class HelpScreen(ModalScreen[None]):
    """What the screen shows, what the focused part does, and every key with the id that a keymap calls it by."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,f1,q", "leave", "close", id="dialog.leave-help")
    ]

    def __init__(self, lesson: str, about: str, keys: list[tuple[str, str, str]]) -> None:
        super().__init__()
        self._lesson, self._about, self._keys = lesson, about, keys

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box wide", id="help"):
            yield Static("Help", classes="title", markup=False)
            yield Static(self._lesson, markup=False)
            if self._about:
                yield Static("\n" + self._about, markup=False)
            yield Static(self._table(), id="help-keys")
            yield Static("\nesc  close     ctrl+p  every command     keys can be changed in tui.toml",
                         classes="quiet", markup=False)  # fmt: skip

    def _table(self) -> Text:
        lines = Text()
        for key, what, name in self._keys:
            lines.append(f"\n{key:>12}  ", style="bold")
            lines.append(f"{what:18}")
            lines.append(name, style="dim")
        return lines

    def action_leave(self) -> None:
        self.dismiss()


def keys_of(screen: Screen[Any]) -> list[tuple[str, str, str]]:
    """(keys, what they do, id) of all that works now, each once."""
    found: dict[str, tuple[list[str], str]] = {}
    for active in screen.active_bindings.values():
        binding = active.binding
        if not binding.id or not active.enabled:
            continue
        keys, _ = found.setdefault(binding.id, ([], binding.description))
        shown = screen.app.get_key_display(binding)
        if shown not in keys:
            keys.append(shown)
    return [(" ".join(keys[:3]), what, name) for name, (keys, what) in found.items()]


def about(widget: Widget | None) -> str:
    """What the focused widget says of itself, or the first around it that does."""
    while widget is not None:
        words = getattr(widget, "HELP", None)
        if isinstance(words, str) and type(widget).__module__.startswith("dwarfstar_tui"):
            return " ".join(wrapped(words, 10_000))
        parent = widget.parent
        widget = parent if isinstance(parent, Widget) else None
    return ""


class JumpScreen(ModalScreen[str | None]):
    """A letter on each part that can have the focus; pressing it goes there. Gives back the part's key."""

    def __init__(self, places: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self._places = places

    def compose(self) -> ComposeResult:
        for key, (x, y) in self._places.items():
            label = Static(f" {key} ", classes="jump", markup=False)
            label.styles.offset = (x, y)
            yield label

    def on_key(self, event: events.Key) -> None:
        event.stop()
        event.prevent_default()
        self.dismiss(event.character if event.character in self._places else None)


def jump_places(screen: Screen[Any]) -> dict[str, Widget]:
    """Parts that can have the focus and are seen, each with its letter."""
    seen = [widget for widget in screen.focus_chain if widget.region.area and screen.region.overlaps(widget.region)]
    return dict(zip(JUMP_KEYS, seen, strict=False))
