"""Every failure in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

Errors of the tree in :mod:`dwarfstar_engine.errors` carry their own status and code. Anything else is our fault: the
client learns only that, the log learns the rest.
"""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dwarfstar_engine.errors import DwarfStarError, RequestError, Unavailable

log = logging.getLogger(__name__)

DEFAULT_RETRY_AFTER_S = 1  # what passes, passes within seconds here; a client without the header guesses worse
INTERNAL = "the server failed on this request; its log says why"


class BodyTooLarge(RequestError):
    code = "body_too_large"
    http_status = 413


class KeyRefused(RequestError):
    code = "invalid_api_key"
    http_status = 401


class ForeignPage(RequestError):
    code = "foreign_origin"
    http_status = 403


class UnknownModel(RequestError):
    code = "model_not_found"
    http_status = 404


class RequestTimedOut(DwarfStarError):
    """The request's time is over. OpenAI's clients are told not to try again: it would take as long."""

    code = "request_timed_out"
    http_status = 504


class ClientGone(Exception):
    """The client closed its connection: whatever was being made for it is of no use. Never shown to anyone."""


def error_body(error: BaseException) -> dict[str, Any]:
    """The JSON a client sees for ``error``."""
    if not isinstance(error, DwarfStarError):
        return _body(INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR, None, "internal_error")
    return _body(error.message, error.http_status, getattr(error, "param", None), error.code)


def error_response(error: DwarfStarError) -> Response:
    """``error`` as an HTTP response; those that may pass carry Retry-After (whole seconds, at least 1)."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, Unavailable):
        headers["retry-after"] = str(DEFAULT_RETRY_AFTER_S)
    if isinstance(error, RequestTimedOut):
        headers["x-should-retry"] = "false"
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error), status=error.http_status, headers=headers)


def json_response(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, media_type="application/json")


def from_validation(error: ValidationError) -> RequestError:
    """The first thing wrong with a request body, as one sentence that names the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    param = ".".join(map(str, first["loc"]))
    if not param:
        return RequestError("the body must be a JSON object")
    return RequestError(f"{param}: {_sentence(first)}", param=param)


def install(app: FastAPI) -> None:
    """Make ``app`` answer every failure in OpenAI's shape."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, DwarfStarError)
        return error_response(error)

    async def routing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {
            404: f"there is no {request.url.path} here: the API is under /v1",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, str(error.detail))
        body = _body(said, error.status_code, None, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"))
        return json_response(body, status=error.status_code, headers=dict(error.headers or {}))

    async def validation(request: Request, error: Exception) -> Response:
        return error_response(RequestError("the request is not valid: check its path and parameters"))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it; the server wants some end

    async def internal(request: Request, error: Exception) -> Response:
        # Starlette raises the error again after this, so the server logs it with its traceback.
        return json_response(error_body(error), status=500)

    app.add_exception_handler(DwarfStarError, ours)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, internal)


def _body(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _sentence(details: ErrorDetails) -> str:
    said = details["msg"]
    return said[:1].lower() + said[1:]
