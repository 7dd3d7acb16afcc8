"""What is measured: DwarfStar itself, llama.cpp's own servers, and the reference process. Started here, ended here.

A peer answers ``load``. All run at the same time and idle while another is measured, so that they can alternate run by
run. Peers of llama.cpp get what is best for them: one thread for each core they have, every core of the machine for
the head that computes nothing, and no host-memory prompt cache, which would copy states in the middle of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

import httpx
import psutil

from dwarfstar_engine.bench import client
from dwarfstar_engine.bench.client import Answer, Ask, Load
from dwarfstar_engine.errors import DwarfStarError, SettingsError

START_DEADLINE_S = 180.0  # a large model is read from disk
STOP_S = 15.0
LAST_WORDS = 2000  # characters of a log that an error shows
ENGINE = (sys.executable, "-m", "dwarfstar_engine.cli.main")
WHOLE = (sys.executable, "-m", "dwarfstar_engine.stage.whole")
LOOPBACK = "127.0.0.1"
SERVER, WORKER = PROGRAMS = ("llama-server", "ggml-rpc-server")

SPLIT, SPLIT_OFF = "split", "split-off"  # as a user runs it; with speculation off
UNSPLIT, ALL_CORES, RPC = "unsplit", "all-cores", "rpc"  # llama-server: on one core, on all, over RPC workers
REFERENCE = "reference"
OURS = (SPLIT, SPLIT_OFF)


class Peer(Protocol):
    """Something that generates. name: one of those above; head_pid: the process that serves HTTP, 0 if none does."""

    @property
    def name(self) -> str: ...

    @property
    def head_pid(self) -> int: ...

    def load(self, asks: Sequence[Ask]) -> Load:
        """Send requests together. Raises DwarfStarError."""
        ...


@dataclass(frozen=True, slots=True)
class HttpPeer:
    """A server. extra: fields that every request to it gets. lingers: processes that, they or what they started, may
    be at work for a while after their last answer."""

    name: str
    port: int
    head_pid: int
    home: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    lingers: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def load(self, asks: Sequence[Ask]) -> Load:
        # An ask's own fields win: a scenario may want the cache that is off otherwise.
        return client.load(
            LOOPBACK, self.port, [Ask(ask.path, {**self.extra, **ask.body}, ask.after_blocks) for ask in asks]
        )


@dataclass(frozen=True, slots=True)
class Reference:
    """The unsplit model on llama.cpp's library, one thread, no HTTP: what there is without peers. One stream only."""

    process: subprocess.Popen[bytes]
    url: str  # who turns ids into text
    name: str = REFERENCE
    head_pid: int = 0

    def load(self, asks: Sequence[Ask]) -> Load:
        (ask,) = asks
        sent = time.perf_counter()
        event = self.ask(prompt=ask.body["prompt"], count=ask.body["max_tokens"])
        times = tuple(sent + after_s for after_s in event["times"])
        answer = httpx.post(f"{self.url}/detokenize", json={"tokens": event["tokens"]}, timeout=START_DEADLINE_S)
        return Load((Answer(sent, times, times[-1], len(times), answer.json()["content"]),), 0.0)

    def ask(self, **command: Any) -> dict[str, Any]:
        """One command and its event. Raises DwarfStarError."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the empty answer below tells
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise DwarfStarError("the unsplit reference process ended: does the model fit into memory twice?")
        return cast(dict[str, Any], json.loads(line))


@dataclass(frozen=True, slots=True)
class Shape:
    """What all peers have in common. context: tokens of one request; cuts: empty for the planner's own."""

    model: str
    nodes: int
    cuts: tuple[int, ...] = ()
    slots: int = 8
    context: int = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage or RPC worker runs. prefix: words before a command, which take it onto another machine."""

    host: str
    core: int | None
    prefix: tuple[str, ...] = ()


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def here(nodes: int) -> list[Place]:
    """A place for each node on this machine, with a core of its own where there are enough."""
    free = cores()
    pinned: Sequence[int | None] = free[:nodes] if len(free) >= nodes else [None] * nodes
    return [Place(LOOPBACK, core) for core in pinned]


# --- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path | IO[bytes], core: int | None = None, pipes: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A process until the end of the block, on one core if that is given."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("wb")) if isinstance(log, Path) else log
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else out,
            stderr=out,
            env={key: value for key, value in os.environ.items() if not key.startswith(("DWARFSTAR_", "LLAMA_ARG_"))},
        )
        try:
            if core is not None:
                psutil.Process(process.pid).cpu_affinity([core])  # before it starts threads
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _wait(process: subprocess.Popen[bytes], log: Path, ready: Any, what: str) -> Any:
    """The first true answer of ``ready``. Raises DwarfStarError with the process's last words."""
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError, httpx.HTTPError):
            if found := ready():
                return found
        time.sleep(0.1)
    raise DwarfStarError(f"{what} did not come up: {log.read_text('utf-8', 'replace')[-LAST_WORDS:].strip()}")


def _healthy(url: str) -> bool:
    return httpx.get(f"{url}/health", timeout=5.0).status_code == 200


def _free_port(host: str = LOOPBACK) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


