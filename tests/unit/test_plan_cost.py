"""What stages and hops take: from bytes where nothing was measured, and what was measured where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dwarfstar_engine.model.costs import ModelCosts
from dwarfstar_engine.plan.cluster import LOOPBACK, Cluster, Device, Kind, Link, Measured, Node
from dwarfstar_engine.plan.cost import COORDINATOR_MS, EFFICIENCY, HOP_MS, MAX_PACE, STAGE_MS, cluster_costs, node_costs
from dwarfstar_engine.plan.forecast import Job, Objective
from dwarfstar_engine.plan.planner import plan_cluster
from dwarfstar_engine.plan.predict import plan_of, predict
from dwarfstar_engine.plan.proportional import Need
from support.clusters import GIB, MIB, even_job, gpu

# SmolLM2-135M: 30 equal layers and a head as large as six of them
SMOL = Job(ModelCosts((2 * MIB,) * 30, 12 * MIB, 12 * MIB, (768,) * 30, n_embd=576), tuple(range(1, 30)), Need(512, 0))


def ran(a: int, b: int, ms: float, **more: object) -> Measured:
    return replace(Measured((a, b), ms, last=b == 30), **more)  # type: ignore[arg-type]


def test_a_token_reads_the_weights_once() -> None:
    job = replace(even_job(10, 10), depth=0)
    one = node_costs(gpu("a", 24, 100), job)
    expected = 5 * GIB / (100e6 * EFFICIENCY[Kind.GPU]) + STAGE_MS[Kind.GPU]
    assert one.step_ms(2, 7) == pytest.approx(expected)


def test_the_head_counts_where_it_is() -> None:
    one = node_costs(gpu("a", 24, 100), replace(SMOL, depth=0))
    layer = one.step_ms(0, 2) - one.step_ms(0, 1)
    assert one.step_ms(29, 30) - one.step_ms(28, 29) == pytest.approx(6 * layer)


def test_experts_are_resident_but_not_all_read() -> None:
    costs = ModelCosts((8 * GIB,) * 4, 0, 0, (0,) * 4, n_embd=1, active_bytes=(GIB,) * 4)
    job = Job(costs, (1, 2, 3), Need(0, 0))
    dense = Job(replace(costs, active_bytes=()), (1, 2, 3), Need(0, 0))
    node = gpu("a", 40, 100)
    assert node_costs(node, job).upto_ms[-1] == pytest.approx(node_costs(node, dense).upto_ms[-1] / 8)
    there = cluster_costs(Cluster((node,)), job)
    assert there.stage_bytes("a", 0, 4) == 32 * GIB


def test_attention_reads_the_cache() -> None:
    job = even_job(4, 1, kv_gib=1)
    deep, shallow = (node_costs(gpu("a", 24, 100), replace(job, depth=depth)) for depth in (4096, 0))
    assert deep.upto_ms[-1] == pytest.approx(2 * shallow.upto_ms[-1], rel=1e-3)


# --- measured ---


def test_a_measured_slice_gives_the_rate_of_every_slice() -> None:
    """Half the layers took 3 ms: so do the other half, and the head takes what six layers do."""
    one = node_costs(gpu("a", 24, 9999, ran(0, 15, 3.0)), replace(SMOL, depth=0))
    assert one.step_ms(0, 15) == pytest.approx(3.0)
    assert one.step_ms(7, 22) == pytest.approx(3.0)
    assert one.step_ms(15, 30) == pytest.approx(3.0 + 6 * (3.0 - one.fixed_ms) / 15)


def test_head_and_layers_are_told_apart_from_one_slice_with_the_head() -> None:
    one = node_costs(gpu("a", 24, 9999, ran(18, 30, 3.0)), SMOL)
    assert one.step_ms(18, 30) == pytest.approx(3.0)
    layer = one.step_ms(0, 2) - one.step_ms(0, 1)
    assert one.head_ms == pytest.approx(6 * layer, rel=0.2)  # the cache counts for layers only


def test_what_was_measured_of_a_model_with_more_layers_says_nothing() -> None:
    other = Measured((20, 36), 900.0, batches=((4, 901.0),), prompt=((64, 9000.0),))
    assert node_costs(gpu("a", 24, 100, other), SMOL).step_ms(0, 30) == node_costs(gpu("a", 24, 100), SMOL).step_ms(
        0, 30
    )
    both = node_costs(gpu("a", 24, 100, other, ran(0, 15, 3.0)), SMOL)
    assert both.step_ms(0, 15) == pytest.approx(3.0) and both.batch_factor(4) == 4


def test_what_a_slice_takes_in_use_counts_for_all_slices_of_its_node() -> None:
    measured = ran(18, 30, 3.0, head_ms=0.6, prompt=((64, 30.0),))
    before = gpu("a", 24, 9999, measured)
    now, then = (node_costs(one, SMOL) for one in (replace(before, ran=ran(0, 15, 6.0)), before))
    pace = 6.0 / then.step_ms(0, 15)
    assert now.step_ms(0, 15) == pytest.approx(6.0)
    assert now.step_ms(18, 30) == pytest.approx(3.0 * pace) and now.head_ms == pytest.approx(0.6 * pace)
    assert now.prompt_ms(0, 9, 64) == pytest.approx(pace * then.prompt_ms(0, 9, 64))
    assert now.batch_factor(4) == then.batch_factor(4)
    nonsense = node_costs(replace(before, ran=ran(0, 15, 1e9)), SMOL)
    assert nonsense.step_ms(18, 30) == pytest.approx(3.0 * MAX_PACE)
    assert node_costs(replace(before, ran=Measured((0, 99), 6.0)), SMOL) == replace(
        then, node=replace(before, ran=Measured((0, 99), 6.0))
    )


def test_a_head_measured_by_difference() -> None:
    one = node_costs(gpu("a", 24, 9999, ran(0, 15, 1.5), ran(15, 30, 2.5)), SMOL)
    assert one.step_ms(15, 30) == pytest.approx(2.5)
    assert one.head_ms == pytest.approx(1.0)


def test_a_head_measured_apart() -> None:
    """One slice is enough then, whatever the head's bytes say."""
    one = node_costs(gpu("a", 24, 9999, ran(18, 30, 3.0, head_ms=0.6)), replace(SMOL, depth=0))
    assert one.head_ms == pytest.approx(0.6)
    assert one.step_ms(18, 30) == pytest.approx(3.0)
    assert one.step_ms(0, 12) == pytest.approx(2.4)


