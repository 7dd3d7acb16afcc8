"""The scheduler against a simulated ring: whatever is submitted, cancelled and broken, the texts stay right."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwarfstar_engine.batch import scheduler as scheduler_module
from dwarfstar_engine.batch.chunks import ChunkCosts
from dwarfstar_engine.batch.scheduler import GUESSING, TURN, Limits, Output, Scheduler, Step
from dwarfstar_engine.batch.speculate import Mode, Speculation
from dwarfstar_engine.errors import Overloaded
from dwarfstar_engine.serving import Request, Sampling, Token
from dwarfstar_engine.stage import toy

LAYERS = 3
EOG = frozenset({122})  # 'z'


class Stage:
    """A stage as far as order goes: steps overtake prompts, at any time, and nothing else overtakes anything."""

    def __init__(self, a: int, b: int) -> None:
        self._slice = toy.ToySlice(a, b)
        self.first, self.last = a == 0, b == LAYERS
        self.queues: tuple[deque[tuple[int, Step, np.ndarray]], ...] = (deque(), deque())
        self.drawn: dict[int, tuple[int, int]] = {}
        self.halted: set[int] = set()
        self.arrivals = 0

    def put(self, step: Step, rows: np.ndarray) -> None:
        self.arrivals += 1
        self.queues[step.prompt].append((self.arrivals, step, rows))

    def may(self, prompt: bool) -> bool:
        mine, steps = self.queues[prompt], self.queues[False]
        return bool(mine) and (not prompt or not steps or steps[0][0] > mine[0][0])

    def run(self, prompt: bool) -> tuple[Step, np.ndarray, list[tuple[int, Token]]]:
        _, step, rows = self.queues[prompt].popleft()
        if step.copy is not None:
            self._slice.copy(*step.copy)
        self.halted |= set(step.halts)
        self.halted -= {slot for slot, _ in step.samplers}
        out, answers = np.empty_like(rows), []
        for index, (slot, position, want) in enumerate(zip(step.slots, step.positions, step.wants, strict=True)):
            out[index] = self._slice.step(rows[index : index + 1], position, slot)[0]
            if slot in self.halted:
                continue
            if self.last and want and (want == 1 or self.drawn.get(slot) == (position, step.tokens[index])):
                token = toy.draw(toy.from_row(out[index]))
                self.drawn[slot] = (position + 1, token)
                answers.append((slot, Token(token)))
        return step, out, answers


class Ring:
    """Stages that serve their frames in random order; results are handed out when asked for."""

    def __init__(self, scheduler: Scheduler, rng: random.Random | None = None) -> None:
        self.scheduler = scheduler
        self.rng = rng or random.Random(0)
        cuts = [0, *range(1, scheduler.limits.stages), LAYERS]
        self.stages = [Stage(a, b) for a, b in pairwise(cuts)]
        self.steps: list[Step] = []
        self.answers: deque[tuple[int, list[tuple[int, Token]], bool]] = deque()

    def pump(self) -> None:
        while (step := self.scheduler.schedule() or self.scheduler.reread()) is not None:
            self.steps.append(step)
            assert step.halts or step.slots
            assert len(step.slots) == len(step.positions) == len(step.tokens) == len(step.wants)
            assert list(step.slots) == sorted(step.slots)
            self.enter(step)

    def enter(self, step: Step) -> None:
        rows = [toy.to_row(toy.embed(token)) for token in step.tokens]
        self.stages[0].put(step, np.stack(rows) if rows else np.empty((0, toy.WIDTH), np.float32))

    def turn(self) -> bool:
        """One frame through one stage; whether there was any."""
        ready = [(index, kind) for index, stage in enumerate(self.stages) for kind in (False, True) if stage.may(kind)]
        if not ready:
            return False
        index, kind = self.rng.choice(ready)
        step, rows, answers = self.stages[index].run(kind)
        if index + 1 < len(self.stages):
            self.stages[index + 1].put(step, rows)
        else:
            going = [(slot, token.id) for slot, token in answers if step.rounds and token.id not in self.scheduler._eog]
            self.answers.append((step.number, answers, bool(going)))
            if going:
                position = dict(zip(step.slots, step.positions, strict=True))
                slots, tokens = zip(*going, strict=True)
                positions = tuple(position[slot] + 1 for slot in slots)
                wants, rounds = (1,) * len(going), step.rounds - 1
                self.enter(replace(step, slots=slots, positions=positions, tokens=tokens, wants=wants, rounds=rounds))
        return True

    def land(self) -> list[Output]:
        return self.scheduler.complete(*self.answers.popleft())

    def finish(self) -> dict[int, list[int]]:
        """Run until nothing is left; the texts."""
        texts: dict[int, list[int]] = {}
        while True:
            self.pump()
            if self.answers:
                for output in self.land():
                    texts.setdefault(output.sequence, []).append(output.token.id)
            elif not self.turn():
                return texts


def reference(prompt: list[int], limit: int) -> list[int]:
    tokens = toy.expected(prompt, limit, LAYERS)
    for index, token in enumerate(tokens):
        if token in EOG:
            return tokens[: index + 1]
    return tokens


def request(prompt: Sequence[int], limit: int | None = None, priority: int = 0) -> Request:
    return Request(tuple(prompt), Sampling(), limit, priority=priority)


@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 4),
    stages=st.integers(1, 3),
    chunk=st.integers(1, 9),
    lane_rows=st.integers(1, 3),
    rounds=st.sampled_from([0, 0, 1, 3, 32]),
)
@settings(max_examples=200, deadline=None)
def test_texts_are_those_of_requests_run_alone(
    seed: int, slots: int, stages: int, chunk: int, lane_rows: int, rounds: int
) -> None:
    """Prompts begin alike, so that slots are reused and copied; frames overtake each other as stages let them."""
    rng = random.Random(seed)
    scheduler = Scheduler(Limits(slots, 40, stages, chunk=chunk, lane_rows=lane_rows, rounds=rounds), EOG)
    ring = Ring(scheduler, rng)
    begins = [[rng.randrange(97, 123) for _ in range(rng.randint(0, 14))] for _ in range(2)]
    requests = {
        number: request(
            rng.choice(begins) + [rng.randrange(97, 123) for _ in range(rng.randint(1, 6))],
            rng.choice([1, 2, 5, 30]),
            rng.choice([0, 0, 5]),
        )
        for number in range(rng.randint(1, 12))
    }
    texts: dict[int, list[int]] = {number: [] for number in requests}
    finished: dict[int, str] = {}
    cancelled: set[int] = set()
    waiting = list(requests)
    for _ in range(20000):
        if waiting and rng.random() < 0.3:
            scheduler.submit(waiting[0], requests[waiting.pop(0)])
        if rng.random() < 0.01 and (gone := [n for n in requests if n not in waiting and n not in finished]):
            cancelled.add(victim := rng.choice(gone))
            scheduler.cancel(victim)
        ring.pump()
        assert scheduler.in_flight <= 2 * scheduler.limits.lanes + scheduler.limits.slots
        ring.turn()
        if ring.answers and rng.random() < 0.7:
            for output in ring.land():
                assert output.sequence not in finished and output.sequence not in cancelled
                texts[output.sequence].append(output.token.id)
                if output.token.finish:
                    finished[output.sequence] = output.token.finish
        if not waiting and not scheduler.in_flight and not scheduler.active and not scheduler.queued:
            break
    for number, wanted in requests.items():
        limit = min(wanted.max_tokens or 40, 40 - len(wanted.prompt))
        want = reference(list(wanted.prompt), limit)
        if number in cancelled:
            assert texts[number] == want[: len(texts[number])]
        else:
            assert texts[number] == want
            assert finished[number] == ("stop" if want[-1] in EOG else "length")
    assert scheduler.active == scheduler.queued == scheduler.in_flight == 0
    assert scheduler._prompts == scheduler._steps == 0


class Linear:
    """Costs of a CPU: rows of a frame cost one like the other."""

    def cost(self, rows: int) -> float:
        return float(rows)

    def latency(self, rows: int) -> float:
        return 3.0 * rows + 0.5

    saved = 0.0


class Oracle:
    """Guesses that are right with some probability."""

    rng = random.Random(0)
    right = 0.7

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = list(tokens)

    def append(self, token: int) -> None:
        self._tokens.append(token)

    def propose(self, limit: int) -> list[int]:
        after = toy.expected(self._tokens, limit, LAYERS)
        return [token if self.rng.random() < self.right else 97 + self.rng.randrange(26) for token in after]


@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(1, 3),
    sequences=st.integers(1, 4),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    mode=st.sampled_from(["auto", "on"]),
    rounds=st.sampled_from([0, 3, 32]),
)
@settings(max_examples=160, deadline=None)
def test_guesses_never_change_a_text(
    seed: int, stages: int, sequences: int, right: float, mode: Mode, rounds: int
) -> None:
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "Lookup", Oracle)
        patch.setattr(Oracle, "rng", rng)
        patch.setattr(Oracle, "right", right)
        limits = Limits(2, 60, stages, chunk=7, rounds=rounds, drafts=rng.random() < 0.5)
        scheduler = Scheduler(limits, EOG, Speculation(mode, Linear()))
        ring = Ring(scheduler, rng)
        prompts = {n: [rng.randrange(97, 123) for _ in range(rng.randint(1, 20))] for n in range(sequences)}
        most = {n: rng.choice([1, 2, 9, 30]) for n in prompts}
        for number, prompt in prompts.items():
            scheduler.submit(number, request(prompt, most[number]))
        texts = ring.finish()
    assert texts == {n: reference(prompt, most[n]) for n, prompt in prompts.items()}
    assert scheduler.active == scheduler.in_flight == scheduler._prompts == scheduler._steps == 0


def test_guesses_wait_for_the_first_token_also_behind_an_answer_that_is_read_again() -> None:
    """Steps overtake prompts: a guess behind a prompt's last row would find its slot empty."""
    scheduler = Scheduler(Limits(4, 4096, 3, chunk=256), frozenset(), Speculation("on", Linear()))
    ring = Ring(scheduler)
    prompts = [[97 + i % 5 for i in range(length)] for length in (35, 63, 63, 63)]
    for number, prompt in enumerate(prompts):
        scheduler.submit(number, request(prompt, 12))
        assert ring.finish()[number] == toy.expected(prompt, 12, LAYERS)
    assert any(step.prompt and not any(step.wants) for step in ring.steps)


