"""The proportional planner: a plan is whole, legal, fits, and is the same each time, whatever nodes and model are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import IllegalCutError, PlanError
from dwarfstar_engine.model.costs import ModelCosts, stage_bytes
from dwarfstar_engine.plan.proportional import GIB, TOO_LARGE, Capacity, Need, Plan, proportional, with_cuts
from dwarfstar_engine.plan.standby import whole_bytes

NO_NEED = Need(cells=0, reserve_bytes=0)
MAX_LAYERS = 24


def costs(*layer_bytes: int, head: int = 0, shared: int = 0, kv: int = 0) -> ModelCosts:
    return ModelCosts(
        layer_bytes=layer_bytes,
        head_bytes=head,
        embedding_bytes=0,
        kv_bytes_per_token=(kv,) * len(layer_bytes),
        n_embd=1,
        shared_bytes=shared,
    )


def nodes(*usable: int) -> list[Capacity]:
    return [Capacity(f"n{i}", size) for i, size in enumerate(usable)]


def layers(plan: Plan) -> dict[str, tuple[int, int]]:
    return {stage.node: stage.layers for stage in plan.stages}


@st.composite
def problems(draw: st.DrawFn) -> tuple[ModelCosts, list[int], Need, list[Capacity]]:
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=MAX_LAYERS))
    model = costs(*sizes, head=draw(st.integers(0, 100)), shared=draw(st.integers(0, 5)), kv=draw(st.integers(0, 2)))
    legal = sorted(draw(st.sets(st.integers(1, len(sizes) - 1)))) if len(sizes) > 1 else []
    need = Need(draw(st.integers(0, 20)), draw(st.integers(0, 20)), last_bytes=draw(st.integers(0, 60)))
    usable = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6))
    return model, legal, need, nodes(*usable)


def need_of(model: ModelCosts, need: Need, a: int, b: int) -> int:
    weights = stage_bytes(model, a, b, last=b == len(model.layer_bytes))
    last = need.last_bytes if b == len(model.layer_bytes) else 0
    return weights + need.cells * sum(model.kv_bytes_per_token[a:b]) + need.reserve_bytes + last


def fits_somehow(model: ModelCosts, legal: list[int], need: Need, there: list[Capacity]) -> bool:
    """Whether any division in the nodes' order fits: by reaching as far as possible from every boundary."""
    bounds = [0, *legal, len(model.layer_bytes)]
    reached = {0}
    for node in there:
        reached |= {b for a in reached for b in bounds if b > a and need_of(model, need, a, b) <= node.usable_bytes}
    return bounds[-1] in reached


@given(problems())
def test_a_plan_is_whole_legal_and_fits_and_there_is_one_if_there_can_be(
    problem: tuple[ModelCosts, list[int], Need, list[Capacity]],
) -> None:
    model, legal, need, there = problem
    try:
        plan = proportional(model, legal, need, there)
    except PlanError as error:
        assert error.code == TOO_LARGE and not fits_somehow(model, legal, need, there)
        return
    bounds = [0, *(stage.layers[1] for stage in plan.stages)]
    assert [stage.layers for stage in plan.stages] == list(pairwise(bounds))
    assert bounds[-1] == len(model.layer_bytes) and set(bounds[1:-1]) <= set(legal)
    assert all(a < b for a, b in pairwise(bounds))
    usable = {node.node: node.usable_bytes for node in there}
    for stage in plan.stages:
        assert need_of(model, need, *stage.layers) <= usable[stage.node]
        assert whole_bytes(stage, need) == need_of(model, need, *stage.layers)
    order = [node.node for node in there]
    used, left_out = [stage.node for stage in plan.stages], [node for node, _ in plan.excluded]
    assert used == [node for node in order if node in used]
    assert sorted(used + left_out) == sorted(order)
    assert all(reason for _, reason in plan.excluded)
    assert plan == proportional(model, legal, need, there)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_where_all_fits_shares_are_in_proportion(weights: list[int]) -> None:
    """Equal layers, every cut legal, and room for all: nobody is a whole layer away from their exact share."""
    total = sum(weights)
    model = costs(*[1] * 40)
    plan = proportional(model, range(1, 40), NO_NEED, nodes(*(1000 * w for w in weights)))
    for stage, weight in zip(plan.stages, weights, strict=True):
        assert abs(stage.layers[1] - stage.layers[0] - 40 * weight / total) < 1


def test_the_spare_layer_never_goes_to_a_node_it_does_not_fit() -> None:
    """Of 61 layers of 8.2 GiB, two fit the small node of 24 GiB and three do not; its exact share is 2.73."""
    layer = 500 * GIB // 61
    there = [
        Capacity("big", 256 * GIB),
        Capacity("a", 128 * GIB),
        Capacity("b", 128 * GIB),
        Capacity("small", 24 * GIB),
    ]
    plan = proportional(costs(*[layer] * 61), range(1, 61), NO_NEED, there)
    shares = {node: b - a for node, (a, b) in layers(plan).items()}
    assert shares["small"] <= 2
    assert sum(shares.values()) == 61
    assert all(shares[node.node] * layer <= node.usable_bytes for node in there)


