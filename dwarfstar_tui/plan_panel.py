"""What the Plan screen says about a draft: both sides of a boundary, what is predicted, loaded and clamped. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dwarfstar_engine.plan.planner import rate
from dwarfstar_engine.views import AlternativeView, CommitView, DeltaView, EventView, PlanView, ProposalView, StatusView
from dwarfstar_tui import plan_draft, text
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.plan_editor import Editor
from dwarfstar_tui.plan_lines import Shown
from dwarfstar_tui.text import Glyphs

GIB_S = 1.0  # layers are taken to load so fast where it was never seen: a middling disk
OTHERS = 6  # alternatives that are listed
LEAST_S = 0.1  # of a load: times of events are no finer
KINDS = {"single": "one machine", "replicas": "replicas", "split": "the split", "pipelines": "pipelines"}


def load_rates(events: Sequence[EventView], status: StatusView) -> dict[str, float]:
    """GiB a second at which each machine has loaded the stage that it runs."""
    began: dict[tuple[str, object], float] = {}
    took: dict[tuple[str, object], float] = {}
    for event in events:
        key = (event.node, event.details.get("epoch"))
        if event.kind == "stage_loading":
            began[key] = event.time_s
        elif event.kind == "stage_ready" and key in began:
            took[key] = max(LEAST_S, event.time_s - began[key])
    weights = {stage.node: stage.weights_gib for stage in status.stages}
    return {node: weights[node] / s for (node, epoch), s in took.items() if epoch == status.epoch and node in weights}


def load_s(delta: Sequence[DeltaView], plan: PlanView, rates: Mapping[str, float]) -> float:
    """About how long a change loads. Machines load at the same time, and a slice that changed is loaded whole."""
    usual = min(rates.values(), default=GIB_S)
    changed = {one.node for one in delta if one.load or one.drop}
    times = [
        stage.memory_gib.weights / (rates.get(stage.node) or usual) for stage in plan.stages if stage.node in changed
    ]
    return max(times, default=0.0)


def about(seconds: float) -> str:
    """A duration that is no promise."""
    if seconds < 1:
        return "under a second"
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


def ranges(found: Sequence[tuple[int, int]], dash: str) -> str:
    return ", ".join(f"{a}{dash}{b - 1}" if b - a > 1 else str(a) for a, b in found)


# --- the panel ---


def panel(editor: Editor, status: StatusView, stages: Sequence[Shown], rates: Mapping[str, float], width: int,
          glyphs: Glyphs, now: float) -> list[Runs]:  # fmt: skip
    """Everything about the draft, or what became of the last one."""
    if editor.committing_at is not None:
        return _progress(editor, status, width, glyphs, now)
    lines: list[Runs] = []
    if editor.draft is not None:
        lines += _title(editor, width, glyphs)
        lines += _sides(editor, stages, width, glyphs)
        lines += _predicted(editor, rates, width, glyphs)
    elif editor.done is not None:
        lines += _done(editor.done, status, width, glyphs)
    if editor.note:
        lines += _said(f"{glyphs.alert} {editor.note}", width, glyphs, "late")
    if editor.typed:
        lines.append(((f"to layer {editor.typed}_  enter", "key"),))
    return lines


def _said(words: str, width: int, glyphs: Glyphs, role: str) -> list[Runs]:
    words = text.clean(words)
    if glyphs is text.ASCII:
        words = text.spelled(words, ascii_only=True)
    return [((line, role),) for line in text.wrapped(words, width)]


def _title(editor: Editor, width: int, glyphs: Glyphs) -> list[Runs]:
    draft = editor.draft
    assert draft is not None
    found = [f"based on epoch {draft.base_epoch}"]
    if draft.strategy or draft.objective:
        found.append(" ".join(word for word in (draft.strategy, draft.objective) if word))
    if draft.context is not None:
        context = editor.answer.proposed.context if editor.answer and editor.answer.proposed else draft.context
        found.append(f"context {context}")
    if draft.wire is not None:
        found.append(f"wire {draft.wire}")
    if draft.planner:
        found.append("cut by the planner")
    if draft.excluded:
        found.append(f"without {', '.join(sorted(draft.excluded))}")
    line = text.fit(f" {glyphs.dot} ".join(map(text.clean, found)), width - 8, ellipsis=glyphs.ellipsis).rstrip()
    return [((" DRAFT ", "badge"), (f" {line}", "muted"))]


def _sides(editor: Editor, stages: Sequence[Shown], width: int, glyphs: Glyphs) -> list[Runs]:
    """The boundary that keys move, and how full both sides are."""
    draft, at = editor.draft, editor.boundary
    assert draft is not None
    if not draft.cuts or len(stages) != len(draft.nodes):
        return []
    base = plan_draft.begun(editor.told) if editor.told is not None else None
    was = ""
    if base is not None and base.nodes == draft.nodes and base.cuts[at] != draft.cuts[at]:
        was = f", was {base.cuts[at]}"
    left, right = stages[at], stages[at + 1]
    first = f"boundary {at + 1} of {len(draft.cuts)} at layer {draft.cuts[at]}{was}"
    lines = _said(first, width, glyphs, "name")
    sides = []
    for stage in (left, right):
        rough = glyphs.about if stage.rough else ""
        room = f"{rough}{text.gib(stage.used)} of {text.gib(stage.lent)} GiB, {text.gib(stage.free)} free"
        sides.append((f"{stage.node}: {room}", "lost" if stage.free < 0 else "plain"))
    for words, role in sides:
        lines += _said(words, width, glyphs, role)
    return lines


def _predicted(editor: Editor, rates: Mapping[str, float], width: int, glyphs: Glyphs) -> list[Runs]:
    if editor.stale:
        return _said(f"{glyphs.alert} stale: {editor.stale}. esc discards it", width, glyphs, "lost")
    if editor.problem:
        return _said(f"{glyphs.alert} {editor.problem}", width, glyphs, "lost") + _what_if(editor, width, glyphs)
    told, plan = editor.answer, editor.answer.proposed if editor.answer is not None else None
    if told is None or plan is None:
        return [((f"asking the planner {glyphs.ellipsis}", "muted"),)]
    lines = _said(speeds(told.present, plan, glyphs), width, glyphs, "name")
    if what_if := _what_if(editor, width, glyphs):
        return lines + _clamped(editor, told, width, glyphs) + what_if
    loads = [one for one in told.delta if one.load]
    if loads:
        each = ", ".join(f"{one.node} {ranges(one.load, glyphs.dash)} ({text.gib(one.load_gib)} GiB)" for one in loads)
        lines += _said(f"loads {each}: {about(load_s(told.delta, plan, rates))}", width, glyphs, "plain")
    elif any(one.drop for one in told.delta):
        lines += _said("loads nothing: layers are only given up", width, glyphs, "plain")
    waits = [one.node for one in told.delta if one.beside_gib < 0 and (one.load or one.drop)]
    if waits:
        words = f"{glyphs.alert} streams wait meanwhile: no room for old and new on {', '.join(waits)}"
        lines += _said(words, width, glyphs, "late")
    return lines + _clamped(editor, told, width, glyphs)


def _what_if(editor: Editor, width: int, glyphs: Glyphs) -> list[Runs]:
    """What a draft takes for granted that no plan can change; nothing: nothing of the kind."""
    options = editor.draft.start_options if editor.draft is not None else ""
    words = (
        f"{glyphs.alert} what if: an engine is started with {options}. esc takes it back, a asks the planner for cuts"
    )
    return _said(words, width, glyphs, "late") if options else []


def _clamped(editor: Editor, told: ProposalView, width: int, glyphs: Glyphs) -> list[Runs]:
    lines: list[Runs] = []
    for sentence in told.clamped or editor.clamped:
        lines += _said(f"{glyphs.alert} {sentence}", width, glyphs, "late")
    return lines


def speeds(before: PlanView | None, after: PlanView, glyphs: Glyphs) -> str:
    """Predicted tok/s, before and after."""
    then = after.predicted
    if before is None:
        return f"one stream {rate(then.single_tok_s)} tok/s, all {rate(then.aggregate_tok_s)} tok/s"
    now, arrow = before.predicted, glyphs.arrow
    return (
        f"one stream {rate(now.single_tok_s)} {arrow} {rate(then.single_tok_s)} tok/s, "
        f"all {rate(now.aggregate_tok_s)} {arrow} {rate(then.aggregate_tok_s)} tok/s"
    )


def _progress(editor: Editor, status: StatusView, width: int, glyphs: Glyphs, now: float) -> list[Runs]:
    assert editor.committing_at is not None
    lines: list[Runs] = [
        ((" CHANGING ", "badge"), (f" for {text.age(now - editor.committing_at)}; streams go on", "muted"))
    ]
    moving = [(stage.node, stage.state, stage.layers) for stage in status.stages if stage.state != "ready"]
    moving += [(copy.node, copy.state, copy.layers) for copy in status.standbys if copy.state == "loading"]
    for node, state, layers in moving:
        words = f"{glyphs.late} {node} is {state}: layers {text.layers(*layers, glyphs.dash)}"
        lines += _said(words, width, glyphs, "late")
    if not moving:
        lines += _said("layers are loaded beside those that serve", width, glyphs, "muted")
    return lines


def _done(done: CommitView, status: StatusView, width: int, glyphs: Glyphs) -> list[Runs]:
    """What a change has brought: predicted beside measured."""
    live, plan = status.throughput, done.after.predicted
    how = "" if done.loaded_first else "; streams waited while it loaded"
    lines = _said(f"{glyphs.ok} epoch {done.epoch} serves{how}", width, glyphs, "ok")
    lines += _said(speeds(done.before, done.after, glyphs), width, glyphs, "plain")
    if status.epoch == done.epoch and live.tok_s:
        wanted = plan.single_tok_s if live.active <= 1 else plan.aggregate_tok_s
        kind = "one stream" if live.active <= 1 else f"{live.active} streams"
        words = f"measured now {rate(live.tok_s)} tok/s of {kind}, predicted {rate(wanted)}"
        lines += _said(words, width, glyphs, "plain")
    else:
        lines += _said("nothing is measured of it yet: ask it something (3)", width, glyphs, "muted")
    return lines


# --- steppers, where there is no room for a bar ---


def stepper_lines(stages: Sequence[Shown], chosen: int, width: int, glyphs: Glyphs) -> list[Runs]:
    """A line for each boundary: the machines on both sides, and what is free there."""
    lines: list[Runs] = []
    for index in range(len(stages) - 1):
        left, right = stages[index], stages[index + 1]
        at = f" {glyphs.less} {left.layers[1]:>4} {glyphs.more} "
        room = max(8, (width - len(at) - 2) // 2 - 7)
        mark = glyphs.cursor if index == chosen else " "
        role = "key" if index == chosen else "plain"
        lines.append(
            ((f"{mark} ", "key"), (_side(left, room, glyphs), _role(left)), (at, role),
             (_side(right, room, glyphs), _role(right)))
        )  # fmt: skip
    return lines


def stepper_places(width: int) -> tuple[int, int]:
    """Cells of the two arrows of a stepper."""
    room = max(8, (width - 10 - 2) // 2 - 7)
    begin = 2 + room + 7
    return begin + 1, begin + 8


def _side(stage: Shown, room: int, glyphs: Glyphs) -> str:
    marks = (glyphs.bottleneck if stage.slow else "") + (glyphs.pin if stage.pinned else "")
    return f"{text.fit(marks + text.clean(stage.node), room, ellipsis=glyphs.ellipsis)} {text.gib(stage.free):>6}"


def _role(stage: Shown) -> str:
    return "lost" if stage.free < 0 else "slowest" if stage.slow else "plain"


# --- questions ---


def difference(told: ProposalView, rates: Mapping[str, float], width: int, glyphs: Glyphs) -> list[Runs]:
    """What is asked before a draft is carried out: each machine's layers before and after, and what that costs."""
    before, after = told.present, told.proposed
    assert after is not None
    had = {stage.node: stage.layers for stage in before.stages} if before is not None else {}
    gets = {stage.node: stage.layers for stage in after.stages}
    delta = {one.node: one for one in told.delta}
    lines: list[Runs] = []
    name = max(8, min(20, width - 40))
    unit = " GiB" * (width >= name + 44)
    heads = f"{'machine':{name}} {'was':>8} {'becomes':>8} {'loads':>7}{'drops':>7}{'left':>7}"
    lines.append(((heads + unit, "heading"),))
    for node in dict.fromkeys([*gets, *had]):
        one, was, then = delta.get(node), had.get(node), gets.get(node)
        cells = [text.layers(*span, glyphs.dash) if span else glyphs.unknown for span in (was, then)]
        figures = [one.load_gib, one.drop_gib, one.headroom_gib] if one else [0.0, 0.0, 0.0]
        shown = text.fit(text.clean(node), name, ellipsis=glyphs.ellipsis)
        words = f"{shown} {cells[0]:>8} {cells[1]:>8} " + "".join(
            f"{text.gib(figure or None, glyphs.unknown):>7}" for figure in figures
        )
        lines.append(((words, "plain" if was == then else "name"),))
    lines.append(())
    lines += _said(speeds(before, after, glyphs), width, glyphs, "name")
    lines += _said(f"bottleneck: {after.bottleneck}", width, glyphs, "plain")
    lines += _said(f"loading takes {about(load_s(told.delta, after, rates))}", width, glyphs, "plain")
    waits = [one.node for one in told.delta if one.beside_gib < 0 and (one.load or one.drop)]
    words = (
        f"{glyphs.alert} streams wait while {', '.join(waits)} loads: there is no room for old and new"
        if waits
        else "streams go on while it loads, and pause for the switch only"
    )
    return [*lines, *_said(words, width, glyphs, "late" if waits else "muted")]


