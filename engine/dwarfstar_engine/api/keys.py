"""API keys: who may use the HTTP API.

Keys are kept as digests and compared in constant time, all of them each time, so that neither a wrong key's
likeness to a right one nor its place in the list shows in the time taken. They appear in no log and no ``repr``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable

from starlette.requests import Request

from dwarfstar_engine.api.errors import KeyRefused
from dwarfstar_engine.errors import SettingsError

KeyCheck = Callable[[str], bool]
"""Whether a key may be used. Must take the same time for any key of the same length."""


class ApiKeys:
    """A :data:`KeyCheck` over a fixed set of keys. Raises SettingsError for an empty or non-ASCII key."""

    __slots__ = ("_digests",)

    def __init__(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        if not keys or not all(key.strip() and key.isascii() for key in keys):
            raise SettingsError("an API key must be non-empty ASCII text: a header can carry nothing else")
        self._digests = tuple(_digest(key) for key in keys)

    def __call__(self, key: str) -> bool:
        given, right = _digest(key), False
        for digest in self._digests:
            right |= hmac.compare_digest(given, digest)
        return right


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def authorize(request: Request, check: KeyCheck | None) -> None:
    """Let the request pass or raise KeyRefused. With no ``check`` everyone passes."""
    if check is None:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise KeyRefused("this server needs an API key: send it as 'Authorization: Bearer KEY'")
    if not check(key.strip()):
        raise KeyRefused("the API key is not one this server knows: check the key your client sends")
