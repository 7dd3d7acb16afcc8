"""Small windows over a screen: a question, a token to copy, how to add a machine."""

from __future__ import annotations

from typing import ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from dwarfstar_tui import updates
from dwarfstar_tui.host import Host
from dwarfstar_tui.text import clean
from dwarfstar_tui.updates import Surroundings, TokenMade

NAME_MAX = 64  # characters, as the engine takes them


class Dialog(ModalScreen[bool]):
    """A box in the middle; esc closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "no", "close", id="dialog.close")]

    @property
    def host(self) -> Host:
        return cast(Host, self.app)

    def action_no(self) -> None:
        self.dismiss(False)


class Confirm(Dialog):
    """A question. typed: what must be typed for yes; empty: y or enter will do."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "yes", "yes", id="dialog.yes"),
        Binding("n", "no", "no", id="dialog.no", show=False),
        Binding("enter", "yes", "yes", id="dialog.enter", show=False),
    ]

    def __init__(self, title: str, why: str, verb: str, *, typed: str = "") -> None:
        super().__init__()
        self._title, self._why, self._verb, self._typed = title, why, verb, typed

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(self._title, classes="title", markup=False)
            yield Static(self._why, markup=False)
            if self._typed:
                yield Static(f"\nType {self._typed} and press enter to {self._verb} it; esc keeps it.", markup=False)
                yield Input(id="typed", compact=True)
            else:
                yield Static(f"\ny or enter  {self._verb}     n or esc  leave it", classes="quiet", markup=False)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return not self._typed if action == "yes" else super().check_action(action, parameters)

    def action_yes(self) -> None:
        self.dismiss(True)

    @on(Input.Submitted, "#typed")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if event.value.strip() == self._typed:
            self.dismiss(True)
        else:
            self.query_one("#typed", Input).value = ""
            self.host.tell(f"that is not {self._typed}: nothing was done", "warning")


class NameMachine(ModalScreen[str | None]):
    """What a machine is to be called. Gives back what was typed, empty: as it calls itself; None: nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "close", id="dialog.leave-name")]

    def __init__(self, now: str) -> None:
        super().__init__()
        self._now = now

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(f"What to call {clean(self._now)}", classes="title", markup=False)
            yield Input(clean(self._now), id="name", max_length=NAME_MAX, compact=True)
            yield Static("enter  call it that     esc  close     empty: as it calls itself", classes="quiet",
                         markup=False)  # fmt: skip

    @on(Input.Submitted, "#name")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.dismiss(event.value.strip())

    def action_leave(self) -> None:
        self.dismiss(None)


class ShowToken(Dialog):
    """The line with which a machine joins."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("c,y", "copy", "copy", id="dialog.copy")]

    def __init__(self, made: TokenMade) -> None:
        super().__init__()
        self._made = made

    def compose(self) -> ComposeResult:
        with Vertical(classes="box wide"):
            yield Static("Let a machine join", classes="title", markup=False)
            yield Static("Install DwarfStar on it, and run this there. It works for 24 hours.", markup=False)
            yield Static(self._made.command, classes="command", markup=False)
            for note in self._made.notes:
                yield Static(note, classes="quiet", markup=False)
            yield Static("\nc  copy     esc  close     dwarfstar token list, revoke: what was made",
                         classes="quiet", markup=False)  # fmt: skip

    def action_copy(self) -> None:
        self.host.copy(self._made.command, "the command")


class AddMachine(Dialog):
    """A machine is added from its own side: here is what to run there, also over ssh."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f7", "copy", "copy", id="dialog.copy-command", priority=True),
    ]

    def __init__(self, around: Surroundings) -> None:
        super().__init__()
        self._around, self._command = around, ""

    def compose(self) -> ComposeResult:
        with Vertical(classes="box wide"):
            yield Static("Add a machine by address", classes="title", markup=False)
            yield Static("Its host name or address, as ssh takes it (user@host), then enter.", markup=False)
            yield Input(placeholder="user@host", id="machine", compact=True)
            yield Static(self._here(), classes="quiet", markup=False)
            yield Static("", id="command", classes="command", markup=False)
            yield Static("enter  make the command     F7  copy it     esc  close", classes="quiet", markup=False)

    def on_mount(self) -> None:
        self.query_one("#command").display = False

    def _here(self) -> str:
        if not self._around.join:
            return "No engine runs from here that it could join."
        where = ", ".join(one.address for one in self._around.interfaces[:4] if not one.virtual)
        return f"It will join at {self._around.join}" + (f"; this machine is also {where}." if where else ".")

    @on(Input.Submitted, "#machine")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if not is_host(event.value.strip()):
            self.host.tell("that is no host name or address", "warning")
            return
        if self.host.readonly:
            self.host.tell("read-only: no token is made", "warning")
            return
        self.host.submit(updates.MakeToken())

    def made(self, made: TokenMade) -> None:
        """The token is there."""
        host = self.query_one("#machine", Input).value.strip()
        join = made.command if "--join" in made.command or not made.address else _joined(made)
        self._command = f"ssh -t {host} {join}"
        command = self.query_one("#command", Static)
        command.update(self._command)
        command.display = True

    def action_copy(self) -> None:
        if self._command:
            self.host.copy(self._command, "the command")


def _joined(made: TokenMade) -> str:
    return f"dwarfstar node --join {made.address} --token {made.token}"


def is_host(text: str) -> bool:
    """Whether it can stand in an ssh command as one word: nothing that a shell would read."""
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:@[]%")
    return bool(text) and not text.startswith("-") and len(text) <= 255 and set(text) <= allowed
