"""A coordinator whose nodes are played: what breaks while an epoch is brought up is seen at once and harms nobody."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.errors import DwarfStarError, Unavailable
from dwarfstar_engine.node import pipeline as module
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.kept_plan import KeptPlan
from dwarfstar_engine.node.members import END, Member
from dwarfstar_engine.node.source import open_source
from dwarfstar_engine.node.vocab import ToyVocab
from dwarfstar_engine.serving import Request, Sampling, Token
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire import frames, trust
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.trust import OWNER, NodeFiles

SOON_S = 4.0  # far below the deadlines of links, which are 10 and 15 s
NOW = trust.utc_now()
PROFILE = pb.StageProfile(step_ms=1.0)


class Hop:
    """The coordinator's hop to the first stage. gate: cleared, it takes for ever to open."""

    gate: asyncio.Event

    def __init__(self, on_lost: Callable[[str], None], _spare: object) -> None:
        self.on_lost = on_lost

    async def open(self, *_: Any) -> None:
        await Hop.gate.wait()

    def send(self, frame: bytes) -> None: ...

    async def flush(self) -> None: ...

    async def close(self) -> None: ...


class Sink:
    def __init__(self) -> None:
        self.errors: list[DwarfStarError] = []

    def put(self, token: Token) -> None: ...

    def fail(self, error: DwarfStarError) -> None:
        self.errors.append(error)


class Player:
    """A node that does as it is told. returns: its stage, if it is the last one, connects to the coordinator."""

    def __init__(self, coordinator: Coordinator, name: str) -> None:
        device = pb.Device(effective_vram_bytes=1 << 30)
        self.member = Member(f"id-{name}", name, "127.0.0.1", device, "first")
        self.told: list[str] = []
        self.returns = self.answers = True
        self.refuses = ""  # the name of a model that it cannot load
        self.layers = pb.Slice()
        self.keeps: list[tuple[int, int]] = []  # of each link: its epoch, and the one whose sequences are kept
        self.reaches: Callable[[], bool] = lambda: True  # the next stage
        self._coordinator = coordinator

    async def play(self) -> None:
        while True:
            message = await self.member.outbox.get()
            what = message.WhichOneof("message") or "end"
            self.told.append(what)
            if what == "assign":
                self.layers = pb.Slice(begin=message.assign.layer_begin, end=message.assign.layer_end)
                failed = message.assign.model.name == self.refuses
                state = pb.STAGE_STATE_READY if self.answers else pb.STAGE_STATE_LOADING
                self.say(pb.STAGE_STATE_FAILED if failed else state)
            if what == "link":
                self.keeps.append((message.link.epoch, message.link.keep))
            if what == "link" and message.link.next_hop and not self.reaches():
                self.say(pb.STAGE_STATE_BROKEN, "hop_failed")
            elif what == "link":
                self.layers = message.link.layers  # it may have several
                self.say(pb.STAGE_STATE_LINKED)
                if self.returns and not message.link.next_hop:
                    self._coordinator.pipeline_in(message.link.epoch).on_open(message.link.epoch)

    def say(self, state: pb.StageState.ValueType, code: str = "") -> None:
        event = pb.StageEvent(
            epoch=self._coordinator.pipeline_of(self.member).epoch,
            state=state,
            port=1,
            detail="it died",
            code=code,
            profile=PROFILE,
            layers=self.layers,
        )
        self._coordinator.heard(self.member, pb.NodeMessage(stage_event=event))


def make(folder: Path, **given: Any) -> Coordinator:
    files = NodeFiles(folder / "trust")
    trust.issue_local(trust.load_or_create_authority(folder / "trust", NOW), files, OWNER, NOW)
    settings = Settings(**{"home": folder, "wait_nodes": 2, **given})
    return Coordinator(settings, open_source("toy:8", folder, settings.kv), ToyVocab(), files, "coordinator")


@asynccontextmanager
async def playing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> AsyncIterator[tuple[Coordinator, Player, Player]]:
    """A coordinator that runs, and its two nodes, in the order of the ring."""
    Hop.gate = asyncio.Event()
    Hop.gate.set()
    monkeypatch.setattr(module, "RingSender", Hop)
    coordinator = make(folder)
    players = Player(coordinator, "a"), Player(coordinator, "b")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(player.play()) for player in players]
        tasks.append(group.create_task(coordinator.run()))
        for player in players:
            coordinator.nodes.attach(player.member)
        yield coordinator, *players
        for task in tasks:
            task.cancel()


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not look():  # noqa: ASYNC110 - looks at what another part of the program does
            await asyncio.sleep(0.005)


async def beyond(coordinator: Coordinator, epoch: int) -> None:
    await until(lambda: coordinator.epoch > epoch)


def serves(coordinator: Coordinator) -> bool:
    return bool(coordinator.health()["status"] == "ok")


