"""Which nodes are left out because others do not reach them."""

from __future__ import annotations

from dwarfstar_engine.node.hops import AVOID_S, FRESH_S, TIMES, Hops


def test_a_node_is_left_out_when_it_was_not_reached_again_and_tried_anew_later() -> None:
    hops = Hops()
    assert [hops.failed("b", float(n)) for n in range(TIMES)] == [False] * (TIMES - 1) + [True]
    assert hops.avoided(TIMES) == {"b"}
    hops.closed()  # without it
    assert hops.avoided(TIMES - 1 + AVOID_S) == {"b"}
    assert not hops.avoided(TIMES + AVOID_S)
    assert not hops.failed("b", TIMES + AVOID_S) and not hops.avoided(TIMES + AVOID_S)  # another story


def test_once_is_no_proof() -> None:
    hops = Hops()
    hops.failed("b", 0.0)
    hops.closed()  # it was stopped for a while, and is reached again
    hops.failed("b", 1.0)
    assert not hops.avoided(1.0)
    assert not hops.failed("b", 2.0 + FRESH_S) and not hops.avoided(2.0 + FRESH_S)


def test_a_node_that_comes_anew_has_no_past() -> None:
    hops = Hops()
    for n in range(TIMES):
        hops.failed("b", float(n))
    hops.forget("b")
    assert not hops.avoided(TIMES)
