"""What leadership keeps on disk, and says on the wire."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.api.keybook import KeyBook, Known, Unknown, add, format_key, judge
from dwarfstar_engine.cli import shared
from dwarfstar_engine.cli.front import StateKeys, keys_of
from dwarfstar_engine.cluster import lease
from dwarfstar_engine.cluster.ids import NodeId
from dwarfstar_engine.cluster.state import ClusterState, decode, encode
from dwarfstar_engine.errors import ClusterError, TrustError
from dwarfstar_engine.node import kept_plan
from dwarfstar_engine.node.admission import Deputy
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.gossip import Peer
from dwarfstar_engine.node.kept import Kept
from dwarfstar_engine.node.lease_wire import message_from, message_to
from dwarfstar_engine.node.links import seen
from dwarfstar_engine.node.source import open_source
from dwarfstar_engine.node.vocab import ToyVocab
from dwarfstar_engine.plan import shares
from dwarfstar_engine.plan.forecast import Objective, Strategy
from dwarfstar_engine.plan.owned import OwnedPlan, to_text
from dwarfstar_engine.plan.proportional import Plan, StagePlan
from dwarfstar_engine.plan.shares import Wanted
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.trust import NodeFiles, utc_now

ids = st.builds(NodeId, st.text("abc-", min_size=1, max_size=8))
numbers = st.integers(0, lease.MAX_TERM)
MESSAGES = st.one_of(
    st.builds(
        lease.LeaseRequest, ids, numbers, numbers, st.booleans(), st.booleans(), st.floats(0.001, lease.MAX_LEASE_S)
    ),
    st.builds(lease.LeaseReply, ids, numbers, numbers, st.sampled_from(list(lease.Reason)), numbers, st.none() | ids),
    st.builds(lease.Release, ids, numbers),
)


@given(MESSAGES)
def test_leases_come_over_the_wire_as_they_were(message: lease.Message) -> None:
    sender = message.node if isinstance(message, lease.LeaseReply) else message.leader
    sent = pb.LeadMessage.FromString(message_to(message).SerializeToString())
    assert message_from(sender, sent) == message


@pytest.mark.parametrize(
    "message",
    [
        pb.LeadMessage(),
        pb.LeadMessage(state=b"x"),
        pb.LeadMessage(reply=pb.LeaseReply(reason="of a newer release")),
        pb.LeadMessage(request=pb.LeaseRequest(lease_s=float("nan"))),
        pb.LeadMessage(request=pb.LeaseRequest(lease_s=float("inf"))),
        pb.LeadMessage(request=pb.LeaseRequest(lease_s=-1.0)),
    ],
)
def test_what_is_no_sound_lease_is_none(message: pb.LeadMessage) -> None:
    assert message_from(NodeId("a"), message) is None


def test_votes_are_kept_and_a_damaged_one_ends_the_node(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "lead")
    assert kept.vote() == lease.Vote()
    for vote in (lease.Vote(7, NodeId("k-a")), lease.Vote(8, None)):
        kept.keep_vote(vote)
        assert Kept(tmp_path / "lead").vote() == vote
    path = tmp_path / "lead" / "vote.json"
    if os.name == "posix":
        assert path.stat().st_mode & 0o077 == 0
    for damage in (
        b"",
        b"{}",
        b'{"term": -1, "leader": null}',
        b'{"term": 1, "leader": 5}',
        b'{"term": true, "leader": ""}',
    ):
        path.write_bytes(damage)
        with pytest.raises(ClusterError, match="stop all nodes") as error:
            kept.vote()
        assert error.value.code == "vote_damaged"


def test_the_state_and_peers_are_kept_and_damage_costs_only_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(tmp_path / "lead")
    state = ClusterState().changed(3, "a", model="toy:8", removed={"k-x"})
    kept.keep_state(state)
    kept.keep_peers((Peer(id="b", name="b", hosts=("127.0.0.1",), control_port=9),))
    assert kept.state() == state and [peer.id for peer in kept.peers()] == ["b"]
    (tmp_path / "lead" / "state.json").write_bytes(b"{}")
    assert kept.state() == ClusterState() and "cannot be used" in caplog.text


def test_a_plan_is_kept_as_nodes_and_cuts() -> None:
    plan = Plan((StagePlan("b", (0, 3), 1, 1), StagePlan("a", (3, 8), 1, 1)))
    text = kept_plan.to_text(plan)
    assert kept_plan.from_text(text, {"a"}, 5.0) == kept_plan.KeptPlan(("b", "a"), (3,), frozenset({"b"}), 5.0)
    assert kept_plan.to_text(None) == ""
    for bad in ("", None, 5, "[]", "[1]", "{}", '[["a"]]', '[["a", "x"]]', "[" * 100_000):
        assert kept_plan.from_text(bad, (), 0.0) is None


def test_a_loopback_address_is_the_machine_that_told_of_it() -> None:
    told = pb.Peer(id="a", name="a", hosts=["127.0.0.1", "10.0.0.7"], control_port=9)
    found = seen(told, "10.0.0.5")
    assert found is not None and found.hosts == ("10.0.0.5", "10.0.0.7")
    assert seen(pb.Peer(id="a", control_port=0), "10.0.0.5") is None


def test_what_an_engine_shares_makes_the_same_settings_elsewhere(tmp_path: Path) -> None:
    engine = Settings(home=tmp_path, context=64, slots=2, kv="q8_0", cuts=(3,), wait_nodes=5, host="0.0.0.0")
    source = open_source("toy:8", tmp_path)
    state = ClusterState().changed(1, "a", model=source.name, wishes=shared.wishes_of(engine, source))
    theirs = Settings(home=tmp_path / "b", port=9999)
    led = shared.settings_of(theirs, state)
    assert (led.context, led.slots, led.kv, led.cuts, led.wait_nodes) == (64, 2, "q8_0", (3,), 1)
    assert (led.home, led.port, led.host) == (theirs.home, 9999, theirs.host)
    with pytest.raises(ClusterError, match="same one on all machines"):
        shared.settings_of(theirs, state.changed(1, "a", wishes={**state.wishes, "slots": -1}))


def test_what_an_owner_has_decided_goes_to_another_leader(tmp_path: Path) -> None:
    settings, source = Settings(home=tmp_path), open_source("toy:8", tmp_path)

    def leader() -> Coordinator:
        return Coordinator(settings, source, ToyVocab(), NodeFiles(tmp_path), "c")

    owned = OwnedPlan(source.fingerprint, (("a", 3), ("b", 8)), Strategy.FASTEST, Objective.SINGLE)
    first = leader()
    first.steering.restore(to_text(owned), {"b": "50%"})
    taken = Wanted(3, copies=True)
    first.restore(shares.to_text(taken, first.dealer.wanted, source.fingerprint))
    wishes = shared.wishes_of(settings, source)
    kept = ClusterState().changed(
        1, "a", wishes=shared.with_plan(wishes, {}, first), overrides=shared.with_lent({"x": {"removed": True}}, first)
    )
    assert kept.overrides == {"x": {"removed": True}, "b": {"effective_vram": "50%"}}
    second = shared.restore(leader(), decode(encode(kept)))
    assert second.steering.owner_text == first.steering.owner_text and second.steering.lent == {"b": "50%"}
    assert second.dealer.wanted == taken and len(second.pipelines) == 3 and second.dealer.text == first.dealer.text
    second.steering.restore("", {})
    assert shared.with_lent(kept.overrides, second) == {"x": {"removed": True}}
    assert shared.with_plan(wishes, kept.wishes, second)["owner_plan"] == ""


def test_keys_travel_as_hashes_and_count_where_they_arrive() -> None:
    now, key = utc_now(), format_key(bytes(32))
    book = add(KeyBook(), "laptop", key, now, None)
    state = ClusterState().changed(1, "a", keys=keys_of(book))
    assert key not in repr(state)
    keys = StateKeys(lambda: state)
    assert isinstance(judge(keys(), key, now), Known)
    state = state.changed(1, "a", keys={}, revoked=set(state.keys))
    assert isinstance(judge(keys(), key, now), Unknown)
    state = ClusterState(keys={"x": "no record"})
    assert keys() == KeyBook(), "what cannot be read lets nobody in"


def test_a_deputy_signs_nothing_and_says_who_can() -> None:
    deputy = Deputy(b"", {"k-x"}.__contains__)
    for order in (lambda: deputy.renew("k-a", b""), lambda: deputy.remove("k-a")):
        with pytest.raises(TrustError, match="holds the cluster's CA: start the engine there again"):
            order()
    assert deputy.refusal("k-a") is None and "removed" in str(deputy.refusal("k-x"))
