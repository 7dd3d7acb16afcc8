"""What the holder of the CA decides: who joins, whose certificate is renewed, who is removed.

It ties the join tokens, the roster and the CA together; each of them decides by itself and is pure (``node.tokens``,
``node.roster``, ``wire.trust``). All methods but ``refusal`` read and write files: call them in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.node import roster
from dwarfstar_engine.node.roster import Known, RosterStore
from dwarfstar_engine.node.tokens import TokenStore
from dwarfstar_engine.wire.trust import KEY_ID, NODE_LIFETIME, Authority, sign_request

log = logging.getLogger("dwarfstar.admission")

MAX_NAME = 64  # characters of a node's name, as in the settings


class Gatekeeper(Protocol):
    """What a control service asks of who decides: the CA's holder, or a node that leads in its place."""

    @property
    def ca_pem(self) -> bytes: ...
    def renew(self, node_id: str, csr_pem: bytes) -> bytes: ...
    def remove(self, wanted: str, attached: Iterable[tuple[str, str]] = ()) -> tuple[str, str]: ...
    def refusal(self, node_id: str) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Deputy:
    """Of a node that leads without the CA's key: it keeps removed nodes out and signs nothing. removed: whether the
    cluster's state has this id among them."""

    ca_pem: bytes
    removed: Callable[[str], bool]

    def renew(self, node_id: str, csr_pem: bytes) -> bytes:
        raise TrustError(AWAY)

    def remove(self, wanted: str, attached: Iterable[tuple[str, str]] = ()) -> tuple[str, str]:
        raise TrustError(AWAY)

    def refusal(self, node_id: str) -> str | None:
        return roster.REFUSAL if self.removed(node_id) else None


AWAY = (
    "Another node leads in the place of the machine that holds the cluster's CA: start the engine there again to let "
    "machines join, renew their certificates or remove them."
)


@dataclass(slots=True)
class Admission:
    """Of one cluster. folder: the CA's. clock: the time, in UTC. lifetime: of the certificates that are signed."""

    authority: Authority
    folder: Path
    clock: Callable[[], datetime]
    lifetime: timedelta = NODE_LIFETIME
    tokens: TokenStore = field(init=False)
    roster: RosterStore = field(init=False)
    _trouble: str = field(default="", init=False)  # the last that was logged: nodes call again and again

    def __post_init__(self) -> None:
        self.tokens = TokenStore(self.folder, self.clock)
        self.roster = RosterStore(self.folder, self.clock)

    @property
    def ca_pem(self) -> bytes:
        return self.authority.certificate_pem

    def join(self, secret: bytes, node_id: str, name: str) -> None:
        """Let a machine in for the secret of a join token. Raises TrustError: what to tell it."""
        removed = self._removed(node_id)
        self.tokens.admit(secret, node_id, name, removed)
        self._enter(node_id, name, removed)

    def renew(self, node_id: str, csr_pem: bytes) -> bytes:
        """Another certificate (PEM) for who has shown one of ``node_id``. Raises TrustError."""
        if self._removed(node_id) is not None:
            raise TrustError(roster.REFUSAL, code=roster.REMOVED)
        certificate = sign_request(self.authority, csr_pem, node_id, self.clock(), self.lifetime, proven=True)
        if node_id.startswith(KEY_ID):
            known = self.roster.read().get(node_id)
            self._enter(node_id, known.name if known else node_id, None)
        return certificate

    def remove(self, wanted: str, attached: Iterable[tuple[str, str]] = ()) -> tuple[str, str]:
        """Refuse the node called ``wanted`` (id or name) from now on; its (id, name). Raises TrustError."""
        now, ends = self.clock(), self.clock() + self.lifetime
        found: list[tuple[str, str]] = []

        def change(held: roster.Roster) -> roster.Roster:
            found.append(roster.find(held, attached, wanted))
            return roster.remove(held, *found[0], ends, now)

        self.roster.change(change)
        return found[0]

    def refusal(self, node_id: str) -> str | None:
        """Why a caller with this certificate is not served; None: it is. Quick: it looks at one file's date."""
        try:
            removed = self.roster.removed(node_id)
        except TrustError as error:  # who was removed is not known: then nobody from outside is served
            if not node_id.startswith(KEY_ID):
                return None
            if error.message != self._trouble:
                log.error("%s", error.message)
                self._trouble = error.message
            return "The coordinator cannot read its list of nodes: its log says why."
        return roster.REFUSAL if removed is not None else None

    def _removed(self, node_id: str) -> datetime | None:
        try:
            return self.roster.removed(node_id)
        except TrustError as error:
            log.error("%s", error.message)  # names our files
            raise TrustError(
                "The coordinator cannot read its list of nodes: its log says why.", code="coordinator_trouble"
            ) from None

    def _enter(self, node_id: str, name: str, removed: datetime | None) -> None:
        """Write a node down, unless it was removed since we looked."""
        now = self.clock()
        fresh = Known(id=node_id, name=name[:MAX_NAME], ends=now + self.lifetime)

        def change(held: roster.Roster) -> roster.Roster:
            known = held.get(node_id)
            if known is not None and known.removed != removed:
                raise TrustError(roster.REFUSAL, code=roster.REMOVED)
            return roster.let_in(held, fresh, now)

        self.roster.change(change)
