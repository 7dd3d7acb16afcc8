"""A coordinator with several pipelines, whose nodes are played: who gets a request, and what a loss costs whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.node import coordinator as coordinator_module
from dwarfstar_engine.node import dealer as dealer_module
from dwarfstar_engine.node import pipeline as module
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.source import Source, open_source
from dwarfstar_engine.node.vocab import ToyVocab, Vocab
from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.plan.shares import SPARE
from dwarfstar_engine.plan.standby import whole_bytes
from dwarfstar_engine.serving import Request, Sampling
from dwarfstar_engine.wire.generated import control_pb2 as pb
from unit.test_recovery import Hop, Player, Sink, make, until

DAY_S = 86400.0


@asynccontextmanager
async def playing(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str, **given: Any
) -> AsyncIterator[tuple[Coordinator, dict[str, Player]]]:
    """A coordinator that runs, and nodes that have joined it."""
    Hop.gate = asyncio.Event()
    Hop.gate.set()
    monkeypatch.setattr(module, "RingSender", Hop)
    monkeypatch.setattr(module, "PAUSE_S", (0.0, *[0.01] * 5))
    monkeypatch.setattr(coordinator_module, "WATCH_S", 0.02)
    monkeypatch.setattr(dealer_module, "LOOK_S", 0.0)
    coordinator = make(folder, **{"replicas": 2, "wait_nodes": len(names), **given})
    players = {name: Player(coordinator, name) for name in "abcd"}
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(player.play()) for player in players.values()]
        tasks.append(group.create_task(coordinator.run()))
        for name in names:
            coordinator.nodes.attach(players[name].member)
        yield coordinator, players
        for task in tasks:
            task.cancel()


def rings(coordinator: Coordinator) -> list[str]:
    """Who serves: the nodes of each pipeline, in order; empty: it is down."""
    return [
        "".join(stage.member.name for stage in one.ring.stages) if one.serving else "" for one in coordinator.pipelines
    ]


def loads(coordinator: Coordinator) -> list[int]:
    """Of each pipeline that serves: its requests."""
    found = [one.dispatcher.scheduler for one in coordinator.pipelines if one.dispatcher is not None]
    return [one.active + one.queued for one in found]


def ask(coordinator: Coordinator, count: int) -> list[Sink]:
    sinks = [Sink() for _ in range(count)]
    for number, sink in enumerate(sinks):
        coordinator.generate(Request((97 + number,), Sampling()), sink)
    return sinks


async def test_requests_go_where_least_is_to_be_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path, "a", "b", slots=2) as (coordinator, _):
        await until(lambda: rings(coordinator) == ["a", "b"])
        ask(coordinator, 3)
        assert loads(coordinator) == [2, 1]
        ask(coordinator, 3)
        assert loads(coordinator) == [3, 3]
        status = coordinator.status()
        assert (status.throughput.active + status.throughput.queued, status.epoch) == (6, 2)
        assert [(stage.node, stage.pipeline) for stage in status.stages] == [("a", 0), ("b", 1)]


async def test_a_lost_pipelines_streams_are_carried_by_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path, "a", "b", slots=3) as (coordinator, players):
        await until(lambda: rings(coordinator) == ["a", "b"])
        sinks = ask(coordinator, 4)
        assert loads(coordinator) == [2, 2]
        coordinator.nodes.broken(players["b"].member)
        await until(lambda: loads(coordinator) == [4])
        assert rings(coordinator) == ["a", ""] and coordinator.pipelines[0].epoch == 1
        assert coordinator.health()["status"] == "ok"
        coordinator.nodes.attach(players["b"].member)
        await until(lambda: rings(coordinator) == ["a", "b"])
        await until(lambda: loads(coordinator) == [3, 1])  # it has the slot that was waited for
        assert not any(sink.errors for sink in sinks)


async def test_a_stage_that_breaks_is_brought_up_again_beside_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path, "a", "b") as (coordinator, players):
        await until(lambda: rings(coordinator) == ["a", "b"])
        sinks = ask(coordinator, 4)
        players["a"].say(pb.STAGE_STATE_BROKEN)
        await until(lambda: rings(coordinator) == ["a", "b"] and coordinator.pipelines[0].epoch == 3)
        await until(lambda: sum(loads(coordinator)) == 4)
        assert not any(sink.errors for sink in sinks) and coordinator.pipelines[1].epoch == 2


async def test_with_none_left_streams_wait_for_whoever_comes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path, "a", "b") as (coordinator, players):
        await until(lambda: rings(coordinator) == ["a", "b"])
        sinks = ask(coordinator, 2)
        for name in "ab":
            coordinator.nodes.broken(players[name].member)
        await until(lambda: rings(coordinator) == ["", ""])
        assert coordinator.health()["status"] == "unavailable"
        sinks += ask(coordinator, 1)
        coordinator.nodes.attach(players["b"].member)
        await until(lambda: rings(coordinator) == ["", "b"])
        await until(lambda: loads(coordinator) == [3])
        assert not any(sink.errors for sink in sinks)


async def test_one_of_two_nodes_can_be_drained_and_not_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path, "a", "b") as (coordinator, players):
        await until(lambda: rings(coordinator) == ["a", "b"])
        sinks = ask(coordinator, 4)
        b = players["b"]
        assert await coordinator.pipeline_of(b.member).moves.drain(b.member)
        assert rings(coordinator) == ["a", ""] and loads(coordinator) == [4]
        await until(lambda: b.told[-2:] == ["release", "drained"])
        with pytest.raises(PlanError, match="a cannot be drained"):
            await coordinator.pipeline_of(players["a"].member).moves.drain(players["a"].member)
        coordinator.pipeline_of(b.member).moves.undo(b.member)
        await until(lambda: rings(coordinator) == ["a", "b"])
        assert not any(sink.errors for sink in sinks)


async def test_a_node_that_comes_later_is_a_replica_more_and_then_a_spare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path, "a", rejoin_s=0.0) as (coordinator, players):
        await until(lambda: rings(coordinator) == ["a", ""])
        coordinator.nodes.attach(players["b"].member)
        await until(lambda: rings(coordinator) == ["a", "b"])
        coordinator.nodes.attach(players["c"].member)
        assert coordinator.dealer.dealt["id-c"] == SPARE and players["c"].told in ([], ["welcome"])
        coordinator.nodes.broken(players["a"].member)
        await until(lambda: rings(coordinator) == ["c", "b"])
        assert coordinator.pipelines[1].epoch == 2, "which did not stop"


async def test_what_two_broken_pipelines_left_serves_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"replicas": 0, "pipelines": 2, "rejoin_s": 0.0, "context": 16, "wait_nodes": 4}
    async with playing(monkeypatch, tmp_path, **given) as (coordinator, players):
        monkeypatch.setattr(
            coordinator_module, "WATCH_S", DAY_S
        )  # not when it is looked at, but when they are given up
        half_fits(coordinator, players)
        await until(lambda: sorted(map(len, rings(coordinator))) == [2, 2])
        sinks = ask(coordinator, 2)
        left = [ring[0] for ring in rings(coordinator)]
        for ring in rings(coordinator):
            coordinator.nodes.broken(players[ring[1]].member)
        await until(lambda: sorted(rings(coordinator)[0]) == sorted(left) and not rings(coordinator)[1])
        await until(lambda: sum(loads(coordinator)) == 2)
        assert not any(sink.errors for sink in sinks)


async def test_a_smaller_model_is_served_only_when_all_nodes_are_one_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the one that is wanted, by several again, when the nodes are back."""
    for one in (module, coordinator_module):
        monkeypatch.setattr(one, "REPLAN_IDLE_S", 0.0)
    given = {"replicas": 0, "pipelines": 2, "rejoin_s": 0.0, "context": 16, "wait_nodes": 4}
    async with playing(monkeypatch, tmp_path, **given) as (coordinator, players):
        main = coordinator.source
        half_fits(coordinator, players)
        coordinator.planner.fallbacks = (open_source("toy:2", tmp_path, "f16"),)
        coordinator.open_vocab = open_toy
        await until(lambda: sorted(map(len, rings(coordinator))) == [2, 2])
        for name in "abc":
            coordinator.nodes.broken(players[name].member)
        await until(lambda: rings(coordinator) == ["d", ""] and coordinator.source is not main)
        for name in "abc":
            coordinator.nodes.attach(players[name].member)
        await until(lambda: coordinator.source is main and sorted(map(len, rings(coordinator))) == [2, 2])


