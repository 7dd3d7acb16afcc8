"""Nodes on the coordinator's own machine: which cores each is given, and what it knows of the machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.cli.serve import dealt_out
from dwarfstar_engine.node.facts import default_threads, measure


@given(
    free=st.lists(st.integers(0, 255), min_size=1, max_size=64, unique=True).map(sorted),
    nodes=st.integers(1, 16),
    threads=st.integers(1, 16),
)
def test_cores_are_dealt_out_once(free: list[int], nodes: int, threads: int) -> None:
    stages, own = dealt_out(free, nodes, threads)
    if len(free) < nodes * threads:
        assert (stages, own) == ([], ())
        return
    assert [len(stage) for stage in stages] == [threads] * nodes
    theirs = [core for stage in stages for core in stage]
    assert len(set(theirs)) == len(theirs) and set(theirs) <= set(free)
    left = set(free) - set(theirs)
    assert set(own) == (left or set(stages[-1]))


def test_a_node_knows_the_cores_of_its_machine() -> None:
    assert measure(None).cores == default_threads(1)
    assert measure(None, cores=64).cores == 64  # a pinned engine starts its nodes on fewer
