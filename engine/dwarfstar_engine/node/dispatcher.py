"""Drives one pipeline: scheduler steps out as frames, result frames in as tokens for their requests.

One dispatcher lives as long as one epoch. All calls come from the event loop, so there are no locks. When a result
comes in, the next frames are sent before the tokens are delivered: the ring must not wait for HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from dwarfstar_engine.batch.scheduler import Scheduler, Step
from dwarfstar_engine.errors import ContextLengthError, DwarfStarError, FrameError, StageError
from dwarfstar_engine.serving import Request, Token
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import FaultFrame, FreeSlot, Op, ResultFrame, SetSampler
from dwarfstar_engine.wire.sampler_spec import SamplerSpec

RATE_WINDOW_S = 5.0  # tok/s shown is over so long
RATE_TOKENS = 1 << 16  # more than any pipeline draws in RATE_WINDOW_S
SMOOTHING = 0.1  # weight of a new frame in the running mean of a stage's time


@dataclass(slots=True)
class StageTimes:
    """Running means of one stage, in ms: per decode row computed, and waited for a frame."""

    compute_ms: float = 0.0
    wait_ms: float = 0.0
    frames: int = 0

    def add(self, compute_us: int, wait_us: int, rows: int) -> None:
        weight = SMOOTHING if self.frames else 1.0
        self.compute_ms += weight * (compute_us / 1000 / rows - self.compute_ms)
        self.wait_ms += weight * (wait_us / 1000 - self.wait_ms)
        self.frames += 1


@dataclass(slots=True)
class _Flight:
    rows: int
    wanted: int
    sent_at: float


@dataclass(slots=True)
class _Answer:
    """Tokens on their way to one request. Bounded by the tokens a request may generate."""

    tokens: asyncio.Queue[Token | DwarfStarError] = field(default_factory=asyncio.Queue)


class Dispatcher:
    """Puts frames into the ring by ``send`` and ``flush``; a fault frame goes to ``on_fault``, which calls ``fail``."""

    def __init__(
        self,
        scheduler: Scheduler,
        epoch: int,
        stages: int,
        send: Callable[[bytes], None],
        flush: Callable[[], Awaitable[None]],
        on_fault: Callable[[str], None],
    ) -> None:
        self.scheduler, self.epoch = scheduler, epoch
        self.stages = [StageTimes() for _ in range(stages)]
        self._send, self._flush, self._on_fault = send, flush, on_fault
        self._answers: dict[int, _Answer] = {}
        self._ids = itertools.count(1)
        self._flights: dict[int, _Flight] = {}
        self._drawn: deque[float] = deque(maxlen=RATE_TOKENS)  # times of the tokens drawn lately
        self._error: DwarfStarError | None = None
        self._flushes: set[asyncio.Future[None]] = set()

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """The tokens of a request; see ``serving.Engine.generate``."""
        context = self.scheduler.limits.context
        if len(request.prompt) >= context:
            raise ContextLengthError(
                f"the prompt has {len(request.prompt)} tokens and the context {context}: shorten the prompt by "
                f"{len(request.prompt) - context + 1} tokens or serve with a larger --context",
                param="messages",
            )
        if self._error is not None:
            raise self._error
        sequence = next(self._ids)
        answer = self._answers[sequence] = _Answer()
        try:
            self.scheduler.submit(sequence, request)
            self._pump()
            self._flush_apart()
            while True:
                item = await answer.tokens.get()
                if isinstance(item, DwarfStarError):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            del self._answers[sequence]
            if self._error is None:
                self.scheduler.cancel(sequence)
                self._pump()
                self._flush_apart()

    def _flush_apart(self) -> None:
        """Flush in a task of its own: the caller may be cancelled, and a cancelled write would end the hop."""
        task = asyncio.ensure_future(self._flush())
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    def _pump(self) -> None:
        while self._error is None and (step := self.scheduler.schedule()) is not None:
            self._flights[step.number] = _Flight(len(step.slots), len(step.sequences), time.monotonic())
            self._send(self._frame(step))

    def _frame(self, step: Step) -> bytes:
        ops: list[Op] = [FreeSlot(slot) for slot in step.free]
        ops += [SetSampler(slot, self._sampler(sequence)) for slot, sequence in step.samplers]
        return frames.encode_tokens(
            self.epoch, step.number, tuple(ops), step.slots, step.positions, step.wants, step.tokens
        )

    def _sampler(self, sequence: int) -> bytes:
        request = self.scheduler.request(sequence)
        return SamplerSpec.of(request.sampling, request.prompt, secrets.randbits(64)).encode()

    async def on_frame(self, data: bytes) -> None:
        """A frame from the last stage. Raises FrameError if it is not one."""
        frame = frames.decode(data)
        if frame.epoch != self.epoch or self._error is not None:
            return
        if isinstance(frame, FaultFrame):
            self._on_fault(frame.message)
            return
        if not isinstance(frame, ResultFrame):
            raise FrameError("the last stage sent a frame that is no result: run one release everywhere")
        flight = self._flights.pop(frame.number, None)
        if flight is None or len(frame.rows) != flight.wanted:
            raise FrameError(f"a result came for frame {frame.number}, which asked for no such thing")
        outputs = self.scheduler.complete(frame.number, [Token(row.token, row.logprob, row.top) for row in frame.rows])
        self._pump()
        await self._flush()
        now = time.monotonic()
        for output in outputs:
            self._drawn.append(now)
            if (answer := self._answers.get(output.sequence)) is not None:
                answer.tokens.put_nowait(output.token)
        if flight.rows == flight.wanted and len(frame.timings) == len(self.stages):
            for stage, (compute_us, wait_us) in zip(self.stages, frame.timings, strict=True):
                stage.add(compute_us, wait_us, flight.rows)

    def tok_s(self, now: float) -> float:
        """Tokens drawn per second over the last RATE_WINDOW_S. ``now``: of the monotonic clock."""
        while self._drawn and self._drawn[0] < now - RATE_WINDOW_S:
            self._drawn.popleft()
        return len(self._drawn) / RATE_WINDOW_S

    def oldest_age_s(self, now: float) -> float:
        """How long the oldest frame has been in the ring; 0 if none is."""
        return max((now - flight.sent_at for flight in self._flights.values()), default=0.0)

    def fail(self, reason: str, retry_after_s: float) -> None:
        """The pipeline broke: every request gets an error; nothing is sent any more. Idempotent."""
        if self._error is not None:
            return
        self._error = StageError(reason, retry_after_s=retry_after_s)
        self._flights.clear()
        for answer in self._answers.values():
            answer.tokens.put_nowait(self._error)