async def open_toy(_: Source) -> Vocab:
    return ToyVocab()


def half_fits(coordinator: Coordinator, players: dict[str, Player]) -> None:
    """All join, and any two hold the model."""
    first = coordinator.pipelines[0]
    half, whole = (whole_bytes(first.stage_plan("x", (0, end)), first.need()) for end in (4, 8))
    for player in players.values():
        player.member.device.effective_vram_bytes = (half + whole) // 2
        coordinator.nodes.attach(player.member)


async def test_the_advisor_may_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(coordinator_module, "REPLAN_IDLE_S", 0.0)
    async with playing(monkeypatch, tmp_path, "a", replicas=0, pipelines="auto", rejoin_s=0.0) as (
        coordinator,
        players,
    ):
        await until(lambda: rings(coordinator) == ["a"])
        coordinator.nodes.attach(players["b"].member)
        await until(lambda: rings(coordinator) == ["a", "b"])
        assert coordinator.dealer.wanted.kind is None
        await asyncio.wait_for(coordinator.take(Kind.SPLIT), 5.0)
        assert sorted(rings(coordinator)[0]) == ["a", "b"] and not rings(coordinator)[1]
        await asyncio.wait_for(coordinator.take(Kind.REPLICAS), 5.0)
        assert sorted(rings(coordinator)) == ["a", "b"]


