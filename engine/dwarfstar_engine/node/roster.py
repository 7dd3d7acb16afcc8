"""Which machines were let in, and which of them were removed since.

Theory. ``roster.json`` in the coordinator's trust folder has an entry for each machine that joined with a token: its
id, its name, until when its newest certificate is good, and since when it is removed. A removed node keeps its
certificate, so its id must be remembered for as long as that is good. The engine looks whether the file has changed at
every call of a node, so what the command line writes counts at once; both change it under one lock. The decisions are
pure: the roster and the time in, a roster or a refusal out.

An id that the roster does not know is no stranger's: it stands in a certificate that the CA signed. So a lost file lets
removed nodes in again, and nobody else.

Bounds. MAX_KNOWN entries. When there are more, those go whose certificate has ended; they could not come back with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from dwarfstar_engine.cluster.membership import REMOVAL as REFUSAL
from dwarfstar_engine.cluster.membership import REMOVED
from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.wire.private_files import locked, read_private, replace_file
from dwarfstar_engine.wire.trust import KEY_ID

__all__ = ["REFUSAL", "REMOVED", "Known", "Roster", "RosterStore", "find", "let_in", "remove"]

MAX_KNOWN = 4096  # four times the nodes of a cluster: also those that come and go
MAX_FILE_BYTES = 4 << 20  # MAX_KNOWN entries of up to 500 bytes, twice
LOCK_WAIT_S = 5.0  # the file is held for a few milliseconds at a time
FILE = "roster.json"


class Known(BaseModel):
    """One machine. ends: of its newest certificate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(max_length=64)
    name: str = Field(max_length=64)
    ends: AwareDatetime
    removed: AwareDatetime | None = None


class Roster(BaseModel):
    """All machines that are known, oldest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    nodes: tuple[Known, ...] = Field(default=(), max_length=MAX_KNOWN)

    def get(self, node_id: str) -> Known | None:
        return next((node for node in self.nodes if node.id == node_id), None)


def let_in(roster: Roster, node: Known, now: datetime) -> Roster:
    """The roster with ``node`` as a member, whatever it was before. Raises TrustError if there is no room."""
    kept = [known for known in roster.nodes if known.id != node.id]
    if len(kept) >= MAX_KNOWN:
        kept = [known for known in kept if known.ends > now]
    if len(kept) >= MAX_KNOWN:
        raise TrustError(
            f"{MAX_KNOWN} machines are known to this cluster, which is the most: no further one can join until a "
            "certificate of one ends.",
            code="too_many_nodes",
        )
    return Roster(nodes=(*kept, node))


def find(roster: Roster, attached: Iterable[tuple[str, str]], wanted: str) -> tuple[str, str]:
    """(id, name) of the one node called ``wanted``, by id or by name. ``attached``: (id, name) of those that are here,
    who may be unknown to the roster or have another name now. Raises TrustError: none, several, or not removable.
    """
    names = {known.id: known.name for known in roster.nodes if known.removed is None} | dict(attached)
    found = [wanted] if wanted in names else [node_id for node_id, name in names.items() if name == wanted]
    if not found and (gone := next((k for k in roster.nodes if wanted in (k.id, k.name)), None)) is not None:
        return gone.id, gone.name  # removed already: asked again it is no error
    if not found:
        raise TrustError(
            f"No node is called {wanted[:64]!r}: `dwarfstar status` shows those that are here.", code="no_such_node"
        )
    if len(found) > 1:
        raise TrustError(
            f"{len(found)} nodes are called {wanted[:64]!r}: give the id instead, one of {', '.join(found[:8])}.",
            code="ambiguous_node",
        )
    if not found[0].startswith(KEY_ID):
        raise TrustError(
            f"{names[found[0]]} runs on the coordinator's own machine: start the engine without it instead.",
            code="own_node",
        )
    return found[0], names[found[0]]


def remove(roster: Roster, node_id: str, name: str, ends: datetime, now: datetime) -> Roster:
    """The roster in which a node is removed. ends: until when it may hold a certificate, if it is not known yet."""
    known = roster.get(node_id) or Known(id=node_id, name=name, ends=ends)
    return let_in(roster, known.model_copy(update={"removed": known.removed or now}), now)


@dataclass(slots=True)
class RosterStore:
    """The roster in a trust folder. clock: the time, in UTC."""

    folder: Path
    clock: Callable[[], datetime]
    _stamp: tuple[int, int] = field(default=(-1, -1), init=False)
    _held: Roster = field(default_factory=Roster, init=False)

    def stamp(self) -> tuple[int, int] | None:
        """What changes with the file: its time of change (ns) and inode; None: there is none. Raises TrustError."""
        path = self.folder / FILE
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrustError(f"{path} cannot be read ({error.strerror}): check its folder.") from None
        return found.st_mtime_ns, found.st_ino

    def read(self) -> Roster:
        """As the file has it now. Raises TrustError if it is damaged."""
        path, stamp = self.folder / FILE, self.stamp()
        if stamp is None:
            return Roster()
        if stamp != self._stamp:
            try:
                self._held = Roster.model_validate_json(read_private(path, MAX_FILE_BYTES))
            except ValidationError:
                raise TrustError(
                    f"{path} is damaged, and with it the list of removed nodes: restore it, or remove it and then "
                    "remove those nodes again."
                ) from None
            self._stamp = stamp
        return self._held

    def removed(self, node_id: str) -> datetime | None:
        """Since when this node is removed; None: it is not. Raises TrustError if that cannot be known."""
        known = self.read().get(node_id)
        return known.removed if known is not None else None

    def change(self, change: Callable[[Roster], Roster]) -> Roster:
        """Apply a decision under the lock. Blocks for as long as files take. Raises TrustError."""
        with locked(self.folder / "roster.lock", LOCK_WAIT_S):
            before = self.read()
            after = change(before)
            if after != before:
                replace_file(self.folder / FILE, after.model_dump_json(indent=1).encode())
        return after
