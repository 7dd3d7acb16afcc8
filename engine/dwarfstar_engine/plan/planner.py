"""The planner: (cluster, job, wishes, strategy, objective) → which nodes, in which order, with which layers, and why.

- *proportional*: every node gets layers by its effective VRAM, in the order given.
- *fastest*: the nodes, order and cuts of least predicted time, for one stream or for many. For many, of the plans
  within ``SLACK`` of the best the one that is quickest for one stream: it drops nodes that bring nothing.

Both keep to room, legal cuts, forbidden lengths, pins and exclusions; where no plan does, :mod:`.remedy` finds what
would make one possible. A node with several devices is a stage, or a stage for each, whichever is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.model.costs import ModelCosts
from dwarfstar_engine.plan.capacity import usable_bytes
from dwarfstar_engine.plan.cluster import Cluster, Kind, Node
from dwarfstar_engine.plan.cost import BATCHES, Costs, cluster_costs, kind_of
from dwarfstar_engine.plan.forecast import Forecast, Job, Objective, Planned, Strategy, Wishes
from dwarfstar_engine.plan.predict import plan_of, predict
from dwarfstar_engine.plan.proportional import GIB, Plan, check_pins, proportional, too_large
from dwarfstar_engine.plan.search import Found, Measure, Problem, best, is_exact

SLACK = 0.005  # of the best throughput, given away for a quicker single stream
ROUGHLY = 1.05  # times the best: batch sizes that a first look finds farther off are given up
MAX_TOLD = 16  # nodes left out for which the effect of using them is worked out; the others get the reason alone
CORES_BUSY = "the cores of its machine are busy without it"
NO_WISHES = Wishes()


def plan_cluster(
    cluster: Cluster,
    job: Job,
    strategy: Strategy = Strategy.FASTEST,
    objective: Objective = Objective.SINGLE,
    wishes: Wishes = NO_WISHES,
) -> Planned:
    """A plan with its forecast. Raises PlanError: no node is there, nothing fits, or a wish cannot be met."""
    usable = [node for node in cluster.nodes if node.name not in wishes.excluded]
    told = [(node.name, "left out as you asked") for node in cluster.nodes if node.name in wishes.excluded]
    if not usable:
        raise PlanError("no node is left to plan for: describe one, or exclude fewer", code="no_nodes")
    _check_wishes(cluster, wishes)
    found: list[Planned] = []
    error: PlanError | None = None
    crowded = strategy is Strategy.FASTEST and objective is Objective.THROUGHPUT
    for nodes in _variants(usable, wishes, crowded=crowded):
        costs = cluster_costs(replace(cluster, nodes=nodes), job)
        names = {node.name.partition(":")[0] for node in nodes}
        spare = [(node.name, CORES_BUSY) for node in usable if node.name.partition(":")[0] not in names]
        try:
            found.append(_planned(costs, strategy, objective, wishes, [*told, *spare]))
        except PlanError as none:
            error = error or none
    if not found:
        assert error is not None
        raise error
    return max(found, key=lambda one: value(one.forecast, objective))


def value(forecast: Forecast, objective: Objective) -> float:
    """What an objective wants most of."""
    return forecast.single_tok_s if objective is Objective.SINGLE else forecast.aggregate_tok_s


def rate(tok_s: float) -> str:
    """Tokens a second as they are told: three digits."""
    return f"{tok_s:.0f}" if tok_s >= 100 else f"{tok_s:.1f}" if tok_s >= 10 else f"{tok_s:.2f}"


def _check_wishes(cluster: Cluster, wishes: Wishes) -> None:
    known = {node.name for node in cluster.nodes}
    for name in sorted((wishes.pins.keys() | wishes.excluded) - known):
        raise PlanError(f"no node is called {name!r}: there are {', '.join(sorted(known))}", code="no_such_node")


def _variants(nodes: Sequence[Node], wishes: Wishes, *, crowded: bool) -> list[tuple[Node, ...]]:
    """Each node as one stage; where some have several devices, each unpinned device as a stage; and with ``crowded``,
    where nodes want more cores than their machine has, as many as it has cores for.

    The search knows stages and links, and not that more stages than cores do not make it faster: so both are tried.
    """
    whole = tuple(nodes)
    found = [whole]
    apart = tuple(part for node in nodes for part in ((node,) if node.name in wishes.pins else by_device(node)))
    if len(apart) > len(whole):
        found.append(apart)
    fewer = _with_cores(whole, wishes)
    if crowded and len(fewer) < len(whole):
        found.append(fewer)
    return found


def _with_cores(nodes: Sequence[Node], wishes: Wishes) -> tuple[Node, ...]:
    """Of each machine the nodes that its cores are enough for: pinned ones first, then those with most room."""
    left = {node.machine: node.cores for node in nodes}
    kept = set[str]()
    for node in sorted(nodes, key=lambda one: (one.name not in wishes.pins, -usable_bytes(one))):
        counts = node.cores and kind_of(node) is Kind.CPU
        if not counts or left[node.machine] >= node.threads or node.name in wishes.pins:
            kept.add(node.name)
            left[node.machine] -= node.threads if counts else 0
    return tuple(node for node in nodes if node.name in kept)


def by_device(node: Node) -> tuple[Node, ...]:
    """A node for each device. One with an override or measured as a whole stays whole."""
    if len(node.devices) == 1 or node.override is not None or node.measured:
        return (node,)
    return tuple(
        replace(node, name=f"{node.name}:{i}", devices=(device,), host=node.machine)
        for i, device in enumerate(node.devices)
    )


def _planned(
    costs: Costs, strategy: Strategy, objective: Objective, wishes: Wishes, told: Sequence[tuple[str, str]]
) -> Planned:
    capacities = {name: one.capacity for name, one in costs.nodes.items()}
    check_pins(costs.job.costs, costs.job.legal, costs.job.need, capacities, wishes.pins, _files(costs))
    plan = _proportional(costs, wishes) if strategy is Strategy.PROPORTIONAL else _fastest(costs, objective, wishes)
    plan = replace(plan, excluded=(*told, *plan.excluded))
    return Planned(plan, predict(costs, plan.stages), strategy, objective)


def _files(costs: Costs) -> dict[str, ModelCosts]:
    """What the file that each node holds costs."""
    return {name: one.costs for name, one in costs.nodes.items()}


def _proportional(costs: Costs, wishes: Wishes) -> Plan:
    job = costs.job

    def share(names: Sequence[str]) -> Plan:
        nodes = [costs.nodes[name].capacity for name in names]
        return proportional(job.costs, job.legal, job.need, nodes, by_node=_files(costs), pins=wishes.pins)

    try:
        return share(list(costs.nodes))
    except PlanError:
        found = best(Problem(costs, list(costs.nodes), wishes, Measure.SUM))
        if found is None:
            raise
    # It fits in another order only: layers are unequal, or the head is large.
    names = list(costs.nodes)
    first = [names[i] for i, _, _ in found.picks]
    return share([*first, *(name for name in names if name not in first)][: len(first)])


def fastest(costs: Costs, objective: Objective, wishes: Wishes = NO_WISHES) -> list[tuple[str, int, int]] | None:
    """The stages of least predicted time as (node, first layer, end), or None if none were found that fit."""
    names = list(costs.nodes)
    if objective is Objective.SINGLE:
        problem = Problem(costs, names, wishes, Measure.SUM)
        found = best(problem)
    else:
        found, problem = _most(costs, names, wishes)
    if found is None:
        return None
    slices = problem.slices(found)
    return slices if wishes.pins else _as_listed(costs, slices, objective)


def _as_listed(costs: Costs, slices: list[tuple[str, int, int]], objective: Objective) -> list[tuple[str, int, int]]:
    """The same stages in the order in which the nodes are listed, if that is as fast: it is easier to read."""
    counts = {name: b - a for name, a, b in slices}
    names = [name for name in costs.nodes if name in counts]
    bounds = [0, *accumulate(counts[name] for name in names)]
    listed = [(name, a, b) for name, (a, b) in zip(names, pairwise(bounds), strict=True)]
    if not set(bounds) <= set(costs.job.bounds):
        return slices
    here, there = (predict(costs, plan_of(costs, one).stages) for one in (slices, listed))
    worse = any(value(there, one) < value(here, one) * (1 - 1e-6) for one in (objective, Objective.SINGLE))
    return slices if worse or not there.fits else listed


def _most(costs: Costs, names: list[str], wishes: Wishes) -> tuple[Found | None, Problem]:
    """The plan of most tokens a second with as many streams a lane as are best, then quick for one stream."""
    measured = any(one.batches for one in costs.nodes.values())
    looked: dict[int, Found] = {}
    for streams in BATCHES if measured else BATCHES[:1]:
        problem = Problem(costs, names, wishes, Measure.MAX, streams)
        if (found := best(problem, polish=False)) is not None:
            looked[streams] = found
    near = min((one.value / streams for streams, one in looked.items()), default=0.0) * ROUGHLY
    problem, least, batch = Problem(costs, names, wishes, Measure.MAX), None, 1
    for streams, first in looked.items():
        if first.value / streams > near:
            continue
        tried = Problem(costs, names, wishes, Measure.MAX, streams)
        found = first if is_exact(tried) else best(tried)
        if found is not None and (least is None or found.value / streams < least.value / batch):
            problem, least, batch = tried, found, streams
    if least is None:
        return None, problem
    quick = Problem(costs, names, wishes, Measure.SUM, batch, limit_ms=least.value * (1 + SLACK))
    found = best(quick)
    return (found, quick) if found is not None else (least, problem)


def _fastest(costs: Costs, objective: Objective, wishes: Wishes) -> Plan:
    stages = fastest(costs, objective, wishes)
    if stages is None:
        raise too_large(costs.job.costs, costs.job.need, [one.capacity for one in costs.nodes.values()])
    used = {name for name, _, _ in stages}
    left_out = [name for name in costs.nodes if name not in used]
    reasons = [
        (name, why_not(costs, stages, name, objective) if i < MAX_TOLD else "the plan is faster without it")
        for i, name in enumerate(left_out)
    ]
    return plan_of(costs, stages, reasons)


def why_not(costs: Costs, stages: Sequence[tuple[str, int, int]], name: str, objective: Objective) -> str:
    """Why a node is left out of ``stages``: what the first block of layers on it would change, in one sentence."""
    bounds = costs.job.bounds
    here = value(predict(costs, plan_of(costs, stages).stages), objective)
    node, _a, b = stages[0]
    first = next(bound for bound in bounds if bound > 0)
    takes, has = costs.stage_bytes(name, 0, first), costs.nodes[name].usable_bytes
    if takes > has:
        return f"one layer with its KV cache and buffers takes {takes / GIB:.2f} GiB, and it has {has / GIB:.2f} GiB"
    rest = [(node, first, b)] if first < b else []
    with_it = [(name, 0, first), *rest, *stages[1:]]
    there = value(predict(costs, plan_of(costs, with_it).stages), objective)
    count = f"{first} layer{'s' * (first != 1)}"
    effect = "only slows the model down" if there < here else "adds nothing"
    return f"it {effect}: with {count} on it {rate(there)} tok/s, without it {rate(here)}"
