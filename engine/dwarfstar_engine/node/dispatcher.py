"""Drives one pipeline: scheduler steps out as frames, result frames in as tokens for their requests.

Most frames of steps go round by themselves for some rounds: then results come in and nothing is to be sent.

One dispatcher lives as long as one epoch. All calls come from the event loop, so there are no locks. When a result
comes in, the next frames are sent before the tokens are delivered: the ring must not wait for HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from dwarfstar_engine.batch.restore import Kept
from dwarfstar_engine.batch.scheduler import DRAFTED, DRAWN, Output, Scheduler, Step
from dwarfstar_engine.batch.trial import Trial
from dwarfstar_engine.errors import ContextLengthError, DwarfStarError, FrameError, StageError
from dwarfstar_engine.node.drafter import Drafter
from dwarfstar_engine.node.streams import Stream
from dwarfstar_engine.serving import Request, Sink, Token
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import CopySlot, FaultFrame, Halt, Op, Resend, ResultFrame, SetSampler
from dwarfstar_engine.wire.sampler_spec import SamplerSpec

RATE_WINDOW_S = 5.0  # tok/s shown is over so long
RATE_TOKENS = 1 << 16  # more than any pipeline draws in RATE_WINDOW_S
REST_S = 0.5  # idle for so long, answers are read again: a next turn that comes at once would wait for that
SMOOTHING = 0.1  # weight of a new frame in the running mean of a stage's time
ALONE_SMOOTHING = 0.02  # and of one that was alone in the ring: plans are made of these
ALONE_FRAMES = 24  # from so many on they are believed


@dataclass(slots=True)
class StageTimes:
    """Running means of one stage, in ms: per row of a step computed, and waited for a frame. alone: of single rows that
    shared the ring with nothing, where no other stage computed at the same time."""

    compute_ms: float = 0.0
    wait_ms: float = 0.0
    frames: int = 0
    alone: float = 0.0
    alone_frames: int = 0

    def add(self, compute_us: int, wait_us: int, rows: int) -> None:
        weight = SMOOTHING if self.frames else 1.0
        self.compute_ms += weight * (compute_us / 1000 / rows - self.compute_ms)
        self.wait_ms += weight * (wait_us / 1000 - self.wait_ms)
        self.frames += 1

    def add_alone(self, compute_us: int) -> None:
        self.alone_frames += 1
        self.alone += max(ALONE_SMOOTHING, 1 / self.alone_frames) * (compute_us / 1000 - self.alone)

    @property
    def alone_ms(self) -> float:
        """What a row takes here when nothing else goes on; 0.0: not known yet."""
        return self.alone if self.alone_frames >= ALONE_FRAMES else 0.0


@dataclass(slots=True)
class _Flight:
    """least, most: rows that may be answered; guesses may be wrong."""

    rows: int
    least: int
    most: int
    prompt: bool
    sent_at: float
    rounds: int  # that it may go by itself


class Dispatcher:
    """Puts frames into the ring by ``send`` and ``flush``; a fault frame goes to ``on_fault``, which calls ``fail``.

    sequences: where their ids come from, if others use the drafter, too.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        epoch: int,
        stages: int,
        send: Callable[[bytes], None],
        flush: Callable[[], Awaitable[None]],
        on_fault: Callable[[str], None],
        drafter: Drafter | None = None,
        sequences: Iterator[int] | None = None,
    ) -> None:
        self.scheduler, self.epoch = scheduler, epoch
        self.stages = [StageTimes() for _ in range(stages)]
        self._send, self._flush, self._on_fault = send, flush, on_fault
        self._drafter = drafter
        self._trial = Trial()
        self._streams: dict[int, Stream] = {}
        self._ids = itertools.count(1) if sequences is None else sequences
        self._flights: dict[int, _Flight] = {}
        self._drawn: deque[tuple[float, int]] = deque(maxlen=RATE_TOKENS)  # when, and how many
        self._error: DwarfStarError | None = None
        self.always_draft = False  # also where drafts make it slower
        self._pumping = False
        self._rest: asyncio.TimerHandle | None = None  # runs while idle
        self._resting = False  # idle for REST_S
        self._flushes: set[asyncio.Future[None]] = set()

    def generate(self, request: Request, sink: Sink) -> Stream:
        """See ``serving.Engine.generate``."""
        stream = Stream(request, sink, secrets.randbits(64))
        self._begin(stream, accepted=False)
        return stream

    def carry(self, stream: Stream, kept: Kept | None = None) -> None:
        """Go on with a stream that was accepted before, unless its client left. Raises if it can never be carried.
        kept: what stages have of it; such streams come first."""
        if not stream.left:
            self._begin(stream, accepted=True, kept=kept)

    def _begin(self, stream: Stream, *, accepted: bool, kept: Kept | None = None) -> None:
        request = stream.request
        context = self.scheduler.limits.context
        if len(request.prompt) >= context:
            raise ContextLengthError(
                f"the prompt has {len(request.prompt)} tokens and the context {context}: shorten the prompt by "
                f"{len(request.prompt) - context + 1} tokens or serve with a larger --context",
                param="messages",
            )
        if self._error is not None:
            raise self._error
        self._wake()
        sequence = next(self._ids)
        self.scheduler.submit(sequence, request, stream.answer, accepted=accepted, kept=kept)
        self._streams[sequence] = stream
        stream.leave = functools.partial(self.cancel, sequence)
        self._pump_apart()

    def cancel(self, sequence: int) -> None:
        """Forget a sequence. Idempotent."""
        if self._streams.pop(sequence, None) is not None and self._error is None:
            self._forget(sequence)
            self.scheduler.cancel(sequence)
            self._pump_apart()

    def recall(self, most: int) -> list[Stream]:
        """Take back streams that wait for a slot, those that came last; they are carried no more."""
        recalled = []
        for sequence in self.scheduler.unstarted[::-1][:most]:
            stream = self._streams.pop(sequence)
            stream.leave = None
            self.scheduler.cancel(sequence)
            recalled.append(stream)
        return recalled[::-1]

    def _pump_apart(self) -> None:
        """Send what may be sent, soon and apart from the caller: requests that come together are dealt out together,
        and a caller may be cancelled, where a cancelled write would end the hop."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump_soon)

    def _pump_soon(self) -> None:
        self._pumping = False
        self._pump()
        task = asyncio.ensure_future(self._flush())
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    def _pump(self) -> bool:
        """Whether there is something to flush."""
        sent = False
        while self._error is None and (step := self._next()) is not None:
            least = 0 if step.rounds else step.wants.count(DRAWN)
            rows = 0 if step.stages else len(step.slots)
            self._flights[step.number] = _Flight(
                rows, least, len(step.sequences), step.prompt, time.monotonic(), step.rounds
            )
            self._send(self._frame(step))
            sent = True
        if self._error is None and self.scheduler.idle and not self._resting and self._rest is None:
            self._rest = asyncio.get_running_loop().call_later(REST_S, self._rested)
        return sent

    def _next(self) -> Step | None:
        return self.scheduler.schedule() or (self.scheduler.reread() if self._resting else None)

    def _rested(self) -> None:
        self._rest, self._resting = None, True
        self._pump_soon()

    def _wake(self) -> None:
        self._resting = False
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _frame(self, step: Step) -> bytes:
        ops: tuple[Op, ...] = tuple(Halt(slot) for slot in step.halts)
        if step.samplers or step.copy is not None:
            copies = [CopySlot(*step.copy)] if step.copy is not None else []
            ops = (*copies, *(SetSampler(slot, self._sampler(sequence)) for slot, sequence in step.samplers))
        if step.resends:
            ops = (*ops, *(Resend(*resend) for resend in step.resends))
        return frames.encode_tokens(
            self.epoch,
            step.number,
            ops,
            step.slots,
            step.positions,
            step.tokens,
            step.wants,
            step.prompt,
            step.rounds,
            step.stages,
        )

    def _sampler(self, sequence: int) -> bytes:
        stream = self._streams[sequence]
        return SamplerSpec.of(stream.request.sampling, stream.request.prompt, stream.seed, stream.answer).encode()

    async def on_frame(self, data: bytes) -> None:
        """A message from the last stage: a frame, or several results. Raises FrameError if it is not one."""
        parts = frames.split(data)
        outputs = self._complete(parts[0])
        for part in parts[1:]:
            outputs += self._complete(part)
        if self._pump():
            await self._flush()
        if outputs:
            self._deliver(outputs)

    def _complete(self, data: bytes) -> list[Output]:
        """What a frame from the last stage means."""
        frame = frames.decode(data)
        if frame.epoch != self.epoch or self._error is not None:
            return []
        if isinstance(frame, FaultFrame):
            self._on_fault(frame.message)
            return []
        if not isinstance(frame, ResultFrame):
            raise FrameError("the last stage sent a frame that is no result: run one release everywhere")
        flight = self._flights.pop(frame.number, None)
        if flight is None or not flight.least <= len(frame.rows) <= flight.most or frame.rounds > flight.rounds:
            raise FrameError(f"a result came for frame {frame.number}, which asked for no such thing")
        rows = len(frame.rows)
        if frame.rounds:
            self._flights[frame.number] = _Flight(rows, 0, rows, False, time.monotonic(), frame.rounds - 1)
        if not flight.prompt and len(frame.timings) == len(self.stages):
            alone = flight.rows == 1 and len(self._flights) == (frame.rounds > 0)
            for stage, (compute_us, wait_us) in zip(self.stages, frame.timings, strict=True):
                if flight.rows:
                    stage.add(compute_us, wait_us, flight.rows)
                if alone:
                    stage.add_alone(compute_us)
        return self.scheduler.complete(
            frame.number, [(row.slot, Token(row.token, row.logprob, row.top)) for row in frame.rows], frame.rounds > 0
        )

    def _deliver(self, outputs: list[Output]) -> None:
        streams = self._streams
        for output in outputs:
            token = output.token
            stream = streams.get(output.sequence)
            if token.finish is not None and stream is not None:
                del streams[output.sequence]
                stream.leave = None
                self._forget(output.sequence)
            if stream is not None:
                stream.answer.append(token.id)
                stream.sink.put(token)
        now = time.monotonic()
        self._drawn.append((now, len(outputs)))
        if self._drafter is not None:
            self._draft(self._drafter, len(outputs), now)

    # --- drafts ---

    def _draft(self, drafter: Drafter, drawn: int, now: float) -> None:
        """Ask for guesses where they run out, if the draft model is worth its processor."""
        wanting = self.scheduler.undrafted()
        if not wanting and not self.scheduler.active:
            self._trial.idle()
            return
        if not self.always_draft:
            self._trial.drawn(drawn, now)
            if not self._trial.using:
                return
        for sequence, tokens in wanting:
            drafter.propose(sequence, tokens, DRAFTED, functools.partial(self._drafted, sequence, len(tokens)))

    def _drafted(self, sequence: int, length: int, guesses: list[int]) -> None:
        if self._error is None:
            self.scheduler.offer(sequence, length, guesses)
            self._pump_apart()

    def _forget(self, sequence: int) -> None:
        if self._drafter is not None:
            self._drafter.forget(sequence)

    def tok_s(self, now: float) -> float:
        """Tokens drawn per second over the last RATE_WINDOW_S. ``now``: of the monotonic clock."""
        while self._drawn and self._drawn[0][0] < now - RATE_WINDOW_S:
            self._drawn.popleft()
        return sum(count for _, count in self._drawn) / RATE_WINDOW_S

    def oldest_age_s(self, now: float) -> float:
        """How long the oldest frame has been in the ring; 0 if none is."""
        return max((now - flight.sent_at for flight in self._flights.values()), default=0.0)

    def suspend(self, reason: str, retry_after_s: float) -> list[Stream]:
        """The pipeline broke: nothing is sent any more. What it carried, in the order of arrival; then nothing."""
        if self._error is None:
            self._error = StageError(reason, retry_after_s=retry_after_s)
        self._wake()
        self._flights.clear()
        carried, self._streams = self._streams, {}
        settled, running = self.scheduler.settled(), self.scheduler.running
        for sequence, stream in carried.items():
            stream.leave = None
            stream.slot, stream.read = settled.get(sequence, (-1, 0))
            stream.ran = sequence in running
            self._forget(sequence)
        return list(carried.values())

    def fail(self, reason: str, retry_after_s: float) -> None:
        """The pipeline broke: every request gets an error; nothing is sent any more. Idempotent."""
        for stream in self.suspend(reason, retry_after_s):
            assert self._error is not None
            stream.sink.fail(self._error)
