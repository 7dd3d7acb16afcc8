"""The dispatcher over a simulated ring of toy workers: real frames, real workers, no sockets, random delays."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from dwarfstar_engine.batch.chunks import WIDE
from dwarfstar_engine.batch.scheduler import Limits, Scheduler
from dwarfstar_engine.errors import ContextLengthError, DwarfStarError, FrameError, Overloaded, StageError
from dwarfstar_engine.native import WireType
from dwarfstar_engine.node.dispatcher import ALONE_FRAMES, RATE_WINDOW_S, Dispatcher
from dwarfstar_engine.node.streams import Stream
from dwarfstar_engine.serving import Request, Sampling, Token
from dwarfstar_engine.stage import toy
from dwarfstar_engine.stage.worker import ToyBackend, Worker
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import MAX_RESULTS, FaultFrame, ResultFrame, StepFrame

LAYERS, CONTEXT = 5, 60
EPOCH = 4
RETRY_S = 2.0
EOG = frozenset({122})  # 'z'
DEADLINE_S = 20.0


class Ring:
    """Frames go through the workers in order; each result comes back some turns of the event loop later."""

    def __init__(
        self,
        seed: int = 0,
        *,
        slots: int = 3,
        rows: int = 8,
        in_flight: int = 4,
        queued: int = 99,
        context: int = CONTEXT,
    ) -> None:
        self.rng = random.Random(seed)
        limits = Limits(slots, context, in_flight, chunk=rows, queued=queued, rounds=seed % 3 * 4)
        bounds = (0, 2, 3, LAYERS)
        self.workers = [Worker(ToyBackend(a, b, LAYERS), slots, WireType.F32, EOG) for a, b in pairwise(bounds)]
        self.sent: list[bytes] = []
        self.waiting: deque[bytes] = deque()
        self.faults: list[str] = []
        self.stopped = False
        self.dispatcher = Dispatcher(
            Scheduler(limits, EOG), EPOCH, len(self.workers), self._send, self._flush, self._on_fault
        )
        self._unsent: deque[bytes] = deque()

    def _send(self, data: bytes) -> None:
        assert not self.stopped, "sent after the pipeline failed"
        self.sent.append(data)
        self._unsent.append(data)

    async def _flush(self) -> None:
        for _ in range(self.rng.randint(0, 2)):  # a write may take a while
            await asyncio.sleep(0)
        while self._unsent:
            self.waiting.append(self._unsent.popleft())

    def _on_fault(self, message: str) -> None:
        self.faults.append(message)
        self.fail(message)

    def fail(self, message: str) -> None:
        self.stopped = True
        self.dispatcher.fail(message, RETRY_S)

    def result(self) -> bytes:
        """What the ring answers to its oldest frame."""
        data = self.waiting.popleft()
        for worker in self.workers:
            data = worker.run(data)
        if feed := self.workers[-1].take_feed():
            self.waiting.append(feed)
        return data

    async def run(self) -> None:
        while True:
            if self.waiting and self.rng.random() < 0.6:
                together = min(self.rng.randint(1, MAX_RESULTS), len(self.waiting))
                await self.dispatcher.on_frame(b"".join(self.result() for _ in range(together)))
            await asyncio.sleep(0)

    def idle(self) -> bool:
        scheduler = self.dispatcher.scheduler
        return scheduler.active == scheduler.queued == scheduler.in_flight == 0


class Queue:
    """A sink that is read."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[Token | DwarfStarError] = asyncio.Queue()

    def put(self, token: Token) -> None:
        self.items.put_nowait(token)

    def fail(self, error: DwarfStarError) -> None:
        self.items.put_nowait(error)


async def tokens_of(dispatcher: Dispatcher, wanted: Request) -> AsyncGenerator[Token, None]:
    """The tokens of a request; closing it cancels."""
    sink = Queue()
    generation = dispatcher.generate(wanted, sink)
    try:
        while True:
            item = await sink.items.get()
            if isinstance(item, DwarfStarError):
                raise item
            yield item
            if item.finish is not None:
                return
    finally:
        generation.cancel()