def test_the_head_counts_on_the_last_stage() -> None:
    plan = proportional(costs(*[10] * 6, head=25), range(1, 6), NO_NEED, nodes(50, 50))
    assert layers(plan) == {"n0": (0, 4), "n1": (4, 6)}  # without the head it would be three each
    assert plan.stages[-1].weights_bytes == 45


def test_kv_cache_and_buffers_count() -> None:
    model, there = costs(*[10] * 4, kv=1), nodes(40, 40)
    assert layers(proportional(model, [1, 2, 3], Need(10, 0), there)) == {"n0": (0, 2), "n1": (2, 4)}
    with pytest.raises(PlanError):
        proportional(model, [1, 2, 3], Need(10, 1), there)


def test_a_node_with_less_than_a_layer_is_left_out_and_told_why() -> None:
    plan = proportional(costs(*[10] * 4), [1, 2, 3], NO_NEED, nodes(30, 5, 30))
    assert layers(plan) == {"n0": (0, 2), "n2": (2, 4)}
    assert plan.excluded == (("n1", "its share is less than one layer"),)


def test_a_model_that_fits_nowhere() -> None:
    with pytest.raises(
        PlanError, match=r"needs 4\.00 GiB .* 0\.25 GiB on each node .* the 2 nodes have 3\.00 GiB"
    ) as no:
        proportional(costs(*[GIB] * 4), [1, 2, 3], Need(0, GIB // 4), nodes(2 * GIB, GIB))
    assert no.value.code == "model_too_large_for_remaining_capacity"
    assert no.value.exit_code == 3 and no.value.retry_after_s
    with pytest.raises(PlanError, match="the only node has"):
        proportional(costs(GIB), [], NO_NEED, nodes(1))


def test_no_nodes() -> None:
    with pytest.raises(PlanError, match="dwarfstar node") as no:
        proportional(costs(1), [], NO_NEED, [])
    assert no.value.code == "no_nodes" and no.value.retry_after_s


def test_cuts_by_hand() -> None:
    model = costs(*[10] * 6, head=7, shared=1, kv=2)
    plan = with_cuts(model, [2, 4], Need(3, 0), nodes(100, 100, 100, 100), [2, 4])
    assert layers(plan) == {"n0": (0, 2), "n1": (2, 4), "n2": (4, 6)}
    assert [stage.weights_bytes for stage in plan.stages] == [21, 21, 28]
    assert [stage.kv_bytes for stage in plan.stages] == [12, 12, 12]
    assert plan.excluded == (("n3", "the given cuts leave no layer for it"),)


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ([3], "layer 3 is not a legal cut of this 6-layer model: the nearest legal cuts are 2 and 4"),
        ([0], "nearest legal cuts are 2 and 4"),
        ([6], "nearest legal cuts are 2 and 4"),
        ([4, 2], "must rise"),
        ([2, 2], "must rise"),
    ],
)
def test_cuts_that_are_not_legal(cuts: list[int], words: str) -> None:
    with pytest.raises(IllegalCutError, match=words):
        with_cuts(costs(*[10] * 6), [2, 4], NO_NEED, nodes(100, 100, 100), cuts)


def test_given_cuts_take_what_the_file_of_each_node_does() -> None:
    small, large = costs(*[10] * 4, head=1), costs(*[30] * 4, head=3)
    plan = with_cuts(small, [1, 2, 3], NO_NEED, nodes(30, 63), [2], {"n1": large})
    assert [stage.weights_bytes for stage in plan.stages] == [20, 63]
    with pytest.raises(PlanError):
        with_cuts(small, [1, 2, 3], NO_NEED, nodes(30, 62), [2], {"n1": large})


def test_cuts_for_more_nodes_than_there_are() -> None:
    with pytest.raises(PlanError, match="3 stages need as many nodes, and there are 2"):
        with_cuts(costs(*[10] * 6), [2, 4], NO_NEED, nodes(100, 100), [2, 4])


def test_cuts_that_give_a_node_too_much() -> None:
    with pytest.raises(PlanError, match=r"layers 2–6 need 4\.00 GiB on n1, which has 3\.00 GiB") as no:
        with_cuts(costs(*[GIB] * 6), [2, 4], NO_NEED, nodes(9 * GIB, 3 * GIB), [2])
    assert no.value.code == TOO_LARGE


def test_a_length_llama_cpp_would_mistake_is_planned_around() -> None:
    costs = ModelCosts((1,) * 8, 0, 0, (0,) * 8, n_embd=1)
    nodes = [Capacity("a", 100), Capacity("b", 100)]
    plan = proportional(costs, range(1, 8), Need(0, 0, forbidden_lengths=(4, 8)), nodes)
    assert [b - a for a, b in (stage.layers for stage in plan.stages)] in ([3, 5], [5, 3])
    alone = proportional(costs, range(1, 8), Need(0, 0, forbidden_lengths=(4, 8)), nodes[:1])
    assert [stage.layers for stage in alone.stages] == [(0, 8)]
