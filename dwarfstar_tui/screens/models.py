"""Models: the one that is served, and the GGUF files of this machine."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical

from dwarfstar_engine.plan.planner import rate
from dwarfstar_tui import text, updates
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.screens.get_model import GetModel
from dwarfstar_tui.screens.model_orders import ModelOrders
from dwarfstar_tui.store import State
from dwarfstar_tui.text import Glyphs, fit, matches
from dwarfstar_tui.updates import Fit, ModelFile, ModelsFound, ModelsJudged, PullSeen, Update
from dwarfstar_tui.widgets.runs_view import RunsView

FIT = 18  # columns of what the planner says, at least
MIDDLE, ROOMY, LONG = 70, 96, 110  # columns of a list with type and layers, with everything, and with long words


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
    fits = "fits, tok/s" if width < LONG else "fits, tok/s of one stream"
    wide = f" {'layers':>7} {'type':8}" + (f"{'architecture':13}" if width >= ROOMY else "")
    return fit(f"  {fit('file', name_width(width))}{'GiB':>8}{wide if width >= MIDDLE else ''} {fits}", width)


def name_width(width: int) -> int:
    others = 2 + 8 + (17 if width >= MIDDLE else 0) + (13 if width >= ROOMY else 0) + 1 + FIT
    return max(12, min(48, width - others))


def fit_words(found: Fit | None, glyphs: Glyphs) -> tuple[str, str]:
    """What the planner says of a file, and its role; None: it was not asked, or has not answered."""
    if found is None:
        return glyphs.unknown, "muted"
    if found.problem:
        return f"{glyphs.lost} no: {text.clean(found.problem)}", "late"
    where = "1 machine" if found.stages == 1 else f"{found.stages} machines"
    return f"{glyphs.ok} {where}, {rate(found.single_tok_s)}", "ok"


def file_line(file: ModelFile, loaded: str, found: Fit | None, width: int, glyphs: Glyphs) -> Runs:
    mark = glyphs.mark if loaded and file.path.endswith(f"/{loaded}.gguf") else " "
    name = text.clean(file.name) + (" (comes with DwarfStar)" if file.demo else "")
    start = (f"{mark} ", "ok"), (fit(name, name_width(width), ellipsis=glyphs.ellipsis), "name")
    figures = f"{text.size(file.size_bytes):>8} "
    if file.problem:
        room = max(0, width - name_width(width) - len(figures) - 3)
        return (*start, (figures, "plain"), (fit(text.clean(file.problem), room, ellipsis=glyphs.ellipsis), "late"))
    if width >= MIDDLE:
        figures += f"{file.layers:>7} {fit(file.quantisation, 8)}"
    if width >= ROOMY:
        figures += f"{fit(file.architecture, 12, ellipsis=glyphs.ellipsis)} "
    words, role = fit_words(found, glyphs)
    room = max(0, width - 2 - name_width(width) - len(figures))
    return (*start, (figures, "plain"), (fit(words, room, ellipsis=glyphs.ellipsis), role))


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
        "the one that is loaded. Type is that of most weights. Fits is what the planner says of the machines there "
        "are, each file served alone. l loads the one under the cursor, u unloads the one that is served; both tell "
        "what that means, and ask. g gets a model from a hub."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l", "load", "load", id="models.load"),
        Binding("u", "unload", "unload", id="models.unload"),
        Binding("r", "look_again", "look again", id="models.refresh"),
        Binding("g", "pull", "get a model", id="models.pull"),
        Binding("X", "stop_pull", "stop it", id="models.stop-pull"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._found: ModelsFound | None = None
        self._fits: dict[str, Fit] = {}
        self._judged: tuple[object, ...] = ()
        self._pull: PullSeen | None = None

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
        match update:
            case ModelsFound():
                self._found = update
            case ModelsJudged(fits):
                self._fits = {one.path: one for one in fits}
            case PullSeen():
                self._pull = update
                self.refresh_bindings()
            case _:
                pass
        if self.is_current:
            self.show(self.host.state)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        pulling = self._pull is not None and not self._pull.over
        if action == "stop_pull":
            return pulling
        if action == "pull":
            return None if pulling or self.host.readonly else True
        return super().check_action(action, parameters)

    def action_pull(self) -> None:
        self.app.push_screen(GetModel(), lambda wanted: self._get(wanted) if wanted else None)

    def _get(self, wanted: str) -> None:
        self.host.submit(updates.PullModel(wanted))

    def action_stop_pull(self) -> None:
        self.host.submit(updates.StopPull())

    def _judge(self, state: State) -> None:
        """Ask the planner when files or machines are other than those that it was asked about."""
        status = state.status
        if not state.live or status is None or self._found is None:
            return
        paths = tuple(file.path for file in self._found.files if not file.problem)
        nodes = tuple((node.name, node.state in ("joined", "late"), node.effective_vram_gib) for node in status.nodes)
        if (key := (paths, nodes)) != self._judged:
            self._judged = key
            self.host.submit(updates.JudgeModels(paths, status))

    def _files(self) -> tuple[ModelFile, ...]:
        files = self._found.files if self._found is not None else ()
        if not self.wanted:
            return files
        return tuple(file for file in files if matches(self.wanted, file.name, file.architecture, file.quantisation))

    def present(self, state: State, now: float) -> None:
        self._judge(state)
        glyphs = self.host.glyphs
        files = self.query_one(FileList)
        width = files.scrollable_content_region.width
        loaded = self.query_one("#loaded", RunsView)
        lines = loaded_lines(state, width, glyphs)
        loaded.styles.height = len(lines)
        loaded.set_lines(lines)
        name = state.status.model.name if state.status is not None and state.status.model is not None else ""
        fits = self._fits if state.live else {}
        shown = [file_line(file, name, fits.get(file.path), width, glyphs) for file in self._files()]
        files.at = max(0, min(files.at, len(shown) - 1))
        files.set_lines(shown, files.at if shown else None)
        self.query_one("#files-heading", RunsView).set_lines([((file_heading(width), "heading"),)])
        self.query_one("#files-note", RunsView).set_lines([((fit(self._note(), width), "muted"),)])

    def _note(self) -> str:
        if order := self._orders.note:
            return order
        if self._pull is not None:
            said = text.clean(self._pull.problem or self._pull.line)
            return f"{text.clean(self._pull.wanted)}: {said}"
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
