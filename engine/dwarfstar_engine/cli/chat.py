"""``dwarfstar chat``: talk to the running engine from a terminal or a script, over its own HTTP API."""

from __future__ import annotations

import json
import ssl
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from dwarfstar_engine.api.keybook import PREFIX
from dwarfstar_engine.api.tls import client_context
from dwarfstar_engine.cli import running
from dwarfstar_engine.errors import DwarfStarError, SettingsError

CONNECT_S = 5.0
HOW_TO_GIVE_A_KEY = "here: with --api-key or DWARFSTAR_API_KEY; `dwarfstar key add NAME` makes one"
READ_S = 120.0  # a long prompt on a slow cluster; between tokens it is never so long


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to talk to. ``verify``: what its certificate is checked with; True: the public authorities."""

    api_url: str
    key: str | None = field(default=None, repr=False)
    verify: ssl.SSLContext | bool = True


def target(url: str | None, key: str | None, home: Path, environment: Mapping[str, str]) -> Target:
    """The endpoint ``url``, or the engine that runs from ``home``. Raises DwarfStarError if there is none.

    The key is the one given, else DWARFSTAR_API_KEY, else OPENAI_API_KEY. The last one is usually OpenAI's own: the
    engine here gets it only if it looks like one of ours, as it would refuse another.
    """
    key = key or environment.get("DWARFSTAR_API_KEY")
    other = environment.get("OPENAI_API_KEY", "")
    if not key and (url or other.startswith(PREFIX)):
        key = other
    key = (key or "").strip() or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise SettingsError("the API key has characters that no key has: give it as `dwarfstar key add` printed it")
    if url:
        return Target(url.rstrip("/"), key)
    engine = running.require(home)
    verify = client_context(Path(engine.certificate)) if engine.certificate else True
    return Target(engine.api_url.rstrip("/"), key, verify)


def stream(target: Target, messages: list[dict[str, str]], options: dict[str, Any]) -> Iterator[str]:
    """The pieces of the answer as they come. Raises DwarfStarError with the server's own sentence."""
    body = {"model": "default", "messages": messages, "stream": True, **options}
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    api_url = target.api_url
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(CONNECT_S, read=READ_S), verify=target.verify) as client,
            client.stream("POST", f"{api_url}/v1/chat/completions", json=body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise refusal(answer)
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


def refusal(answer: httpx.Response) -> DwarfStarError:
    """The server's own sentence, from an answer that was read."""
    try:
        error = answer.json()["error"]
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            return DwarfStarError(f"{error['message']} ({HOW_TO_GIVE_A_KEY})", code="invalid_api_key")
        return DwarfStarError(str(error["message"]), code=str(error.get("code") or "error"))
    except (ValueError, KeyError, TypeError):
        return DwarfStarError(f"the engine answered with HTTP status {answer.status_code}")


def ask(target: Target, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print the answer as it comes; afterwards, on a terminal, its speed. Returns the text."""
    started, first, pieces = time.perf_counter(), 0.0, []
    for text in stream(target, messages, options):
        first = first or time.perf_counter()
        pieces.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if sys.stderr.isatty() and len(pieces) > 1:
        seconds = time.perf_counter() - first
        print(f"[{len(pieces) / seconds:.0f} pieces/s, first after {first - started:.2f} s]", file=sys.stderr)
    return "".join(pieces)


def converse(target: Target, options: dict[str, Any], messages: list[dict[str, str]]) -> None:
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
            answer = ask(target, [*messages, {"role": "user", "content": prompt}], options)
        except DwarfStarError as error:
            if not interactive:
                raise
            print(error.message, file=sys.stderr)
            continue
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
