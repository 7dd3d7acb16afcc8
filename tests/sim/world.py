"""Virtual time, a network that loses, delays, doubles and reorders, and nodes on it; all drawn from one seed.

``schedule`` brings the faults; within ``HEALED_S`` of healing there must be one leader whom every node serves.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from dwarfstar_engine.cluster import lease, membership
from dwarfstar_engine.cluster.ids import InstanceId, NodeId
from dwarfstar_engine.cluster.leadership import ROUNDS, Leadership
from dwarfstar_engine.cluster.membership import Membership
from dwarfstar_engine.cluster.state import ClusterState
from sim.checks import Checks, Violation
from sim.node import TICK_S, Node

HEALED_S = 20.0  # by then the cluster answers: two lease times, two campaigns, an attach that has to be repeated
TICKS = tuple(lease.Tick(i / 16) for i in range(16))
NAMES = tuple(NodeId(name) for name in "abcdefgh")


class World:
    def __init__(
        self,
        seed: int,
        leadership: Callable[..., Leadership] = Leadership,
        members: Callable[..., Membership] = Membership,
    ) -> None:
        self.random = random.Random(seed)
        self.leadership, self.membership = leadership, members
        self.t, self.checks = 0.0, Checks()
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = self.requests = self.events = 0
        self.cuts: set[tuple[NodeId, NodeId]] = set()
        self.slow: dict[NodeId, float] = {}
        self.drop = self.double = self.late = self.die = self.strangers = 0.0
        self.healed = False
        draw = self.random.random
        number = 1 + (draw() < 0.97) + (draw() < 0.75) + (draw() < 0.2) + (draw() < 0.1)
        self.nodes: dict[NodeId, Node] = {}
        if draw() < 0.15:
            self.strangers = 0.5
        for name in NAMES[:number]:
            self.nodes[name] = Node(self, name, name <= "b" or draw() < 0.6)
        for node in self.nodes.values():
            self.at(draw(), self._boot, node)

    # --- time ---

    def at(self, t: float, what: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (t, self._count, what, args))

    def advance(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Play events. True as soon as done() is, which is asked twice a second."""
        heap, pop = self._heap, heapq.heappop
        ask = self.t + 0.5
        while heap and heap[0][0] < until:
            self.t, _, what, args = pop(heap)
            self.events += 1
            what(*args)
            if done is not None and self.t >= ask:
                if done():
                    return True
                ask = self.t + 0.5
        self.t = until
        return done is not None and done()

    def _boot(self, node: Node) -> None:
        if not node.alive:
            node.boot()
            self._tick(node, node.life)

    def _tick(self, node: Node, life: int) -> None:
        if not node.alive or node.life != life:
            return
        if not node.paused:
            node.tick(TICKS[int(self.random.random() * 16)])
        self._count += 1
        heapq.heappush(self._heap, (self.t + TICK_S, self._count, self._tick, (node, life)))

    # --- network ---

    def tell(self, source: NodeId, to: NodeId, message: Any) -> None:
        self.send(source, to, message, None)

    def send(self, source: NodeId, to: NodeId, message: Any, state: ClusterState | None) -> None:
        if self.cuts and (source, to) in self.cuts:
            return
        draw = self.random.random
        delay = 0.002 if source == to else 0.002 + 0.03 * draw()
        copies = 1
        if not self.healed and source != to:
            luck = draw()
            if luck < self.drop:
                return
            if luck > 1.0 - self.late:
                delay += 3.0 * draw()
            if state is not None and luck - self.drop < self.double:
                copies = 2  # streams double nothing
            if self.slow:
                delay += self.slow.get(source, 0.0) + self.slow.get(to, 0.0)
        for copy in range(copies):
            self._count += 1
            entry = (self.t + delay + copy * draw(), self._count, self._deliver, (source, to, message, state))
            heapq.heappush(self._heap, entry)

    def _deliver(self, source: NodeId, to: NodeId, message: Any, state: ClusterState | None) -> None:
        node = self.nodes[to]
        if not node.alive or (self.cuts and (source, to) in self.cuts):
            return
        if node.paused:
            self.at(self.t + 0.25, self._deliver, source, to, message, state)  # in its sockets
        else:
            node.receive(source, message, state)

    def broken(self, node: NodeId, instance: InstanceId) -> None:
        """The streams of a node broke, where news can pass: after what it had said before, if nothing is slow."""
        for other in self.nodes.values():
            if other.id != node and other.alive and (node, other.id) not in self.cuts:
                self.at(self.t + 0.04 + 0.05 * self.random.random(), self._told, other, node, instance)

    def _told(self, other: Node, node: NodeId, instance: InstanceId) -> None:
        if other.alive and not other.paused:
            other.streams.discard(instance)
            other.member(membership.Broken(node, instance, "its connection broke"))
            other.lead(lease.PeerCut(node))

    # --- faults ---

    def crash(self, node: Node, silent: bool = False) -> None:
        if node.alive:
            instance = node.instance
            node.crash()
            if not silent:
                self.broken(node.id, instance)

    def dies_within(self, effects: list[lease.Effect]) -> int:
        """Index of the effect before which the node dies, -1: it does not. Only where the disk is written."""
        if self.healed or not self.die or not any(type(effect) is lease.Persist for effect in effects):
            return -1
        if self.random.random() >= self.die:
            return -1
        return int(self.random.random() * (len(effects) + 1))

    def leader(self) -> Node | None:
        leaders = [n for n in self.nodes.values() if n.alive and n.leadership.leading(n.now) is not None]
        return leaders[0] if len(leaders) == 1 else None

    def request(self, node: Node) -> bool:
        self.requests += 1
        return node.request(self.requests, int(self.random.random() * 1e9))

    # --- after healing ---

    def settled(self) -> bool:
        """One leader, whom all serve, with all of them in its ring."""
        leader = self.leader()
        if leader is None or not leader.ready():
            return False
        serving = (leader.leadership.leading(leader.now), leader.id)
        removed = leader.state.removed
        here = {n.id for n in self.nodes.values() if n.alive and n.id not in removed}
        if {node for node, _, _ in leader.ring} != here:
            return False
        return all(n.leadership.serving(n.now) == serving for n in self.nodes.values() if n.id in here) and all(
            n.leadership.serving(n.now) is None for n in self.nodes.values() if n.alive and n.id in removed
        )

    def bounded(self) -> None:
        """Memory: nothing grows with the length of the run."""
        for node in self.nodes.values():
            if node.alive:
                machine, most = node.leadership, len(self.nodes)
                sizes = (len(machine._peers), len(machine._grants), len(machine._answered), len(machine._cut))
                if max(sizes) > most or len(machine._sent) > ROUNDS:
                    raise Violation(f"{node.id} keeps {sizes} entries for {most} nodes")
                if node.members is not None and len(node.members._nodes) > most:
                    raise Violation(f"{node.id} keeps {len(node.members._nodes)} members of {most} nodes")
