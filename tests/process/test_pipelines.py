"""Two nodes that each hold the whole model, behind one endpoint: both serve, and one's loss is nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dwarfstar_engine.views import StageView
from process.conftest import BLOCK, TOKENS
from process.prompts import PROMPTS
from process.reference import answers
from process.test_exactness import check as check_answer
from support.crowd import Heard, bodies, check, crowd
from support.engine_process import EngineProcess, command, until

pytestmark = pytest.mark.process

NODES = ("node1", "node2")
SLOTS = 4  # of each
ASKED = 8
REQUESTS = bodies([f"Number {number} of the stories begins" for number in range(2 * SLOTS)], 90)
BEGUN = 2  # tokens of one stream more than a node has, then it is struck: prompts wait where others are answered


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("pipelines") / "home"
    options = ("--local-nodes", "2", "--threads", "1", "--replicas", "2", "--slots", str(SLOTS), "--context", "512")
    with EngineProcess(home, "demo", *options) as engine:
        engine.wait_serving()
        both_serve(engine)
        yield engine


def stages(engine: EngineProcess) -> dict[str, StageView]:
    """Those that serve, by node."""
    return {stage.node: stage for stage in engine.status().stages if stage.state == "ready"}


def both_serve(engine: EngineProcess) -> None:
    until(lambda: len(stages(engine)) == len(NODES), "both nodes serve")


def told(engine: EngineProcess) -> str:
    return command("events", "--home", str(engine.home)).stdout


def test_each_node_holds_the_model_and_answers_as_the_unsplit_one(engine: EngineProcess, demo_model: Path) -> None:
    found = stages(engine)
    assert {stage.layers for stage in found.values()} == {(0, 30)}
    assert sorted(stage.pipeline for stage in found.values()) == [0, 1]
    expected = answers(demo_model, PROMPTS[:ASKED], TOKENS, BLOCK)
    with ThreadPoolExecutor(ASKED) as pool:
        for done in [pool.submit(check_answer, engine, number, one) for number, one in enumerate(expected)]:
            done.result()


@pytest.fixture(scope="module")
def undisturbed(engine: EngineProcess) -> list[Heard]:
    heards = asyncio.run(crowd(engine, REQUESTS))
    assert all(heard.finish == "length" and heard.error is None for heard in heards)
    return heards


def test_streams_of_a_lost_node_go_on_at_the_other_which_does_not_stop(
    engine: EngineProcess, undisturbed: list[Heard]
) -> None:
    before, kept, active = stages(engine), [], []

    def strike() -> None:
        load = engine.status().throughput
        active.append(load.active + load.queued)
        engine.kill(engine.node_pid("node2"))
        until(lambda: "node2" not in stages(engine), "it is missed")
        kept.append(stages(engine).get("node1"))

    heards: list[Heard] = asyncio.run(crowd(engine, REQUESTS, strike, BEGUN, SLOTS + 1))
    check(heards, undisturbed)
    assert active == [2 * SLOTS], "both nodes were busy"
    assert kept[0] is not None and kept[0].pid == before["node1"].pid
    both_serve(engine)
    after = stages(engine)
    assert after["node1"].pid == before["node1"].pid and after["node2"].pid != before["node2"].pid
    events = told(engine)
    assert events.count(" is over: ") == 1, "the other's epoch went on"
    assert f"{SLOTS} streams go on in another pipeline" in events


def test_a_drained_node_leaves_the_other_serving(engine: EngineProcess, undisturbed: list[Heard]) -> None:
    drained: list[int] = []

    def strike() -> None:
        drained.append(command("drain", "node1", "--home", str(engine.home)).returncode)

    heards = asyncio.run(crowd(engine, REQUESTS[:SLOTS], strike, BEGUN, SLOTS // 2 + 1))
    check(heards, undisturbed[:SLOTS])
    assert drained == [0] and set(stages(engine)) == {"node2"}
    assert command("drain", "node2", "--home", str(engine.home)).returncode != 0, "it is the last"
    assert command("drain", "node1", "--undo", "--home", str(engine.home)).returncode == 0
    both_serve(engine)