def test_a_text_that_never_repeats_is_looked_at_less_and_less() -> None:
    limits = Limits(1, 2000, 2, chunk=50, rounds=32)
    scheduler = Scheduler(limits, frozenset(), Speculation("auto", Linear()))
    ring = Ring(scheduler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "Lookup", Oracle)
        patch.setattr(Oracle, "propose", lambda self, limit: [])
        scheduler.submit(1, request([97], 400))
        ring.finish()
    rounds = [step.rounds for step in ring.steps if not step.prompt]
    assert rounds[0] == GUESSING and rounds == sorted(rounds[:-1]) + rounds[-1:] and rounds[-2] >= 20


def test_what_a_draft_model_offers_is_sent_as_guesses() -> None:
    scheduler = Scheduler(Limits(1, 100, 2, chunk=50), frozenset(), Speculation("on", Linear()))
    ring = Ring(scheduler)
    prompt = [97, 98]
    scheduler.submit(1, request(prompt, 40))
    for _ in range(1000):
        ring.pump()
        for number, text in scheduler.undrafted():
            scheduler.offer(number, len(text), toy.expected(text, 8, LAYERS))
        ring.pump()
        if ring.answers:
            ring.land()
        elif not ring.turn():
            break
    assert sum(step.wants.count(2) for step in ring.steps) > 20  # the text itself has nothing to copy from
    assert sum(step.wants.count(1) for step in ring.steps) < 20


