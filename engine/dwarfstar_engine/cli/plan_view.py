"""A plan for people: a bar per stage, what bounds it, and what else there is. From 60 columns on; colour only repeats
what letters and glyphs say, so it may be missing. Names come from others: they are text, never markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.plan.forecast import StageForecast
from dwarfstar_engine.plan.planner import rate

if TYPE_CHECKING:
    from dwarfstar_engine.cli.plan import Answer

GIB = 1 << 30
LEAST_BAR, MOST_BAR = 10, 60
NAME = 16  # columns of a node's name, at most
MAX_ROWS = 64  # stages, and nodes left out, that are listed
PARTS = (("█", "cyan", "weights"), ("▓", "magenta", "KV cache"), ("▒", "yellow", "compute"), ("░", "dim", "free"))
MARK, SIZE = " ◀ bottleneck", "GiB of"
KINDS = {
    Kind.SINGLE: "one machine",
    Kind.REPLICAS: "replicas",
    Kind.SPLIT: "split",
    Kind.PIPELINES: "pipelines",
}


def render(told: Answer, width: int) -> Iterator[RenderableType]:
    """Parts to print one below the other, none wider than ``width``."""
    planned, forecast = told.planned, told.planned.forecast
    yield Text.assemble(
        (told.name, "bold"),
        f" · context {told.job.context} · {planned.strategy.value}"
        + (f", {planned.objective.value}" if planned.strategy.value == "fastest" else ""),
    )
    yield Text()
    yield from _bars(told, width)
    yield Text()
    yield Text.assemble(
        (f"{rate(forecast.single_tok_s)} tok/s", "bold"),
        " one stream · ",
        (f"{rate(forecast.aggregate_tok_s)} tok/s", "bold"),
        f" all streams ({forecast.lanes} lane{'s' * (forecast.lanes != 1)} of {forecast.batch})"
        f" · {forecast.prompt_tokens}-token prompt: first token after {_time(forecast.ttft_ms)}",
    )
    for option in planned.options:
        yield Text(f"! {option}", "yellow")
    yield Text()
    yield from _alternatives(told, width)
    yield Text.assemble(("→ ", "bold green"), (told.advice.sentence, "bold"))
    yield from _left_out(told, width)


def _time(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"


def _bars(told: Answer, width: int) -> Iterator[Text]:
    forecast = told.planned.forecast
    stages = forecast.stages[:MAX_ROWS]
    name = max(len("node"), *(min(NAME, cell_len(stage.node)) for stage in stages))
    sizes = [_sizes(stage) for stage in stages]
    size = max(len(SIZE), *(len(one) for one in sizes))
    figures = 9 + 1 + size + 8  # layers, GiB, ms
    mark = MARK if width >= name + figures + LEAST_BAR + len(MARK) else ""
    bar = max(LEAST_BAR, min(MOST_BAR, width - name - figures - len(mark)))
    yield Text(f"{'node':{name}}{'layers':>8} {'':{bar}} {SIZE:>{size}}{'ms':>8}", "dim")
    for stage, used in zip(stages, sizes, strict=True):
        a, b = stage.layers
        slow = stage.node == forecast.bottleneck
        row = Text(set_cell_size(stage.node, name))
        row.append(f"{f'{a}–{b - 1}':>8} ")
        row.append_text(_bar(stage, bar))
        row.append(f" {used:>{size}}")
        row.append(f"{stage.ms:8.2f}", "bold red" if slow else "")
        if slow:
            row.append(mark, "red")
        yield row
    if len(forecast.stages) > MAX_ROWS:
        yield Text(f"… and {len(forecast.stages) - MAX_ROWS} more stages", "dim")
    legend = Text("  ").join(Text.assemble((glyph, style), f" {word}") for glyph, style, word in PARTS)
    yield Text.assemble(" " * (name + 9), legend)
    if "→" in forecast.bottleneck:
        yield Text(f"bottleneck: the link {forecast.bottleneck}", "red")


def _sizes(stage: StageForecast) -> str:
    used = stage.weights_bytes + stage.kv_bytes + stage.compute_bytes
    return f"{used / GIB:.1f}/{(used + stage.headroom_bytes) / GIB:.1f}"


def _bar(stage: StageForecast, width: int) -> Text:
    """Its node's memory: each part in proportion, none that is there is invisible."""
    sizes = [stage.weights_bytes, stage.kv_bytes, stage.compute_bytes, max(0, stage.headroom_bytes)]
    cells = shares(sizes, width)
    found = Text()
    for (glyph, style, _), count in zip(PARTS, cells, strict=True):
        found.append(glyph * count, style)
    return found


def shares(sizes: list[int], width: int) -> list[int]:
    """Cells for each size, which add up to ``width``: at least one for each that is more than a hundredth."""
    total = max(1, sum(sizes))
    cells = [max(int(size * 100 > total), round(size * width / total)) for size in sizes]
    cells[cells.index(max(cells))] += width - sum(cells)  # the largest part shows it least
    return cells


def _alternatives(told: Answer, width: int) -> Iterator[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("alternative", no_wrap=True)
    table.add_column("tok/s, one", justify="right", no_wrap=True)
    table.add_column("all", justify="right", no_wrap=True)
    table.add_column("nodes", overflow="ellipsis", no_wrap=True, max_width=max(10, width - 42))
    for one in told.advice.alternatives:
        took = one is told.advice.take
        rings = " | ".join(", ".join(stage.node for stage in ring) for ring in one.rings)
        kind = Text(("→ " if took else "  ") + KINDS[one.kind], "bold green" if took else "")
        table.add_row(kind, rate(one.single_tok_s), rate(one.aggregate_tok_s), Text(rings))
    yield table


def _left_out(told: Answer, width: int) -> Iterator[Text]:
    excluded = told.planned.plan.excluded
    if excluded:
        yield Text()
        yield Text("left out", "dim")
    for node, reason in excluded[:MAX_ROWS]:
        yield Text.assemble("  ", (node, "bold"), f": {reason}")
    if len(excluded) > MAX_ROWS:
        yield Text(f"  … and {len(excluded) - MAX_ROWS} more nodes", "dim")
