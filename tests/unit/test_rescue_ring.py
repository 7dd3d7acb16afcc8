"""Losses in a simulated ring of toy workers: real frames, workers, records and outlets, no sockets.

Each stage has a queue for frames of prompts and one for steps, which overtake them, as in a stage process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, cast

import pytest

from dwarfstar_engine.batch import restore
from dwarfstar_engine.batch.restore import NO_CELLS, Cells, kept
from dwarfstar_engine.batch.scheduler import Limits, Scheduler
from dwarfstar_engine.errors import DwarfStarError, FrameError
from dwarfstar_engine.native import WireType
from dwarfstar_engine.node.dispatcher import Dispatcher
from dwarfstar_engine.node.streams import Stream
from dwarfstar_engine.serving import Request, Sampling, Token
from dwarfstar_engine.stage import toy
from dwarfstar_engine.stage.outlet import Outlet
from dwarfstar_engine.stage.record import Record
from dwarfstar_engine.stage.worker import ToyBackend, Worker
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.ring import RingSender

LAYERS, CONTEXT, SLOTS = 6, 90, 4
CUTS = (0, 2, 3, 5, LAYERS)
STAGES = len(CUTS) - 1
TURNS = 30_000  # of one test; it needs some thousands
EOG = frozenset({122})


class Sink:
    def __init__(self) -> None:
        self.tokens: list[Token] = []

    def put(self, token: Token) -> None:
        self.tokens.append(token)

    def fail(self, error: DwarfStarError) -> None:
        raise AssertionError(error)

    @property
    def over(self) -> bool:
        return bool(self.tokens) and self.tokens[-1].finish is not None


class Hop:
    """Stands for a RingSender: what is put into it may be late, and keeps its order."""

    def __init__(self, ring: Ring, to: int) -> None:
        self._ring, self._to = ring, to
        self.closed = False

    def send(self, data: bytes) -> None:
        if not self.closed:
            self._ring.deliver(self._to, data)

    async def put(self, data: bytes) -> None:
        for _ in range(self._ring.rng.randint(0, 3)):
            await asyncio.sleep(0)
        self.send(data)

    async def close(self) -> None:
        self.closed = True


class Stage:
    def __init__(self, index: int, budget: int) -> None:
        self.layers = CUTS[index], CUTS[index + 1]
        self.worker = Worker(ToyBackend(*self.layers, LAYERS), SLOTS, WireType.F32, EOG)
        self.record = Record(budget) if index < STAGES - 1 and budget else None
        self.rows = 0
        step = self.worker.backend.step

        def counted(rows: Any, *more: Any, **named: Any) -> Any:
            self.rows += len(rows)
            return step(rows, *more, **named)

        self.worker.backend.step = counted  # type: ignore[method-assign]
        self.queues: dict[bool, deque[bytes]] = {True: deque(), False: deque()}
        self.outlet: Outlet

    def cells(self) -> dict[int, Cells]:
        recorded = self.record.rows() if self.record is not None else {}
        return {slot: Cells(*held, recorded.get(slot, 0)) for slot, held in self.worker.held().items()}


class Ring:
    """The stages, and what the coordinator does about them."""

    def __init__(self, seed: int, *, rounds: int = 0, chunk: int = 8, budget: int = 1 << 20) -> None:
        self.rng, self.budget = random.Random(seed), budget
        self.limits = Limits(SLOTS, CONTEXT, STAGES, chunk=chunk, rounds=rounds)
        self.stages = [Stage(index, budget) for index in range(STAGES)]
        self.epoch = 0
        self.results: deque[bytes] = deque()
        self.streams: list[Stream] = []
        self.faults: list[str] = []
        self.whole = 0  # streams that went through all stages again
        self._connect()

    def _connect(self) -> None:
        self.epoch += 1
        for index, stage in enumerate(self.stages):
            hop = cast(RingSender, Hop(self, index + 1))
            stage.outlet = Outlet(hop, stage.record, self.epoch, lambda task: None)
        scheduler = Scheduler(self.limits, EOG)
        self.dispatcher = Dispatcher(scheduler, self.epoch, STAGES, self._send, self._flush, self.faults.append)

    def _send(self, data: bytes) -> None:
        self.deliver(0, data)

    async def _flush(self) -> None: ...

    def deliver(self, index: int, data: bytes) -> None:
        if index == STAGES:
            self.results.append(data)
        else:
            self.stages[index].queues[frames.is_prompt(data)].append(data)

    def ask(self, prompt: list[int], limit: int) -> Sink:
        sink = Sink()
        self.streams.append(self.dispatcher.generate(Request(tuple(prompt), Sampling(), limit), sink))
        return sink

    async def turn(self) -> None:
        await asyncio.sleep(0)
        ready = [(stage, prompt) for stage in self.stages for prompt in (True, False) if stage.queues[prompt]]
        chosen = self.rng.randrange(len(ready) + bool(self.results)) if ready or self.results else -1
        if chosen == len(ready):
            await self.dispatcher.on_frame(self.results.popleft())
        elif chosen >= 0:
            stage, prompt = ready[chosen]
            data = stage.queues[prompt].popleft()
            out = stage.worker.run(data)
            asked = stage.worker.take_asked(prompt)
            if feed := stage.worker.take_feed():
                stage.outlet.pass_on_later(out)
                self.deliver(0, feed)
            else:
                stage.outlet.pass_on(data, out, asked)

    async def turns(self, count: int) -> None:
        for _ in range(count):
            await self.turn()

    async def until(self, look: Callable[[], bool]) -> None:
        for _ in range(TURNS):
            if look() or self.faults:
                break
            await self.turn()
        assert not self.faults
        assert look()

    async def said(self, sinks: Collection[Sink], count: int) -> None:
        await self.until(lambda: min(len(sink.tokens) for sink in sinks) >= count)

    async def finish(self, sinks: Collection[Sink]) -> None:
        await self.until(lambda: all(sink.over for sink in sinks))

    async def lose(self, lost: Collection[int], moved: float = 0.0) -> None:
        """These stages are other processes now, and all hops are new. moved: the share of streams whose cells they take
        from the old ones."""
        carried = self.dispatcher.suspend("lost", 1.0)
        for index, stage in enumerate(self.stages):
            await stage.outlet.close()
            stage.queues = {True: deque(), False: deque()}
            if index in lost:
                new = self.stages[index] = Stage(index, self.budget)
                self._carry(stage, new, [one for one in carried if self.rng.random() < moved])
        self.results.clear()
        self._connect()
        for stream in carried:
            cells = [stage.cells().get(stream.slot, NO_CELLS) for stage in self.stages]
            place = kept(stream.slot, stream.through, cells) if stream.slot >= 0 else None
            self.whole += place is None
            self.dispatcher.carry(stream, place)

    @staticmethod
    def _carry(old: Stage, new: Stage, streams: Collection[Stream]) -> None:
        for stream in streams:
            if stream.slot >= 0 and stream.through:
                with contextlib.suppress(FrameError):  # it was being brought back, and does not have so many
                    data, floor = old.worker.backend.give(stream.slot, stream.through, old.layers)
                    new.worker.backend.take(stream.slot, stream.through, floor, {old.layers: data})


def text(prompt: list[int], limit: int) -> list[int]:
    tokens = toy.expected(prompt, min(limit, CONTEXT - len(prompt)), LAYERS)
    return next((tokens[: n + 1] for n, token in enumerate(tokens) if token in EOG), tokens)


def prompts(rng: random.Random, count: int) -> list[list[int]]:
    shared = [rng.randrange(97, 122) for _ in range(40)]  # so that slots are copied
    return [
        [*shared[: rng.choice([0, 0, 40])], *(rng.randrange(97, 122) for _ in range(rng.randint(1, 30)))]
        for _ in range(count)
    ]


def long_texts(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts whose answers do not end soon."""
    return [prompt for prompt in prompts(rng, 40 * count) if len(text(prompt, 40)) > 30][:count]


