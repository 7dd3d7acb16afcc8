"""Streams between two pipelines: none is lost, none waits for ever, none is carried over again and again."""

from __future__ import annotations

from collections.abc import Callable

from dwarfstar_engine.errors import DwarfStarError, StageError
from dwarfstar_engine.node.streams import MAX_LOSSES, MAX_RESCUES, PROGRESS, Stream, WaitingRoom
from dwarfstar_engine.serving import Request, Sampling, Token

BROKE = StageError("the pipeline broke")
LATE = StageError("the pipeline was not back in time")


class Sink:
    def __init__(self) -> None:
        self.errors: list[DwarfStarError] = []
        self.then: Callable[[], None] = lambda: None

    def put(self, token: Token) -> None:
        raise AssertionError("nothing is said while a stream waits")

    def fail(self, error: DwarfStarError) -> None:
        self.errors.append(error)
        self.then()


def stream() -> tuple[Stream, Sink]:
    sink = Sink()
    return Stream(Request((1, 2), Sampling()), sink, 7), sink


def test_streams_leave_in_the_order_they_came() -> None:
    room, streams = WaitingRoom(60.0), [stream()[0] for _ in range(4)]
    room.rescue(streams[:2], 1.0)
    room.put(streams[2], 2.0)
    room.rescue(streams[3:], 3.0)
    assert len(room) == 4 and room.take() == streams and len(room) == 0


def test_the_first_may_go_on_elsewhere() -> None:
    room, streams = WaitingRoom(60.0), [stream()[0] for _ in range(2)]
    for one in streams:
        room.put(one, 1.0)
    assert room.first() is streams[0]
    room.release(streams[0])
    streams[0].cancel()  # whoever carries it looks at ``left``
    assert streams[0].left and room.first() is streams[1]
    room.release(streams[1])
    assert room.first() is None and room.expire(100.0, LATE) == 0


def test_a_client_that_leaves_is_forgotten() -> None:
    room, (gone, sink), (stays, _) = WaitingRoom(60.0), stream(), stream()
    room.rescue([gone, stays], 0.0)
    gone.cancel()
    gone.cancel()
    assert room.take() == [stays] and not sink.errors


def test_who_waits_too_long_is_told_once() -> None:
    room, (early, early_sink), (late, late_sink) = WaitingRoom(10.0), stream(), stream()
    room.put(early, 0.0)
    room.put(late, 5.0)
    assert room.expire(10.0, LATE) == 0
    assert room.expire(10.1, LATE) == 1 and room.expire(10.2, LATE) == 0
    assert early_sink.errors == [LATE] and not late_sink.errors
    early.cancel()
    assert room.take() == [late]


def rescued(room: WaitingRoom, streams: list[Stream], *, crashed: bool = True) -> int:
    """A pipeline broke, and the next one is up; how many are given up."""
    room.rescue(streams, 0.0)
    return room.judge(crashed, BROKE)


def test_a_stream_that_breaks_every_pipeline_is_given_up() -> None:
    room, (poison, sink) = WaitingRoom(60.0), stream()
    for _ in range(MAX_RESCUES):
        assert rescued(room, [poison]) == 0
        assert room.take() == [poison] and not sink.errors
    assert rescued(room, [poison]) == 1
    assert sink.errors == [BROKE] and not room.take()


def test_a_stream_bears_what_is_not_its_doing() -> None:
    room, (innocent, sink), (queued, _) = WaitingRoom(60.0), stream(), stream()
    queued.ran = False
    for _ in range(MAX_LOSSES):
        assert rescued(room, [innocent, queued], crashed=False) == 0
        assert room.take() == [innocent, queued]
    for _ in range(MAX_RESCUES):
        rescued(room, [innocent, queued])
        assert room.take() == [innocent, queued]
    assert rescued(room, [innocent, queued], crashed=False) == 1, "there is an end to it"
    assert sink.errors == [BROKE] and room.take() == [queued], "who waits for a slot cannot be to blame"


def test_each_loss_is_judged_once() -> None:
    room, (waits, sink) = WaitingRoom(60.0), stream()
    room.rescue([waits], 0.0)
    assert [room.judge(True, BROKE) for _ in range(2 * MAX_RESCUES)] == [0] * 2 * MAX_RESCUES
    assert waits.rescues == 1 and not sink.errors


def test_all_are_given_up_when_nothing_fits() -> None:
    room, pairs = WaitingRoom(60.0), [stream() for _ in range(3)]
    for waiting, _ in pairs:
        room.put(waiting, 0.0)
    assert room.fail(BROKE) == 3 and len(room) == 0
    assert all(sink.errors == [BROKE] for _, sink in pairs)


def test_a_stream_that_goes_on_is_rescued_as_often_as_pipelines_break() -> None:
    room, (innocent, sink) = WaitingRoom(60.0), stream()
    for _ in range(3 * MAX_RESCUES):
        rescued(room, [innocent])
        assert room.take() == [innocent] and not sink.errors
        innocent.answer += [1] * PROGRESS
    for _ in range(MAX_RESCUES):  # and then it goes on no more
        rescued(room, [innocent])
        innocent.answer += [1] * (PROGRESS - 1)
    assert not sink.errors
    rescued(room, [innocent])
    assert sink.errors == [BROKE]


def test_a_choice_that_another_ones_error_ends_is_carried_no_further() -> None:
    """Choices of one request: the first one's error cancels the other, which nobody holds at that moment."""
    room, (poison, sink), (sibling, told) = WaitingRoom(60.0), stream(), stream()
    poison.rescues = MAX_RESCUES
    sink.then = sibling.cancel
    rescued(room, [poison, sibling])
    assert sink.errors == [BROKE] and not told.errors and room.take() == []
    room.put(sibling, 0.0)
    assert room.take() == []


def test_who_left_is_told_nothing_when_all_are_given_up() -> None:
    room, (first, sink), (second, told) = WaitingRoom(60.0), stream(), stream()
    room.put(first, 0.0)
    room.put(second, 0.0)
    sink.then = second.cancel
    assert room.fail(BROKE) and sink.errors == [BROKE] and not told.errors
