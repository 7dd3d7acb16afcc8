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
from dwarfstar_engine.node.carrying import Carrying, Handover, cargo, handovers
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


def kv_bytes(_: Stage, layers: tuple[int, int]) -> int:
    return 100_000 * (layers[1] - layers[0])


def moves(found: list[Handover]) -> list[tuple[str, tuple[int, int], list[tuple[str, tuple[int, int]]]]]:
    return [
        (one.new.member.id, one.new.plan.layers, [(old.member.id, part) for old, part in one.parts]) for one in found
    ]


def parts_of(order: pb.Carry) -> list[tuple[int, int, str, bool]]:
    return [(part.layers.begin, part.layers.end, part.sender, bool(part.to_hop)) for part in order.parts]


def sent(to: Member) -> list[pb.Carry]:
    return [to.outbox.get_nowait().carry for _ in range(to.outbox.qsize())]


def test_only_a_slice_that_is_another_process_now_moves_and_only_if_the_old_one_is_there() -> None:
    a, b, served, ring = two()
    assert moves(handovers(served, ring, {"a": a, "b": b})) == [("a", (2, 4), [("b", (2, 4))])]
    assert handovers(served, ring, {"a": a}) == [], "its node was lost"
    b.held[2, 4] = pb.StageEvent(state=pb.STAGE_STATE_READY, pid=3)
    assert handovers(served, ring, {"a": a, "b": b}) == [], "it was started anew"
    b.held[2, 4] = pb.StageEvent(state=pb.STAGE_STATE_LOADING, pid=2)
    assert handovers(served, ring, {"a": a, "b": b}) == []


def test_layers_come_from_whichever_stage_had_them() -> None:
    a, b, c = member("a", s0_15=1), member("b", s15_30=2), member("c", s30_40=3)
    members = {"a": a, "b": b, "c": c}
    served = Epoch(1, 7, "c", (stage(a, 0, 15, 1), stage(b, 15, 30, 2), stage(c, 30, 40, 3)))
    ring = Epoch(1, 8, "c", (stage(a, 0, 18, 4), stage(b, 18, 30, 5), stage(c, 30, 40, 3)))
    assert moves(handovers(served, ring, members)) == [
        ("a", (0, 18), [("a", (0, 15)), ("b", (15, 18))]),
        ("b", (18, 30), [("b", (18, 30))]),
    ]
    one = Epoch(1, 8, "c", (stage(c, 0, 40, 9),))
    assert moves(handovers(served, one, members)) == [
        ("c", (0, 40), [("a", (0, 15)), ("b", (15, 30)), ("c", (30, 40))])
    ]
    del a.held[0, 15]
    assert moves(handovers(served, ring, members)) == [("b", (18, 30), [("b", (18, 30))])], "some layers are lost"


def test_what_was_answered_for_is_carried_and_nothing_of_streams_that_wait_for_a_slot() -> None:
    a, _, _, ring = two()
    streams = [stream(-1, 9, 0), stream(0, 10, 0), stream(1, 64, 0, read=32), stream(2, 64, 11)]
    found = cargo(streams, ring.stages[1], 100_000, 1000)
    assert [(one.slot, one.positions, one.bytes) for one in found] == [(1, 32, 3200), (2, 74, 7400)]
    assert [one.replay_s for one in found] == pytest.approx([0.032, 0.064 + 0.1])
    assert a.outbox.empty()


class Move:
    """Of two streams, by nodes that are played."""

    def __init__(self, **settings: object) -> None:
        self.a, self.b, served, self.ring = two()
        self.journal = Journal(lambda: 0.0)
        self.carrying = Carrying(News(self.journal))
        self.found = handovers(served, self.ring, {"a": self.a, "b": self.b})
        self.settings = Settings.model_validate(settings)

    async def run(self, *said: tuple[Member, pb.Carried]) -> list[dict[str, str | int | float]]:
        """The events' details, when nodes have said that."""
        streams = [stream(0, 64, 11), stream(1, 64, 51)]
        run = self.carrying.run(self.found, streams, self.ring, 7, 1000, kv_bytes, self.settings)
        work = asyncio.create_task(run)
        await asyncio.sleep(0)
        for who, told in said:
            if not told.HasField("layers"):
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
    assert (taken.parts[0].to_hop, given.parts[0].to_hop) == ("", "127.0.0.1:9")
    assert (taken.parts[0].sender, taken.term, taken.epoch, taken.keep) == ("b", 1, 8, 7)
    assert [one.slot for one in given.parts[0].cargo] == [1, 0]
    given.parts[0].to_hop = ""
    assert given == taken


def recut() -> Move:
    """Layers [0, 4), of which a had [0, 2) and b the rest, are now [0, 3) on a and [3, 4) on b."""
    move, a, b = Move(), member("a", s0_2=1), member("b", s2_4=2)
    served = Epoch(1, 7, "c", (stage(a, 0, 2, 1), stage(b, 2, 4, 2)))
    move.a, move.b = a, b
    move.ring = Epoch(1, 8, "c", (stage(a, 0, 3, 3), stage(b, 3, 4, 4)))
    move.found = handovers(served, move.ring, {"a": a, "b": b})
    return move


def of(begin: int, end: int) -> pb.Slice:
    return pb.Slice(begin=begin, end=end)


async def test_where_a_boundary_moves_each_process_is_told_once_of_all_its_parts() -> None:
    move = recut()
    first, second = await move.run(
        (move.b, pb.Carried(epoch=8, sequences=2, bytes=5, layers=of(3, 4))),
        (move.a, pb.Carried(epoch=8, sequences=2, bytes=9, layers=of(0, 3))),
    )
    assert (first["from"], first["carried"], first["bytes"]) == ("a, b", 2, 9)
    assert (second["from"], second["carried"], second["bytes"]) == ("b", 2, 5)
    took, gave = sorted(sent(move.a), key=parts_of), sorted(sent(move.b), key=parts_of)
    assert [(one.layers.begin, one.layers.end, parts_of(one)) for one in took] == [
        (0, 3, [(0, 2, "a", False), (2, 3, "b", False)]),
        (0, 2, [(0, 2, "a", True)]),
    ]
    assert [(one.layers.begin, one.layers.end, parts_of(one)) for one in gave] == [
        (2, 4, [(2, 3, "b", True), (3, 4, "b", True)]),
        (3, 4, [(3, 4, "b", False)]),
    ]
    for order in (*took, *gave):
        for part in order.parts:
            assert [one.slot for one in part.cargo] == [1, 0], "the same order on all streams"
            layers = part.layers.end - part.layers.begin
            assert [one.bytes for one in part.cargo] == [114 * 100 * layers, 74 * 100 * layers]


async def test_a_part_that_does_not_come_is_not_waited_for() -> None:
    move = recut()
    first, second = await move.run(
        (move.a, pb.Carried(epoch=8, given=True, code="stage_gone", layers=of(2, 3))),  # not hers
        (move.b, pb.Carried(epoch=8, given=True, code="hop_failed", layers=of(2, 3))),
        (move.b, pb.Carried(epoch=8, sequences=2, layers=of(3, 4))),
    )
    assert (first["carried"], first["code"], second["carried"]) == (0, "hop_failed", 2)


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
