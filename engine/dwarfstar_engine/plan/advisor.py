"""Should the model be split at all? What one machine, replicas, several pipelines and the split would give. Pure.

Splitting buys room, not speed: where a machine holds the model it is mostly faster there for one stream. For many
streams whole copies on several machines need no links, and disjoint pipelines make shorter rings than one long one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.plan.cluster import Cluster
from dwarfstar_engine.plan.cost import Costs, cluster_costs
from dwarfstar_engine.plan.forecast import Forecast, Job, Objective, Planned, Strategy, Wishes
from dwarfstar_engine.plan.planner import NO_WISHES, fastest, plan_cluster, rate
from dwarfstar_engine.plan.predict import plan_of, predict, together
from dwarfstar_engine.plan.proportional import StagePlan
from dwarfstar_engine.plan.search import Measure, Problem, in_order

MAX_PIPELINES = 8
SEARCHED_NODES = 8  # of a pipeline's nodes, at most, all orders are tried; with more, one
MAX_NAMED = 10  # nodes in a sentence
NEAR = 0.03  # for many streams, so far below the best is as good: models are no finer
WORTH = 0.01  # of one stream: less is no reason to leave the plan


class Kind(StrEnum):
    SINGLE = "single"  # the whole model on one node
    REPLICAS = "replicas"  # the whole model on each of several nodes
    SPLIT = "split"  # one ring
    PIPELINES = "pipelines"  # several rings that share no node


@dataclass(frozen=True, slots=True)
class Alternative:
    """Rings that share no node, and what they give: single_tok_s of the quickest, aggregate_tok_s of all."""

    kind: Kind
    rings: tuple[tuple[StagePlan, ...], ...]
    single_tok_s: float
    aggregate_tok_s: float

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(stage.node for ring in self.rings for stage in ring)

    def value(self, objective: Objective) -> float:
        return self.single_tok_s if objective is Objective.SINGLE else self.aggregate_tok_s


@dataclass(frozen=True, slots=True)
class Advice:
    """alternatives: what there is, the plan's own kind among them. take: the best; sentence: which, and why."""

    alternatives: tuple[Alternative, ...]
    take: Alternative
    sentence: str


def advise(cluster: Cluster, job: Job, planned: Planned, wishes: Wishes = NO_WISHES) -> Advice:
    """What else the nodes could do, for the plan's own objective."""
    nodes = tuple(node for node in cluster.nodes if node.name not in wishes.excluded)
    costs = cluster_costs(replace(cluster, nodes=nodes), job)
    kind = Kind.SPLIT if len(planned.nodes) > 1 else Kind.SINGLE
    own = _alternative(costs, kind, [(planned.plan.stages, planned.forecast)])
    found = [own]
    found += [one for one in _others(costs, cluster, job, planned, wishes) if one.kind is not own.kind]
    best = _best(own, found, planned.objective)
    found.sort(key=lambda one: list(Kind).index(one.kind))
    return Advice(tuple(found), best, _sentence(own, best, found, planned.objective))


def _best(own: Alternative, found: Sequence[Alternative], objective: Objective) -> Alternative:
    """Of those near the best for the objective the quickest for one stream; the plan itself, if it is as good."""
    most = max(one.value(objective) for one in found)
    near = [one for one in found if one.value(objective) >= most * (1 - NEAR)]
    best = max(near, key=lambda one: one.single_tok_s)
    as_good = own in near and own.single_tok_s >= best.single_tok_s * (1 - WORTH)
    return own if as_good else best


def _others(costs: Costs, cluster: Cluster, job: Job, planned: Planned, wishes: Wishes) -> Iterator[Alternative]:
    alone = alone_on(costs)
    if alone:
        yield _alternative(costs, Kind.SINGLE, [max(alone, key=lambda one: _value(one[1], planned.objective))])
    if len(alone) > 1:
        yield _alternative(costs, Kind.REPLICAS, alone)
    if len(planned.nodes) == 1 and (split := _split(costs, cluster, job, wishes)) is not None:
        yield split
    if (pipelines := _pipelines(costs)) is not None:
        yield pipelines


Ring = tuple[tuple[StagePlan, ...], Forecast]


def _alternative(costs: Costs, kind: Kind, rings: Sequence[Ring]) -> Alternative:
    return Alternative(
        kind=kind,
        rings=tuple(stages for stages, _ in rings),
        single_tok_s=max(forecast.single_tok_s for _, forecast in rings),
        aggregate_tok_s=together(costs, rings),
    )


def _value(forecast: Forecast, objective: Objective) -> float:
    return forecast.single_tok_s if objective is Objective.SINGLE else forecast.aggregate_tok_s


