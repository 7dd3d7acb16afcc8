"""A plan for people: a bar per stage, what bounds it, and what else there is. From 60 columns on; colour only repeats
what letters and glyphs say, so it may be missing. Names come from others: they are text, never markup.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len, set_cell_size
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dwarfstar_engine.cli.status_text import files_text
from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.plan.planner import rate
from dwarfstar_engine.plan.shown import shares
from dwarfstar_engine.views import MemoryView, PlannedStageView, PlanView, ProposalView

BAR_UNITS = 10_000  # of a GiB, as finely as views tell
LEAST_BAR, MOST_BAR = 10, 60
NAME = 16  # columns of a node's name, at most
MAX_ROWS = 64  # stages, and nodes left out, that are listed
PARTS = (("█", "cyan", "weights"), ("▓", "magenta", "KV cache"), ("▒", "yellow", "compute"), ("░", "dim", "free"))
MARK, SIZE = " ◀ bottleneck", "GiB of"
KINDS = {
    Kind.SINGLE.value: "one machine",
    Kind.REPLICAS.value: "replicas",
    Kind.SPLIT.value: "split",
    Kind.PIPELINES.value: "pipelines",
}


def render(told: PlanView, width: int) -> Iterator[RenderableType]:
    """Parts to print one below the other, none wider than ``width``."""
    predicted = told.predicted
    yield Text.assemble(
        (told.model, "bold"),
        f" · context {told.context} · {told.strategy}" + (f", {told.objective}" if told.strategy == "fastest" else ""),
    )
    yield Text()
    yield from _bars(told, width)
    yield Text()
    yield Text.assemble(
        (f"{rate(predicted.single_tok_s)} tok/s", "bold"),
        " one stream · ",
        (f"{rate(predicted.aggregate_tok_s)} tok/s", "bold"),
        f" all streams ({predicted.lanes} lane{'s' * (predicted.lanes != 1)} of {predicted.batch})"
        f" · {predicted.prompt_tokens}-token prompt: first token after {_time(predicted.ttft_ms)}",
    )
    for option in told.options:
        yield Text(f"! {option}", "yellow")
    if told.alternatives:
        yield Text()
        yield from _alternatives(told, width)
        yield Text.assemble(("→ ", "bold green"), (told.advice, "bold"))
    yield from _left_out(told)


def _time(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"


def _bars(told: PlanView, width: int) -> Iterator[Text]:
    stages = told.stages[:MAX_ROWS]
    name = max(len("node"), *(min(NAME, cell_len(stage.node)) for stage in stages))
    sizes = [_sizes(stage) for stage in stages]
    size = max(len(SIZE), *(len(one) for one in sizes))
    runs = any(stage.measured_ms is not None for stage in stages)
    figures = 9 + 1 + size + 8 * (1 + runs)  # layers, GiB, ms
    mark = MARK if width >= name + figures + LEAST_BAR + len(MARK) else ""
    bar = max(LEAST_BAR, min(MOST_BAR, width - name - figures - len(mark)))
    measured = f"{'now':>8}" if runs else ""
    yield Text(f"{'node':{name}}{'layers':>8} {'':{bar}} {SIZE:>{size}}{'ms':>8}{measured}", "dim")
    for stage, used in zip(stages, sizes, strict=True):
        a, b = stage.layers
        slow = stage.node == told.bottleneck
        row = Text(set_cell_size(stage.node, name))
        row.append(f"{f'{a}–{b - 1}':>8} ")
        row.append_text(_bar(stage.memory_gib, bar))
        row.append(f" {used:>{size}}")
        row.append(f"{stage.ms:8.2f}", "bold red" if slow else "")
        if runs:
            row.append(f"{'–':>8}" if stage.measured_ms is None else f"{stage.measured_ms:8.2f}")
        if slow:
            row.append(mark, "red")
        yield row
    if len(told.stages) > MAX_ROWS:
        yield Text(f"… and {len(told.stages) - MAX_ROWS} more stages", "dim")
    legend = Text("  ").join(Text.assemble((glyph, style), f" {word}") for glyph, style, word in PARTS)
    yield Text.assemble(" " * (name + 9), legend)
    for line in files_text(told.stages[:MAX_ROWS]):
        yield Text(line)
    if "→" in told.bottleneck:
        yield Text(f"bottleneck: the link {told.bottleneck}", "red")
    elif told.bottleneck not in [stage.node for stage in told.stages]:
        yield Text(f"bottleneck: the cores that {told.bottleneck} share", "red")


def _sizes(stage: PlannedStageView) -> str:
    memory = stage.memory_gib
    used = memory.weights + memory.kv + memory.compute
    room = used + memory.headroom
    digits = 1 if room >= 10 else 2
    return f"{used:.{digits}f}/{room:.{digits}f}"


def _bar(memory: MemoryView, width: int) -> Text:
    """Its node's memory: each part in proportion, none that is there is invisible."""
    parts = (memory.weights, memory.kv, memory.compute, max(0.0, memory.headroom))
    sizes = [round(part * BAR_UNITS) for part in parts]
    cells = shares(sizes, width)
    found = Text()
    for (glyph, style, _), count in zip(PARTS, cells, strict=True):
        found.append(glyph * count, style)
    return found


