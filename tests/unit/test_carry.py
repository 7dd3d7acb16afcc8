"""What is carried and what is computed again: the estimate, its bounds, and who is told."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.batch.carry import (
    HEAD_BYTES,
    LEAST_S,
    MOST_S,
    WORTH_S,
    Cargo,
    chosen,
    replay_s,
    within_s,
    worth,
)
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.node import carrying
from dwarfstar_engine.node.carrying import Carrying, cargo, handovers
from dwarfstar_engine.node.epoch import Epoch, Stage
from dwarfstar_engine.node.journal import Journal
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.news import News
from dwarfstar_engine.node.streams import Stream
from dwarfstar_engine.plan.proportional import StagePlan
from dwarfstar_engine.serving import Request, Sampling, Token
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb

CARGO = st.builds(Cargo, st.integers(0, 63), st.integers(1, 1 << 20), st.integers(0, 1 << 34), st.floats(0, 1e4))


def test_prompts_are_computed_again_in_batches_and_answers_row_by_row() -> None:
    costs = [(64, 128.0), (512, 512.0)]
    assert replay_s(100, 100, costs, 5.0) == pytest.approx(0.1)
    assert replay_s(100, 140, costs, 5.0) == pytest.approx(0.1 + 0.2)
    assert replay_s(100, 40, costs, 5.0) == pytest.approx(0.04), "a prompt that was being read"
    assert replay_s(100, 140, [], 0.0) == 0.0, "nothing was measured"


@given(st.integers(0, 1 << 34), st.floats(1e3, 1e10), st.floats(0, 1), st.floats(0, 1e3))
def test_a_slower_link_or_more_bytes_are_never_worth_more(size: int, rate: float, trip: float, replay: float) -> None:
    if worth(size, rate, trip, replay):
        assert worth(size // 2, rate, trip, replay) and worth(size, 2 * rate, trip, replay)
        assert worth(size, rate, trip / 2, replay) and worth(size, rate, trip, 2 * replay)
    assert not worth(size, rate, trip, 0.0)


def test_a_slow_link_carries_what_takes_long_to_compute_only() -> None:
    gigabit, wireless = 110e6, 2e6
    size = 32 << 20
    assert worth(size, gigabit, 0.001, 60.0) and worth(size, wireless, 0.005, 60.0)
    assert worth(size, gigabit, 0.001, 2.0) and not worth(size, wireless, 0.005, 2.0)


def test_what_gains_most_goes_first_and_little_is_not_worth_a_connection() -> None:
    small, large = Cargo(1, 10, 100, 0.3 * WORTH_S), Cargo(0, 90, 900, 0.6 * WORTH_S)
    assert chosen([small, large], always=False) == ()
    assert chosen([small, large], always=True) == (large, small)
    larger = Cargo(2, 90, 900, WORTH_S)
    assert chosen([small, large, larger], always=False) == (larger, large, small)


@given(st.lists(CARGO, max_size=8), st.floats(1, 3600))
def test_the_time_is_bounded_by_what_can_be_gained_and_by_what_streams_wait(goods: list[Cargo], wait_s: float) -> None:
    time_s = within_s(goods, wait_s)
    assert 0 < time_s <= min(MOST_S, wait_s / 3)
    assert time_s <= max(LEAST_S, sum(one.replay_s for one in goods))


@given(CARGO, st.integers(1, 200))
def test_a_bound_of_bytes_leaves_room_for_other_layouts(one: Cargo, layers: int) -> None:
    assert one.most_bytes(layers) >= 2 * one.bytes + HEAD_BYTES


# --- who is told -----------------------------------------------------------------------------------------------------


class Sink:
    def put(self, token: Token) -> None: ...
    def fail(self, error: DwarfStarError) -> None: ...


def member(name: str, **pids: int) -> Member:
    """pids: of loaded slices, as in a0_2=7."""
    found = Member(name, name, "127.0.0.1", pb.Device())
    for layers, pid in pids.items():
        begin, end = map(int, layers[1:].split("_"))
        found.held[begin, end] = pb.StageEvent(state=pb.STAGE_STATE_READY, pid=pid)
    return found


def stage(on: Member, begin: int, end: int, pid: int) -> Stage:
    event = pb.StageEvent(state=pb.STAGE_STATE_READY, pid=pid, port=9)
    profile = pb.StageProfile(prompt=[pb.RowCost(rows=64, ms=64.0)], step_ms=10.0)
    return Stage(StagePlan(on.id, (begin, end), 0, 1000 * 100), on, event, profile=profile)


def stream(slot: int, prompt: int, answer: int, read: int = 0) -> Stream:
    made = Stream(Request((97,) * prompt, Sampling(), 9), Sink(), 1)
    made.slot, made.answer, made.read = slot, [98] * answer, read
    return made


def two(count: int = 2) -> tuple[Member, Member, Epoch, Epoch]:
    """Layers [2, 4) go from b to a, which has [0, 2) as before."""
    a, b = member("a", s0_2=1, s2_4=5), member("b", s2_4=2)
    served = Epoch(1, 7, "c", (stage(a, 0, 2, 1), stage(b, 2, 4, 2)))
    return a, b, served, Epoch(1, 8, "c", (stage(a, 0, 2, 1), stage(a, 2, 4, 5)))


def sent(to: Member) -> list[pb.Carry]:
    return [to.outbox.get_nowait().carry for _ in range(to.outbox.qsize())]


def test_only_a_slice_that_is_another_process_now_moves_and_only_if_the_old_one_is_there() -> None:
    a, b, served, ring = two()
    assert [(old.member, new.member) for old, new in handovers(served, ring, {"a": a, "b": b})] == [(b, a)]
    assert handovers(served, ring, {"a": a}) == [], "its node was lost"
    b.held[2, 4] = pb.StageEvent(state=pb.STAGE_STATE_READY, pid=3)
    assert handovers(served, ring, {"a": a, "b": b}) == [], "it was started anew"
    b.held[2, 4] = pb.StageEvent(state=pb.STAGE_STATE_LOADING, pid=2)
    assert handovers(served, ring, {"a": a, "b": b}) == []
    other = Epoch(1, 8, "c", (stage(a, 0, 3, 1), stage(b, 3, 4, 9)))
    assert handovers(served, other, {"a": a, "b": b}) == [], "the boundary moved"


def test_what_was_answered_for_is_carried_and_nothing_of_streams_that_wait_for_a_slot() -> None:
    a, _, _, ring = two()
    streams = [stream(-1, 9, 0), stream(0, 10, 0), stream(1, 64, 0, read=32), stream(2, 64, 11)]
    found = cargo(streams, ring.stages[1], 1000)
    assert [(one.slot, one.positions, one.bytes) for one in found] == [(1, 32, 3200), (2, 74, 7400)]
    assert [one.replay_s for one in found] == pytest.approx([0.032, 0.064 + 0.1])
    assert a.outbox.empty()


class Move:
    """Of two streams, by nodes that are played."""

    def __init__(self, **settings: object) -> None:
        self.a, self.b, served, self.ring = two()
        self.journal = Journal(lambda: 0.0)
        self.carrying = Carrying(News(self.journal))
        self.pairs = handovers(served, self.ring, {"a": self.a, "b": self.b})
        self.settings = Settings.model_validate(settings)

    async def run(self, *said: tuple[Member, pb.Carried]) -> list[dict[str, str | int | float]]:
        """The events' details, when nodes have said that."""
        streams = [stream(0, 64, 11), stream(1, 64, 51)]
        work = asyncio.create_task(self.carrying.run(self.pairs, streams, self.ring, 7, 1000, self.settings))
        await asyncio.sleep(0)
        for who, told in said:
            told.layers.CopyFrom(pb.Slice(begin=2, end=4))
            self.carrying.heard(who, told)
        await work
        return [dict(event.details) async for batch in self.journal.read(0, follow=False) for event in batch.events]


