"""The running plan as lines of runs: a bar with each stage as wide as its layers, and a table under it. Pure.

Inside its width a stage shows its memory on the machine that has it: weights, KV cache, and what is free of that which
the machine lends. So two things are seen at once: who has how many layers, and who is full.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from dwarfstar_engine.views import StageView, StatusView
from dwarfstar_tui import text
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.plan_geometry import Geometry, fits, lay_out
from dwarfstar_tui.store import NodeRow, bottleneck
from dwarfstar_tui.text import Glyphs, fit, parts

MIN_BAR = 20


def in_order(view: StatusView) -> tuple[StageView, ...]:
    return tuple(sorted(view.stages, key=lambda stage: (stage.pipeline, stage.layers)))


def titled(view: StatusView, lines: Callable[[StatusView], list[Runs]]) -> list[Runs]:
    """Lines of each pipeline, under its number where there are several."""
    chains, found = view.chains(), list[Runs]()
    for chain in chains:
        told = lines(chain)
        if told and len(chains) > 1:
            found.append(((f"pipeline {chain.stages[0].pipeline}", "heading"),))
        found += told
    return found


def geometry(view: StatusView, width: int) -> Geometry | None:
    """The bar's; None: there is no plan, or no room for it. While a plan is changed its stages may not join up."""
    stages = [stage.layers for stage in in_order(view)]
    joined = all(left[1] == right[0] for left, right in itertools.pairwise(stages))
    if not stages or not joined or width < MIN_BAR or not fits(len(stages), width):
        return None
    return lay_out(stages, width)


def bar_lines(view: StatusView, rows: tuple[NodeRow, ...], width: int, glyphs: Glyphs) -> list[Runs]:
    """Three lines: who, with what in memory, which layers and how long. Empty if there is nothing to draw."""
    plan = geometry(view, width)
    if plan is None:
        return []
    slowest = bottleneck(view)
    names: list[tuple[str, str]] = []
    bars: list[tuple[str, str]] = []
    facts: list[tuple[str, str]] = []
    for index, (span, stage) in enumerate(zip(plan.spans, in_order(view), strict=True)):
        if index:
            names.append((glyphs.bar, "boundary"))
            bars.append((glyphs.bar, "boundary"))
            facts.append((glyphs.bar, "boundary"))
        slow = stage.node == slowest
        name = text.clean(stage.node)
        if slow:
            name = f"{glyphs.bottleneck}{name}"
        names.append((fit(name, span.width, ellipsis=glyphs.ellipsis), "slowest" if slow else "name"))
        bars += _memory(stage, rows, span.width, glyphs)
        layers = text.layers(*stage.layers, glyphs.dash)
        long = f"{layers}  {text.figure(stage.ms_per_token, 2)} ms" if stage.ms_per_token else layers
        facts.append((fit(long if len(long) <= span.width else layers, span.width, ellipsis=glyphs.ellipsis), "muted"))
    return [tuple(names), tuple(bars), tuple(facts)]


def _lent(stage: StageView, rows: tuple[NodeRow, ...]) -> float:
    lent = next((row.view.effective_vram_gib for row in rows if row.view.name == stage.node and not row.gone), 0.0)
    return max(lent, stage.weights_gib + stage.kv_gib)


def _memory(stage: StageView, rows: tuple[NodeRow, ...], width: int, glyphs: Glyphs) -> Runs:
    lent = _lent(stage, rows) or 1.0
    weights, kv = parts((stage.weights_gib / lent, stage.kv_gib / lent), width)
    runs = (
        (glyphs.used * weights, "weights"),
        (glyphs.planned * kv, "kv"),
        (glyphs.lent * (width - weights - kv), "free"),
    )
    return tuple(run for run in runs if run[0])


def legend(glyphs: Glyphs) -> Runs:
    return (
        (glyphs.used, "weights"), (" weights   ", "muted"),
        (glyphs.planned, "kv"), (" KV cache   ", "muted"),
        (glyphs.lent, "free"), (" free   ", "muted"),
        (glyphs.bottleneck, "slowest"), (" bottleneck", "muted"),
    )  # fmt: skip


def table_lines(view: StatusView, rows: tuple[NodeRow, ...], width: int, glyphs: Glyphs) -> list[Runs]:
    """One line a stage, under a heading."""
    slowest = bottleneck(view)
    wide = width >= 78
    name = max(10, min(28, width - (66 if wide else 44)))
    heads = f"{'stage':5} {'machine':{name}} {'layers':>9} {'weights':>8} {'KV':>6} {'free':>6}"
    if wide:
        heads += f" {'ms/tok':>8} {'busy':>5} {'wait':>5}"
    lines: list[Runs] = [((heads, "heading"),)]
    for index, stage in enumerate(in_order(view)):
        slow = stage.node == slowest
        free = _lent(stage, rows) - stage.weights_gib - stage.kv_gib
        line = f"{index:>5} {fit(text.clean(stage.node), name, ellipsis=glyphs.ellipsis)} "
        line += f"{text.layers(*stage.layers, glyphs.dash):>9} {text.gib(stage.weights_gib):>8} "
        line += f"{text.gib(stage.kv_gib):>6} {text.gib(free):>6}"
        runs: list[tuple[str, str]] = [(line, "plain")]
        if wide:
            mark = glyphs.bottleneck if slow else ""
            took = text.figure(stage.ms_per_token or None, 2, glyphs.unknown)
            runs.append((f" {mark + took:>8}", "slowest" if slow else "plain"))
            runs.append((f" {text.share(stage.busy):>5} {text.share(stage.wait):>5}", "plain"))
        lines.append(tuple(runs))
    return lines


def summary(view: StatusView, width: int, glyphs: Glyphs) -> list[Runs]:
    """A line or two in words above the bar."""
    if view.model is None or not view.stages:
        return []
    took = sum(stage.ms_per_token for stage in view.stages)
    links = sum(stage.link_ms for stage in view.stages)
    slowest = bottleneck(view)
    first = f"{text.clean(view.model.name)}, {view.model.layers} layers over {len(view.stages)} stage"
    first += f"{'s' * (len(view.stages) != 1)}, epoch {view.epoch}"
    second = f"{took:.1f} ms of computing and {links:.1f} ms of round trips for one token"
    if not took:
        second = "no token has passed yet, so nothing is measured"
    lines: list[Runs] = [((line, "plain"),) for line in text.wrapped(first, width)]
    lines += [((line, "muted"),) for line in text.wrapped(second, width)]
    if slowest:
        share = sum(stage.ms_per_token for stage in view.stages if stage.node == slowest) / took if took else 0.0
        more = f"{glyphs.bottleneck} {text.clean(slowest)} is the bottleneck: {share:.0%} of the computing is there"
        lines += [((line, "slowest"),) for line in text.wrapped(more, width)]
    return lines
