"""Schedules of faults, none of which may break a promise. A failure names its seed: ``python -m sim.schedule SEED``."""

from __future__ import annotations

import pytest

from sim.node import Node
from sim.schedule import run
from sim.world import World

SCHEDULES, CHUNK = 20_000, 1_000


@pytest.mark.parametrize("first", range(0, SCHEDULES, CHUNK))
def test_no_promise_is_broken(first: int) -> None:
    for seed in range(first, first + CHUNK):
        run(seed)


@pytest.mark.parametrize("seed", [3, 20, 224])
def test_a_seed_is_played_the_same_way_again(seed: int) -> None:
    assert _fingerprint(run(seed)) == _fingerprint(run(seed))


def test_schedules_have_requests_that_end_in_each_way() -> None:
    ends = [end for seed in range(300) for end in run(seed).checks.requests.values()]
    assert {"answer", "error", "broken"} == set(ends)


@pytest.mark.parametrize("silent", [True, False])
def test_a_dead_leader_is_replaced_within_10_s_and_steps_down_when_it_is_back(silent: bool) -> None:
    for seed in range(100):
        world, old = _quiet(seed)
        world.crash(old, silent)
        assert world.advance(world.t + (10.0 if silent else 6.0), world.settled), f"seed {seed}"
        world._boot(old)
        assert world.advance(world.t + 10.0, world.settled), f"seed {seed}"


def test_a_stopped_leader_steps_down_at_once_when_it_goes_on() -> None:
    for seed in range(100):
        world, old = _quiet(seed)
        term = old.term
        old.paused = True
        world.advance(world.t + 12.0)
        new = next(n for n in world.nodes.values() if n.leadership.leading(n.now) is not None and n is not old)
        assert new.term > term
        assert old.leadership.leading(old.now) is None  # before it has even been told
        old.paused = False
        assert world.advance(world.t + 3.0, world.settled), f"seed {seed}"
        assert world.leader() is new, f"seed {seed}"


def _quiet(seed: int) -> tuple[World, Node]:
    """Three or more nodes that have settled, two of them capable at least, and their leader."""
    while len((world := World(seed)).nodes) < 3:
        seed += 1000
    world.healed = True
    assert world.advance(15.0, world.settled)
    leader = world.leader()
    assert leader is not None
    return world, leader


def _fingerprint(world: World) -> tuple[object, ...]:
    return world.events, world.t, world.checks.owner, world.checks.requests, world.random.random()
