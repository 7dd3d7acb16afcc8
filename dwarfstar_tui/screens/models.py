"""Models: the one that is served, and the GGUF files of this machine."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical

from dwarfstar_tui import text, updates
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.screens.model_orders import ModelOrders
from dwarfstar_tui.store import State
from dwarfstar_tui.text import Glyphs, fit, matches
from dwarfstar_tui.updates import ModelFile, ModelsFound, Update
from dwarfstar_tui.widgets.runs_view import RunsView

GB = 1e9


def loaded_lines(state: State, width: int, glyphs: Glyphs) -> list[Runs]:
    """The model that is served."""
    status = state.status
    if status is None or status.model is None:
        return [(("No model is loaded.", "name"),), ()]
    model = status.model
    facts = (
        f"{model.architecture}, {model.layers} layers, {text.gib(model.weights_gib)} GiB of weights, "
        f"requests of up to {model.context} tokens"
    )
    ready = sum(stage.state == "ready" for stage in status.stages)
    where = f"{status.state}: {ready} of {len(status.stages)} stages ready" if status.stages else status.state
    role = "ok" if status.state == "serving" else "late"
    lines: list[Runs] = [((fit(text.clean(model.name), width, ellipsis=glyphs.ellipsis), "name"),)]
    lines += [((line, "plain"),) for line in text.wrapped(facts, width)]
    lines += [((f"{glyphs.ok if role == 'ok' else glyphs.late} {where}", role),)]
    lines += [((line, "muted"),) for line in text.wrapped(f"OpenAI endpoint: {status.coordinator.api_url}/v1", width)]
    return [*lines, ()]


def file_heading(width: int) -> str:
    return f"  {fit('file', name_width(width))}{'GB':>8} {'layers':>7} {'type':8}{'architecture'}"


def name_width(width: int) -> int:
    return max(12, min(48, width - 42))


def file_line(file: ModelFile, loaded: str, width: int, glyphs: Glyphs) -> Runs:
    mark = glyphs.mark if loaded and file.path.endswith(f"/{loaded}.gguf") else " "
    name = text.clean(file.name) + (" (comes with DwarfStar)" if file.demo else "")
    start = (f"{mark} ", "ok"), (fit(name, name_width(width), ellipsis=glyphs.ellipsis), "name")
    figures = f"{file.size_bytes / GB:8.2f} "
    if file.problem:
        room = max(0, width - name_width(width) - len(figures) - 3)
        return (*start, (figures, "plain"), (fit(text.clean(file.problem), room, ellipsis=glyphs.ellipsis), "late"))
    figures += f"{file.layers:>7} {file.quantisation:8}{file.architecture}"
    return (*start, (figures, "plain"))


class FileList(RunsView, can_focus=True):
    """GGUF files, a line each."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "up", show=False, id="files.up"),
        Binding("down,j", "move(1)", "down", show=False, id="files.down"),
    ]
    HELP = "The GGUF files of this machine's models folder."

    def __init__(self) -> None:
        super().__init__(id="files")
        self.at = 0

    def action_move(self, by: int) -> None:
        self.at = max(0, min(len(self.lines) - 1, self.at + by))
        self.set_lines(self.lines, self.at)
        self.show_cursor()


class ModelsScreen(AppScreen):
    NAME = "models"
    FILTERS = True
    LESSON = (
        "Above, the model that is served and where. Below, the GGUF files of this machine's models folder; ✓ marks "
        "the one that is loaded. Type is that of most weights. l loads the one under the cursor, u unloads the "
        "one that is served; both tell what that means, and ask."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l", "load", "load", id="models.load"),
        Binding("u", "unload", "unload", id="models.unload"),
        Binding("r", "look_again", "look again", id="models.refresh"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._found: ModelsFound | None = None

    def body(self) -> ComposeResult:
        with Vertical(id="models-body"):
            yield RunsView(id="loaded")
            yield RunsView(id="files-heading")
            yield FileList()
            yield RunsView(id="files-note")

    def on_mount(self) -> None:
        self._orders = ModelOrders(self.app, self.host)
        super().on_mount()
        self.host.submit(updates.FindModels())
        self.query_one(FileList).focus()

    def main_focus(self) -> None:
        self.query_one(FileList).focus()

    def action_look_again(self) -> None:
        self.host.submit(updates.FindModels())

    def action_load(self) -> None:
        files = self._files()
        self._orders.load(files[min(self.query_one(FileList).at, len(files) - 1)] if files else None)
        self.show(self.host.state)

    def action_unload(self) -> None:
        self._orders.unload()

    def take(self, update: Update) -> None:
        self._orders.take(update)
        if isinstance(update, ModelsFound):
            self._found = update

    def _files(self) -> tuple[ModelFile, ...]:
        files = self._found.files if self._found is not None else ()
        if not self.wanted:
            return files
        return tuple(file for file in files if matches(self.wanted, file.name, file.architecture, file.quantisation))

    def present(self, state: State, now: float) -> None:
        glyphs = self.host.glyphs
        files = self.query_one(FileList)
        width = files.scrollable_content_region.width
        loaded = self.query_one("#loaded", RunsView)
        lines = loaded_lines(state, width, glyphs)
        loaded.styles.height = len(lines)
        loaded.set_lines(lines)
        name = state.status.model.name if state.status is not None and state.status.model is not None else ""
        shown = [file_line(file, name, width, glyphs) for file in self._files()]
        files.at = max(0, min(files.at, len(shown) - 1))
        files.set_lines(shown, files.at if shown else None)
        self.query_one("#files-heading", RunsView).set_lines([((file_heading(width), "heading"),)])
        self.query_one("#files-note", RunsView).set_lines([((fit(self._note(), width), "muted"),)])

    def _note(self) -> str:
        if order := self._orders.note:
            return order
        if self._found is None:
            return "looking …"
        if self._found.problem:
            return self._found.problem
        more = f", {self._found.more} more" if self._found.more else ""
        return f"{len(self._found.files)} here{more}; models folder: {self._found.folder}"

    @on(RunsView.Pointed, "#files")
    def _pointed(self, event: RunsView.Pointed) -> None:
        self.query_one(FileList).at = event.line
        self.show(self.host.state)

    def as_toml(self) -> dict[str, object] | None:
        files = self._files()
        if not files:
            return None
        file = files[min(self.query_one(FileList).at, len(files) - 1)]
        return {"model": {"path": file.path, "bytes": file.size_bytes, "layers": file.layers}}
