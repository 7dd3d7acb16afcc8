"""Join tokens: who made which, for how long, and for how many machines.

Theory. ``tokens.json`` in the coordinator's trust folder holds, of each token, the hash of its secret, when it ends and
which machines it has let in. The command line adds to it and the engine reads it at every attempt to join, so a token
works at once, with or without an engine running when it was made; removing the file withdraws all tokens. Both change
it under one lock. The decisions, ``add`` and ``admit``, are pure: the book and the time in, a book or a refusal out.

A machine that was let in may come again with the same token while that is valid, at no further use: its answer may
have been lost on the way. That is safe because its id names its key (see ``wire.trust``).

Bounds. MAX_TOKENS tokens; what has ended is kept for KEPT, so that it can be said that it ended, and then forgotten.
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
    while len(kept) >= MAX_TOKENS and (over := next((token for token in kept if token.expires <= now), None)):
        kept.remove(over)
    if len(kept) >= MAX_TOKENS:
        raise TrustError(
            f"{MAX_TOKENS} join tokens are valid, which is the most: use one of them (it can let in many machines), "
            f"or remove {FILE} in the trust folder, which withdraws all of them.",
            code="too_many_tokens",
        )
    fresh = Token(hash=hashed, created=now, expires=now + timedelta(hours=hours), uses=uses)
    return Book(tokens=(*kept, fresh))


def admit(book: Book, secret: bytes, node_id: str, now: datetime) -> Book:
    """The book after ``node_id`` was let in with ``secret``. Raises TrustError: unknown, expired or used up."""
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
    if token.uses is None or node_id in token.nodes:
        return book
    if len(token.nodes) >= token.uses:
        machines = "one machine" if token.uses == 1 else f"{token.uses} machines"
        raise TrustError(f"This join token has let in {machines}, which is all it was for: {AGAIN}", code="token_used")
    used = token.model_copy(update={"nodes": (*token.nodes, node_id)})
    return Book(tokens=(*book.tokens[:index], used, *book.tokens[index + 1 :]))


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

    def admit(self, secret: bytes, node_id: str, name: str) -> None:
        """Raise TrustError unless the secret lets this node in. Blocks for as long as files take."""
        try:
            self._change(lambda book: admit(book, secret, node_id, self.clock()))
        except TrustError as error:
            if error.code.startswith(REFUSAL):
                raise
            log.error("%s (asked to join: %s)", error.message, name)  # ours to mend, and names our files
            raise TrustError("The coordinator cannot read its join tokens: its log says why.") from None

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