@asynccontextmanager
async def running(ring: Ring) -> AsyncIterator[Dispatcher]:
    task = asyncio.create_task(ring.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield ring.dispatcher
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until it holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - turns are waited for, not time
            await asyncio.sleep(0)


def request(prompt: list[int], limit: int | None = None) -> Request:
    return Request(tuple(prompt), Sampling(temperature=0.0), limit)


def prompt_of(rng: random.Random) -> list[int]:
    return [rng.randrange(97, 123) for _ in range(rng.randint(1, 30))]


def reference(prompt: list[int], limit: int | None) -> tuple[list[int], str]:
    room = CONTEXT - len(prompt)
    tokens = toy.expected(prompt, min(room, limit or room), LAYERS)
    for index, token in enumerate(tokens):
        if token in EOG:
            return tokens[: index + 1], "stop"
    return tokens, "length"


async def collect(dispatcher: Dispatcher, wanted: Request) -> list[Token]:
    return [token async for token in tokens_of(dispatcher, wanted)]


@pytest.mark.parametrize("seed", range(8))
async def test_many_requests_at_once_get_their_own_texts(seed: int) -> None:
    rng = random.Random(seed)
    ring = Ring(seed, slots=rng.randint(1, 5), rows=rng.randint(1, 12), in_flight=rng.randint(1, 6))

    async def client(dispatcher: Dispatcher) -> None:
        for _ in range(rng.randint(0, 40)):
            await asyncio.sleep(0)
        prompt, limit = prompt_of(rng), rng.choice([None, 1, 2, 9, 25])
        leaves_after = rng.choice([None, None, None, 0, 1, 5])
        text, finish = reference(prompt, limit)
        got: list[Token] = []
        stream = tokens_of(dispatcher, request(prompt, limit))
        async for token in stream:
            got.append(token)
            if leaves_after is not None and len(got) > leaves_after:
                await stream.aclose()
                break
        else:
            assert got[-1].finish == finish and len(got) == len(text)
        assert [token.id for token in got] == text[: len(got)]
        assert all(token.finish is None for token in got[:-1])

    async with running(ring) as dispatcher:
        await asyncio.gather(*(client(dispatcher) for _ in range(25)))
        await until(ring.idle)  # frames of those who left are still on their way
    assert not ring.faults


async def test_closing_the_stream_frees_the_slot_at_once() -> None:
    ring = Ring(slots=1)
    async with running(ring) as dispatcher:
        first = tokens_of(dispatcher, request([97, 98]))
        await anext(first)
        other = asyncio.create_task(collect(dispatcher, request([99, 100, 101], 9)))
        await until(lambda: dispatcher.scheduler.queued > 0)
        assert dispatcher.scheduler.active == 1
        await first.aclose()
        await asyncio.sleep(0)
        assert dispatcher.scheduler.queued == 0 and dispatcher.scheduler.active == 1
        assert [token.id for token in await other] == reference([99, 100, 101], 9)[0]
    assert dispatcher.scheduler.active == 0


async def test_an_answer_is_read_again_when_no_request_came_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwarfstar_engine.node.dispatcher.REST_S", 0.3)
    ring = Ring(slots=1, rows=256, context=1000)
    prompt = [97 + n % 25 for n in range(70)]
    async with running(ring) as dispatcher:
        for _ in range(2):  # the second comes at once, and nothing comes before it
            answer = await collect(dispatcher, request(prompt, 100))
            assert [frames.is_prompt(data) for data in ring.sent].count(True) == 1
            ring.sent.clear()
            prompt = [*prompt, *(token.id for token in answer), 100]
        await until(lambda: len(ring.sent) > 0 and ring.idle())
        assert all(frames.is_prompt(data) for data in ring.sent)
        rows = len(frames.decode(ring.sent[0]).slots)  # type: ignore[union-attr]
        assert rows >= WIDE
    assert not ring.faults


async def test_leaving_while_queued_costs_nothing() -> None:
    ring = Ring(slots=1)
    async with running(ring) as dispatcher:
        first = tokens_of(dispatcher, request([97, 98], 12))
        await anext(first)
        waiting = asyncio.create_task(collect(dispatcher, request([99])))
        await until(lambda: dispatcher.scheduler.queued > 0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert dispatcher.scheduler.queued == 0
        rest = [token.id async for token in first]
        assert rest == reference([97, 98], 12)[0][1:]


async def test_a_failure_ends_every_request_and_may_be_retried() -> None:
    ring = Ring(slots=2)
    async with running(ring) as dispatcher:
        streams = [tokens_of(dispatcher, request([97 + i])) for i in range(2)]
        for stream in streams:
            await anext(stream)
        queued = asyncio.create_task(collect(dispatcher, request([105])))
        await until(lambda: dispatcher.scheduler.queued > 0)
        ring.fail("node x was lost")
        ring.fail("again")  # only the first reason counts

        async def drain(stream: AsyncIterator[Token]) -> None:
            async for _ in stream:
                pass

        for work in (*map(drain, streams), queued):
            with pytest.raises(StageError, match="node x was lost") as ended:
                await work
            assert ended.value.retry_after_s == RETRY_S and ended.value.http_status == 503
        with pytest.raises(StageError, match="node x was lost"):
            await anext(tokens_of(dispatcher, request([97])))
        await until(lambda: not ring.waiting and not ring._unsent)  # results that were still on their way are ignored
    assert dispatcher.oldest_age_s(1e9) == 0.0


@pytest.mark.parametrize("seed", range(12))
async def test_streams_go_on_in_another_ring(seed: int) -> None:
    """A ring breaks at some moment; the next one carries its streams on, and nobody sees more than a pause."""
    rng = random.Random(seed)
    wanted = [request(prompt_of(rng), rng.choice([3, 20, None])) for _ in range(5)]
    first, second = Ring(seed), Ring(seed + 1, slots=2, in_flight=2)
    sinks = [Queue() for _ in wanted]
    async with running(first) as dispatcher:
        streams = [dispatcher.generate(one, sink) for one, sink in zip(wanted, sinks, strict=True)]
        streams[4].cancel()
        for _ in range(rng.randrange(120)):
            await asyncio.sleep(0)
    first.stopped = True
    left = dispatcher.suspend("a stage was lost", RETRY_S)
    assert dispatcher.suspend("again", RETRY_S) == [] and streams[4] not in left
    with pytest.raises(StageError, match="a stage was lost"):
        dispatcher.generate(wanted[0], Queue())
    async with running(second) as dispatcher:
        for stream in left:
            dispatcher.carry(stream)
        await until(second.idle)
    for one, sink, stream in zip(wanted[:4], sinks, streams, strict=False):
        tokens = [sink.items.get_nowait() for _ in range(sink.items.qsize())]
        text, finish = reference(list(one.prompt), one.max_tokens)
        assert [token.id for token in tokens if isinstance(token, Token)] == text == stream.answer
        assert isinstance(tokens[-1], Token) and tokens[-1].finish == finish
        stream.cancel()  # it is over: nothing happens


async def test_streams_that_wait_for_a_slot_can_be_taken_back() -> None:
    """And carried elsewhere; those that run stay."""
    first, second = Ring(0, slots=2), Ring(1)
    sinks = [Queue() for _ in range(5)]
    async with running(first) as dispatcher, running(second) as other:
        streams = [dispatcher.generate(request([97 + n], 5), sink) for n, sink in enumerate(sinks)]
        await until(lambda: dispatcher.scheduler.active == 2)
        recalled = dispatcher.recall(2)
        assert recalled == streams[3:] and dispatcher.scheduler.queued <= 1
        assert dispatcher.recall(9) in ([], streams[2:3]), "it may have begun"
        for stream in recalled:
            other.carry(stream)
        await until(second.idle)
        await until(first.idle)
    for number in (0, 1, 3, 4):
        tokens = [sinks[number].items.get_nowait() for _ in range(sinks[number].items.qsize())]
        assert [token.id for token in tokens if isinstance(token, Token)] == reference([97 + number], 5)[0]


async def test_a_fault_frame_is_told() -> None:
    ring = Ring()
    async with running(ring) as dispatcher:
        stream = tokens_of(dispatcher, request([97]))
        await anext(stream)
        await dispatcher.on_frame(frames.encode(FaultFrame(EPOCH + 1, 0, "kv_full", "of another epoch")))
        assert ring.faults == []
        await dispatcher.on_frame(frames.encode(FaultFrame(EPOCH, 0, "kv_full", "the cache is full")))
        assert ring.faults == ["the cache is full"]
        with pytest.raises(StageError, match="the cache is full"):
            while True:
                await anext(stream)


async def test_results_of_another_epoch_are_ignored() -> None:
    ring = Ring()
    async with running(ring) as dispatcher:
        await dispatcher.on_frame(frames.encode(ResultFrame(EPOCH - 1, 0, [], ())))
        tokens = await collect(dispatcher, request([97], 3))
    assert [token.id for token in tokens] == reference([97], 3)[0]


async def test_what_is_no_frame_is_an_error() -> None:
    with pytest.raises(FrameError):
        await Ring().dispatcher.on_frame(b"rubbish")


async def started(ring: Ring) -> tuple[asyncio.Task[list[Token]], bytes]:
    """A request whose first frame has been through the ring, and the answer to it, not delivered yet."""
    work = asyncio.create_task(collect(ring.dispatcher, request([97, 98], 2)))
    await until(lambda: bool(ring.waiting))
    return work, ring.result()


async def stopped(work: asyncio.Task[list[Token]]) -> None:
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def changed(data: bytes, number: int, rows: int) -> bytes:
    """A result with another frame number, and its rows repeated or dropped."""
    frame = frames.decode(data)
    assert isinstance(frame, ResultFrame) and len(frame.rows) == 1
    return frames.encode(ResultFrame(EPOCH, frame.number + number, frame.rows * rows, frame.timings))


@pytest.mark.parametrize(("number", "rows"), [(1, 1), (1000, 1), (0, 0), (0, 2)])
async def test_a_result_nobody_asked_for_is_an_error(number: int, rows: int) -> None:
    ring = Ring()
    work, result = await started(ring)
    with pytest.raises(FrameError, match="asked for no such thing"):
        await ring.dispatcher.on_frame(changed(result, number, rows))
    assert len(ring.sent) == 1 and not work.done()
    await stopped(work)


async def test_the_same_result_twice_is_an_error() -> None:
    ring = Ring()
    work, result = await started(ring)
    await ring.dispatcher.on_frame(result)
    with pytest.raises(FrameError, match="asked for no such thing"):
        await ring.dispatcher.on_frame(result)
    await stopped(work)


async def test_a_frame_that_is_no_answer_is_an_error() -> None:
    """The last stage sends its input back."""
    ring = Ring()
    work, _ = await started(ring)
    with pytest.raises(FrameError, match="no result"):
        await ring.dispatcher.on_frame(ring.sent[0])
    await stopped(work)


async def test_the_next_frame_leaves_before_the_token_is_delivered() -> None:
    """The ring must not wait for HTTP: while frames are on their way out, no request has been woken."""
    ring = Ring()
    work, result = await started(ring)
    gate = asyncio.Event()
    real = ring.dispatcher._flush

    async def slow() -> None:
        await gate.wait()
        await real()

    ring.dispatcher._flush = slow
    delivering = asyncio.create_task(ring.dispatcher.on_frame(result))
    await until(lambda: len(ring.sent) == 2)
    (stream,) = ring.dispatcher._streams.values()
    sink = stream.sink
    assert isinstance(sink, Queue) and sink.items.empty() and not delivering.done()
    gate.set()
    await delivering
    assert len(ring.waiting) == 1
    await ring.dispatcher.on_frame(ring.result())
    assert [token.id for token in await work] == reference([97, 98], 2)[0]


async def test_a_caller_that_is_cancelled_does_not_cancel_the_write() -> None:
    """A cancelled write would end the hop for all: frames are flushed apart from the request that caused them."""
    ring = Ring()
    gate, cancelled = asyncio.Event(), asyncio.Event()

    async def write() -> None:
        try:
            await gate.wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    ring.dispatcher._flush = write
    work = asyncio.create_task(collect(ring.dispatcher, request([97, 98], 2)))
    await until(lambda: bool(ring.dispatcher._flushes))
    writes = set(ring.dispatcher._flushes)
    await stopped(work)
    assert writes and not cancelled.is_set() and not any(write.done() for write in writes)
    gate.set()
    await until(lambda: not ring.dispatcher._flushes)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 7])
