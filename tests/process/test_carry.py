"""A slice moves to another node under streams: its cells go with it, and nothing is computed again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dwarfstar_engine.cli import remote, running
from process.prompts import PROMPTS
from support.crowd import bodies, check, crowd
from support.engine_process import EngineProcess

pytestmark = pytest.mark.process

STREAMS = 4


def drain(engine: EngineProcess) -> str:
    """Not by the command line: starting that takes as long as some streams."""
    node = engine.status().stages[1].node
    assert "is drained" in remote.drain(running.require(engine.home), engine.home, node, undo=False)
    return node


@pytest.mark.parametrize(
    ("model", "options"), [("toy:12:5", ("--carry", "on")), ("demo", ()), ("demo", ("--kv", "q8_0"))]
)
def test_the_streams_of_a_drained_node_are_carried(tmp_path: Path, model: str, options: tuple[str, ...]) -> None:
    prompts = [f"{n}: " + "abc def " * 30 for n in range(STREAMS)] if model != "demo" else PROMPTS[:STREAMS]
    requests = bodies(prompts, 300)
    common = ("--local-nodes", "3", "--threads", "1", "--slots", str(STREAMS), "--context", "1024", "-v")
    with EngineProcess(tmp_path / "home", model, *common, *options) as engine:
        engine.wait_serving()
        want = asyncio.run(crowd(engine, requests))
        before, drained = engine.status(), []
        check(asyncio.run(crowd(engine, requests, lambda: drained.append(drain(engine)))), want)
        (event,) = engine.events("cells_carried")
        assert event.details["from"] == drained[0] and int(event.details["epoch"]) > before.epoch, event
        assert (event.details["carried"], event.details["sequences"]) == (STREAMS, STREAMS), event
        assert int(event.details["bytes"]) > 0 and not event.details["code"], event
        assert f"{STREAMS} streams go on, 0 of them from their beginning" in engine.output


def test_nothing_is_carried_if_that_is_not_wanted(tmp_path: Path) -> None:
    requests = bodies(["abc", "def"], 300)
    common = ("--local-nodes", "3", "--slots", "2", "--context", "512", "--carry", "off", "-v")
    with EngineProcess(tmp_path / "home", "toy:12:5", *common) as engine:
        engine.wait_serving()
        want = asyncio.run(crowd(engine, requests))
        drained: list[str] = []
        check(asyncio.run(crowd(engine, requests, lambda: drained.append(drain(engine)))), want)
        assert drained and "2 streams wait" in engine.output and not engine.events("cells_carried")
