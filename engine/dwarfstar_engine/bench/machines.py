"""Machines for a run with faults: real processes, each machine a network namespace where these are permitted.

All processes of a machine carry an environment variable with a mark of its own, so they are found by what they are,
also those whose parent was killed. Without namespaces all machines share this one's loopback and no link can be cut.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.stage.pipe import STAGE_NAME

PROGRAM = (sys.executable, "-m", "dwarfstar_engine.cli.main")
MARK = "DS_MACHINE_OF_A_RUN"  # not of DWARFSTAR_: it is no setting
END_S = 20.0  # a process that is asked to end may take so long
IP_S = 10.0
CLONE_NEWNET = 0x40000000
STAGE = "dwarfstar_engine.stage.main"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=IP_S)  # noqa: S607


class Network:
    """A switch and hosts on it, each a network namespace; or nothing, if that is not permitted (``real``)."""

    def __init__(self, stack: contextlib.ExitStack, wanted: bool = True) -> None:
        self._mark, self._stack = uuid.uuid4().hex[:6], stack
        self._switch = f"ds-{self._mark}-net"
        self.real = wanted and shutil.which("ip") is not None and self._open()

    def _open(self) -> bool:
        try:
            _ip("netns", "add", self._switch)
            self._stack.callback(_ip, "netns", "delete", self._switch)
            _ip("-n", self._switch, "link", "add", "trunk", "type", "veth", "peer", "stub")
            for device in ("trunk", "stub"):
                _ip("-n", self._switch, "link", "set", device, "up")
            _ip("-n", self._switch, "link", "add", "link", "trunk", "name", "probe", "type", "macvlan")
        except (OSError, subprocess.SubprocessError):
            return False
        return True

    def host(self, index: int) -> Host:
        """A host of its own; without namespaces, this one."""
        if not self.real:
            return Host("", "127.0.0.1")
        space, card, address = f"ds-{self._mark}-{index}", f"c{self._mark}{index}", f"10.213.9.{index + 1}"
        _ip("netns", "add", space)
        self._stack.callback(_ip, "netns", "delete", space)
        _ip("-n", self._switch, "link", "add", "link", "trunk", "name", card, "type", "macvlan", "mode", "bridge")
        _ip("-n", self._switch, "link", "set", card, "netns", space)
        _ip("-n", space, "link", "set", card, "name", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        return Host(space, address)


@dataclass(frozen=True, slots=True)
class Host:
    """space: its network namespace; empty: none."""

    space: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """Words that run a command there."""
        return ["ip", "netns", "exec", self.space] if self.space else []

    def link(self, *, up: bool) -> None:
        """Plug its cable, or pull it."""
        _ip("-n", self.space, "link", "set", "eth0", "up" if up else "down")

    def deaf(self, others: Sequence[str], *, on: bool) -> None:
        """Drop what it sends to ``others``; what they send still comes."""
        for other in others:
            _ip("-n", self.space, "route", "add" if on else "delete", "blackhole", other)

    def enter(self) -> None:
        """Have this thread's new sockets belong to that host."""
        if self.space:
            with Path("/run/netns", self.space).open("rb") as space:
                if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")


@dataclass(slots=True)
class Machine:
    """A host with one DwarfStar command on it, which may be ended and started again. ``arguments``: of the command."""

    name: str
    host: Host
    home: Path
    arguments: list[str] = field(default_factory=list)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.home.with_name(self.home.name + ".log")

    def _environment(self) -> dict[str, str]:
        """Without settings of this process's own environment. Nothing is told to the network."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("DWARFSTAR_")}
        return {**kept, "DWARFSTAR_DISCOVERY": "false", "DWARFSTAR_NAME": self.name, MARK: self.mark}

    def start(self) -> None:
        """Start the command, unless it runs."""
        if self.process is not None and self.process.poll() is None:
            return
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*self.host.prefix, *PROGRAM, *self.arguments, "--home", str(self.home)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment(),
                start_new_session=True,
            )

    def ask(self, *arguments: str) -> str:
        """What a command that ends says on this machine. Raises DwarfStarError."""
        done = subprocess.run(
            [*self.host.prefix, *PROGRAM, *arguments, "--home", str(self.home)],
            capture_output=True,
            text=True,
            timeout=60.0,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise DwarfStarError(f"`dwarfstar {arguments[0]}` failed: {done.stderr.strip()}")
        return done.stdout

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """Every process of this machine that lives."""
        return [process for process in psutil.process_iter() if self._ours(process)]

    def _ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False

    def stages(self) -> list[int]:
        """Its stages' processes, but for the one that waits to become one. On the engine's machine: of its own node."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if STAGE in process.cmdline() and process.name() == STAGE_NAME:
                    found.append(process.pid)
        return found

    def tidy(self) -> bool:
        """Whether a node's processes are a daemon, a stage, and at most one that waits to become one."""
        return len(self.stages()) == 1 and len(self.family()) <= 3

    def wait(self) -> None:
        """Until the command has ended; killed after END_S."""
        assert self.process is not None
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_S)

    def end(self) -> None:
        """Ask the command to end, and wait for that."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.wait()

    def leftovers(self) -> list[int]:
        """Processes that outlive their command by END_S; they are killed."""
        deadline = time.monotonic() + END_S
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return [process.pid for process in left]


@dataclass(slots=True)
class LocalNode(Machine):
    """A node process that an engine keeps running itself: nobody else starts it again. ``engine``: its machine."""

    engine: Machine | None = None

    def start(self) -> None:
        return

    @property
    def pid(self) -> int:
        """0: it does not run at this moment."""
        assert self.engine is not None
        for process in self.engine.family():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "--parent" in line and line[line.index("--name") + 1] == self.name:
                    return process.pid
        return 0

    @property
    def running(self) -> bool:
        return self.pid != 0

    def family(self) -> list[psutil.Process]:
        try:
            node = psutil.Process(self.pid)
            return [node, *node.children()] if node.pid else []
        except psutil.Error:
            return []

    def wait(self) -> None:
        return


def signalled(pid: int, number: signal.Signals) -> bool:
    """Whether there was such a process to signal; 0 is none."""
    try:
        if not pid:
            return False
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
