"""A stage's hops when epochs follow each other quickly: none is forgotten, none is used after its ring is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dwarfstar_engine.errors import FrameError
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import carry, toy
from dwarfstar_engine.stage import main as module
from dwarfstar_engine.stage.main import StageProcess
from dwarfstar_engine.stage.pipe import ChildPipe
from dwarfstar_engine.stage.record import Record
from dwarfstar_engine.stage.worker import ToyBackend, Worker
from dwarfstar_engine.wire import frames, trust
from dwarfstar_engine.wire.link import Link
from dwarfstar_engine.wire.trust import NodeFiles

NOW = trust.utc_now()
SOON_S = 5.0
NEXT, FIRST = "127.0.0.1:1", "127.0.0.1:2"
LINK = Link(round_trip_s=0.001, bytes_s=1e9)


class Pipe:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


class Hop:
    """A hop that opens at once, but the one to FIRST when ``stuck``."""

    made: list[Hop]
    stuck: bool

    def __init__(self, *_: object) -> None:
        self.open_ = self.waits = False
        Hop.made.append(self)

    async def open(self, address: str, *_: object) -> Link:
        if address == FIRST and Hop.stuck:
            self.waits = True
            await asyncio.Event().wait()
        self.open_ = True
        return LINK

    def release(self) -> None: ...

    async def close(self) -> None:
        self.open_ = False


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageProcess:
    """The last of two stages."""
    Hop.made, Hop.stuck = [], False
    monkeypatch.setattr(module, "RingSender", Hop)
    files = NodeFiles(tmp_path)
    trust.issue_local(trust.create_authority(NOW), files, "n1", NOW)
    stage = StageProcess(cast(ChildPipe, Pipe()), "b", files)
    stage._worker = Worker(ToyBackend(2, 4, 4), 2, WireType.F32)
    return stage


def link(epoch: int, keep: int = 0) -> dict[str, Any]:
    return {"epoch": epoch, "next": NEXT, "feed": FIRST, "senders": ["n1"], "keep": keep}


async def test_a_link_that_is_given_up_leaves_no_hop_open(stage: StageProcess) -> None:
    Hop.stuck = True
    first = asyncio.create_task(stage._link(link(1)))
    async with asyncio.timeout(SOON_S):
        while not any(hop.waits for hop in Hop.made):  # noqa: ASYNC110 - looks at what another task does
            await asyncio.sleep(0.005)
    first.cancel()  # as the command of the next epoch does
    Hop.stuck = False
    await asyncio.wait_for(stage._link(link(2)), SOON_S)
    with pytest.raises(asyncio.CancelledError):
        await first
    assert [hop.open_ for hop in Hop.made] == [False, False, True, True]
    await asyncio.wait_for(stage._link(link(3)), SOON_S)
    assert [hop.open_ for hop in Hop.made] == [False] * 4 + [True] * 2


def kept(stage: StageProcess) -> list[tuple[int, int, int, int]]:
    """What the stage said it has when it joined its ring."""
    pipe = cast(Pipe, stage._pipe)
    event, fields = pipe.events[-1]
    assert event == "linked"
    return list(fields["slots"])


def run(stage: StageProcess, slot: int) -> None:
    rows = np.stack([toy.to_row(toy.embed(token)) for token in b"abc"])
    assert stage._worker is not None
    stage._worker.backend.step(rows, 0, slot, np.zeros(3, np.uint8))


async def test_a_stage_keeps_its_slots_for_the_epochs_it_was_part_of(stage: StageProcess) -> None:
    await stage._link(link(3))
    assert kept(stage) == []
    run(stage, 1)
    await stage._link(link(4, keep=3))
    assert kept(stage) == [(1, 3, 0, 0)]
    await stage._link(link(5, keep=3))  # epoch 4 did not come up at other stages
    assert kept(stage) == [(1, 3, 0, 0)]
    await stage._link(link(9, keep=8))  # there was a ring without it, in which its slots went on elsewhere
    assert kept(stage) == []
    run(stage, 0)
    await stage._link(link(10, keep=5))  # it was emptied since
    assert kept(stage) == []
    run(stage, 0)
    await stage._link(link(11))
    assert kept(stage) == []


async def test_what_was_sent_is_kept_with_the_slots_and_forgotten_with_them(stage: StageProcess) -> None:
    stage._worker, stage._record = Worker(ToyBackend(0, 2, 4), 2, WireType.F32), Record(1 << 20)
    await stage._link(link(1))
    frame = frames.encode_tokens(1, 0, (), [0] * 3, [0, 1, 2], [97, 98, 99], [0] * 3, True)
    stage._record.note(stage._worker.run(frame))
    await stage._link(link(2, keep=1))
    assert kept(stage) == [(0, 3, 0, 3)]
    await stage._link(link(3))
    assert kept(stage) == [] and stage._record.rows() == {}


LOADED = {"layers": [2, 4], "fingerprint": "the file", "options": {"kv_type": "f16", "context": 64}}


def order(epoch: int, keep: int, to: str) -> dict[str, Any]:
    """to: whom cells go to; empty: to this stage."""
    cargo = [(1, 3, 1, 1 << 16, 1.0)]
    parts = [{"layers": [2, 4], "to": to, "sender": "n2", "cargo": cargo}]
    return {"term": 1, "epoch": epoch, "keep": keep, "parts": parts, "within_s": 0.05, "always": True}


def carried(stage: StageProcess) -> dict[str, Any]:
    pipe = cast(Pipe, stage._pipe)
    event, fields = pipe.events[-1]
    assert event == "carried"
    return fields


async def test_a_stage_that_gave_its_cells_is_quiet_and_was_in_no_later_ring(stage: StageProcess) -> None:
    stage._loaded = LOADED
    await stage._link(link(3))
    run(stage, 1)
    await stage._carry(order(4, 3, NEXT))  # nobody is there
    assert carried(stage)["given"] and carried(stage)["code"] and carried(stage)["sequences"] == 0
    with pytest.raises(FrameError, match="not part of a ring"):
        await stage._on_frame(frames.encode_tokens(3, 0, (), [1], [3], [97], [0], False))
    await stage._link(link(5, keep=3))  # epoch 4 did not come up: it has what it had
    assert kept(stage) == [(1, 3, 0, 0)]
    await stage._carry(order(6, 5, NEXT))
    await stage._link(link(7, keep=6))  # that ring served without it, and its slots went on elsewhere
    assert kept(stage) == []
    await stage._carry(order(9, 8, NEXT))
    assert carried(stage)["code"] == "stage_emptied"


async def test_each_part_that_is_given_is_told_of(stage: StageProcess) -> None:
    stage._loaded = LOADED
    await stage._link(link(3))
    run(stage, 1)
    both = order(4, 3, NEXT)
    (part,) = both["parts"]
    both["parts"] = [part | {"layers": [2, 3]}, part | {"layers": [3, 4]}]
    await stage._carry(both)  # nobody is there
    told = [fields for event, fields in cast(Pipe, stage._pipe).events if event == "carried"]
    assert sorted(one["layers"] for one in told) == [[2, 3], [3, 4]]
    assert all(one["given"] and one["code"] and not one["sequences"] for one in told)


async def test_a_stage_that_takes_cells_forgets_its_own_and_counts_as_one_of_their_ring(stage: StageProcess) -> None:
    stage._loaded = LOADED
    await stage._link(link(3))
    run(stage, 0)
    await stage._carry(order(9, 8, ""))  # none came
    assert not carried(stage)["given"] and carried(stage)["code"] == carry.LATE
    run(stage, 1)  # as if they had
    await stage._link(link(9, keep=8))
    assert kept(stage) == [(1, 3, 0, 0)]
    await stage._link(link(11, keep=10))
    assert kept(stage) == []