def test_equal_nodes_get_18_and_12_because_of_the_head() -> None:
    """As measured with SmolLM2: the head is worth about six layers."""
    for measured in ((), (ran(0, 15, 2.2),), (ran(15, 30, 3.0),)):
        nodes = tuple(gpu(name, 24, 40, *measured) for name in "ab")
        planned = plan_cluster(Cluster(nodes), SMOL, objective=Objective.THROUGHPUT)
        assert planned.counts in ((18, 12), (17, 13)), planned.counts


def test_batches_cost_what_was_measured_and_never_more_than_apart() -> None:
    one = node_costs(gpu("a", 24, 100, ran(0, 15, 2.0, batches=((2, 5.0), (4, 3.0), (8, 4.0)))), SMOL)
    alone = one.step_ms(3, 9)
    assert [one.step_ms(3, 9, n) / alone for n in (1, 2, 4, 8)] == pytest.approx([1, 2, 1.5, 2])
    assert one.batch_factor(16) == pytest.approx(4)  # beyond what was measured as steep as up to it
    assert node_costs(gpu("a", 24, 100), SMOL).batch_factor(4) == 4  # not measured


def test_many_streams_run_in_the_batch_that_pays() -> None:
    cheap = gpu("a", 24, 100, Measured((0, 30), 4.0, last=True, batches=((4, 5.0), (8, 6.0))))
    dear = gpu("a", 24, 100, Measured((0, 30), 4.0, last=True, batches=((2, 9.0),)))
    forecasts = [plan_cluster(Cluster((node,)), SMOL).forecast for node in (cheap, dear)]
    assert [one.batch for one in forecasts] == [8, 1]
    assert forecasts[0].aggregate_tok_s == pytest.approx(8 / 6.0 * 1000)


def test_prompts_cost_what_was_measured() -> None:
    one = node_costs(gpu("a", 24, 100, ran(0, 15, 2.0, prompt=((64, 20.0), (128, 30.0)))), SMOL)
    assert one.prompt_ms(0, 15, 64) == pytest.approx(20.0)
    assert one.prompt_ms(0, 15, 96) == pytest.approx(25.0)
    assert one.prompt_ms(0, 15, 256) == pytest.approx(60.0, rel=0.01)
    assert one.prompt_ms(0, 15, 8) == pytest.approx(20.0)


# --- links and the ring ---


def two(link: Link, pair: Link | None = None) -> Cluster:
    return Cluster((gpu("a", 24, 100), gpu("b", 24, 100)), link, {("b", "a"): pair} if pair else {})


def test_a_hop_is_latency_and_bytes() -> None:
    job = even_job(10, 10, n_embd=8192)
    costs = cluster_costs(two(Link(0.1, 2.0)), job)
    row_ms = 8192 * 4 * 8 / 0.1e6
    assert costs.hop_ms("a", "b") == pytest.approx(2.0 + row_ms + HOP_MS)
    assert costs.hop_ms("a", "b", 8) == pytest.approx(2.0 + 8 * row_ms + HOP_MS)
    assert costs.closing_ms("b", "a") == pytest.approx(2.0 + HOP_MS)  # ids, no activations
    assert costs.closing_ms("a", "a") == 0.0