def _alternatives(told: PlanView, width: int) -> Iterator[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("alternative", no_wrap=True)
    table.add_column("tok/s, one", justify="right", no_wrap=True)
    table.add_column("all", justify="right", no_wrap=True)
    table.add_column("nodes", overflow="ellipsis", no_wrap=True, max_width=max(10, width - 42))
    for one in told.alternatives:
        took = one.kind == told.take
        rings = " | ".join(", ".join(stage.node for stage in ring) for ring in one.pipelines)
        kind = Text(("→ " if took else "  ") + KINDS[one.kind], "bold green" if took else "")
        table.add_row(kind, rate(one.single_tok_s), rate(one.aggregate_tok_s), Text(rings))
    yield table


def _left_out(told: PlanView) -> Iterator[Text]:
    if told.excluded:
        yield Text()
        yield Text("left out", "dim")
    for one in told.excluded[:MAX_ROWS]:
        yield Text.assemble("  ", (one.node, "bold"), f": {one.reason}")
    if len(told.excluded) > MAX_ROWS:
        yield Text(f"  … and {len(told.excluded) - MAX_ROWS} more nodes", "dim")


def render_change(told: ProposalView, width: int) -> Iterator[RenderableType]:
    """What a proposal would change: predicted before and after, and each node's layers."""
    before, after = told.present, told.proposed
    for sentence in told.clamped:
        yield Text(f"! {sentence}", "yellow")
    if before is None or after is None:
        return
    if [stage.layers for stage in before.stages] == [stage.layers for stage in after.stages] and [
        stage.node for stage in before.stages
    ] == [stage.node for stage in after.stages]:
        yield Text("it is the plan that runs")
        return
    now, then = before.predicted, after.predicted
    yield Text.assemble(
        "predicted: one stream ",
        (f"{rate(now.single_tok_s)} → {rate(then.single_tok_s)} tok/s", "bold"),
        ", all streams ",
        (f"{rate(now.aggregate_tok_s)} → {rate(then.aggregate_tok_s)} tok/s", "bold"),
        f", bottleneck {after.bottleneck}",
    )
    for one in told.delta:
        changes = [f"loads {_ranges(one.load)} ({one.load_gib:.2f} GiB)"] * bool(one.load)
        changes += [f"drops {_ranges(one.drop)} ({one.drop_gib:.2f} GiB)"] * bool(one.drop)
        if not changes:
            continue
        waits = "; streams wait while it loads, as there is no room for both" if one.beside_gib < 0 else ""
        said = f": {', '.join(changes)}; {one.headroom_gib:.2f} GiB are left{waits}"
        yield Text.assemble("  ", (one.node, "bold"), said)


def _ranges(found: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{a}–{b - 1}" if b - a > 1 else str(a) for a, b in found)
