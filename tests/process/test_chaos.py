"""The short form of ``benchmarks/chaos.py``: some faults on real processes under eight streams, from one seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dwarfstar_engine.bench import arena

pytestmark = pytest.mark.process

SEED = 3


@pytest.mark.timeout(240)  # an idle machine needs some 30 s
@pytest.mark.parametrize(
    "wanted",
    [
        arena.Wanted(model="toy:12:1", nodes=3, faults=10, seed=SEED, longest=60, requests=12, haste=3.0),
        arena.Wanted(model="demo", nodes=2, faults=3, seed=SEED, longest=40, requests=8, haste=2.0, local=True),
    ],
    ids=["toy", "demo"],
)
def test_every_request_ends_once_and_right(wanted: arena.Wanted, tmp_path: Path) -> None:
    tally, report = arena.play(wanted, tmp_path, random.Random(wanted.seed))
    assert not tally.wrong, report
    assert tally.outcomes["whole"] and len(tally.struck) > wanted.faults / 2, report
