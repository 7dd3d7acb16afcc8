"""How much machines lend: an override, and what to do when what they serve needs more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Input, Static

from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.plan.capacity import parse_override
from dwarfstar_engine.views import NodeView
from dwarfstar_tui import text
from dwarfstar_tui.screens.dialogs import Dialog
from dwarfstar_tui.updates import LentSet, SetLent

IN_USE = "in_use"


class Lend(Dialog):
    """An override of what machines lend. It stays until each was answered, so that a refusal can be acted on.

    refused: what was refused before it was opened, to begin with that.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("f2", "replan", "re-plan", id="dialog.replan", priority=True)]

    def __init__(self, nodes: Sequence[NodeView], refused: LentSet | None = None) -> None:
        super().__init__()
        self._machines, self._awaited = list(nodes), 0
        self._refused: list[LentSet] = [refused] if refused is not None else []

    def compose(self) -> ComposeResult:
        names = ", ".join(text.clean(node.name) for node in self._machines)
        with Vertical(classes="box"):
            yield Static(f"What {names} may lend", classes="title", markup=False)
            for node in self._machines[:4]:
                yield Static(_now(node), markup=False, classes="quiet")
            yield Input(placeholder="18 (GiB), 50% or -2 (GiB kept back)", id="lend", compact=True)
            yield Static("", id="lend-problem", markup=False)
            yield Static("enter  set it     esc  close     empty: as it was started", classes="quiet", markup=False)

    def on_mount(self) -> None:
        self._tell()

    @property
    def names(self) -> dict[str, str]:
        return {node.id: text.clean(node.name) for node in self._machines}

    @on(Input.Submitted, "#lend")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        wanted = event.value.strip()
        try:
            if wanted:
                parse_override(wanted)
        except SettingsError as error:
            self._tell(error.message)
            return
        self._submit([SetLent(node.id, wanted) for node in self._machines])

    def _submit(self, wishes: Sequence[SetLent]) -> None:
        if self.host.readonly:
            self.host.tell("read-only: nothing is changed", "warning")
            return
        self._refused, self._awaited = [], len(wishes)
        for wish in wishes:
            self.host.submit(wish)
        self._tell("setting it; layers may have to move first" if any(wish.replan for wish in wishes) else "setting it")

    def answered(self, told: LentSet) -> bool:
        """An answer has come; False: not for this window."""
        if told.asked.node not in self.names or not self._awaited:
            return False
        self._awaited -= 1
        if told.view is None:
            self._refused.append(told)
        if self._awaited == 0 and not self._refused:
            self.dismiss(True)
        else:
            self._tell()
        return True

    def _tell(self, words: str = "") -> None:
        problems = [told.problem for told in self._refused]
        if any(told.code == IN_USE for told in self._refused):
            problems.append("F2  plan again, so that layers move away first")
        shown = self.query_one("#lend-problem", Static)
        shown.update(words or "\n".join(problems))
        shown.set_class(bool(problems) and not words, "warn")
        shown.display = bool(words or problems)

    def action_replan(self) -> None:
        wishes = [SetLent(told.asked.node, told.asked.text, replan=True) for told in self._refused
                  if told.code == IN_USE]  # fmt: skip
        if wishes:
            self._submit(wishes)


def _now(node: NodeView) -> str:
    lends = f"{text.clean(node.name)} lends {text.gib(node.effective_vram_gib)} of {text.gib(node.memory_gib)} GiB"
    usable = f", {text.gib(node.usable_gib)} without an override" if node.usable_gib is not None else ""
    return lends + (f", set to {text.override(node.override)}{usable}" if node.override else "")
