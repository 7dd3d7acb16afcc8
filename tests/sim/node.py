"""A node of the simulation: the driver of the machines under test, and a coordinator and a stage, both simple.

What is on disk survives a crash, the rest does not. A coordinator plans over the nodes it leads and knows as there, and
builds a new epoch whenever that changes or something does not answer; tokens are then computed again from the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dwarfstar_engine.cluster import lease, membership
from dwarfstar_engine.cluster.ids import InstanceId, NodeId
from dwarfstar_engine.cluster.membership import Membership, State
from dwarfstar_engine.cluster.state import ClusterState, merge
from sim.model import ANSWER, LAYERS, start, through

if TYPE_CHECKING:
    from sim.world import World

TICK_S = 0.5
WELCOME_TICKS = 6  # an attach that nobody answered is tried again
STUCK_TICKS = 4  # a ring that is not ready, or a frame that is away for longer, is given up
RETRY_TICKS = 2  # before a closed or refused connection is tried again
TIMINGS, MEMBER_TIMINGS = lease.Timings(), membership.Timings()
SURE_S = MEMBER_TIMINGS.late_s - TICK_S - MEMBER_TIMINGS.most_step_s  # a jump of its clock counts, a little
MOST_SILENT = round((MEMBER_TIMINGS.late_s + 1.5) / TICK_S)


class Sequence:
    """A request of a coordinator. sent: tick at which its frame left, -1: none is away."""

    __slots__ = ("id", "prompt", "sent", "tokens")

    def __init__(self, request: int, prompt: int) -> None:
        self.id, self.prompt, self.sent = request, prompt, -1
        self.tokens: list[int] = []


class Node:
    def __init__(self, world: World, node: NodeId, capable: bool) -> None:
        self.world, self.id, self.capable = world, node, capable
        self.disk = lease.Vote()
        self.state = ClusterState()
        self.alive = self.paused = False
        self.offset = 0.0  # of its clock
        self.life = self.connections = 0
        self.mailbox: list[tuple[NodeId, Any]] = []  # while it is paused

    @property
    def now(self) -> float:
        return self.world.t + self.offset

    def boot(self) -> None:
        self.alive, self.paused, self.mailbox = True, False, []
        self.life += 1
        world = self.world
        others = {NodeId(n.id): n.capable for n in world.nodes.values() if n is not self}
        peers = others if world.healed or world.random.random() >= world.strangers else {}
        for node, capable in others.items() if not peers else ():  # found later
            world.at(world.t + 4.0 * world.random.random(), self._found, self.life, lease.PeerKnown(node, capable))
        self.leadership = world.leadership(
            self.id,
            TIMINGS,
            self.now,
            capable=self.capable,
            vote=self.disk,
            peers=peers,
            fenced=[NodeId(n) for n in self.state.removed],
        )
        self.members: Membership | None = None
        # as a stage
        self.serving: tuple[int, NodeId] | None = None
        self.instance = InstanceId("")
        self.beats = self.wait = 0
        self.welcomed = False
        self.assigned: tuple[int, int, int, int, NodeId | None] | None = None  # term, epoch, begin, end, next
        self.cells: dict[int, int] = {}  # sequence → positions held
        # as a coordinator
        self.term = self.epoch = self.ticks = self.planned = 0
        self.ring: list[tuple[NodeId, int, int]] = []
        self.missing: set[NodeId] = set()
        self.dirty = False
        self.sequences: dict[int, Sequence] = {}
        self.heard: dict[InstanceId, int] = {}  # tick at which it last spoke
        self.streams: set[InstanceId] = set()  # that are open

    def _found(self, life: int, event: lease.PeerKnown) -> None:
        if self.alive and self.life == life:
            self.lead(event)

    def crash(self) -> None:
        self.world.checks.crashed(self.id)
        self.alive = self.paused = False
        for sequence in self.sequences.values():
            self.world.checks.ended(sequence.id, "broken")

    # --- the driver ---

    def tick(self, tick: lease.Tick) -> None:
        self.lead(tick)
        if not self.alive:  # it died in between
            return
        self.ticks += 1
        if self.serving is not None:
            self._speak()
        if self.members is not None:
            self.member(membership.Tick())
            self._watch()

    def lead(self, event: lease.Event) -> None:
        """Tell the leadership machine, and do what it says, in order."""
        effects = self.leadership.handle(event, self.now)
        if not effects:
            return
        world, checks = self.world, self.world.checks
        dies = world.dies_within(effects)
        for index, effect in enumerate(effects):
            if index == dies:
                world.crash(self)
                return
            kind = type(effect)
            if kind is lease.Send:
                world.send(self.id, effect.to, effect.message, self.state)  # type: ignore[union-attr]
            elif kind is lease.Persist:
                self.disk = effect.vote  # type: ignore[union-attr]
            else:
                self._led(effect, checks)
        if self.dirty:
            self._plan()

    def _led(self, effect: lease.Effect, checks: Any) -> None:
        match effect:
            case lease.Serve(term, leader):
                checks.serve(self.id, term, leader)
                self.serving = term, leader
                self._attach()
            case lease.Unserve(term, leader, _):
                checks.unserve(self.id, term, leader)
                self.serving = self.assigned = None
            case lease.Lead(term, _):
                self.term, self.epoch, self.dirty = term, 0, True
                if self.members is None:
                    fenced = [NodeId(n) for n in self.state.removed]
                    self.members = self.world.membership(MEMBER_TIMINGS, self.now, fenced)
                    self.heard, self.streams = {}, set()
            case lease.StepDown():
                self.members, self.ring, self.dirty = None, [], False
                for sequence in self.sequences.values():
                    checks.ended(sequence.id, "error")
                self.sequences = {}
            case lease.Gained() | lease.Dropped():
                self.dirty = True

    def member(self, event: membership.Event) -> None:
        if self.members is None:
            return
        effects = self.members.handle(event, self.now)
        before = frozenset(self.streams) if effects else frozenset()
        for effect in effects:
            match effect:
                case membership.Changed(node, _, _, new, _, _):
                    if new is State.JOINED:
                        instance = self.members.instance(node)
                        assert instance is not None
                        self._joined(node, instance, before)
                        self.world.tell(self.id, node, ("welcome", instance))
                    self.dirty = True
                case membership.Refuse() | membership.Close():
                    self.streams.discard(effect.instance)
                    self.world.tell(self.id, effect.node, ("closed", effect.instance))
                case membership.Warn():
                    pass
        if self.dirty:
            self._plan()

    def attached(self, event: membership.Attached) -> None:
        if self.members is not None:
            self.streams.add(event.instance)
            self.heard[event.instance] = self.ticks
            self.member(event)

    def _joined(self, node: NodeId, instance: InstanceId, streams: frozenset[InstanceId]) -> None:
        genuine = self.world.nodes[node].instance
        silent = self.ticks - self.heard.get(genuine, -99) if genuine in streams else 99
        self.world.checks.joined(self.id, node, instance, silent * TICK_S, SURE_S)

    # --- as a stage ---

    def _attach(self) -> None:
        assert self.serving is not None
        self.connections += 1
        self.instance = InstanceId(f"{self.id}.{self.life}.{self.connections}")
        self.beats, self.wait, self.welcomed = 0, WELCOME_TICKS, False
        self.world.tell(self.id, self.serving[1], ("attach", self.id, self.instance))

    def _speak(self) -> None:
        assert self.serving is not None
        if self.wait:
            self.wait -= 1
            if not self.wait and not self.welcomed:
                self._attach()
        if self.ticks & 1:  # each second
            self.beats += 1
            self.world.tell(self.id, self.serving[1], ("heard", self.id, self.instance, self.beats))

    def receive(self, source: NodeId, message: Any, state: ClusterState | None) -> None:
        if state is not None:
            if state is not self.state:
                self.learn(state)
            self.lead(message)
            return
        kind = message[0]
        if kind == "frame":
            self._frame(message)
        elif kind == "done":
            self._done(message)
        elif kind == "heard":
            _, node, instance, number = message
            if self.members is not None:
                self.heard[instance] = self.ticks
                if instance not in self.streams:
                    self.world.tell(self.id, source, ("closed", instance))  # as TCP answers
                self.member(membership.Heard(node, instance, number))
        elif kind == "attach":
            self.attached(membership.Attached(message[1], message[1], message[2], f"{source}:1"))
        elif kind == "assign":
            _, term, epoch, begin, end, following = message
            now_serving = self.leadership.serving(self.now)
            if now_serving == (term, source) and (self.assigned is None or self.assigned[:2] < (term, epoch)):
                self.assigned, self.cells = (term, epoch, begin, end, following), {}
                self.world.tell(self.id, source, ("ready", term, epoch))
        elif kind == "ready":
            if self.members is not None and message[1:] == (self.term, self.epoch) and self.missing:
                self.missing.discard(source)
                if not self.missing:
                    self._advance()
        elif message[1] == self.instance:
            if kind == "welcome":
                self.welcomed = True
            elif kind == "closed":
                self.wait, self.welcomed = RETRY_TICKS, False

    def learn(self, state: ClusterState) -> None:
        """The kept state of a peer."""
        merged = merge(self.state, state)
        if merged is self.state:
            return
        fresh, self.state = merged.removed - self.state.removed, merged
        for node in fresh:
            self.world.checks.removed.setdefault(self.id, set()).add(node)
            self.member(membership.Removed(NodeId(node)))
            self.lead(lease.PeerRemoved(NodeId(node)))

    def _frame(self, message: Any) -> None:
        _, term, epoch, leader, sequence, first, position, value = message
        mine = self.assigned
        if mine is None or mine[:2] != (term, epoch) or self.leadership.serving(self.now) != (term, leader):
            return
        if self.cells.get(sequence, 0) != first:
            return  # said twice
        self.world.checks.frame(self.id, term, leader)
        self.cells[sequence] = position + 1
        value = through(value, mine[2], mine[3])
        if mine[4] is None:
            self.world.tell(self.id, leader, ("done", term, epoch, sequence, position, value))
        else:
            self.world.tell(self.id, mine[4], (*message[:7], value))

    # --- as a coordinator ---

    def _plan(self) -> None:
        """A new epoch over the nodes that are there."""
        self.dirty, members = False, self.members
        if members is None:
            return
        here = [n for n in self.leadership.nodes() if members.state(n) in (State.JOINED, State.LATE)]
        self.ring, self.missing = [], set(here)
        for sequence in self.sequences.values():
            sequence.sent = -1
        if not here:
            return
        self.epoch += 1
        self.planned = self.ticks
        here = here[:LAYERS]
        self.missing = set(here)
        cuts = [LAYERS * i // len(here) for i in range(len(here) + 1)]
        self.ring = [(node, cuts[i], cuts[i + 1]) for i, node in enumerate(here)]
        self.world.checks.plan(self.id, self.term, self.epoch, self.ring)  # type: ignore[arg-type]
        for i, (node, begin, end) in enumerate(self.ring):
            following = here[i + 1] if i + 1 < len(here) else None
            self.world.tell(self.id, node, ("assign", self.term, self.epoch, begin, end, following))

    def ready(self) -> bool:
        return bool(self.ring) and not self.missing and self.leadership.leading(self.now) is not None

    def _watch(self) -> None:
        """Give up what is stuck."""
        assert self.members is not None
        checks, ticks = self.world.checks, self.ticks
        for node in self.leadership.nodes():
            if self.members.state(node) is State.JOINED:
                instance = self.members.instance(node)
                assert instance is not None
                checks.alive(self.id, node, ticks - self.heard[instance], MOST_SILENT)
        stuck = bool(self.missing) and ticks - self.planned > STUCK_TICKS
        for sequence in self.sequences.values():
            stuck |= sequence.sent >= 0 and ticks - sequence.sent > STUCK_TICKS
        if stuck:
            self._plan()

    def request(self, request: int, prompt: int) -> bool:
        """A client's request: is it accepted?"""
        if not self.alive or self.paused or not self.ready():
            return False
        self.world.checks.accepted(request, prompt)
        self.sequences[request] = Sequence(request, prompt)
        self._advance()
        return True

    def _advance(self) -> None:
        if self.leadership.leading(self.now) is None:
            return
        for sequence in self.sequences.values():
            if sequence.sent < 0:
                self._send(sequence, 0)  # the ring holds nothing of it

    def _send(self, sequence: Sequence, first: int) -> None:
        position = len(sequence.tokens)
        sequence.sent = self.ticks
        value = start(sequence.prompt, position)
        frame = ("frame", self.term, self.epoch, self.id, sequence.id, first, position, value)
        self.world.tell(self.id, self.ring[0][0], frame)

    def _done(self, message: Any) -> None:
        _, term, epoch, request, position, value = message
        sequence = self.sequences.get(request)
        if self.members is None or sequence is None or (term, epoch) != (self.term, self.epoch):
            return
        if position != len(sequence.tokens) or self.leadership.leading(self.now) is None:
            return
        sequence.tokens.append(value)
        if len(sequence.tokens) == ANSWER:
            del self.sequences[request]
            self.world.checks.ended(request, "answer", sequence.tokens)
        else:
            self._send(sequence, position + 1)
