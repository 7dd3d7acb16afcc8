"""The advisor says what else the nodes could do, and when that is better."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.plan.advisor import Advice, Kind, advise
from dwarfstar_engine.plan.cluster import Cluster, Device, Link, Node
from dwarfstar_engine.plan.cluster import Kind as DeviceKind
from dwarfstar_engine.plan.forecast import Job, Objective, Strategy, Wishes
from dwarfstar_engine.plan.planner import plan_cluster
from dwarfstar_engine.plan.remedy import DoesNotFitError, explained, tight
from support.clusters import GIB, even_job, gpu

PAIR = Cluster((gpu("a", 24, 900), gpu("b", 24, 450)))


def asked(
    cluster: Cluster,
    job: Job,
    objective: Objective = Objective.SINGLE,
    strategy: Strategy = Strategy.FASTEST,
    excluded: frozenset[str] = frozenset(),
) -> Advice:
    wishes = Wishes(excluded=excluded)
    return advise(cluster, job, plan_cluster(cluster, job, strategy, objective, wishes), wishes)


def kinds(advice: Advice) -> list[Kind]:
    return [one.kind for one in advice.alternatives]


def test_a_split_of_what_one_machine_holds_is_told_so() -> None:
    advice = asked(PAIR, even_job(30, 10), strategy=Strategy.PROPORTIONAL)
    assert advice.take.kind is Kind.SINGLE and advice.take.nodes == ("a",)
    assert advice.sentence.startswith("one machine would be faster: a alone gives ")


def test_a_model_that_stays_whole_says_what_a_split_would_cost() -> None:
    advice = asked(PAIR, even_job(30, 10))
    assert advice.take.kind is Kind.SINGLE and advice.sentence.startswith("keep it whole on a, ")
    split = next(one for one in advice.alternatives if one.kind is Kind.SPLIT)
    assert split.single_tok_s < advice.take.single_tok_s and "over 2 nodes" in advice.sentence


def test_a_model_for_no_machine_alone() -> None:
    advice = asked(PAIR, even_job(30, 40))
    assert kinds(advice) == [Kind.SPLIT]
    assert advice.sentence.startswith("split it: no machine holds the model alone, 2 together give ")


def test_many_streams_want_replicas() -> None:
    """Three equal machines: whole copies need no links, and add up."""
    cluster = Cluster(tuple(gpu(name, 24, 900) for name in "abc"), Link(1, 0.3))
    advice = asked(cluster, even_job(30, 10), Objective.THROUGHPUT)
    one, many = (next(x for x in advice.alternatives if x.kind is k) for k in (Kind.SINGLE, Kind.REPLICAS))
    assert many.aggregate_tok_s == pytest.approx(3 * one.aggregate_tok_s)
    assert advice.take.kind is Kind.REPLICAS and "the whole model on each of a, b, c" in advice.sentence


def test_many_streams_want_short_pipelines() -> None:
    cluster = Cluster(tuple(gpu(f"n{i}", 12, 300) for i in range(6)), Link(1, 2.0))
    advice = asked(cluster, even_job(40, 20), Objective.THROUGHPUT)
    pipelines = next(one for one in advice.alternatives if one.kind is Kind.PIPELINES)
    assert [len(ring) for ring in pipelines.rings] == [2, 2, 2] and len(set(pipelines.nodes)) == 6
    assert advice.take is pipelines and advice.sentence.startswith("3 pipelines, (n0, n3) and ")


def test_excluded_nodes_are_no_alternative() -> None:
    advice = asked(PAIR, even_job(30, 10), excluded=frozenset("a"))
    assert {node for one in advice.alternatives for node in one.nodes} == {"b"}


def test_the_advice_is_never_worse_than_the_plan() -> None:
    for objective in Objective:
        for strategy in Strategy:
            for weights in (5, 20, 40):
                advice = asked(PAIR, even_job(30, weights), objective, strategy)
                own = advice.alternatives[-1] if len(advice.alternatives) == 1 else advice.take
                assert all(one.value(objective) <= 1.03 * own.value(objective) + 1e-9 for one in advice.alternatives)


# --- what would make it fit ---


def no_plan(cluster: Cluster, job: Job) -> PlanError:
    with pytest.raises(PlanError) as no:
        plan_cluster(cluster, job)
    return explained(cluster, job, Wishes(), no.value)


def test_a_smaller_cache_is_proposed_and_not_taken() -> None:
    """10 GiB of weights and 6 of cache on 14: q8_0 makes it 13.2, and half the context 13."""
    error = no_plan(Cluster((gpu("a", 14, 900),)), even_job(10, 10, kv_gib=6))
    assert isinstance(error, DoesNotFitError) and error.exit_code == 3
    assert error.options == ("with --kv q8_0", "with --context 2048")
    assert error.message.endswith("it would fit with --kv q8_0, or with --context 2048")


def test_what_would_not_help_is_not_proposed() -> None:
    error = no_plan(Cluster((gpu("a", 10.2, 900),)), even_job(10, 10, kv_gib=6))
    assert isinstance(error, DoesNotFitError) and error.options == ()
    assert "it would fit" not in error.message
    without = no_plan(Cluster((gpu("a", 8, 900),)), even_job(10, 10))
    assert not isinstance(without, DoesNotFitError)


def test_a_plan_that_only_just_fits_says_so() -> None:
    job = even_job(10, 10, kv_gib=4)
    told = tight(job, plan_cluster(Cluster((gpu("a", 14.1, 900),)), job).forecast)
    assert len(told) == 1 and "0.10 GiB are left on a" in told[0] and "--kv q8_0 would free 1.87 GiB" in told[0]
    assert tight(job, plan_cluster(Cluster((gpu("a", 20, 900),)), job).forecast) == ()
    quantised = replace(job, kv_type="q4_0")
    assert "--kv" not in tight(quantised, plan_cluster(Cluster((gpu("a", 14.1, 900),)), quantised).forecast)[0]


def test_devices_that_are_a_stage_each_are_advised_too() -> None:
    devices = (Device(DeviceKind.GPU, 24 * GIB, 900), Device(DeviceKind.GPU, 24 * GIB, 900))
    cluster, job = Cluster((Node("tower", devices, cores=8),)), even_job(40, 30)
    planned = plan_cluster(cluster, job, objective=Objective.THROUGHPUT)
    assert planned.nodes == ("tower:0", "tower:1")
    split = next(one for one in advise(cluster, job, planned).alternatives if one.kind is Kind.SPLIT)
    assert split.aggregate_tok_s == planned.forecast.aggregate_tok_s


def test_large_clusters_are_advised_too() -> None:
    nodes: tuple[Node, ...] = tuple(gpu(f"n{i}", 8 + i % 3, 100 + i) for i in range(40))
    advice = asked(Cluster(nodes), even_job(60, 60), Objective.THROUGHPUT)
    pipelines = next(one for one in advice.alternatives if one.kind is Kind.PIPELINES)
    assert len(pipelines.rings) >= 2
    for ring in pipelines.rings:
        assert ring[0].layers[0] == 0 and ring[-1].layers[1] == 60
        assert all(stage.weights_bytes <= 10 * GIB for stage in ring)