async def test_a_stage_that_dies_before_the_ring_is_closed_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a ring that closes after it broke takes on no streams, whom nobody would ever tell."""
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await until(lambda: serves(coordinator))
        sink, b.returns = Sink(), False
        coordinator.generate(Request((97,), Sampling()), sink)
        a.say(pb.STAGE_STATE_BROKEN)
        await until(lambda: b.keeps[-1][0] == 2)
        a.say(pb.STAGE_STATE_BROKEN)
        coordinator.pipelines[0].on_open(2)  # too late
        b.returns = True
        await until(lambda: coordinator.epoch == 3 and serves(coordinator))
        await until(lambda: coordinator.status().throughput.active == 1)  # the stream is there
        assert not sink.errors
        assert "release" not in a.told + b.told, "they had no time to answer: they keep their weights"


async def test_a_node_that_is_lost_while_the_first_hop_opens_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await until(lambda: serves(coordinator))
        Hop.gate.clear()
        a.say(pb.STAGE_STATE_BROKEN)
        await until(lambda: b.keeps[-1][0] == 2)
        coordinator.nodes.broken(b.member)
        await until(lambda: coordinator.epoch == 3)
        Hop.gate.set()
        await until(lambda: serves(coordinator))
        assert [stage.node for stage in coordinator.status().stages] == ["a"] and "release" not in a.told


async def test_a_node_that_another_does_not_reach_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both reach the coordinator; without this it would try the same plan for ever."""
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await until(lambda: serves(coordinator))
        a.reaches = lambda: False
        monkeypatch.setattr(module, "PAUSE_S", (0.0, 0.1, 0.1, 0.1, 0.1))
        sink = Sink()
        coordinator.generate(Request((97,), Sampling()), sink)
        b.say(pb.STAGE_STATE_BROKEN)
        await until(lambda: serves(coordinator))
        status = coordinator.status()
        assert [stage.node for stage in status.stages] == ["a"] and not sink.errors
        assert any("node b is left out" in warning for warning in status.warnings)
        assert coordinator.planner.hops.avoided(time.monotonic()) == {b.member.id}
        coordinator.nodes.broken(b.member)
        coordinator.nodes.attach(b.member)  # it comes anew, repaired
        assert not coordinator.planner.hops.avoided(time.monotonic())


async def test_streams_that_wait_are_not_kept_by_long_pauses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "PAUSE_S", (0.0, 0.0, 0.0, 0.0, 600.0, 600.0))
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await until(lambda: serves(coordinator))
        coordinator.generate(Request((97,), Sampling()), Sink())
        a.say(pb.STAGE_STATE_BROKEN)
        b.answers = False
        await beyond(coordinator, 1)
        for attempt in range(7):
            before, b.answers = coordinator.epoch, attempt == 6
            a.say(pb.STAGE_STATE_FAILED)
            await beyond(coordinator, before)
        await until(lambda: serves(coordinator))


async def test_a_stage_that_hangs_while_it_loads_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.2)
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        b.answers = False
        await until(lambda: "release" in b.told)
        b.answers = True  # the new process
        await until(lambda: serves(coordinator))
        assert "release" not in a.told, "it was loaded"


async def test_epochs_freeze_no_garbage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is frozen is never collected: with each epoch that would be the requests of that moment."""
    gc.unfreeze()
    try:
        async with playing(monkeypatch, tmp_path) as (coordinator, a, _):
            await until(lambda: serves(coordinator))
            frozen = gc.get_freeze_count()
            a.say(pb.STAGE_STATE_BROKEN)
            await until(lambda: coordinator.epoch == 2 and serves(coordinator))
            assert frozen and gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


async def test_the_old_connection_of_a_node_that_came_back_is_ended(tmp_path: Path) -> None:
    """Or a process that was stopped, and replaced meanwhile, would believe for ever that it takes part."""
    coordinator = make(tmp_path)
    old, new = Player(coordinator, "a").member, Player(coordinator, "a").member
    coordinator.nodes.attach(old)
    coordinator.nodes.attach(new)
    said = [old.outbox.get_nowait() for _ in range(old.outbox.qsize())]
    assert said[-1] is END and coordinator.members == {new.id: new}


async def test_stages_keep_the_sequences_of_the_epoch_that_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also over one that did not come up; but not where a stage could not run a frame: then something is wrong."""
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await until(lambda: serves(coordinator))
        b.returns = False
        a.say(pb.STAGE_STATE_BROKEN)
        await until(lambda: b.keeps[-1][0] == 2)
        b.returns = True
        a.say(pb.STAGE_STATE_BROKEN)
        await until(lambda: coordinator.epoch == 3 and serves(coordinator))
        fault = frames.encode(frames.FaultFrame(3, 0, "stage_failed", "it cannot"))
        await coordinator.pipelines[0].on_frame(fault)
        await until(lambda: coordinator.epoch == 4 and serves(coordinator))
        assert a.keeps == b.keeps == [(1, 0), (2, 1), (3, 1), (4, 0)]


@pytest.mark.parametrize("on_loss", ["rescue", "fail"])
async def test_who_takes_over_lets_requests_wait_until_its_nodes_are_back(tmp_path: Path, on_loss: str) -> None:
    """Not where nothing served before, nor where losses are to be told at once."""
    coordinator = make(tmp_path)
    coordinator.settings = coordinator.settings.model_copy(update={"on_loss": on_loss})
    ask = Request((97,), Sampling())
    coordinator.begin(1)
    with pytest.raises(Unavailable):
        coordinator.generate(ask, Sink())
    coordinator.retire("another node leads")
    coordinator.begin(2, KeptPlan(("a", "b"), (4,)))
    if on_loss == "rescue":
        coordinator.generate(ask, Sink())
        assert len(coordinator.pipelines[0].waiting) == 1
    else:
        with pytest.raises(Unavailable):
            coordinator.generate(ask, Sink())


@pytest.mark.parametrize("turns", range(4))
async def test_a_wait_that_ends_when_it_is_cancelled_is_cancelled(tmp_path: Path, turns: int) -> None:
    """A coordinator that retires is woken and cancelled in one moment: it must not go on."""
    pipeline = make(tmp_path).pipelines[0]
    waiting = asyncio.create_task(pipeline._until_changed(SOON_S))
    await asyncio.sleep(0.01)
    pipeline._changed.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    if not waiting.done():
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
