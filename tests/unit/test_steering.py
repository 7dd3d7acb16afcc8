"""The owner's hand on the plan, with a coordinator that runs and nodes that are played."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.errors import DwarfStarError, SettingsError
from dwarfstar_engine.node import moves as moves_module
from dwarfstar_engine.node.balancer import Balancer
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.dispatcher import ALONE_FRAMES
from dwarfstar_engine.node.members import GIB
from dwarfstar_engine.node.needs import PROCESS_BYTES
from dwarfstar_engine.node.steering import STALE
from dwarfstar_engine.plan.balance import GAP_S
from dwarfstar_engine.views import PlanRequest
from dwarfstar_engine.wire.generated import control_pb2 as pb
from unit.test_recovery import playing

DEADLINE_S = 10.0
AUTO = [("id-a", (0, 4)), ("id-b", (4, 8))]


async def until(look: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not look():  # noqa: ASYNC110 - looks at what another part of the program does
            await asyncio.sleep(0.001)


def slices(coordinator: Coordinator) -> list[tuple[str, tuple[int, int]]]:
    return [(stage.plan.node, stage.plan.layers) for stage in coordinator.ring.stages]


def said(coordinator: Coordinator, kind: str) -> list[str]:
    return [event.cause for event in coordinator.journal._log.since(0)[0] if event.kind == kind]


async def serving(coordinator: Coordinator) -> None:
    await until(lambda: coordinator.serving)


async def refused(work: Any) -> DwarfStarError:
    with pytest.raises(DwarfStarError) as error:
        await work
    return error.value


def cuts(*at: int) -> PlanRequest:
    return PlanRequest(cuts=at)


async def test_a_proposal_changes_nothing_and_says_what_would(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await serving(coordinator)
        view = await coordinator.steering.propose(cuts(6))
        assert view.present is not None and view.proposed is not None
        assert [one.layers for one in view.present.stages] == [(0, 4), (4, 8)]
        assert [one.layers for one in view.proposed.stages] == [(0, 6), (6, 8)]
        assert [one.node for one in view.proposed.stages] == ["a", "b"]
        assert {one.node: (one.load, one.drop) for one in view.delta} == {"a": (((4, 6),), ()), "b": ((), ((4, 6),))}
        assert view.epoch == 1 and view.legal_cuts == tuple(range(1, 8)) and not view.owner and not view.undo
        assert view.present.alternatives and slices(coordinator) == AUTO
        bad = await coordinator.steering.propose(PlanRequest(pins={"nobody": (0, 2)}))
        assert bad.proposed is None and bad.code == "no_such_node" and bad.present is not None
        small = await coordinator.steering.propose(PlanRequest(context=64))
        assert small.proposed is not None and small.proposed.context == 64
        wire = await coordinator.steering.propose(PlanRequest(wire="q8"))
        assert wire.proposed is not None and wire.proposed.context == view.present.context


async def test_a_committed_plan_serves_and_is_taken_back(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await serving(coordinator)
        steering = coordinator.steering
        done = await steering.commit(cuts(6), 1)
        assert (done.epoch, done.loaded_first) == (2, True) and slices(coordinator) == [
            ("id-a", (0, 6)),
            ("id-b", (6, 8)),
        ]
        assert done.before.strategy == "proportional" and done.after.strategy == "given"
        assert coordinator.plan() == coordinator.planned, "the planner leaves it"
        assert (await refused(steering.commit(cuts(5), 1))).code == STALE
        assert (await steering.commit(cuts(2), 2)).epoch == 3
        assert (await steering.undo(0)).epoch == 4 and steering.decided
        assert (await refused(steering.undo(3))).code == STALE
        assert (await steering.undo(4)).epoch == 5
        assert slices(coordinator) == AUTO and not steering.decided and not steering.owner_text
        assert (await refused(steering.undo(0))).code == "nothing_to_undo"


async def test_the_planner_decides_again_when_it_is_asked_to(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await serving(coordinator)
        await coordinator.steering.commit(PlanRequest(pins={"b": (0, 2)}), 0)
        assert slices(coordinator) == [("id-b", (0, 2)), ("id-a", (2, 8))]
        look = await coordinator.steering.propose(PlanRequest())
        assert (look.pins, look.excluded, look.owner) == ({"b": (0, 2)}, (), True)
        await coordinator.steering.commit(PlanRequest(auto=True), 0)
        assert slices(coordinator) == AUTO and not coordinator.steering.decided
        same = await coordinator.steering.commit(PlanRequest(), 0)
        assert same.epoch == coordinator.epoch and coordinator.steering.decided, "kept as it is, without a new epoch"


async def test_forecasts_follow_what_stages_take_in_use(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await serving(coordinator)
        steering, pipeline = coordinator.steering, coordinator.first

        async def asked() -> tuple[list[float], list[float]]:
            view = await steering.propose(cuts(6))
            assert view.present is not None and view.proposed is not None
            return [stage.ms for stage in view.present.stages], [stage.ms for stage in view.proposed.stages]

        for node, layers in AUTO:
            steering.surveyor.heard(pipeline.source, node, layers, pb.StageProfile(step_ms=4.0))
        present, proposed = await asked()
        assert present == pytest.approx([4.0, 4.0])
        other = proposed[1]
        dispatcher = pipeline._dispatcher
        assert dispatcher is not None
        for _ in range(ALONE_FRAMES):
            dispatcher.stages[1].add_alone(6000)
        steering.learn(1.0)
        present, proposed = await asked()
        assert present == pytest.approx([4.0, 6.0])
        assert proposed[1] == pytest.approx(1.5 * other, rel=1e-3)


async def test_what_is_not_as_asked_is_not_carried_out(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await serving(coordinator)
        b.member.device.effective_vram_bytes = PROCESS_BYTES + (9 << 20)  # a few layers
        view = await coordinator.steering.propose(cuts(1))
        assert (
            view.proposed is not None and view.proposed.stages[0].layers[1] > 1 and "b has 0.10 GiB" in view.clamped[0]
        )
        assert (await refused(coordinator.steering.commit(cuts(1), 1))).code == "not_possible"
        assert (await refused(coordinator.steering.commit(PlanRequest(context=64), 1))).code == "needs_restart"
        assert (await refused(coordinator.steering.commit(PlanRequest(wire="q8"), 1))).code == "needs_restart"
        coordinator.nodes.broken(a.member)
        await until(lambda: not coordinator.serving)
        assert (await refused(coordinator.steering.commit(cuts(4), 0))).code == "not_serving"


async def test_a_plan_that_is_not_loaded_leaves_everything_as_it_was(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(moves_module, "LOAD_S", 0.05)
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b):
        await serving(coordinator)
        b.answers = False
        with pytest.raises((DwarfStarError, TimeoutError)):
            await coordinator.steering.commit(cuts(6), 1)
        assert slices(coordinator) == AUTO and coordinator.serving and not coordinator.steering.decided
        assert not (await coordinator.steering.propose(PlanRequest())).undo


async def test_a_plan_whose_node_is_gone_is_set_aside_until_it_is_back(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b):
        await serving(coordinator)
        await coordinator.steering.commit(cuts(6), 1)
        coordinator.nodes.broken(b.member)
        await until(lambda: coordinator.serving and {node for node, _ in slices(coordinator)} == {"id-a"})
        assert "set aside: 1 of its nodes are gone" in said(coordinator, "owner_plan")[-1]
        assert coordinator.steering.decided
        coordinator.nodes.attach(b.member)
        assert {node for node, _ in slices(coordinator)} == {"id-a"}
        assert [stage.layers for stage in coordinator.plan().stages] == [(0, 6), (6, 8)]
        coordinator.pipelines[0].switch(coordinator.plan(), "it is back")
        await until(lambda: coordinator.serving and {node for node, _ in slices(coordinator)} == {"id-a", "id-b"})
        assert said(coordinator, "owner_plan")[-1] == "the owner's plan counts again"


async def test_what_was_decided_is_restored(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b):
        await serving(coordinator)
        steering = coordinator.steering
        await steering.commit(PlanRequest(cuts=(6,), excluded=()), 1)
        kept = steering.owner_text
        steering.restore("", {})
        assert not steering.decided and [stage.layers for stage in coordinator.plan().stages] == [(0, 4), (4, 8)]
        steering.restore(kept, {"id-b": "50%", "id-x": "nonsense", "id-y": 3})
        assert steering.owner_text == kept and steering.lent == {"id-b": "50%"} and b.member.lent == "50%"
        assert [stage.layers for stage in coordinator.plan().stages] == [(0, 6), (6, 8)]
        assert not steering.awaited_s(0.0)
        del coordinator.members["id-a"]
        wait = coordinator.settings.rejoin_s
        assert steering.awaited_s(100.0) == wait and steering.awaited_s(100.0 + wait) == 0.0
        coordinator.members["id-a"] = b.member  # as it was, for those who end


async def test_a_plan_that_serves_is_left_for_a_much_faster_one_only(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await serving(coordinator)
        coordinator.settings = coordinator.settings.model_copy(update={"strategy": "fastest"})
        hear = coordinator.steering.surveyor.heard

        def took(a_ms: float, b_ms: float) -> None:
            hear(coordinator.source, "id-a", (0, 4), pb.StageProfile(step_ms=a_ms))
            hear(coordinator.source, "id-b", (4, 8), pb.StageProfile(step_ms=b_ms))

        took(10.0, 10.5)
        assert coordinator.plan() is coordinator.planned
        took(10.0, 40.0)
        moved = coordinator.plan().stages
        assert next(stage.layers[1] - stage.layers[0] for stage in moved if stage.node == "id-a") > 4


async def test_a_node_lends_what_its_owner_says(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b):
        await serving(coordinator)
        steering, node = coordinator.steering, b.member
        error = await refused(steering.override("b", "0.01", replan=False))
        assert error.code == "in_use" and "layers 4–7" in error.message and "0.10 GiB at least" in error.message
        assert (node.override, node.usable_bytes, coordinator.epoch) == ("1", GIB, 1)
        fits = await steering.override("b", "50%", replan=False)
        assert (fits.override, fits.effective_vram_gib, fits.replanned) == ("50%", 0.5, False)
        assert steering.lent == {"id-b": "50%"} and node.usable_bytes == GIB // 2
        await until(lambda: "lend" in b.told)
        assert (await refused(steering.override("nobody", "1", replan=False))).code == "no_such_node"
        with pytest.raises(SettingsError):
            await steering.override("b", "lots", replan=False)
        moved = await steering.override("b", "0.0976", replan=True)
        assert moved.replanned and coordinator.epoch == 2 and node.override == "0.0976"
        assert all(layers[1] - layers[0] < 4 for name, layers in slices(coordinator) if name == "id-b")
        back = await steering.override("b", "", replan=False)
        assert back.override == "1" and not steering.lent and node.usable_bytes == GIB
        assert said(coordinator, "override")[-1] == "b lends 1.00 GiB"


async def test_a_model_that_would_not_fit_any_more_refuses_an_override(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await serving(coordinator)
        a.member.device.effective_vram_bytes = 25 << 20
        error = await refused(coordinator.steering.override("b", "0.001", replan=True))
        assert "does not fit" in error.message or "do not fit" in error.message
        assert not coordinator.steering.lent and b.member.override == "1" and slices(coordinator) == AUTO


def report(coordinator: Coordinator, *busy: float) -> None:
    for stage, share in zip(coordinator.ring.stages, busy, strict=True):
        stage.report = pb.StageReport(epoch=coordinator.epoch, busy=share)


@pytest.mark.parametrize(("mode", "follows"), [("off", False), ("advise", False), ("on", True)])
async def test_unequal_stages_are_told_of_or_made_equal(
    monkeypatch: Any, tmp_path: Path, mode: str, follows: bool
) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await serving(coordinator)
        coordinator.settings = coordinator.settings.model_copy(update={"auto_balance": mode})
        told: dict[str, str] = {}
        balancer = Balancer(coordinator.steering, coordinator.journal, told.__setitem__)
        report(coordinator, 0.9, 0.3)
        for second in range(0, int(GAP_S) + 10, 5):
            balancer.tick(coordinator.pipelines[0], 1000.0 + second)
        if mode == "off":
            assert not told and not said(coordinator, "balance")
            return
        assert said(coordinator, "balance") and "from a to b" in said(coordinator, "balance")[0]
        if follows:
            await until(lambda: coordinator.epoch == 2 and coordinator.serving)
            await until(lambda: told["balance"].startswith("done"))
            assert slices(coordinator)[0][1][1] < 4
        else:
            assert "dwarfstar plan --cuts" in told["balance"] and slices(coordinator) == AUTO


async def test_an_owners_plan_is_not_changed_by_itself(monkeypatch: Any, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await serving(coordinator)
        await coordinator.steering.commit(cuts(6), 1)
        coordinator.settings = coordinator.settings.model_copy(update={"auto_balance": "on"})
        told: dict[str, str] = {}
        balancer = Balancer(coordinator.steering, coordinator.journal, told.__setitem__)
        report(coordinator, 0.9, 0.3)
        for second in range(0, int(GAP_S) + 10, 5):
            balancer.tick(coordinator.pipelines[0], 1000.0 + second)
        assert "--commit" in told["balance"] and coordinator.epoch == 2