async def test_a_prompt_that_fills_the_context_is_refused(length: int) -> None:
    ring = Ring()
    with pytest.raises(ContextLengthError, match=f"{length} tokens .* by {length - CONTEXT + 1} tokens") as refused:
        await anext(tokens_of(ring.dispatcher, request([97] * length)))
    assert (refused.value.http_status, refused.value.code) == (400, "context_length_exceeded")
    assert ring.idle() and not ring.sent


async def test_the_longest_prompt_gets_one_token() -> None:
    ring = Ring()
    async with running(ring) as dispatcher:
        tokens = await collect(dispatcher, request([97] * (CONTEXT - 1)))
    assert len(tokens) == 1 and tokens[0].finish in ("length", "stop")


async def test_a_full_queue_refuses_and_the_others_go_on() -> None:
    ring = Ring(slots=1, queued=1)
    async with running(ring) as dispatcher:
        first = tokens_of(dispatcher, request([97], 5))
        await anext(first)
        second = asyncio.create_task(collect(dispatcher, request([98], 5)))
        await until(lambda: dispatcher.scheduler.queued > 0)
        with pytest.raises(Overloaded):
            await anext(tokens_of(dispatcher, request([99], 5)))
        assert len([token async for token in first]) == 4
        assert [token.id for token in await second] == reference([98], 5)[0]