def test_links_of_pairs_hold_both_ways_and_devices_of_a_machine_need_none() -> None:
    cluster = two(Link(1, 1), pair=Link(10, 0.1))
    a, b = cluster.nodes
    assert cluster.between(a, b) == cluster.between(b, a) == Link(10, 0.1)
    assert cluster.between(replace(a, name="a:0", host="a"), replace(a, name="a:1", host="a")) == LOOPBACK
    assert cluster.between(replace(a, name="a:0", host="a"), b) == Link(10, 0.1)


def test_a_ring_of_one_stage_has_no_hop() -> None:
    costs = cluster_costs(two(Link(0.001, 900)), even_job(10, 10))
    forecast = predict(costs, plan_of(costs, [("a", 0, 10)]).stages)
    assert forecast.single_tok_s == pytest.approx(1000 / (forecast.stages[0].ms + COORDINATOR_MS))
    assert forecast.hop_ms == (0.0,) and forecast.lanes == 1


def test_one_stream_waits_for_everything_and_many_for_the_slowest() -> None:
    costs = cluster_costs(two(Link(1, 5)), even_job(10, 10))
    forecast = predict(costs, plan_of(costs, [("a", 0, 7), ("b", 7, 10)]).stages)
    a, b = (stage.ms for stage in forecast.stages)
    assert forecast.single_tok_s == pytest.approx(1000 / (a + b + sum(forecast.hop_ms) + COORDINATOR_MS))
    assert forecast.aggregate_tok_s == pytest.approx(1000 / a) and forecast.bottleneck == "a"
    assert (forecast.lanes - 1) * a < a + b + sum(forecast.hop_ms) <= forecast.lanes * a  # enough to keep it busy


def test_a_link_can_be_the_bottleneck() -> None:
    costs = cluster_costs(two(Link(0.0005, 1)), even_job(10, 10))
    forecast = predict(costs, plan_of(costs, [("a", 0, 5), ("b", 5, 10)]).stages)
    assert forecast.bottleneck == "a → b"
    assert forecast.aggregate_tok_s < 1000 / max(stage.ms for stage in forecast.stages)


def test_chunks_of_a_prompt_follow_each_other() -> None:
    """A second stage of equal size adds its own time once, not for each chunk."""
    costs = cluster_costs(two(Link(100, 0)), even_job(10, 10))
    whole = predict(costs, plan_of(costs, [("a", 0, 10)]).stages, 2560).ttft_ms
    halves = predict(costs, plan_of(costs, [("a", 0, 5), ("b", 5, 10)]).stages, 2560).ttft_ms
    assert 0.5 * whole < halves < 0.62 * whole
    short = predict(costs, plan_of(costs, [("a", 0, 10)]).stages, 16).ttft_ms
    assert short < whole / 10


def test_headroom_is_what_is_left_and_tells_what_does_not_fit() -> None:
    job = even_job(10, 10, kv_gib=1, reserve_gib=0.5)
    costs = cluster_costs(Cluster((gpu("a", 8, 100), gpu("b", 8, 100))), job)
    fits = predict(costs, plan_of(costs, [("a", 0, 5), ("b", 5, 10)]).stages)
    assert fits.fits
    for stage in fits.stages:
        assert stage.weights_bytes + stage.kv_bytes + stage.compute_bytes + stage.headroom_bytes == 8 * GIB
    too_much = predict(costs, plan_of(costs, [("a", 0, 9), ("b", 9, 10)]).stages)
    assert not too_much.fits and too_much.stages[0].headroom_bytes < 0


def test_each_node_costs_what_its_own_file_does() -> None:
    """Half the bytes on b: half the memory and half the time."""
    job = replace(even_job(10, 10), depth=0)
    small = replace(job.costs, layer_bytes=tuple(size // 2 for size in job.costs.layer_bytes))
    costs = cluster_costs(Cluster((gpu("a", 24, 100), gpu("b", 24, 100))), replace(job, by_node={"b": small}))
    assert costs.stage_bytes("b", 0, 4) * 2 == costs.stage_bytes("a", 0, 4)
    assert costs.nodes["b"].upto_ms[-1] * 2 == pytest.approx(costs.nodes["a"].upto_ms[-1])
    planned = plan_cluster(costs.cluster, costs.job, objective=Objective.THROUGHPUT)
    counts = dict(zip(planned.nodes, planned.counts, strict=True))
    assert counts["b"] > counts["a"]
    assert {s.node: s.weights_bytes for s in planned.plan.stages}["b"] == counts["b"] * small.layer_bytes[0]


def test_what_a_node_is_follows_its_largest_device() -> None:
    mixed = Node("a", (Device(Kind.CPU, 4 * GIB, 40), Device(Kind.GPU, 24 * GIB, 900)))
    assert node_costs(mixed, SMOL).fixed_ms == STAGE_MS[Kind.GPU]
