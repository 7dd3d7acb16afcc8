"""The planner finds the best plan there is for few nodes, a good one for many, and one whenever there is one."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from dwarfstar_engine.errors import IllegalCutError, PlanError
from dwarfstar_engine.plan import search
from dwarfstar_engine.plan.cluster import Cluster, Device, Kind, Link, Measured, Node
from dwarfstar_engine.plan.cost import BATCHES, COORDINATOR_MS, cluster_costs
from dwarfstar_engine.plan.forecast import Job, Objective, Planned, Strategy, Wishes
from dwarfstar_engine.plan.planner import NO_WISHES, SLACK, fastest, plan_cluster
from dwarfstar_engine.plan.predict import plan_of, predict
from dwarfstar_engine.plan.proportional import TOO_LARGE
from support.clusters import GIB, brute, even_job, gpu, objective_value, random_cluster, random_job

SEEDS = 60  # of the 2 000 that benchmarks/planner.py compares


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_plan_is_better_than_the_planner_s(seed: int) -> None:
    rng = random.Random(seed)
    costs = cluster_costs(random_cluster(rng, 6 if seed % 8 == 0 else 5), random_job(rng, 24))
    least = brute(costs, BATCHES)
    for objective in Objective:
        found, want = fastest(costs, objective), objective_value(objective, least)
        if found is None:
            assert want == float("inf")
            continue
        forecast = predict(costs, plan_of(costs, found).stages)
        many = objective is Objective.THROUGHPUT
        got = 1000 / forecast.aggregate_tok_s if many else 1000 / forecast.single_tok_s - COORDINATOR_MS
        assert forecast.fits and want * (1 - 1e-9) <= got <= want * (1 + (SLACK if many else 0) + 1e-9)


def check(planned: Planned, cluster: Cluster, job: Job, wishes: Wishes = NO_WISHES) -> None:
    """Whole, legal, loadable, within room; every node is used once or left out with a reason."""
    at = 0
    for stage in planned.forecast.stages:
        assert stage.layers[0] == at and stage.layers[1] in job.bounds
        at = stage.layers[1]
        length = at - stage.layers[0]
        assert length not in job.need.forbidden_lengths or length == job.layers
    assert at == job.layers and planned.forecast.fits
    reasons = dict(planned.plan.excluded)
    assert sorted([*planned.nodes, *reasons]) == sorted(node.name for node in cluster.nodes)
    assert all(reasons.values()) and not wishes.excluded & set(planned.nodes)
    for node, pin in wishes.pins.items():
        assert pin in [stage.layers for stage in planned.plan.stages if stage.node == node]


@pytest.mark.parametrize("seed", range(25))
def test_whatever_cluster_plans_are_whole_and_fit(seed: int) -> None:
    rng = random.Random(f"whole {seed}")
    cluster, job = random_cluster(rng, 10), random_job(rng, 24)
    possible = fastest(cluster_costs(cluster, job), Objective.SINGLE) is not None
    for strategy in Strategy:
        for objective in Objective:
            try:
                planned = plan_cluster(cluster, job, strategy, objective)
            except PlanError as error:
                assert error.code == TOO_LARGE and not possible
            else:
                check(planned, cluster, job)
                assert planned == plan_cluster(cluster, job, strategy, objective)


@pytest.mark.parametrize("seed", range(30))
def test_pins_and_exclusions_are_honoured(seed: int) -> None:
    """Of a plan that is possible, some nodes are asked to keep exactly what they have, and unused ones to stay out."""
    rng = random.Random(f"wish {seed}")
    cluster, job = random_cluster(rng, 6), random_job(rng, 24)
    found = fastest(cluster_costs(cluster, job), Objective.THROUGHPUT)
    if found is None:
        return
    pins = {name: (a, b) for name, a, b in found if rng.random() < 0.5}
    unused = {node.name for node in cluster.nodes} - {name for name, _, _ in found}
    wishes = Wishes(pins, frozenset(name for name in unused if rng.random() < 0.5))
    for strategy in Strategy:
        for objective in Objective:
            check(plan_cluster(cluster, job, strategy, objective, wishes), cluster, job, wishes)


@pytest.mark.parametrize("nodes", [12, 30])
def test_pins_among_many_nodes(nodes: int) -> None:
    cluster = Cluster(tuple(gpu(f"n{i}", 4, 100 + i) for i in range(nodes)))
    job, wishes = even_job(60, 30), Wishes({"n3": (10, 15), "n1": (15, 17), "n0": (55, 60)})
    for strategy in Strategy:
        for objective in Objective:
            check(plan_cluster(cluster, job, strategy, objective, wishes), cluster, job, wishes)


def test_wishes_that_cannot_be_met() -> None:
    cluster, job = Cluster((gpu("a", 4, 100), gpu("b", 4, 100))), even_job(10, 5)

    def told(pins: dict[str, tuple[int, int]], excluded: frozenset[str] = frozenset(), job: Job = job) -> str:
        with pytest.raises((PlanError, IllegalCutError)) as no:
            plan_cluster(cluster, job, wishes=Wishes(pins, excluded))
        return no.value.message

    assert "no node is called 'c'" in told({"c": (0, 1)})
    assert "no node is called 'c'" in told({}, frozenset("c"))
    assert "no node is left" in told({}, frozenset("ab"))
    assert "both pinned to layer 4" in told({"a": (0, 5), "b": (4, 9)})
    assert "has layers 0–10" in told({"a": (0, 11)})
    assert "layers 0–9 need 4.50 GiB on a, which has 4.00 GiB" in told({"a": (0, 9)})
    assert "not a legal cut" in told({"a": (0, 3)}, job=replace(job, legal=(2, 4, 6, 8)))


def test_alike_nodes_are_searched_in_one_order_only() -> None:
    """Four of each of two kinds: five by five sets. Where links differ no two nodes are alike."""
    nodes = tuple(gpu(f"n{i}", 2, 100 + 300 * (i % 2)) for i in range(8))
    costs = cluster_costs(Cluster(nodes), even_job(20, 10))
    work = search.exact_work(search.Problem(costs, list(costs.nodes), Wishes(), search.Measure.SUM))
    assert work == 5 * 5 * 8 // 2 * (search.STEP_WORK + 21**2)
    differ = cluster_costs(replace(costs.cluster, pairs={("n0", "n1"): Link(10, 0.1)}), costs.job)
    work = search.exact_work(search.Problem(differ, list(differ.nodes), Wishes(), search.Measure.SUM))
    assert work == 2**8 * 8 // 2 * (search.STEP_WORK + 8 * 21**2)


@pytest.mark.parametrize("count", [40, 300])
def test_many_nodes_that_are_all_alike(count: int) -> None:
    cluster, job = Cluster(tuple(gpu(f"n{i}", 2, 300) for i in range(count))), even_job(60, 30)
    for objective in Objective:
        check(plan_cluster(cluster, job, objective=objective), cluster, job)
    assert len(plan_cluster(cluster, job).nodes) == 15  # as few as hold it


@pytest.mark.parametrize("seed", range(20))
def test_orders_and_moves_come_near_the_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for many nodes, used on few where links are alike, against the exact one."""
    rng = random.Random(f"near {seed}")
    cluster, job = replace(random_cluster(rng, 7), pairs={}), random_job(rng, 24)
    costs = cluster_costs(cluster, job)
    exact = fastest(costs, Objective.SINGLE)
    monkeypatch.setattr(search, "EXACT_WORK", 0)
    found = fastest(costs, Objective.SINGLE)
    assert (found is None) == (exact is None)
    if found is not None and exact is not None:
        got, best = (predict(costs, plan_of(costs, one).stages).single_tok_s for one in (found, exact))
        assert got >= 0.99 * best