async def test_a_full_queue_refuses_nobody_it_accepted_before() -> None:
    """A ring breaks under a full queue: those whose prompts were still read count as well in the next one."""
    ring, sinks = Ring(slots=1, queued=1), [Queue() for _ in range(2)]
    broken = Ring(slots=1, queued=1).dispatcher
    broken.generate(request([97], 5), sinks[0])
    assert broken._pump() and broken.scheduler.active == 1
    broken.generate(request([98], 5), sinks[1])
    streams = broken.suspend("a stage was lost", RETRY_S)
    streams.insert(1, Stream(request([99], 5), Queue(), 1))  # and one that came while there was no ring
    async with running(ring) as dispatcher:
        for stream in streams:
            dispatcher.carry(stream)
        await until(ring.idle)
    for sink, prompt in zip(sinks, ([97], [98]), strict=True):
        items = [sink.items.get_nowait() for _ in range(sink.items.qsize())]
        assert [item.id for item in items if isinstance(item, Token)] == reference(prompt, 5)[0]


async def test_a_stream_whose_client_left_between_two_rings_is_not_carried_on() -> None:
    ring, broken = Ring(), Ring().dispatcher
    stream = broken.generate(request([97], 5), Queue())
    assert broken.suspend("a stage was lost", RETRY_S) == [stream]
    stream.cancel()
    ring.dispatcher.carry(stream)
    assert ring.dispatcher.scheduler.queued == 0


