"""API keys: who made which, until when, and the file they are kept in.

Theory. A key is ``ds-`` and 256 random bits. ``api-keys.json`` in the ``keys`` folder of the home holds the SHA-256 of
each. That is enough: salts and slow hashes are for passwords, which can be guessed from a list; nobody finds 256 random
bits by trying, so the hash tells nothing of the key. The command line changes the file under a lock, whether an engine
runs or not, and the engine looks at it again when it has changed (see :mod:`.keys`). The decisions, ``add``,
``revoke``, ``judge`` and ``note_used``, are pure: the book, the key and the time in, a book or a verdict out.

Invariants. A key is in no file, no log and no ``repr``: it is returned once by ``KeyStore.issue``. Names are unique. A
file that cannot be understood is left as it is, and nothing is written over it.

Bounds. MAX_KEYS keys; ended ones make room. MAX_FILE_BYTES is read of the file.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dwarfstar_engine.errors import SettingsError, TrustError
from dwarfstar_engine.wire.private_files import locked, read_private, replace_file

PREFIX = "ds-"  # says whose key it is to who finds one, and to tools that search texts for secrets
KEY_BYTES = 32
SHOWN_CHARS = 4  # of a key's end, to tell keys apart; the 39 others are still 234 random bits
MAX_KEYS = 128  # one for each program of a household; each costs a comparison in each request
MAX_FILE_BYTES = 128 << 10  # MAX_KEYS entries of the longest kind take half
MAX_LIFETIME = timedelta(days=3660)  # longer is meant to be for ever
LOCK_WAIT_S = 5.0  # the file is held for a few milliseconds at a time
FOLDER, FILE = "keys", "api-keys.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,47}"  # fits a line of a listing, and no shell makes anything of it

_LIFETIME = re.compile(r"([0-9]{1,6})(h|d|w)")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


class ApiKey(BaseModel):
    """One key. ``hash``: SHA-256, hex. ``last``: its last characters. ``used``: the last day (UTC) it was used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=f"^{NAME}$")
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    last: str = Field(pattern=r"^[A-Za-z0-9_-]{4}$")
    created: AwareDatetime
    expires: AwareDatetime | None = None
    used: date | None = None

    def ended(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


class KeyBook(BaseModel):
    """All keys, oldest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = Field(default=(), max_length=MAX_KEYS)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if len({key.name for key in self.keys}) != len(self.keys):
            raise ValueError("two keys have one name")
        return self

    def usable(self, now: datetime) -> bool:
        """Whether any key lets somebody in."""
        return any(not key.ended(now) for key in self.keys)


@dataclass(frozen=True, slots=True)
class Known:
    """A key that may be used."""

    key: ApiKey


@dataclass(frozen=True, slots=True)
class Ended:
    """A key that was good until then."""

    key: ApiKey
    at: datetime


@dataclass(frozen=True, slots=True)
class Unknown:
    """No key of ours, or not any more."""


Verdict = Known | Ended | Unknown


def format_key(random: bytes) -> str:
    """The key of KEY_BYTES random bytes: PREFIX and their base64, url-safe, without padding."""
    assert len(random) == KEY_BYTES
    return PREFIX + base64.urlsafe_b64encode(random).rstrip(b"=").decode("ascii")


def key_hash(key: str) -> str:
    """What to keep of a key. Takes any text that a header can carry."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def lifetime(text: str) -> timedelta:
    """``12h``, ``30d`` or ``8w`` as a time. Raises SettingsError."""
    match = _LIFETIME.fullmatch(text)
    span = int(match[1]) * _UNITS[match[2]] if match else timedelta()
    if not timedelta() < span <= MAX_LIFETIME:
        raise SettingsError(
            f"--expires takes hours, days or weeks, as in 12h, 30d or 8w, and at most {MAX_LIFETIME.days}d "
            f"(given: {text[:32]!r})"
        )
    return span


def add(book: KeyBook, name: str, key: str, now: datetime, lasts: timedelta | None) -> KeyBook:
    """The book with one key more. ``lasts`` None: until it is revoked.

    Raises SettingsError: the name is none or taken, or the book is full.
    """
    if not re.fullmatch(NAME, name):
        raise SettingsError(
            "a key's name has 1 to 48 letters, digits and ._@-, and begins with a letter or a digit: "
            "name it after who will use it, as in `dwarfstar key add laptop`",
            code="bad_key_name",
        )
    taken = next((held for held in book.keys if held.name == name), None)
    if taken is not None and not taken.ended(now):
        raise SettingsError(
            f"there is a key named {name} already: take another name, or withdraw that one with "
            f"`dwarfstar key revoke {name}`",
            code="key_exists",
        )
    kept = [held for held in book.keys if held is not taken]
    while len(kept) >= MAX_KEYS and (over := next((held for held in kept if held.ended(now)), None)):
        kept.remove(over)
    if len(kept) >= MAX_KEYS:
        raise SettingsError(
            f"{MAX_KEYS} API keys are valid, which is the most: withdraw one with `dwarfstar key revoke NAME`",
            code="too_many_keys",
        )
    expires = None if lasts is None else now + lasts
    fresh = ApiKey(name=name, hash=key_hash(key), last=key[-SHOWN_CHARS:], created=now, expires=expires)
    return KeyBook(keys=(*kept, fresh))


def revoke(book: KeyBook, name: str) -> KeyBook:
    """The book without that key. Raises SettingsError if there is none."""
    kept = tuple(key for key in book.keys if key.name != name)
    if len(kept) == len(book.keys):
        raise SettingsError(f"there is no key named {name!r}: `dwarfstar key list` shows them", code="no_such_key")
    return KeyBook(keys=kept)


def judge(book: KeyBook, key: str, now: datetime) -> Verdict:
    """Whether ``key`` may be used.

    It is compared with all keys, each in constant time, so that neither its likeness to one nor the place of that in
    the list shows in the time taken.
    """
    given, found = key_hash(key), None
    for held in book.keys:
        if hmac.compare_digest(given, held.hash):
            found = held
    if found is None:
        return Unknown()
    return Ended(found, found.expires) if found.expires is not None and now >= found.expires else Known(found)


def note_used(book: KeyBook, hashed: str, day: date) -> KeyBook:
    """The book after a key was used on ``day``. Days never go back; a key that is gone stays gone."""
    return KeyBook(
        keys=tuple(
            key.model_copy(update={"used": day}) if key.hash == hashed and (key.used is None or key.used < day) else key
            for key in book.keys
        )
    )


Signature = tuple[int, int, int]
"""What changes with a file: its time of change (ns), size (bytes) and inode."""


@dataclass(frozen=True, slots=True)
class KeyStore:
    """The book in a folder. clock: the time, in UTC."""

    folder: Path
    clock: Callable[[], datetime]

    @property
    def path(self) -> Path:
        return self.folder / FILE

    def issue(self, name: str, lasts: timedelta | None = None) -> str:
        """A new key, which is not kept: it cannot be shown again. Raises SettingsError, TrustError."""
        key = format_key(secrets.token_bytes(KEY_BYTES))
        self._change(lambda book: add(book, name, key, self.clock(), lasts))
        return key

    def revoke(self, name: str) -> None:
        """Withdraw a key. Raises SettingsError, TrustError."""
        self._change(lambda book: revoke(book, name))

    def note_used(self, hashed: str, day: date) -> None:
        """Keep the day of a key's use. Raises TrustError. Blocks for as long as files take."""
        self._change(lambda book: note_used(book, hashed, day))

    def signature(self) -> Signature | None:
        """The file's, or None if there is no file. Raises TrustError."""
        try:
            facts = os.stat(self.path)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise TrustError(
                f"{self.path} cannot be read ({error.strerror}): check its folder and who owns it."
            ) from None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def read(self) -> KeyBook:
        """The keys; none if there is no file. Raises TrustError."""
        if self.signature() is None:
            return KeyBook()
        try:
            return KeyBook.model_validate_json(read_private(self.path, MAX_FILE_BYTES))
        except ValidationError:
            raise TrustError(
                f"{self.path} is damaged, and was left as it is: restore it from a backup, or move it away, which "
                "withdraws all API keys, and make new ones with `dwarfstar key add NAME`."
            ) from None

    def _change(self, change: Callable[[KeyBook], KeyBook]) -> None:
        with locked(self.folder / "keys.lock", LOCK_WAIT_S):
            book = self.read()
            changed = change(book)
            if changed != book:
                replace_file(self.path, changed.model_dump_json(indent=1).encode())


def key_folder(home: Path) -> Path:
    """Where the keys of an engine that runs from ``home`` are."""
    return home / FOLDER
