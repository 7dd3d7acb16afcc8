"""The kept state: the higher version wins, what is out stays out, and damage is seen."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.cluster import state as module
from dwarfstar_engine.cluster.state import ClusterState, Version, decode, encode, merge
from dwarfstar_engine.errors import ClusterError

names = st.text(max_size=8)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), names)
states = st.builds(
    ClusterState,
    version=st.builds(Version, st.integers(0, 3), st.integers(0, 3), st.sampled_from("ab")),
    model=names,
    overrides=st.dictionaries(names, st.dictionaries(names, scalars, max_size=2), max_size=2),
    wishes=st.dictionaries(names, scalars, max_size=3),
    keys=st.dictionaries(names, names, max_size=3),
    removed=st.frozensets(names, max_size=3),
    revoked=st.frozensets(names, max_size=3),
)


@given(states)
def test_what_is_written_is_read(state: ClusterState) -> None:
    assert decode(encode(state)) == state


@given(states, st.data())
def test_no_damaged_byte_goes_unseen(state: ClusterState, data: st.DataObject) -> None:
    whole = encode(state)
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != whole[at]))
    damaged = whole[:at] + bytes([byte]) + whole[at + 1 :]
    try:
        assert decode(damaged) == state  # as an escape written otherwise
    except ClusterError as error:
        assert error.code == "state_damaged"


@given(states, st.integers(0, 10_000))
def test_a_truncated_state_is_refused(state: ClusterState, length: int) -> None:
    whole = encode(state)
    with pytest.raises(ClusterError, match="take it from another node"):
        decode(whole[: length % len(whole)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b"1" * 5000,
        b'{"format":1,"sha256":"","state":{}}',
        b'{"format":2,"sha256":"","state":{}}',
        b'{"format":1,"sha256":"","state":NaN}',
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ClusterError):
        decode(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", [1, 2]),
        ("version", [True, 2, "a"]),
        ("version", [-1, 2, "a"]),
        ("model", 7),
        ("overrides", {"a": 1}),
        ("overrides", {"a": {"b": []}}),
        ("keys", {"a": None}),
        ("removed", ["a", 1]),
        ("removed", "abc"),
        ("revoked", ["k"] * (module.MAX_REVOKED + 1)),
        ("more", 1),
    ],
)
def test_a_wrong_field_is_refused_although_its_checksum_is_right(name: str, value: object) -> None:
    body = json.loads(encode(ClusterState()))["state"] | {name: value}
    data = json.dumps({"format": 1, "sha256": module._digest(body), "state": body}).encode()
    with pytest.raises(ClusterError) as caught:
        decode(data)
    assert caught.value.code == "state_damaged" and "checksum" not in caught.value.message


@given(states, states)
def test_of_two_states_the_higher_version_wins_and_what_is_out_stays_out(a: ClusterState, b: ClusterState) -> None:
    both = merge(a, b)
    winner = b if b.version > a.version else a
    assert (both.version, both.model, both.wishes) == (winner.version, winner.model, winner.wishes)
    assert both.removed == a.removed | b.removed and both.revoked == a.revoked | b.revoked
    assert merge(both, a) is both and merge(both, b) is both  # nothing new: nothing to pass on


def test_a_change_takes_the_next_version_and_is_bounded() -> None:
    one = ClusterState().changed(3, "a", model="small")
    assert one.version == Version(3, 1, "a")
    two = one.changed(3, "a", keys={"k": "hash", "l": "hash"}, overrides={"n": {"effective_vram": 4.0}})
    assert two.version == Version(3, 2, "a") and two.model == "small"
    three = two.changed(4, "b", revoked={"k"}, removed={"n"})
    assert (three.version, dict(three.keys), dict(three.overrides)) == (Version(4, 1, "b"), {"l": "hash"}, {})
    assert three.changed(4, "b", revoked={"x"}).revoked == {"k", "x"}
    assert three.changed(2, "c").version == Version(4, 2, "c")  # it came from a term above
    for fields in ({"model": "m" * module.MAX_BYTES}, {"keys": {str(i): "" for i in range(module.MAX_ENTRIES + 1)}}):
        with pytest.raises(ClusterError, match="too large") as caught:
            three.changed(4, "b", **fields)
        assert caught.value.code == "state_too_large"
