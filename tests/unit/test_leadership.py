"""Rules of terms and leases one by one; all of them together are in tests/sim."""

from __future__ import annotations

from dwarfstar_engine.cluster.ids import NodeId
from dwarfstar_engine.cluster.leadership import Leadership, Role
from dwarfstar_engine.cluster.lease import (
    MAX_TERM,
    Dropped,
    Effect,
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

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
TICK = Tick(0.0)


def ask(leader: NodeId, term: int, number: int = 1, *, leading: bool = True, hears: bool = True) -> LeaseRequest:
    return LeaseRequest(leader, term, number, leading, hears, 5.0)


def reply(effects: list[Effect]) -> LeaseReply:
    (message,) = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, LeaseReply)]
    return message


def requests(effects: list[Effect]) -> dict[NodeId, LeaseRequest]:
    return {e.to: e.message for e in effects if isinstance(e, Send) and isinstance(e.message, LeaseRequest)}


def follower(vote: Vote | None = None) -> Leadership:
    return Leadership(C, Timings(), 0.0, capable=False, vote=vote, peers={A: True, B: True})


def leader(*peers: NodeId) -> Leadership:
    """C, leading term 1 with these nodes since 1.0 s."""
    machine = Leadership(C, Timings(), 0.0, peers=dict.fromkeys(peers, True))
    machine.handle(TICK, 0.0)
    machine.handle(TICK, 1.0)
    for node in peers:
        machine.handle(LeaseReply(node, 1, 1, Reason.NONE, 1, C), 1.0)
    machine.handle(TICK, 1.0)
    assert machine.leading(1.0) == 1
    return machine


def test_a_node_alone_leads_at_once() -> None:
    machine = Leadership(A, Timings(), 7.0)
    assert machine.handle(Tick(0.9), 7.0) == [Persist(Vote(1, A)), Serve(1, A), Lead(1, (A,))]
    assert machine.leading(7.0) == 1 and machine.serving(7.0) == (1, A)


def test_a_vote_is_on_disk_before_the_answer_leaves() -> None:
    effects = follower().handle(ask(A, 3), 0.0)
    assert [type(e) for e in effects] == [Persist, Serve, Send]
    assert effects[0] == Persist(Vote(3, A)) and reply(effects).granted


def test_a_node_serves_no_lower_term_and_no_second_leader_of_a_term() -> None:
    machine = follower(Vote(5, A))  # it was restarted
    assert reply(machine.handle(ask(B, 4), 0.0)).reason is Reason.OLD_TERM
    refused = reply(machine.handle(ask(B, 5), 0.0))
    assert (refused.reason, refused.term_seen, refused.holder) == (Reason.TAKEN, 5, None)
    assert reply(machine.handle(ask(A, 5), 0.0)).granted


def test_while_a_lease_runs_others_are_refused_and_its_leader_may_take_a_higher_term() -> None:
    machine = follower()
    machine.handle(ask(A, 2), 0.0)
    refused = reply(machine.handle(ask(B, 9), 4.9))
    assert (refused.reason, refused.term_seen, refused.holder) == (Reason.HELD, 2, A)
    effects = machine.handle(ask(A, 10, 2), 4.9)
    assert [type(e) for e in effects] == [Unserve, Persist, Serve, Send]
    assert machine.serving(9.8) == (10, A) and machine.serving(9.9) is None


def test_a_lease_that_ran_out_ends_and_the_next_leader_is_served() -> None:
    machine = follower()
    machine.handle(ask(A, 2), 0.0)
    assert machine.serving(5.0) is None  # before any tick
    effects = machine.handle(ask(B, 3), 5.0)
    assert effects[:3] == [Unserve(2, A, "the lease ran out"), Persist(Vote(3, B)), Serve(3, B)]


def test_requests_told_twice_or_overtaken_extend_nothing() -> None:
    machine = follower()
    machine.handle(ask(A, 2, 5), 0.0)
    assert machine.handle(ask(A, 2, 5), 3.0) == [] and machine.handle(ask(A, 2, 4), 3.0) == []
    assert machine.serving(5.0) is None


def test_a_node_grants_only_to_one_that_hears_it() -> None:
    machine = follower()
    assert reply(machine.handle(ask(A, 2, hears=False), 0.0)).reason is Reason.UNHEARD
    assert machine.serving(0.0) is None and machine.vote == Vote()
    assert reply(machine.handle(ask(A, 2), 0.0)).granted


def test_a_jump_back_of_the_clock_lengthens_no_lease() -> None:
    machine = follower()
    machine.handle(ask(A, 2), 1000.0)
    machine.handle(TICK, 1004.0)
    machine.handle(TICK, 0.0)
    assert machine.serving(0.9) == (2, A) and machine.serving(1.0) is None


