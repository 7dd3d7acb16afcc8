"""How long streams with long contexts pause when a node of theirs is drained, and whether they say what they would.

``python benchmarks/drain.py --home HOME [--home OTHER …] [--runs N]`` drains a node of each running engine in turn, in
the middle of its streams, and lets it back. So engines with different settings (``--carry auto``, ``--carry off``) are
compared while the machine is in the same state. It exits with 1 if a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dwarfstar_engine.bench.crowd import crowd
from dwarfstar_engine.bench.prompts import prose
from dwarfstar_engine.cli import remote, running

SETTLE_S = 60.0  # until a node that was let back has its share
LOOK_S = 0.2


class Engine:
    """One that runs. texts: undisturbed. pauses: s, of the streams of each drain the longest."""

    def __init__(self, home: Path, bodies: list[dict[str, Any]], after: int) -> None:
        self.home, self._bodies, self._after = home, bodies, after
        self._engine = running.require(home)
        self._nodes = len(remote.status(self._engine, home).stages)
        self.texts = [heard.pieces for heard in asyncio.run(crowd(self._engine.api_url, bodies))]
        self.pauses: list[float] = []

    def drain(self) -> int:
        """How many texts differ."""
        node = remote.status(self._engine, self.home).stages[1].node
        work = threading.Thread(target=self._order, args=(node,))
        heards = asyncio.run(crowd(self._engine.api_url, self._bodies, work.start, self._after))
        work.join()
        self.pauses.append(max(heard.pause_s() for heard in heards))
        self._order(node, undo=True)
        end = time.monotonic() + SETTLE_S
        while len({stage.node for stage in remote.status(self._engine, self.home).stages}) < self._nodes:
            if time.monotonic() > end:
                raise SystemExit(f"{node} has no share again after {SETTLE_S:.0f} s")
            time.sleep(LOOK_S)
        return sum(heard.pieces != text for heard, text in zip(heards, self.texts, strict=True))

    def _order(self, node: str, *, undo: bool = False) -> None:
        remote.drain(self._engine, self.home, node, undo=undo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, action="append", required=True, help="home of a running engine")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--words", type=int, default=1100, help="of each prompt; SmolLM2 makes 1.35 tokens of each")
    parser.add_argument("--after", type=int, default=25, help="tokens of each stream before the drain")
    given = parser.parse_args()
    bodies: list[dict[str, Any]] = [
        {"prompt": prose(given.words, n), "max_tokens": given.after + 400, "ignore_eos": True, "temperature": 0}
        for n in range(given.streams)
    ]
    engines = [Engine(home, bodies, given.after) for home in given.home]
    wrong = 0
    for _ in range(given.runs):
        wrong += sum(engine.drain() for engine in engines)
    for engine in engines:
        shown = ", ".join(f"{pause:.2f}" for pause in engine.pauses)
        print(f"{engine.home}: median {statistics.median(engine.pauses):.2f} s of {shown}")
    print(f"{wrong} texts differ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
