"""Which nodes make which pipeline."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.plan.cluster import Cluster, Link
from dwarfstar_engine.plan.forecast import Job
from dwarfstar_engine.plan.shares import SPARE, Wanted, deal, from_text, holds, mend, place, to_text
from support.clusters import even_job, gpu, random_cluster, random_job

JOB = even_job(30, 10)
FOUR = Cluster(tuple(gpu(name, 8, 900) for name in "abcd"))  # any two hold it
COPIES = Cluster((gpu("a", 24, 300), gpu("b", 24, 900), gpu("c", 8, 900)))
wants = st.builds(Wanted, st.integers(1, 4), st.booleans(), st.booleans())


def some(seed: int) -> tuple[Cluster, Job]:
    rng = random.Random(seed)
    return random_cluster(rng, 5), random_job(rng, 6)


@given(st.integers(0, 1 << 32), wants)
def test_shares_are_disjoint_and_each_holds_the_model_if_any_does(seed: int, wanted: Wanted) -> None:
    cluster, job = some(seed)
    shares = deal(cluster, job, wanted)
    dealt = [name for share in shares for name in share]
    assert shares and len(set(dealt)) == len(dealt) and set(dealt) <= {node.name for node in cluster.nodes}
    everyone = holds(cluster, job, [node.name for node in cluster.nodes])
    assert all(holds(cluster, job, share) for share in shares) == everyone
    assert wanted.auto or len(shares) <= wanted.count


@given(st.integers(0, 1 << 32), wants, st.integers(1, 4))
def test_who_serves_is_not_disturbed_by_newcomers_or_losses(seed: int, wanted: Wanted, count: int) -> None:
    cluster, job = some(seed)
    rng = random.Random(seed)
    at = {node.name: rng.randrange(-1, count) for node in cluster.nodes}
    shares = [[name for name, number in at.items() if number == index] for index in range(count)]
    spare = [name for name, number in at.items() if number == SPARE]
    fit = [holds(cluster, job, share) for share in shares]
    for name in spare:
        number = place(cluster, job, wanted, shares, name)
        assert number in range(SPARE, count)
        assert number == SPARE or not fit[number] or all(fit), "first those that lack something"
    moves = mend(cluster, job, shares, spare, range(count))
    if any(fit):
        assert all(at[name] == SPARE or not fit[at[name]] for name in moves)
        for number in set(moves.values()):
            after = {name for name, one in (at | dict(moves)).items() if one == number}
            assert holds(cluster, job, after) and not fit[number]
    else:
        assert set((at | dict(moves)).values()) == {0}, "all together"


def test_copies_go_to_the_fastest_that_hold_the_model() -> None:
    assert deal(COPIES, JOB, Wanted(1, copies=True)) == [["b"]]
    assert deal(COPIES, JOB, Wanted(3, copies=True)) == [["b"], ["a"]]
    two = Wanted(2, copies=True)
    assert place(COPIES, JOB, two, [["b"], []], "a") == 1
    assert place(COPIES, JOB, two, [["b"], []], "c") == SPARE, "it cannot hold it alone"
    assert place(COPIES, JOB, two, [["b"], ["a"]], "a") == SPARE
    assert place(COPIES, JOB, two, [[], []], "c") == 0, "better a split than nothing"


def test_pipelines_have_equal_room_and_newcomers_go_where_they_are_needed() -> None:
    assert sorted(map(len, deal(FOUR, JOB, Wanted(2)))) == [2, 2]
    assert len(deal(FOUR, JOB, Wanted(4))) == 2, "as many as hold it"
    assert place(FOUR, JOB, Wanted(2), [["a"], []], "b") == 0
    assert place(FOUR, JOB, Wanted(2), [["a", "b"], []], "c") == 1
    assert place(FOUR, JOB, Wanted(2), [["a", "b"], ["c"]], "d") == 1
    assert place(FOUR, JOB, Wanted(1), [["a", "b", "c"]], "d") == 0


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(3, copies=True), Wanted(auto=True, kind=Kind.PIPELINES)])
def test_what_was_taken_is_kept_for_its_model_until_something_else_is_given(wanted: Wanted) -> None:
    given = Wanted(2)
    text = to_text(wanted, given, "model")
    assert from_text(text, given, "model") == wanted
    assert from_text(text, Wanted(3), "model") is None and from_text(text, given, "other") is None
    assert to_text(given, given, "model") == ""
    bad = ("", None, 5, "[]", "[" * 100_000, text.replace("[", "{"), text.replace('"wanted":[', '"wanted":[99'))
    assert all(from_text(one, given, "model") is None for one in bad)


def test_what_is_left_of_two_pipelines_makes_one() -> None:
    left = Cluster(FOUR.nodes[:2])
    assert mend(left, JOB, [["a"], ["b"]], (), {0}) == {}, "the other waits for its node still"
    assert mend(left, JOB, [["a"], ["b"]], (), {0, 1}) == {"a": 0, "b": 0}
    assert mend(FOUR, JOB, [["a", "b"], ["c"]], ("d",), {1}) == {"d": 1}
    assert mend(FOUR, JOB, [["a", "b"], ["c"]], ("d",), ()) == {}


@pytest.mark.parametrize(
    ("cluster", "job", "want"),
    [
        (Cluster(tuple(gpu(name, 24, 900) for name in "abc"), Link(1, 0.3)), JOB, [["a"], ["b"], ["c"]]),
        (Cluster(FOUR.nodes[:2]), JOB, [["a", "b"]]),
    ],
)
def test_the_advisor_decides_if_asked(cluster: Cluster, job: Job, want: list[list[str]]) -> None:
    assert sorted(deal(cluster, job, Wanted(auto=True))) == want
    assert deal(cluster, job, Wanted(auto=True, kind=Kind.SPLIT)) == [[node.name for node in cluster.nodes]]
