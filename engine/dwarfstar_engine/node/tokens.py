"""Join tokens: who made which, for how long, and for how many machines.

Theory. ``tokens.json`` in the coordinator's trust folder holds, of each token, the hash of its secret, when it ends and
which machines it has let in. The command line adds to it and the engine reads it at every attempt to join, so a token
works at once, with or without an engine running when it was made; removing the file withdraws all tokens. Both change
it under one lock. The decisions, ``add``, ``admit`` and ``revoke``, are pure: the book and the time in, a book or a
refusal out. A token's id is the beginning of its secret's hash: it names the token and lets nobody in.

A machine that was let in may come again with the same token while that is valid, at no further use: its answer may
have been lost on the way. That is safe because its id names its key (see ``wire.trust``).

A machine that was removed from the cluster is let in by tokens only that were made after that.

Bounds. MAX_TOKENS tokens; what has ended is kept for KEPT, so that it can be said that it ended, and then forgotten.
What was revoked is kept as long as it would have been.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from dwarfstar_engine.errors import SettingsError, TrustError
from dwarfstar_engine.wire.private_files import locked, read_private, replace_file
from dwarfstar_engine.wire.trust import KEY_ID, Authority, JoinToken, new_token, secret_hash, secret_matches

log = logging.getLogger("dwarfstar.tokens")

DEFAULT_HOURS = 24.0
MAX_HOURS = 24.0 * 366
MAX_USES = 1024  # machines let in by one token; a coordinator takes no more nodes than that
MAX_TOKENS = 64
KEPT = timedelta(days=7)
MAX_FILE_BYTES = 4 << 20  # MAX_TOKENS × MAX_USES ids of 26 characters, and punctuation
LOCK_WAIT_S = 5.0  # the file is held for a few milliseconds at a time
ID_CHARS = 8  # of the hash, in hex: of MAX_TOKENS tokens two have the same id once in two million clusters
FILE = "tokens.json"
REFUSAL = "token_"  # begins the codes of refusals, which the machine that joins is told
AGAIN = "get a new one with `dwarfstar token` on the coordinator's machine."


class Token(BaseModel):
    """One token. ``uses``: machines it lets in; None: any number until it ends. ``nodes``: those it has, if counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: AwareDatetime
    expires: AwareDatetime
    uses: int | None = Field(default=None, ge=1, le=MAX_USES)
    nodes: tuple[str, ...] = Field(default=(), max_length=MAX_USES)
    revoked: AwareDatetime | None = None

    @property
    def id(self) -> str:
        """What to call it; no secret."""
        return self.hash[:ID_CHARS]

    def state(self, now: datetime) -> Literal["valid", "used", "ended", "revoked"]:
        """What it is good for at ``now``. "used": it has let in all it was for."""
        if self.revoked is not None:
            return "revoked"
        if now >= self.expires:
            return "ended"
        return "used" if self.uses is not None and len(self.nodes) >= self.uses else "valid"


