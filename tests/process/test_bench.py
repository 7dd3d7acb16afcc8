"""``dwarfstar bench`` as a user runs it, on the toy model and without peers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.engine_process import command

pytestmark = pytest.mark.process


def test_a_bench_writes_figures_of_every_run_and_prints_them_again(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.svg"
    arguments = ["toy:12:2", "--only", "decode", "--runs", "2", "--tokens", "24", "--cuts", "4"]
    done = command("bench", *arguments, "--json", str(figures), "--svg", str(picture))
    assert done.returncode == 0, done.stderr
    assert "benchmarks/build_peers.py" in done.stderr, "it says how to get peers"
    held = json.loads(figures.read_text("utf-8"))
    assert "layers 4 + 8" in held["facts"]["model"]
    values = {measure["key"]: measure["values"] for measure in held["measures"]}
    assert set(values) >= {"decode.1", "decode.4", "decode.8", "decode.8.limit", "decode.8.head_us"}
    assert all(len(runs) == 2 and min(runs) > 0 for by_peer in values.values() for runs in by_peer.values())
    assert picture.read_text("utf-8").startswith("<svg ")
    again = command("bench", "--show", str(figures))
    assert again.stdout == done.stdout and "decode, 8 streams" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "decodes"], "--only knows decode"),
        (["--without", "split"], "--without knows unsplit"),
        (["--peers", "/nowhere"], "leave --peers out"),
        (["demo", "--peers", "/nowhere"], "build the peers with"),
        (["--json", "/nowhere/figures.json"], "no folder /nowhere"),
        (["--show", "/nowhere/figures.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(arguments: list[str], words: str) -> None:
    model = [] if arguments[0] == "demo" else ["toy:12"]
    done = command("bench", *model, *arguments)
    assert done.returncode != 0 and words in done.stderr and len(done.stderr.splitlines()) == 1
