"""Running the choices of one request, side by side, for a client that may leave.

One task per choice reads the engine and turns tokens into deltas; one reader takes all deltas that are ready at once,
so a slow client costs few writes and a fast engine no waiting. Deltas waiting for the reader are bounded: past the
bound the tasks stop reading the engine, which stops generating.

Invariant: whatever way a request ends (done, stop string, error, client gone, cancelled), every generator of the
engine has been closed before :class:`Run` is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.types import Receive

from dwarfstar_engine.api.choice import Choice, Delta
from dwarfstar_engine.api.errors import ClientGone
from dwarfstar_engine.serving import Engine

MAX_UNSENT = 256  # deltas one request may hold for a client slow to read; a few seconds of text

T = TypeVar("T")


class Run:
    """``async with Run(engine, choices) as run``, then :meth:`deltas` until it is empty."""

    def __init__(self, engine: Engine, choices: Sequence[Choice]) -> None:
        self._engine = engine
        self._choices = choices
        self._tasks: list[asyncio.Task[None]] = []
        self._running = len(choices)
        self._ready: list[Delta] = []
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._failure: Exception | None = None

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._read(choice)) for choice in self._choices]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def deltas(self) -> list[Delta]:
        """All deltas ready now, in order, waiting for one; empty when all choices are done.

        Raises the first error of any choice, after the deltas that came before it.
        """
        while not self._ready:
            if self._failure is not None:
                raise self._failure
            if not self._running:
                assert all(choice.finish for choice in self._choices), "the engine ended an answer without a reason"
                return []
            self._news.clear()
            await self._news.wait()
        batch, self._ready = self._ready, []
        self._room.set()
        return batch

    async def _read(self, choice: Choice) -> None:
        try:
            async with aclosing(self._engine.generate(choice.request)) as tokens:
                async for token in tokens:
                    delta = choice.add(token)
                    if delta is not None:
                        self._ready.append(delta)
                        self._news.set()
                    if choice.finish:
                        break
                    while len(self._ready) >= MAX_UNSENT:
                        self._room.clear()
                        await self._room.wait()
        except Exception as error:  # of any kind: the reader raises it where the response is made
            self._failure = self._failure or error
        finally:
            self._running -= 1
            self._news.set()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; if the client leaves first, cancel it, wait for its end, and raise ClientGone.

    The request body must have been read: after it ``receive`` has nothing to tell but that the client left.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
