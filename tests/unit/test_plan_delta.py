"""From one plan to another: what is loaded and dropped; and how far a boundary may go."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.plan.cluster import Cluster
from dwarfstar_engine.plan.cost import Costs, cluster_costs
from dwarfstar_engine.plan.delta import clamp, delta, ranges
from dwarfstar_engine.plan.forecast import Job
from dwarfstar_engine.plan.predict import plan_of, predict
from dwarfstar_engine.plan.proportional import Plan
from support.clusters import GIB, even_job, gpu

JOB = even_job(20, 20, kv_gib=2, reserve_gib=0.5, head_bytes=GIB)


def costs(*sizes: float, job: Job = JOB) -> Costs:
    return cluster_costs(Cluster(tuple(gpu(name, size, 100) for name, size in zip("abc", sizes, strict=False))), job)


def plan(there: Costs, *slices: tuple[str, int, int]) -> Plan:
    return plan_of(there, slices)


def test_only_layers_that_move_are_loaded() -> None:
    there = costs(24, 24, 24)
    old, new = plan(there, ("a", 0, 8), ("b", 8, 20)), plan(there, ("a", 0, 10), ("b", 10, 15), ("c", 15, 20))
    a, b, c = delta(there, old, new)
    assert (a.node, a.load, a.drop, a.load_bytes, a.drop_bytes) == ("a", ((8, 10),), (), 2 * GIB, 0)
    assert (b.load, b.drop, b.drop_bytes) == ((), ((8, 10), (15, 20)), 8 * GIB)  # seven layers and the head
    assert (c.load, c.load_bytes) == (((15, 20),), 6 * GIB)


def test_headroom_after_and_while_both_are_held() -> None:
    there = costs(13, 24)
    old, new = plan(there, ("a", 0, 9), ("b", 9, 20)), plan(there, ("b", 0, 10), ("a", 10, 20))
    a = next(one for one in delta(there, old, new) if one.node == "a")
    assert a.headroom_bytes == pytest.approx((13 - 10 - 1 - 1 - 0.5) * GIB, rel=1e-3)
    assert a.both_headroom_bytes < 0  # nine old layers and ten new ones do not fit together
    unchanged = delta(there, old, old)
    assert all(one.load == one.drop == () and one.load_bytes == 0 for one in unchanged)
    assert [one.headroom_bytes for one in unchanged] == [one.both_headroom_bytes for one in unchanged]


def test_a_node_that_is_left_has_all_its_room_again() -> None:
    there = costs(24, 24)
    b = delta(there, plan(there, ("a", 0, 10), ("b", 10, 20)), plan(there, ("a", 0, 20)))[1]
    assert (b.node, b.load, b.drop, b.headroom_bytes) == ("b", (), ((10, 20),), 24 * GIB)


@given(st.sets(st.integers(0, 30)))
def test_ranges_cover_what_they_are_made_of(layers: set[int]) -> None:
    found = ranges(layers)
    assert {layer for a, b in found for layer in range(a, b)} == layers
    assert all(a < b for a, b in found) and all(x[1] < y[0] for x, y in pairwise(found))


# --- boundaries ---


def clamped(there: Costs, wanted: int, cut: int = 10) -> tuple[int, str]:
    found = clamp(there, plan(there, ("a", 0, cut), ("b", cut, 20)).stages, 0, wanted)
    return found.cut, found.why


def test_a_boundary_goes_where_it_is_wanted_if_it_can() -> None:
    assert clamped(costs(24, 24), 13) == (13, "")


def test_a_boundary_stops_where_room_ends_and_says_whose() -> None:
    cut, why = clamped(costs(13.8, 24), 19)
    assert cut == 12 and why == "a has 13.80 GiB, and layers 0–19 take 21.40 GiB there"
    cut, why = clamped(costs(24, 13.8), 1)
    assert cut == 9 and why.startswith("b has 13.80 GiB, and layers 1–20 take ")


def test_no_stage_is_left_without_a_layer() -> None:
    assert clamped(costs(99, 99), 0) == (1, "a would be left without a layer")
    assert clamped(costs(99, 99), 25) == (19, "b would be left without a layer")


def test_only_legal_cuts() -> None:
    fours = replace(JOB, legal=(4, 8, 12, 16))
    assert clamped(costs(99, 99, job=fours), 9, 8) == (8, "the model may not be cut at layer 9")
    assert clamped(costs(99, 99, job=fours), 10, 8) == (8, "the model may not be cut at layer 10")  # the nearer to now
    lengths = replace(JOB, need=replace(JOB.need, forbidden_lengths=(7,)))
    cut, why = clamped(costs(99, 99, job=lengths), 7)
    assert cut == 8 and "a slice of 7 layers" in why


def test_a_boundary_that_can_be_nowhere() -> None:
    there = costs(6, 6)
    with pytest.raises(PlanError, match="a and b cannot share layers 0–20"):
        clamp(there, plan(there, ("a", 0, 10), ("b", 10, 20)).stages, 0, 10)


@given(st.integers(-5, 25), st.floats(3, 40), st.floats(3, 40))
def test_what_a_clamp_gives_fits_and_nothing_nearer_does(wanted: int, a: float, b: float) -> None:
    there = costs(a, b)
    stages = plan(there, ("a", 0, 10), ("b", 10, 20)).stages

    def fits(cut: int) -> bool:
        return predict(there, plan(there, ("a", 0, cut), ("b", cut, 20)).stages).fits

    possible = [cut for cut in range(1, 20) if fits(cut)]
    if not possible:
        with pytest.raises(PlanError):
            clamp(there, stages, 0, wanted)
        return
    found = clamp(there, stages, 0, wanted)
    assert found.cut in possible and abs(found.cut - wanted) == min(abs(cut - wanted) for cut in possible)
    assert bool(found.why) == (found.cut != wanted)
