"""Random clusters and jobs for the planner, and the best plan of each by trying everything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations

import numpy as np

from dwarfstar_engine.model.costs import ModelCosts
from dwarfstar_engine.plan.cluster import Cluster, Device, Kind, Link, Measured, Node
from dwarfstar_engine.plan.cost import Costs, busy_ms, row_bytes
from dwarfstar_engine.plan.forecast import Job, Objective
from dwarfstar_engine.plan.proportional import Need

GIB = 1 << 30
MIB = 1 << 20


def even_job(layers: int, weights_gib: float, *, kv_gib: float = 0.0, reserve_gib: float = 0.0, **more: int) -> Job:
    """A model of equal layers, cut anywhere. more: of ModelCosts."""
    cells = 4096
    costs = ModelCosts(
        layer_bytes=(int(weights_gib * GIB / layers),) * layers,
        head_bytes=more.get("head_bytes", 0),
        embedding_bytes=0,
        kv_bytes_per_token=(int(kv_gib * GIB / layers / cells),) * layers,
        n_embd=more.get("n_embd", 4096),
    )
    return Job(costs, tuple(range(1, layers)), Need(cells, int(reserve_gib * GIB)))


def gpu(name: str, memory_gib: float, gb_s: float, *measured: Measured) -> Node:
    return Node(name, (Device(Kind.GPU, int(memory_gib * GIB), gb_s),), measured=measured)


def random_cluster(rng: random.Random, most_nodes: int) -> Cluster:
    nodes = []
    for i in range(rng.randint(1, most_nodes)):
        kind = rng.choice(list(Kind))
        memory = int(rng.choice([0.3, 0.6, 1, 2, 4]) * rng.uniform(0.5, 1.5) * GIB)
        speed = rng.choice([20, 40, 100, 360, 936]) * rng.uniform(0.8, 1.2)
        batches = ((2, rng.uniform(4, 9)), (8, rng.uniform(6, 30))) if rng.random() < 0.3 else ()
        measured = (Measured((0, 1), rng.uniform(0.5, 4), batches=batches),) if rng.random() < 0.4 else ()
        nodes.append(Node(f"n{i}", (Device(kind, memory, speed),), measured=measured))
    pairs = {}
    if rng.random() < 0.5:
        for a, b in combinations([node.name for node in nodes], 2):
            if rng.random() < 0.6:
                pairs[a, b] = Link(rng.choice([0.05, 0.3, 1, 10]), rng.choice([0.05, 0.3, 3, 20]))
    return Cluster(tuple(nodes), Link(rng.choice([0.1, 1, 10]), rng.choice([0.1, 1, 5])), pairs)


def random_job(rng: random.Random, most_layers: int) -> Job:
    layers = rng.randint(1, most_layers)
    uneven = rng.random() < 0.5
    sizes = tuple(int(rng.uniform(0.3, 1.7) * 60 * MIB) if uneven else 60 * MIB for _ in range(layers))
    legal = [cut for cut in range(1, layers) if rng.random() < 0.8]
    lengths = (rng.randint(1, layers),) if rng.random() < 0.2 else ()
    costs = ModelCosts(sizes, rng.randint(0, 300) * MIB, 0, (rng.choice([0, 2048]),) * layers, n_embd=4096)
    return Job(costs, tuple(legal), Need(4096, rng.randint(0, 40) * MIB, lengths))


@dataclass(frozen=True, slots=True)
class Brute:
    """The best there is: single_ms of one stream's round, and ms for each token of the slowest part with many."""

    single_ms: float
    many_ms: float


def brute(costs: Costs, batches: tuple[int, ...]) -> Brute:
    """Every choice and order of nodes; of each order all cuts, by a recursion that knows nothing of the planner's."""
    tables = {name: _table(costs, name, 1) for name in costs.nodes}
    single = min((_least(costs, order, tables, None) for order in _orders(costs)), default=np.inf)
    many = np.inf
    for batch in batches:
        tables = {name: _table(costs, name, batch) for name in costs.nodes}
        many = min([many, *(_least(costs, order, tables, batch) / batch for order in _orders(costs))])
    return Brute(float(single), float(many))


def _orders(costs: Costs) -> Iterator[tuple[str, ...]]:
    for count in range(1, len(costs.nodes) + 1):
        yield from permutations(costs.nodes, count)


def _table(costs: Costs, name: str, batch: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """ms of each slice on a node, with the very functions a forecast is made of; infinite where it may not be."""
    job, bounds = costs.job, costs.job.bounds
    table = np.full((len(bounds), len(bounds)), np.inf)
    for i, a in enumerate(bounds):
        for j, b in enumerate(bounds[i + 1 :], i + 1):
            forbidden = b - a in job.need.forbidden_lengths and b - a < job.layers
            if not forbidden and costs.stage_bytes(name, a, b) <= costs.nodes[name].usable_bytes:
                table[i, j] = costs.nodes[name].step_ms(a, b, batch)
    return table


def _least(
    costs: Costs,
    order: tuple[str, ...],
    tables: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]],
    batch: int | None,
) -> float:
    """With every node of ``order`` used. batch None: the sum for one stream, else the slowest part."""
    at = tables[order[0]][0]
    for before, node in pairwise(order):
        if batch is None:
            at = np.min(at[:, None] + tables[node], axis=0) + costs.hop_ms(before, node)
        else:
            wire = busy_ms(costs.link(before, node), batch * row_bytes(costs.job))
            at = np.maximum(np.min(np.maximum(at[:, None], tables[node]), axis=0), wire)
    closing = costs.closing_ms(order[-1], order[0]) if batch is None else 0.0
    return float(at[-1]) + closing


def objective_value(objective: Objective, found: Brute) -> float:
    return found.single_ms if objective is Objective.SINGLE else found.many_ms
