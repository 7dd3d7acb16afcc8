"""One schedule of faults: drawn from a seed, played, judged.

python -m sim.schedule SEED         one schedule, again
python -m sim.schedule FIRST COUNT  many, with the rate
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from dwarfstar_engine.cluster import lease, membership
from dwarfstar_engine.cluster.ids import InstanceId, NodeId
from sim.checks import Violation
from sim.node import Node
from sim.world import HEALED_S, World

FAULTS_S = (2.0, 8.0, 16.0)  # they come from the first on, until the second or the third; then all is healed
LONG = 0.2  # share of the longer schedules, in which two leaders have the time to come to be
RENEWED_S = 2.5  # after healing, until who leads still has asked again: with a clock that jumped it may not know better
ANSWERED_S = 10.0  # by then all requests have ended: an epoch may be stuck, found out, and built anew, twice


def run(seed: int, **machines: Callable[..., Any]) -> World:
    """Play a schedule. Raises Violation that names the seed."""
    world = World(seed, **machines)
    try:
        _play(world)
    except Violation as violation:
        raise Violation(f"seed {seed}, at {world.t:.3f} s: {violation}") from None
    return world


def _play(world: World) -> None:
    random = world.random
    begin, end = FAULTS_S[0], FAULTS_S[1 + (random.random() < LONG)]
    if random.random() < 0.5:
        world.drop, world.double, world.late = 0.1 * random.random(), 0.1 * random.random(), 0.05 * random.random()
    if random.random() < 0.2:
        world.die = 0.3
    for _ in range(1 + int(random.random() * 4)):
        at = begin + (end - begin) * random.random()
        world.at(at, FAULTS[int(random.random() * len(FAULTS))], world)
        world.at(at - 0.05 * random.random(), _client, world)  # to be in flight then
    for _ in range(2):
        world.at(1.5 + (end - 1.0) * random.random(), _client, world)
    world.advance(end + 1.0)
    _heal(world)
    world.advance(world.t + RENEWED_S)
    if not world.advance(world.t + HEALED_S - RENEWED_S, world.settled):
        raise Violation(f"not healed: {_describe(world)}")
    leader = world.leader()
    assert leader is not None
    if not world.request(leader):
        raise Violation("a settled leader takes no request")
    requests = world.checks.requests
    world.advance(world.t + ANSWERED_S, lambda: all(requests.values()))
    if requests[world.requests] != "answer":
        raise Violation(f"a settled cluster does not answer: {requests[world.requests]!r}")
    if random.random() < 0.05:  # it stays so
        term = leader.term
        world.advance(world.t + 8.0)
        if not world.settled() or leader.term != term:
            raise Violation(f"it does not stay settled: {_describe(world)}")
    world.checks.finish()
    world.bounded()


def _describe(world: World) -> str:
    return "; ".join(
        f"{n.id} {n.leadership.role} {n.leadership.vote} serves {n.leadership.serving(n.now)} ring {n.ring} "
        f"missing {sorted(n.missing)}"
        for n in world.nodes.values()
        if n.alive
    )


def _heal(world: World) -> None:
    world.healed, world.cuts, world.slow = True, set(), {}
    gone_for_good = world.random.random() < 0.3
    down = [n for n in world.nodes.values() if not n.alive]
    capable = [n for n in world.nodes.values() if n.capable and n.id not in _removed(world)]
    for node in down:
        if gone_for_good and any(n.alive for n in capable) and node in down[:1]:
            continue
        world._boot(node)
    for node in world.nodes.values():
        node.paused = False


def _removed(world: World) -> set[str]:
    return {name for n in world.nodes.values() for name in n.state.removed}


# --- faults ---


def _some(world: World) -> Node:
    """A node, the leader more often than others."""
    leader = world.leader()
    if leader is not None and world.random.random() < 0.4:
        return leader
    return list(world.nodes.values())[int(world.random.random() * len(world.nodes))]


def _for(world: World) -> float:
    """How long a fault lasts, s: below and above the time-outs."""
    return 12.0 * world.random.random() ** 2


def _client(world: World) -> None:
    world.request(_some(world))


def _crash(world: World) -> None:
    node = _some(world)
    world.crash(node, silent=world.random.random() < 0.3)
    if world.random.random() < 0.7:
        world.at(world.t + 0.3 + _for(world), _restart, world, node)


def _restart(world: World, node: Node) -> None:
    if not world.healed:
        world._boot(node)


def _pause(world: World) -> None:
    node = _some(world)
    if node.alive:
        node.paused = True
        world.at(world.t + _for(world), _resume, node, node.life)


def _resume(node: Node, life: int) -> None:
    if node.life == life:
        node.paused = False


def _cut(world: World, pairs: set[tuple[NodeId, NodeId]]) -> None:
    world.cuts |= pairs
    world.at(world.t + 1.0 + _for(world), _mend, world, pairs)


def _mend(world: World, pairs: set[tuple[NodeId, NodeId]]) -> None:
    world.cuts -= pairs


def _partition(world: World) -> None:
    """Two sides; one way half of the time."""
    left = {name for name in world.nodes if world.random.random() < 0.5}
    right = world.nodes.keys() - left
    both = world.random.random() < 0.5
    _cut(world, {(a, b) for a in left for b in right} | ({(b, a) for a in left for b in right} if both else set()))


def _link(world: World) -> None:
    """One link, one way or both."""
    a, b = _some(world).id, _some(world).id
    if a != b:
        _cut(world, {(a, b), (b, a)} if world.random.random() < 0.5 else {(a, b)})


def _deaf(world: World) -> None:
    """A node that hears nobody, or that nobody hears."""
    a, deaf = _some(world).id, world.random.random() < 0.5
    _cut(world, {(b, a) if deaf else (a, b) for b in world.nodes if b != a})


def _flap(world: World) -> None:
    node = _some(world)
    for _ in range(3):
        world.at(world.t + 1.5 * world.random.random(), _break_streams, world, node)


def _break_streams(world: World, node: Node) -> None:
    if node.alive and not node.paused and not world.healed:
        world.broken(node.id, node.instance)
        if node.serving is not None:
            node.receive(node.id, ("closed", node.instance), None)


def _jump(world: World) -> None:
    size = 20.0 * world.random.random() ** 2
    _some(world).offset += size if world.random.random() < 0.5 else -size


def _slow(world: World) -> None:
    world.slow[_some(world).id] = 0.5 * world.random.random()


def _clone(world: World) -> None:
    """A copy of a node's identity attaches to the leader, and speaks for a while."""
    leader, node = world.leader(), _some(world)
    if leader is not None and not leader.paused and node is not leader:
        instance = InstanceId(f"clone{world.requests}")
        leader.attached(membership.Attached(node.id, node.id, instance, "elsewhere:1"))
        for number in range(1, 4):
            world.at(world.t + number, _clone_speaks, leader, membership.Heard(node.id, instance, number))


