"""An emulated network: machines with a link of a given delay and rate between each two (Linux, root).

The first machine is this one, with the coordinator or llama-server, the first stage or RPC worker, and the load client;
each other is a network namespace. All have a TUN device, and ``forwarder.cpp``, built
when it is needed, carries packets between them: it delays them without looking into them, so it is the same for every
protocol. Addresses are of 198.18.0.0/15, which RFC 2544 keeps for benchmarks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dwarfstar_engine.bench.peers import running
from dwarfstar_engine.bench.stats import median
from dwarfstar_engine.errors import SettingsError

NET = "198.18"
COMMAND_S = 60.0
ECHO_PORT = 7007
ECHOES = 200
BULK_S = 0.5  # the link is filled for so long
CHUNK = bytes(1 << 16)
Machine = tuple[str, tuple[str, ...]]  # address, words before a command that run it there


@dataclass(frozen=True, slots=True)
class Link:
    """delay_ms: one way; mbit: of each machine's sender."""

    delay_ms: float
    mbit: float


def usable() -> None:
    """Raises SettingsError that says what is missing."""
    missing = [tool for tool in ("ip", "c++") if shutil.which(tool) is None]
    if not sys.platform.startswith("linux") or not Path("/dev/net/tun").exists():
        raise SettingsError("--link-delay and --link-mbit need Linux with /dev/net/tun: leave them out here")
    if os.geteuid() != 0:
        raise SettingsError("--link-delay and --link-mbit make network namespaces: run as root, or leave them out")
    if missing:
        raise SettingsError(f"--link-delay and --link-mbit need {' and '.join(missing)}: install, or leave them out")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_S, check=False)  # noqa: S607
    if done.returncode:
        raise SettingsError(f"`ip {' '.join(arguments)}` failed ({done.stderr.strip()}): leave --link-delay out here")


@contextlib.contextmanager
def network(link: Link, machines: int, folder: Path) -> Iterator[list[Machine]]:
    """The machines, this one first, until the end of the block. Raises SettingsError."""
    usable()
    program = folder / "forwarder"
    source = Path(__file__).with_name("forwarder.cpp")
    build = ["c++", "-std=c++17", "-O2", "-o", str(program), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode:
        raise SettingsError(f"the forwarder does not compile: {done.stderr[-500:].strip()}")
    mark = uuid.uuid4().hex[:6]
    net = f"{NET}.{int(mark[:2], 16)}"  # two benchmarks at the same time must not meet
    devices = [f"ds{mark}{index}" for index in range(machines)]
    command = [str(program), str(round(link.delay_ms * 1000)), str(link.mbit), *devices]
    with contextlib.ExitStack() as stack:
        spaces = [f"ds-{mark}-{index}" for index in range(1, machines)]
        for name in spaces:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        log = folder / "forwarder.log"
        process = stack.enter_context(running(command, log, pipes=True))
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise SettingsError(f"no emulated network: {log.read_text('utf-8', 'replace').strip()}")
        found: list[Machine] = []
        for index, (device, space) in enumerate(zip(devices, ["", *spaces], strict=True)):
            inside = ("-n", space) if space else ()
            if space:
                _ip("link", "set", device, "netns", space)
                _ip(*inside, "link", "set", "lo", "up")
            host = f"{net}.{index + 1}"
            _ip(*inside, "address", "add", f"{host}/24", "dev", device)
            _ip(*inside, "link", "set", device, "up")
            found.append((host, ("ip", "netns", "exec", space) if space else ()))
        yield found


def describe(link: Link, far: Machine, folder: Path) -> str:
    """What was asked for, and what it measures between this machine and another."""
    host, prefix = far
    said = f"{link.delay_ms:g} ms one way and {link.mbit:g} Mbit/s between machines"
    with running([*prefix, sys.executable, "-m", __name__, host], folder / "echo.log"):
        rtt_ms, mbit = _measure(host)
    return f"{said}; measured by TCP: {rtt_ms:.2f} ms there and back, {mbit:.0f} Mbit/s"


def _measure(host: str) -> tuple[float, float]:
    """Round trip of one byte, ms, and Mbit/s of a filled link."""
    deadline = time.monotonic() + COMMAND_S
    while True:
        try:
            connection = socket.create_connection((host, ECHO_PORT), timeout=5.0)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise SettingsError("the emulated network carries nothing: leave --link-delay out here") from None
            time.sleep(0.05)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ECHOES):
            begin = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            trips.append(time.perf_counter() - begin)
        begin, sent = time.perf_counter(), 0
        while time.perf_counter() - begin < BULK_S:
            connection.sendall(CHUNK)
            sent += len(CHUNK)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(COMMAND_S)
        connection.recv(1)
        return 1000 * median(trips), sent * 8e-6 / (time.perf_counter() - begin)


def echo(host: str) -> None:
    """The other end of ``_measure``: sends ECHOES bytes back, swallows the rest, then sends one."""
    with socket.create_server((host, ECHO_PORT)) as server:
        connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ECHOES):
            connection.sendall(connection.recv(1))
        while connection.recv(len(CHUNK)):
            pass
        connection.sendall(b"x")


def main(arguments: Sequence[str]) -> None:
    echo(arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
