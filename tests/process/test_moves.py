"""Layers move while streams run: copies take over, nodes are drained, leave and come. Texts stay as they were."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from process.prompts import PROMPTS
from process.test_join import Started, started, token_line
from support.crowd import Heard, bodies, check, crowd
from support.engine_process import DEADLINE_S, EngineProcess, command, until

pytestmark = pytest.mark.process


LONG = bodies(PROMPTS[:4], 400)  # a node starts and loads its layers meanwhile


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("moves") / "home"
    options = ("--local-nodes", "3", "--threads", "1", "--slots", "4", "--context", "512", "--standby", "1", "-v")
    with EngineProcess(home, "demo", *options) as engine:
        yield engine.wait_serving()


@pytest.fixture(scope="module")
def undisturbed(engine: EngineProcess) -> list[Heard]:
    return asyncio.run(crowd(engine, LONG))


def all_back(engine: EngineProcess) -> None:
    """Every node has its share, and a copy of each stage waits."""

    def settled() -> bool:
        status = engine.status()
        pairs = {(one.node, one.layers) for one in status.standbys if one.state == "ready"}
        return (
            status.state == "serving"
            and len({stage.node for stage in status.stages}) == 3
            and {layers for _, layers in pairs} == {stage.layers for stage in status.stages}
        )

    engine.wait_idle()
    until(settled, "every node has its share and there is a copy of each")


def test_a_copy_takes_over_from_a_killed_stage(engine: EngineProcess, undisturbed: list[Heard]) -> None:
    all_back(engine)
    before = engine.status()
    copies = {one.layers: one for one in before.standbys}
    lost = before.stages[1]
    taken: list[int] = []

    def strike() -> None:
        engine.kill(lost.pid)

        def next_epoch() -> list[int]:
            status = engine.status()
            serves = status.epoch > before.epoch and status.state == "serving"
            return [stage.pid for stage in status.stages] if serves else []

        taken.extend(until(next_epoch, "the next epoch serves"))

    heards = asyncio.run(crowd(engine, LONG, strike))
    check(heards, undisturbed)
    kept = [before.stages[0].pid, copies[lost.layers].pid, before.stages[2].pid]
    assert taken == kept, "every slice was there: no process was started for it"
    all_back(engine)


def test_copies_take_over_from_a_killed_node(engine: EngineProcess, undisturbed: list[Heard]) -> None:
    all_back(engine)
    check(asyncio.run(crowd(engine, LONG, lambda: engine.kill(engine.node_pid("node2")))), undisturbed)
    all_back(engine)


def test_a_drained_node_gives_its_layers_away_and_gets_some_again(
    engine: EngineProcess, undisturbed: list[Heard]
) -> None:
    all_back(engine)
    node = engine.status().stages[1].node

    def strike() -> None:
        done = command("drain", node, "--home", str(engine.home))
        assert done.returncode == 0 and "is drained" in done.stdout, done.stderr

    check(asyncio.run(crowd(engine, LONG, strike)), undisturbed)
    drained = engine.node(node)
    assert drained is not None and drained.state == "drained"
    status = engine.status()
    assert node not in {stage.node for stage in status.stages} | {one.node for one in status.standbys}

    def undo() -> None:
        assert command("drain", "--undo", node, "--home", str(engine.home)).returncode == 0
        engine.wait_serving()

    check(asyncio.run(crowd(engine, LONG, undo)), undisturbed)
    all_back(engine)


def test_a_node_that_is_terminated_leaves_in_order(engine: EngineProcess, undisturbed: list[Heard]) -> None:
    """Its keeper starts it again: a node that comes while streams run gets its share."""
    all_back(engine)
    node = engine.status().stages[2].node
    pid = engine.node_pid(node)

    def strike() -> None:
        engine.kill(pid, signal.SIGTERM)
        until(lambda: pid not in [process.pid for process in engine.processes()], "the node ends")

    check(asyncio.run(crowd(engine, LONG, strike)), undisturbed)
    assert f"node {node} is drained" in engine.output
    all_back(engine)


def test_a_node_that_is_needed_is_not_drained(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("full") / "home"
    options = ("--local-nodes", "2", "--slots", "1", "--context", "64", "--effective-vram", "0.103")
    with EngineProcess(home, "toy:12", *options) as engine:
        engine.wait_serving()
        before = engine.status()
        assert len(before.stages) == 2
        done = command("drain", "node2", "--home", str(home))
        assert done.returncode == 1
        assert "node2 cannot be drained, as the others cannot take its layers" in done.stderr
        assert engine.status().epoch == before.epoch
        assert [node.state for node in engine.status().nodes] == ["joined", "joined"]
        assert "No node called 'node9' is here" in command("drain", "node9", "--home", str(home)).stderr


def test_a_machine_gets_its_share_while_streams_run_and_takes_it_along_in_order(tmp_path: Path) -> None:
    requests = bodies(["abc", "defg", "h", "ijk"], 400)  # more than are made until it has gone
    lent = ("--effective-vram", "1")
    with EngineProcess(
        tmp_path / "head", "toy:12:10", "--slots", "4", "--context", "1024", *lent, variables={"DWARFSTAR_NAME": "head"}
    ) as engine:
        engine.wait_serving()
        want = asyncio.run(crowd(engine, requests))
        arguments = [*token_line(engine.home), "--home", str(tmp_path / "lent"), *lent]
        with contextlib.ExitStack() as stack:

            def working(nodes: int) -> bool:
                status = engine.status()
                return len({stage.node for stage in status.stages}) == nodes and status.throughput.active == 4

            def come() -> None:
                machine.append(stack.enter_context(started(tmp_path / "log", arguments, "lent")))
                until(lambda: working(2), "the machine has its share")

            def go() -> None:
                machine[0].process.terminate()
                assert machine[0].process.wait(DEADLINE_S) == 0
                assert working(1), "it left when the others served"

            machine: list[Started] = []
            check(asyncio.run(crowd(engine, requests, come)), want)
            check(asyncio.run(crowd(engine, requests, go)), want)
            assert "this node is drained" in machine[0].output
