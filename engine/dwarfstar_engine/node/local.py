"""A node process on the coordinator's own machine, started by it and started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("dwarfstar.local")

RESTART_S = (0.1, 0.5, 2.0, 5.0)  # pauses before a restart, by how many there were in a row; the last one repeats
STEADY_S = 30.0  # a node that lived so long is counted as new
KILL_AFTER_S = 4.0
LOG_BYTES = 1 << 20  # of node.log; the one before is kept as node.log.1
LOG_CHECK_S = 30.0


@dataclass(slots=True)
class LocalNode:
    """One such process. Its certificate lies in ``home`` already. cores: of this machine, though it may run on
    fewer. cpus: those for its stage; empty: any."""

    name: str
    home: Path
    coordinator: str
    threads: int
    models: Path
    effective_vram: str | None = None
    ram_gb_s: float = 0.0  # measured by whoever starts several of them
    cores: int = 0
    cpus: tuple[int, ...] = ()
    _keeper: asyncio.Task[None] | None = field(default=None, init=False)
    _process: asyncio.subprocess.Process | None = field(default=None, init=False)

    async def start(self) -> None:
        """Start it and keep it running."""
        self._process = await self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name=f"keep-{self.name}")

    async def _spawn(self) -> asyncio.subprocess.Process:
        arguments = ["node", "--attach", self.coordinator, "--home", str(self.home), "--name", self.name]
        arguments += ["--threads", str(self.threads), "--models", str(self.models), "--parent"]
        if self.effective_vram is not None:
            arguments.append(f"--effective-vram={self.effective_vram}")  # it may begin with a minus
        if self.ram_gb_s:
            arguments += ["--ram-gb-s", f"{self.ram_gb_s:.2f}"]
        if self.cores:
            arguments += ["--cores", str(self.cores)]
        if self.cpus:
            arguments += ["--cpus", ",".join(map(str, self.cpus))]
        self._trim_log()
        with self._log.open("ab") as out:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "dwarfstar_engine.cli.main",
                *arguments,
                stdin=asyncio.subprocess.PIPE,  # its end tells the node that we are gone
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for the engine; it ends its nodes in order
            )

    @property
    def _log(self) -> Path:
        return self.home / "node.log"

    def _trim_log(self) -> None:
        """Keep node.log bounded. The node appends, so it goes on at the start of the emptied file."""
        with contextlib.suppress(OSError):  # a log is not worth a node
            if self._log.stat().st_size > LOG_BYTES:
                self._log.with_suffix(".log.1").write_bytes(self._log.read_bytes()[-LOG_BYTES:])
                os.truncate(self._log, 0)

    async def _exit_status(self, process: asyncio.subprocess.Process) -> int:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOG_CHECK_S):
                    return await process.wait()
            self._trim_log()

    async def _keep(self) -> None:
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            assert self._process is not None
            started = loop.time()
            status = await self._exit_status(self._process)
            failures = 0 if loop.time() - started > STEADY_S else failures + 1
            pause = RESTART_S[min(failures, len(RESTART_S)) - 1] if failures else RESTART_S[0]
            log.warning(
                "local node %s ended with status %d: starting it again in %.1f s (its log: %s)",
                self.name,
                status,
                pause,
                self._log,
            )
            await asyncio.sleep(pause)
            try:
                self._process = await self._spawn()
            except OSError as error:  # no memory or processes left: it may pass
                log.error("local node %s cannot be started: %s", self.name, error.strerror)

    async def stop(self) -> None:
        """End it: politely, then by force. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()  # it ends at once: the engine ends, so its layers need not move
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            try:
                async with asyncio.timeout(KILL_AFTER_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