@pytest.mark.parametrize("paired", [False, True])
def test_a_thousand_nodes(paired: bool) -> None:
    rng = random.Random(7)
    nodes = tuple(gpu(f"n{i}", rng.uniform(4, 32), rng.uniform(40, 900)) for i in range(1000 if not paired else 200))
    pairs = {(f"n{i}", f"n{i + 1}"): Link(10, 0.1) for i in range(0, 198, 2)} if paired else {}
    cluster, job = Cluster(nodes, pairs=pairs), even_job(128, 400, kv_gib=4, reserve_gib=0.3)
    for strategy in Strategy:
        planned = plan_cluster(cluster, job, strategy, Objective.THROUGHPUT)
        check(planned, cluster, job)


def test_a_near_full_cluster_of_many_nodes_still_gets_a_plan() -> None:
    """Twenty nodes of unlike sizes whose room is what the model takes, a head that only two can hold among them."""
    counts = [1 + i % 5 for i in range(20)]
    job = even_job(sum(counts), sum(counts), head_bytes=GIB // 2)
    nodes = [gpu(f"n{i}", count + 0.01, 100) for i, count in enumerate(counts)]
    nodes[7] = gpu("n7", counts[7] + 0.51, 100)
    planned = plan_cluster(Cluster(tuple(nodes)), job)
    assert planned.nodes[-1] == "n7" and len(planned.nodes) == 20


def test_a_node_that_slows_the_model_down_is_left_out_with_figures() -> None:
    cluster = Cluster((gpu("fast", 24, 900), Node("slow", (Device(Kind.CPU, 64 * GIB, 20),))))
    planned = plan_cluster(cluster, even_job(20, 10))
    assert planned.nodes == ("fast",)
    ((name, reason),) = planned.plan.excluded
    assert name == "slow"
    with_it, without = _figures(reason)
    assert without == pytest.approx(planned.forecast.single_tok_s, rel=0.01) and with_it < without


def _figures(reason: str) -> tuple[float, float]:
    with_it, _, without = reason.partition(" on it ")[2].partition(" tok/s, without it ")
    return float(with_it), float(without)


def test_a_node_too_small_for_a_layer_is_told_so() -> None:
    planned = plan_cluster(Cluster((gpu("a", 24, 900), gpu("b", 0.2, 900))), even_job(20, 10))
    assert planned.plan.excluded == (
        ("b", "one layer with its KV cache and buffers takes 0.50 GiB, and it has 0.20 GiB"),
    )


def test_devices_are_a_stage_each_where_that_is_faster() -> None:
    """For many streams two GPUs of a machine work at the same time as two stages; a layer split uses one at a time."""
    devices = (Device(Kind.GPU, 24 * GIB, 900), Device(Kind.GPU, 24 * GIB, 900))
    cluster, job = Cluster((Node("tower", devices),)), even_job(40, 30)
    many = plan_cluster(cluster, job, objective=Objective.THROUGHPUT)
    assert many.nodes == ("tower:0", "tower:1")
    assert plan_cluster(cluster, job).nodes == ("tower",)  # one stream gains nothing from it
    pinned = plan_cluster(cluster, job, objective=Objective.THROUGHPUT, wishes=Wishes({"tower": (0, 40)}))
    assert pinned.nodes == ("tower",)


def test_near_links_are_used() -> None:
    """Two sites with a slow link between: a ring crosses it only if one site cannot hold the model."""
    nodes = tuple(gpu(f"{site}{i}", 12, 300) for i in range(3) for site in "ab")
    near = [pair for pair in combinations([node.name for node in nodes], 2) if pair[0][0] == pair[1][0]]
    pairs = dict.fromkeys(near, Link(10, 0.1))
    cluster = Cluster(nodes, Link(0.05, 20), pairs)
    small = plan_cluster(cluster, even_job(40, 30))
    assert len({name[0] for name in small.nodes}) == 1
    large = plan_cluster(cluster, even_job(40, 60))
    sites = [name[0] for name in large.nodes]
    assert set(sites) == {"a", "b"} and sum(x != y for x, y in pairwise(sites)) == 1


def test_measured_speed_beats_the_data_sheet() -> None:
    """A card that throttles gets fewer layers than its twin."""
    job = even_job(40, 30)
    slow = Measured((0, 20), 60.0)
    cluster = Cluster((gpu("a", 24, 900, slow), gpu("b", 24, 900)))
    planned = plan_cluster(cluster, job, objective=Objective.THROUGHPUT)
    counts = dict(zip(planned.nodes, planned.counts, strict=True))
    assert counts["b"] > 1.4 * counts["a"]


def test_for_many_streams_nodes_that_bring_nothing_are_left_out() -> None:
    """The bottleneck is a node that must hold what the other cannot: a third one does not help."""
    nodes = (gpu("big", 20, 50), gpu("fast", 12, 900), gpu("tiny", 0.6, 900))
    job = even_job(30, 30)
    planned = plan_cluster(Cluster(nodes), replace(job, legal=(12,)), objective=Objective.THROUGHPUT)
    assert set(planned.nodes) == {"big", "fast"}


def test_proportional_uses_another_order_where_only_that_fits() -> None:
    """The head fits the first node only, so it has to come last."""
    job = even_job(4, 4, head_bytes=GIB)
    planned = plan_cluster(Cluster((gpu("a", 4.1, 100), gpu("b", 1.1, 100))), job, Strategy.PROPORTIONAL)
    assert planned.nodes == ("b", "a") and planned.counts == (1, 3)
