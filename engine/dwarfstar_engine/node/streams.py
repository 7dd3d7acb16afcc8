"""Streams that outlive their pipeline.

A stream is one request and what was said so far. It is carried by a dispatcher as long as its epoch lasts. When the
epoch breaks, streams wait here for the next one, which computes their rows again, the prompt's as a prompt and each of
the answer's as a step, so that the bits and with them the text are those of an undisturbed run.

Bounds. A stream waits ``patience_s`` at most, then it gets the error it would have got at once. One under which stages
ended by their own doing MAX_RESCUES times, while it hardly went on in between, gets it too: perhaps it is what ends
them. Lost nodes and links, and stages that somebody killed, are nothing it has done: MAX_LOSSES of them in a row are
borne. One that went on begins anew, whatever else breaks; so its rescues are bounded by the tokens it may draw. As many
streams wait as were running, and requests that come meanwhile up to the bound of the queue.

Invariant. A stream that its client left is carried no further, wherever it is at that moment: also while it belongs to
nobody, as when an error for one choice of a request ends the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.serving import Request, Sink

MAX_RESCUES = 3
MAX_LOSSES = 64  # each takes a second or so: a machine that is out of memory, say, ends its stages with nobody to blame
PROGRESS = 8  # tokens since the last rescue that clear a stream: what kills its stages does so at once


class Stream:
    """See ``serving.Generation``. answer: the tokens delivered. seed: drawn once, so that a replay draws the same.

    leave: has its carrier forget it; set by the carrier. left: its client did. rescues, losses: without PROGRESS in
    between; had: tokens of the answer at the last one. ran: it had rows in the pipeline that broke. slot: where stages
    hold its rows, and nothing else; -1: nowhere. read: rows of its prompt that were through all of them.
    """

    __slots__ = (
        "answer",
        "had",
        "leave",
        "left",
        "losses",
        "ran",
        "read",
        "request",
        "rescues",
        "seed",
        "sink",
        "slot",
    )

    def __init__(self, request: Request, sink: Sink, seed: int) -> None:
        self.request, self.sink, self.seed = request, sink, seed
        self.answer: list[int] = []
        self.rescues = self.losses = self.had = 0
        self.slot, self.read, self.ran = -1, 0, True
        self.left = False
        self.leave: Callable[[], None] | None = None

    @property
    def through(self) -> int:
        """Rows that were through all stages: of an answer all but the last token's, which is not known to be."""
        return len(self.request.prompt) + len(self.answer) - 1 if self.answer else self.read

    def cancel(self) -> None:
        self.left = True
        leave, self.leave = self.leave, None
        if leave is not None:
            leave()


class WaitingRoom:
    """Streams between two epochs. Times are monotonic, s."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._streams: dict[Stream, float] = {}
        self._rescued: list[Stream] = []  # and not judged yet

    def __len__(self) -> int:
        return len(self._streams)

    def put(self, stream: Stream, now: float) -> None:
        """Let a stream wait for the next epoch, unless its client left."""
        if stream.left:
            return
        self._streams[stream] = now
        stream.leave = lambda: self._forget(stream)

    def rescue(self, streams: list[Stream], now: float) -> None:
        """Streams of a pipeline that broke; ``judge`` says which of them are given up."""
        for stream in streams:
            if not stream.left:  # for an error of the one before
                self._rescued.append(stream)
                self.put(stream, now)

    def judge(self, crashed: bool, error: DwarfStarError) -> int:
        """Those rescued since the last call that were rescued too often get ``error``; how many. crashed: a stage ended
        by its own doing, of which one hears later than of the hop that broke."""
        rescued, self._rescued, lost = self._rescued, [], 0
        for stream in rescued:
            if stream not in self._streams or not stream.ran:
                continue
            if len(stream.answer) - stream.had >= PROGRESS:
                stream.rescues = stream.losses = 0
            stream.had = len(stream.answer)
            stream.rescues += crashed
            stream.losses += not crashed
            if stream.rescues > MAX_RESCUES or stream.losses > MAX_LOSSES:
                self._forget(stream)
                stream.leave = None
                stream.sink.fail(error)
                lost += 1
        return lost

    def __iter__(self) -> Iterator[Stream]:
        """Longest first."""
        return iter(self._streams)

    def take(self) -> list[Stream]:
        """All that wait, longest first; they wait no more."""
        streams, self._streams = list(self._streams), {}
        self._rescued.clear()
        return streams

    def first(self) -> Stream | None:
        """The one that waits longest; it still does."""
        return next(iter(self._streams), None)

    def release(self, stream: Stream) -> None:
        """It waits no more: somebody carries it."""
        self._forget(stream)
        stream.leave = None

    def fail(self, error: DwarfStarError, older_than: float | None = None) -> int:
        """Give up those that came before ``older_than``, or all; how many."""
        lost = [stream for stream, since in self._streams.items() if older_than is None or since < older_than]
        for stream in lost:
            self._forget(stream)
            stream.leave = None
            if not stream.left:
                stream.sink.fail(error)
        return len(lost)

    def expire(self, now: float, error: DwarfStarError) -> int:
        """Give up those that waited for too long; how many."""
        return self.fail(error, now - self._patience_s) if self._streams else 0

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream, None)