# --- DwarfStar -------------------------------------------------------------------------------------------------------


def has_speculation() -> bool:
    """Whether this engine can draft tokens."""
    said = subprocess.run([*ENGINE, "--serve", "--help"], capture_output=True, text=True, timeout=60, check=False)
    return "--speculation" in said.stdout


@contextlib.contextmanager
def dwarfstar(name: str, shape: Shape, places: Sequence[Place], folder: Path) -> Iterator[HttpPeer]:
    """An engine. Its nodes are local processes, or join from the machines the places are on."""
    home = folder / name
    home.mkdir()
    log = home / "engine.log"
    far = [place for place in places if place.prefix]
    command = [*ENGINE, "--serve", shape.model, "--home", str(home), "--port", "0", "--threads", "1"]
    command += ["--local-nodes", str(len(places) - len(far)), "--pin", "--wait-nodes", str(len(places))]
    command += ["--slots", str(shape.slots), "--context", str(shape.context), "--no-discovery"]
    if far:  # the port to join at is the next one, so it must be known
        command += ["--control-host", places[0].host, "--control-port", str(_free_port(places[0].host))]
    else:
        command += ["--control-port", "0"]
    if shape.cuts:
        command += ["--cuts", ",".join(map(str, shape.cuts))]
    if name == SPLIT_OFF:
        command += ["--speculation", "off"]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(running(command, log))

        def announced() -> dict[str, Any]:
            return cast(dict[str, Any], json.loads((home / "run" / "engine.json").read_text()))

        engine = _wait(process, log, announced, "the split model")
        nodes = [stack.enter_context(_lent(home, index, place)) for index, place in enumerate(far)]
        url = str(engine["api_url"])
        _wait(process, log, lambda: _healthy(url), "the split model")
        pids = (process.pid, *(node.pid for node in nodes))
        yield HttpPeer(name, int(url.rpartition(":")[2]), int(engine["pid"]), home, lingers=pids)


@contextlib.contextmanager
def _lent(home: Path, index: int, place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """A node that joins from another machine."""
    made = subprocess.run(
        [*ENGINE, "token", "--home", str(home)], capture_output=True, text=True, timeout=60, check=False
    )
    if made.returncode:
        raise DwarfStarError(f"no join token: {made.stderr.strip()}")
    own = home.with_name(f"{home.name}-lent{index}")
    own.mkdir()
    command = [*place.prefix, *ENGINE, *made.stdout.split()[1:], "--home", str(own), "--threads", "1"]
    command += ["--name", f"lent{index}"]
    if place.core is not None:
        command += ["--cpus", str(place.core)]
    with running(command, own / "node.log") as process:
        yield process


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def program(folder: Path, name: str) -> str:
    path = folder / name
    if not path.is_file():
        raise SettingsError(f"{folder} has no {name}: build the peers with `python benchmarks/build_peers.py`")
    return str(path)


@contextlib.contextmanager
def llama_server(
    name: str, shape: Shape, folder: Path, peers: Path, *, threads: int, core: int | None, rpc: Sequence[str] = ()
) -> Iterator[HttpPeer]:
    """``llama-server``, its layers in this process or on RPC workers. Each slot has a whole context, as ours."""
    port, log = _free_port(), folder / f"llama-server-{name.replace(', ', '-').replace(' ', '-')}.log"
    command = [program(peers, SERVER), "-m", shape.model, "--host", LOOPBACK, "--port", str(port)]
    command += ["-np", str(shape.slots), "-c", str(shape.slots * shape.context), "-t", str(threads)]
    command += ["--cache-ram", "0"]
    if rpc:
        command += ["--rpc", ",".join(rpc), "-ngl", "99"]
    with running(command, log, core) as process:
        _wait(process, log, lambda: _healthy(f"http://{LOOPBACK}:{port}"), f"llama-server ({name})")
        yield HttpPeer(name, port, process.pid, extra={"cache_prompt": False})


@contextlib.contextmanager
def rpc_workers(places: Sequence[Place], folder: Path, peers: Path) -> Iterator[list[str]]:
    """An RPC worker at each place; gives their addresses."""
    with contextlib.ExitStack() as stack:
        addresses = []
        for index, place in enumerate(places):
            # On another machine every port is free, but only that machine could say so.
            port = 50052 if place.prefix else _free_port(place.host)
            log = folder / f"rpc-server-{index}.log"
            command = [*place.prefix, program(peers, WORKER), "-t", "1", "-H", place.host, "-p", str(port)]
            process = stack.enter_context(running(command, log, place.core))
            _wait(process, log, lambda at=(place.host, port): _open(at), "ggml-rpc-server")
            addresses.append(f"{place.host}:{port}")
        yield addresses


def _open(address: tuple[str, int]) -> bool:
    with socket.create_connection(address, timeout=5.0):
        return True


@contextlib.contextmanager
def reference(shape: Shape, folder: Path, url: str) -> Iterator[Reference]:
    """The reference process on one core."""
    with running(WHOLE, folder / "reference.log", pipes=True) as process:
        peer = Reference(process, url)
        peer.ask(path=shape.model, cpus=cores()[:1], context=shape.context, threads=1)
        yield peer
