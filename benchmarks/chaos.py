"""Faults on real processes under a crowd of requests: is every answer right, does nothing hang, leak or grow?

``python benchmarks/chaos.py --faults 200`` prints its seed, a table of the pauses, and exits with 1 if anything was
wrong. Machines are network namespaces where these are permitted; else links are not cut.
"""

from __future__ import annotations

import argparse
import logging
import random
import secrets
import signal
import sys
import tempfile
from pathlib import Path

from dwarfstar_engine.bench import arena


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="replays the choice of faults and requests")
    parser.add_argument("--nodes", type=int, default=3, help="besides the engine's own")
    parser.add_argument(
        "--local-nodes", action="store_true", help="nodes that the engine starts itself; no link is cut"
    )
    parser.add_argument("--loopback", action="store_true", help="without network namespaces; no link is cut")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--longest", type=int, default=160, help="tokens of an answer")
    parser.add_argument("--haste", type=float, default=1.0, help="by how much pauses and holds are shorter")
    parser.add_argument("--minutes", type=float, default=60.0, help="no fault begins later")
    parser.add_argument("--keep", type=Path, default=None, help="folder for homes and logs that stays")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # not without ending what was started
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    wanted = arena.Wanted(
        model=given.model,
        nodes=given.nodes,
        faults=given.faults,
        seed=seed,
        longest=given.longest,
        haste=given.haste,
        limit_s=60 * given.minutes,
        local=given.local_nodes,
        namespaces=not given.loopback,
    )
    with tempfile.TemporaryDirectory(prefix="dwarfstar-chaos-") as folder:
        tally, text = arena.play(wanted, given.keep or Path(folder), random.Random(seed))  # noqa: S311
    print(text)
    sys.exit(1 if tally.wrong else 0)


if __name__ == "__main__":
    main()
