"""The owner moves layers between nodes while an engine serves: proposed, carried out, taken back, and kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.views import PlanRequest, ProposalView
from process.prompts import PROMPTS
from support.crowd import Heard, bodies, check, crowd
from support.engine_process import EngineProcess, command

pytestmark = pytest.mark.process

STREAMS = bodies(PROMPTS[:4], 220)
OPTIONS = ("--local-nodes", "3", "--threads", "1", "--context", "512", "-v")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("recut") / "home"
    with EngineProcess(home, "demo", "--slots", "4", "--carry", "on", *OPTIONS) as engine:
        yield engine.wait_serving()


@pytest.fixture(scope="module")
def undisturbed(engine: EngineProcess) -> list[Heard]:
    return asyncio.run(crowd(engine, STREAMS))


def cuts_of(engine: EngineProcess) -> list[int]:
    return [stage.layers[1] for stage in engine.status().stages[:-1]]


def told(engine: EngineProcess, *arguments: str) -> dict[str, Any]:
    done = command("plan", *arguments, "--json", "--home", str(engine.home))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def proposal(engine: EngineProcess, request: PlanRequest) -> ProposalView:
    return remote.plan(running.require(engine.home), engine.home, request)


def test_a_plan_is_proposed_carried_out_under_streams_and_taken_back(
    engine: EngineProcess, undisturbed: list[Heard]
) -> None:
    before, epoch = cuts_of(engine), engine.status().epoch
    shown = told(engine, "--cuts", "5,17")
    assert [stage["layers"] for stage in shown["stages"]] == [[0, 5], [5, 17], [17, 30]]
    assert shown["epoch"] == epoch and all("measured_ms" in one for one in shown["present"]["stages"])
    assert {one["node"]: one["load"] for one in shown["delta"]}["node2"] == [[5, 10]]
    assert cuts_of(engine) == before and engine.status().epoch == epoch, "nothing has changed"

    def commit() -> None:
        done = told(engine, "--cuts", "5,17", "--commit", "--yes")
        assert done["loaded_first"] and done["epoch"] == epoch + 1
        assert [stage["layers"] for stage in done["after"]["stages"]] == [[0, 5], [5, 17], [17, 30]]
        assert {one["node"] for one in done["reads"]} == {"node1", "node2", "node3"}

    heards = asyncio.run(crowd(engine, STREAMS, commit, at=5))
    check(heards, undisturbed)
    assert "4 streams go on, 0 of them from their beginning" in engine.output, "they ran while the layers moved"
    moves = engine.events("cells_carried")
    assert [move.details["from"] for move in moves] == ["node1", "node1, node2", "node2, node3"]
    for move in moves:
        assert (move.details["carried"], move.details["sequences"], move.details["code"]) == (4, 4, ""), move
    print(f"longest gap of a stream: {max(heard.gap_s for heard in heards):.2f} s")
    assert cuts_of(engine) == [5, 17]
    assert remote.undo(running.require(engine.home), engine.home).epoch == epoch + 2
    assert cuts_of(engine) == before
    with pytest.raises(DwarfStarError, match="no plan to go back to"):
        remote.undo(running.require(engine.home), engine.home)


def test_of_other_boundaries_a_stage_that_stays_keeps_its_cells_and_the_others_take_theirs(tmp_path: Path) -> None:
    requests = bodies([f"{n}: " + "abc def " * 30 for n in range(4)], 300)
    more = ("--slots", "4", "--carry", "on", "--cuts", "4,8")
    with EngineProcess(tmp_path / "home", "toy:12:5", *more, *OPTIONS) as engine:
        serving, home = running.require(engine.wait_serving().home), engine.home
        want = asyncio.run(crowd(engine, requests))
        epoch, done = engine.status().epoch, list[int]()
        wanted = PlanRequest(cuts=(4, 6))

        def commit() -> None:
            done.append(remote.commit(serving, home, wanted, epoch).epoch)

        check(asyncio.run(crowd(engine, requests, commit)), want)
        assert done and cuts_of(engine) == [4, 6]
        moves = [(move.details["from"], move.details["carried"]) for move in engine.events("cells_carried")]
        assert moves == [("node2", 4), ("node2, node3", 4)]
        assert "4 streams go on, 0 of them from their beginning" in engine.output


def test_what_was_proposed_for_another_epoch_or_does_not_fit_is_refused(engine: EngineProcess) -> None:
    serving, before = running.require(engine.home), cuts_of(engine)
    with pytest.raises(DwarfStarError) as stale:
        remote.commit(serving, engine.home, PlanRequest(cuts=(4, 8)), engine.status().epoch + 1)
    assert stale.value.code == "stale_epoch"
    assert "cuts must rise" in proposal(engine, PlanRequest(cuts=(8, 4))).error
    assert proposal(engine, PlanRequest(excluded=("nobody",))).code == "no_such_node"
    assert cuts_of(engine) == before


def test_an_override_below_what_is_in_use_is_refused_or_replanned(engine: EngineProcess) -> None:
    serving = running.require(engine.home)
    was = engine.node("node3")
    assert was is not None and was.bandwidth_gb_s
    with pytest.raises(DwarfStarError, match=r"it must lend 0\.\d\d GiB at least.*--replan"):
        remote.override(serving, engine.home, "node3", "0.08", replan=False)
    held = engine.node("node3")
    assert held is not None and held.override == was.override
    assert remote.override(serving, engine.home, "node3", "0.08", replan=True).replanned
    now = engine.node("node3")
    assert now is not None and (now.override, now.effective_vram_gib) == ("0.08", 0.08)
    layers = next((one.layers for one in engine.status().stages if one.node == "node3"), (0, 0))
    assert layers[1] - layers[0] < 10
    back = remote.override(serving, engine.home, "node3", "", replan=False)
    assert back.override == was.override


def test_a_committed_plan_and_an_override_survive_a_restart(tmp_path: Path) -> None:
    home = tmp_path / "home"
    wanted = PlanRequest(cuts=(2, 9))
    with EngineProcess(home, "toy:12", *OPTIONS) as engine:
        serving = running.require(engine.wait_serving().home)
        assert remote.commit(serving, home, wanted, engine.status().epoch).after.strategy == "given"
        assert remote.override(serving, home, "node1", "50%", replan=False).override == "50%"
    with EngineProcess(home, "toy:12", *OPTIONS) as engine:
        serving = running.require(engine.wait_serving().home)
        assert cuts_of(engine) == [2, 9]
        node = engine.node("node1")
        assert node is not None and node.override == "50%"
        assert proposal(engine, PlanRequest()).owner
        remote.commit(serving, home, PlanRequest(auto=True), 0)
        assert cuts_of(engine) != [2, 9] and not proposal(engine, PlanRequest()).owner
