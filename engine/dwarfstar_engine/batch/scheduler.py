"""The step scheduler: which rows go into the next frame, and what a frame's result means.

Theory. A sequence is its prompt and the tokens drawn so far. Its rows travel the ring in frames; the last row of the
known tokens asks for a sample, whose result makes the next row known. There are two kinds of frames.

*Steps* hold a row of each sequence of a lane. Lanes follow each other through the stages, and each must be back before
its turn comes again, or the first stage waits for it. With n sequences and S stages that holds for lanes of less than
n / S. So few sequences make lanes of one, and many make lanes of several, whose rows share the cost of a message.
A lane is let go round by itself for some *rounds*: the last stage feeds the first one, and only results come back here.
A text that ends leaves its lane there and here by the same rule; one that is cancelled is halted there first. Lanes end
their rounds together, so that they can be dealt anew.

*Prompts* travel in chunks that follow each other without waiting. One prompt is read at a time, by priority and then in
the order of arrival; a long one lets others in from time to time. Stages let steps go before the rows of prompts, also
in the middle of a chunk, so the two kinds need no common budget.

When stages would be idle, steps also carry *guesses* of the tokens to come, behind the row that asks. The last stage
answers a guess only if it was right. A wrong one is taken back by sending the right row: rows replace what their slot
holds from their position on. Order in the ring is the only synchronisation: a slot may be given away at once.

Pure: no clock, no IO. ``submit``/``cancel`` change the queue, ``schedule`` gives the next frame or None, ``reread`` one
that no request waits for, ``complete`` takes a result. Every frame that was scheduled ends in exactly one ``complete``,
unless the pipeline breaks: then the scheduler is thrown away with its epoch.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

from dwarfstar_engine.batch.chunks import LARGEST, UNMEASURED, ChunkCosts, next_chunk, reusable, wide_rows
from dwarfstar_engine.batch.lookup import Lookup
from dwarfstar_engine.batch.restore import REPLAY_ROWS, Kept, Restore
from dwarfstar_engine.batch.slots import Place, Slot, Slots
from dwarfstar_engine.batch.speculate import MAX_DEPTH, NONE, Acceptance, Depth, Speculation
from dwarfstar_engine.errors import Overloaded
from dwarfstar_engine.serving import Request, Token

MAX_QUEUED = 256  # requests waiting for a slot; beyond it a client is better told to come back
STEP_ROWS = 64  # rows of a frame of steps: a stage takes no more
TURN = 2048  # tokens of a prompt that are read before another prompt that waits gets its turn
DRAFTED = 8  # guesses that a draft model is asked to have ready
SOON = 4  # rounds: lanes that end so soon are not waited for, they begin anew with this one
GUESSING = 3  # rounds a sequence may go by itself at least while there is nothing to guess: then it is looked at again
NOVEL = 4  # tokens without a guess for which it may go one more
DRAWN, CHECKED = 1, 2  # wants of a row: wire/frames.Want


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one pipeline.

    context: tokens of one request. stages: of the ring. chunk: rows of a prompt's frame, as chosen by ``costs`` if
    not given. lane_rows: sequences of a lane. cache: slots keep what they hold; exact: only that is kept of it which a
    prompt would compute to the same bits. windowed: the model has sliding attention (``slots``). rounds: that steps may
    go by themselves; 0 if the last stage does not reach the first. drafts: a draft model may offer guesses.
    """

    slots: int
    context: int
    stages: int = 1
    chunk: int | None = None
    costs: ChunkCosts = UNMEASURED
    lane_rows: int = STEP_ROWS
    queued: int = MAX_QUEUED
    cache: bool = True
    exact: bool = True
    windowed: bool = False
    rounds: int = 0
    drafts: bool = False

    @property
    def lanes(self) -> int:
        """Frames of each kind in the ring: one for every stage, and one on its way."""
        return self.stages + 1


