"""Sets up the machines of a run with faults, runs it, and ends them whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

from dwarfstar_engine.bench import chaos, faults
from dwarfstar_engine.bench.machines import LocalNode, Machine, Network
from dwarfstar_engine.errors import DwarfStarError

T = TypeVar("T")

START_S = 120.0  # until all nodes serve, on a machine that has other work
CONTROL_PORT = 8477


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to run. nodes: besides the engine's own; local: started by the engine, which then is no node itself."""

    model: str
    nodes: int
    faults: int
    seed: int
    longest: int
    requests: int = 24  # different ones
    local: bool = False
    namespaces: bool = True
    haste: float = 1.0
    limit_s: float = 3600.0  # no strike begins later


def play(wanted: Wanted, folder: Path, rng: random.Random) -> tuple[chaos.Tally, str]:
    """A run and its report. Raises DwarfStarError if the machines do not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        network = Network(stack, wanted.namespaces and not wanted.local)
        machines: list[Machine] = []
        stack.callback(clear, machines)
        set_up(wanted, folder, network, machines)
        tally = inside(machines[0], lambda: _run(wanted, machines, rng, links=network.real))
        end(machines)
        chaos.check(machines, tally)
        return tally, chaos.report(tally, wanted.seed, chaos.log_lines(machines))


def set_up(wanted: Wanted, folder: Path, network: Network, machines: list[Machine]) -> None:
    """Start the engine's machine and those of the nodes, which join; each is in ``machines`` before it starts."""
    head = network.host(0)
    engine = Machine("head", head, folder / "head")
    room = ("--effective-vram", "1", "--threads", "1")  # each could hold the whole model: something is always left
    more = [*room, "--slots", str(chaos.STREAMS), "--context", "512", "--batching", "exact"]
    ports = ("--port", "0", "--control-port", str(CONTROL_PORT if network.real else 0))
    nodes = ("--local-nodes", str(wanted.nodes)) if wanted.local else ("--wait-nodes", str(wanted.nodes + 1))
    engine.arguments = ["--serve", wanted.model, "--control-host", head.address, *ports, *nodes, *more]
    machines.append(engine)
    engine.start()
    wait_announced(engine)
    numbers = range(1, wanted.nodes + 1)
    if wanted.local:
        machines += [LocalNode(f"node{n}", head, folder / f"node{n}", engine=engine) for n in numbers]
        return
    line = engine.ask("token").split()[1:]
    for number in numbers:
        machine = Machine(f"node{number}", network.host(number), folder / f"node{number}", [*line, *room])
        machines.append(machine)
        machine.start()


def api_url(engine: Machine) -> str:
    """Where its HTTP is."""
    told = json.loads((engine.home / "run" / "engine.json").read_text("utf-8"))
    return str(told["api_url"])


def inside(machine: Machine, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread whose sockets belong to that machine's host."""
    results: list[T] = []
    errors: list[BaseException] = []

    def go() -> None:
        try:
            machine.host.enter()
            results.append(work())
        except BaseException as error:  # told by the thread that asked
            errors.append(error)

    thread = threading.Thread(target=go, name="inside", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def wait_announced(engine: Machine) -> None:
    """Until it says where it is reached. Raises DwarfStarError."""
    _until(lambda: (engine.home / "run" / "engine.json").exists(), engine, "the engine runs")


def wait_serving(engine: Machine) -> None:
    """Until /health is good. Call it ``inside``. Raises DwarfStarError."""

    def serves() -> bool:
        try:
            return httpx.get(api_url(engine) + "/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    _until(serves, engine, "the engine serves")


def _run(wanted: Wanted, machines: list[Machine], rng: random.Random, *, links: bool) -> chaos.Tally:
    wait_serving(machines[0])
    own = not wanted.local
    strikes = faults.strikes(rng, wanted.faults, wanted.nodes, links=links, own=own, haste=wanted.haste)
    work = chaos.run(
        machines,
        api_url(machines[0]),
        strikes,
        wanted.seed,
        requests=wanted.requests,
        longest=wanted.longest,
        limit_s=wanted.limit_s,
    )
    return asyncio.run(work)


def _until(look: Callable[[], bool], engine: Machine, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not look():
        if time.monotonic() > deadline or not engine.running:
            said = engine.log.read_text("utf-8", "replace")[-2000:] if engine.log.exists() else ""
            raise DwarfStarError(f"{what}: not within {START_S:.0f} s; it said: {said}")
        time.sleep(0.1)


def end(machines: list[Machine]) -> None:
    """End all commands, the engine last."""
    for machine in machines[::-1]:
        machine.end()


def clear(machines: list[Machine]) -> None:
    """End all commands and whatever outlives them."""
    end(machines)
    for machine in machines:
        machine.leftovers()
