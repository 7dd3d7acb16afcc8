"""Which node holds whose copy, what makes way for what, and which plan needs no loading."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.node.room import MAX_STAGES, Held, given_up
from dwarfstar_engine.plan.proportional import Capacity, Need, Plan, StagePlan
from dwarfstar_engine.plan.standby import copies, moved, whole_bytes, without_loading

NEED = Need(cells=0, reserve_bytes=3)


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[StagePlan], list[Capacity]]:
    """Stages on nodes that can hold them, and other nodes."""
    names = [f"n{index}" for index in range(draw(st.integers(1, 6)))]
    count = draw(st.integers(1, len(names)))
    stages = [
        StagePlan(names[index], (index, index + 1), draw(st.integers(1, 40)), draw(st.integers(0, 10)))
        for index in range(count)
    ]
    own = Counter({stage.node: whole_bytes(stage, NEED) for stage in stages})
    return stages, [Capacity(name, own[name] + draw(st.integers(0, 120))) for name in names]


@given(rings(), st.integers(1, 4))
def test_copies_are_elsewhere_and_fit(ring: tuple[list[StagePlan], list[Capacity]], most: int) -> None:
    stages, nodes = ring
    found = copies(stages, nodes, NEED, most)
    used: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for stage in (*stages, *(copy.stage for copy in found)):
        used[stage.node] += whole_bytes(stage, NEED)
        count[stage.node] += 1
    assert all(copy.stage.node != copy.of for copy in found)
    assert len({copy.stage.layers for copy in found}) == len(found)
    room = {node.node: node.usable_bytes for node in nodes}
    assert all(used[name] <= room[name] for name in used)
    assert all(count[copy.stage.node] <= most for copy in found)
    for stage in stages:  # one that has no copy had room nowhere
        if stage.layers not in {copy.stage.layers for copy in found}:
            takes = whole_bytes(stage, NEED)
            others = [name for name in room if name != stage.node]
            assert all(room[name] - used[name] < takes or count[name] >= most for name in others)


@given(rings())
def test_what_was_copied_stays_where_it_is(ring: tuple[list[StagePlan], list[Capacity]]) -> None:
    stages, nodes = ring
    first = copies(stages, nodes, NEED, MAX_STAGES)
    held: dict[str, set[tuple[int, int]]] = {}
    for copy in first:
        held.setdefault(copy.stage.node, set()).add(copy.stage.layers)
    assert copies(stages, nodes, NEED, MAX_STAGES, held) == first


def test_most_room_comes_first_unless_a_node_has_it_already() -> None:
    stages = [StagePlan("a", (0, 4), 10, 0)]
    nodes = [Capacity("a", 100), Capacity("b", 20), Capacity("c", 30)]
    assert [copy.stage.node for copy in copies(stages, nodes, NEED, 3)] == ["c"]
    assert [copy.stage.node for copy in copies(stages, nodes, NEED, 3, {"b": [(0, 4)]})] == ["b"]
    assert copies(stages, nodes[:1], NEED, 3) == ()


PLAN = Plan((StagePlan("a", (0, 2), 1, 0), StagePlan("b", (2, 4), 1, 0), StagePlan("c", (4, 6), 1, 0)))


def test_a_lost_stage_is_taken_over_where_its_copy_is() -> None:
    there = {"a": {(0, 2), (2, 4)}, "c": {(4, 6), (0, 2)}}
    found = without_loading(PLAN, there)
    assert found is not None and [stage.node for stage in found.stages] == ["a", "a", "c"]
    assert [stage.layers for stage in found.stages] == [stage.layers for stage in PLAN.stages]
    assert without_loading(PLAN, {"a": {(0, 2)}, "c": {(4, 6)}}) is None
    whole = {"a": {(0, 2)}, "b": {(2, 4)}, "c": {(4, 6), (2, 4)}}
    assert without_loading(PLAN, whole) == PLAN, "a stage that lives stays"


def test_of_two_copies_the_node_with_fewer_stages_takes_over() -> None:
    there = {"a": {(0, 2), (2, 4)}, "c": {(4, 6)}, "d": {(2, 4)}}
    found = without_loading(PLAN, there)
    assert found is not None and [stage.node for stage in found.stages] == ["a", "d", "c"]


def test_a_slice_that_is_nowhere_goes_where_most_room_is_and_all_others_stay() -> None:
    there = {"a": {(0, 2)}, "c": {(4, 6)}, "d": set[tuple[int, int]]()}
    nodes = [Capacity("a", 9), Capacity("c", 30), Capacity("d", 20)]
    found = moved(PLAN, there, nodes, NEED, 3)
    assert found is not None and [stage.node for stage in found.stages] == ["a", "c", "c"]
    assert [stage.layers for stage in found.stages] == [stage.layers for stage in PLAN.stages]
    found = moved(PLAN, there, nodes, NEED, 1)
    assert found is not None and [stage.node for stage in found.stages] == ["a", "d", "c"]
    assert moved(PLAN, there, nodes[:2], NEED, 1) is None


def test_a_copy_is_used_before_a_slice_is_loaded() -> None:
    nodes = [Capacity("a", 99), Capacity("d", 20)]
    found = moved(PLAN, {"a": {(0, 2)}, "d": {(4, 6)}}, nodes, NEED, 3)
    assert found is not None and [stage.node for stage in found.stages] == ["a", "a", "d"]
    avoided = moved(PLAN, {"a": {(0, 2)}, "d": {(4, 6)}}, nodes[:1], NEED, 3)
    assert avoided is not None and [stage.node for stage in avoided.stages] == ["a"] * 3


def test_a_slice_takes_what_the_file_of_its_new_node_does() -> None:
    """d holds a quantisation of three times the size."""

    def place(node: str, layers: tuple[int, int]) -> StagePlan:
        return StagePlan(node, layers, 30 if node == "d" else 10, 0)

    plan = Plan(tuple(place(node, layers) for node, layers in (("a", (0, 2)), ("b", (2, 4)))))
    there = {"a": {(0, 2)}, "d": set[tuple[int, int]]()}
    assert moved(plan, there, [Capacity("a", 99), Capacity("d", 32)], NEED, 1, place) is None, "30 and the reserve"
    found = moved(plan, there, [Capacity("a", 99), Capacity("d", 33)], NEED, 1, place)
    assert found is not None and found.stages == (place("a", (0, 2)), place("d", (2, 4)))
    kept = without_loading(plan, {"a": {(0, 2)}, "d": {(2, 4)}}, place)
    assert kept == found
    nodes = [Capacity("a", 13), Capacity("b", 13), Capacity("d", 32)]
    assert copies(plan.stages, nodes, NEED, 3, place=place) == ()
    (copy,) = copies(plan.stages, [*nodes[:2], Capacity("d", 33)], NEED, 3, place=place)
    assert copy.stage == place("d", (0, 2))


HELD = st.lists(st.builds(Held, st.integers(0, 50), st.booleans()), max_size=MAX_STAGES)


@given(HELD, st.integers(0, 50), st.integers(1, 100), st.booleans())
def test_a_node_gives_up_no_more_than_it_must(held: list[Held], wanted: int, lent: int, standby: bool) -> None:
    dropped = given_up(held, wanted, lent, standby=standby)
    if standby:
        fits = sum(one.need_bytes or lent for one in held) + (wanted or lent) <= lent and len(held) < MAX_STAGES
        assert dropped == ([] if fits else None)
        return
    assert dropped is not None and not any(held[index].needed for index in dropped)
    left = [one for index, one in enumerate(held) if index not in dropped]
    over = sum(one.need_bytes or lent for one in left) + (wanted or lent) > lent or len(left) >= MAX_STAGES
    assert not over or all(one.needed for one in left), "what waits goes first"
    if dropped:  # without the last one it would not do
        more = [*left, held[dropped[-1]]]
        assert sum(one.need_bytes or lent for one in more) + (wanted or lent) > lent or len(more) >= MAX_STAGES
