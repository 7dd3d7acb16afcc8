"""A plan as lines of runs: a bar with each stage as wide as its layers, and a table under it. Pure.

Inside its width a stage shows the memory that its machine lends: weights, KV cache, compute reserve, and what is free.
So two things are seen at once: who has how many layers, and who is full. Stages come from the status (what runs), from
the planner (what runs, or a draft), or from a sketch: a draft that the planner has not answered for yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypedDict

from dwarfstar_engine.plan.planner import rate
from dwarfstar_engine.plan.shown import shares
from dwarfstar_engine.views import PlanView, StageView, StatusView
from dwarfstar_tui import text
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.plan_draft import Draft
from dwarfstar_tui.plan_geometry import Geometry, fits, lay_out
from dwarfstar_tui.store import NodeRow, bottleneck
from dwarfstar_tui.text import Glyphs, fit, parts

MIN_BAR = 20
ALL_PARTS = 8  # cells of a stage that has one for each part of its memory
UNITS = 10_000  # of a GiB
WIDE, WIDEST = 78, 110  # columns of a table with all of a stage, and with its link to the next


class Sending(TypedDict, total=False):
    wire: str
    link_ms: float | None
    link_mb_s: float | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A stage as it is drawn, GiB and ms. ms: for a token, predicted where a planner was asked; now_ms: measured, None:
    nothing was. rough: sizes are sketched. wire: what it sends hidden states as; link_ms, link_mb_s: round trip and
    speed of its link to the next; empty and None: it does not run, or is the last."""

    node: str
    layers: tuple[int, int]
    weights: float
    kv: float
    compute: float
    free: float
    ms: float | None
    now_ms: float | None = None
    busy: float | None = None
    wait: float | None = None
    slow: bool = False
    pinned: bool = False
    rough: bool = False
    wire: str = ""
    link_ms: float | None = None
    link_mb_s: float | None = None

    @property
    def used(self) -> float:
        return self.weights + self.kv + self.compute

    @property
    def lent(self) -> float:
        return max(self.used, self.used + self.free)


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


def of_status(view: StatusView, rows: Sequence[NodeRow]) -> tuple[Shown, ...]:
    """What runs, as far as the status knows: no compute reserve, and nothing predicted."""
    slowest, found = bottleneck(view), []
    lends = {row.view.name: row.view.effective_vram_gib for row in rows if not row.gone}
    for stage in in_order(view):
        free = max(0.0, lends.get(stage.node, 0.0) - stage.weights_gib - stage.kv_gib)
        took = stage.ms_per_token or None
        found.append(
            Shown(stage.node, stage.layers, stage.weights_gib, stage.kv_gib, 0.0, free, took, took, stage.busy,
                  stage.wait, slow=stage.node == slowest, **_sends(stage))
        )  # fmt: skip
    return tuple(found)


def _sends(live: StageView | None) -> Sending:
    if live is None or live.wire in ("", "ids"):
        return {}
    return {"wire": live.wire, "link_ms": live.link_ms or None, "link_mb_s": live.link_mb_s or None}


def of_plan(plan: PlanView, status: StatusView | None, pins: Collection[str] = ()) -> tuple[Shown, ...]:
    """What the planner says of a plan, beside what is measured of stages that run as they are in it."""
    runs = {(stage.node, stage.layers): stage for stage in status.stages} if status is not None else {}
    found = []
    for stage in plan.stages:
        live, memory = runs.get((stage.node, stage.layers)), stage.memory_gib
        found.append(
            Shown(
                stage.node, stage.layers, memory.weights, memory.kv, memory.compute, memory.headroom, stage.ms,
                (live.ms_per_token or None) if live else None, live.busy if live else None, live.wait if live else None,
                slow=stage.node == plan.bottleneck and len(plan.stages) > 1, pinned=stage.node in pins, **_sends(live),
            )
        )  # fmt: skip
    return tuple(found)


