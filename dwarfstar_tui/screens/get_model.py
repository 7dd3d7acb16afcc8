"""Which model to get from a hub."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static


class GetModel(ModalScreen[str]):
    """Gives back what was typed; empty: nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "close", id="dialog.leave-get")]

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static("Get a model", classes="title", markup=False)
            yield Static("From a model hub into the models folder, verified by its hash.", markup=False)
            yield Input(placeholder="OWNER/NAME Q4_K_M, or the address of a file", id="wanted", compact=True)
            yield Static(
                "enter  get it     esc  close     X  stops it; what came is kept", classes="quiet", markup=False
            )

    @on(Input.Submitted, "#wanted")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.dismiss(event.value.strip())

    def action_leave(self) -> None:
        self.dismiss("")
