"""Who may use the HTTP API: the gate before each endpoint but /health.

Theory. Bound elsewhere than loopback, the gate is closed: a request needs a key that is in the book now. On loopback
it is open, but a key that is given must be right as soon as there are keys, so that a wrong one is found before the
engine is bound elsewhere. A request passes the gate once, before its body is read; tokens do not. A key that is
withdrawn lets nothing in from then on; what it let in before goes on to its end.

A browser on this machine lets any web page post to loopback without asking. Where no key is needed, a request of a page
from elsewhere is refused: browsers say in ``Origin`` where a page is from.

``LiveKeys`` follows the file: at most every LOOK_S, with the first request after that, it asks whether the file is
another one, and reads it if so. Without requests nobody looks. While the file cannot be read, the keys known before
count: an editor's half-written file must neither lock everybody out nor let anybody in.

Bounds. MAX_AUTHORIZATION characters of the header are looked at. Refusals are logged once a source in a while, a few a
minute in all (``once``). No key, right or wrong, is in a log, a message or a ``repr``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from urllib.parse import urlsplit

from starlette.requests import Request

from dwarfstar_engine.api.errors import ForeignPage, KeyRefused
from dwarfstar_engine.api.keybook import Ended, KeyBook, KeyStore, Known, Signature, Unknown, judge
from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.once import Once

log = logging.getLogger("dwarfstar.keys")

LOOK_S = 1.0  # how long a withdrawn key may still work; a look costs a few microseconds
MAX_AUTHORIZATION = 1024  # characters; ours have 53, and longer ones are nobody's key
TELL_EVERY_S = 60.0  # between two lines about one source
MAX_LINES = 30  # a minute, of all sources: a network full of addresses must not fill the disk
MAX_NOTES = 256  # keys whose day of use is remembered: twice as many as there are, as some are replaced

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # pages of this machine's own servers may ask
NO_KEY = "this server needs an API key: send it as 'Authorization: Bearer KEY'"
UNKNOWN_KEY = "the API key is not one this server knows: check the key your client sends"


class LiveKeys:
    """The book of ``store`` as it is, or was at most LOOK_S ago. monotonic: a clock in s.

    Raises TrustError when it is made, if the file cannot be read then.
    """

    def __init__(self, store: KeyStore, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._store, self._monotonic = store, monotonic
        self._seen: Signature | None = store.signature()
        self._book = store.read()
        self._look_at = monotonic() + LOOK_S
        self._complaint = ""

    def __call__(self) -> KeyBook:
        now = self._monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look()
        return self._book

    def _look(self) -> None:
        try:
            signature = self._store.signature()  # before the file is read: what changes meanwhile is seen next time
            if signature != self._seen:
                self._book = self._store.read()
                self._seen = signature
            self._complaint = ""
        except TrustError as error:
            if error.message != self._complaint:
                self._complaint = error.message
                log.error("%s Until then the keys known before count.", error.message)


def credentials(headers: Sequence[str]) -> str | None:
    """The key in the request's Authorization headers, or None if there is none.

    Raises KeyRefused for what is too long, or given twice: it would be a matter of taste which of them counts.
    """
    if not headers:
        return None
    if len(headers) > 1 or len(headers[0]) > MAX_AUTHORIZATION:
        raise KeyRefused(UNKNOWN_KEY)
    scheme, _, key = headers[0].partition(" ")
    return (key.strip() or None) if scheme.lower() == "bearer" else None


def is_foreign(origin: str | None, host: str) -> bool:
    """Whether a request comes from a web page of another host than the one it was sent to. Other clients send none."""
    if origin is None:
        return False
    try:
        page = urlsplit(origin)
        return page.netloc.lower() != host.lower() and page.hostname not in LOOPBACK
    except ValueError:
        return True


class Gate:
    """Lets requests in, or raises KeyRefused.

    keys: the book that counts now. required: whether a request without a key is refused. clock: the time, in UTC.
    note: is told, in a thread, the hash of each key that is used on a new day, and the day.
    """

    def __init__(
        self,
        keys: Callable[[], KeyBook],
        *,
        required: bool,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float] = time.monotonic,
        note: Callable[[str, date], None] | None = None,
    ) -> None:
        self._keys, self._required, self._clock, self._monotonic, self._note = keys, required, clock, monotonic, note
        self._refusals = Once(TELL_EVERY_S, MAX_LINES)
        self._noted: dict[str, date] = {}
        self._noting: set[asyncio.Future[None]] = set()

    def admit(self, request: Request) -> None:
        """Let the request pass. Raises KeyRefused, ForeignPage. Called on the event loop; it waits for nothing but
        LiveKeys."""
        if not self._required and is_foreign(request.headers.get("origin"), request.headers.get("host", "")):
            raise ForeignPage("this engine answers no web pages from elsewhere: bind it with a key, or use a proxy")
        try:
            self.check(request.headers.getlist("authorization"))
        except KeyRefused as error:
            source = request.client.host if request.client else "an unknown address"
            if self._refusals.worth(source, self._monotonic()):
                log.warning("refused a request of %s: %s", source, error.message)
            raise

    def check(self, headers: Sequence[str]) -> None:
        """``admit`` by the Authorization headers alone, without a line in the log."""
        book, now = self._keys(), self._clock()
        if not self._required and not book.keys:
            return
        key = credentials(headers)
        if key is None:
            if self._required:
                raise KeyRefused(NO_KEY)
            return
        match judge(book, key, now):
            case Known(held):
                self._used(held.hash, held.used, now.astimezone(UTC).date())
            case Ended(_, at):
                raise KeyRefused(
                    f"this API key ended at {at.astimezone(UTC):%Y-%m-%d %H:%M} UTC: ask for a new one, which "
                    "`dwarfstar key add` makes"
                )
            case Unknown():
                raise KeyRefused(UNKNOWN_KEY)

    def _used(self, hashed: str, known: date | None, day: date) -> None:
        """Note the day, once."""
        if self._note is None or known == day or self._noted.get(hashed) == day:
            return
        if len(self._noted) >= MAX_NOTES:
            self._noted.clear()
        self._noted[hashed] = day
        noting = asyncio.get_running_loop().run_in_executor(None, _quietly, self._note, hashed, day)
        self._noting.add(noting)
        noting.add_done_callback(self._noting.discard)


def _quietly(note: Callable[[str, date], None], hashed: str, day: date) -> None:
    """A day that cannot be kept, on a full disk say, is no reason to refuse who has a right key."""
    try:
        note(hashed, day)
    except TrustError as error:
        log.info("the day an API key was used is not kept: %s", error.message)