@pytest.mark.parametrize("seed", range(40))
async def test_texts_outlive_any_losses(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once, during a replay, and of links only; with records that are too small, or not there."""
    rng = random.Random(seed)
    monkeypatch.setattr(restore, "RESENT_ROWS", rng.choice([7, 16, 256]))
    monkeypatch.setattr(restore, "RESENT_STEPS", rng.choice([3, 16]))
    budget = rng.choice([1 << 20, 1 << 20, 1200, 0])
    ring = Ring(seed, rounds=seed % 3 * 4, chunk=rng.choice([1, 8, 16]), budget=budget)
    asked = [(prompt, rng.choice([1, 9, 25, 40])) for prompt in prompts(rng, 9)]
    sinks = []
    for index, (prompt, limit) in enumerate(asked):
        sinks.append(ring.ask(prompt, limit))
        if index >= 4:
            await ring.turns(rng.randint(0, 200))
            await ring.lose(rng.sample(range(STAGES), rng.choice([0, 1, 1, 1, 2, 3])), rng.choice([0.0, 0.5, 1.0]))
            if rng.random() < 0.4:
                ring.streams[rng.randrange(index)].cancel()
    left = [stream.left for stream in ring.streams]
    await ring.finish([sink for sink, gone in zip(sinks, left, strict=True) if not gone])
    for (prompt, limit), sink, gone in zip(asked, sinks, left, strict=True):
        want = text(prompt, limit)
        assert [token.id for token in sink.tokens] == (want[: len(sink.tokens)] if gone else want)


@pytest.mark.parametrize("rounds", [0, 8])
@pytest.mark.parametrize("lost", [(), (0,), (1,), (3,), (1, 2), (0, 3), (0, 1), (2, 3)])
async def test_only_lost_layers_compute_again(lost: tuple[int, ...], rounds: int) -> None:
    ring = Ring(5, rounds=rounds)
    asked = long_texts(random.Random(1), SLOTS)
    sinks = [ring.ask(prompt, 40) for prompt in asked]
    await ring.said(sinks, 6)
    before = sum(len(sink.tokens) for sink in sinks)
    for stage in ring.stages:
        stage.rows = 0
    await ring.lose(lost)
    await ring.finish(sinks)
    assert [[token.id for token in sink.tokens] for sink in sinks] == [text(prompt, 40) for prompt in asked]
    new = sum(len(sink.tokens) for sink in sinks) - before
    through = sum(map(len, asked)) + before - SLOTS
    assert [stage.rows for stage in ring.stages] == [new + (index in lost) * through for index in range(STAGES)]
    assert ring.whole == 0


@pytest.mark.parametrize("rounds", [0, 8])
@pytest.mark.parametrize("moved", [(0,), (1,), (3,), (1, 2), (0, 1, 2, 3)])
async def test_layers_whose_cells_move_compute_nothing_again(moved: tuple[int, ...], rounds: int) -> None:
    ring = Ring(5, rounds=rounds)
    asked = long_texts(random.Random(1), SLOTS)
    sinks = [ring.ask(prompt, 40) for prompt in asked]
    await ring.said(sinks, 6)
    before = sum(len(sink.tokens) for sink in sinks)
    for stage in ring.stages:
        stage.rows = 0
    await ring.lose(moved, 1.0)
    await ring.finish(sinks)
    assert [[token.id for token in sink.tokens] for sink in sinks] == [text(prompt, 40) for prompt in asked]
    assert [stage.rows for stage in ring.stages] == [sum(len(sink.tokens) for sink in sinks) - before] * STAGES


@pytest.mark.parametrize("lost", [(), (0,), (1,), (3,), (1, 2)])
async def test_of_a_prompt_that_was_being_read_only_lost_layers_read_again(lost: tuple[int, ...]) -> None:
    ring = Ring(5)
    prompt = max(long_texts(random.Random(4), 9), key=len)
    sink = ring.ask(prompt, 20)
    scheduler = ring.dispatcher.scheduler
    await ring.until(lambda: any(through >= 24 for _, through in scheduler.settled().values()))
    ((_, through),) = scheduler.settled().values()
    assert not sink.tokens
    for stage in ring.stages:
        stage.rows = 0
    await ring.lose(lost)
    await ring.finish([sink])
    assert [token.id for token in sink.tokens] == text(prompt, 20)
    new = len(prompt) - through + len(sink.tokens) - 1
    assert [stage.rows for stage in ring.stages] == [new + (index in lost) * through for index in range(STAGES)]


async def test_a_stage_whose_record_is_too_small_computes_again_what_the_next_one_lacks() -> None:
    ring = Ring(5)
    (prompt,) = long_texts(random.Random(2), 1)
    sink = ring.ask(prompt, 30)
    await ring.said([sink], 6)
    record = ring.stages[1].record
    assert record is not None
    record.clear()
    for stage in ring.stages:
        stage.rows = 0
    await ring.lose([2])
    await ring.finish([sink])
    assert [token.id for token in sink.tokens] == text(prompt, 30)
    new, through = len(sink.tokens) - 6, len(prompt) + 5
    assert [stage.rows for stage in ring.stages] == [new, new + through, new + through, new]


async def test_a_stream_that_leaves_while_it_is_brought_back_frees_its_slot() -> None:
    ring = Ring(3)
    sinks = [ring.ask(prompt, 60) for prompt in long_texts(random.Random(3), SLOTS)]
    await ring.said(sinks, 25)
    await ring.lose([2])
    await ring.turns(3)
    for stream in ring.streams:
        stream.cancel()
    later = [ring.ask([100 + n, 97], 20) for n in range(SLOTS)]
    await ring.finish(later)
    assert [[token.id for token in sink.tokens] for sink in later] == [text([100 + n, 97], 20) for n in range(SLOTS)]
