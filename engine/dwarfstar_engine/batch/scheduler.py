"""The step scheduler: which rows go into the next frame, and what a frame's result means.

Theory. A sequence is its prompt and the tokens drawn so far. Its rows travel the ring in frames; the last row of the
known tokens asks for a sample, whose result makes the next row known. Several frames may be in flight, so that every
stage has one; a sequence that is decoding has at most one row in flight (the next row depends on it), while the
chunks of a prompt may follow each other without waiting. Slots are freed by an operation that travels in band before
the rows that reuse the slot: order in the ring is the only synchronisation, so a slot may be given away at once.

Pure: no clock, no IO. ``submit``/``cancel`` change the queue, ``schedule`` gives the next frame or None,
``complete`` takes a result. Every frame that was scheduled ends in exactly one ``complete``, unless the pipeline
breaks: then the scheduler is thrown away with its epoch.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from dwarfstar_engine.errors import Overloaded
from dwarfstar_engine.serving import Request, Token

MAX_QUEUED = 256  # requests waiting for a slot; beyond it a client is better told to come back


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one pipeline. context: tokens of one request. rows: of a frame. in_flight: frames in the ring."""

    slots: int
    context: int
    rows: int
    in_flight: int
    decode_rows: int = 1  # sequences stepped together; llama.cpp stages take one slot a frame, so only toys take more
    queued: int = MAX_QUEUED


@dataclass(frozen=True, slots=True)
class Step:
    """A frame to send. ``free`` and ``samplers`` apply, in this order, before the rows.

    slots, positions, tokens, wants: one entry a row. sequences: the sequence of each row that asks for a sample.
    """

    number: int
    free: tuple[int, ...]
    samplers: tuple[tuple[int, int], ...]  # (slot, sequence) whose sampler must be set up
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    wants: tuple[int, ...]
    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """A token for a sequence. After one with ``token.finish`` the sequence is gone."""

    sequence: int
    token: Token


@dataclass(slots=True)
class _Sequence:
    id: int
    request: Request
    limit: int  # tokens generated at most
    slot: int = -1
    sent: int = 0  # tokens whose rows have been sent
    generated: list[int] = field(default_factory=list)
    waiting: bool = False  # a sample is in flight

    @property
    def known(self) -> int:
        return len(self.request.prompt) + len(self.generated)


class Scheduler:
    """Deals sequences into frames. First come, first served for slots; then turns are taken, frame by frame."""

    def __init__(self, limits: Limits, eog_tokens: frozenset[int]) -> None:
        self.limits = limits
        self._eog = eog_tokens
        self._queue: OrderedDict[int, _Sequence] = OrderedDict()
        self._running: OrderedDict[int, _Sequence] = OrderedDict()
        self._free_slots = deque(range(limits.slots))
        self._to_free: list[int] = []
        self._to_set: list[tuple[int, int]] = []
        self._in_flight: dict[int, tuple[int, ...]] = {}
        self._number = 0

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def submit(self, sequence: int, request: Request) -> None:
        """Queue a request under a fresh id. Its prompt must be shorter than the context. Raises Overloaded."""
        assert 0 < len(request.prompt) < self.limits.context and sequence not in self._queue
        if len(self._queue) >= self.limits.queued:
            raise Overloaded(
                f"{len(self._queue)} requests are waiting already: try again later",
                retry_after_s=1.0,
                code="queue_full",
            )
        room = self.limits.context - len(request.prompt)
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        self._queue[sequence] = _Sequence(sequence, request, limit)

    def cancel(self, sequence: int) -> None:
        """Forget a sequence; its slot is free at once. Unknown ids are ignored: it may just have finished."""
        self._queue.pop(sequence, None)
        if (running := self._running.pop(sequence, None)) is not None:
            self._release(running)

    def _release(self, sequence: _Sequence) -> None:
        self._to_free.append(sequence.slot)
        self._free_slots.append(sequence.slot)

    def _admit(self) -> None:
        while self._queue and self._free_slots:
            _, sequence = self._queue.popitem(last=False)
            sequence.slot = self._free_slots.popleft()
            self._running[sequence.id] = sequence
            self._to_set.append((sequence.slot, sequence.id))

    def schedule(self) -> Step | None:
        """The next frame to send, or None if the ring is full or nothing is ready."""
        if len(self._in_flight) >= self.limits.in_flight:
            return None
        self._admit()
        slots: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        wants: list[int] = []
        sampled: list[int] = []
        picked: list[_Sequence] = []
        decoding = 0
        for sequence in self._running.values():
            if sequence.waiting or sequence.sent >= sequence.known:
                continue
            prefill = sequence.sent < len(sequence.request.prompt)
            if (prefill and slots) or (not prefill and decoding >= self.limits.decode_rows):
                continue  # a frame is decode rows or one prompt's chunk: rows of one kind cost alike
            if not prefill:
                decoding += 1
            picked.append(sequence)
            take = min(sequence.known - sequence.sent, self.limits.rows - len(slots))
            last = sequence.sent + take == sequence.known
            slots += [sequence.slot] * take
            positions += range(sequence.sent, sequence.sent + take)
            if prefill:
                tokens += sequence.request.prompt[sequence.sent : sequence.sent + take]
            else:
                tokens.append(sequence.generated[-1])
            wants += [0] * (take - 1) + [1 if last else 0]
            if last:
                sampled.append(sequence.id)
                sequence.waiting = True
            sequence.sent += take
            if prefill or decoding >= self.limits.decode_rows:
                break
        if not slots:
            return None
        for sequence in picked:
            self._running.move_to_end(sequence.id)  # turns are taken
        step = Step(
            number=self._number,
            free=tuple(dict.fromkeys(self._to_free)),
            samplers=tuple((slot, owner) for slot, owner in self._to_set if owner in self._running),
            slots=tuple(slots),
            positions=tuple(positions),
            tokens=tuple(tokens),
            wants=tuple(wants),
            sequences=tuple(sampled),
        )
        self._to_free, self._to_set = [], []
        self._in_flight[self._number] = step.sequences
        self._number += 1
        return step

    def request(self, sequence: int) -> Request:
        """The request of a running sequence, for setting its sampler up."""
        return self._running[sequence].request

    def complete(self, number: int, tokens: Seq[Token]) -> list[Output]:
        """Take a frame's result: one token for each of its ``sequences``, in order. Cancelled ones are skipped."""
        sequences = self._in_flight.pop(number)
        assert len(sequences) == len(tokens), (sequences, tokens)
        outputs: list[Output] = []
        for sequence_id, token in zip(sequences, tokens, strict=True):
            sequence = self._running.get(sequence_id)
            if sequence is None:
                continue
            sequence.waiting = False
            sequence.generated.append(token.id)
            finish = None
            if token.id in self._eog and not sequence.request.ignore_eos:
                finish = "stop"
            elif len(sequence.generated) >= sequence.limit:
                finish = "length"
            if finish is not None:
                del self._running[sequence_id]
                self._release(sequence)
                token = Token(token.id, token.logprob, token.top, finish)
            outputs.append(Output(sequence_id, token))
        return outputs
