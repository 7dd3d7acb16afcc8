"""Requests are dealt to pipelines by load, free slots and what is cached."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.batch.router import BEARABLE, LEAST_ROWS, Load, route

load = st.builds(
    Load,
    number=st.just(0),
    slots=st.integers(1, 8),
    active=st.integers(0, 8),
    queued=st.integers(0, 20),
    cached=st.sampled_from((0, LEAST_ROWS - 1, LEAST_ROWS, 500)),
    speed=st.sampled_from((0.5, 1.0, 3.0)),
)
loads = st.lists(load, min_size=1, max_size=6).map(
    lambda found: [replace(one, number=number) for number, one in enumerate(found)]
)


@given(loads)
def test_a_request_waits_only_where_no_slot_is_free(found: list[Load]) -> None:
    number = route(found)
    assert number is not None
    assert found[number].free or not any(one.free for one in found)
    at_once = route(found, waits=False)
    assert at_once == (number if found[number].free else None)


@given(loads)
def test_what_is_cached_is_worth_a_bounded_burden(found: list[Load]) -> None:
    number = route(found)
    assert number is not None
    eligible = [one for one in found if one.free] or found
    assert found[number].burden <= BEARABLE * min(one.burden for one in eligible)
    cold = route([replace(one, cached=0) for one in found])
    assert cold is not None and found[cold].burden == min(one.burden for one in eligible)


@given(loads, st.data())
def test_a_longer_cached_beginning_only_draws_a_request_nearer(found: list[Load], data: st.DataObject) -> None:
    chosen = route(found)
    more = data.draw(st.integers(0, len(found) - 1))
    grown = [replace(one, cached=1000) if one.number == more else one for one in found]
    assert route(grown) in (chosen, more)


@given(st.integers(1, 6), st.integers(1, 40))
def test_equal_pipelines_get_equally_many(count: int, requests: int) -> None:
    found = [Load(number, 4, 0, 0) for number in range(count)]
    for _ in range(requests):
        number = route(found)
        assert number is not None
        found[number] = replace(found[number], active=found[number].active + 1)
    counts = [one.active for one in found]
    assert max(counts) - min(counts) <= 1


def test_a_chat_stays_and_a_shared_beginning_spreads() -> None:
    idle = [Load(0, 4, 0, 0), Load(1, 4, 1, 0, cached=400)]
    assert route(idle) == 1
    assert route([Load(0, 4, 0, 0), Load(1, 4, 2, 0, cached=400)]) == 0
    assert route([Load(0, 4, 0, 0, speed=1.0), Load(1, 4, 1, 0, speed=3.0)]) == 1, "the fast one has room for two"
    assert route([]) is None
