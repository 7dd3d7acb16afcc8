"""The planner against the best there is, against published figures, and against the clock.

``python benchmarks/planner.py`` tries 2 000 random clusters of up to six nodes and 24 layers, half of them with links
of their own, by every order and every cut (about a minute); plans the mixed home lab of tests/topologies whose figures
others published; and plans large clusters. Exits with 1 if a plan is more than 1 % from the best, or missing.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from dwarfstar_engine.errors import PlanError  # noqa: E402
from dwarfstar_engine.plan.cluster import Cluster, Link  # noqa: E402
from dwarfstar_engine.plan.cost import BATCHES, COORDINATOR_MS, Costs, cluster_costs  # noqa: E402
from dwarfstar_engine.plan.forecast import Objective, Strategy, Wishes  # noqa: E402
from dwarfstar_engine.plan.planner import fastest, plan_cluster  # noqa: E402
from dwarfstar_engine.plan.predict import plan_of, predict  # noqa: E402
from dwarfstar_engine.plan.topology import read_topology  # noqa: E402
from support.clusters import Brute, brute, even_job, gpu, objective_value, random_cluster, random_job  # noqa: E402

CLUSTERS = 2000
MOST = 1.01
GPUS = frozenset({"mini"})  # left out where only the GPUs were used
ALONE = frozenset({"mini", "workstation"})
# layers and GiB of q4 files of the size; who was left out, and what was published
PUBLISHED = (
    ("8B q4, tower alone", 40, 4.6, ALONE),
    ("8B q4, GPUs only", 40, 4.6, GPUS),
    ("8B q4, all three", 40, 4.6, frozenset[str]()),
    ("14B q4, tower alone", 48, 8.4, ALONE),
    ("14B q4, GPUs only", 48, 8.4, GPUS),
    ("70B q4, all three", 80, 39.6, frozenset[str]()),
)


def ratio(costs: Costs, objective: Objective, least: Brute) -> float:
    """The planner's time over the least there is; infinite if only one of them has a plan."""
    found, want = fastest(costs, objective), objective_value(objective, least)
    if found is None:
        return 1.0 if want == float("inf") else float("inf")
    forecast = predict(costs, plan_of(costs, found).stages)
    single = 1000 / forecast.single_tok_s - COORDINATOR_MS
    return (single if objective is Objective.SINGLE else 1000 / forecast.aggregate_tok_s) / want


def against_the_best() -> float:
    worst = 0.0
    for seed in range(CLUSTERS):
        rng = random.Random(seed)  # noqa: S311 - clusters, no secrets
        costs = cluster_costs(random_cluster(rng, 6 if seed % 8 == 0 else 5), random_job(rng, 24))
        least = brute(costs, BATCHES)
        for objective in Objective:
            if (found := ratio(costs, objective, least)) > worst:
                worst = found
                print(f"  seed {seed}, {objective}: {worst:.5f}")
    return worst


def against_published() -> None:
    topology = read_topology((ROOT / "tests" / "topologies" / "homelab-3.toml").read_bytes())
    print("| | published tok/s | proportional | ratio | fastest | ratio |\n|---|---|---|---|---|---|")
    for name, layers, weights_gib, without in PUBLISHED:
        there = topology.expect["published_tok_s"][name]
        job, wishes = even_job(layers, weights_gib), Wishes(excluded=without)
        cells = []
        for strategy in Strategy:
            planned = plan_cluster(topology.cluster, job, strategy, wishes=wishes)
            ours, nodes = planned.forecast.single_tok_s, len(planned.nodes)
            cells.append(f"{ours:.1f} ({nodes} node{'s' * (nodes != 1)}) | {ours / there:.2f}")
        print(f"| {name} | {there} | {' | '.join(cells)} |")


def large() -> Iterator[tuple[str, Cluster]]:
    for count in (8, 64, 1000):
        for name, paired in (("one kind of link", False), ("links of their own", True)):
            rng = random.Random(count)  # noqa: S311 - clusters, no secrets
            nodes = tuple(gpu(f"n{i}", rng.uniform(4, 64), rng.uniform(40, 1000)) for i in range(count))
            drawn = [(rng.randrange(count), rng.randrange(count)) for _ in range(3 * count)] if paired else []
            pairs = {(f"n{i}", f"n{j}"): Link(rng.uniform(0.1, 40), rng.uniform(0.05, 5)) for i, j in drawn if i != j}
            yield f"{count} nodes, {name}", Cluster(nodes, pairs=pairs)


def against_the_clock() -> None:
    print("| cluster, 128 layers | weights | proportional | one stream | many |\n|---|---|---|---|---|")
    for name, cluster in large():
        for weights_gib in (40, 400):
            job, cells = even_job(128, weights_gib, kv_gib=2, reserve_gib=0.3), list[str]()
            for strategy, objective in (
                (Strategy.PROPORTIONAL, Objective.SINGLE),
                (Strategy.FASTEST, Objective.SINGLE),
                (Strategy.FASTEST, Objective.THROUGHPUT),
            ):
                started = time.process_time()
                try:
                    plan_cluster(cluster, job, strategy, objective)
                    cells.append(f"{time.process_time() - started:.2f} s")
                except PlanError:
                    cells.append(f"does not fit ({time.process_time() - started:.2f} s)")
            print(f"| {name} | {weights_gib} GiB | {' | '.join(cells)} |")


def main() -> None:
    against_published()
    against_the_clock()
    print(f"{CLUSTERS} random clusters against every order and cut; the worst so far:")
    worst = against_the_best()
    print(f"worst: {worst:.4f} of the least time there is")
    raise SystemExit(worst > MOST)


if __name__ == "__main__":
    main()
