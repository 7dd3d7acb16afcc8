"""What the coordinator says of plans, stages and streams: each once, and nothing of the machine's own."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.node.epoch import Epoch, Stage
from dwarfstar_engine.node.journal import Journal
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.news import News
from dwarfstar_engine.node.source import open_source
from dwarfstar_engine.plan.proportional import StagePlan
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import EventView
from dwarfstar_engine.wire.generated import control_pb2 as pb


class Desk:
    """News, and what came of it."""

    def __init__(self) -> None:
        self.now = 10.0
        self.journal = Journal(lambda: 0.0)
        self.news = News(self.journal, lambda: self.now)
        self.members = {key: Member(key, f"node {key}", "10.0.0.1", pb.Device()) for key in "abc"}
        self._seen = 0

    def ring(self, number: int, *shares: tuple[str, int, int]) -> Epoch:
        stages = tuple(Stage(StagePlan(key, (a, b), 1 << 29, 0), self.members[key]) for key, a, b in shares)
        return Epoch(1, number, "coordinator", stages)

    def fresh(self) -> list[EventView]:
        """The events since the last look."""

        async def read() -> list[EventView]:
            async with contextlib.aclosing(self.journal.read(self._seen, follow=False)) as batches:
                return [event async for batch in batches for event in batch.events]

        self._seen, found = self.journal.last, asyncio.run(read())
        return found


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_settings_that_differ_are_told_and_paths_are_not(desk: Desk, tmp_path: Path) -> None:
    desk.news.settings(
        Settings(home=tmp_path, slots=7, cuts=(3, 5), models=tmp_path, tls_cert=tmp_path, tls_key=tmp_path)
    )
    desk.news.settings(Settings())
    changed, same = desk.fresh()
    assert changed.cause == "started with slots = 7, cuts = 3,5" and changed.details == {"slots": 7, "cuts": "3,5"}
    assert same.cause == "started with the default settings"


def test_a_plan_says_who_got_what_and_who_is_left_out(desk: Desk) -> None:
    ring = desk.ring(4, ("a", 0, 5), ("b", 5, 8))
    desk.news.plan_made(ring, [("c", "its share is less than one layer"), ("gone", "x")], desk.members)
    (event,) = desk.fresh()
    assert event.details == {
        "epoch": 4,
        "stages": "node a:0-5,node b:5-8",
        "left_out": "node c (its share is less than one layer)",
    }
    assert event.cause.endswith("node a [0, 5), node b [5, 8); without node c (its share is less than one layer)")


def test_a_stage_is_loading_ready_and_failed_once_each(desk: Desk) -> None:
    ring, member = desk.ring(4, ("a", 0, 5)), desk.members["a"]

    def say(state: pb.StageState.ValueType, epoch: int = 4, **more: Any) -> list[tuple[str, str]]:
        layers = pb.Slice(begin=0, end=5)
        desk.news.stage(member, pb.StageEvent(epoch=epoch, state=state, pid=9, layers=layers, **more), ring)
        return [(event.kind, event.cause) for event in desk.fresh()]

    loading, ready = (
        "the stage with layers 0–4 is being loaded on node a",
        "the stage with layers 0–4 is ready on node a",
    )
    assert say(pb.STAGE_STATE_LOADING) == [("stage_loading", loading)]
    assert say(pb.STAGE_STATE_LOADING, share=0.5) == [] == say(pb.STAGE_STATE_LOADING, epoch=3)
    desk.now += 2.0
    assert say(pb.STAGE_STATE_READY) == [("stage_ready", f"{ready}: loaded in 2.0 s")]
    assert say(pb.STAGE_STATE_READY) == [] == say(pb.STAGE_STATE_LINKED)
    ring = desk.ring(5, ("a", 0, 5))
    assert say(pb.STAGE_STATE_READY, 5) == [("stage_ready", f"{ready}: it was loaded already")]
    assert say(pb.STAGE_STATE_BROKEN, 5, detail="a hop") == []  # of that the end of the epoch tells
    told = "the stage process on node a ended with signal 9"
    assert say(pb.STAGE_STATE_EXITED, 4, detail=told) == [("stage_failed", told)]  # also of an epoch that is over
    assert say(pb.STAGE_STATE_FAILED, 5) == [("stage_failed", "the stage on node a failed")]
    desk.news.forget(member)
    assert say(pb.STAGE_STATE_READY, 5) == [("stage_ready", f"{ready}: it was loaded already")]
    assert say(pb.STAGE_STATE_EXITED, 5, code="released", detail="it was released") == []  # as it was told to
    copy = "a copy of layers 0–4 is being loaded on node a"
    assert say(pb.STAGE_STATE_LOADING, 3, standby=True) == [("stage_loading", copy)]


def test_a_model_is_loaded_once_and_epochs_are_numbered(desk: Desk, tmp_path: Path) -> None:
    source = open_source("toy:8", tmp_path, "f16")
    for number in (1, 2):
        desk.news.epoch_up(desk.ring(number, ("a", 0, 4), ("b", 4, 8)), source, 64)
    found = desk.fresh()
    assert [event.kind for event in found] == ["model_loaded", "epoch_up", "epoch_up"]
    assert found[0].cause == "the model toy:8 is loaded: 8 layers, 1.00 GiB"
    assert found[2].cause == "epoch 2 serves toy:8 over 2 stages"


def test_streams_are_counted(desk: Desk) -> None:
    for tell in (desk.news.waiting, desk.news.resumed):
        for count in (0, 1, 8):
            tell(count)
    desk.news.given_up(0, "x")
    desk.news.given_up(2, "it took too long")
    assert [(event.cause, event.details["streams"]) for event in desk.fresh()] == [
        ("1 stream waits for the next epoch", 1),
        ("8 streams wait for the next epoch", 8),
        ("1 stream goes on", 1),
        ("8 streams go on", 8),
        ("2 streams end: it took too long", 2),
    ]
