"""Puts a benchmark together: starts the peers, makes them take turns, writes the report."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from dwarfstar_engine import __version__
from dwarfstar_engine.bench import link, peers, scenarios
from dwarfstar_engine.bench.peers import Peer, Place, Shape
from dwarfstar_engine.bench.prompts import Prompts, tokenizer
from dwarfstar_engine.bench.report import Report, Row
from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.views import StatusView

NO_PEERS = (
    "llama-server and its RPC backend are not measured: build them with `python benchmarks/build_peers.py` "
    "(about 3 minutes), then give --peers .cache/peers/bin"
)
BUSY = 0.5  # load average of a minute above which somebody else computes, too
LEAVABLE = (peers.UNSPLIT, peers.ALL_CORES, peers.RPC)
ONE_SENTENCE = "every figure is the median of runs in which the peers took turns; ratios are medians of each run's"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. peers: the folder of llama.cpp's servers; without: those left out.

    link: an emulated network between the machines.
    """

    shape: Shape
    runs: int = 5
    tokens: int = 96
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    peers: Path | None = None
    link: link.Link | None = None


def bench(plan: Plan, status: Callable[[Path], StatusView], say: Callable[[str], None]) -> Report:
    """Measure everything. ``status``: of the engine that runs from a home. Raises DwarfStarError."""
    speculation = peers.has_speculation()
    check(plan, speculation)
    if plan.peers is None:
        say(NO_PEERS)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > BUSY:
        say(f"the machine has other work (load {load:.1f}): the figures will suffer, and peers that spin most")
    wanted = list(scenarios.scenarios(plan.only, plan.shape.context, speculation))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="dwarfstar-bench-")))
        places, network = peers.here(plan.shape.nodes), ""
        if plan.link is not None:
            net = stack.enter_context(link.network(plan.link, plan.shape.nodes, folder))
            places = [
                replace(place, host=host, prefix=prefix) for place, (host, prefix) in zip(places, net, strict=True)
            ]
            network = link.describe(plan.link, net[-1], folder)
        there = list(_start(plan, wanted, places, folder, stack, say))
        split = next(peer for peer in there if isinstance(peer, peers.HttpPeer) and peer.home is not None)
        lab = scenarios.Lab(Prompts(tokenizer(split.url)), plan.tokens, status)
        rows = []
        for scenario in wanted:
            values = scenarios.measure(scenario, there, plan.runs, lab, say)
            rows += [Row(measure, values[measure.key]) for measure in scenario.measures if measure.key in values]
        facts = _facts(plan, split, lab, network)
        if load > BUSY:
            facts["other work"] = f"the machine had a load of {load:.1f} before: do not trust these figures"
        return Report(facts, rows)


def check(plan: Plan, speculation: bool) -> None:
    """Raises SettingsError for what cannot be measured, before anything starts."""
    for option, names, known in (("only", plan.only, scenarios.NAMES), ("without", plan.without, LEAVABLE)):
        if unknown := [name for name in names if name not in known]:
            raise SettingsError(f"--{option} knows {', '.join(known)}, not {', '.join(unknown)}")
    if "speculation" in plan.only and not speculation:
        raise SettingsError("this engine cannot draft tokens (--speculation): leave speculation out of --only")
    if plan.peers is not None:
        if plan.shape.model.startswith("toy:"):
            raise SettingsError("llama.cpp cannot run a toy model: leave --peers out, or measure a GGUF file")
        for name in peers.PROGRAMS:
            peers.program(plan.peers, name)
    if plan.link is not None:
        link.usable()


def _start(
    plan: Plan,
    wanted: Sequence[scenarios.Scenario],
    places: Sequence[Place],
    folder: Path,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> Iterator[Peer]:
    """The peers that take part in what is wanted; ours first."""
    names = {name for scenario in wanted for name in scenario.peers if name not in plan.without}
    all_cores = peers.cores()
    for name in peers.OURS:
        if name in names:
            say(f"starting {name}")
            ours = stack.enter_context(peers.dwarfstar(name, plan.shape, places, folder))
            yield ours
    if plan.peers is None:
        if peers.REFERENCE in names and not plan.shape.model.startswith("toy:"):
            yield stack.enter_context(peers.reference(plan.shape, folder, ours.url))
        return
    if peers.UNSPLIT in names:
        say(f"starting {peers.UNSPLIT}")
        yield stack.enter_context(
            peers.llama_server(
                peers.UNSPLIT, plan.shape, folder, plan.peers, threads=1, core=next(iter(all_cores), None)
            )
        )
    if peers.ALL_CORES in names:
        say(f"starting {peers.ALL_CORES}")
        yield stack.enter_context(
            peers.llama_server(peers.ALL_CORES, plan.shape, folder, plan.peers, threads=len(all_cores) or 1, core=None)
        )
    if peers.RPC in names:
        say(f"starting {peers.RPC}")
        workers = stack.enter_context(peers.rpc_workers(places, folder, plan.peers))
        yield stack.enter_context(
            peers.llama_server(peers.RPC, plan.shape, folder, plan.peers, threads=1, core=None, rpc=workers)
        )


def _facts(plan: Plan, split: peers.HttpPeer, lab: scenarios.Lab, network: str) -> dict[str, str]:
    """What the figures belong to."""
    assert split.home is not None
    view = lab.status(split.home)
    layers = " + ".join(str(stage.layers[1] - stage.layers[0]) for stage in view.stages)
    facts = {
        "model": f"{Path(plan.shape.model).stem}, split by layers {layers}, one thread and core for each stage",
        "machine": f"{processor()}, {len(peers.cores()) or os.cpu_count()} cores",
        "software": f"DwarfStar {__version__}, {_llama(plan.peers)}",
        "runs": f"{plan.runs} of {plan.tokens} tokens, {plan.shape.slots} slots of {plan.shape.context} tokens; "
        + ONE_SENTENCE,
    }
    if network:
        facts["network"] = network
    if lab.client_tokens:
        facts["load client"] = f"{1e6 * lab.client_s / lab.client_tokens:.0f} µs of CPU a token"
    same = same_texts(lab.texts)
    if same:
        facts["texts of one stream"] = same
    return facts


def same_texts(texts: dict[tuple[int, str], str]) -> str:
    """Whether ours said what the unsplit model said, run by run; empty if nobody can tell."""
    equal = total = 0
    for (run, name), text in texts.items():
        if name in peers.OURS:
            for whole in (peers.UNSPLIT, peers.REFERENCE):
                if (run, whole) in texts:
                    total += 1
                    equal += texts[run, whole] == text
    return f"equal to the unsplit model's in {equal} of {total} runs" if total else ""


def processor() -> str:
    """The processor's name, as Linux tells it; elsewhere its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _llama(folder: Path | None) -> str:
    library = f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}"
    if folder is None:
        return library
    said = subprocess.run(
        [peers.program(folder, peers.SERVER), "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    lines = (said.stdout + said.stderr).splitlines()
    built = next((line.removeprefix("version: ") for line in lines if line.startswith("version")), "of unknown version")
    return f"{library}, llama-server {built}"
