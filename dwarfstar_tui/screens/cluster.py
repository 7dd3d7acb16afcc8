"""Cluster: the machines, what they have and do, and what can be done with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll

from dwarfstar_tui import text, updates
from dwarfstar_tui.cluster_rows import Moment, Runs, detail_lines
from dwarfstar_tui.event_lines import event_line
from dwarfstar_tui.plan_lines import geometry, legend, of_status
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.screens.dialogs import AddMachine, Confirm, NameMachine, ShowToken
from dwarfstar_tui.screens.events import EventsScreen
from dwarfstar_tui.screens.lend_dialog import Lend
from dwarfstar_tui.store import NodeRow, State, alerts
from dwarfstar_tui.teaching import unattached, waiting
from dwarfstar_tui.text import matches
from dwarfstar_tui.updates import LinkState, Surroundings, Update
from dwarfstar_tui.widgets.first_start import FirstStart
from dwarfstar_tui.widgets.node_table import NodeTable
from dwarfstar_tui.widgets.plan_bar import PlanBar
from dwarfstar_tui.widgets.runs_view import RunsView

ALERTS_SHOWN = 3
RECENT, RECENT_LEAST = 8, 3  # events below the machines, where there is room
FRAME_LINES = 18  # header, alerts, heading, plan and footer, and some air
SAID_MAX = 50  # lines of a starting engine
PANE = 46
ACTIONS = frozenset({"drain", "remove", "token", "add", "lend", "lend_reset", "rename"})  # on an engine's machines
NAMED = 3  # machines that are called by name in a question
MIN_CELLS = 5  # of a stage; narrower ones say nothing, and the machines can use the room


class ClusterScreen(AppScreen):
    NAME = "cluster"
    FILTERS = True
    LESSON = (
        "Every machine of the cluster has a line: whether it is heard (the age of its last heartbeat runs on), its "
        "memory, and its part of the model. Memory bar: █ in use, ▓ planned and not loaded yet, ░ lent, · the rest. "
        "Space marks machines, and d, x, v and V are then for all of them; [18] is an override of what one lends. n "
        "gives a machine another name. "
        "▲ marks the machine that takes longest for a token. Below, the plan: each stage as wide as its layers."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "drain", "drain", id="cluster.drain"),
        Binding("x", "remove", "remove", id="cluster.remove"),
        Binding("t", "token", "join token", id="cluster.token"),
        Binding("a", "add", "add", id="cluster.add"),
        Binding("v", "lend", "VRAM", id="cluster.lend"),
        Binding("V", "lend_reset", "reset VRAM", id="cluster.lend-reset", show=False),
        Binding("n", "rename", "name", id="cluster.name", show=False),
        Binding("space", "mark", "mark", id="cluster.mark", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._around = Surroundings()
        self._said: tuple[str, ...] = ()
        self._pane_wanted: bool | None = None  # None: where there is room beside the table
        self._asked_around = 0.0

    def body(self) -> ComposeResult:
        with Vertical(id="machines"):
            yield RunsView(id="alerts")
            with Horizontal(id="split"):
                with Vertical(id="left"):
                    yield RunsView(id="heading")
                    yield NodeTable()
                    yield RunsView(id="lesson")
                    yield FirstStart()
                with VerticalScroll(id="pane"):
                    yield RunsView(id="details")
            yield RunsView(id="recent")
            with Vertical(id="plan-strip"):
                yield PlanBar(id="strip")
                yield RunsView(id="legend")

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one(NodeTable).focus()
        self.query_one("#pane").can_focus = False
        self.host.submit(updates.LookAround())

    def main_focus(self) -> None:
        self.query_one(NodeTable).focus()

    # --- what is shown ---

    def take(self, update: Update) -> None:
        match update:
            case updates.Surroundings():
                self._around = update
            case updates.StartLine(line, over, _):
                self._said = () if over and not update.failed else (*self._said, line)[-SAID_MAX:]
                if update.failed:
                    self.query_one(FirstStart).failed(" ".join(self._said[-2:]).strip())
                    self._said = ()
                elif line:
                    self.query_one(FirstStart).failed("")
            case updates.ModelsFound():
                self.query_one(FirstStart).offer(update)
            case updates.TokenMade():
                self.app.push_screen(ShowToken(update))
            case updates.LentSet():
                self._lent(update)
            case updates.Linked(LinkState.UP):
                self.host.submit(updates.LookAround())
            case _:
                pass

    def rows(self, state: State) -> tuple[NodeRow, ...]:
        """Those that the filter lets through."""
        now = self.host.moment()
        if not self.wanted:
            return state.rows
        return tuple(
            row for row in state.rows
            if matches(self.wanted, row.view.name, row.view.device, row.view.address, row.state(now, live=state.live))
        )  # fmt: skip

    def present(self, state: State, now: float) -> None:
        moment = Moment(now, live=state.live, glyphs=self.host.glyphs)
        table, width = self.query_one(NodeTable), self.size.width
        first = state.link.state is LinkState.NONE and not self._said
        lesson = self._lesson(state, width)
        starting = self.query_one(FirstStart)
        if first and not starting.display:
            self.host.submit(updates.FindModels())
        starting.show(first)
        self._display("lesson", bool(lesson))
        self.query_one("#lesson", RunsView).set_lines(lesson)
        table.display = not lesson and not first
        self._display("heading", table.display)
        rows = self.rows(state)
        table.show(rows, moment)
        self.query_one("#heading", RunsView).set_lines([((table.heading(moment), "heading"),)])
        self._present_alerts(state, now)
        self._present_pane(table, moment)
        self._present_recent(state, len(rows) if table.display else None)
        self._present_plan(state, first=first)

    def _present_recent(self, state: State, machines: int | None) -> None:
        """What happened last, where machines and their second lines leave room. machines: None: no table is shown."""
        recent, width = self.query_one("#recent", RunsView), max(20, self.size.width - 4)
        spare = self.size.height - FRAME_LINES - 3 * machines if machines is not None else 0
        count = min(RECENT, len(state.events), spare)
        zone, glyphs = EventsScreen.zone, self.host.glyphs
        recent.display = count >= RECENT_LEAST
        recent.styles.height = count + 1
        lines = [event_line(event, width, zone, glyphs) for event in state.events[-count:]]
        recent.set_lines(lines if recent.display else [])

    def _display(self, name: str, shown: bool) -> None:
        self.query_one(f"#{name}").display = shown

    def _lesson(self, state: State, width: int) -> list[Runs]:
        glyphs = self.host.glyphs
        room = min(width - 4, 96)
        if state.link.state is LinkState.NONE and not self._said:
            return []
        if state.status is None or (state.link.state is LinkState.STARTING):
            return [(), *unattached(state, self.host.home_label, self._said, glyphs, room)]
        if not state.rows and state.live:
            lines = waiting(state, self._around, glyphs, room)
            if self._said:
                lines[1:1] = [((line, "muted"),) for line in text.wrapped(self._said[-1], room)]
            return [(), *lines]
        return []

    def _present_alerts(self, state: State, now: float) -> None:
        glyphs, width = self.host.glyphs, max(20, self.size.width - 4)
        found = [
            ((fit_line(f"{glyphs.alert} {text.clean(alert.text)}", width, glyphs.ellipsis), alert.severity),)
            for alert in alerts(state, now)
        ]
        if self._said and state.live and not repeated(state, self._said[-1]):
            found.append(((fit_line(self._said[-1], width, glyphs.ellipsis), "muted"),))
        if not self.query_one(NodeTable).display:
            found = []  # what takes the table's place says it
        more = len(found) - ALERTS_SHOWN
        shown: list[Runs] = list(found[:ALERTS_SHOWN])
        if more > 0:
            shown.append(((f"  and {more} more", "muted"),))
        view = self.query_one("#alerts", RunsView)
        view.styles.height = len(shown)
        view.display = bool(shown)
        view.set_lines(shown)

    def _present_pane(self, table: NodeTable, moment: Moment) -> None:
        row = table.chosen if table.display else None
        beside = self.has_class("-huge")
        shown = row is not None and (beside if self._pane_wanted is None else self._pane_wanted)
        self._display("pane", shown)
        if row is not None and shown:
            details = self.query_one("#details", RunsView)
            width = details.size.width or PANE - 4
            lines = detail_lines(row, moment, max(24, width))
            details.styles.height = len(lines)
            details.set_lines(lines)

    def _present_plan(self, state: State, *, first: bool) -> None:
        bar = self.query_one("#strip", PlanBar)
        strip = self.query_one("#plan-strip")
        status, width = state.status, self.size.width - 4
        stages = of_status(status, state.rows) if status is not None else ()
        roomy = len(stages) * MIN_CELLS <= width and geometry([one.layers for one in stages], width) is not None
        strip.display = not first and roomy and self.has_class("-tall")
        bar.show(stages, self.host.glyphs)
        self.query_one("#legend", RunsView).set_lines([legend(self.host.glyphs)])

    def as_toml(self) -> dict[str, object] | None:
        row = self.query_one(NodeTable).chosen
        if row is None:
            return None
        stages = [stage.model_dump(exclude_none=True) for stage in row.stages]
        return {"node": {**row.view.model_dump(exclude_none=True), "stages": stages}}

    # --- what can be done ---

    @on(NodeTable.Moved)
    def _moved(self) -> None:
        state, host = self.host.state, self.host
        self._present_pane(self.query_one(NodeTable), Moment(host.moment(), live=state.live, glyphs=host.glyphs))

    @on(NodeTable.Opened)
    def _opened(self) -> None:
        self._pane_wanted = not self.query_one("#pane").display
        self.show(self.host.state)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ACTIONS and self.host.state.link.state is LinkState.NONE:
            return False
        if action in ACTIONS:
            if not self.host.state.live or (self.host.readonly and action != "add"):
                return None
            if action not in ("token", "add") and self.query_one(NodeTable).chosen is None:
                return None
        return super().check_action(action, parameters)

    def picked(self) -> list[NodeRow]:
        """The marked machines that there are; without a mark the one at the cursor."""
        table = self.query_one(NodeTable)
        return table.marked or ([table.chosen] if table.chosen is not None else [])

    def action_mark(self) -> None:
        self.query_one(NodeTable).mark()
        self.show(self.host.state)

    def action_drain(self) -> None:
        rows = self.picked()
        drained = [row for row in rows if row.view.state == "drained"]
        if drained:
            for row in drained:
                self.host.submit(updates.Drain(row.id, undo=True))
            return
        if not rows:
            return
        names = named(rows)
        self.app.push_screen(
            Confirm(
                f"Drain {names}?",
                f"{'Their' if len(rows) > 1 else 'Its'} layers move to the other machines while streams run on; then "
                f"{'they' if len(rows) > 1 else 'it'} may leave. d once more undoes that.",
                "drain",
            ),
            lambda sure: self._drain(rows, names) if sure else None,
        )

    def _drain(self, rows: Sequence[NodeRow], names: str) -> None:
        self.host.tell(f"moving the layers of {names} to the others")
        for row in rows:
            self.host.submit(updates.Drain(row.id))
        self.query_one(NodeTable).unmark()

    def action_remove(self) -> None:
        rows, state = self.picked(), self.host.state
        if not rows:
            return
        names = named(rows)
        serves = state.serving and any(row.stages for row in rows)
        why = (
            f"{names} serve{'s' * (len(rows) == 1)} layers now: streams pause until they go on elsewhere. "
            if serves
            else ""
        ) + "What is removed is refused from now on; to let it in again, make a new token."
        typed = (names if len(rows) == 1 else "remove") if serves else ""
        self.app.push_screen(
            Confirm(f"Remove {names}?", why, "remove", typed=typed),
            lambda sure: self._remove(rows) if sure else None,
        )

    def _remove(self, rows: Sequence[NodeRow]) -> None:
        for row in rows:
            self.host.submit(updates.Remove(row.id))
        self.query_one(NodeTable).unmark()

    def action_lend(self) -> None:
        if rows := [row.view for row in self.picked() if not row.gone]:
            self.app.push_screen(Lend(rows))

    def action_lend_reset(self) -> None:
        """Back to what machines were started with."""
        rows = [row for row in self.picked() if row.view.override]
        if not rows:
            self.host.tell("nothing is overridden there")
        for row in rows:
            self.host.submit(updates.SetLent(row.id, ""))

    def _lent(self, told: updates.LentSet) -> None:
        """What became of an override: a refusal opens the window that can do something about it."""
        view = told.view
        if view is not None:
            how = f", as set: {text.override(view.override)}" if view.override else ""
            moved = "; layers were moved" if view.replanned else ""
            self.host.tell(f"{text.clean(view.node)} lends {text.gib(view.effective_vram_gib)} GiB{how}{moved}")
        if isinstance(self.app.screen, Lend) and self.app.screen.answered(told):
            return
        if view is None:
            row = self.host.state.row(told.asked.node)
            if row is not None and isinstance(self.app.screen, AppScreen):
                self.app.push_screen(Lend([row.view], told))
            else:
                self.host.tell(told.problem, "error")

    def action_rename(self) -> None:
        """Of the one at the cursor: two machines have no name in common."""
        row = self.query_one(NodeTable).chosen
        if row is None or row.gone:
            return

        def named(name: str | None) -> None:
            if name is not None:
                self.host.submit(updates.NameNode(row.id, name))

        self.app.push_screen(NameMachine(row.view.name), named)

    def action_token(self) -> None:
        self.host.submit(updates.MakeToken())

    def action_add(self) -> None:
        self.app.push_screen(AddMachine(self._around))


def repeated(state: State, said: str) -> bool:
    """Whether an alert says already what a starting engine says."""
    reason = state.status.reason if state.status is not None else ""
    return bool(reason) and reason in said


def named(rows: Sequence[NodeRow]) -> str:
    """A few machines by their names, many by their number."""
    names = [text.clean(row.view.name) for row in rows]
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} machines"


def fit_line(line: str, width: int, ellipsis: str) -> str:
    return text.fit(line, width, ellipsis=ellipsis).rstrip()