def test_a_term_that_is_damage_is_not_kept() -> None:
    machine = follower()
    assert machine.handle(ask(A, MAX_TERM + 1), 0.0) == [] and machine.vote == Vote()


def test_the_highest_id_campaigns_first_and_leads_those_that_granted() -> None:
    machine = Leadership(C, Timings(), 0.0, peers={A: True, B: True})
    low = Leadership(A, Timings(), 0.0, peers={B: True, C: True})
    first = machine.handle(TICK, 0.0)
    assert first[0] == Persist(Vote(1, C)) and set(requests(first)) == {A, B}
    assert requests(low.handle(TICK, 0.0)) == {} and requests(low.handle(TICK, 0.9)) == {}
    assert requests(low.handle(TICK, 1.0)) != {}  # its rank is 2
    again = machine.handle(LeaseReply(A, 1, 1, Reason.UNHEARD, 0, None), 0.1)
    assert requests(again)[A].hears
    assert machine.handle(LeaseReply(A, 1, 1, Reason.NONE, 1, C), 0.2) == []  # b may still answer
    machine.handle(TICK, 1.0)
    effects = machine.handle(TICK, 1.5)
    assert [e for e in effects if not isinstance(e, Send)] == [Serve(1, C), Lead(1, (C, A))]


def test_a_candidate_that_finds_a_leader_gives_up_and_gives_back() -> None:
    machine = Leadership(C, Timings(), 0.0, peers={A: True, B: True})
    machine.handle(TICK, 0.0)
    machine.handle(LeaseReply(A, 1, 1, Reason.NONE, 1, C), 0.1)
    machine.handle(LeaseReply(B, 1, 1, Reason.HELD, 0, A), 0.1)
    assert machine.handle(TICK, 1.5) == [Send(A, Release(C, 1))]
    assert machine.role is Role.FOLLOWER
    late = machine.handle(LeaseReply(B, 1, 1, Reason.NONE, 1, C), 1.6)
    assert late == [Send(B, Release(C, 1))]  # it came too late: that node is not held either


def test_a_campaign_learns_of_a_higher_term_and_goes_above_it() -> None:
    machine = Leadership(C, Timings(), 0.0, peers={A: False})
    machine.handle(TICK, 0.0)
    effects = machine.handle(LeaseReply(A, 1, 1, Reason.OLD_TERM, 6, None), 0.1)
    assert effects[0] == Persist(Vote(7, C)) and requests(effects)[A].term == 7


def test_a_leader_steps_down_on_the_first_answer_of_a_higher_leader() -> None:
    machine = leader(A, B)
    effects = machine.handle(LeaseReply(A, 1, 1, Reason.OLD_TERM, 2, B), 1.5)
    assert effects == []  # an answer to what was answered before
    machine.handle(TICK, 2.0)
    effects = machine.handle(LeaseReply(A, 1, 2, Reason.OLD_TERM, 2, B), 2.1)
    assert isinstance(effects[0], StepDown) and effects[0].term == 1
    assert {e.to for e in effects if isinstance(e, Send)} == {A, B}  # released
    assert isinstance(effects[-1], Unserve) and machine.leading(2.1) is None


def test_a_leader_that_was_stopped_steps_down_before_anything_else() -> None:
    machine = leader(A)
    assert machine.leading(9.0) is None
    effects = machine.handle(ask(A, 2), 9.0)
    assert [type(e) for e in effects] == [StepDown, Send, Unserve, Persist, Serve, Send]
    assert machine.serving(9.0) == (2, A)


def test_a_leader_goes_on_under_a_new_term_when_a_node_has_served_a_higher_one() -> None:
    machine = leader(A, B)
    machine.handle(TICK, 2.0)
    effects = machine.handle(LeaseReply(A, 1, 2, Reason.OLD_TERM, 4, None), 2.1)
    assert Dropped(A, "it refuses: old_term") in effects and Lead(5, (C,)) in effects
    assert not any(isinstance(e, StepDown) for e in effects)
    assert effects.index(Persist(Vote(5, C))) < effects.index(Lead(5, (C,)))
    assert requests(effects)[B].term == 5
    assert Gained(B) in machine.handle(LeaseReply(B, 5, requests(effects)[B].number, Reason.NONE, 5, C), 2.2)


