"""Reading a request body under a bound, and parsing it.

The bound holds while reading, so a body without Content-Length cannot pass it. A client that is still sending when
the answer comes often loses the answer with the connection; so an oversized body is read to its end first and thrown
away, up to a second bound.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from dwarfstar_engine.api.errors import BodyTooLarge, from_validation

MAX_DRAINED_BYTES = 64 << 20  # thrown away so that the refusal arrives; past it the connection is simply closed

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body. Raises BodyTooLarge, or ClientDisconnect if the client leaves while sending."""
    declared = request.headers.get("content-length", "0")
    refused = declared.isdecimal() and int(declared[:20]) > max_bytes
    if refused and "expect" in request.headers:
        raise _too_large(max_bytes)  # the client waits for leave to send: it need not send at all
    chunks: list[bytes] = []
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            refused = True
            chunks.clear()
        if received > MAX_DRAINED_BYTES:
            break
        if not refused:
            chunks.append(chunk)
    if refused:
        raise _too_large(max_bytes)
    return b"".join(chunks)


def parse(model: type[M], body: bytes) -> M:
    """``body`` as ``model``. Raises RequestError naming the first field at fault.

    The parser behind it bounds nesting, refuses broken UTF-8 and lone surrogates, and is one pass in native code.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {max_bytes} bytes: send less, or raise max_body_mib on the server")