class Book(BaseModel):
    """All tokens of a cluster, oldest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    tokens: tuple[Token, ...] = Field(default=(), max_length=MAX_TOKENS)


def add(book: Book, hashed: str, now: datetime, hours: float, uses: int | None) -> Book:
    """The book with one token more. Raises SettingsError if a number is out of bounds, TrustError if it is full."""
    if not 0 < hours <= MAX_HOURS:
        raise SettingsError(f"--hours takes a number above 0 and at most {MAX_HOURS:.0f} (given: {hours:g})")
    if uses is not None and not 1 <= uses <= MAX_USES:
        raise SettingsError(f"--uses takes a whole number from 1 to {MAX_USES} (given: {uses})")
    kept = [token for token in book.tokens if token.expires + KEPT > now]
    while len(kept) >= MAX_TOKENS and (
        over := next((token for token in kept if token.state(now) in ("ended", "revoked")), None)
    ):
        kept.remove(over)
    if len(kept) >= MAX_TOKENS:
        raise TrustError(
            f"{MAX_TOKENS} join tokens are valid, which is the most: use one of them (it can let in many machines), "
            f"or remove {FILE} in the trust folder, which withdraws all of them.",
            code="too_many_tokens",
        )
    fresh = Token(hash=hashed, created=now, expires=now + timedelta(hours=hours), uses=uses)
    return Book(tokens=(*kept, fresh))


def admit(book: Book, secret: bytes, node_id: str, now: datetime, removed: datetime | None = None) -> Book:
    """The book after ``node_id`` was let in with ``secret``. ``removed``: when this node was removed from the cluster.

    Raises TrustError: unknown, revoked, expired, used up, or older than the removal.
    """
    if not node_id.startswith(KEY_ID):
        raise TrustError(
            "The machine that joins does not name its key: install this DwarfStar release there.", code="token_id"
        )
    index = next((i for i, token in enumerate(book.tokens) if secret_matches(secret, token.hash)), None)
    if index is None:
        raise TrustError(f"This join token is not known here (any more): {AGAIN}", code="token_unknown")
    token = book.tokens[index]
    if now >= token.expires:
        raise TrustError(f"This join token ended at {token.expires:%Y-%m-%d %H:%M} UTC: {AGAIN}", code="token_expired")
    if token.revoked is not None:
        raise TrustError(f"This join token was revoked: {AGAIN}", code="token_revoked")
    if removed is not None and token.created <= removed:
        raise TrustError(
            f"This machine was removed from the cluster after this join token was made: {AGAIN}", code="token_removed"
        )
    if token.uses is None or node_id in token.nodes:
        return book
    if len(token.nodes) >= token.uses:
        machines = "one machine" if token.uses == 1 else f"{token.uses} machines"
        raise TrustError(f"This join token has let in {machines}, which is all it was for: {AGAIN}", code="token_used")
    used = token.model_copy(update={"nodes": (*token.nodes, node_id)})
    return Book(tokens=(*book.tokens[:index], used, *book.tokens[index + 1 :]))


def revoke(book: Book, token_id: str, now: datetime) -> Book:
    """The book in which a token lets nobody in any more. Raises TrustError if there is none of that id."""
    found = [token for token in book.tokens if token.id == token_id.strip().lower()]
    if not found:
        raise TrustError(
            f"There is no join token {token_id[:64]!r}: `dwarfstar token list` shows their ids.", code="no_such_token"
        )
    tokens = (t.model_copy(update={"revoked": t.revoked or now}) if t in found else t for t in book.tokens)
    return Book(tokens=tuple(tokens))


@dataclass(frozen=True, slots=True)
class TokenStore:
    """The book in a trust folder. clock: the time, in UTC."""

    folder: Path
    clock: Callable[[], datetime]

    def issue(self, authority: Authority, hours: float = DEFAULT_HOURS, uses: int | None = None) -> JoinToken:
        """A new token of the cluster. Raises SettingsError, TrustError."""
        token = new_token(authority)
        self._change(lambda book: add(book, secret_hash(token.secret), self.clock(), hours, uses))
        return token

    def list(self) -> tuple[Token, ...]:
        """All that are kept, oldest first. Raises TrustError."""
        return self._read().tokens

    def revoke(self, token_id: str) -> None:
        """Let nobody in with this token any more; who is in stays. Raises TrustError if there is none of that id."""
        self._change(lambda book: revoke(book, token_id, self.clock()))

    def admit(self, secret: bytes, node_id: str, name: str, removed: datetime | None = None) -> None:
        """Raise TrustError unless the secret lets this node in. Blocks for as long as files take."""
        try:
            self._change(lambda book: admit(book, secret, node_id, self.clock(), removed))
        except TrustError as error:
            if error.code.startswith(REFUSAL):
                raise
            log.error("%s (asked to join: %s)", error.message, name)  # ours to mend, and names our files
            raise TrustError(
                "The coordinator cannot read its join tokens: its log says why.", code="coordinator_trouble"
            ) from None

    def _change(self, change: Callable[[Book], Book]) -> None:
        with locked(self.folder / "tokens.lock", LOCK_WAIT_S):
            book = self._read()
            changed = change(book)
            if changed != book:
                replace_file(self.folder / FILE, changed.model_dump_json(indent=1).encode())

    def _read(self) -> Book:
        path = self.folder / FILE
        if not path.exists():
            return Book()
        try:
            return Book.model_validate_json(read_private(path, MAX_FILE_BYTES))
        except ValidationError:
            raise TrustError(
                f"{path} is damaged: remove it, which withdraws all join tokens, and make new ones."
            ) from None
