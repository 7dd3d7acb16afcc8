"""Which nodes make which pipeline. Pure.

Theory. Pipelines share no node. With *copies* each is one node that holds the whole model; others are spare. With
*pipelines* all nodes are dealt out so that each share has about as much room; with *auto* the advisor says whether one
ring, copies or several rings give most. A node stays in its share for as long as that serves: what was loaded and
cached there is worth more than a better division. Newcomers and spare nodes go where a share cannot serve without them.

Invariants. As many pipelines as wished, if each then holds the model; fewer rather than none. While no share holds the
model all nodes make one, so that what can be served at all is served.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.plan.advisor import Kind, advise, alone_on, dealt
from dwarfstar_engine.plan.cluster import Cluster
from dwarfstar_engine.plan.cost import cluster_costs
from dwarfstar_engine.plan.forecast import Job, Objective, Strategy
from dwarfstar_engine.plan.planner import plan_cluster
from dwarfstar_engine.settings import MAX_PIPELINES

SPARE = -1  # the share of nodes that are in no pipeline


@dataclass(frozen=True, slots=True)
class Wanted:
    """count: of pipelines. copies: each is one node with the whole model. auto: the advisor decides both.

    kind: of the advisor's alternatives, the one to take; None: its best.
    """

    count: int = 1
    copies: bool = False
    auto: bool = False
    kind: Kind | None = None

    @property
    def several(self) -> bool:
        """Whether there may ever be more than one share."""
        return self.auto or self.copies or self.count > 1


def to_text(wanted: Wanted, given: Wanted, model: str) -> str:
    """What to keep of what an owner has taken; empty: it is as it was given to the engine. model: its fingerprint."""
    if wanted == given:
        return ""
    told = {"model": model, "given": astuple(given), "wanted": astuple(wanted)}
    return json.dumps(told, separators=(",", ":"))


def from_text(text: object, given: Wanted, model: str) -> Wanted | None:
    """As it was kept; None if it is none, or damaged, or of another model, or if the engine was given something else
    since, which is the newer wish."""
    try:
        told = json.loads(text) if isinstance(text, str) else {}
        if told["model"] != model or told["given"] != list(astuple(given)):
            return None
        count, copies, auto, kind = told["wanted"]
        wanted = Wanted(int(count), bool(copies), bool(auto), None if kind is None else Kind(kind))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return wanted if 1 <= wanted.count <= MAX_PIPELINES else None


Shares = Sequence[Collection[str]]  # of each pipeline, the names of its nodes


def holds(cluster: Cluster, job: Job, names: Collection[str]) -> bool:
    """Whether these nodes together hold the model."""
    nodes = tuple(node for node in cluster.nodes if node.name in names)
    if not nodes:
        return False
    try:
        plan_cluster(replace(cluster, nodes=nodes), job, Strategy.PROPORTIONAL)
    except PlanError:
        return False
    return True


def deal(cluster: Cluster, job: Job, wanted: Wanted, objective: Objective = Objective.THROUGHPUT) -> list[list[str]]:
    """All nodes dealt out anew: the shares; who is in none is spare. Never empty: one share, if the model fits none."""
    everyone = [node.name for node in cluster.nodes]
    if wanted.auto:
        return _advised(cluster, job, objective, wanted.kind) or [everyone]
    costs = cluster_costs(cluster, job)
    if wanted.copies:
        best = sorted(alone_on(costs), key=lambda ring: -ring[1].aggregate_tok_s)[: wanted.count]
        return [[stages[0].node] for stages, _ in best] or [everyone]
    for count in range(min(wanted.count, len(everyone)), 1, -1):
        groups = dealt(costs, count)
        if all(holds(cluster, job, group) for group in groups):
            return groups
    return [everyone]


def _advised(cluster: Cluster, job: Job, objective: Objective, kind: Kind | None) -> list[list[str]] | None:
    try:
        planned = plan_cluster(cluster, job, Strategy.FASTEST, objective)
    except PlanError:
        return None
    advice = advise(cluster, job, planned)
    take = next((one for one in advice.alternatives if one.kind is kind), None) if kind else advice.take
    if take is None or take.kind is Kind.SPLIT:
        return None  # whose nodes are the planner's to choose
    return [[stage.node for stage in ring] for ring in take.rings[:MAX_PIPELINES]]


def place(cluster: Cluster, job: Job, wanted: Wanted, shares: Shares, name: str) -> int:
    """Where a node goes that is in no share: the share's index, or SPARE. ``shares`` are of the nodes that are here."""
    lacking = [index for index, share in enumerate(shares) if not holds(cluster, job, share)]
    if wanted.copies:
        if holds(cluster, job, [name]):
            return lacking[0] if lacking else SPARE
        return 0 if len(lacking) == len(shares) else SPARE
    room = {other: costs.usable_bytes for other, costs in cluster_costs(cluster, job).nodes.items()}
    sizes = [sum(room[one] for one in share) for share in shares]
    if lacking:
        return max(lacking, key=lambda index: (sizes[index], -index))  # the one that lacks least
    if wanted.auto:
        return SPARE  # until the advisor is asked again
    return min(range(len(shares)), key=lambda index: (sizes[index], index))


def mend(
    cluster: Cluster, job: Job, shares: Shares, spare: Sequence[str], broken: Collection[int]
) -> Mapping[str, int]:
    """Nodes that are to change their share, since shares lost nodes for good. broken: those that wait for nobody any
    more. Nodes of shares that serve stay."""
    lacking = [index for index, share in enumerate(shares) if not holds(cluster, job, share)]
    if len(lacking) == len(shares):
        return {node.name: 0 for node in cluster.nodes} if set(lacking) <= set(broken) else {}
    pool = [*spare, *(name for index in lacking if index in broken for name in shares[index])]
    for index in sorted(set(lacking) & set(broken), key=lambda index: -len(shares[index])):
        team = list(shares[index])
        for name in pool:
            if holds(cluster, job, team):
                break
            team += [name] if name not in team else []
        if holds(cluster, job, team):
            return {name: index for name in team if name not in shares[index]}
    return {}
