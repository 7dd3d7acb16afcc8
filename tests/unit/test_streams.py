"""Streams between two pipelines: none is lost, none waits for ever, none is carried over again and again."""

from __future__ import annotations

from dwarfstar_engine.errors import DwarfStarError, StageError
from dwarfstar_engine.node.streams import MAX_RESCUES, Stream, WaitingRoom
from dwarfstar_engine.serving import Request, Sampling, Token

BROKE = StageError("the pipeline broke")
LATE = StageError("the pipeline was not back in time")


class Sink:
    def __init__(self) -> None:
        self.errors: list[DwarfStarError] = []

    def put(self, token: Token) -> None:
        raise AssertionError("nothing is said while a stream waits")

    def fail(self, error: DwarfStarError) -> None:
        self.errors.append(error)


def stream() -> tuple[Stream, Sink]:
    sink = Sink()
    return Stream(Request((1, 2), Sampling()), sink, 7), sink


def test_streams_leave_in_the_order_they_came() -> None:
    room, streams = WaitingRoom(60.0), [stream()[0] for _ in range(4)]
    room.rescue(streams[:2], 1.0, BROKE)
    room.put(streams[2], 2.0)
    room.rescue(streams[3:], 3.0, BROKE)
    assert len(room) == 4 and room.take() == streams and len(room) == 0


def test_a_client_that_leaves_is_forgotten() -> None:
    room, (gone, sink), (stays, _) = WaitingRoom(60.0), stream(), stream()
    room.rescue([gone, stays], 0.0, BROKE)
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


def test_a_stream_that_breaks_every_pipeline_is_given_up() -> None:
    room, (poison, sink) = WaitingRoom(60.0), stream()
    for _ in range(MAX_RESCUES):
        room.rescue([poison], 0.0, BROKE)
        assert room.take() == [poison] and not sink.errors
    room.rescue([poison], 0.0, BROKE)
    assert sink.errors == [BROKE] and not room.take()


def test_all_are_given_up_when_nothing_fits() -> None:
    room, pairs = WaitingRoom(60.0), [stream() for _ in range(3)]
    for waiting, _ in pairs:
        room.put(waiting, 0.0)
    assert room.fail(BROKE) == 3 and len(room) == 0
    assert all(sink.errors == [BROKE] for _, sink in pairs)
