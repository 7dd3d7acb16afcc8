"""How fast a plan would be, and what bounds it. Pure, and quick enough to follow a boundary that is dragged.

A stream's token goes once round the ring: Σ stages + Σ hops + the coordinator's share. With several streams the ring
is a pipeline: it gives a token as often as its slowest part, a stage or a link, is done with one, as soon as there are
lanes enough to keep that busy. Streams that run together in a lane cost less than apart where that was measured; the
number of them is the one that gives most.

Where stages share a machine's cores, these are a part of the ring as well: they are busy with a token for as long as
all its stages there take together, divided by their number. More stages than cores make no token come sooner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dwarfstar_engine.plan.cluster import Kind
from dwarfstar_engine.plan.cost import (
    BATCHES,
    COORDINATOR_MS,
    CROWDED,
    ROW_CORE_MS,
    TOKEN_CORE_MS,
    UNEVEN,
    Costs,
    busy_ms,
    kind_of,
    row_bytes,
)
from dwarfstar_engine.plan.forecast import Forecast, StageForecast
from dwarfstar_engine.plan.proportional import Plan, StagePlan, stage_plan

CHUNK_ROWS = 256  # of a prompt, in a frame
PROMPT_TOKENS = 700


@dataclass(frozen=True, slots=True)
class _Pace:
    """At what pace a ring goes with ``batch`` streams a lane: slowest: its slowest part, ms; where: that part."""

    batch: int
    slowest_ms: float
    round_ms: float
    where: str

    @property
    def tok_s(self) -> float:
        return 1000 * self.batch / self.slowest_ms

    @property
    def lanes(self) -> int:
        return max(1, math.ceil(self.round_ms / self.slowest_ms - 1e-9))


def predict(costs: Costs, stages: Sequence[StagePlan], prompt_tokens: int = PROMPT_TOKENS) -> Forecast:
    """The forecast of stages in order; also of such as do not fit (``Forecast.fits``)."""
    hops = _hops(costs, stages, 1)
    paces = [_pace(costs, stages, batch) for batch in BATCHES]
    alone, best = paces[0], max(paces, key=lambda pace: (pace.tok_s, -pace.batch))
    return Forecast(
        stages=tuple(_stage(costs, stage) for stage in stages),
        hop_ms=tuple(hops),
        single_tok_s=1000 / (alone.round_ms + COORDINATOR_MS),
        aggregate_tok_s=best.tok_s,
        lanes=best.lanes,
        batch=best.batch,
        prompt_tokens=prompt_tokens,
        ttft_ms=_ttft_ms(costs, stages, prompt_tokens),
        bottleneck=best.where,
    )


def together(costs: Costs, rings: Sequence[tuple[Sequence[StagePlan], Forecast]]) -> float:
    """Tokens a second of rings that share no node, at the same time: what each gives; less where they share cores."""
    if len(rings) == 1:  # its forecast knows already; its stages may be devices of nodes
        return rings[0][1].aggregate_tok_s
    shared = _shared(costs, [stage for stages, _ in rings for stage in stages])
    busy = dict.fromkeys(shared, 0.0)  # cores of each machine, of all that it has
    paces = list[tuple[float, dict[str, float]]]()  # a ring's tokens a second, and what each takes of a machine, in ms
    for stages, forecast in rings:
        tok_s, taken = forecast.aggregate_tok_s, dict[str, float]()
        for machine, there in shared.items():
            if own := [stage for stage in there if stage in stages]:
                *parts, (all_ms, _) = _on_shared_cores(costs, machine, own, forecast.batch, len(there))
                tok_s = min(tok_s, 1000 * forecast.batch / max(ms for ms, _ in parts))
                taken[machine] = all_ms / forecast.batch
        for machine, ms in taken.items():
            busy[machine] += tok_s * ms / 1000
        paces.append((tok_s, taken))
    return sum(tok_s / max([1.0, *(busy[machine] for machine in taken)]) for tok_s, taken in paces)


def plan_of(costs: Costs, slices: Sequence[tuple[str, int, int]], excluded: Sequence[tuple[str, str]] = ()) -> Plan:
    """The plan of (node, first layer, end) in order."""
    need = costs.job.need
    stages = tuple(stage_plan(costs.nodes[node].costs, need, node, a, b) for node, a, b in slices)
    return Plan(stages, tuple(excluded))


def _stage(costs: Costs, stage: StagePlan) -> StageForecast:
    there = costs.nodes[stage.node]
    compute = costs.job.need.buffers_bytes(last=stage.last)
    return StageForecast(
        node=stage.node,
        layers=stage.layers,
        weights_bytes=stage.weights_bytes,
        kv_bytes=stage.kv_bytes,
        compute_bytes=compute,
        headroom_bytes=there.usable_bytes - stage.weights_bytes - stage.kv_bytes - compute,
        ms=there.step_ms(*stage.layers),
    )


def _hops(costs: Costs, stages: Sequence[StagePlan], rows: int) -> list[float]:
    names = [stage.node for stage in stages]
    between = [costs.hop_ms(a, b, rows) for a, b in itertools.pairwise(names)]
    return [*between, costs.closing_ms(names[-1], names[0])]


def _pace(costs: Costs, stages: Sequence[StagePlan], batch: int) -> _Pace:
    parts = [(costs.nodes[stage.node].step_ms(*stage.layers, batch), stage.node) for stage in stages]
    round_ms = sum(ms for ms, _ in parts) + sum(_hops(costs, stages, batch))
    for a, b in itertools.pairwise(stages):
        taken = busy_ms(costs.link(a.node, b.node), batch * row_bytes(costs.job))
        parts.append((taken, f"{a.node} → {b.node}"))
    for machine, there in _shared(costs, stages).items():
        parts += _on_shared_cores(costs, machine, there, batch, len(there))
    slowest, where = max(parts, key=lambda part: part[0])
    return _Pace(batch, slowest, round_ms, where)


def _shared(costs: Costs, stages: Sequence[StagePlan]) -> dict[str, list[StagePlan]]:
    """Stages on processors, by machines that have several of them and whose number of cores is known."""
    found = dict[str, list[StagePlan]]()
    for stage in stages:
        node = costs.nodes[stage.node].node
        if node.cores and kind_of(node) is Kind.CPU:
            found.setdefault(node.machine, []).append(stage)
    return {machine: there for machine, there in found.items() if len(there) > 1}


def _on_shared_cores(
    costs: Costs, machine: str, there: Sequence[StagePlan], batch: int, stages: int
) -> Iterator[tuple[float, str]]:
    """How long a lane's tokens keep each stage on a machine busy, and all its cores; and what that is called.

    stages: that share these cores, those of other rings as well.
    """
    core_ms = TOKEN_CORE_MS * batch if machine == costs.cluster.head else 0.0
    cores = 1
    for stage in there:
        node = costs.nodes[stage.node].node
        took = costs.nodes[stage.node].step_ms(*stage.layers, batch) * CROWDED + ROW_CORE_MS * batch
        cores = node.cores
        core_ms += took * min(node.threads, cores)
        yield took, stage.node
    crowd = min(1.0, max(0.0, stages / cores - 1)) if cores > 1 else 0.0
    yield core_ms * (1 + UNEVEN * crowd) / cores, " + ".join(stage.node for stage in there)


def _ttft_ms(costs: Costs, stages: Sequence[StagePlan], tokens: int) -> float:
    """Chunks follow each other through the stages: the first takes its way, each other one the slowest part's time."""
    rows = min(CHUNK_ROWS, max(1, tokens))
    chunks = math.ceil(tokens / rows)
    parts = [costs.nodes[stage.node].prompt_ms(*stage.layers, rows) for stage in stages]
    size = rows * row_bytes(costs.job)
    wires = [busy_ms(costs.link(a.node, b.node), size) for a, b in itertools.pairwise(stages)]
    through = sum(parts) + sum(_hops(costs, stages, rows)) + costs.nodes[stages[-1].node].head_ms + COORDINATOR_MS
    return through + (tokens / rows - 1) * max(parts + wires) if chunks > 1 else through
