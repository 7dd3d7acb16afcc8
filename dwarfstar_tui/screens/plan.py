"""Plan: which machine has which layers, how full it is, where the time goes, and how that is changed.

Edits are made to an :class:`~dwarfstar_tui.plan_editor.Editor`; this screen turns keys and the mouse into edits, asks
the engine about each new draft, and shows what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll

from dwarfstar_engine.views import PlanRequest
from dwarfstar_tui import plan_draft, plan_editor, plan_panel, text, updates
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.plan_draft import FAR, Draft, Objective, Strategy
from dwarfstar_tui.plan_editor import TYPED_MAX, Editor
from dwarfstar_tui.plan_lines import (
    Shown,
    geometry,
    in_order,
    legend,
    of_plan,
    of_status,
    sketched,
    summary,
    table_lines,
    titled,
)
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.screens.dialogs import Confirm
from dwarfstar_tui.screens.plan_dialogs import Alternatives, Difference, Machines, TryContext
from dwarfstar_tui.store import State
from dwarfstar_tui.updates import PlanChanged, Proposed, Update
from dwarfstar_tui.widgets.plan_bar import PlanBar
from dwarfstar_tui.widgets.runs_view import RunsView

SEVERAL = "Several pipelines run, and one alone can be drafted here: `dwarfstar plan --take split` makes them one."
LOOK_S = 10.0  # between two looks at what serves, while nothing has changed: links are measured again
BAR_WIDTH = 80  # of the screen; narrower ones have steppers
MIN_CELLS = 5  # of a stage; narrower ones say nothing
TALL_LINES = 36  # of the screen; higher ones have the alternatives in sight
ROOMY_LINES = 30  # of the screen; lower ones show the draft instead of what is said of the plan that serves
CONTEXT = (16, 1 << 20)  # tokens of a request that can be asked about, as an engine has them
STALE_CODE = "stale_epoch"
EDITS = frozenset({
    "step", "far", "limit", "boundary", "digit", "type", "erase", "own", "alternatives", "machines", "pin", "exclude",
    "strategy", "objective", "context", "wire", "back", "forth", "done",
})  # fmt: skip


class PlanScreen(AppScreen):
    NAME = "plan"
    LESSON = (
        "One bar for all layers, each stage as wide as its layers; in it, the memory its machine lends: █ weights, ▓ "
        "KV cache, ▒ compute reserve, ░ free. ▲ marks the bottleneck. Moving a boundary makes a draft: nothing changes "
        "until enter, which shows the difference and asks. In a draft digits are a layer; tab goes to the next screen."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "step(-1)", "move", id="plan.less"),
        Binding("right,l", "step(1)", "move", id="plan.more", show=False),
        Binding("shift+left", "step(-5)", "five", id="plan.five-less", show=False),
        Binding("shift+right", "step(5)", "five", id="plan.five-more", show=False),
        Binding("home", "limit(-1)", "as far left as it fits", id="plan.first", show=False),
        Binding("end", "limit(1)", "as far right as it fits", id="plan.last", show=False),
        Binding("left_square_bracket", "boundary(-1)", "boundary before", id="plan.previous", show=False),
        Binding("right_square_bracket", "boundary(1)", "next boundary", id="plan.next", show=False),
        *(Binding(digit, f"digit('{digit}')", "layer", id="plan.digit", show=False) for digit in "0123456789"),
        Binding("equals_sign", "type", "type a layer", id="plan.type", show=False),
        Binding("backspace", "erase", "erase", id="plan.erase", show=False),
        Binding("up,k", "stage(-1)", "stage before", id="plan.up", show=False),
        Binding("down,j", "stage(1)", "next stage", id="plan.down", show=False),
        Binding("enter", "done", "carry out", id="plan.commit"),
        Binding("u", "back", "undo", id="plan.undo"),
        Binding("U", "forth", "redo", id="plan.redo", show=False),
        Binding("a", "own", "planner's", id="plan.auto"),
        Binding("A", "alternatives", "others", id="plan.alternatives"),
        Binding("P", "pin", "pin", id="plan.pin"),
        Binding("x", "exclude", "exclude", id="plan.exclude"),
        Binding("n", "machines", "machines", id="plan.machines", show=False),
        Binding("s", "strategy", "strategy", id="plan.strategy", show=False),
        Binding("o", "objective", "objective", id="plan.objective", show=False),
        Binding("c", "context", "what if: context", id="plan.context", show=False),
        Binding("w", "wire", "what if: wire", id="plan.wire", show=False),
        Binding("pageup", "page(-1)", "page up", id="plan.page-up", show=False),
        Binding("pagedown", "page(1)", "page down", id="plan.page-down", show=False),
        Binding("tab", "next_screen", "next screen", id="plan.next-screen", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._editor = Editor()
        self._typing = self._dragging = False
        self._asked: tuple[object, ...] = ()
        self._asked_at = 0.0

    def body(self) -> ComposeResult:
        with VerticalScroll(id="plan-body", can_focus=False):
            yield RunsView(id="plan-summary")
            yield PlanBar(id="bar", editable=True)
            yield RunsView(id="steppers")
            yield RunsView(id="plan-legend")
            yield RunsView(id="plan-panel")
            yield RunsView(id="plan-table")
            yield RunsView(id="plan-advice")
            yield RunsView(id="plan-others")

    @property
    def editor(self) -> Editor:
        return self._editor

    # --- what is shown ---

    def stages(self, state: State) -> tuple[Shown, ...]:
        """As they are drawn: the draft's, or what serves."""
        editor, status = self._editor, state.status
        if status is not None and len(status.chains()) > 1:
            return ()
        plan = editor.shown
        served = status is not None and bool(status.stages)
        if editor.draft is not None and plan is not None:
            return of_plan(plan, status, editor.draft.pins) if editor.settled else sketched(editor.draft, plan)
        runs = {(stage.node, stage.layers) for stage in status.stages} if status is not None else set()
        if plan is not None and runs == {(stage.node, stage.layers) for stage in plan.stages}:
            base = editor.base
            return of_plan(plan, status, base.pins if base is not None else ())
        return of_status(status, state.rows) if status is not None and served else ()

    def present(self, state: State, now: float) -> None:
        self._ask(state, now)
        glyphs, status, editor = self.host.glyphs, state.status, self._editor
        width = max(20, self.query_one("#plan-body").scrollable_content_region.width)
        stages = self.stages(state)
        planned = editor.told is not None and editor.told.present is not None
        top: list[Runs] = []
        several = status is not None and len(status.chains()) > 1
        if status is not None and status.stages:
            current = editor.told is not None and editor.told.epoch == status.epoch
            plan = editor.told.present if editor.told is not None and current else None
            if several:
                top = titled(status, lambda chain: summary(chain, None, width, glyphs, owner=False))
                top.append(((SEVERAL, "muted"),))
            else:
                top = summary(status, plan, width, glyphs, owner=bool(editor.told and editor.told.owner))
            loading = [stage for stage in status.stages if stage.state == "loading"]
            if loading and editor.committing_at is None:
                names = ", ".join(text.clean(stage.node) for stage in loading)
                top.append(((f"loading on {names}", "late"),))
        else:
            reason = status.reason if status is not None else "no engine is attached"
            top = [(("No plan runs.", "name"),), ((text.clean(reason), "muted"),)]
        short, drafting = self.has_class("-short"), editor.draft is not None or editor.committing_at is not None
        self._lines("plan-summary", [] if drafting and self.size.height < ROOMY_LINES else top)
        if several and status is not None:
            self.query_one("#bar", PlanBar).show_several(status, state.rows, glyphs)
        else:
            self._present_bar(stages, width)
        pins = any(stage.pinned for stage in stages)
        shown = bool(stages) and not (short and self.size.width < BAR_WIDTH)
        self._lines("plan-legend", [legend(glyphs, compute=planned, pins=pins)] if shown else [])
        rates = plan_panel.load_rates(state.events, status) if status is not None else {}
        panel = plan_panel.panel(editor, status, stages, rates, width, glyphs, now) if status is not None else []
        if not panel and editor.problem and planned is False and state.live:
            panel = [((line, "muted"),) for line in text.wrapped(text.clean(editor.problem), width)]
        self._lines("plan-panel", panel)
        table = table_lines(stages, width, glyphs, predicted=planned) if stages else []
        if several and status is not None:
            table = titled(
                status, lambda chain: table_lines(of_status(chain, state.rows), width, glyphs, predicted=False)
            )
        self._lines("plan-table", table, editor.stage + 1 if stages else None)
        wide = self.size.width >= BAR_WIDTH
        own = editor.told.present if editor.told is not None and wide and not drafting else None
        warnings = status.warnings if status is not None and not drafting else ()
        self._lines("plan-advice", plan_panel.advice_lines(own, warnings, width, glyphs))
        sight = own if self.size.height >= TALL_LINES else None
        self._lines("plan-others", plan_panel.other_lines(sight, width, glyphs) if sight is not None else [])

    def _present_bar(self, stages: tuple[Shown, ...], width: int) -> None:
        """The bar where there is room for names in it, else steppers."""
        glyphs, bar = self.host.glyphs, self.query_one("#bar", PlanBar)
        chosen = self._editor.boundary if self._editor.base is not None and len(stages) > 1 else None
        roomy = self.size.width >= BAR_WIDTH and len(stages) * MIN_CELLS <= width
        bar.display = roomy and geometry([stage.layers for stage in stages], width) is not None
        bar.show(stages, glyphs, chosen)
        steppers = [] if bar.display else plan_panel.stepper_lines(stages, self._editor.boundary, width, glyphs)
        self._lines("steppers", steppers)

    def _lines(self, name: str, lines: list[Runs], cursor: int | None = None) -> None:
        view = self.query_one(f"#{name}", RunsView)
        view.display = bool(lines)
        view.styles.height = len(lines)
        view.set_lines(lines, cursor)

    def on_screen_resume(self) -> None:
        super().on_screen_resume()
        self._asked = ()

    # --- the engine ---

    def _ask(self, state: State, now: float) -> None:
        """Ask about the draft, or what serves, when that may be another than what was asked about."""
        editor, status = self._editor, state.status
        if status is not None and len(status.chains()) > 1:
            self._editor, self._asked = Editor(), ()
            return
        if not state.live or status is None or status.model is None:
            self._asked = ()
            return
        nodes = tuple((node.name, node.state, node.effective_vram_gib) for node in status.nodes)
        key = (editor.number, status.epoch, status.state, status.coordinator.term, nodes)
        if key == self._asked and now - self._asked_at < LOOK_S:
            return
        self._asked, self._asked_at = key, now
        request = editor.draft.request() if editor.draft is not None else PlanRequest()
        self.host.submit(updates.Propose(editor.number, request))

    def take(self, update: Update) -> None:
        match update:
            case Proposed(number, view, problem):
                self._editor = plan_editor.took(self._editor, number, view, problem)
            case PlanChanged(view, undone, problem, code):
                self._editor = plan_editor.ended(self._editor, view, problem, undone=undone)
                self._asked = ()
                if view is None and code != STALE_CODE:
                    self.host.tell(problem, "error")
            case _:
                return
        if self.is_current:
            self.show(self.host.state)

    # --- edits ---

    def _set(self, editor: Editor) -> None:
        self._editor = editor
        self.show(self.host.state)
        self.refresh_bindings()

    def _edit(self, change: Callable[[Draft], Draft], *, note: str = "", dragging: bool = False) -> None:
        self._typing = False
        self._set(plan_editor.edited(self._editor, change, note=note, dragging=dragging))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        editor = self._editor
        if action in ("digit", "erase") and editor.draft is None and not self._typing:
            return False
        if action in EDITS and (editor.base is None or editor.committing_at is not None):
            return None
        if action == "done":
            return True if editor.draft is not None or editor.typed else None
        return super().check_action(action, parameters)

    def _move(self, change: Callable[[Draft, int], Draft], *, dragging: bool = False) -> None:
        base, at = self._editor.base, self._editor.boundary
        if base is None or not base.cuts:
            self.host.tell("there is one stage, and so no boundary")
            return
        self._edit(lambda draft: change(draft, at), note=plan_draft.held(base, at), dragging=dragging)

    def action_step(self, by: int) -> None:
        self._move(lambda draft, at: plan_draft.stepped(draft, at, by))

    def action_limit(self, way: int) -> None:
        """As far as layers go; the planner's answer is as far as they fit."""
        self._move(lambda draft, at: plan_draft.stepped(draft, at, way * FAR))

    def action_boundary(self, by: int) -> None:
        base = self._editor.base
        if base is not None and base.cuts:
            at = (self._editor.boundary + by) % len(base.cuts)
            self._set(replace(self._editor, boundary=at, typed=""))

    def action_stage(self, by: int) -> None:
        count = len(self.stages(self.host.state))
        self._choose_stage(max(0, min(count - 1, self._editor.stage + by)))

    def _choose_stage(self, at: int) -> None:
        self._set(replace(self._editor, stage=max(0, at)))

    def action_type(self) -> None:
        self._typing = True
        self.host.tell("type a layer, then enter")

    def action_digit(self, digit: str) -> None:
        typed = (self._editor.typed + digit)[:TYPED_MAX]
        self._set(replace(self._editor, typed=typed))

    def action_erase(self) -> None:
        self._set(replace(self._editor, typed=self._editor.typed[:-1]))

    def action_own(self) -> None:
        self._edit(plan_draft.by_planner)

    def _stage_name(self) -> str | None:
        base = self._editor.base
        return base.nodes[self._editor.stage] if base is not None and self._editor.stage < len(base.nodes) else None

    def action_pin(self) -> None:
        if (name := self._stage_name()) is not None:
            self._edit(lambda draft: plan_draft.pinned(draft, name))

    def action_exclude(self) -> None:
        if (name := self._stage_name()) is not None:
            self._edit(lambda draft: plan_draft.excluding(draft, name))

    def action_strategy(self) -> None:
        shown = self._editor.draft.strategy if self._editor.draft is not None else None
        now = shown or (self._editor.shown.strategy if self._editor.shown is not None else "")
        other: Strategy = "fastest" if now == "proportional" else "proportional"
        self._edit(lambda draft: plan_draft.wishing(draft, strategy=other))

    def action_objective(self) -> None:
        shown = self._editor.draft.objective if self._editor.draft is not None else None
        now = shown or (self._editor.shown.objective if self._editor.shown is not None else "")
        other: Objective = "single" if now == "throughput" else "throughput"
        self._edit(lambda draft: plan_draft.wishing(draft, strategy="fastest", objective=other))

    def action_wire(self) -> None:
        self._edit(plan_draft.with_next_wire)

    def action_context(self) -> None:
        plan = self._editor.shown

        def chosen(typed: str | None) -> None:
            if typed is None:
                return
            if typed and not (typed.isdecimal() and CONTEXT[0] <= int(typed) <= CONTEXT[1]):
                self.host.tell(f"a request has {CONTEXT[0]} to {CONTEXT[1]} tokens", "warning")
                return
            self._edit(lambda draft: plan_draft.with_context(draft, int(typed) if typed else None))

        if plan is not None:
            self.app.push_screen(TryContext(plan.context), chosen)

    def action_alternatives(self) -> None:
        plan = self._editor.told.present if self._editor.told is not None else None
        if plan is None or not plan.alternatives:
            self.host.tell("the planner knows no other way for these machines")
            return
        found = plan.alternatives

        def chosen(index: int | None) -> None:
            if index is not None:
                self._edit(lambda draft: plan_draft.taking(draft, found[index]))

        self.app.push_screen(Alternatives(found, plan.take), chosen)

    def action_machines(self) -> None:
        base, status = self._editor.base, self.host.state.status
        if base is None or status is None:
            return
        names = [node.name for node in status.nodes if node.state in ("joined", "late")]

        def chosen(name: str | None) -> None:
            if name is not None:
                self._edit(lambda draft: plan_draft.excluding(draft, name))

        self.app.push_screen(Machines(names, base.nodes, base.excluded), chosen)

    def action_page(self, way: int) -> None:
        body = self.query_one("#plan-body", VerticalScroll)
        body.scroll_relative(y=way * max(1, body.size.height - 2), animate=False)

    def action_next_screen(self) -> None:
        self.host.go("chat")

    # --- undo, redo, commit ---

    def escape(self) -> bool:
        editor = self._editor
        if editor.typed or self._typing:
            self._typing = False
            self._set(replace(editor, typed=""))
            return True
        if editor.draft is None or editor.committing_at is not None:
            return False
        self._set(plan_editor.discarded(editor))
        return True

    def action_back(self) -> None:
        editor = self._editor
        if editor.past:
            self._set(plan_editor.back(editor))
        elif editor.told is not None and editor.told.undo and editor.draft is None:
            if self._refused():
                return
            why = "The plan before the last change is loaded beside what serves; U carries this one out again."
            self.app.push_screen(Confirm("Go back to the plan before?", why, "go back"), self._undo)
        else:
            self.host.tell("there is nothing to undo")

    def _undo(self, sure: bool | None) -> None:
        if sure:
            self._set(plan_editor.begun(self._editor, self.host.moment()))
            self.host.submit(updates.UndoPlan())

    def action_forth(self) -> None:
        editor = self._editor
        if editor.future:
            self._set(plan_editor.forth(editor))
        elif editor.taken_back is not None:
            self._set(plan_editor.again(editor))
        else:
            self.host.tell("there is nothing to redo")

    def action_done(self) -> None:
        editor = self._editor
        if editor.typed:
            layer = int(editor.typed)
            self._move(lambda draft, at: plan_draft.moved(draft, at, layer))
            return
        answer = editor.answer
        if editor.draft is None or self._refused():
            return
        if editor.stale or editor.problem:
            self.host.tell(editor.stale or editor.problem, "warning")
        elif options := editor.draft.start_options:
            self.host.tell(f"that is set when an engine starts: dwarfstar MODEL {options}", "warning")
        elif answer is None or answer.proposed is None:
            self.host.tell("the planner has not answered yet")
        elif not plan_draft.changes(editor.draft, answer):
            self.host.tell("it is the plan that runs")
        else:
            state = self.host.state
            rates = plan_panel.load_rates(state.events, state.status) if state.status is not None else {}
            self.app.push_screen(Difference(answer, rates), self._commit)

    def _refused(self) -> bool:
        if self.host.readonly:
            self.host.tell("read-only: nothing is changed", "warning")
        return self.host.readonly

    def _commit(self, sure: bool | None) -> None:
        editor = self._editor
        if not sure or editor.draft is None or editor.answer is None:
            return
        request = editor.draft.request()
        self._set(plan_editor.begun(editor, self.host.moment()))
        self.host.submit(updates.CommitPlan(request, editor.answer.epoch))

    # --- the mouse ---

    @on(PlanBar.Chosen)
    def _chosen_in_bar(self, event: PlanBar.Chosen) -> None:
        if event.boundary is not None:
            self._set(replace(self._editor, boundary=event.boundary))
        elif event.stage is not None:
            self._choose_stage(event.stage)

    @on(PlanBar.Dragged)
    def _dragged(self, event: PlanBar.Dragged) -> None:
        """All of one drag is one edit, from the first legal cut that it reaches."""
        if self._editor.base is None or self._editor.committing_at is not None:
            return
        self._editor = replace(self._editor, boundary=event.boundary)
        self._dragging = self._dragging and not event.first
        before = self._editor.number
        self._move(lambda draft, at: plan_draft.moved(draft, at, event.layer), dragging=self._dragging)
        self._dragging = self._dragging or self._editor.number != before

    @on(RunsView.Pointed, "#plan-table")
    def _pointed_table(self, event: RunsView.Pointed) -> None:
        self._choose_stage(event.line - 1)

    @on(RunsView.Pointed, "#steppers")
    def _pointed_stepper(self, event: RunsView.Pointed) -> None:
        """On an arrow: a step; else the boundary is chosen."""
        self._set(replace(self._editor, boundary=event.line))
        less, more = plan_panel.stepper_places(event.view.size.width)
        if self._editor.committing_at is None and min(abs(event.x - less), abs(event.x - more)) <= 1:
            self.action_step(-1 if abs(event.x - less) <= 1 else 1)

    def as_toml(self) -> dict[str, object] | None:
        status = self.host.state.status
        stages = self.stages(self.host.state)
        if status is None or not status.stages:
            return None
        told: list[dict[str, object]] = [{"node": stage.node, "layers": list(stage.layers)} for stage in stages] or [
            {"node": stage.node, "layers": list(stage.layers), "pipeline": stage.pipeline} for stage in in_order(status)
        ]
        model = status.model.name if status.model is not None else ""
        return {
            "plan": {"model": model, "epoch": status.epoch, "draft": self._editor.draft is not None, "stages": told}
        }
