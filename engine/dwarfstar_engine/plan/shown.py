"""Plans as front ends see them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dwarfstar_engine.plan.advisor import Advice
from dwarfstar_engine.plan.cost import Costs
from dwarfstar_engine.plan.delta import NodeDelta, delta
from dwarfstar_engine.plan.forecast import File, Job, Planned, StageForecast
from dwarfstar_engine.plan.proportional import GIB, Plan
from dwarfstar_engine.views import (
    AlternativeView,
    DeltaView,
    LeftOutView,
    MemoryView,
    PlannedStageView,
    PlanView,
    PredictedView,
    SliceView,
)


def plan_view(
    model: str,
    job: Job,
    planned: Planned,
    advice: Advice | None,
    *,
    strategy: str = "",
    measured_ms: Sequence[float] = (),
) -> PlanView:
    """advice: None where nobody asked what else there is. strategy: another word for it. measured_ms: of the stages
    that run; 0: not measured."""
    forecast = planned.forecast
    ran = [*measured_ms, *(0.0 for _ in forecast.stages)]
    return PlanView(
        model=model,
        context=job.context,
        strategy=strategy or planned.strategy.value,
        objective=planned.objective.value,
        stages=tuple(
            _stage(stage, job.file_on(stage.node), ms) for stage, ms in zip(forecast.stages, ran, strict=False)
        ),
        predicted=PredictedView(
            single_tok_s=round(forecast.single_tok_s, 2),
            aggregate_tok_s=round(forecast.aggregate_tok_s, 2),
            ttft_ms=round(forecast.ttft_ms, 1),
            prompt_tokens=forecast.prompt_tokens,
            lanes=forecast.lanes,
            batch=forecast.batch,
            hop_ms=tuple(round(ms, 3) for ms in forecast.hop_ms),
        ),
        excluded=tuple(LeftOutView(node=node, reason=reason) for node, reason in planned.plan.excluded),
        alternatives=_alternatives(advice),
        take=advice.take.kind.value if advice else "",
        advice=advice.sentence if advice else "",
        options=planned.options,
        bottleneck=forecast.bottleneck,
    )


def _stage(stage: StageForecast, file: File, measured_ms: float) -> PlannedStageView:
    memory = MemoryView(
        weights=_gib(stage.weights_bytes),
        kv=_gib(stage.kv_bytes),
        compute=_gib(stage.compute_bytes),
        headroom=_gib(stage.headroom_bytes),
    )
    measured = round(measured_ms, 3) if measured_ms else None
    return PlannedStageView(
        node=stage.node,
        layers=stage.layers,
        memory_gib=memory,
        ms=round(stage.ms, 3),
        measured_ms=measured,
        file=file[0],
        quantisation=file[1],
    )


def _alternatives(advice: Advice | None) -> tuple[AlternativeView, ...]:
    if advice is None:
        return ()
    return tuple(
        AlternativeView(
            kind=one.kind.value,
            nodes=one.nodes,
            single_tok_s=round(one.single_tok_s, 2),
            aggregate_tok_s=round(one.aggregate_tok_s, 2),
            pipelines=tuple(
                tuple(SliceView(node=stage.node, layers=stage.layers) for stage in ring) for ring in one.rings
            ),
        )
        for one in advice.alternatives
    )


def delta_views(costs: Costs, old: Plan, new: Plan) -> tuple[DeltaView, ...]:
    """What changes on each node. A stage's process holds one slice, so a slice that changes is loaded whole beside the
    old one, the layers that both have from the page cache."""
    return tuple(_delta(costs, one, old, new) for one in delta(costs, old, new))


def _delta(costs: Costs, one: NodeDelta, old: Plan, new: Plan) -> DeltaView:
    slices = {stage.layers for plan in (old, new) for stage in plan.stages if stage.node == one.node}
    both = sum(costs.stage_bytes(one.node, *layers) for layers in slices)
    return DeltaView(
        node=one.node,
        load=one.load,
        drop=one.drop,
        load_gib=_gib(one.load_bytes),
        drop_gib=_gib(one.drop_bytes),
        headroom_gib=_gib(one.headroom_bytes),
        beside_gib=_gib(costs.nodes[one.node].usable_bytes - both),
    )


def _gib(size: int) -> float:
    return round(size / GIB, 4)


def shares(sizes: Sequence[int], width: int) -> list[int]:
    """Cells for each size, which add up to ``width``: at least one for each that is more than a hundredth."""
    total = max(1, sum(sizes))
    cells = [max(int(size * 100 > total), round(size * width / total)) for size in sizes]
    cells[cells.index(max(cells))] += width - sum(cells)  # the largest part shows it least
    return cells