async def test_both_ends_are_told_and_who_takes_says_what_came() -> None:
    move = Move()
    early = pb.Carried(epoch=8, given=True, sequences=2)
    (event,) = await move.run((move.b, early), (move.a, pb.Carried(epoch=8, sequences=2, bytes=9, seconds=0.5)))
    assert (event["carried"], event["sequences"], event["bytes"], event["from"]) == (2, 2, 9, "b")
    (taken,), (given,) = sent(move.a), sent(move.b)
    assert (taken.to_hop, given.to_hop) == ("", "127.0.0.1:9")
    assert (taken.sender, taken.term, taken.epoch, taken.keep) == ("b", 1, 8, 7)
    assert [one.slot for one in given.cargo] == [1, 0] and given.cargo == taken.cargo
    given.to_hop = ""
    assert given == taken


async def test_who_cannot_give_is_not_waited_for() -> None:
    move = Move()
    (event,) = await move.run((move.b, pb.Carried(epoch=8, given=True, code="stage_gone")))
    assert (event["carried"], event["code"]) == (0, "stage_gone")


async def test_others_and_other_epochs_are_not_heard_and_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "MARGIN_S", -0.99)  # of LEAST_S
    move = Move()
    said = [(move.b, pb.Carried(epoch=8, sequences=2)), (move.a, pb.Carried(epoch=7, sequences=2))]
    (event,) = await move.run(*said)
    assert (event["carried"], event["code"]) == (0, "silent")


async def test_nothing_is_said_to_nodes_where_nothing_would_be_gained() -> None:
    move = Move()
    for one in move.ring.stages:
        one.profile = pb.StageProfile()
    assert await move.run() == [] and move.a.outbox.empty() and move.b.outbox.empty()
