"""Many mixed requests at once against a running engine: are all answers right, is memory flat, does nothing leak?

``python benchmarks/soak.py --home HOME`` prints what it saw and exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

from dwarfstar_engine.bench import soak
from dwarfstar_engine.cli import remote, running

FLAT = 1.05  # the last quarter's median memory may be so much of the second quarter's; the first fills caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="home of the running engine")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    engine = running.require(given.home)
    started = time.monotonic()
    tally = asyncio.run(soak.crowd(engine.api_url, engine.pid, given.requests, given.at_once, given.seed))
    seconds = time.monotonic() - started
    deadline = time.monotonic() + 10
    while (idle := remote.status(engine, given.home).throughput).active + idle.queued and time.monotonic() < deadline:
        time.sleep(0.1)
    if idle.active + idle.queued:
        tally.wrong.append(f"{idle.active} sequences are active and {idle.queued} queued after the last request")
    quarter = max(1, len(tally.memory) // 4)
    early = statistics.median(tally.memory[quarter : 2 * quarter] or tally.memory)
    late = statistics.median(tally.memory[-quarter:])
    if late > FLAT * early:
        tally.wrong.append(f"memory grew from {early / 2**20:.0f} to {late / 2**20:.0f} MiB")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.kinds.items()))
    print(f"seed {given.seed}: {given.requests} requests, {given.at_once} at a time, {seconds:.0f} s ({kinds})")
    print(f"memory of all processes: {early / 2**20:.0f} MiB early, {late / 2**20:.0f} MiB late")
    print(f"wrong: {len(tally.wrong)}")
    for problem in tally.wrong[:20]:
        print(" ", problem)
    sys.exit(1 if tally.wrong else 0)


if __name__ == "__main__":
    main()
