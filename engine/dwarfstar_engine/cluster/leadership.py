"""Who leads: terms and leases. One machine per node, pure: ``handle(event, now)`` gives effects, carried out in order.

**A node** serves one leader at a time, by a lease that runs on its own clock. Its *vote* is the highest term it has
served and whose that was; it is on disk before the answer leaves. It grants a request if the term is higher than its
vote's, or if it is the same leader's. So it never serves two leaders in a term, and never goes back to a lower one,
whatever crashes, overtakes or jumps: leases and clocks decide who is *available*, votes decide what is *safe*.

While a lease runs, requests of others are refused, also of higher terms. Otherwise a node that does not hear the leader
would take the cluster from it, and both would go on taking it from each other. Between two leaders (a healed partition)
the higher (term, id) wins: the other steps down as soon as it hears of that one, and gives its leases back. Nodes grant
and leaders yield only to one that hears them (``hears``; it asks twice at first): behind a one-way partition, one that
hears nobody would hold nodes that it cannot lead.

**A candidate** is a capable node that has no lease. It waits its rank among the candidates (highest id first), times a
step, and a jitter; takes a term higher than all it has seen, and asks every node it knows. When all have granted, or
at the deadline, it leads those that granted. If one that answered is held by another leader, it does not: there is a
leader, and it only cannot hear it. So a partition in which nobody hears a leader gets one; two partitions get two,
each with the nodes it reaches.

**A leader** asks all nodes it knows again every ``renew_s``, its own node included: one that was stopped for longer
than a lease finds its own expired, and steps down before it does anything else. It drops nodes whose lease ran out,
counted from when the request was sent. A refusal that shows a live leader with a higher (term, id) makes it step down;
one that shows a higher term only (a node that served a leader now dead) makes it go on under a new term of its own.

The data plane asks ``serving(now)`` before it obeys, ``leading(now)`` before it plans or accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import assert_never

from dwarfstar_engine.cluster.ids import NodeId
from dwarfstar_engine.cluster.lease import (
    MAX_LEASE_S,
    MAX_TERM,
    Dropped,
    Effect,
    Event,
    Gained,
    Lead,
    LeaseReply,
    LeaseRequest,
    PeerCut,
    PeerForgotten,
    PeerKnown,
    PeerRemoved,
    Persist,
    Reason,
    Release,
    Resign,
    Send,
    Serve,
    StepDown,
    Tick,
    Timings,
    Unserve,
    Vote,
)
from dwarfstar_engine.cluster.steady import Steady

TICK_S = 0.25  # how soon after its time a lease must be noticed to be over
MAX_PEERS = 1024  # as many as a coordinator takes; further ones are not asked
ROUNDS = 8  # rounds of requests whose answers count: later ones would grant a lease that is over


class Role(StrEnum):
    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"


class Leadership:
    """See the module. ``vote``: the last one persisted. ``peers``: the other nodes known, and whether they can lead.
    ``fenced``: removed by the owner."""

    def __init__(
        self,
        me: NodeId,
        timings: Timings,
        now: float,
        *,
        capable: bool = True,
        vote: Vote | None = None,
        peers: Mapping[NodeId, bool] | None = None,
        fenced: Iterable[NodeId] = (),
    ) -> None:
        self.me, self.capable, self._timings = me, capable, timings
        self.role = Role.FOLLOWER
        self.removed = False  # a peer said so: this node takes no part any more
        self._steady = Steady(now)
        self._fenced = set(fenced)
        self._peers = {node: can for node, can in (peers or {}).items() if node != me and node not in self._fenced}
        self._cut: set[NodeId] = set()
        # The node's side. The lease that runs is of the vote's term.
        self._vote = vote or Vote()
        self._leader: NodeId | None = None
        self._last_leader: NodeId | None = None  # whose lease ran out last
        self._until = 0.0
        self._seen = 0  # number of the last request granted
        # The candidate's and leader's side. A campaign's term is voted for by its own node.
        self._highest = self._vote.term  # term heard of; decides nothing but the next campaign's
        self._due: float | None = None  # when the next campaign begins
        self._deadline = self._next_round = 0.0
        self._number = 0
        self._sent: dict[int, float] = {}
        self._grants: dict[NodeId, float] = {}  # until when
        self._held: set[NodeId] = set()
        self._answered: dict[NodeId, tuple[float, int]] = {}  # when last, and which number

    # --- what others ask ---

    @property
    def vote(self) -> Vote:
        return self._vote

    def serving(self, now: float) -> tuple[int, NodeId] | None:
        """(term, leader) this node obeys now."""
        if self._leader is None or self._steady.peek(now) >= self._until:
            return None
        return self._vote.term, self._leader

    def leading(self, now: float) -> int | None:
        """The term this node leads now."""
        return self._vote.term if self._leader == self.me and self.serving(now) is not None else None

    def nodes(self) -> tuple[NodeId, ...]:
        """While it leads: itself and the nodes whose leases it has."""
        return (self.me, *sorted(self._grants)) if self.role is Role.LEADER else ()

    def handle(self, event: Event, now: float) -> list[Effect]:
        t = self._steady.at(now)
        out: list[Effect] = []
        self._expire(t, out)
        match event:
            case Tick():
                self._tick(event.jitter, t, out)
            case LeaseRequest():
                self._request(event, t, out)
            case LeaseReply():
                self._reply(event, t, out)
            case Release():
                if self._leader == event.leader and self._vote.term == event.term and self._leader != self.me:
                    self._unserve("its leader released it", out)
            case PeerKnown():
                self._know(event, t)
            case PeerForgotten():
                self._forget(event.node, "it was forgotten", out)
            case PeerRemoved():
                self._remove(event.node, out)
            case PeerCut():
                if event.node in self._peers:
                    self._cut.add(event.node)
                if self._leader == event.node:
                    self._until = min(self._until, t + self._timings.grace_s)
            case Resign():
                self._step_down("it resigned", out)
                self._due = t + 2 * self._timings.lease_s  # after the others
            case _:
                assert_never(event)
        return out

    def _know(self, event: PeerKnown, t: float) -> None:
        room = event.node in self._peers or len(self._peers) < MAX_PEERS
        if room and event.node != self.me and event.node not in self._fenced:
            if self.role is Role.LEADER and (event.node not in self._peers or event.node in self._cut):
                # It is asked with the next tick: nobody likes to wait, and if its stream broke its lease is short.
                self._next_round = min(self._next_round, t)
            self._peers[event.node] = event.capable

    # --- the node's side ---

    def _expire(self, t: float, out: list[Effect]) -> None:
        if self._leader is None or t < self._until:
            return
        if self._leader == self.me:
            self._step_down("it was stopped for longer than its lease", out)
        else:
            self._last_leader = self._leader
            self._unserve("the lease ran out", out)

    def _request(self, r: LeaseRequest, t: float, out: list[Effect]) -> None:
        if r.term > MAX_TERM:
            return
        reason = Reason.REMOVED
        if r.leader not in self._fenced:
            self._highest = max(self._highest, r.term)
            if self.role is Role.LEADER and self._yields(r):
                self._step_down(f"{r.leader} leads term {r.term}", out)
            elif self.role is Role.CANDIDATE and (r.term, r.leader) > (self._vote.term, self.me):
                self._abandon(out)
            reason = self._verdict(r)
        if reason is Reason.NONE:
            if self._leader == r.leader and self._vote.term == r.term and r.number <= self._seen:
                return  # said twice, or overtaken
            self._grant(r, t, out)
        out.append(Send(r.leader, LeaseReply(self.me, r.term, r.number, reason, self._vote.term, self._leader)))

    def _yields(self, r: LeaseRequest) -> bool:
        """This node leads: does it make way? Only for a leader with more right, and only if that one hears it."""
        return r.leading and r.hears and (r.term, r.leader) > (self._vote.term, self.me)

    def _verdict(self, r: LeaseRequest) -> Reason:
        """May this node serve that term? The rule that keeps it from working for two."""
        if self.removed:
            return Reason.TAKEN
        if r.term < self._vote.term:
            return Reason.OLD_TERM
        if self.role is Role.CANDIDATE:
            return Reason.CAMPAIGNING  # with a higher (term, id), or it would have been abandoned
        if self._leader is not None and self._leader != r.leader:
            return Reason.HELD
        if r.term == self._vote.term and self._vote.leader not in (None, r.leader):
            return Reason.TAKEN
        return Reason.NONE if r.hears else Reason.UNHEARD

    def _grant(self, r: LeaseRequest, t: float, out: list[Effect]) -> None:
        self._set_vote(r.term, r.leader, out)
        self._seen, self._due = r.number, None
        self._until = t + min(r.lease_s, MAX_LEASE_S)
        self._cut.discard(r.leader)
        if self._leader is None:
            self._leader = r.leader
            out.append(Serve(r.term, r.leader))

    def _set_vote(self, term: int, leader: NodeId, out: list[Effect]) -> None:
        if (term, leader) == (self._vote.term, self._vote.leader):
            return
        if self._leader is not None:
            self._unserve(f"term {term} came", out)
        self._vote = Vote(term, leader)
        out.append(Persist(self._vote))

    def _unserve(self, cause: str, out: list[Effect]) -> None:
        assert self._leader is not None
        out.append(Unserve(self._vote.term, self._leader, cause))
        self._leader = self._due = None

    # --- the candidate's side ---

    def _tick(self, jitter: float, t: float, out: list[Effect]) -> None:
        if self.role is Role.LEADER:
            self._renew(t, out)
        elif self.role is Role.CANDIDATE:
            if t >= self._deadline:
                self._decide(t, out)
            elif t >= self._next_round:
                self._round(t, out)
        elif self.capable and self._leader is None and not self.removed:
            if self._due is None:
                self._due = t + (self._rank() + jitter) * self._timings.step_s if self._peers else t
            if t >= self._due:
                self._campaign(t, t + self._timings.campaign_s, out)

    def _rank(self) -> int:
        """Among those who may campaign now, highest id first: that one wins a tie as well."""
        return sum(
            can and node > self.me and node != self._last_leader and node not in self._cut
            for node, can in self._peers.items()
        )

    def _campaign(self, t: float, deadline: float, out: list[Effect]) -> None:
        self.role, self._deadline, self._due = Role.CANDIDATE, deadline, None
        self._grants, self._held = {}, set()
        self._highest = max(self._highest, self._vote.term) + 1
        self._set_vote(self._highest, self.me, out)
        self._round(t, out)
        if all(node in self._cut for node in self._peers):
            self._decide(t, out)

    def _decide(self, t: float, out: list[Effect]) -> None:
        """All have answered, or there is no more time."""
        if self._held:
            self._abandon(out)
        else:
            self._lead(t, out)

    def _abandon(self, out: list[Effect]) -> None:
        self.role = Role.FOLLOWER
        self._release(out)

    def _release(self, out: list[Effect]) -> None:
        release = Release(self.me, self._vote.term)
        out.extend(Send(node, release) for node in self._grants)
        self._grants, self._due = {}, None

    # --- the leader's side ---

    def _lead(self, t: float, out: list[Effect]) -> None:
        self.role, self._leader, self._until = Role.LEADER, self.me, t + self._timings.lease_s
        out.append(Serve(self._vote.term, self.me))
        out.append(Lead(self._vote.term, self.nodes()))

    def _renew(self, t: float, out: list[Effect]) -> None:
        self._until = t + self._timings.lease_s
        for node in [node for node, until in self._grants.items() if until <= t]:
            del self._grants[node]
            out.append(Dropped(node, "its lease ran out"))
        if t >= self._next_round:
            self._round(t, out)

    def _round(self, t: float, out: list[Effect]) -> None:
        """Ask every node."""
        self._next_round = t + self._timings.renew_s
        self._number += 1
        self._sent[self._number] = t
        self._sent.pop(self._number - ROUNDS, None)
        since, said = t - self._timings.lease_s, [self._ask(self._number, hears) for hears in (False, True)]
        for node in self._peers:
            answered = self._answered.get(node)
            out.append(Send(node, said[answered is not None and answered[0] > since]))

    def _ask(self, number: int, hears: bool) -> LeaseRequest:
        leading = self.role is Role.LEADER
        return LeaseRequest(self.me, self._vote.term, number, leading, hears, self._timings.lease_s)

    def _bump(self, t: float, out: list[Effect]) -> None:
        """A node has served a higher term whose leader is gone: go on under a higher one."""
        self._highest = max(self._highest, self._vote.term) + 1
        self._set_vote(self._highest, self.me, out)
        self._grants = {}
        self._lead(t, out)
        self._round(t, out)

    def _step_down(self, cause: str, out: list[Effect]) -> None:
        if self.role is Role.CANDIDATE:
            self._abandon(out)
        if self.role is not Role.LEADER:
            return
        self.role = Role.FOLLOWER
        out.append(StepDown(self._vote.term, cause))
        self._release(out)
        self._unserve(cause, out)

    def _reply(self, r: LeaseReply, t: float, out: list[Effect]) -> None:
        if r.node not in self._peers or self.removed or r.number > self._number or r.term_seen > MAX_TERM:
            return  # a stranger's, or an answer to an earlier life of this node
        self._highest = max(self._highest, r.term_seen)
        self._cut.discard(r.node)
        if r.reason is Reason.REMOVED:
            self.removed = True
            self._step_down("its owner removed this node", out)
            return
        current = r.term == self._vote.term and self.role is not Role.FOLLOWER
        if r.granted and not current:  # it was on its way when the campaign ended: do not hold the node
            out.append(Send(r.node, Release(self.me, r.term)))
        if self.role is Role.FOLLOWER:
            return
        last = self._answered.get(r.node)
        if last is not None and r.number <= last[1]:
            return  # said twice, or overtaken
        unheard = r.reason is Reason.UNHEARD
        self._answered[r.node] = (t, r.number - unheard)
        if unheard and current:
            out.append(Send(r.node, self._ask(r.number, True)))
        elif self.role is Role.LEADER:
            self._leader_reply(r, current, t, out)
        elif current:
            self._candidate_reply(r, t, out)

    def _leader_reply(self, r: LeaseReply, current: bool, t: float, out: list[Effect]) -> None:
        if r.holder not in (None, self.me) and (r.term_seen, r.holder) > (self._vote.term, self.me):
            self._step_down(f"{r.node} serves {r.holder} in term {r.term_seen}", out)
        elif not current:
            pass
        elif r.granted:
            until = self._granted_until(r)
            if until > t and r.node not in self._grants:
                out.append(Gained(r.node))
            if until > t:
                self._grants[r.node] = until
        else:
            if self._grants.pop(r.node, None) is not None:
                out.append(Dropped(r.node, f"it refuses: {r.reason}"))
            if r.holder is None and r.term_seen >= self._vote.term:
                self._bump(t, out)

    def _candidate_reply(self, r: LeaseReply, t: float, out: list[Effect]) -> None:
        if r.granted:
            self._held.discard(r.node)
            until = self._granted_until(r)
            if until > t:
                self._grants[r.node] = until
            if all(node in self._grants or node in self._cut for node in self._peers):
                self._decide(t, out)
        elif r.holder is not None or r.reason is Reason.CAMPAIGNING:
            self._held.add(r.node)
        elif r.term_seen >= self._vote.term:
            self._campaign(t, self._deadline, out)

    def _granted_until(self, r: LeaseReply) -> float:
        return self._sent.get(r.number, -MAX_LEASE_S) + self._timings.lease_s

    # --- peers go ---

    def _forget(self, node: NodeId, cause: str, out: list[Effect]) -> None:
        self._peers.pop(node, None)
        self._cut.discard(node)
        self._held.discard(node)
        self._answered.pop(node, None)
        if self._grants.pop(node, None) is not None:
            out.append(Send(node, Release(self.me, self._vote.term)))
            if self.role is Role.LEADER:
                out.append(Dropped(node, cause))

    def _remove(self, node: NodeId, out: list[Effect]) -> None:
        if node == self.me:
            self.removed = True
            self._step_down("its owner removed this node", out)
            if self._leader is not None:
                self._unserve("its owner removed this node", out)
        else:
            self._fenced.add(node)
            self._forget(node, "its owner removed it", out)
            if self._leader == node:
                self._unserve("its owner removed its leader", out)
