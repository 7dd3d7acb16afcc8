"""Which plan follows a broken epoch, and how long the coordinator listens before it decides."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.node import pipeline as pipeline_module
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.epoch import Epoch, Stage
from dwarfstar_engine.node.kept_plan import KeptPlan
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.planner import WAITING
from dwarfstar_engine.node.source import open_source
from dwarfstar_engine.node.vocab import ToyVocab
from dwarfstar_engine.plan.proportional import Plan
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.trust import NodeFiles

DEADLINE_S = 10.0


def say(coordinator: Coordinator, name: str, layers: tuple[int, int], state: pb.StageState.ValueType) -> None:
    layers_told = pb.Slice(begin=layers[0], end=layers[1])
    event = pb.StageEvent(epoch=coordinator.epoch, state=state, layers=layers_told, standby=True)
    coordinator.heard(coordinator.members[name], pb.NodeMessage(stage_event=event))


@pytest.fixture
def broken(tmp_path: Path) -> Coordinator:
    """Three nodes served with a copy of each stage; the epoch is over, and nobody knows yet why."""
    settings = Settings(home=tmp_path, standby=1)
    source = open_source("toy:9", tmp_path, settings.kv)
    coordinator = Coordinator(settings, source, ToyVocab(), NodeFiles(tmp_path), "coordinator")
    for name in "abc":
        coordinator.nodes.attach(Member(name, name, "127.0.0.1", pb.Device(effective_vram_bytes=1 << 30)))
    coordinator.planner.planned = plan = coordinator.plan()
    stages = plan.stages
    members = [coordinator.members[stage.node] for stage in stages]
    coordinator.pipelines[0]._ring = Epoch(
        1, 0, "coordinator", tuple(Stage(plan, node) for plan, node in zip(stages, members, strict=True))
    )
    for index, stage in enumerate(stages):
        say(coordinator, stage.node, stage.layers, pb.STAGE_STATE_LINKED)
        say(coordinator, stages[index - 1].node, stage.layers, pb.STAGE_STATE_READY)
    coordinator.planner.sound = True
    return coordinator


def nodes(plan: Plan) -> list[str]:
    return [stage.node for stage in plan.stages]


async def test_a_dead_stages_copy_follows_it_and_its_death_is_waited_for(broken: Coordinator) -> None:
    settling = asyncio.create_task(broken.pipelines[0]._settle())
    await asyncio.sleep(0)
    assert not settling.done()
    assert broken.planned is not None
    say(broken, "b", broken.planned.stages[1].layers, pb.STAGE_STATE_EXITED)
    await asyncio.wait_for(settling, DEADLINE_S)
    _, plan = broken.pipelines[0]._next_plan()
    assert nodes(plan) == ["a", "a", "c"]
    assert [stage.layers for stage in plan.stages] == [stage.layers for stage in broken.planned.stages]


async def test_so_does_that_of_a_lost_node(broken: Coordinator) -> None:
    broken.nodes.broken(broken.members["c"])
    await asyncio.wait_for(broken.pipelines[0]._settle(), DEADLINE_S)
    assert nodes(broken.pipelines[0]._next_plan()[1]) == ["a", "b", "b"]


async def test_a_lost_connection_leaves_all_stages_where_they_are(
    broken: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "SETTLE_S", 0.01)
    await asyncio.wait_for(broken.pipelines[0]._settle(), DEADLINE_S)
    assert nodes(broken.pipelines[0]._next_plan()[1]) == ["a", "b", "c"]


async def test_a_node_that_joins_meanwhile_leaves_the_plan_as_it_is(broken: Coordinator) -> None:
    broken.nodes.broken(broken.members["c"])
    broken.nodes.attach(Member("d", "d", "127.0.0.1", pb.Device(effective_vram_bytes=1 << 30)))
    assert nodes(broken.pipelines[0]._next_plan()[1]) == ["a", "b", "b"]


async def test_a_take_over_that_failed_is_not_tried_again(broken: Coordinator) -> None:
    broken.nodes.broken(broken.members["c"])
    broken.planner.sound = False
    assert nodes(broken.pipelines[0]._next_plan()[1]) == ["a", "b"]


async def test_a_prepared_plan_comes_first_unless_a_node_of_it_is_gone(broken: Coordinator) -> None:
    prepared = broken.plan(without=("b",))
    broken.pipelines[0].switch(prepared, "it is loaded")
    assert nodes(broken.pipelines[0]._next_plan()[1]) == ["a", "c"]
    broken.pipelines[0]._next = prepared
    broken.nodes.broken(broken.members["c"])
    assert nodes(broken.pipelines[0]._next_plan()[1]) == ["a", "b", "b"]


async def test_drained_nodes_take_nothing_over(broken: Coordinator) -> None:
    broken.members["a"].drained = True
    assert broken.planned is not None
    say(broken, "b", broken.planned.stages[1].layers, pb.STAGE_STATE_EXITED)
    assert nodes(broken.pipelines[0]._next_plan()[1]) == ["c", "b", "c"]
    for node in broken.members.values():
        node.drained = True
    with pytest.raises(PlanError):
        broken.plan()


async def test_who_takes_over_waits_for_the_nodes_that_served_and_not_for_all_a_start_waits_for(tmp_path: Path) -> None:
    """Or the loss of one node at that moment would keep the others, which can serve, from it."""
    settings = Settings(home=tmp_path, wait_nodes=4, rejoin_s=10.0)
    source = open_source("toy:9", tmp_path, settings.kv)
    coordinator = Coordinator(settings, source, ToyVocab(), NodeFiles(tmp_path), "coordinator")
    coordinator.begin(2, KeptPlan(("a", "b", "c"), (3, 6), frozenset("abc"), until=100.0))
    planner = coordinator.planner

    def attach(*names: str) -> None:
        for name in names:
            coordinator.nodes.attach(Member(name, name, "127.0.0.1", pb.Device(effective_vram_bytes=1 << 30)))

    for now, left_s in ((99.0, 1.0), (101.0, 9.0)):
        with pytest.raises(PlanError) as waiting:
            planner.now(source, now)
        assert waiting.value.code == WAITING and waiting.value.retry_after_s == left_s
    attach("a", "b")
    with pytest.raises(PlanError, match="1 nodes have not come over yet"):
        planner.now(source, 99.0)
    assert nodes(planner.now(source, 100.5)[1]) == ["a", "b"]
    attach("c")
    assert [stage.layers for stage in planner.now(source, 99.0)[1].stages] == [(0, 3), (3, 6), (6, 9)]
    coordinator.retire("another leads")
    coordinator.begin(3)
    with pytest.raises(PlanError, match="of 4 nodes have joined"):
        planner.now(source, 200.0)