def sketched(draft: Draft, known: PlanView) -> tuple[Shown, ...]:
    """A draft in proportion to layers: what is seen in the tenth of a second until the planner has answered."""
    stages = {stage.node: stage for stage in known.stages}
    found = []
    for node, layers in draft.stages:
        stage = stages.get(node)
        count = layers[1] - layers[0]
        if stage is None:
            found.append(Shown(node, layers, 0.0, 0.0, 0.0, 0.0, None, rough=True, pinned=node in draft.pins))
            continue
        memory, scale = stage.memory_gib, count / max(1, stage.layers[1] - stage.layers[0])
        lent = memory.weights + memory.kv + memory.compute + memory.headroom
        weights, kv = memory.weights * scale, memory.kv * scale
        free = lent - weights - kv - memory.compute
        exact = layers == stage.layers
        found.append(
            Shown(node, layers, weights, kv, memory.compute, free, stage.ms * scale, rough=not exact,
                  pinned=node in draft.pins)
        )  # fmt: skip
    return tuple(found)


def geometry(stages: Sequence[tuple[int, int]], width: int) -> Geometry | None:
    """The bar's; None: there is no plan, or no room for it. While a plan is changed its stages may not join up."""
    joined = all(left[1] == right[0] for left, right in itertools.pairwise(stages))
    if not stages or not joined or width < MIN_BAR or not fits(len(stages), width):
        return None
    return lay_out(stages, width)


def bar_lines(stages: Sequence[Shown], width: int, glyphs: Glyphs, chosen: int | None = None) -> list[Runs]:
    """Three lines: who, with what in memory, which layers and how long. chosen: the boundary that keys move."""
    plan = geometry([stage.layers for stage in stages], width)
    if plan is None:
        return []
    names: list[tuple[str, str]] = []
    bars: list[tuple[str, str]] = []
    facts: list[tuple[str, str]] = []
    for index, (span, stage) in enumerate(zip(plan.spans, stages, strict=True)):
        if index:
            line = (glyphs.held, "key") if index - 1 == chosen else (glyphs.bar, "boundary")
            names.append(line)
            bars.append(line)
            facts.append(line)
        names.append((fit(_named(stage, glyphs), span.width, ellipsis=glyphs.ellipsis),
                      "slowest" if stage.slow else "name"))  # fmt: skip
        bars += _memory(stage, span.width, glyphs)
        layers = text.layers(*stage.layers, glyphs.dash)
        about = glyphs.about if stage.rough else ""
        long = f"{layers}  {about}{text.figure(stage.ms, 2)} ms" if stage.ms else layers
        facts.append((fit(long if len(long) <= span.width else layers, span.width, ellipsis=glyphs.ellipsis), "muted"))
    return [tuple(names), tuple(bars), tuple(facts)]


def _named(stage: Shown, glyphs: Glyphs) -> str:
    marks = (glyphs.bottleneck if stage.slow else "") + (glyphs.pin if stage.pinned else "")
    name = text.clean(stage.node)
    return marks + (text.spelled(name, ascii_only=True) if glyphs is text.ASCII else name)


def _memory(stage: Shown, width: int, glyphs: Glyphs) -> Runs:
    lent = stage.lent or 1.0
    sizes = (stage.weights, stage.kv, stage.compute, max(0.0, stage.free))
    if width >= ALL_PARTS and sum(sizes) > 0:  # no part that is there is invisible
        weights, kv, compute, _ = shares([round(size * UNITS) for size in sizes], width)
    else:
        weights, kv, compute = parts([size / lent for size in sizes[:3]], width)
    over = "lost" if stage.free < 0 else ""
    runs = (
        (glyphs.used * weights, over or "weights"),
        (glyphs.planned * kv, over or "kv"),
        (glyphs.compute * compute, over or "compute"),
        (glyphs.lent * (width - weights - kv - compute), "free"),
    )
    return tuple(run for run in runs if run[0])


def legend(glyphs: Glyphs, *, compute: bool = False, pins: bool = False) -> Runs:
    runs: list[tuple[str, str]] = [
        (glyphs.used, "weights"), (" weights  ", "muted"),
        (glyphs.planned, "kv"), (" KV  ", "muted"),
    ]  # fmt: skip
    if compute:
        runs += [(glyphs.compute, "compute"), (" compute  ", "muted")]
    runs += [(glyphs.lent, "free"), (" free  ", "muted"), (glyphs.bottleneck, "slowest"), (" bottleneck", "muted")]
    if pins:
        runs += [("  ", "muted"), (glyphs.pin, "plain"), (" pinned", "muted")]
    return tuple(runs)