def test_right_guesses_save_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "Lookup", Oracle)
    monkeypatch.setattr(Oracle, "right", 1.0)
    scheduler = Scheduler(Limits(1, 100, 2, chunk=50), frozenset(), Speculation("auto", Linear()))
    ring = Ring(scheduler)
    scheduler.submit(1, request([97, 98], 60))
    texts = ring.finish()
    assert texts[1] == toy.expected([97, 98], 60, LAYERS)
    drawn = sum(step.wants.count(1) for step in ring.steps)
    assert drawn < 30  # the other tokens came from guesses


def test_steps_go_round_by_themselves() -> None:
    scheduler = Scheduler(Limits(slots=2, context=100, stages=2, chunk=50, rounds=32), frozenset())
    ring = Ring(scheduler)
    scheduler.submit(1, request([97, 98], 60))
    assert ring.finish()[1] == toy.expected([97, 98], 60, LAYERS)
    assert [step.rounds for step in ring.steps] == [0, 32, 25]  # the prompt; then never more than are wanted


def test_what_is_cancelled_while_it_goes_by_itself_is_halted_and_its_slot_then_free() -> None:
    scheduler = Scheduler(Limits(slots=1, context=100, stages=2, chunk=50, rounds=32), frozenset())
    ring = Ring(scheduler)
    scheduler.submit(1, request([97, 98], 60))
    while not ring.answers or not ring.land():
        ring.pump()
        ring.turn()
    ring.pump()  # it goes now
    scheduler.submit(2, request([97, 99], 5))
    scheduler.cancel(1)
    assert (scheduler.active, scheduler.queued) == (0, 1)
    before = len(ring.steps)
    assert ring.finish() == {2: toy.expected([97, 99], 5, LAYERS)}
    halt, *rest = ring.steps[before:]
    assert halt.halts == (0,) and not halt.slots and rest[0].prompt
    assert sum(bool(step.halts) for step in ring.steps) == 1


