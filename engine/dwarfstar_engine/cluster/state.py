"""The small state that every node keeps, so that any coordinator-capable one can go on: pure, bounded, checksummed.

Only a leader changes it; a version is (term, number, author), and of two states the higher version wins as a whole. Two
partitions may lead the same term, hence the author. Two sets only grow, and are united in every merge, because losing
an entry would let somebody in again: nodes removed, and keys revoked.

On disk and between nodes it is JSON: ``{"format", "sha256", "state"}``, the digest over the compact encoding of
``state`` with sorted keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dwarfstar_engine.cluster.membership import MAX_FENCED
from dwarfstar_engine.errors import ClusterError

FORMAT = 1
MAX_BYTES = 1 << 20  # it goes to every node at each change, in one control message
MAX_ENTRIES = 4096  # of each mapping: more than nodes or keys a cluster has
MAX_REVOKED = MAX_FENCED

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Compared in this order. number: counts changes within a term. author: id of the leader that made it."""

    term: int = 0
    number: int = 0
    author: str = ""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Change it with ``changed`` only; the mappings are never changed in place.

    model: name of the one to serve, empty if none was chosen. overrides: for each node id what its owner set (effective
    VRAM and so on). wishes: for the plan (strategy, cuts, standby). keys: key id to an opaque record that holds a hash,
    never the key. removed: node ids. revoked: key ids.
    """

    version: Version = Version()
    model: str = ""
    overrides: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    wishes: Mapping[str, Scalar] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    revoked: frozenset[str] = frozenset()

    def changed(self, term: int, author: str, **fields: Any) -> ClusterState:
        """The next version, made by the leader of ``term``. ``removed`` and ``revoked`` given here are added. It goes
        above what it changes also where that came from a higher term, whose leader is gone.

        Raises ClusterError if it gets too large: a state that cannot be sent must not come to be.
        """
        term = max(term, self.version.term)
        number = self.version.number + 1 if term == self.version.term else 1
        for name in ("removed", "revoked"):
            fields[name] = frozenset(fields.get(name, ())) | getattr(self, name)
        state = _settled(replace(self, version=Version(term, number, author), **fields))
        encode(state)
        return state


def _settled(state: ClusterState) -> ClusterState:
    """Without the records of what is removed or revoked."""
    if not state.revoked.isdisjoint(state.keys):
        state = replace(state, keys={key: record for key, record in state.keys.items() if key not in state.revoked})
    if not state.removed.isdisjoint(state.overrides):
        left = {node: values for node, values in state.overrides.items() if node not in state.removed}
        state = replace(state, overrides=left)
    return state


def merge(ours: ClusterState, theirs: ClusterState) -> ClusterState:
    """The higher version, with what either has removed or revoked. ``ours`` itself if it says all that already; so
    ``merge(a, b) is not a`` means: keep it and pass it on. Raises ClusterError if the sets grow beyond their bounds."""
    removed, revoked = ours.removed | theirs.removed, ours.revoked | theirs.revoked
    newest = theirs if theirs.version > ours.version else ours
    if newest.removed == removed and newest.revoked == revoked:
        return newest
    _check(len(removed) <= MAX_FENCED and len(revoked) <= MAX_REVOKED, "too many nodes or keys have been removed")
    return _settled(replace(newest, removed=removed, revoked=revoked))


def encode(state: ClusterState) -> bytes:
    """JSON bytes. Raises ClusterError if it is larger than MAX_BYTES or its parts are larger than theirs."""
    for name, entries in (("overrides", state.overrides), ("wishes", state.wishes), ("keys", state.keys)):
        _check(
            len(entries) <= MAX_ENTRIES, f"it has {len(entries)} {name}, and {MAX_ENTRIES} is the most", damaged=False
        )
    body = {
        "version": [state.version.term, state.version.number, state.version.author],
        "model": state.model,
        "overrides": {node: dict(values) for node, values in state.overrides.items()},
        "wishes": dict(state.wishes),
        "keys": dict(state.keys),
        "removed": sorted(state.removed),
        "revoked": sorted(state.revoked),
    }
    _read(body)
    try:
        data = _compact({"format": FORMAT, "sha256": _digest(body), "state": body})
    except ValueError:
        raise ClusterError("the cluster's state has a number that is none: set that override again") from None
    _check(len(data) <= MAX_BYTES, f"it has {len(data)} bytes, and {MAX_BYTES} is the most", damaged=False)
    return data


def decode(data: bytes) -> ClusterState:
    """The state in these bytes. Raises ClusterError, code ``state_damaged``, for what ``encode`` did not make."""
    _check(len(data) <= MAX_BYTES, f"it has {len(data)} bytes, and {MAX_BYTES} is the most")
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        raise _damaged("it is no JSON") from None
    _check(
        isinstance(whole, dict) and set(whole) == {"format", "sha256", "state"}, "its parts are not the ones expected"
    )
    _check(whole["format"] == FORMAT, f"its format is {whole['format']!r}, and this version reads {FORMAT}")
    body = whole["state"]
    try:
        digest = _digest(body)
    except (ValueError, RecursionError):
        raise _damaged("it has a number that is none, or is nested too deep") from None
    _check(whole["sha256"] == digest, "its checksum is wrong")
    return _read(body)


def _compact(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _digest(body: object) -> str:
    return hashlib.sha256(_compact(body)).hexdigest()


def _read(body: Any) -> ClusterState:
    """Check types and bounds, field by field: the checksum says only that the bytes are as they were written."""
    names = {"version", "model", "overrides", "wishes", "keys", "removed", "revoked"}
    _check(isinstance(body, dict) and set(body) == names, "its fields are not the ones expected")
    version = body["version"]
    _check(
        isinstance(version, list)
        and [type(part) for part in version] == [int, int, str]
        and version[0] >= 0
        and version[1] >= 0,
        "its version is no (term, number, author)",
    )
    _check(isinstance(body["model"], str), "its model is no name")
    for name in ("overrides", "wishes", "keys"):
        _check(
            isinstance(body[name], dict) and len(body[name]) <= MAX_ENTRIES, f"its {name} are no mapping, or too many"
        )
    for values in body["overrides"].values():
        _check(
            isinstance(values, dict) and all(_is_scalar(v) for v in values.values()), "an override is no plain value"
        )
    _check(all(_is_scalar(value) for value in body["wishes"].values()), "a wish is no plain value")
    _check(all(isinstance(record, str) for record in body["keys"].values()), "a key's record is no text")
    for name, most in (("removed", MAX_FENCED), ("revoked", MAX_REVOKED)):
        ids = body[name]
        _check(isinstance(ids, list) and all(isinstance(i, str) for i in ids), f"its {name} ids are no list of texts")
        _check(len(ids) <= most, f"it has {len(ids)} {name} ids, and {most} is the most")
    return ClusterState(
        version=Version(*version),
        model=body["model"],
        overrides=body["overrides"],
        wishes=body["wishes"],
        keys=body["keys"],
        removed=frozenset(body["removed"]),
        revoked=frozenset(body["revoked"]),
    )


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _check(good: bool, problem: str, *, damaged: bool = True) -> None:
    if not good:
        raise _damaged(problem) if damaged else _too_large(problem)


def _damaged(problem: str) -> ClusterError:
    return ClusterError(
        f"the cluster's state cannot be used: {problem}; take it from another node, or delete it to begin anew",
        code="state_damaged",
    )


def _too_large(problem: str) -> ClusterError:
    return ClusterError(
        f"the cluster's state is too large: {problem}; remove overrides or keys", code="state_too_large"
    )
