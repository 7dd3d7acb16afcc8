"""A ring whose nodes, which are played, run two files of one model: each is told its own, also after a loss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.node import pipeline as module
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.epoch import Epoch
from dwarfstar_engine.views import PlanRequest
from dwarfstar_engine.wire.generated import control_pb2 as pb
from unit.test_recovery import Hop, Player, make, serves, until

Told = list[tuple[str, tuple[int, int], str]]  # node, layers and fingerprint of each assignment


@asynccontextmanager
async def playing(
    monkeypatch: pytest.MonkeyPatch, folder: Path, **given: Any
) -> AsyncIterator[tuple[Coordinator, Player, Player, Told]]:
    """Two nodes, of which b holds a file of layers twice as large."""
    Hop.gate = asyncio.Event()
    Hop.gate.set()
    monkeypatch.setattr(module, "RingSender", Hop)
    told: Told = []
    assign = Epoch.assign

    def recorded(*arguments: Any) -> pb.Assign:
        made = assign(*arguments)
        told.append((arguments[1].node, (made.layer_begin, made.layer_end), made.model.fingerprint))
        return made

    monkeypatch.setattr(Epoch, "assign", recorded)
    coordinator = make(folder, rejoin_s=0.0, **given)
    main = coordinator.main
    costs = replace(main.costs, layer_bytes=tuple(2 * size for size in main.costs.layer_bytes))
    a, b = Player(coordinator, "a"), Player(coordinator, "b")
    b.member.file = replace(main, fingerprint="b's", quantisation="Q8_0", costs=costs, stands_for=main.fingerprint)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(player.play()) for player in (a, b)]
        tasks.append(group.create_task(coordinator.run()))
        for player in (a, b):
            coordinator.nodes.attach(player.member)
        await until(lambda: serves(coordinator))
        yield coordinator, a, b, told
        for task in tasks:
            task.cancel()


async def test_each_node_is_told_its_own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b, told):
        own = coordinator.main.fingerprint
        assert told == [("id-a", (0, 4), own), ("id-b", (4, 8), "b's")]
        first, second = coordinator.ring.stages
        assert b.member.file is not None and first.plan.weights_bytes == 4 << 20
        assert second.plan.weights_bytes == sum(b.member.file.costs.layer_bytes[4:]) + (1 << 20)
        assert [stage.quantisation for stage in coordinator.status().stages] == ["", "Q8_0"]
        shown = coordinator.steering.present_view().stages
        assert [stage.quantisation for stage in shown] == ["", "Q8_0"]
        await coordinator.steering.commit(PlanRequest(cuts=(2,)), 0)
        assert told[2:4] == [("id-a", (0, 2), own), ("id-b", (2, 8), "b's")]
        assert coordinator.plan() == coordinator.planned, "what its owner committed counts the same bytes"


async def test_what_a_lost_node_had_is_loaded_from_the_file_of_who_takes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b, told):
        before = coordinator.epoch
        coordinator.nodes.broken(a.member)
        await until(lambda: coordinator.epoch > before and serves(coordinator))
        assert {one[0] for one in told[2:]} == {"id-b"} and {one[2] for one in told[2:]} == {"b's"}
        assert b.member.file is not None
        weights = sum(stage.plan.weights_bytes for stage in coordinator.ring.stages)
        assert weights == b.member.file.costs.total


async def test_cuts_by_hand_count_the_bytes_of_each_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path, cuts=(5,)) as (coordinator, *_):
        assert [stage.plan.weights_bytes for stage in coordinator.ring.stages] == [5 << 20, (6 << 20) + (1 << 20)]


async def test_a_smaller_model_is_not_mixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b, _told):
        other = replace(coordinator.main, fingerprint="smaller")
        assert b.member.runs(other) is other and b.member.runs(coordinator.main) is b.member.file
