"""A whole DwarfStar engine for a test: started in a home of its own on free ports, watched, and always ended.

Every process of an engine, however far down, inherits an environment variable with an id nobody else has. So its
processes are found by what they are rather than by who started them: also those whose parent was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import psutil

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.views import EventView, NodeView, StageView, StatusView

T = TypeVar("T")

TAG = "ENGINE_PROCESS_TEST"  # the environment variable
DEADLINE_S = 60.0  # for anything an engine does within seconds; generous, as test machines are shared
POLL_S = 0.05
PROGRAM = (sys.executable, "-m", "dwarfstar_engine.cli.main")


def until(look: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first true answer of ``look``. Fails with ``what`` when the deadline is over."""
    end = time.monotonic() + deadline_s
    while True:
        if found := look():
            return found
        assert time.monotonic() < end, f"{what}: not within {deadline_s:.0f} s"
        time.sleep(POLL_S)


def environment(**more: str) -> dict[str, str]:
    """This process's environment without DwarfStar's own variables, which would change what is tested.

    Discovery is off: a test tells nothing to the network of the machine it runs on.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DWARFSTAR_")}
    return {**kept, "DWARFSTAR_DISCOVERY": "false", **more}


def command(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``dwarfstar`` with ``arguments`` to its end."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment(**variables),
        check=False,
    )


class EngineProcess:
    """A context manager: on leaving it no process of the engine is left. ``home`` must be an empty or absent folder."""

    def __init__(self, home: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
        self.home, self._arguments = home, arguments
        self._tag = uuid.uuid4().hex
        self._variables = dict(variables or {})
        self._output = home.with_name(home.name + ".out")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._output.open("wb") as out:
            self._process = subprocess.Popen(
                [*PROGRAM, "--serve", *self._arguments, "--home", str(self.home), "--port", "0", "--control-port", "0"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment(**self._variables, **{TAG: self._tag}),
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        for process in self.processes():
            self._signal(process, signal.SIGCONT)
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DEADLINE_S / 4)
        finally:
            left = self.processes()
            for process in left:
                self._signal(process, signal.SIGKILL)
            self._process.wait(DEADLINE_S)
            psutil.wait_procs(left, DEADLINE_S)

    @staticmethod
    def _signal(process: psutil.Process, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)

    # --- what runs ---

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the engine's own process is gone."""
        assert self._process is not None
        return self._process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Every process of this engine that lives now."""
        return [process for process in psutil.process_iter() if self._ours(process)]

    def _ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(TAG) == self._tag and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False

    def node_pid(self, name: str) -> int:
        """The process of a local node."""
        for process in self.processes():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if "node" in line and "--name" in line and line[line.index("--name") + 1] == name:
                return process.pid
        raise AssertionError(f"{name} does not run")

    def stage(self, index: int) -> StageView:
        return self.status().stages[index]

    def events(self, kind: str) -> list[EventView]:
        """Those of a kind, so far."""
        batches = remote.events(running.require(self.home), self.home, 0, follow=False)
        return [event for batch in batches for event in batch.events if event.kind == kind]

    def node(self, name: str) -> NodeView | None:
        return next((node for node in self.status().nodes if node.name == name), None)

    # --- talking to it ---

    @property
    def output(self) -> str:
        """All it has printed so far."""
        return self._output.read_text("utf-8", "replace")

    @property
    def url(self) -> str:
        return running.require(self.home).api_url

    def status(self) -> StatusView:
        return remote.status(running.require(self.home), self.home)

    def health(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body of /health; 0 while nothing answers."""
        try:
            answer = httpx.get(self.url + "/health", timeout=DEADLINE_S)
            return answer.status_code, answer.json()
        except (DwarfStarError, httpx.HTTPError):
            return 0, {}

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=DEADLINE_S, **more)

    def wait_serving(self) -> Self:
        """Until /health is good. Fails with the engine's output if it ends or does not come up."""

        def serves() -> bool:
            assert self._process is not None and self._process.poll() is None, f"the engine ended: {self.output}"
            return self.health()[0] == 200

        try:
            until(serves, "the engine serves")
        except AssertionError as error:
            raise AssertionError(f"{error}; its output: {self.output[-3000:]}") from None
        return self

    def wait_gone(self) -> None:
        """Until no process of the engine is left."""
        until(lambda: not self.processes(), "every process of the engine ends")

    def wait_idle(self) -> None:
        """Until no request is active or queued."""

        def idle() -> bool:
            throughput = self.status().throughput
            return throughput.active == throughput.queued == 0

        until(idle, "the engine is idle")

    def end(self) -> int:
        """The exit status of the engine's process, once it has ended."""
        assert self._process is not None
        return self._process.wait(DEADLINE_S)

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal one process of this engine, and no other."""
        assert pid in [process.pid for process in self.processes()], f"{pid} is not ours"
        os.kill(pid, number)
