"""The first start: no engine runs, so choose what to serve. Also when the last one was stopped."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from dwarfstar_tui import text
from dwarfstar_tui.updates import ModelFile, ModelsFound


def label(file: ModelFile, width: int) -> str:
    """One model in a line."""
    if file.problem:
        return f"{text.fit(text.clean(file.name), width)}  cannot be served: {file.problem}"
    about = f"{text.size(file.size_bytes):>6} GiB  {file.layers:>3} layers  {file.quantisation:7} {file.architecture}"
    return f"{text.fit(text.clean(file.name), width)}{about}"


class FirstStart(Vertical):
    """A list of what can be served here, and a line for the path of a file."""

    HELP = "Choose a model to serve. The engine is started in the background and runs on when this app is closed."

    class Picked(Message):
        """arguments: of ``dwarfstar --serve``."""

        def __init__(self, arguments: tuple[str, ...]) -> None:
            super().__init__()
            self.arguments = arguments

    def __init__(self) -> None:
        super().__init__(id="first-start")
        self.display = False
        self._choices: list[tuple[str, ...]] = []

    def compose(self) -> ComposeResult:
        yield Static("Serve a model", classes="title", markup=False)
        yield Static(
            "No engine runs here yet. Choose what to serve: the engine starts in the background, this machine is its "
            "first node, and others join with a token.",
            markup=False,
            classes="quiet",
        )
        yield Static("", id="first-problem", markup=False)
        yield OptionList(id="first-models", markup=False)
        yield Input(placeholder="or the path of a GGUF file, then enter", id="first-path", compact=True)
        yield Static("", id="first-note", markup=False, classes="quiet")

    def show(self, wanted: bool) -> None:
        if wanted and not self.display:
            self.display = True
            self.query_one(OptionList).focus()
        elif not wanted and self.display:
            self.display = False

    def failed(self, why: str) -> None:
        """Say why the engine that was started has ended; nothing: it has not."""
        problem = self.query_one("#first-problem", Static)
        problem.update(f"It could not start: {text.clean(why)}" if why else "")
        problem.display = bool(why)

    def offer(self, found: ModelsFound) -> None:
        """List these."""
        options = self.query_one(OptionList)
        options.clear_options()
        self._choices = []
        width = 30 if self.size.width < 90 else 44
        for file in found.files:
            if file.demo:
                self._add("Try the demo: a small model split over three nodes on this machine", ("--demo",))
            else:
                self._add(label(file, width), (file.path,), usable=not file.problem)
        note = found.problem or f"GGUF files in {found.folder} are listed here"
        self.query_one("#first-note", Static).update(note + (f"; {found.more} more there" if found.more else ""))
        if self._choices:
            options.highlighted = 0

    def _add(self, shown: str, arguments: tuple[str, ...], *, usable: bool = True) -> None:
        self._choices.append(arguments)
        self.query_one(OptionList).add_option(Option(shown, disabled=not usable))

    @on(OptionList.OptionSelected, "#first-models")
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(self.Picked(self._choices[event.option_index]))

    @on(Input.Submitted, "#first-path")
    def _typed(self, event: Input.Submitted) -> None:
        event.stop()
        if path := event.value.strip():
            self.post_message(self.Picked((path,)))
