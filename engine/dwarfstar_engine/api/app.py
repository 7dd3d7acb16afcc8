"""The HTTP API as an ASGI application: routes and nothing else.

A request goes: key check → bounded body → schema → :mod:`prepare` (tokens and sampling) → :mod:`reply` (generation,
written in the endpoint's format). Its time runs from when its body was read: tokenising, waiting and writing included.
Bodies are read and parsed here rather than by FastAPI, which would buffer them without a bound and answer 422.

A request may name any model: there is one, and answers carry its name. Only GET /v1/models/{id} knows it exactly.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.requests import Request
from starlette.responses import Response

from dwarfstar_engine.api import errors
from dwarfstar_engine.api.body import parse, read_body
from dwarfstar_engine.api.chat import ChatFormat
from dwarfstar_engine.api.completions import TextFormat
from dwarfstar_engine.api.keys import Gate
from dwarfstar_engine.api.prepare import plan_chat, plan_text
from dwarfstar_engine.api.priority import priority_of
from dwarfstar_engine.api.reply import Reply
from dwarfstar_engine.api.run import Deadline, unless_over
from dwarfstar_engine.api.schemas import ChatBody, DetokenizeBody, TextBody, TokenizeBody
from dwarfstar_engine.errors import NoModel
from dwarfstar_engine.serving import Engine, ModelInfo

MAX_BODY_BYTES = 4 << 20  # four million characters are beyond any context served
REQUEST_TIMEOUT_S = 3600.0  # what asks for no limit gets one: a stuck client must not hold a slot for ever

# FastAPI sends traces when the environment names a collector; what is asked of a model leaves this machine for no one.
NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def _fresh_id() -> str:
    return secrets.token_hex(12)


def create_app(
    engine: Engine,
    *,
    gate: Gate | None = None,
    health_details: bool = True,
    max_body_bytes: int = MAX_BODY_BYTES,
    request_timeout_s: float = REQUEST_TIMEOUT_S,
    clock: Callable[[], float] = time.time,
    fresh_id: Callable[[], str] = _fresh_id,
) -> FastAPI:
    """The API in front of ``engine``.

    gate: who may use it, /health excepted; None lets everyone in.
    health_details: whether /health, which is open to all, says more than "ok" or "unavailable".
    max_body_bytes: larger request bodies are refused with 413.
    request_timeout_s: the longest a request may take; it may ask for less with the body field ``timeout``.
    clock: unix time in seconds. fresh_id: a new unguessable id, of letters and digits.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, telemetry=NO_TELEMETRY)
    errors.install(app)

    async def authorized(request: Request) -> None:
        if gate is not None:
            gate.admit(request)

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(authorized)])

    def deadline(asked_s: float | None = None) -> Deadline:
        limit_s = request_timeout_s if asked_s is None else min(asked_s, request_timeout_s)
        return Deadline(asyncio.get_running_loop().time() + limit_s, limit_s)

    @v1.post("/chat/completions")
    async def chat(request: Request) -> Response:
        priority = priority_of(request)
        body = parse(ChatBody, await read_body(request, max_body_bytes))
        until, usage = deadline(body.timeout), body.include_usage
        plan = await unless_over(request.receive, until, plan_chat(engine, body, priority))
        form = ChatFormat(plan, engine.token_bytes, fresh_id=fresh_id(), created=int(clock()), usage=usage)
        return Reply(engine, plan, form, until, stream=body.stream is True, include_usage=usage)

    @v1.post("/completions")
    async def completions(request: Request) -> Response:
        priority = priority_of(request)
        body = parse(TextBody, await read_body(request, max_body_bytes))
        until, usage = deadline(body.timeout), body.include_usage
        plan = await unless_over(request.receive, until, plan_text(engine, body, priority))
        form = TextFormat(plan, engine.token_bytes, fresh_id=fresh_id(), created=int(clock()), usage=usage)
        return Reply(engine, plan, form, until, stream=body.stream is True, include_usage=usage)

    @v1.get("/models")
    async def models() -> Response:
        try:
            served = [_model(engine.model())]
        except NoModel:
            served = []
        return errors.json_response({"object": "list", "data": served})

    @v1.get("/models/{name:path}")
    async def model(name: str) -> Response:
        try:
            served = engine.model()
        except NoModel as error:
            raise errors.UnknownModel(error.message, param="model") from None
        if name != served.name:
            raise errors.UnknownModel(f"the model served is {served.name}, not {name}", param="model")
        return errors.json_response(_model(served))

    # As llama-server has them: for benchmarks and for clients that count tokens before they send.
    @app.post("/tokenize", dependencies=[Depends(authorized)])
    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeBody, await read_body(request, max_body_bytes))
        tokens = await unless_over(request.receive, deadline(), _tokens(engine, body.content))
        return errors.json_response({"tokens": tokens})

    @app.post("/detokenize", dependencies=[Depends(authorized)])
    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeBody, await read_body(request, max_body_bytes))
        body.check(engine.model().vocab_size)
        text = b"".join(map(engine.token_bytes, body.tokens)).decode("utf-8", "replace")
        return errors.json_response({"content": text})

    @app.get("/health")
    async def health() -> Response:
        told = dict(engine.health())
        status = HTTPStatus.OK if told.get("status") == "ok" else HTTPStatus.SERVICE_UNAVAILABLE
        return errors.json_response(told if health_details else {"status": told.get("status")}, status=status)

    app.include_router(v1)
    return app


async def _tokens(engine: Engine, text: str) -> list[int]:
    await engine.settled()
    engine.model()  # there is one
    return await engine.text_tokens(text)


def _model(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dwarfstar",
        "max_model_len": model.context,  # vLLM's name for it: clients read it
    }