@dataclass(frozen=True, slots=True)
class Step:
    """A frame to send. The copy and ``samplers`` apply, in this order, before the rows.

    copy: (source slot, target slot, rows). slots, positions, tokens, wants: one entry a row. sequences: for each row
    that asks for a sample, whose it is. rounds: that it may go by itself. halts: slots that are to draw nothing more,
    in a frame without rows. stages: that run it, if it is a replay. resends: (slot, begin, end, stage, until) of rows
    that stages are to send again.
    """

    number: int
    prompt: bool
    copy: tuple[int, int, int] | None
    samplers: tuple[tuple[int, int], ...]  # (slot, sequence) whose sampler must be set up
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    wants: tuple[int, ...]
    sequences: tuple[int, ...]
    rounds: int = 0
    halts: tuple[int, ...] = ()
    stages: int = 0
    resends: tuple[tuple[int, int, int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """A token for a sequence. After one with ``token.finish`` the sequence is gone."""

    sequence: int
    token: Token


@dataclass(slots=True)
class _Sequence:
    """tokens: prompt and answer. guesses: of what follows, the first ``guessed`` of which were sent. novel: tokens
    since there was one. sent: rows sent of both. going: the frame in which its row goes round by itself; -1:
    none. through: rows of the prompt that were through all stages in this pipeline; from the first ones on its
    slot holds nothing of others anywhere. restore: what is missing of it is being computed again."""

    id: int
    request: Request
    limit: int  # tokens generated at most
    tokens: list[int]
    slot: Slot | None = None
    place: Place | None = None  # where it begins, until its first rows are sent
    chunk: int = 0
    turn: int = 0  # rows sent in this turn
    sent: int = 0
    kept: int = 0
    guesses: list[int] = field(default_factory=list)
    guessed: int = 0
    novel: int = 0
    going: int = -1
    through: int = 0
    restore: Restore | None = None
    lookup: Lookup | None = None
    acceptance: Acceptance | None = None

    @property
    def prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt


@dataclass(slots=True)
class _Flight:
    """A frame in the ring. owners: by slot, of the rows that ask for a sample. rounds: that it will come back from by
    itself. restores: it is a part of bringing this one back. reads: whose prompt it is, and up to which row."""

    kind: Literal["prompt", "steps", "halts"]
    owners: dict[int, _Sequence]
    rounds: int
    restores: _Sequence | None = None
    reads: tuple[_Sequence, int] | None = None


class Scheduler:
    """Deals sequences into frames."""

    def __init__(self, limits: Limits, eog_tokens: frozenset[int], speculation: Speculation | None = None) -> None:
        self.limits = limits
        self._speculation = speculation
        self._eog = eog_tokens
        chunk = self._chunk = LARGEST if limits.chunk is None else limits.chunk
        alike = chunk if limits.exact else 1  # rows of chunks below WIDE are all computed alike
        self._slots = Slots(
            limits.slots,
            lambda n, common, wide: reusable(n, common, wide, alike),
            cache=limits.cache,
            windowed=limits.windowed,
        )
        self._queue: list[tuple[int, int, int]] = []  # a heap: (−priority, arrival, sequence)
        self._waiting: dict[int, _Sequence] = {}
        self._arrivals = itertools.count()
        self._running: dict[int, _Sequence] = {}
        self._reading: deque[_Sequence] = deque()  # prompts; the first one is read
        self._ready: OrderedDict[int, _Sequence] = OrderedDict()  # known tokens wait to be sent
        self._flights: dict[int, _Flight] = {}  # by frame
        self._leaving: dict[int, _Sequence] = {}  # cancelled, and a row of theirs still goes round
        self._halts: list[int] = []  # slots of these that the last stage is to be told of
        self._replays: deque[_Sequence] = deque()  # their prompts are read; their answers are to be, by steps
        self._restores: dict[int, _Sequence] = {}  # what is missing of them is computed again
        self._steps = self._prompts = 0  # frames in flight
        self._number = 0

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    # --- requests ---

    def cached(self, prompt: list[int]) -> int:
        """Rows of a prompt that need not be read, but for those that exactness has read again."""
        return self._slots.cached(prompt)

    @property
    def unstarted(self) -> tuple[int, ...]:
        """Sequences that wait for a slot, in the order of arrival."""
        return tuple(self._waiting)

    def submit(
        self,
        sequence: int,
        request: Request,
        answer: Seq[int] = (),
        *,
        accepted: bool = False,
        kept: Kept | None = None,
    ) -> None:
        """Queue a request under a fresh id. Its prompt must be shorter than the context. Raises Overloaded.

        answer: tokens it was given in another pipeline; their rows are computed again, and it goes on behind them.
        accepted: by another pipeline; such a request is not refused, also if it was given no token yet. kept: stages
        have its rows still, but for what is missing; such requests come before all others.
        """
        assert 0 < len(request.prompt) < self.limits.context and sequence not in self._waiting
        if not accepted and len(self._waiting) >= self.limits.queued and not self._may_start():
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting already: try again later",
                retry_after_s=1.0,
                code="queue_full",
            )
        room = self.limits.context - len(request.prompt)
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        accepted_one = _Sequence(sequence, request, limit, [*request.prompt, *answer])
        if kept is not None:
            self._go_on_with(accepted_one, kept)
            return
        self._waiting[sequence] = accepted_one
        heapq.heappush(self._queue, (-request.priority, next(self._arrivals), sequence))

    def _go_on_with(self, sequence: _Sequence, kept: Kept) -> None:
        sequence.slot = self._slots.claim(kept.slot, sequence.id, kept.floor)
        prompt = sequence.through = min(kept.positions, sequence.prompt)
        sequence.sent, sequence.kept = kept.positions, 0
        sequence.chunk = self.limits.chunk or self.limits.costs.choose(sequence.prompt)
        sequence.restore = Restore(kept.runs, prompt, kept.positions, sequence.chunk)
        self._running[sequence.id] = self._restores[sequence.id] = sequence

    @property
    def running(self) -> frozenset[int]:
        """Sequences that have a slot."""
        return frozenset(self._running)

    def settled(self) -> dict[int, tuple[int, int]]:
        """Sequences whose slot holds nothing of others at any stage: their slot, and the rows of the prompt that were
        through all stages."""
        return {one.id: (_slot_number(one), one.through) for one in self._running.values() if one.through}

    def cancel(self, sequence: int) -> None:
        """Forget a sequence; its slot is free at once, or when its row is back that goes round by itself.

        Unknown ids are ignored: it may just have finished.
        """
        self._waiting.pop(sequence, None)
        if (running := self._running.get(sequence)) is not None:
            self._end(running)

    def _end(self, sequence: _Sequence) -> None:
        del self._running[sequence.id]
        self._ready.pop(sequence.id, None)
        for queue in (self._reading, self._replays):
            if sequence in queue:
                queue.remove(sequence)
        slot = sequence.slot
        assert slot is not None
        if self._restores.pop(sequence.id, None) is not None:
            assert sequence.restore is not None
            if not sequence.restore.in_flight:  # else when it is back: its rows may come by at any moment
                self._slots.give_back(slot)
            return
        if sequence.place is not None:
            slot.tokens, slot.wide = [], 0  # no rows were sent, nor was the copy
        else:
            slot.tokens = sequence.tokens[: min(sequence.sent, len(sequence.tokens))]
            wide = wide_rows(sequence.prompt, self._chunk)
            slot.wide = min(wide, len(slot.tokens)) if wide >= sequence.kept else sequence.kept
        if sequence.going >= 0:
            self._leaving[sequence.id] = sequence
            self._halts.append(slot.number)
        else:
            self._slots.give_back(slot)

    def _may_start(self) -> bool:
        return self._slots.free > len(self._waiting)

    # --- frames ---

    def schedule(self) -> Step | None:
        """The next frame to send, or None if the ring is full or nothing is ready."""
        lanes = self.limits.lanes
        if self._halts:
            halts, self._halts = tuple(self._halts), []
            return self._step(halts=halts)
        if self._restores and (part := self._next_part()) is not None:
            return part
        if self._ready and (step := self._next_step()) is not None:
            return step
        if self._replays and self._steps < lanes + len(self._running):
            return self._next_replay()
        if self._prompts < lanes and (reading := self._next_prompt()) is not None:
            return self._next_chunk(reading)
        if self._steps < lanes and not self._prompts and (guesses := self._next_guesses()) is not None:
            return guesses
        return None

    def _next_step(self) -> Step | None:
        """A lane of sequences that are ready, or None while enough lanes are in flight and some will soon be back."""
        stepping = len(self._running) - len(self._reading)
        rows = min(max(1, (stepping - 1) // self.limits.stages), self.limits.lane_rows)
        others = [flight.rounds for flight in self._flights.values() if flight.kind == "steps"]
        if len(others) >= max(self.limits.lanes, -(-stepping // rows)) and min(others) == 0:
            return None
        picked = [self._ready.popitem(last=False)[1] for _ in range(min(rows, len(self._ready)))]
        picked.sort(key=_slot_number)  # llama.cpp would sort them
        sent = [(_slot_number(s), len(s.tokens) - 1, s.tokens[-1], DRAWN, s.id) for s in picked]
        for sequence in picked:
            sequence.sent = len(sequence.tokens)
        others_end = max(others, default=0)
        rounds = others_end if others_end >= SOON else self.limits.rounds
        rounds = min(rounds, *(s.limit - s.generated - 1 for s in picked))
        if len(picked) == 1 and self._may_guess():
            depth = self._depth(picked[0])
            sent += self._guess(picked[0], depth.rows - 1)
            rounds = 0 if depth.guesses else min(rounds, self._unguessed(picked[0]))
        for sequence in picked:
            sequence.going = self._number if rounds else -1
        slots, positions, tokens, wants, sequences = zip(*sent, strict=True)
        return self._step(
            slots=slots,
            positions=positions,
            tokens=tokens,
            wants=wants,
            owners=picked,
            sequences=sequences,
            rounds=rounds,
        )

    def _next_part(self) -> Step | None:
        """A frame that brings a sequence back."""
        lanes = self.limits.lanes
        for sequence in self._restores.values():
            restore = sequence.restore
            assert restore is not None
            part = restore.next
            if part is None or (self._prompts >= lanes if part.prompt else self._steps >= lanes + len(self._running)):
                continue
            restore.sent()
            slot = _slot_number(sequence)
            return self._step(
                prompt=part.prompt,
                samplers=((slot, sequence.id),) if part.first else (),
                slots=(slot,) * part.rows,
                positions=tuple(range(part.start, part.start + part.rows)),
                tokens=tuple(sequence.tokens[part.start : part.start + part.rows]),
                wants=(0,) * part.rows,
                stages=part.stages,
                resends=tuple((slot, *resend) for resend in part.resends),
                restores=sequence,
            )
        return None

    def _next_replay(self) -> Step:
        """Rows of an answer that another pipeline gave, as steps: so they get the bits they had there."""
        sequence = self._replays[0]
        start = sequence.sent
        rows = min(REPLAY_ROWS, len(sequence.tokens) - start)
        sequence.sent += rows
        ends = sequence.sent == len(sequence.tokens)
        if ends:
            self._replays.popleft()
        return self._step(
            slots=(_slot_number(sequence),) * rows,
            positions=tuple(range(start, start + rows)),
            tokens=tuple(sequence.tokens[start : start + rows]),
            wants=(0,) * (rows - 1) + (DRAWN if ends else 0,),
            owners=[sequence] if ends else [],
            sequences=(sequence.id,) if ends else (),
        )

    # --- guesses ---

    def _may_guess(self) -> bool:
        """Whether stages may be idle without guesses."""
        stepping = len(self._running) - len(self._reading)
        return self._speculation is not None and 0 < stepping < self.limits.lanes and not self._reading

    def _depth(self, sequence: _Sequence) -> Depth:
        """How many guesses of a sequence are worth being in flight."""
        assert self._speculation is not None
        if sequence.lookup is None:
            sequence.lookup = Lookup(sequence.tokens)
            sequence.acceptance = self._speculation.begin()
        assert sequence.acceptance is not None
        room = min(MAX_DEPTH, sequence.limit - sequence.generated - 1)
        if len(sequence.guesses) < room:
            more = sequence.lookup.propose(room)
            if more[: len(sequence.guesses)] == sequence.guesses:  # else those of a draft model stay
                sequence.guesses = more
        available = min(room, len(sequence.guesses))
        if available <= 0:
            return NONE
        sequence.novel = 0
        stepping = len(self._running) - len(self._reading)
        return self._speculation.depth(sequence.acceptance, stepping, self.limits.lanes, available)

    def _unguessed(self, sequence: _Sequence) -> int:
        """Rounds for which there will be nothing to guess of a sequence."""
        assert sequence.acceptance is not None
        pause = sequence.acceptance.pause
        return pause if self.limits.drafts else max(pause, GUESSING + sequence.novel // NOVEL)

    def _next_guesses(self) -> Step | None:
        """Guesses of a sequence whose row is on its way."""
        if not self._may_guess():
            return None
        for sequence in self._running.values():
            if sequence.generated == 0 or sequence.going >= 0:
                continue  # its prompt is on its way still, and steps overtake prompts; or its row goes by itself
            depth = self._depth(sequence)
            if sequence.guessed < depth.guesses and sequence.sent >= len(sequence.tokens):
                rows = self._guess(sequence, min(depth.rows, depth.guesses - sequence.guessed))
                slots, positions, tokens, wants, sequences = zip(*rows, strict=True)
                return self._step(
                    slots=slots, positions=positions, tokens=tokens, wants=wants, owners=[sequence], sequences=sequences
                )
        return None

    def _guess(self, sequence: _Sequence, count: int) -> list[tuple[int, int, int, int, int]]:
        """The next rows of a sequence's guesses."""
        guesses = sequence.guesses[sequence.guessed : sequence.guessed + count]
        first = sequence.sent
        sequence.guessed += len(guesses)
        sequence.sent += len(guesses)
        slot = _slot_number(sequence)
        return [(slot, first + i, token, CHECKED, sequence.id) for i, token in enumerate(guesses)]

    def undrafted(self) -> list[tuple[int, list[int]]]:
        """Sequences whose guesses run out, with their text and the guesses there are: a draft model may go on."""
        if not self._may_guess():
            return []
        return [
            (sequence.id, [*sequence.tokens, *sequence.guesses])
            for sequence in self._running.values()
            if len(sequence.guesses) < DRAFTED and sequence.acceptance is not None and not sequence.acceptance.pause
            if sequence.going < 0
        ]

    def offer(self, sequence_id: int, length: int, guesses: Seq[int]) -> None:
        """What may follow the first ``length`` tokens of a sequence and its guesses; useless if it went otherwise."""
        sequence = self._running.get(sequence_id)
        if sequence is None or sequence.acceptance is None:
            return
        known = [*sequence.tokens, *sequence.guesses]
        passed = known[length:]
        if length <= len(known) and list(guesses[: len(passed)]) == passed:
            sequence.guesses += guesses[len(passed) :]

    # --- prompts ---

    def _next_prompt(self) -> _Sequence | None:
        """The prompt whose chunk is sent next."""
        reading = self._reading
        if reading and reading[0].turn >= TURN and (len(reading) > 1 or self._start()):
            self._slots.set_aside(reading[0].slot, reading[0].sent)
            reading.rotate(-1)
            reading[0].turn = 0
        if not reading:
            self._start()
        return reading[0] if reading else None

    def _start(self) -> bool:
        """Give the first request of the queue a slot, if there is one: it is the last in ``_reading`` then."""
        while self._queue and self._queue[0][2] not in self._waiting:
            heapq.heappop(self._queue)  # cancelled
        if not self._queue or not self._slots.free:
            return False
        sequence = self._waiting.pop(heapq.heappop(self._queue)[2])
        prompt = sequence.tokens[: sequence.prompt]
        place = self._slots.find(prompt, cache=sequence.request.cache)
        sequence.slot = self._slots.take(place, sequence.id, prompt)
        sequence.place, sequence.kept, sequence.sent = place, place.keep, place.keep
        limits = self.limits
        sequence.chunk = limits.chunk or limits.costs.choose(sequence.prompt - sequence.sent)
        self._running[sequence.id] = sequence
        self._reading.append(sequence)
        return True

    def _next_chunk(self, sequence: _Sequence) -> Step:
        start, place, slot = sequence.sent, sequence.place, sequence.slot
        assert slot is not None
        rows = next_chunk(start, sequence.prompt, sequence.chunk)
        ends, draws = start + rows == sequence.prompt, not sequence.generated
        sequence.sent += rows
        sequence.turn += rows
        sequence.place = None
        slot.tokens = sequence.tokens[: sequence.sent]  # others may copy it from the next frame on
        slot.wide = max(sequence.kept, min(wide_rows(sequence.prompt, self._chunk), sequence.sent))
        if ends:
            self._reading.popleft()
        return self._step(
            prompt=True,
            copy=(place.copy_from, place.slot, place.keep) if place is not None and place.copy_from >= 0 else None,
            samplers=() if place is None else ((slot.number, sequence.id),),
            slots=(slot.number,) * rows,
            positions=tuple(range(start, start + rows)),
            tokens=tuple(sequence.tokens[start : start + rows]),
            wants=(0,) * (rows - 1) + (DRAWN if ends and draws else 0,),
            owners=[sequence] if ends else [],
            sequences=(sequence.id,) if ends and draws else (),
            reads=(sequence, sequence.sent),
        )

    @property
    def idle(self) -> bool:
        """Nothing is to be done for any request, and no frame is in flight."""
        return not (self._flights or self._running or self._waiting)

    def reread(self) -> Step | None:
        """While idle: compute the rows of an answer again as a prompt would, so that the next turn of its chat finds
        them (``chunks``). One chunk at a time, so that a request waits for no more."""
        if not self.idle or self.limits.windowed or not self.limits.exact:
            return None
        if (found := self._slots.unread(self._chunk)) is None:
            return None
        slot, start, tokens = found
        return self._step(
            prompt=True,
            slots=(slot,) * len(tokens),
            positions=tuple(range(start, start + len(tokens))),
            tokens=tuple(tokens),
            wants=(0,) * len(tokens),
        )

    def _step(
        self,
        *,
        slots: tuple[int, ...] = (),
        positions: tuple[int, ...] = (),
        tokens: tuple[int, ...] = (),
        wants: tuple[int, ...] = (),
        owners: Seq[_Sequence] = (),
        sequences: tuple[int, ...] = (),
        prompt: bool = False,
        copy: tuple[int, int, int] | None = None,
        samplers: tuple[tuple[int, int], ...] = (),
        rounds: int = 0,
        halts: tuple[int, ...] = (),
        stages: int = 0,
        resends: tuple[tuple[int, int, int, int, int], ...] = (),
        restores: _Sequence | None = None,
        reads: tuple[_Sequence, int] | None = None,
    ) -> Step:
        number = self._number
        self._number += 1
        kind: Literal["prompt", "steps", "halts"] = "prompt" if prompt else "halts" if halts else "steps"
        self._prompts += kind == "prompt"
        self._steps += kind == "steps"
        self._flights[number] = _Flight(kind, {_slot_number(s): s for s in owners}, rounds, restores, reads)
        return Step(
            number, prompt, copy, samplers, slots, positions, tokens, wants, sequences, rounds, halts, stages, resends
        )

    # --- results ---

    def complete(self, number: int, rows: Seq[tuple[int, Token]], goes_on: bool = False) -> list[Output]:
        """Take a frame's result: (slot, token) for each row that was answered, in order.

        goes_on: the last stage has sent the rows behind these, but for those that ended their text; another result will
        come. Rows of sequences that were cancelled are skipped. Raises KeyError if there is no such frame.
        """
        flight = self._flights[number]
        owners, flight.owners = flight.owners, {}
        if goes_on:
            flight.rounds -= 1
            flight.owners = {slot: owners[slot] for slot, token in rows if slot in owners and token.id not in self._eog}
        else:
            del self._flights[number]
            self._prompts -= flight.kind == "prompt"
            self._steps -= flight.kind == "steps"
        if flight.restores is not None:
            self._restored(flight.restores)
        if flight.reads is not None:
            flight.reads[0].through = flight.reads[1]
        for slot, sequence in owners.items():
            if sequence.going == number and slot not in flight.owners:
                self._came_back(sequence)
            elif flight.kind == "prompt" and sequence.generated and sequence.id in self._running:
                self._replays.append(sequence)
        outputs: list[Output] = []
        for slot, token in rows:
            drawn = owners.get(slot)
            if drawn is not None and drawn.id in self._running:
                outputs.append(self._draw(drawn, token))
        return outputs

    def _restored(self, sequence: _Sequence) -> None:
        """A part of bringing it back is done."""
        restore, slot = sequence.restore, sequence.slot
        assert restore is not None and slot is not None
        restore.answered()
        if sequence.id not in self._running:  # cancelled meanwhile
            if not restore.in_flight:
                self._slots.give_back(slot)
        elif restore.over:
            del self._restores[sequence.id]
            slot.tokens = sequence.tokens[: sequence.sent]
            slot.wide = min(wide_rows(sequence.prompt, self._chunk), sequence.sent)
            if sequence.generated:
                self._ready[sequence.id] = sequence
            else:
                self._reading.append(sequence)

    def _came_back(self, sequence: _Sequence) -> None:
        """A row does not go by itself any more."""
        sequence.going = -1
        if self._leaving.pop(sequence.id, None) is not None:
            assert sequence.slot is not None
            self._slots.give_back(sequence.slot)

    def _draw(self, sequence: _Sequence, token: Token) -> Output:
        """The next token of a sequence is known."""
        first = sequence.generated == 0
        sequence.tokens.append(token.id)
        if sequence.acceptance is not None:
            self._judge(sequence, token.id)
        finish = None
        if token.id in self._eog and not sequence.request.ignore_eos:
            finish = "stop"
        elif sequence.generated >= sequence.limit:
            finish = "length"
        if finish is not None:
            self._end(sequence)
        elif sequence.going >= 0:
            sequence.sent = len(sequence.tokens)
        elif sequence.sent < len(sequence.tokens):
            self._ready[sequence.id] = sequence
        if finish is not None or first:
            cached = sequence.kept if first else 0
            token = Token(token.id, token.logprob, token.top, finish, cached)
        return Output(sequence.id, token)

    def _judge(self, sequence: _Sequence, token: int) -> None:
        """A token is known, of which there may have been a guess."""
        assert self._speculation is not None and sequence.acceptance is not None and sequence.lookup is not None
        sequence.lookup.append(token)
        sequence.novel += 1
        guesses = sequence.guesses
        right = bool(guesses) and guesses[0] == token
        if sequence.guessed:
            self._speculation.record(sequence.acceptance, 1, int(right))
        else:
            self._speculation.record(sequence.acceptance, 0, 0)
        if right:
            del guesses[0]
            sequence.guessed = max(0, sequence.guessed - 1)
        else:
            guesses.clear()
            sequence.guessed = 0
            sequence.sent = len(sequence.tokens) - 1


def _slot_number(sequence: _Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot.number
