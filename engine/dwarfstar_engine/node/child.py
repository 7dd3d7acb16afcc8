"""A child process of a daemon: started, spoken to over a pipe, watched, ended. See ``stage.pipe`` for the other end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from dwarfstar_engine.stage.pipe import MAX_LINE_BYTES

log = logging.getLogger("dwarfstar.child")

KILL_AFTER_S = 2.0  # a child that ignores the end of its stdin for so long is killed
STDERR_LINES = 20  # the last words of a child, for the message that reports its death


class Child:
    """One running child. ``on_event`` gets each event; ``on_exit`` is called once, with the exit status. Both may be
    set later, as long as the child says nothing: before it was told anything."""

    def __init__(
        self,
        module: str,
        on_event: Callable[[dict[str, Any]], None] = lambda _: None,
        on_exit: Callable[[int], None] | None = None,
    ) -> None:
        self._module, self.on_event, self.on_exit = module, on_event, on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.last_words: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the child. Raises OSError if the system refuses."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # Ctrl-C in a terminal is for the parent alone
        )
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._listen())]
        self._watcher = asyncio.create_task(self._watch())

    def send(self, **command: Any) -> None:
        """Send one command. To a dead child it goes nowhere: ``on_exit`` tells."""
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self.on_event(json.loads(line))

    async def _listen(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        while line := await self._process.stderr.readline():
            text = line.decode("utf-8", "replace").rstrip()
            self.last_words = [*self.last_words[1 - STDERR_LINES :], text]
            log.info("%s[%d] %s", self._module.rsplit(".", 1)[-1], self.pid, text)

    async def _watch(self) -> None:
        assert self._process is not None
        status = await self._process.wait()
        if self.on_exit is not None:
            self.on_exit(status)

    def kill(self) -> None:
        """End the child by force; ``on_exit`` tells when it is gone."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self) -> None:
        """End the child: its stdin closes, and after KILL_AFTER_S it is killed. Idempotent."""
        process = self._process
        if process is None:
            return
        self.on_exit = None
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode is None:
            try:
                async with asyncio.timeout(KILL_AFTER_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        await asyncio.gather(*self._tasks, self._watcher, return_exceptions=True)