def alone_on(costs: Costs) -> list[Ring]:
    """The whole model on each node that holds it."""
    layers, found = costs.job.layers, list[Ring]()
    for name, there in costs.nodes.items():
        if costs.stage_bytes(name, 0, layers) <= there.usable_bytes:
            stages = plan_of(costs, [(name, 0, layers)]).stages
            found.append((stages, predict(costs, stages)))
    return found


def _split(costs: Costs, cluster: Cluster, job: Job, wishes: Wishes) -> Alternative | None:
    """Over all nodes, where the plan uses one."""
    try:
        planned = plan_cluster(cluster, job, Strategy.PROPORTIONAL, Objective.SINGLE, wishes)
    except PlanError:
        return None
    if len(planned.nodes) < 2:
        return None
    return _alternative(costs, Kind.SPLIT, [(planned.plan.stages, planned.forecast)])


def _pipelines(costs: Costs) -> Alternative | None:
    """As many disjoint rings as give most together, some of them split; nodes are dealt out by room."""
    room = sum(one.usable_bytes for one in costs.nodes.values())
    least = min((costs.stage_bytes(name, 0, costs.job.layers) for name in costs.nodes), default=0)
    best: Alternative | None = None
    for count in range(2, min(MAX_PIPELINES, len(costs.nodes), room // max(1, least)) + 1):
        rings = [ring for group in dealt(costs, count) if (ring := _ring(costs, group)) is not None]
        if len(rings) < count or all(len(stages) == 1 for stages, _ in rings):
            continue
        found = _alternative(costs, Kind.PIPELINES, rings)
        if best is None or found.aggregate_tok_s > best.aggregate_tok_s:
            best = found
    return best


def dealt(costs: Costs, count: int) -> list[list[str]]:
    """The nodes in groups of about equal room: the largest first, each to the group that has least."""
    groups: list[list[str]] = [[] for _ in range(count)]
    have = [0] * count
    for name, there in sorted(costs.nodes.items(), key=lambda one: -one[1].usable_bytes):
        i = have.index(min(have))
        groups[i].append(name)
        have[i] += there.usable_bytes
    return groups


def _ring(costs: Costs, names: Sequence[str]) -> Ring | None:
    """A ring of some nodes, good for many streams."""
    there = Costs(costs.cluster, costs.job, {name: costs.nodes[name] for name in names})
    if len(names) <= SEARCHED_NODES:
        slices = fastest(there, Objective.THROUGHPUT)
    else:
        problem = Problem(there, names, NO_WISHES, Measure.MAX)
        found = in_order(problem, range(len(names)))
        slices = None if found is None else problem.slices(found)
    if slices is None:
        return None
    stages = plan_of(there, slices).stages
    return stages, predict(there, stages)


def _sentence(own: Alternative, best: Alternative, found: Sequence[Alternative], objective: Objective) -> str:
    here, there = (f"{rate(one.value(objective))} tok/s" for one in (own, best))
    if best is not own:
        nodes = _named(best.nodes)
        match best.kind:
            case Kind.SINGLE:
                return f"one machine would be faster: {nodes} alone gives {there}, this split {here}"
            case Kind.REPLICAS:
                return f"the whole model on each of {nodes} would give {there} together, this plan {here}"
            case Kind.PIPELINES:
                each = " and ".join("(" + ", ".join(stage.node for stage in ring) + ")" for ring in best.rings)
                which = f", {each}," if len(best.nodes) <= MAX_NAMED else ""
                return f"{len(best.rings)} pipelines{which} would give {there} together, this plan {here}"
            case Kind.SPLIT:
                return f"a split over {nodes} would be faster: {there}, this plan {here}"
    if own.kind is Kind.SINGLE:
        split = next((one for one in found if one.kind is Kind.SPLIT), None)
        instead = f": split over {len(split.nodes)} nodes it gives {rate(split.value(objective))}" if split else ""
        return f"keep it whole on {own.nodes[0]}, {there}{instead}"
    alone = next((one for one in found if one.kind is Kind.SINGLE), None)
    if alone is None:
        return f"split it: no machine holds the model alone, {len(own.nodes)} together give {here}"
    return f"split it: {here}, {alone.nodes[0]} alone gives {rate(alone.value(objective))}"


def _named(nodes: Sequence[str]) -> str:
    if len(nodes) <= MAX_NAMED:
        return ", ".join(nodes)
    return f"{', '.join(nodes[:MAX_NAMED])} and {len(nodes) - MAX_NAMED} more"
