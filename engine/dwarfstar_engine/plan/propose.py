"""A plan as its owner wishes it: cuts by hand, moved to where they are possible, or what the planner finds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from dwarfstar_engine.errors import IllegalCutError, PlanError
from dwarfstar_engine.plan.cluster import Cluster
from dwarfstar_engine.plan.cost import Costs, cluster_costs
from dwarfstar_engine.plan.delta import clamp
from dwarfstar_engine.plan.forecast import Job, Objective, Planned, Strategy, Wishes
from dwarfstar_engine.plan.planner import NO_WISHES, plan_cluster
from dwarfstar_engine.plan.predict import plan_of, predict
from dwarfstar_engine.plan.proportional import TOO_LARGE, StagePlan
from dwarfstar_engine.plan.remedy import explained, tight


@dataclass(frozen=True, slots=True)
class Wanted:
    """cuts: None: the planner finds them. order: nodes along the ring; with cuts those that are used."""

    strategy: Strategy
    objective: Objective
    cuts: tuple[int, ...] | None = None
    order: tuple[str, ...] = ()
    wishes: Wishes = NO_WISHES


@dataclass(frozen=True, slots=True)
class Proposal:
    """clamped: sentences about cuts that are not where they were wanted."""

    planned: Planned
    clamped: tuple[str, ...] = field(default=())


def propose(cluster: Cluster, job: Job, wanted: Wanted, present: Sequence[str] = ()) -> Proposal:
    """present: nodes of the plan that runs, in its order. Raises PlanError, IllegalCutError."""
    names = [node.name for node in cluster.nodes]
    for name in [*wanted.order, *wanted.wishes.pins, *wanted.wishes.excluded]:
        if name not in names:
            raise PlanError(f"no node is called {name!r}: there are {', '.join(sorted(names))}", code="no_such_node")
    if wanted.cuts is not None:
        return _by_hand(cluster, job, wanted, present)
    nodes = {node.name: node for node in cluster.nodes}
    ordered = replace(cluster, nodes=tuple(nodes[name] for name in dict.fromkeys([*wanted.order, *names])))
    try:
        planned = plan_cluster(ordered, job, wanted.strategy, wanted.objective, wanted.wishes)
    except PlanError as error:
        raise explained(cluster, job, wanted.wishes, error) from None
    return Proposal(replace(planned, options=tight(job, planned.forecast)))


def _by_hand(cluster: Cluster, job: Job, wanted: Wanted, present: Sequence[str]) -> Proposal:
    cuts = wanted.cuts or ()
    names = wanted.order or dict.fromkeys([*present, *(node.name for node in cluster.nodes)])
    used = [name for name in dict.fromkeys(names) if name not in wanted.wishes.excluded]
    if len(used) < len(cuts) + 1:
        raise PlanError(f"{len(cuts) + 1} stages need as many nodes, and there are {len(used)}", code="bad_cuts")
    bounds = [0, *cuts, job.layers]
    if any(a >= b for a, b in pairwise(bounds)):
        raise IllegalCutError(f"cuts must rise between 0 and {job.layers}, the model's layers (given: {cuts})")
    costs = cluster_costs(cluster, job)
    stages, clamped = _possible(costs, used[: len(cuts) + 1], cuts)
    _check_pins(stages, wanted.wishes)
    taken = {stage.node for stage in stages}
    left_out = [
        (node.name, "left out as you asked" if node.name in wanted.wishes.excluded else "the cuts leave it no layer")
        for node in cluster.nodes
        if node.name not in taken
    ]
    slices = [(stage.node, *stage.layers) for stage in stages]
    plan = plan_of(costs, slices, left_out)
    forecast = predict(costs, plan.stages)
    planned = Planned(plan, forecast, wanted.strategy, wanted.objective, options=tight(job, forecast))
    return Proposal(planned, clamped)


def _possible(costs: Costs, nodes: Sequence[str], cuts: Sequence[int]) -> tuple[tuple[StagePlan, ...], tuple[str, ...]]:
    """Stages with cuts as near to ``cuts`` as they can be: at legal layers first, then, from either end, where they
    fit. Raises PlanError if none are found."""
    legal, told = costs.job.legal, []
    found: list[int] = []
    for cut in cuts:
        free = [one for one in legal if one > (found[-1] if found else 0)]
        if not free:
            raise PlanError(f"the model cannot be cut {len(cuts)} times behind layer {cut}", code="no_cut")
        near = min(free, key=lambda one: (abs(one - cut), one))
        if near != cut:
            told.append(f"{cut} became {near}: the model may not be cut at layer {cut}")
        found.append(near)
    stages = _stages(costs, nodes, found)
    if predict(costs, stages).fits and not _forbidden(costs, stages):
        return stages, tuple(told)
    for order in (range(len(cuts)), range(len(cuts) - 1, -1, -1)):
        now, why = stages, list(told)
        try:
            for i in order:
                wanted = now[i].layers[1]
                there = clamp(costs, now, i, wanted)
                if there.why:
                    why.append(f"{wanted} became {there.cut}: {there.why}")
                bounds = [stage.layers[1] for stage in now[:-1]]
                now = _stages(costs, nodes, [*bounds[:i], there.cut, *bounds[i + 1 :]])
        except PlanError:
            continue
        if predict(costs, now).fits and not _forbidden(costs, now):
            return now, tuple(why)
    raise PlanError("these cuts do not fit the memory of the nodes, nor do any near them", code=TOO_LARGE)


def _forbidden(costs: Costs, stages: Sequence[StagePlan]) -> bool:
    lengths = costs.job.need.forbidden_lengths
    return len(stages) > 1 and any(stage.layers[1] - stage.layers[0] in lengths for stage in stages)


def _stages(costs: Costs, nodes: Sequence[str], cuts: Sequence[int]) -> tuple[StagePlan, ...]:
    bounds = [0, *cuts, costs.job.layers]
    return plan_of(costs, [(node, a, b) for node, (a, b) in zip(nodes, pairwise(bounds), strict=True)]).stages


def _check_pins(stages: Sequence[StagePlan], wishes: Wishes) -> None:
    for name, layers in wishes.pins.items():
        if not any(stage.node == name and stage.layers == layers for stage in stages):
            raise PlanError(
                f"{name} is pinned to layers {layers[0]}–{layers[1]}, and the cuts say else", code="bad_pin"
            )
