"""What leaves a stage over the hop to the next one: new frames, replays that go on, and rows that are sent again.

A replay ends at the last stage that has lost its rows: what is left of it goes on without them, or nothing, where
nobody waits for an answer. A frame that asks for rows follows them, so its answer says that they have arrived. Each
ring has an outlet of its own; the record is the stage's, and goes from ring to ring.

Results of rows that go on by themselves need no answer, so those of several lanes wait for each other (``held``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from dwarfstar_engine.stage.held import HOLD_S, Held
from dwarfstar_engine.stage.record import Record
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import Resend
from dwarfstar_engine.wire.ring import RingSender


class Outlet:
    """See the module. record: None on the last stage, and where nothing is kept. on_done: sees each task's end."""

    def __init__(
        self, sender: RingSender, record: Record | None, epoch: int, on_done: Callable[[asyncio.Task[None]], None]
    ) -> None:
        self._sender, self._record, self._epoch, self._on_done = sender, record, epoch, on_done
        self._tasks: set[asyncio.Task[None]] = set()
        self._held = Held()
        self._letting_go: asyncio.TimerHandle | None = None
        self._turn = asyncio.Lock()  # held by who sends rows again: a slot's are asked for in pieces, in their order

    def pass_on(self, data: bytes, out: bytes, asked: Sequence[Resend]) -> None:
        """Queue what the stage made of ``data``; ``flush`` sends it. asked: what is to be sent before it."""
        if self._record is not None:
            self._record.note(out)
        if frames.is_replay(data) and not frames.is_replay(out) and not frames.is_fault(out):
            if frames.is_unasked(data):
                return
            if frames.is_step(out):
                out = frames.without_rows(out)
        if asked:
            self._spawn(self._resend(asked, out))
        else:
            self._send(out)

    def pass_on_later(self, result: bytes) -> None:
        """Queue a result whose rows went on without the coordinator, now or together with the next ones."""
        if self._held.add(result, time.monotonic()):
            self._send()
        elif self._letting_go is None:
            self._letting_go = asyncio.get_running_loop().call_later(HOLD_S, self._let_go)

    def _send(self, *frame: bytes) -> None:
        """Queue what waited, and a frame behind it."""
        if self._letting_go is not None:
            self._letting_go.cancel()
            self._letting_go = None
        for one in (*self._held.take(), *frame):  # the sender joins results
            self._sender.send(one)

    def _let_go(self) -> None:
        self._send()
        self.flush_soon()

    async def flush(self) -> None:
        await self._sender.flush()

    def flush_soon(self) -> None:
        self._spawn(self._sender.flush())

    def release(self) -> None:
        """Let the next ring have the connection."""
        if self._letting_go is not None:
            self._letting_go.cancel()
        self._sender.release()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sender.close()

    async def _resend(self, asked: Sequence[Resend], out: bytes) -> None:
        prompt, record = frames.is_prompt(out), self._record
        async with self._turn:
            for op in asked if record is not None else ():
                assert record is not None
                stages = op.until - op.stage - 1
                for frame in record.again(self._epoch, op.slot, op.begin, op.end, prompt=prompt, stages=stages):
                    await self._sender.put(frames.encode(frame))
            await self._sender.put(out)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._on_done)
