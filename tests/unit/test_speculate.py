"""The controller of speculation against a virtual pipeline: what it wins, and that it never loses more than 3 %.

The pipeline is stages in a row, each taking frames in order, hops between them, and a bound on frames in flight.
Texts are coins: whether the guess of a position is right. Time is simulated; seeds are printed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from statistics import geometric_mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.batch.speculate import (
    FIRST_PAUSE,
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_PAUSE,
    TRY_DEPTH,
    Acceptance,
    Depth,
    Mode,
    Speculation,
)

TOKENS = 200  # of each answer: a short one, on which a loss weighs more
DISCOUNTS = (1.0, 0.8, 0.6, 0.1)  # t(n) = t(1)·(1 + discount·(n - 1)): linear on a CPU, nearly free on a GPU
LOST_AT_MOST, WON_AT_LEAST = 0.97, 1.3

Coin = Callable[[random.Random, int], bool]  # whether the guess of a position is right


@dataclass(frozen=True)
class Costs:
    """Stages that take ``ms`` for one row; the same in the simulation and as told to the controller."""

    ms: tuple[float, ...]
    discount: float
    hop_ms: float
    saved: float = 0.0

    def stage(self, ms: float, rows: int) -> float:
        return ms * (1 + self.discount * (rows - 1))

    def cost(self, rows: int) -> float:
        return self.stage(max(self.ms), rows)

    def latency(self, rows: int) -> float:
        return self.hop_ms + sum(self.stage(ms, rows) + self.hop_ms for ms in self.ms)


@dataclass
class Text:
    """A sequence being generated. Rows are numbered by position; row i, if right, makes token i + 1 known."""

    right: list[bool]  # of the guess of each position
    acceptance: Acceptance
    known: int = 1  # tokens known: the rows of those may be sent as real ones
    sent: int = 0  # rows sent since the last wrong guess, counted from the text's beginning
    run: int = 0  # guesses that failed: frames of an earlier run are dead

    @property
    def done(self) -> bool:
        return self.known > TOKENS


@dataclass
class Ring:
    """Generates texts and says how long it took."""

    costs: Costs
    lanes: int
    told: Speculation
    texts: list[Text]
    held_back: bool = False  # guesses not sent are judged too
    now: float = 0.0
    free: list[float] = field(default_factory=list)
    flights: list[tuple[float, int, int, int, int, int]] = field(default_factory=list)
    number: int = 0

    def generate(self) -> float:
        self.free = [0.0] * len(self.costs.ms)
        while not all(text.done for text in self.texts):
            self._fill()
            self.now, _, index, run, first, rows = heapq.heappop(self.flights)
            if run == self.texts[index].run:
                self._judge(self.texts[index], first, rows)
        return self.now

    def _fill(self) -> None:
        running = [i for i, text in enumerate(self.texts) if not text.done]
        running.sort(key=lambda i: self.texts[i].sent)  # turns are taken
        for index in running:
            text = self.texts[index]
            if text.sent < text.known and len(self.flights) < self.lanes:
                depth = self._depth(text, len(running))
                self._send(index, 1 + min(depth.guesses, depth.rows - 1))
        for index in running:
            text = self.texts[index]
            while text.sent >= text.known and len(self.flights) < self.lanes:
                depth = self._depth(text, len(running))
                if text.sent - text.known + depth.rows > depth.guesses:
                    break
                self._send(index, depth.rows)

    def _depth(self, text: Text, running: int) -> Depth:
        return self.told.depth(text.acceptance, running, self.lanes, MAX_DEPTH)

    def _send(self, index: int, rows: int) -> None:
        text, at = self.texts[index], self.now + self.costs.hop_ms
        for stage, ms in enumerate(self.costs.ms):
            self.free[stage] = max(at, self.free[stage]) + self.costs.stage(ms, rows)
            at = self.free[stage] + self.costs.hop_ms
        heapq.heappush(self.flights, (at, self.number, index, text.run, text.sent, rows))
        self.number += 1
        text.sent += rows

    def _judge(self, text: Text, first: int, rows: int) -> None:
        """Each row gives a token; a guess of that token is judged if its row was sent."""
        assert first < text.known
        proposed = min(text.sent, first + rows + 1) - first - 1
        accepted = 0
        while accepted < proposed and text.right[first + 1 + accepted]:
            accepted += 1
        if proposed == 0 and self.held_back:
            self.told.record(text.acceptance, 1, int(text.right[first + 1]))
        else:
            self.told.record(text.acceptance, proposed, accepted)
        text.known = first + min(rows, accepted + 1) + 1
        if accepted < proposed:
            text.sent, text.run = text.known - 1, text.run + 1


def every(chance: float) -> Coin:
    return lambda rng, _: rng.random() < chance


def simulate(
    mode: Mode,
    costs: Costs,
    running: int,
    coin: Coin,
    *,
    seed: int = 1,
    told: Costs | None = None,
    held_back: bool = False,
) -> float:
    """ms to generate ``running`` answers at the same time. told: what the controller believes about the costs."""
    rng = random.Random(seed)
    speculation = Speculation(mode, told or costs)
    texts = [Text([coin(rng, i) for i in range(TOKENS + 2 * MAX_DEPTH)], speculation.begin()) for _ in range(running)]
    return Ring(costs, len(costs.ms) + 1, speculation, texts, held_back).generate()


def gain(
    costs: Costs, running: int, coin: Coin, *, mode: Mode = "auto", seed: int = 1, told: Costs | None = None
) -> float:
    """How many times faster than without guesses."""
    alone = simulate("off", costs, running, coin, seed=seed)
    return alone / simulate(mode, costs, running, coin, seed=seed, told=told)


SHAPES: Sequence[tuple[float, ...]] = ((10,), (10, 10, 10), (10, 4, 7), (5, 5, 5, 5, 5, 5))
PIPELINES = [Costs(ms, discount, hop) for ms, discount, hop in product(SHAPES, DISCOUNTS, (0.2, 5.0, 40.0))]
SEEDS = (11, 12)


@pytest.mark.parametrize("running", [1, 2, 8])
def test_texts_whose_guesses_fail_lose_at_most_three_percent(running: int) -> None:
    gains = {(costs, seed): gain(costs, running, every(0), seed=seed) for costs in PIPELINES for seed in SEEDS}
    worst = min(gains, key=gains.__getitem__)
    print(f"\n{running} running, worst: {gains[worst]:.3f} of the speed without guesses, {worst}")
    assert gains[worst] >= LOST_AT_MOST


@pytest.mark.parametrize("wrong", [0.7, 1.4])
def test_costs_measured_wrong_lose_at_most_three_percent(wrong: float) -> None:
    """The controller believes that more rows, and the way between the stages, cost less or more than they do."""
    for costs, running in product(PIPELINES, (1, 4)):
        told = Costs(costs.ms, costs.discount * wrong, costs.hop_ms * wrong)
        assert gain(costs, running, every(0), told=told, seed=21) >= LOST_AT_MOST, costs


def test_one_stream_over_several_stages_wins_where_guesses_are_right() -> None:
    """The table of speed-up by acceptance, for each discount, over three equal stages."""
    print("\nspeed-up of one stream, 3 stages of 10 ms, hops of 0.5 ms; by chance that a guess is right")
    chances = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
    print("t(2) ÷ t(1)  " + "".join(f"{chance:7.2f}" for chance in chances))
    for discount in DISCOUNTS:
        costs = Costs((10, 10, 10), discount, 0.5)
        gains = [geometric_mean(gain(costs, 1, every(chance), seed=seed) for seed in SEEDS) for chance in chances]
        print(f"{1 + discount:11.1f}  " + "".join(f"{won:7.2f}" for won in gains))
        assert min(gains) >= LOST_AT_MOST
        assert gains[chances.index(0.8)] >= WON_AT_LEAST and gains[-1] >= 2


def test_a_single_stage_wins_where_rows_are_cheap_and_guesses_nothing_where_they_are_not() -> None:
    assert gain(Costs((10,), 0.1, 0.2), 1, every(0.8)) >= WON_AT_LEAST
    assert gain(Costs((10,), 1.0, 0.2), 1, every(1.0)) == 1


@pytest.mark.parametrize("chance", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_middling_guesses_lose_little_anywhere(chance: float) -> None:
    """Estimates are noisy, and where a gain is small they choose wrongly now and then."""
    for costs, running in product(PIPELINES, (1, 2, 8)):
        assert gain(costs, running, every(chance), seed=31) >= 0.95, (costs, running)


def test_passages_copied_between_others_are_used_and_more_so_if_guesses_held_back_are_judged() -> None:
    """Right guesses come in runs of 40 tokens, in between none is right."""
    costs = Costs((10, 10, 10), 0.6, 0.5)

    def passages(_: random.Random, position: int) -> bool:
        return position // 40 % 2 == 1

    alone = simulate("off", costs, 1, passages)
    sent_only, all_judged = (alone / simulate("auto", costs, 1, passages, held_back=judged) for judged in (False, True))
    print(f"\npassages: {sent_only:.2f}, with guesses judged that were held back {all_judged:.2f}")
    assert sent_only >= 1.1 and all_judged >= WON_AT_LEAST


def test_a_hundred_short_requests_do_not_each_find_out_that_guessing_fails() -> None:
    speculation = Speculation("auto", Costs((10,), 0.1, 0.2))
    guesses = []
    for _ in range(100):
        state, sent = speculation.begin(), 0
        for _ in range(10):
            depth = speculation.depth(state, 1, 2, MAX_DEPTH)
            sent += depth.guesses
            speculation.record(state, depth.guesses, 0)
        guesses.append(sent)
    assert guesses[0] > 0 and sum(guesses[50:]) == 0


def test_pauses_between_tries_double_up_to_a_bound_and_a_right_guess_ends_them() -> None:
    speculation = Speculation("auto", Costs((10, 10), 0.6, 0.2))
    state, tries = speculation.begin(), []
    for token in range(6 * MAX_PAUSE):
        depth = speculation.depth(state, 1, 3, MAX_DEPTH)
        if depth.guesses:
            tries.append(token)
            assert len(tries) < 20 and (len(tries) < 10 or depth.guesses <= TRY_DEPTH)
        speculation.record(state, depth.guesses, 0)
    pauses = [later - earlier - 1 for earlier, later in pairwise(tries)]
    pauses = pauses[pauses.index(FIRST_PAUSE) :]
    assert pauses == [min(FIRST_PAUSE << i, MAX_PAUSE) for i in range(len(pauses))] and pauses[-1] == MAX_PAUSE
    for _ in range(MAX_PAUSE):
        speculation.record(state, 0, 0)
    for _ in range(10):
        depth = speculation.depth(state, 1, 3, MAX_DEPTH)
        assert depth.guesses
        speculation.record(state, depth.guesses, depth.guesses)
    assert state.chance > 0.7


@given(
    mode=st.sampled_from(["auto", "on", "off"]),
    chance=st.floats(0, 1),
    running=st.integers(1, 20),
    lanes=st.integers(1, 10),
    available=st.integers(0, 40),
    discount=st.floats(0, 1),
)
def test_no_more_guesses_than_there_are_nor_frames_than_lanes(
    mode: Mode, chance: float, running: int, lanes: int, available: int, discount: float
) -> None:
    speculation = Speculation(mode, Costs((10, 5), discount, 1.0))
    depth = speculation.depth(Acceptance(chance), running, lanes, available)
    assert 0 <= depth.guesses <= min(available, MAX_DEPTH)
    frames, rest = divmod(depth.guesses + 1, depth.rows)
    assert rest == 0 and (frames == 1 or frames * running <= lanes)
    assert depth == Depth() or mode != "off"
    if mode == "on" and available and (lanes > running or chance > 0):
        assert depth.guesses


def test_new_costs_change_the_choice() -> None:
    speculation = Speculation("auto", Costs((10,), 1.0, 0.2))
    state = Acceptance(0.8)
    assert speculation.depth(state, 1, 2, MAX_DEPTH) == Depth()
    speculation.measured(Costs((10,), 0.05, 0.2))
    assert speculation.depth(state, 1, 2, MAX_DEPTH).guesses > 2


def test_choices_kept_are_bounded() -> None:
    speculation = Speculation("auto", Costs((10,), 0.5, 0.2))
    for running, lanes, available in product(range(1, 40), range(1, 12), range(1, MAX_DEPTH + 1)):
        speculation.depth(Acceptance(0.5), running, lanes, available)
        assert len(speculation._choices) <= MAX_CHOICES


def test_what_rows_save_that_go_by_themselves_is_lost_to_guesses() -> None:
    """A gain that just pays where every row comes back to the coordinator does not where it need not."""
    state = Acceptance(0.25, pause=9)
    chosen = [Speculation("auto", Costs((4, 4), 1.0, 0.2, saved)).depth(state, 1, 3, MAX_DEPTH) for saved in (0.0, 2.0)]
    assert chosen[0].guesses and not chosen[1].guesses
