"""What the planner promises against what is measured: tokens a second and memory, on this machine's cores.

``python benchmarks/predictions.py`` starts an engine with one to four local nodes for each model, asks it what other
cuts would give, carries them out, and measures each: one stream, eight, and what its stage processes take. Each round
goes through all cuts, there and back, as a machine's pace changes by the minute. Prints a table of medians and writes
JSON. Figures mean something on an otherwise idle machine only.

A prediction is *asked before*: while the cut measured before it serves, and of one that never ran; of the first cut
once a short answer has gone through it. One *of what runs* is asked when it was measured. Which cut is predicted best
is asked of all cuts at one moment, when a round begins; where another one was measured better, the two are measured
again, in turns, as the best of six noisy figures is one that had luck.

Memory is what is resident (``Rss``): weights count, as they are read into a stage's own memory. Some 40 MiB are pages
of libraries' files, which stages of one machine share (``Pss``), and in the first stage those rows of the embedding
that were used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dwarfstar_engine.bench.client import Load, together_tok_s
from dwarfstar_engine.views import PlanView, StageView

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.local_engine import LocalEngine, Wanted, engine, memory_mib  # noqa: E402
from support.real_models import path_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "predictions.json"
CUTS: dict[
    str, dict[int, list[tuple[int, ...]]]
] = {  # per stages; the first one is what the engine starts with and is calibrated at
    "smollm2": {
        1: [()],
        2: [(15,), (6,), (12,), (18,), (21,), (25,)],
        3: [(10, 20), (5, 15), (8, 22), (11, 21), (12, 24), (14, 25)],
        4: [(7, 15, 22), (4, 12, 20), (8, 16, 24), (9, 17, 25), (6, 10, 24), (3, 15, 27)],
    },
    "gemma3": {1: [()], 2: [(6,), (12,)], 3: [(6, 12)]},  # its attention repeats each six layers: no other cut is legal
}
TOKENS = {1: 192, 8: 96}  # of each answer, by streams
PROMPT_TOKENS = 12
WARM_TOKENS = 64  # pages are touched, code is warm, and stages have been seen in use
TURNS = 6  # in which the cut predicted best and another that was measured better are measured again
LEAST_S = 0.5  # that all streams must run at the same time


@dataclass
class Case:
    """One cut. ranked, before, runs: (single, aggregate) tok/s predicted when a round began, before it ran and then; of
    each round. By number of streams, of each round: measured tok/s. client_ms and cpu_ms: processor time of a token
    in the last one, of the load client, and of the engine's process and each stage's."""

    model: str
    cuts: tuple[int, ...]
    ranked: list[tuple[float, float]] = field(default_factory=list)
    before: list[tuple[float, float]] = field(default_factory=list)
    runs: list[tuple[float, float]] = field(default_factory=list)
    stage_ms: list[float] = field(default_factory=list)
    measured_ms: list[float] = field(default_factory=list)
    measured: dict[int, list[float]] = field(default_factory=dict)
    client_ms: dict[int, float] = field(default_factory=dict)
    cpu_ms: dict[int, list[float]] = field(default_factory=dict)
    memory: list[dict[str, float]] = field(default_factory=list)

    @property
    def stages(self) -> int:
        return len(self.cuts) + 1

    @property
    def name(self) -> str:
        return f"{self.model} {','.join(map(str, self.cuts)) or 'whole'}"


def decode(there: LocalEngine, streams: int, tokens: int) -> tuple[float, Load]:
    """Tokens a second of all streams while every one of them runs; with longer answers where they did not at all."""
    for longer in (1, 2, 4):
        done = there.decode(streams, PROMPT_TOKENS, tokens * longer)
        if streams == 1:
            return done.answers[0].tok_s, done
        if min(one.ended for one in done.answers) - max(one.times[0] for one in done.answers) > LEAST_S:
            break
    return together_tok_s(done.answers), done


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def promised(view: PlanView) -> tuple[float, float]:
    return view.predicted.single_tok_s, view.predicted.aggregate_tok_s


def memory(stage: StageView, view: PlanView) -> dict[str, float]:
    """MiB of a stage's process beside what its plan says."""
    planned = next(one for one in view.stages if one.layers == stage.layers)
    parts = planned.memory_gib
    told = {"weights": parts.weights, "kv": parts.kv, "compute": parts.compute}
    return {**{name: round(1024 * gib, 2) for name, gib in told.items()}, **memory_mib(stage.pid)}


def predictions(there: LocalEngine, case: Case) -> tuple[float, float]:
    proposed = there.plan(case.cuts).proposed
    assert proposed is not None
    return promised(proposed)


def measure(there: LocalEngine, case: Case) -> None:
    for streams, tokens in TOKENS.items():
        pids = [there.pid, *(stage.pid for stage in there.status().stages)]
        before = [cpu_s(pid) for pid in pids]
        tok_s, done = decode(there, streams, tokens)
        case.measured.setdefault(streams, []).append(tok_s)
        spent = zip(pids, before, strict=True)
        case.cpu_ms[streams] = [round(1000 * (cpu_s(pid) - was) / done.tokens, 3) for pid, was in spent]
        case.client_ms[streams] = round(1000 * done.client_s / done.tokens, 4)
        if streams == 1:
            case.measured_ms = [stage.ms_per_token for stage in there.status().stages]
    present = there.plan(case.cuts).present
    assert present is not None
    case.runs.append(promised(present))
    case.stage_ms = [stage.ms for stage in present.stages]
    case.memory = [memory(stage, present) for stage in there.status().stages]