def test_a_newcomer_does_not_wait_for_lanes_that_go_by_themselves_and_is_dealt_in_when_they_end() -> None:
    scheduler = Scheduler(Limits(slots=8, context=200, stages=2, chunk=50, rounds=16), frozenset())
    ring = Ring(scheduler)
    for number in range(5):
        scheduler.submit(number, request([97, 98 + number], 100))
    for _ in range(40):
        ring.pump()
        ring.turn()
        if ring.answers:
            ring.land()
    for number in range(5, 8):
        scheduler.submit(number, request([98, 97 + number], 100))
    texts = ring.finish()
    assert set(texts) == set(range(8))
    lanes = [len(step.slots) for step in ring.steps if not step.prompt and len(step.slots)]
    assert lanes.count(3) > 3 and lanes.count(2) > 1  # 3, 3, 2


@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(1, 3),
    sequences=st.integers(1, 5),
    rounds=st.sampled_from([0, 4, 32]),
    mode=st.sampled_from(["auto", "off"]),
)
@settings(max_examples=150, deadline=None)
def test_texts_go_on_in_another_pipeline(seed: int, stages: int, sequences: int, rounds: int, mode: Mode) -> None:
    """The pipeline breaks at any moment, twice; a new one, of other stages, is given what was said so far."""
    rng = random.Random(seed)
    requests = {
        number: request([rng.randrange(97, 123) for _ in range(rng.randint(1, 20))], rng.choice([1, 7, 30]))
        for number in range(sequences)
    }
    texts: dict[int, list[int]] = {number: [] for number in requests}
    finished: set[int] = set()
    for attempt in range(3):
        limits = Limits(2, 60, 1 + (stages + attempt) % 3, chunk=7, rounds=rounds)
        scheduler = Scheduler(limits, EOG, Speculation("auto", Linear()) if mode == "auto" else None)
        ring = Ring(scheduler, rng)
        for number in requests.keys() - finished:
            scheduler.submit(number, requests[number], texts[number])
        breaks_after = rng.randrange(200) if attempt < 2 else 10**6
        for _ in range(breaks_after):
            ring.pump()
            if not ring.turn() and not ring.answers:
                break
            while ring.answers:
                for output in ring.land():
                    texts[output.sequence].append(output.token.id)
                    finished |= {output.sequence} if output.token.finish else set()
    assert texts == {n: reference(list(r.prompt), r.max_tokens or 0) for n, r in requests.items()}
    assert scheduler.active == scheduler.in_flight == scheduler._prompts == scheduler._steps == 0


def test_an_answer_is_replayed_by_steps_behind_its_prompt() -> None:
    scheduler = Scheduler(Limits(slots=1, context=100, stages=2, chunk=50), frozenset())
    ring = Ring(scheduler)
    text = toy.expected([97, 98], 20, LAYERS)
    scheduler.submit(1, request([97, 98], 20), text[:18])
    assert ring.finish()[1] == text[18:]
    assert [(step.prompt, len(step.slots), sum(step.wants)) for step in ring.steps] == [
        (True, 2, 0),  # llama.cpp has other bits for a prompt's rows
        (False, 8, 0),
        (False, 8, 0),
        (False, 2, 1),
        (False, 1, 1),
    ]


