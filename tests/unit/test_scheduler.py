"""The scheduler against a simulated ring: whatever is submitted, cancelled and broken, the texts stay right."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwarfstar_engine.batch.scheduler import Limits, Output, Scheduler, Step
from dwarfstar_engine.errors import Overloaded
from dwarfstar_engine.serving import Request, Sampling, Token
from dwarfstar_engine.stage import toy

LAYERS = 3
EOG = frozenset({122})  # 'z'


class Ring:
    """Runs steps in order on a toy model, as the stages would; results are handed out when asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self._slice = scheduler, toy.ToySlice(0, LAYERS)
        self.flights: deque[tuple[int, list[Token]]] = deque()

    def send(self, step: Step) -> None:
        for slot in step.free:
            self._slice.trim(slot, 0)
        tokens = []
        for slot, position, token, want in zip(step.slots, step.positions, step.tokens, step.wants, strict=True):
            row = self._slice.step(toy.to_row(toy.embed(token))[None, :], [position], [slot])
            if want:
                tokens.append(Token(toy.draw(toy.from_row(row[0]))))
        self.flights.append((step.number, tokens))

    def pump(self) -> None:
        while (step := self.scheduler.schedule()) is not None:
            assert len(step.slots) <= self.scheduler.limits.rows
            self.send(step)
        assert self.scheduler.in_flight <= self.scheduler.limits.in_flight

    def land(self) -> list[Output]:
        return self.scheduler.complete(*self.flights.popleft())


def reference(prompt: list[int], limit: int) -> list[int]:
    tokens = toy.expected(prompt, limit, LAYERS)
    for index, token in enumerate(tokens):
        if token in EOG:
            return tokens[: index + 1]
    return tokens


@given(seed=st.integers(0, 2**32), slots=st.integers(1, 4), rows=st.integers(1, 9), decode=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_texts_are_those_of_requests_run_alone(seed: int, slots: int, rows: int, decode: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(Limits(slots, 40, rows, in_flight=rng.randint(1, 5), decode_rows=min(decode, rows)), EOG)
    ring = Ring(scheduler)
    requests = {
        number: Request(
            tuple(rng.randrange(97, 123) for _ in range(rng.randint(1, 20))), Sampling(), rng.choice([1, 2, 5, 30])
        )
        for number in range(rng.randint(1, 12))
    }
    texts: dict[int, list[int]] = {number: [] for number in requests}
    finished: dict[int, str] = {}
    cancelled: set[int] = set()
    waiting = list(requests)
    for _ in range(2000):
        if waiting and rng.random() < 0.5:
            scheduler.submit(waiting[0], requests[waiting.pop(0)])
        if rng.random() < 0.03 and (gone := [n for n in requests if n not in waiting and n not in finished]):
            cancelled.add(victim := rng.choice(gone))
            scheduler.cancel(victim)
        ring.pump()
        if ring.flights and rng.random() < 0.7:
            for output in ring.land():
                assert output.sequence not in finished and output.sequence not in cancelled
                texts[output.sequence].append(output.token.id)
                if output.token.finish:
                    finished[output.sequence] = output.token.finish
        if not waiting and not ring.flights and not scheduler.active and not scheduler.queued:
            break
    for number, request in requests.items():
        limit = min(request.max_tokens or 40, 40 - len(request.prompt))
        want = reference(list(request.prompt), limit)
        if number in cancelled:
            assert texts[number] == want[: len(texts[number])]
        else:
            assert texts[number] == want
            assert finished[number] == ("stop" if want[-1] in EOG else "length")
    assert scheduler.active == scheduler.queued == scheduler.in_flight == 0


def test_prompt_chunks_follow_each_other_without_waiting() -> None:
    scheduler = Scheduler(Limits(slots=1, context=100, rows=4, in_flight=3), EOG)
    scheduler.submit(1, Request(tuple(range(97, 107)), Sampling(), 1))
    steps = [scheduler.schedule() for _ in range(4)]
    assert [len(step.slots) if step else None for step in steps] == [4, 4, 2, None]
    assert [step.sequences for step in steps if step] == [(), (), (1,)]


def test_decode_goes_on_between_the_chunks_of_a_long_prompt() -> None:
    scheduler = Scheduler(Limits(slots=2, context=100, rows=4, in_flight=1), EOG)
    ring = Ring(scheduler)
    scheduler.submit(1, Request((97,), Sampling(), 20))
    ring.pump()
    ring.land()
    scheduler.submit(2, Request(tuple([98] * 40), Sampling(), 1))
    kinds = []
    for _ in range(6):
        ring.pump()
        kinds.append(scheduler.in_flight and len(ring.flights[0][1]))
        ring.land()
    assert kinds == [1, 0, 1, 0, 1, 0]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = Scheduler(Limits(slots=1, context=10, rows=4, in_flight=1, queued=2), EOG)
    scheduler.submit(1, Request((97,), Sampling()))
    scheduler.schedule()
    for number in (2, 3):
        scheduler.submit(number, Request((97,), Sampling()))
    with pytest.raises(Overloaded) as refused:
        scheduler.submit(4, Request((97,), Sampling()))
    assert refused.value.retry_after_s and refused.value.http_status == 429
