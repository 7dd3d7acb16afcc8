"""How long streams pause when a stage or a node of theirs dies, and whether they say what they would have said.

``python benchmarks/rescue.py --home HOME`` kills one of a running engine's processes in the middle of its streams. It
prints the longest pause of each stream beside the time in which the nodes that are left read the same texts as prompts,
all at once, from an empty cache. It exits with 1 if a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from dwarfstar_engine.bench.crowd import KINDS, crowd
from dwarfstar_engine.bench.prompts import prose
from dwarfstar_engine.cli import remote, running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="home of the running engine")
    parser.add_argument("--kill", choices=("stage", "node"), default="stage")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--words", type=int, default=40, help="of each prompt")
    parser.add_argument("--after", type=int, default=25, help="tokens of each stream before the fault")
    given = parser.parse_args()
    engine = running.require(given.home)
    bodies = [
        {"prompt": prose(given.words, n), "max_tokens": given.after + 60, "ignore_eos": True, **KINDS[n % len(KINDS)]}
        for n in range(given.streams)
    ]
    want = asyncio.run(crowd(engine.api_url, bodies))
    stages = remote.status(engine, given.home).stages
    stage = psutil.Process(stages[len(stages) // 2].pid)
    victim = stage if given.kill == "stage" else stage.parent()
    assert victim is not None
    got = asyncio.run(crowd(engine.api_url, bodies, lambda: os.kill(victim.pid, signal.SIGKILL), given.after))
    said = [
        {"prompt": body["prompt"] + "".join(heard.pieces[: given.after]), "max_tokens": 1, "temperature": 0}
        for body, heard in zip(bodies, want, strict=True)
    ]
    started = time.monotonic()
    read = asyncio.run(crowd(engine.api_url, said))
    prefill_s = max(heard.times[0] for heard in read) - started
    pauses = sorted(heard.pause_s() for heard in got)
    wrong = sum(one.pieces != other.pieces for one, other in zip(got, want, strict=True))
    print(f"killed a {given.kill} of {len(stages)} stages under {given.streams} streams; {wrong} texts differ")
    print(f"pauses: shortest {pauses[0]:.2f} s, median {pauses[len(pauses) // 2]:.2f} s, longest {pauses[-1]:.2f} s")
    left = len(remote.status(engine, given.home).stages)
    print(f"the same texts read as prompts at once, in {left} stages: {prefill_s:.2f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
