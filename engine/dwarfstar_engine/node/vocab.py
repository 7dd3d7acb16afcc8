"""The coordinator's view of a vocabulary: a child process with deadlines, or bytes for the toy model."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dwarfstar_engine.errors import ModelError, RequestError, Unavailable
from dwarfstar_engine.node.child import Child
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.stage.toy import VOCABULARY

log = logging.getLogger("dwarfstar.vocab")

START_DEADLINE_S = 60.0  # a vocabulary of 260 000 tokens takes about a second; a cold disk may add many
CALL_DEADLINE_S = 10.0  # a template that takes longer will not end


class Vocab(Protocol):
    """Text ⇄ tokens. Raises RequestError for texts the template refuses, Unavailable if the process is gone."""

    size: int
    eog: frozenset[int]

    def piece(self, token: int) -> bytes: ...
    async def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...
    async def text(self, text: str) -> list[int]: ...
    async def close(self) -> None: ...


class ToyVocab:
    """Tokens are bytes, nothing ends a generation, and a chat is its messages, line by line."""

    size = VOCABULARY
    eog: frozenset[int] = frozenset()

    def piece(self, token: int) -> bytes:
        return bytes([token])

    async def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return list("\n".join(f"{m['role']}: {m['content']}" for m in messages).encode())

    async def text(self, text: str) -> list[int]:
        return list(text.encode())

    async def close(self) -> None:
        return None


class ProcessVocab:
    """A vocabulary process. It is started again after a crash or a missed deadline; only that call fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._child: Child | None = None
        self._calls: dict[int, asyncio.Future[list[int]]] = {}
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._next = 1
        self._lock = asyncio.Lock()
        self._pieces: list[bytes] = []
        self.size = 0
        self.eog: frozenset[int] = frozenset()

    async def start(self) -> None:
        """Load the vocabulary. Raises ModelError."""
        self._ready = asyncio.get_running_loop().create_future()
        child = Child("dwarfstar_engine.stage.vocab", self._event, self._exited)
        self._child = child
        await child.start()
        child.send(path=str(self._path))
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                ready = await self._ready
        except TimeoutError:
            await child.stop()
            raise ModelError(f"{self._path}: loading the vocabulary took more than {START_DEADLINE_S:.0f} s") from None
        except ModelError:
            await child.stop()
            raise
        self.size, self.eog = int(ready["size"]), frozenset(ready["eog"])
        blob, start, pieces = base64.b64decode(ready["pieces"]), 0, []
        for length in ready["lengths"]:
            pieces.append(blob[start : start + length])
            start += length
        self._pieces = pieces

    def _event(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready" and self._ready is not None and not self._ready.done():
            self._ready.set_result(event)
        elif event["event"] == "failed" and not event["id"]:
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(ModelError(event["message"], code=event["code"]))
        elif (call := self._calls.get(event.get("id", 0))) is not None and not call.done():
            if event["event"] == "tokens":
                call.set_result(event["tokens"])
            else:
                call.set_exception(RequestError(event["message"], code=event["code"], param=event["param"]))

    def _exited(self, status: int) -> None:
        words = self._child.last_words[-1:] if self._child else []
        log.warning("the vocabulary process ended with status %d %s", status, "".join(words))
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                ModelError(f"{self._path}: llama.cpp ended while reading the vocabulary: {''.join(words)}")
            )
        self._fail_calls()

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    async def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return await self._call(op="chat", messages=list(messages))

    async def text(self, text: str) -> list[int]:
        return await self._call(op="text", text=text)

    async def _call(self, **command: Any) -> list[int]:
        async with self._lock:
            if self._child is None or not self._child.alive:
                await self.start()
        child = self._child
        assert child is not None
        number, self._next = self._next, self._next + 1
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        child.send(id=number, **command)
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                return await future
        except TimeoutError:
            await self._give_up(child)
            raise RequestError(
                f"preparing the prompt took more than {CALL_DEADLINE_S:.0f} s: it is too long, "
                "or the model's chat template does not end on it",
                code="prompt_takes_too_long",
            ) from None
        finally:
            del self._calls[number]

    async def _give_up(self, child: Child) -> None:
        """End a process that hangs. Calls that wait behind the one at fault fail with it; they may come again."""
        if self._child is child:
            self._child = None
            self._fail_calls()
        await child.stop()

    def _fail_calls(self) -> None:
        for call in self._calls.values():
            if not call.done():
                call.set_exception(Unavailable("the tokeniser failed during this request", retry_after_s=1.0))

    async def close(self) -> None:
        if self._child is not None:
            await self._child.stop()


async def open_vocab(source: Source) -> Vocab:
    """The vocabulary of a model. Raises ModelError: it cannot be read."""
    if source.toy:
        return ToyVocab()
    vocab = ProcessVocab(Path(source.path))
    await vocab.start()
    return vocab