def _clone_speaks(leader: Node, heard: membership.Heard) -> None:
    if leader.alive and not leader.paused and leader.members is not None:
        leader.heard[heard.instance] = leader.ticks
        leader.member(heard)


def _remove(world: World) -> None:
    """The owner removes a node, and tells a leader so."""
    leader, node = world.leader(), _some(world)
    left = [n for n in world.nodes.values() if n.capable and n is not node and n.id not in _removed(world)]
    if leader is not None and node is not leader and not leader.paused and left:
        leader.learn(leader.state.changed(leader.term, leader.id, removed={node.id}))


def _resign(world: World) -> None:
    leader = world.leader()
    if leader is not None and not leader.paused:
        leader.lead(lease.Resign())


FAULTS: tuple[Callable[[World], None], ...] = (
    _crash,
    _crash,
    _pause,
    _pause,
    _partition,
    _partition,
    _link,
    _deaf,
    _flap,
    _jump,
    _slow,
    _clone,
    _remove,
    _resign,
)


def main(arguments: list[str]) -> int:
    first, count = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 1
    began, bad = time.process_time(), 0
    for seed in range(first, first + count):
        try:
            run(seed)
        except Violation as violation:
            bad += 1
            print(violation)
    taken = time.process_time() - began
    print(f"{count} schedules from {first}, {bad} violations, {count / taken:.0f} a second")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
