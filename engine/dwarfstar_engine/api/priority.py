"""The header X-Priority: which of the requests that wait for a slot is served first."""

from __future__ import annotations

import re

from starlette.requests import Request

from dwarfstar_engine.errors import RequestError

HEADER = "X-Priority"
MAX_PRIORITY = 100  # of either sign
NAMED = {"high": 50, "normal": 0, "low": -50}  # half way, so that a number can still stand above or below a name
_NUMBER = re.compile(r"[+-]?[0-9]{1,3}", re.ASCII)


def priority_of(request: Request) -> int:
    """The priority ``request`` asks for; 0 without the header. Raises RequestError."""
    said = request.headers.get(HEADER, "normal").strip().lower()
    if said in NAMED:
        return NAMED[said]
    if _NUMBER.fullmatch(said) and abs(int(said)) <= MAX_PRIORITY:
        return int(said)
    raise RequestError(
        f"{HEADER}: must be high, normal, low or a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}", param=HEADER
    )
