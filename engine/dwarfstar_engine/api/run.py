"""Running the choices of one request, side by side, for a client that may leave and for a limited time.

The engine pushes tokens, from the event loop. A token is turned into a delta where it arrives, which costs a few
microseconds, so a stop string ends its generation at once, whatever the client is doing. One task takes all deltas that
are ready: it is woken once however many there are, so a token costs one task switch at most and several are one write.
While that task waits, ``at_once`` may take a delta instead, and nobody is woken.

Bound. Deltas not yet taken are as many as the answer may have tokens, which the context bounds: a client that reads
slowly does not hold up the engine, whose slot would be idle meanwhile. The time limit bounds how long they are held.

Invariant: whatever way a request ends (done, stop string, error, refusal, client gone, time over, cancelled), every
generation has finished or been cancelled before :class:`Run` is left, and one that fails cancels its siblings at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from starlette.types import Receive

from dwarfstar_engine.api.choice import Choice, Delta
from dwarfstar_engine.api.errors import ClientGone, RequestTimedOut
from dwarfstar_engine.serving import Engine, Generation, Token

log = logging.getLogger(__name__)

T = TypeVar("T")


class Run:
    """``with Run(engine, choices) as run``, then :meth:`deltas` until it is empty.

    Entering raises what the engine refuses a request with; then nothing is left running, as if none had been taken.
    at_once: takes a delta where it arrives, unless it is a choice's last or others wait; False: it does not want it.
    """

    def __init__(self, engine: Engine, choices: Sequence[Choice]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._answers = [_Answer(self, choice) for choice in choices]
        self._running = len(choices)
        self._ready: list[Delta] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.at_once: Callable[[Delta], bool] = _never

    def __enter__(self) -> Self:
        try:
            for answer in self._answers:
                answer.begin(self._engine)
        except BaseException:
            self._cancel()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    async def deltas(self) -> list[Delta]:
        """All deltas ready now, in order, waiting for one; empty when all choices are done.

        Raises the first error of any choice, after the deltas that came before it.
        """
        while not self._ready:
            if self._failure is not None:
                raise self._failure
            if not self._running:
                return []
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        batch, self._ready = self._ready, []
        return batch

    def add(self, delta: Delta) -> None:
        waiter = self._waiter
        if delta.finish is not None:
            self._running -= 1
        elif waiter is not None and not waiter.done() and self.at_once(delta):
            return
        self._ready.append(delta)
        self._wake()

    def fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            self._cancel()
            self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _cancel(self) -> None:
        for answer in self._answers:
            answer.cancel()


def _never(delta: Delta) -> bool:
    return False


class _Answer:
    """The sink of one choice, and its generation until that is over."""

    __slots__ = ("_choice", "_generation", "_over", "_run")

    def __init__(self, run: Run, choice: Choice) -> None:
        self._run = run
        self._choice = choice
        self._generation: Generation | None = None
        self._over = False

    def begin(self, engine: Engine) -> None:
        if self._over:
            return  # a sibling failed as soon as it was begun
        generation = engine.generate(self._choice.request, self)
        if self._over:
            generation.cancel()  # tokens may come before this line does
        else:
            self._generation = generation

    def put(self, token: Token) -> None:
        try:
            delta = self._choice.add(token)
            if delta is not None:
                if token.finish is not None:
                    self._forget()
                elif delta.finish is not None:
                    self.cancel()  # by a stop string, of which the engine knows nothing
                self._run.add(delta)
        except Exception as error:  # of any kind: a sink must not raise, and the client must hear of it
            log.exception("an answer failed")
            self.cancel()
            self._run.fail(error)

    def fail(self, error: Exception) -> None:
        self._forget()
        self._run.fail(error)

    def cancel(self) -> None:
        generation = self._generation
        self._forget()
        if generation is not None:
            generation.cancel()

    def _forget(self) -> None:
        self._over = True
        self._generation = None


class Deadline(NamedTuple):
    """Until when a request may take: ``at`` on the event loop's clock, ``limit_s`` after it began."""

    at: float
    limit_s: float


async def unless_over(receive: Receive, deadline: Deadline, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; if the client leaves or the time is over first, cancel it, wait for its end, and raise
    ClientGone or RequestTimedOut.

    The request body must have been read: after it ``receive`` has nothing to tell but that the client left.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        left_s = deadline.at - asyncio.get_running_loop().time()
        await asyncio.wait({task, watcher}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.done():
            raise ClientGone
        raise RequestTimedOut(
            f"the request took longer than its limit of {deadline.limit_s:g} s: ask for fewer tokens or for more time, "
            "or raise request_timeout_s on the server"
        )
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
