"""Two copies of a model on two local nodes beside one node, in turns: tokens a second of eight streams.

``python benchmarks/replicas.py`` starts both engines, one thread and one core a node, and measures them by turns; the
one that was measured rests before the other's turn comes. Beside them it measures what the machine allows: two plain
loops of llama.cpp, a process and a core each, that know nothing of each other, and one of them alone. Prints each turn
and the median of the turns' ratios. Figures mean something on an otherwise idle machine only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dwarfstar_engine.bench.client import together_tok_s
from dwarfstar_engine.bench.scenarios import rest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.local_engine import LocalEngine, Wanted, engine  # noqa: E402
from support.real_models import path_of  # noqa: E402

STREAMS, PROMPT_TOKENS = 8, 12
LOOP_S = 4.0
LOOP = """
import os, sys, time
from llama_cpp import Llama
os.sched_setaffinity(0, {int(sys.argv[2])})
model = Llama(sys.argv[1], n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
prompt = model.tokenize(b"The meaning of life is to find one's own way through")
for line in sys.stdin:
    tokens = model.generate(prompt, temp=0.0)
    next(tokens)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + float(line) and count < 1900:
        next(tokens)
        count += 1
    print(count / (time.perf_counter() - began), flush=True)
"""


@contextlib.contextmanager
def loops(path: str) -> Iterator[list[subprocess.Popen[str]]]:
    """A loop of llama.cpp on each of two cores."""
    with contextlib.ExitStack() as stack:
        found = []
        for core in sorted(os.sched_getaffinity(0))[:2]:
            command = [sys.executable, "-c", LOOP, path, str(core)]
            pipe = subprocess.PIPE
            found.append(stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)))
            stack.callback(found[-1].kill)
        yield found


def loop_tok_s(running: list[subprocess.Popen[str]]) -> float:
    """Of these at the same time, together."""
    for one in running:
        assert one.stdin is not None
        one.stdin.write(f"{LOOP_S}\n")
        one.stdin.flush()
    return sum(float(one.stdout.readline()) for one in running if one.stdout is not None)


def tok_s(there: LocalEngine, tokens: int) -> float:
    """Of one turn, while all streams run."""
    done = there.decode(STREAMS, PROMPT_TOKENS, tokens)
    if not rest((there.pid,)):
        print("an engine is still at work: what follows is slowed by it", file=sys.stderr)
    return together_tok_s(done.answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--turns", type=int, default=6)
    given = parser.parse_args()
    path = str(path_of("smollm2"))
    wanted = {
        "one node": Wanted(path, 1, (), more=("--pin",)),
        "two copies": Wanted(path, 2, (), more=("--pin", "--replicas", "2")),
    }
    with contextlib.ExitStack() as stack:
        engines = {}
        for name, one in wanted.items():
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dwarfstar-"))
            engines[name] = stack.enter_context(engine(one, Path(folder)))
            tok_s(engines[name], 100)
        apart = stack.enter_context(loops(path))
        loop_tok_s(apart)
        ratios, allowed = [], []
        for turn in range(given.turns):
            order = list(engines) if turn % 2 else list(engines)[::-1]
            found = {name: tok_s(engines[name], given.tokens) for name in order}
            ratios.append(found["two copies"] / found["one node"])
            alone, both = loop_tok_s(apart[:1]), loop_tok_s(apart)
            allowed.append(both / alone)
            print(
                f"{found['one node']:6.1f} {found['two copies']:6.1f} tok/s  {ratios[-1]:.2f}   "
                f"plain loops {alone:6.1f} {both:6.1f} tok/s  {allowed[-1]:.2f}",
                flush=True,
            )
        print(f"two copies ÷ one node: {statistics.median(ratios):.2f} (median of {given.turns} turns)")
        print(f"two plain loops ÷ one: {statistics.median(allowed):.2f}")


if __name__ == "__main__":
    main()