def test_prompt_chunks_follow_each_other_without_waiting() -> None:
    scheduler = Scheduler(Limits(slots=1, context=100, stages=2, chunk=4), EOG)
    scheduler.submit(1, request(range(97, 107), 1))
    steps = [scheduler.schedule() for _ in range(4)]
    assert [len(step.slots) if step else None for step in steps] == [4, 4, 2, None]
    assert [step.sequences for step in steps if step] == [(), (), (1,)]
    assert [step.samplers for step in steps if step] == [((0, 1),), (), ()]


def test_a_chunk_is_as_large_as_the_measured_times_say() -> None:
    fast = ChunkCosts((((64, 10.0), (128, 11.0), (256, 14.0)), ((64, 9.0), (128, 10.0))))
    linear = ChunkCosts((((64, 10.0), (128, 20.0)), ((64, 10.0), (128, 20.0))))
    assert (fast.choose(1000), linear.choose(1000), ChunkCosts().choose(1000)) == (128, 64, 256)
    scheduler = Scheduler(Limits(slots=1, context=2000, stages=2, costs=linear), EOG)
    scheduler.submit(1, request([97] * 1000, 1))
    first = scheduler.schedule()
    assert first is not None and len(first.slots) == 64


def test_steps_go_on_while_a_long_prompt_is_read() -> None:
    scheduler = Scheduler(Limits(slots=2, context=100, stages=1, chunk=4), EOG)
    ring = Ring(scheduler)
    scheduler.submit(1, request([97], 20))
    ring.pump()
    ring.turn()
    ring.land()
    scheduler.submit(2, request([98] * 40, 1))
    ring.pump()
    assert [step.prompt for step in ring.steps[1:]] == [False, True, True]
    kinds = []
    for _ in range(3):
        ring.stages[0].run(False)
        scheduler.complete(ring.steps[-1].number if not ring.steps[-1].prompt else 1, [(0, Token(97))])
        ring.steps.clear()
        ring.pump()
        kinds.append([step.prompt for step in ring.steps])
    assert kinds == [[False]] * 3


@pytest.mark.parametrize(
    ("sequences", "want"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [1, 1, 1, 1]), (5, [1, 2, 2]), (8, [2, 3, 3])]
)
def test_ready_sequences_are_dealt_evenly_over_the_lanes(sequences: int, want: list[int]) -> None:
    scheduler = Scheduler(Limits(slots=8, context=50, stages=2, chunk=50), frozenset())
    ring = Ring(scheduler)
    for number in range(sequences):
        scheduler.submit(number, request([97 + number], 40))
    for _ in range(30 * sequences):
        ring.pump()
        if ring.answers:
            ring.land()
        else:
            ring.turn()
    sizes = [len(step.slots) for step in ring.steps if not step.prompt]
    assert scheduler.active == sequences
    assert sorted(sizes[-len(want) :]) == want


def test_a_higher_priority_leaves_the_queue_first() -> None:
    scheduler = Scheduler(Limits(slots=1, context=50, chunk=50), EOG)
    ring = Ring(scheduler)
    for number, priority in enumerate([0, 0, 3, 7]):
        scheduler.submit(number, request([97 + number], 1, priority))
    order = list(ring.finish())
    assert order == [3, 2, 0, 1]


def test_a_long_prompt_lets_others_in() -> None:
    scheduler = Scheduler(Limits(slots=2, context=9000, chunk=512), EOG)
    ring = Ring(scheduler)
    scheduler.submit(1, request([97] * 8000, 1))
    ring.pump()
    scheduler.submit(2, request([98] * 600, 1))
    texts = ring.finish()
    assert list(texts) == [2, 1]
    before = sum(len(s.slots) for s in ring.steps[: next(i for i, s in enumerate(ring.steps) if s.tokens[0] == 98)])
    assert before < TURN + 1024


def test_a_prompt_that_begins_like_one_before_keeps_its_rows() -> None:
    scheduler = Scheduler(Limits(slots=1, context=2000, chunk=256), EOG)
    ring = Ring(scheduler)
    prompt = [97 + n % 25 for n in range(700)]
    scheduler.submit(1, request(prompt, 4))
    answer = ring.finish()[1]
    longer = [*prompt, *answer, *range(97, 117)]
    ring.steps.clear()
    scheduler.submit(2, request(longer, 2))
    outputs: list[Output] = []
    while True:
        ring.pump()
        if ring.answers:
            outputs += ring.land()
        elif not ring.turn():
            break
    assert [output.token.id for output in outputs] == reference(longer, 2)
    rows = sum(len(step.slots) for step in ring.steps if step.prompt)
    assert outputs[0].token.cached == len(longer) - rows and 64 <= rows < 100
    assert outputs[1].token.cached == 0


