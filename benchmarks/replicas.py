"""Two copies of a model on two local nodes beside one node, in turns: tokens a second of eight streams.

``python benchmarks/replicas.py`` starts both engines, one thread and one core a node, and measures them by turns; the
one that was measured rests before the other's turn comes. Prints each turn and the median of the turns' ratios.
Figures mean something on an otherwise idle machine only.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

from dwarfstar_engine.bench.client import together_tok_s
from dwarfstar_engine.bench.scenarios import rest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.local_engine import LocalEngine, Wanted, engine  # noqa: E402
from support.real_models import path_of  # noqa: E402

STREAMS, PROMPT_TOKENS = 8, 12


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
        ratios = []
        for turn in range(given.turns):
            order = list(engines) if turn % 2 else list(engines)[::-1]
            found = {name: tok_s(engines[name], given.tokens) for name in order}
            ratios.append(found["two copies"] / found["one node"])
            print(f"{found['one node']:6.1f} {found['two copies']:6.1f} tok/s  {ratios[-1]:.2f}", flush=True)
        print(f"two copies ÷ one node: {statistics.median(ratios):.2f} (median of {given.turns} turns)")


if __name__ == "__main__":
    main()