def table_lines(stages: Sequence[Shown], width: int, glyphs: Glyphs, *, predicted: bool) -> list[Runs]:
    """One line a stage, under a heading. predicted: ms are the planner's, with those measured beside them."""
    wide = width >= WIDE
    if wide:
        heads = f"{'weights':>8}{'KV':>7}{'compute':>8}{'free':>7}{'ms':>8}{'now':>7}{'busy':>6}{'wait':>6}"
        heads += f"{'wire':>6}{'link ms':>9}{'MB/s':>7}" * (width >= WIDEST)
    else:
        heads = f"{'GiB':>7}{'free':>7}{'ms':>8}{'now':>7}"
    name = max(8, min(28, width - 12 - len(heads) - 1))
    lines: list[Runs] = [((f"{'#':>2} {fit('machine', name)} {'layers':>8}{heads}", "heading"),)]
    for index, stage in enumerate(stages):
        about = glyphs.about if stage.rough else ""
        who = fit(_named(stage, glyphs), name, ellipsis=glyphs.ellipsis)
        runs: list[tuple[str, str]] = [
            (f"{index:>2} ", "muted"), (who, "slowest" if stage.slow else "plain"),
            (f" {text.layers(*stage.layers, glyphs.dash):>8}", "plain"),
        ]  # fmt: skip
        if wide:
            compute = text.gib(stage.compute) if predicted else glyphs.unknown
            runs.append((f"{about + text.gib(stage.weights):>8}{text.gib(stage.kv):>7}{compute:>8}", "plain"))
        else:
            runs.append((f"{about + text.gib(stage.used):>7}", "plain"))
        runs.append((f"{text.gib(stage.free):>7}", "lost" if stage.free < 0 else "plain"))
        took = text.figure(stage.ms, 2, glyphs.unknown) if predicted else glyphs.unknown
        now = text.figure(stage.now_ms, 2, glyphs.unknown)
        runs.append((f"{took:>8}{now:>7}", "slowest" if stage.slow else "plain"))
        if wide:
            busy, wait = text.share(stage.busy, glyphs.unknown), text.share(stage.wait, glyphs.unknown)
            runs.append((f"{busy:>6}{wait:>6}", "plain"))
        if width >= WIDEST:
            link = text.figure(stage.link_ms, 2, glyphs.unknown), text.figure(stage.link_mb_s, 0, glyphs.unknown)
            runs.append((f"{stage.wire or glyphs.unknown:>6}{link[0]:>9}{link[1]:>7}", "plain"))
        lines.append(tuple(runs))
    return lines


def summary(view: StatusView, plan: PlanView | None, width: int, glyphs: Glyphs, *, owner: bool) -> list[Runs]:
    """What runs, in words: how it was decided, predicted beside measured, and where the time goes."""
    if view.model is None or not view.stages:
        return []
    count, live = len(view.stages), view.throughput
    first = f"{text.clean(view.model.name)}, {view.model.layers} layers over {count} stage{'s' * (count != 1)}"
    first += f", epoch {view.epoch}" + ("; its owner's plan" if owner else "")
    lines: list[Runs] = [((line, "plain"),) for line in text.wrapped(first, width)]
    measured = f"measured {text.figure(live.tok_s)} tok/s" + (
        f" of {live.active} stream{'s' * (live.active != 1)}" if live.active else " now, no stream"
    )
    if plan is not None:
        second = f"predicted {rate(plan.predicted.single_tok_s)} tok/s for one stream, "
        second += f"{rate(plan.predicted.aggregate_tok_s)} for all; {measured}"
    else:
        second = measured
    lines += [((line, "muted"),) for line in text.wrapped(second, width)]
    slow = plan.bottleneck if plan is not None and count > 1 else bottleneck(view)
    if slow:
        shown = text.clean(slow)
        what = f"the link {shown} is the bottleneck" if "→" in slow else f"{shown} is the bottleneck"
        what = f"{glyphs.bottleneck} {what}"
        if glyphs is text.ASCII:
            what = text.spelled(what, ascii_only=True)
        lines += [((line, "slowest"),) for line in text.wrapped(what + _share_of(view, slow), width)]
    return lines


def _share_of(view: StatusView, node: str) -> str:
    took = sum(stage.ms_per_token for stage in view.stages)
    share = sum(stage.ms_per_token for stage in view.stages if stage.node == node) / took if took else 0.0
    return f": {share:.0%} of the computing is there" if share else ""