def test_a_leader_drops_nodes_it_does_not_hear_and_leads_on() -> None:
    machine = leader(A, B)
    dropped: list[Effect] = []
    for second in range(2, 8):
        effects = machine.handle(TICK, float(second))
        number = requests(effects)[A].number
        dropped += [e for e in effects if isinstance(e, Dropped)]
        machine.handle(LeaseReply(A, 1, number, Reason.NONE, 1, C), float(second))
    assert dropped == [Dropped(B, "its lease ran out")]
    assert machine.nodes() == (C, A) and machine.leading(7.0) == 1


def test_of_two_leaders_the_higher_wins_and_only_if_it_hears_the_other() -> None:
    machine = leader(A)
    assert reply(machine.handle(ask(B, 2, hears=False), 2.0)).reason is Reason.HELD
    assert reply(machine.handle(ask(B, 2, leading=False), 2.0)).reason is Reason.HELD  # a candidate only
    assert reply(machine.handle(ask(B, 1), 2.0)).reason is Reason.HELD  # same term, lower id
    effects = machine.handle(ask(B, 2), 2.0)
    assert isinstance(effects[0], StepDown) and reply(effects).granted


def test_a_released_node_is_free_at_once_and_an_old_release_is_nothing() -> None:
    machine = follower()
    machine.handle(ask(A, 3), 0.0)
    assert machine.handle(Release(A, 2), 0.1) == [] and machine.handle(Release(B, 3), 0.1) == []
    assert machine.handle(Release(A, 3), 0.1) == [Unserve(3, A, "its leader released it")]


def test_a_broken_stream_to_the_leader_shortens_the_wait() -> None:
    machine = Leadership(C, Timings(), 0.0, peers={A: True, B: False})
    machine.handle(ask(A, 1), 0.0)
    machine.handle(PeerCut(A), 0.5)
    assert machine.handle(TICK, 1.9) == []
    effects = machine.handle(TICK, 2.0)
    assert isinstance(effects[0], Unserve) and requests(effects)[B].term == 2
    granted = machine.handle(LeaseReply(B, 2, requests(effects)[B].number, Reason.NONE, 2, C), 2.1)
    assert granted == [Serve(2, C), Lead(2, (C, B))]  # the dead one is not waited for


def test_a_leader_asks_at_once_when_a_stream_that_broke_is_back() -> None:
    machine = leader(A, B)  # it has asked at 1.0 s
    machine.handle(PeerCut(A), 1.1)
    assert requests(machine.handle(TICK, 1.2)) == {}
    machine.handle(PeerKnown(B, True), 1.3)  # its stream did not break: it is only told again
    assert requests(machine.handle(TICK, 1.3)) == {}
    machine.handle(PeerKnown(A, True), 1.4)
    assert A in requests(machine.handle(TICK, 1.5))


def test_a_removed_node_is_not_asked_not_obeyed_and_takes_no_part() -> None:
    machine = leader(A, B)
    effects = machine.handle(PeerRemoved(A), 1.5)
    assert effects == [Send(A, Release(C, 1)), Dropped(A, "its owner removed it")]
    assert set(requests(machine.handle(TICK, 2.0))) == {B}
    told = reply(machine.handle(ask(A, 9), 2.0))
    assert told.reason is Reason.REMOVED and machine.leading(2.0) == 1
    out = Leadership(A, Timings(), 0.0, peers={C: True})
    out.handle(TICK, 0.0)
    assert requests(out.handle(TICK, 0.5)) != {}
    out.handle(LeaseReply(C, 1, 1, Reason.REMOVED, 1, C), 0.6)
    assert out.removed and out.handle(TICK, 60.0) == [] and out.leading(60.0) is None


def test_a_forgotten_node_is_not_waited_for_and_may_come_back() -> None:
    machine = leader(A, B)
    assert machine.handle(PeerForgotten(A), 1.5) == [Send(A, Release(C, 1)), Dropped(A, "it was forgotten")]
    assert set(requests(machine.handle(TICK, 2.0))) == {B}
    machine.handle(PeerKnown(A, True), 2.5)
    assert set(requests(machine.handle(TICK, 3.0))) == {A, B}


def test_a_leader_that_resigns_leaves_it_to_another() -> None:
    machine = leader(A)
    assert isinstance(machine.handle(Resign(), 2.0)[0], StepDown)
    assert machine.handle(TICK, 11.9) == [] and requests(machine.handle(TICK, 12.0)) != {}


def test_peers_come_to_be_known_and_are_bounded() -> None:
    machine = leader()
    for index in range(1100):
        machine.handle(PeerKnown(NodeId(f"p{index:04}"), False), 1.0)
    machine.handle(PeerKnown(C, True), 1.0)  # itself
    asked = requests(machine.handle(TICK, 2.0))
    assert len(asked) == 1024 and C not in asked