def advice_lines(plan: PlanView | None, warnings: Sequence[str], width: int, glyphs: Glyphs) -> list[Runs]:
    """Whether to split at all, and what the engine warns of: that layers should move, among others."""
    lines = _said(f"{glyphs.arrow} {plan.advice}", width, glyphs, "muted") if plan is not None and plan.advice else []
    for sentence in warnings:
        lines += _said(f"{glyphs.alert} {sentence}", width, glyphs, "late")
    return lines


def other_lines(plan: PlanView, width: int, glyphs: Glyphs) -> list[Runs]:
    """The advisor's alternatives, for where there is room to have them in sight."""
    if len(plan.alternatives) < 2:
        return []  # it is what is advised
    found: list[Runs] = [((text.fit("ways to use these machines  (A makes one the draft)", width), "heading"),)]
    for one in plan.alternatives[:OTHERS]:
        mark = glyphs.arrow if one.kind == plan.take else " "
        words = f"{mark} {alternative_line(one, glyphs)}"
        if glyphs is text.ASCII:
            words = text.spelled(words, ascii_only=True)
        found.append(((text.fit(words, width, ellipsis=glyphs.ellipsis).rstrip(), "muted"),))
    return found


def alternative_line(one: AlternativeView, glyphs: Glyphs) -> str:
    rings = " | ".join(", ".join(text.clean(stage.node) for stage in ring) for ring in one.pipelines)
    note = "" if plan_draft.applicable(one) else "  (an engine for each)"
    return (
        f"{KINDS.get(one.kind, one.kind):12} {rate(one.single_tok_s):>6} one {rate(one.aggregate_tok_s):>6} all  "
        f"{rings}{note}"
    )