def play(model: str, path: str, stages: int, given: argparse.Namespace) -> tuple[list[Case], list[str]]:
    cases = [Case(model, cuts) for cuts in CUTS[model][stages][: given.cuts]]
    wanted, runs = Wanted(path, stages, cases[0].cuts), cases[0]
    with tempfile.TemporaryDirectory(prefix="dwarfstar-") as folder, engine(wanted, Path(folder)) as there:
        there.decode(1, PROMPT_TOKENS, WARM_TOKENS)
        for number in range(given.rounds):
            for case in cases:
                case.ranked.append(predictions(there, case))
            for case in cases if number % 2 == 0 else cases[::-1]:
                case.before.append(predictions(there, case))
                if case is not runs:
                    there.commit(case.cuts)
                    there.decode(1, PROMPT_TOKENS, WARM_TOKENS)
                    runs = case
                measure(there, case)
        for case in cases:
            print(row(case), flush=True)
        told = [best(there, cases, index) for index in range(len(TOKENS))]
    print("\n".join(told), flush=True)
    return cases, told


def errors(case: Case, asked: list[tuple[float, float]]) -> tuple[float, float]:
    """How far what was predicted is off, as a share: the median over rounds, as a round shares the machine's pace."""
    single, aggregate = (
        statistics.median(said[index] / seen - 1 for said, seen in zip(asked, case.measured[streams], strict=True))
        for index, streams in enumerate(TOKENS)
    )
    return single, aggregate


def medians(figures: list[tuple[float, float]]) -> tuple[float, float]:
    single, aggregate = (statistics.median(column) for column in zip(*figures, strict=True))
    return single, aggregate


def row(case: Case) -> str:
    single, eight = (statistics.median(case.measured[streams]) for streams in TOKENS)
    before, runs = errors(case, case.before), errors(case, case.runs)
    cells = [case.name, f"{single:.1f}", f"{before[0]:+.0%}", f"{runs[0]:+.0%}"]
    cells += [f"{eight:.1f}", f"{before[1]:+.0%}", f"{runs[1]:+.0%}"]
    cells.append(" ".join(f"{a:.2f}/{b:.2f}" for a, b in zip(case.stage_ms, case.measured_ms, strict=True)))
    cells.append(" ".join(f"{m['weights'] + m['kv'] + m['compute']:.0f}/{m['Rss']:.0f}" for m in case.memory))
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| cut | 1 stream tok/s | asked before | of what runs | 8 streams | asked before | of what runs "
    "| stage ms, predicted/measured | MiB, promised/Rss |\n|---|---|---|---|---|---|---|---|---|"
)


def best(there: LocalEngine, cases: list[Case], index: int) -> str:
    """Of cuts of one model in as many stages: how far the one predicted best is from the best."""
    (streams, tokens), which = list(TOKENS.items())[index], ("single", "aggregate")[index]
    chosen = max(cases, key=lambda case: medians(case.ranked)[index])
    most = max(cases, key=lambda case: statistics.median(case.measured[streams]))
    share = statistics.median(chosen.measured[streams]) / statistics.median(most.measured[streams])
    told = f"{chosen.model}, {chosen.stages} stages, {which}: {chosen.cuts} predicted, best {most.cuts}: {share:.3f}"
    if chosen is most:
        return told
    again = dict[tuple[int, ...], list[float]]()
    for _ in range(TURNS):
        for case in (chosen, most):
            there.commit(case.cuts)
            there.decode(1, PROMPT_TOKENS, WARM_TOKENS)
            again.setdefault(case.cuts, []).append(decode(there, streams, tokens)[0])
    share = statistics.median(a / b for a, b in zip(again[chosen.cuts], again[most.cuts], strict=True))
    return f"{told}; again in {TURNS} turns: {share:.3f}"


def worst(cases: list[Case]) -> Iterator[str]:
    """How far what was asked before is off, of all cuts."""
    for index, which in enumerate(("single", "aggregate")):
        found = sorted(abs(errors(case, case.before)[index]) for case in cases)
        yield f"{which}: off by {statistics.median(found):.1%} in the median, {found[-1]:.1%} at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="smollm2,gemma3")
    parser.add_argument("--stages", default="1,2,3,4")
    parser.add_argument("--cuts", type=int, default=6, help="of each number of stages, so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    started, cases, told = time.monotonic(), list[Case](), list[str]()
    print(HEAD, flush=True)
    for model in given.models.split(","):
        path = str(path_of(model))
        for stages in map(int, given.stages.split(",")):
            if stages in CUTS[model]:
                found, said = play(model, path, stages, given)
                cases, told = [*cases, *found], [*told, *said]
    off = [*worst(cases)]
    print("\n".join(off))
    kept: dict[str, Any] = {"cases": [asdict(case) for case in cases], "best": told, "off": off}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
