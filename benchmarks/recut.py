"""How long streams pause when layers move between two nodes, and what the nodes read for that.

``python benchmarks/recut.py`` moves three layers of the demo model from one local node to the next and back, under four
streams, five times each. It prints, by direction, medians of: the longest pause of a stream, the pause as the engine
has it, the time the whole change took, what new stage processes read (from files, and of that from the disk) beside the
bytes of the slice and of the layers that moved. It exits with 1 if a text differs from an undisturbed run's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dwarfstar_engine.bench.crowd import KINDS, Heard, crowd
from dwarfstar_engine.bench.prompts import prose
from dwarfstar_engine.bench.stats import median
from dwarfstar_engine.stage.pipe import STAGE_NAME
from dwarfstar_engine.views import CommitView

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.local_engine import MIB, LocalEngine, Wanted, engine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "recut.json"
SETTLE_S = 4.0  # after a change: the old processes end, and a spare one is started for the next
PAUSED = re.compile(r"(\d+) streams go on, (\d+) of them from their beginning, (\d+) ms after epoch")


@dataclass
class Move:
    """One change. read_mib: of each new stage process from files; slice_mib, moved_mib: weights of its slice, and of
    layers that its node did not have."""

    way: str
    pause_s: float = 0.0  # the longest between two tokens of a stream
    usual_s: float = 0.0  # the longest of the same streams undisturbed
    engine_pause_s: float = 0.0  # from the end of the old epoch to the first frame of the next
    whole: int = 0  # streams of which no stage had anything
    change_s: float = 0.0  # the call
    wrong: int = 0
    nodes: list[dict[str, Any]] = field(default_factory=list)


def processes() -> dict[int, psutil.Process]:
    """Stages of this user's engines, and those that wait to become one."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == STAGE_NAME or "dwarfstar_engine.stage.main" in process.cmdline():
                found[process.pid] = process
    return found


def counters() -> dict[int, tuple[int, int]]:
    """By pid: bytes read from files, and of these from disks."""
    found = {}
    for pid, process in processes().items():
        with contextlib.suppress(psutil.Error):
            io = process.io_counters()
            found[pid] = (io.read_chars, io.read_bytes)
    return found


def nodes_of(
    there: LocalEngine, view: CommitView, before: dict[int, tuple[int, int]], moved: dict[str, float]
) -> list[dict[str, Any]]:
    """What each new stage process has read. moved: MiB of the layers that each node lacked."""
    after, found = counters(), []
    for stage in there.status().stages:
        begin, end = stage.layers
        if stage.pid in after and (begin, end) not in [one.layers for one in view.before.stages]:
            had = before.get(stage.pid, (0, 0))
            found.append(
                {
                    "node": stage.node,
                    "layers": [begin, end],
                    "spare": stage.pid in before,
                    "read_mib": round((after[stage.pid][0] - had[0]) / MIB, 2),
                    "disk_mib": round((after[stage.pid][1] - had[1]) / MIB, 2),
                    "slice_mib": round(1024 * stage.weights_gib, 2),
                    "moved_mib": moved.get(stage.node, 0.0),
                }
            )
    return found


def one_move(
    there: LocalEngine, cuts: tuple[int, ...], bodies: list[dict[str, Any]], want: list[Heard], after: int
) -> Move:
    view: list[CommitView] = []
    took: list[float] = []
    before = counters()
    proposal = there.plan(cuts)
    present = proposal.present
    assert present is not None
    moved = {one.node: round(1024 * one.load_gib, 2) for one in proposal.delta}
    was = [stage.layers[1] for stage in present.stages[:-1]]

    def change() -> None:
        started = time.monotonic()
        view.append(there.commit(cuts))
        took.append(time.monotonic() - started)

    work = threading.Thread(target=change)
    got = asyncio.run(crowd(there.url, bodies, work.start, after))
    work.join()
    if not view:
        raise SystemExit("the change was refused")
    move = Move(f"{','.join(map(str, was))} → {','.join(map(str, cuts))}")
    move.pause_s = max(heard.pause_s() for heard in got)
    move.usual_s = max(heard.pause_s() for heard in want)
    move.change_s = took[0]
    move.wrong = sum("".join(one.pieces) != "".join(other.pieces) for one, other in zip(got, want, strict=True))
    told = PAUSED.findall(there.log.read_text("utf-8", "replace"))
    if told:
        move.whole, move.engine_pause_s = int(told[-1][1]), int(told[-1][2]) / 1000
    move.nodes = nodes_of(there, view[0], before, moved)
    return move


def show(moves: list[Move]) -> None:
    for way in dict.fromkeys(move.way for move in moves):
        same = [move for move in moves if move.way == way]
        figures = (median([getattr(move, key) for move in same]) for key in ("pause_s", "engine_pause_s", "change_s"))
        pause, paused, took = figures
        longest = max(move.pause_s for move in same)
        wrong, whole = sum(move.wrong for move in same), statistics.mean(move.whole for move in same)
        print(f"{way}: pause {pause:.2f} s (longest {longest:.2f}), {paused:.2f} s of it without a ring, ", end="")
        print(f"change {took:.2f} s, {whole:.1f} streams from their beginning, {wrong} texts differ")
        for index, node in enumerate(same[0].nodes):
            read, disk = (median([m.nodes[index][key] for m in same]) for key in ("read_mib", "disk_mib"))
            begin, end = node["layers"]
            print(
                f"  {node['node']} layers {begin}–{end - 1}: read {read:.1f} MiB, {disk:.1f} of it from the disk; "
                f"the slice has {node['slice_mib']:.1f}, the layers it lacked {node['moved_mib']:.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", default="15:18", help="the two plans to go between, as in 10,20:13,20")
    parser.add_argument("--moves", type=int, default=5, help="in each direction")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--words", type=int, default=40, help="of each prompt")
    parser.add_argument("--after", type=int, default=40, help="tokens of each stream before the change")
    parser.add_argument("--tokens", type=int, default=260, help="of each answer")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    plans = [tuple(map(int, part.split(","))) for part in given.cuts.split(":")]
    bodies = [
        {"prompt": prose(given.words, n), "max_tokens": given.tokens, "ignore_eos": True, **KINDS[n % len(KINDS)]}
        for n in range(given.streams)
    ]
    moves = list[Move]()
    wanted = Wanted("demo", len(plans[0]) + 1, plans[0], more=("--verbose",))
    with tempfile.TemporaryDirectory(prefix="dwarfstar-") as folder, engine(wanted, Path(folder)) as there:
        want = asyncio.run(crowd(there.url, bodies))
        for number in range(2 * given.moves):
            time.sleep(SETTLE_S)
            moves.append(one_move(there, plans[(number + 1) % 2], bodies, want, given.after))
    show(moves)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps([asdict(move) for move in moves], indent=1) + "\n")
    sys.exit(1 if any(move.wrong for move in moves) else 0)


if __name__ == "__main__":
    main()
