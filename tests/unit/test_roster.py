"""Who is let in, who is removed, and what brings them back."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.node import roster
from dwarfstar_engine.node.admission import Admission
from dwarfstar_engine.node.roster import Known, Roster, RosterStore
from dwarfstar_engine.wire import trust
from dwarfstar_engine.wire.trust import Authority, NodeFiles

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
END = NOW + timedelta(days=365)


class Clock:
    now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
def authority() -> Authority:
    return trust.create_authority(NOW)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(authority: Authority, tmp_path: Path, clock: Clock) -> Admission:
    return Admission(authority, tmp_path / "trust", clock)


def known(node_id: str, name: str = "x", ends: datetime = END) -> Known:
    return Known(id=node_id, name=name, ends=ends)


def test_a_node_is_found_by_id_or_name() -> None:
    held = Roster(nodes=(known("k-a", "attic"), known("k-b", "laptop")))
    assert roster.find(held, (), "k-a") == roster.find(held, (), "attic") == ("k-a", "attic")
    assert roster.find(held, [("k-b", "renamed")], "renamed") == ("k-b", "renamed")
    assert roster.find(held, [("k-c", "new")], "new") == ("k-c", "new")
    for wanted, here, code in (
        ("nobody", [], "no_such_node"),
        ("attic", [("k-c", "attic")], "ambiguous_node"),
        ("node1", [("local-1", "node1")], "own_node"),
        ("coordinator", [], "no_such_node"),
    ):
        with pytest.raises(TrustError) as refused:
            roster.find(held, here, wanted)
        assert refused.value.code == code


def test_an_id_goes_before_a_name() -> None:
    held = Roster(nodes=(known("k-a", "k-b"), known("k-b", "k-a")))
    assert roster.find(held, (), "k-a") == ("k-a", "k-b")


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=20))
def test_the_last_word_counts_and_nobody_stands_there_twice(steps: list[tuple[str, bool]]) -> None:
    held, removed = Roster(), dict[str, bool]()
    for letter, out in steps:
        node_id = f"k-{letter}"
        held = roster.remove(held, node_id, "x", END, NOW) if out else roster.let_in(held, known(node_id), NOW)
        removed[node_id] = out
    assert {node.id: node.removed is not None for node in held.nodes} == removed
    assert len(held.nodes) == len(removed)


def test_the_roster_is_bounded_and_forgets_only_what_has_ended() -> None:
    soon = NOW + timedelta(hours=1)
    held = Roster(nodes=tuple(known(f"k-{n}", ends=soon if n else END) for n in range(roster.MAX_KNOWN)))
    held = roster.remove(held, "k-0", "x", END, NOW)
    with pytest.raises(TrustError, match="the most"):
        roster.let_in(held, known("k-new"), NOW)
    later = roster.let_in(held, known("k-new"), soon)
    assert [node.id for node in later.nodes] == ["k-0", "k-new"] and later.nodes[0].removed == NOW


def test_a_removed_node_is_refused_until_it_joins_with_a_later_token(
    admission: Admission, authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    files = NodeFiles(tmp_path / "node")
    node_id = files.key_id()
    old = admission.tokens.issue(authority)
    admission.join(old.secret, node_id, "attic")
    assert admission.refusal(node_id) is None
    clock.now += timedelta(hours=1)
    assert admission.remove("attic") == (node_id, "attic") == admission.remove("attic"), "twice is no error"
    assert "removed from the cluster" in str(admission.refusal(node_id))
    with pytest.raises(TrustError) as refused:
        admission.join(old.secret, node_id, "attic")
    assert refused.value.code == "token_removed"
    with pytest.raises(TrustError) as refused:
        admission.renew(node_id, files.request(node_id))
    assert refused.value.code == roster.REMOVED
    clock.now += timedelta(minutes=1)
    admission.join(admission.tokens.issue(authority).secret, node_id, "attic")
    assert admission.refusal(node_id) is None
    assert trust.certificate_node_id(admission.renew(node_id, files.request(node_id))) == node_id


def test_a_removal_by_another_process_counts_at_once_and_outlives_the_engine(
    admission: Admission, authority: Authority, tmp_path: Path, clock: Clock
) -> None:
    admission.join(admission.tokens.issue(authority).secret, "k-a", "attic")
    assert admission.refusal("k-a") is None
    Admission(authority, tmp_path / "trust", clock).remove("k-a")
    assert admission.refusal("k-a") is not None
    assert Admission(authority, tmp_path / "trust", clock).refusal("k-a") is not None
    assert stat.S_IMODE((tmp_path / "trust" / roster.FILE).stat().st_mode) == 0o600


def test_a_renewal_keeps_the_entry_for_as_long_as_the_certificate(
    admission: Admission, authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    files = NodeFiles(tmp_path / "node")
    node_id = files.key_id()
    admission.join(admission.tokens.issue(authority).secret, node_id, "attic")
    clock.now += timedelta(days=240)
    ends = trust.load_certificate(admission.renew(node_id, files.request(node_id))).not_valid_after_utc
    entry = admission.roster.read().get(node_id)
    assert entry is not None and entry.ends == ends and entry.name == "attic"


def test_a_damaged_roster_lets_in_nobody_from_outside(
    admission: Admission, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trust" / roster.FILE
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    path.write_bytes(b"{")
    for _ in range(3):
        assert "its log says why" in str(admission.refusal("k-a")) and admission.refusal("local-1") is None
    assert caplog.text.count(str(path)) == 1
    with pytest.raises(TrustError, match="damaged"):
        RosterStore(path.parent, lambda: NOW).read()
