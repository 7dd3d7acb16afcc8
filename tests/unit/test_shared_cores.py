"""Nodes that share a machine share its processors: what that does to forecasts and to plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dwarfstar_engine.model.costs import ModelCosts
from dwarfstar_engine.plan.advisor import Kind as Alternative
from dwarfstar_engine.plan.advisor import advise
from dwarfstar_engine.plan.cluster import Cluster, Device, Kind, Measured, Node
from dwarfstar_engine.plan.cost import CROWDED, ROW_CORE_MS, TOKEN_CORE_MS, UNEVEN, cluster_costs
from dwarfstar_engine.plan.forecast import Forecast, Job, Objective, Strategy, Wishes
from dwarfstar_engine.plan.planner import CORES_BUSY, plan_cluster
from dwarfstar_engine.plan.predict import plan_of, predict
from dwarfstar_engine.plan.proportional import Need
from support.clusters import GIB, MIB

HOST = "127.0.0.1"
JOB = Job(ModelCosts((4 * MIB,) * 24, 0, 0, (0,) * 24, n_embd=64), tuple(range(1, 24)), Need(0, 0))
WHOLE = Measured((0, 24), 24.0, last=True)  # a layer takes about a millisecond


def local(name: str, cores: int = 2, threads: int = 1, host: str = HOST, kind: Kind = Kind.CPU) -> Node:
    device = Device(kind, 4 * GIB, 20.0)
    return Node(name, (device,), measured=(WHOLE,), host=host, cores=cores, threads=threads)


def forecast(nodes: list[Node], *cuts: int, head: str = "") -> Forecast:
    costs = cluster_costs(Cluster(tuple(nodes), head=head), JOB)
    bounds = (0, *cuts, JOB.layers)
    slices = [(node.name, a, b) for node, a, b in zip(nodes, bounds[:-1], bounds[1:], strict=True)]
    return predict(costs, plan_of(costs, slices).stages)


def test_more_stages_than_cores_make_no_token_come_sooner() -> None:
    nodes = [local(name) for name in "abcd"]
    two, four = forecast(nodes[:2], 12), forecast(nodes, 6, 12, 18)
    assert four.bottleneck == "a + b + c + d" and four.aggregate_tok_s < two.aggregate_tok_s
    computed = sum(stage.ms for stage in four.stages)
    assert four.aggregate_tok_s == pytest.approx(2 * 1000 / (CROWDED * computed + 4 * ROW_CORE_MS) / (1 + UNEVEN))
    apart = forecast([local(name, host=name) for name in "abcd"], 6, 12, 18)
    assert apart.aggregate_tok_s > 1.5 * four.aggregate_tok_s


def test_how_much_of_the_cores_more_stages_leave_idle_is_bounded() -> None:
    def cores_ms(names: str) -> float:
        cuts = range(24 // len(names), 24, 24 // len(names))
        found = forecast([local(name) for name in names], *cuts)
        took = sum(stage.ms * CROWDED + ROW_CORE_MS for stage in found.stages)
        return 2 * 1000 / found.aggregate_tok_s / took

    assert [cores_ms(names) for names in ("abc", "abcd", "abcdefgh")] == pytest.approx(
        [1 + UNEVEN / 2, 1 + UNEVEN, 1 + UNEVEN]
    )


def test_one_stream_has_a_core_to_itself() -> None:
    """Its stages run one after another."""
    nodes = [local(name) for name in "abcd"]
    free = [local(name, cores=0) for name in "abcd"]
    assert forecast(nodes, 6, 12, 18).single_tok_s == forecast(free, 6, 12, 18).single_tok_s


def test_stages_that_compute_at_the_same_time_slow_each_other_down() -> None:
    """Of two on two cores the larger one sets the pace, and takes longer than on a machine of its own."""
    shared, apart = (forecast([local("a", host=one), local("b", host="here")], 16) for one in ("here", "there"))
    slowest = max(stage.ms for stage in apart.stages)
    assert apart.aggregate_tok_s == pytest.approx(1000 / slowest)
    assert shared.aggregate_tok_s == pytest.approx(1000 / (CROWDED * slowest + ROW_CORE_MS))
    assert shared.bottleneck == apart.bottleneck == "a"


def test_the_coordinator_takes_its_share_where_it_is() -> None:
    nodes = [local("a", cores=1), local("b", cores=1)]
    here, elsewhere = (1000 / forecast(nodes, 12, head=head).aggregate_tok_s for head in (HOST, "far"))
    assert here - elsewhere == pytest.approx(TOKEN_CORE_MS)


def test_threads_take_as_many_cores() -> None:
    one, both = (1000 / forecast([local("a", 2, n), local("b", 2, n)], 12).aggregate_tok_s for n in (1, 2))
    assert both == pytest.approx(2 * one, rel=0.1)


def test_what_computes_on_gpus_takes_no_cores() -> None:
    nodes = [local(name, cores=1, kind=Kind.GPU) for name in "ab"]
    found = forecast(nodes, 12)
    assert found.aggregate_tok_s == pytest.approx(1000 / max(stage.ms for stage in found.stages))


def test_a_plan_for_many_streams_has_no_more_stages_than_cores() -> None:
    nodes = tuple(local(name) for name in "abcd")
    planned = plan_cluster(Cluster(nodes), JOB, Strategy.FASTEST, Objective.THROUGHPUT)
    assert planned.counts == (12, 12)
    assert [why for _, why in planned.plan.excluded] == [CORES_BUSY] * 2
    pinned = plan_cluster(Cluster(nodes), JOB, objective=Objective.THROUGHPUT, wishes=Wishes({"d": (18, 24)}))
    assert "d" in pinned.nodes


def test_more_stages_than_cores_where_only_they_hold_the_model() -> None:
    room = Device(Kind.CPU, 30 * MIB, 20.0, usable_bytes=30 * MIB)
    nodes = tuple(replace(local(name), devices=(room,)) for name in "abcd")
    assert len(plan_cluster(Cluster(nodes), JOB, objective=Objective.THROUGHPUT).nodes) == 4


def test_whole_copies_on_one_machine_share_its_cores() -> None:
    """Two on two cores are slowed down by each other; four give no more than two."""

    def replicas(nodes: list[Node], head: str = "") -> float:
        cluster = Cluster(tuple(nodes), head=head)
        planned = plan_cluster(cluster, JOB, Strategy.PROPORTIONAL, Objective.THROUGHPUT)
        found = advise(cluster, JOB, planned).alternatives
        return next(one.aggregate_tok_s for one in found if one.kind is Alternative.REPLICAS)

    alone = forecast([local("a")]).aggregate_tok_s
    two, four = (replicas([local(name) for name in names]) for names in ("ab", "abcd"))
    assert two == pytest.approx(2 * 1000 / (CROWDED * 1000 / alone + ROW_CORE_MS))
    assert four == pytest.approx(two / (1 + UNEVEN))
    assert replicas([local(name) for name in "ab"], head=HOST) < two
    assert replicas([local(name, host=name) for name in "ab"]) == pytest.approx(2 * alone)
    assert replicas([local("a", host="x"), local("b", host="x"), local("c", host="y")]) == pytest.approx(two + alone)