def test_an_answer_is_read_again_while_nothing_else_is_to_be_done() -> None:
    """So that the next turn keeps it; the texts are those of requests run alone all the same."""
    scheduler = Scheduler(Limits(slots=2, context=2000, stages=2, chunk=256), frozenset())
    ring = Ring(scheduler)
    prompt = [97 + n % 25 for n in range(300)]
    scheduler.submit(1, request(prompt, 200))
    answer = ring.finish()[1]
    again = [step for step in ring.steps if step.prompt and not any(step.wants) and step.positions[0] >= 288]
    assert sum(len(step.slots) for step in again) >= 500 - 300 - 64 and all(len(step.slots) >= 64 for step in again)
    ring.steps.clear()
    longer = [*prompt, *answer, *range(97, 107)]
    scheduler.submit(2, request(longer, 5))
    assert ring.finish()[2] == toy.expected(longer, 5, LAYERS)
    first = [step for step in ring.steps if step.prompt and step.sequences == (2,)]
    assert len(first) == 1 and len(first[0].slots) <= 127


def test_a_request_does_not_wait_for_more_than_a_chunk_that_is_read_again() -> None:
    scheduler = Scheduler(Limits(slots=1, context=2000, chunk=256), frozenset())
    ring = Ring(scheduler)
    scheduler.submit(1, request([97] * 70, 300))
    while scheduler.active or scheduler.queued:
        ring.pump()
        if ring.answers:
            ring.land()
        else:
            ring.turn()
    ring.pump()
    assert scheduler.in_flight == 1 and len(ring.steps[-1].slots) < 128
    scheduler.submit(2, request([98, 99], 3))
    ring.pump()
    assert ring.steps[-1].tokens == (98, 99)
    assert ring.finish()[2] == toy.expected([98, 99], 3, LAYERS)


def test_a_shared_beginning_is_copied_and_computed_once() -> None:
    scheduler = Scheduler(Limits(slots=4, context=2000, stages=2, chunk=256), EOG)
    ring = Ring(scheduler)
    system = [97 + n % 25 for n in range(600)]
    prompts = {number: [*system, *[100 + number] * 30] for number in range(4)}
    for number, prompt in prompts.items():
        scheduler.submit(number, request(prompt, 3))
    texts = ring.finish()
    assert texts == {number: reference(prompt, 3) for number, prompt in prompts.items()}
    assert sum(step.copy is not None for step in ring.steps) == 3
    assert sum(len(step.slots) for step in ring.steps if step.prompt) < 630 + 3 * 100


def test_a_full_cache_keeps_the_answer_too() -> None:
    scheduler = Scheduler(Limits(slots=1, context=2000, chunk=256, exact=False), frozenset())
    ring = Ring(scheduler)
    prompt = [97 + n % 25 for n in range(300)]
    scheduler.submit(1, request(prompt, 50))
    longer = [*prompt, *ring.finish()[1], *range(97, 107)]
    ring.steps.clear()
    scheduler.submit(2, request(longer, 5))
    assert ring.finish()[2] == toy.expected(longer, 5, LAYERS)
    assert sum(len(step.slots) for step in ring.steps if step.prompt) == 11  # the last token drawn, and what is new


def test_without_the_cache_every_prompt_is_read_whole() -> None:
    scheduler = Scheduler(Limits(slots=1, context=2000, chunk=256, cache=False), EOG)
    ring = Ring(scheduler)
    for number in range(2):
        scheduler.submit(number, request([97] * 300, 1))
        ring.finish()
    assert sum(len(step.slots) for step in ring.steps) == 600


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = Scheduler(Limits(slots=1, context=10, queued=2), EOG)
    scheduler.submit(1, request([97]))
    scheduler.schedule()
    for number in (2, 3):
        scheduler.submit(number, request([97]))
    with pytest.raises(Overloaded) as refused:
        scheduler.submit(4, request([97]))
    assert refused.value.retry_after_s and refused.value.http_status == 429


def test_without_a_queue_a_request_needs_a_free_slot() -> None:
    scheduler = Scheduler(Limits(slots=1, context=10, queued=0), EOG)
    scheduler.submit(1, request([97]))
    with pytest.raises(Overloaded):
        scheduler.submit(2, request([97]))
