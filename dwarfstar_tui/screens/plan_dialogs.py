"""Windows of the Plan screen: the difference before it is carried out, other plans, and who gets layers at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from dwarfstar_engine.views import AlternativeView, ProposalView
from dwarfstar_tui import plan_draft, plan_panel
from dwarfstar_tui.host import Host
from dwarfstar_tui.screens.dialogs import Dialog
from dwarfstar_tui.text import clean
from dwarfstar_tui.widgets.runs_view import RunsView

MIN_WIDTH = 40


class Difference(Dialog):
    """What a draft would change, and whether to do it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "yes", "carry it out", id="dialog.commit"),
        Binding("n", "no", "back", id="dialog.keep-draft", show=False),
    ]

    def __init__(self, told: ProposalView, rates: Mapping[str, float]) -> None:
        super().__init__()
        self._told, self._rates = told, rates

    def compose(self) -> ComposeResult:
        with Vertical(classes="box wide"):
            yield Static("Carry this plan out?", classes="title", markup=False)
            with VerticalScroll(id="difference-body", can_focus=False):
                yield RunsView(id="difference")
            yield Static("\ny  carry it out     n  back to the draft", classes="quiet", markup=False)

    def on_mount(self) -> None:
        self.call_after_refresh(self._fill)

    def on_resize(self) -> None:
        self.call_after_refresh(self._fill)

    def _fill(self) -> None:
        view = self.query_one("#difference", RunsView)
        width = max(MIN_WIDTH, view.size.width)
        lines = plan_panel.difference(self._told, self._rates, width, self.host.glyphs)
        view.styles.height = len(lines)
        view.set_lines(lines)

    def action_yes(self) -> None:
        self.dismiss(True)


class Alternatives(ModalScreen[int | None]):
    """Other ways to use the machines, as the planner's advisor knows them. Gives back the index of the one chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,A", "leave", "close", id="dialog.leave-alternatives")]

    def __init__(self, found: Sequence[AlternativeView], take: str) -> None:
        super().__init__()
        self._found, self._take = found, take

    def compose(self) -> ComposeResult:
        glyphs = cast(Host, self.app).glyphs
        with Vertical(classes="box wide"):
            yield Static("Other ways to use these machines", classes="title", markup=False)
            yield OptionList(
                *(
                    Option(
                        (f"{glyphs.arrow} " if one.kind == self._take else "  ")
                        + plan_panel.alternative_line(one, glyphs),
                        disabled=not plan_draft.applicable(one),
                    )
                    for one in self._found
                ),
                id="alternatives", markup=False,
            )  # fmt: skip
            yield Static("tok/s of one stream and of all; several rings need an engine each", classes="quiet",
                         markup=False)  # fmt: skip
            yield Static("enter  make it the draft     esc  close", classes="quiet", markup=False)

    @on(OptionList.OptionSelected, "#alternatives")
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(event.option_index)

    def action_leave(self) -> None:
        self.dismiss(None)


class TryContext(ModalScreen[str | None]):
    """How long requests would be. Gives back what was typed; None: nothing is to change."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "close", id="dialog.leave-context")]

    def __init__(self, now: int) -> None:
        super().__init__()
        self._now = now

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static("What if requests were longer?", classes="title", markup=False)
            yield Static("Tokens of one request, prompt and answer. The planner says what that would need: it is set "
                         "when an engine starts.", markup=False)  # fmt: skip
            yield Input(placeholder=f"now {self._now}", type="integer", id="context", compact=True)
            yield Static("enter  ask; empty: as it is     esc  close", classes="quiet", markup=False)

    @on(Input.Submitted, "#context")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.dismiss(event.value.strip())

    def action_leave(self) -> None:
        self.dismiss(None)


class Machines(ModalScreen[str | None]):
    """Every machine, and whether it may have layers. Gives back the one to exclude, or to let in again."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,n", "leave", "close", id="dialog.leave-machines")]

    def __init__(self, names: Sequence[str], used: Collection[str], excluded: Collection[str]) -> None:
        super().__init__()
        self._names, self._used, self._excluded = list(names), used, excluded

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static("Who may have layers", classes="title", markup=False)
            yield OptionList(*(Option(self._line(name)) for name in self._names), id="who", markup=False)
            yield Static("enter  exclude it, or let it in again     esc  close", classes="quiet", markup=False)

    def _line(self, name: str) -> str:
        word = "excluded" if name in self._excluded else "has layers" if name in self._used else "has none"
        return f"{word:11} {clean(name)}"

    @on(OptionList.OptionSelected, "#who")
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._names[event.option_index])

    def action_leave(self) -> None:
        self.dismiss(None)