async def test_seeds_are_fresh_unless_given() -> None:
    """Each request's sampler travels with its first rows, its seed decided."""
    ring = Ring()
    async with running(ring) as dispatcher:
        for seed in (None, None, 11):
            await collect(dispatcher, Request((97,), Sampling(seed=seed), 1))
    seeds = []
    for data in ring.sent:
        frame = frames.decode(data)
        assert isinstance(frame, StepFrame)
        seeds += [frames.SamplerSpec.decode(op.spec).seed for op in frame.ops if isinstance(op, frames.SetSampler)]
    assert len(seeds) == 3 and len(set(seeds)) == 3 and seeds[2] == 11


async def test_figures() -> None:
    ring = Ring()
    async with running(ring) as dispatcher:
        tokens = await collect(dispatcher, request([97, 98], 12))
        now = asyncio.get_running_loop().time()
        assert dispatcher.tok_s(now) == pytest.approx(len(tokens) / RATE_WINDOW_S)
        assert dispatcher.tok_s(now + 2 * RATE_WINDOW_S) == 0.0
        assert [stage.frames for stage in dispatcher.stages] == [len(tokens) - 1] * 3  # the prompt's frame is no decode
    assert dispatcher.oldest_age_s(now) == 0.0


async def test_a_stuck_frame_grows_old() -> None:
    ring = Ring()
    waiting = asyncio.create_task(collect(ring.dispatcher, request([97])))
    await until(lambda: bool(ring.sent))
    now = asyncio.get_running_loop().time()
    assert ring.dispatcher.oldest_age_s(now + 5) >= 5
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_stage_is_judged_by_rows_that_had_the_ring_to_themselves() -> None:
    """Beside others a stage may compute when another does, and on the same cores."""
    ring = Ring(context=400)
    async with running(ring) as dispatcher:
        stages = dispatcher.stages
        while stages[0].frames <= 2 * ALONE_FRAMES:
            same = request(prompt_of(ring.rng), 40)
            await asyncio.gather(*(collect(dispatcher, same) for _ in range(3)))
        assert all(stage.alone_frames < stage.frames / 2 for stage in stages)
        while not stages[0].alone_ms:
            await collect(dispatcher, request(prompt_of(ring.rng), 40))
        assert all(stage.alone_ms > 0 and stage.alone_frames >= ALONE_FRAMES for stage in stages)
