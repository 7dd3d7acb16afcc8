"""``dwarfstar chat``: talk to the running engine from a terminal or a script, over its own HTTP API."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx

from dwarfstar_engine.errors import DwarfStarError

CONNECT_S = 5.0
READ_S = 120.0  # a long prompt on a slow cluster; between tokens it is never so long


def stream(api_url: str, messages: list[dict[str, str]], key: str | None, options: dict[str, Any]) -> Iterator[str]:
    """The pieces of the answer as they come. Raises DwarfStarError with the server's own sentence."""
    body = {"model": "default", "messages": messages, "stream": True, **options}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(CONNECT_S, read=READ_S)) as client,
            client.stream("POST", f"{api_url}/v1/chat/completions", json=body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise _refusal(answer)
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise DwarfStarError(event["error"]["message"], code=event["error"].get("code") or "error")
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text
    except httpx.HTTPError as error:
        raise DwarfStarError(f"the engine at {api_url} does not answer: {error}", code="not_reachable") from None


def _refusal(answer: httpx.Response) -> DwarfStarError:
    try:
        error = answer.json()["error"]
        return DwarfStarError(str(error["message"]), code=str(error.get("code") or "error"))
    except (ValueError, KeyError, TypeError):
        return DwarfStarError(f"the engine answered with HTTP status {answer.status_code}")


def ask(api_url: str, messages: list[dict[str, str]], key: str | None, options: dict[str, Any]) -> str:
    """Print the answer as it comes; afterwards, on a terminal, its speed. Returns the text."""
    started, first, pieces = time.perf_counter(), 0.0, []
    for text in stream(api_url, messages, key, options):
        first = first or time.perf_counter()
        pieces.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if sys.stderr.isatty() and len(pieces) > 1:
        seconds = time.perf_counter() - first
        print(f"[{len(pieces) / seconds:.0f} pieces/s, first after {first - started:.2f} s]", file=sys.stderr)
    return "".join(pieces)


def converse(api_url: str, key: str | None, options: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Go on with ``messages``, prompts read until the end of input. A refused prompt is said and not kept."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if not (prompt := line.strip()):
            continue
        try:
            answer = ask(api_url, [*messages, {"role": "user", "content": prompt}], key, options)
        except DwarfStarError as error:
            if not interactive:
                raise
            print(error.message, file=sys.stderr)
            continue
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
