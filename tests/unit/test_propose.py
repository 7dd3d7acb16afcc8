"""Cuts by hand go where they are possible, and say why they are elsewhere; owned plans survive being kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import DwarfStarError, IllegalCutError, PlanError
from dwarfstar_engine.plan.cluster import Cluster
from dwarfstar_engine.plan.cost import cluster_costs
from dwarfstar_engine.plan.delta import delta
from dwarfstar_engine.plan.forecast import Job, Objective, Strategy, Wishes
from dwarfstar_engine.plan.owned import OwnedPlan, from_text, to_text
from dwarfstar_engine.plan.proportional import TOO_LARGE
from dwarfstar_engine.plan.propose import Proposal, Wanted, propose
from dwarfstar_engine.plan.shown import delta_views
from support.clusters import even_job, gpu

JOB = even_job(20, 20)
EVEN = replace(JOB, legal=tuple(range(2, 20, 2)))


def cluster(*sizes: float) -> Cluster:
    return Cluster(tuple(gpu(name, size, 100) for name, size in zip("abcd", sizes, strict=False)))


def wanted(*cuts: int, order: tuple[str, ...] = (), wishes: Wishes | None = None) -> Wanted:
    return Wanted(Strategy.FASTEST, Objective.SINGLE, cuts, order, wishes or Wishes())


def layers(proposal: Proposal) -> list[tuple[str, int, int]]:
    return [(stage.node, *stage.layers) for stage in proposal.planned.plan.stages]


def test_possible_cuts_are_taken_as_they_are() -> None:
    found = propose(cluster(24, 24, 24), JOB, wanted(7), ("b", "a"))
    assert layers(found) == [("b", 0, 7), ("a", 7, 20)] and found.clamped == ()
    assert found.planned.plan.excluded == (("c", "the cuts leave it no layer"),)
    named = propose(cluster(24, 24, 24), JOB, wanted(3, 9, order=("c", "b", "a")), ("b", "a"))
    assert layers(named) == [("c", 0, 3), ("b", 3, 9), ("a", 9, 20)]
    whole = propose(cluster(24, 24), JOB, wanted(), ("b",))
    assert layers(whole) == [("b", 0, 20)]


def test_a_cut_that_is_not_legal_goes_to_the_nearest_and_says_so() -> None:
    found = propose(cluster(24, 24, 24), EVEN, wanted(7, 11))
    assert [end for _, _, end in layers(found)] == [6, 10, 20]
    assert found.clamped == (
        "7 became 6: the model may not be cut at layer 7",
        "11 became 10: the model may not be cut at layer 11",
    )


def test_a_cut_that_does_not_fit_goes_as_far_as_memory_allows() -> None:
    found = propose(cluster(5.5, 24), JOB, wanted(12))
    assert layers(found) == [("a", 0, 5), ("b", 5, 20)]
    assert found.clamped[0].startswith("12 became 5: a has 5.50 GiB, and layers 0–12 take")
    from_the_right = propose(cluster(9, 9, 5.5), JOB, wanted(6, 12))
    assert [end for _, _, end in layers(from_the_right)] == [6, 15, 20] and len(from_the_right.clamped) == 1


@pytest.mark.parametrize(
    ("asked", "sizes", "code"),
    [
        (wanted(12, 5), (24, 24, 24), IllegalCutError.code),
        (wanted(0), (24, 24), IllegalCutError.code),
        (wanted(5, 10), (24, 24), "bad_cuts"),
        (wanted(5), (4, 4), TOO_LARGE),
        (wanted(5, order=("a", "x")), (24, 24), "no_such_node"),
        (wanted(5, wishes=Wishes(excluded=frozenset({"b"}))), (24, 24), "bad_cuts"),
        (wanted(5, wishes=Wishes(pins={"a": (0, 6)})), (24, 24), "bad_pin"),
        (replace(wanted(), cuts=None), (4, 4), TOO_LARGE),
    ],
)
def test_what_cannot_be_is_refused(asked: Wanted, sizes: tuple[float, ...], code: str) -> None:
    with pytest.raises(DwarfStarError) as error:
        propose(cluster(*sizes), JOB, asked)
    assert error.value.code == code


@given(
    st.lists(st.integers(1, 19), min_size=1, max_size=3, unique=True).map(sorted),
    st.lists(st.sampled_from([3.0, 6.0, 9.0, 24.0]), min_size=4, max_size=4),
    st.sampled_from([JOB, EVEN]),
)
def test_whatever_is_asked_the_answer_fits_is_legal_and_explained(
    cuts: list[int], sizes: list[float], job: Job
) -> None:
    there = cluster(*sizes)
    try:
        found = propose(there, job, wanted(*cuts))
    except PlanError:
        return
    ends = [end for _, _, end in layers(found)]
    assert ends[-1] == 20 and set(ends[:-1]) <= set(job.legal) and found.planned.forecast.fits
    assert (ends[:-1] == cuts) == (not found.clamped)


def test_while_both_slices_are_held_each_counts_whole() -> None:
    there = cluster_costs(cluster(24, 24), JOB)
    old = propose(there.cluster, JOB, wanted(10)).planned.plan
    new = propose(there.cluster, JOB, wanted(12)).planned.plan
    a, b = delta_views(there, old, new)
    assert (a.load, a.drop, b.load, b.drop) == (((10, 12),), (), (), ((10, 12),))
    assert a.beside_gib == pytest.approx(24 - 10 - 12, abs=0.1) and a.headroom_gib == pytest.approx(12, abs=0.1)
    assert b.beside_gib == pytest.approx(24 - 10 - 8, abs=0.1)
    assert [one.beside_gib for one in delta_views(there, old, old)] == [
        one.headroom_gib for one in delta_views(there, old, old)
    ]
    assert a.load_gib == pytest.approx(delta(there, old, new)[0].load_bytes / 2**30, abs=0.001)


def test_an_owners_plan_is_read_as_it_was_kept() -> None:
    owned = OwnedPlan(
        "f", (("n1", 4), ("n2", 8)), Strategy.FASTEST, Objective.SINGLE, {"n1": (0, 4)}, frozenset({"n3"})
    )
    assert from_text(to_text(owned)) == owned and owned.nodes == ("n1", "n2")
    assert to_text(None) == "" and from_text("") is None


@pytest.mark.parametrize(
    "text",
    [
        None, 3, "{", "[]", "{}", "null",
        '{"model":"f","stages":[],"strategy":"fastest","objective":"single","pins":{},"excluded":[]}',
        '{"model":"f","stages":[["a",4],["b",4]],"strategy":"fastest","objective":"single","pins":{},"excluded":[]}',
        '{"model":"f","stages":[["a",4]],"strategy":"slowest","objective":"single","pins":{},"excluded":[]}',
        '{"model":"f","stages":[["a",4]],"strategy":"fastest","objective":"single","pins":[1],"excluded":[]}',
        '{"model":"f","stages":[["a",4]],"strategy":"fastest","objective":"single","pins":{"a":1},"excluded":[]}',
    ],
)  # fmt: skip
def test_what_is_no_owners_plan_is_none(text: object) -> None:
    assert from_text(text) is None
