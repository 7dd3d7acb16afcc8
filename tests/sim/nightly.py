"""Very many schedules, on all cores, from a seed of the clock or a given one.

    python -m sim.nightly [--schedules N] [--first SEED] [--jobs N]

Prints each violation with its seed; ``python -m sim.schedule SEED`` plays it again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

from sim.checks import Violation
from sim.schedule import run

CHUNK = 2_000
MOST_TOLD = 20  # violations: more say nothing new


def _chunk(first: int) -> list[str]:
    found = []
    for seed in range(first, first + CHUNK):
        try:
            run(seed)
        except Violation as violation:
            found.append(str(violation))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedules", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=int(time.time()) * 1000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    began, found, done = time.monotonic(), 0, 0
    print(f"{options.schedules} schedules from seed {options.first}", flush=True)
    with multiprocessing.Pool(options.jobs) as pool:
        firsts = range(options.first, options.first + options.schedules, CHUNK)
        for violations in pool.imap_unordered(_chunk, firsts):
            for violation in violations[: max(0, MOST_TOLD - found)]:
                print(violation, flush=True)
            found, done = found + len(violations), done + CHUNK
    print(f"{done} schedules, {found} violations, {done / (time.monotonic() - began):.0f} a second")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
