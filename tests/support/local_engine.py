"""One engine with its nodes on this machine, for benchmarks that change its plan: started, asked, loaded, ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dwarfstar_engine.bench.arena import wait_announced, wait_serving
from dwarfstar_engine.bench.client import Load, load
from dwarfstar_engine.bench.machines import Host, Machine
from dwarfstar_engine.bench.peers import LOOPBACK
from dwarfstar_engine.bench.prompts import Prompts, tokenizer
from dwarfstar_engine.bench.scenarios import ask
from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.views import CommitView, PlanRequest, ProposalView, StatusView

MIB = 1 << 20
SMAPS = ("Rss", "Pss", "Anonymous")  # of smaps_rollup, that are read


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to run. cuts: that it starts with. more: of the command line."""

    model: str
    nodes: int
    cuts: tuple[int, ...]
    slots: int = 8
    context: int = 1024
    more: tuple[str, ...] = ()


@dataclass(slots=True)
class LocalEngine:
    """A running engine, seen by its own command line's calls."""

    home: Path
    port: int
    pid: int
    _prompts: Prompts = field(init=False)

    def __post_init__(self) -> None:
        self._prompts = Prompts(tokenizer(self.url))

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def log(self) -> Path:
        return self.home.with_name(self.home.name + ".log")

    def _running(self) -> running.Running:
        return running.require(self.home)

    def status(self) -> StatusView:
        return remote.status(self._running(), self.home)

    def plan(self, cuts: tuple[int, ...]) -> ProposalView:
        """What it says of these cuts, and of those that run."""
        return remote.plan(self._running(), self.home, self._request(cuts))

    def commit(self, cuts: tuple[int, ...]) -> CommitView:
        return remote.commit(self._running(), self.home, self._request(cuts), 0)

    def _request(self, cuts: tuple[int, ...]) -> PlanRequest:
        """On the nodes in the order of their numbers: of equal ones the same get the same."""
        return PlanRequest(cuts=cuts, order=tuple(f"node{n + 1}" for n in range(len(cuts) + 1)))

    def decode(self, streams: int, prompt_tokens: int, tokens: int) -> Load:
        """So many greedy answers at once, to prompts that no cache has seen."""
        asks = [ask(self._prompts.unique(prompt_tokens), tokens, cache_prompt=False) for _ in range(streams)]
        return load(LOOPBACK, self.port, asks)


@contextlib.contextmanager
def engine(wanted: Wanted, folder: Path) -> Iterator[LocalEngine]:
    """An engine that serves, until the end of the block. Raises DwarfStarError if it does not come up."""
    machine = Machine("local", Host("", LOOPBACK), folder / "engine")
    machine.arguments = ["--serve", wanted.model, "--port", "0", "--control-port", "0"]
    machine.arguments += ["--local-nodes", str(wanted.nodes), "--threads", "1", "--slots", str(wanted.slots)]
    machine.arguments += ["--context", str(wanted.context), "--speculation", "off", "--replan", "off"]
    if wanted.cuts:
        machine.arguments += ["--cuts", ",".join(map(str, wanted.cuts))]
    machine.arguments += wanted.more
    try:
        machine.start()
        wait_announced(machine)
        wait_serving(machine)
        told = running.require(machine.home)
        yield LocalEngine(machine.home, int(told.api_url.rpartition(":")[2]), told.pid)
    finally:
        machine.end()
        machine.leftovers()


def memory_mib(pid: int) -> dict[str, float]:
    """What a process takes: all of it, its share of what several have, and what is of no file. Linux only."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()[1:])
    found = {words[0].rstrip(":"): int(words[1]) * 1024 / MIB for words in lines}
    return {name: round(found[name], 2) for name in SMAPS}