async def test_what_an_owner_has_taken_is_what_another_coordinator_begins_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {"replicas": 0, "rejoin_s": 0.0}
    async with playing(monkeypatch, tmp_path, "a", "b", **given) as (coordinator, _):
        await until(lambda: "ab" in rings(coordinator)[0] and not coordinator.dealer.text)
        async with asyncio.timeout(5.0):
            await coordinator.take(Kind.REPLICAS)
        kept = coordinator.dealer.text
        async with asyncio.timeout(5.0):
            await coordinator.take(None)
        assert sorted(map(len, rings(coordinator))) == [0, 2] and not coordinator.dealer.text
    async with playing(monkeypatch, tmp_path, **given, wait_nodes=1) as (coordinator, players):
        coordinator.restore(kept)
        for name in "ab":
            coordinator.nodes.attach(players[name].member)
        await until(lambda: sorted(rings(coordinator)) == ["a", "b"])
        assert coordinator.dealer.text == kept


async def test_with_one_machine_taken_the_plan_is_that_of_the_pipeline_that_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path, "a", "b", rejoin_s=0.0) as (coordinator, players):
        await until(lambda: rings(coordinator) == ["a", "b"])
        players["b"].member.device.bandwidth_gb_s = 500.0
        async with asyncio.timeout(5.0):
            await coordinator.take(Kind.SINGLE)
        alone = next(one for one in coordinator.pipelines if one.serving)
        assert sum(one.serving for one in coordinator.pipelines) == 1
        assert coordinator.first is coordinator.pipeline_at(0) is alone and coordinator.status().reason == ""
        async with asyncio.timeout(5.0):
            await coordinator.take(Kind.REPLICAS, alone.epoch)
        assert sorted(rings(coordinator)) == ["a", "b"]
