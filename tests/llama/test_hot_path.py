"""A frame gives the same bytes whether a stage runs it natively (``native/src/stage.cpp``) or by the general way.

On slices of SmolLM2, in a child process, which compares them: see ``support.hot_path``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dwarfstar_engine.native import WireType
from support.exactness import Worker

pytestmark = [pytest.mark.llama, pytest.mark.timeout(300)]

DEADLINE_S = 120.0  # of one question; they take a few seconds on an idle core
STEPS = 12
ENDS_EVERY = 37  # support.hot_path.ENDS

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks the child: ``ask(check, …)``."""
    worker = Worker(tmp_path_factory.mktemp("hot"), "support.hot_path", DEADLINE_S)
    try:
        yield lambda check, **more: worker.ask(check=check, **more)
    finally:
        worker.close()


@pytest.mark.parametrize("wire", WireType)
def test_first_middle_and_last_stage_and_every_sampler(ask: Ask, wire: WireType) -> None:
    answer = ask("decode", wire=int(wire), steps=STEPS)
    # Prompts need the general way.
    assert answer["native"] > 5 * STEPS and answer["taken"] == [answer["native"]] * 3
    texts = [tuple(text) for text in answer["texts"].values()]
    assert min(map(len, texts)) >= 1 + STEPS and len(set(texts)) == len(texts)


def test_steps_that_go_by_themselves(ask: Ask) -> None:
    """The same tokens as step by step; a text that ends or is halted goes no further, the others do."""
    want = ask("decode", wire=int(WireType.F32), steps=STEPS)["texts"]
    answer = ask("going", wire=int(WireType.F32), rounds=STEPS - 1)
    assert answer["taken"] == [answer["native"]] * 3
    left = [rounds for rounds, _ in answer["rounds"]]
    assert left[:3] == [STEPS - 1, STEPS - 2, STEPS - 3] and left[-1] == 0
    lengths = {slot: len(text) for slot, text in answer["texts"].items()}
    assert all(text == want[slot][: lengths[slot]] for slot, text in answer["texts"].items())
    ended = {slot for slot, text in answer["texts"].items() if text[-1] % ENDS_EVERY == 0}
    assert lengths["2"] <= 4 and len(set(lengths.values())) > 1
    assert all(lengths[slot] == 1 + len(left) for slot in lengths if slot not in ended | {"2"})


def test_the_draws_of_a_seed_are_repeated(ask: Ask) -> None:
    first, again = (ask("decode", wire=int(WireType.F32), steps=STEPS)["texts"] for _ in range(2))
    assert first == again


def test_log_probabilities_take_the_general_way(ask: Ask) -> None:
    answer = ask("logprobs", wire=int(WireType.F32))
    # A row of a plain slot, of one that wants them, of both; steps of the plain one; guesses of the other.
    assert answer["taken"] == [1, 0, 0, 3, 0] and answer["guessed"]
    (_, plain, nothing, none), (slot, token, logprob, top), *both = answer["rows"]
    assert (nothing, none, slot) == (0.0, [], 1) and both == answer["rows"][:2]
    assert token == plain and len(top) == 3 and top[0] == [token, logprob]
    assert 0 > logprob == max(value for _, value in top)


def test_a_full_cache_is_the_same_fault(ask: Ask) -> None:
    answer = ask("full")
    assert [code for code, _ in answer["faults"]] == ["kv_full"] * 2
    assert all("full" in message for _, message in answer["faults"])
    assert answer["taken"] == 3  # rows that replace others


@pytest.mark.parametrize("wire", [WireType.F32, WireType.Q8])
def test_rows_of_several_slots_and_guesses(ask: Ask, wire: WireType) -> None:
    answer = ask("together", wire=int(wire))
    assert answer["slots"] == [[0, 3, 4], [4, 1, 2], [0, 0, 1], [3, 1, 3]]
    assert answer["taken"] == [answer["native"]] * 3


def test_wrong_frames_are_the_same_fault(ask: Ask) -> None:
    answer = ask("refused")
    assert answer["taken"] == 0
    words = {"sampler": "no sampler", "slot": "slot 5", "width": "wide", "tokens": "not the first", "gap": "follow"}
    words |= {"wants": "wants 3 tokens", "rows": "65 rows"}
    assert answer["faults"].keys() == words.keys()
    assert all(word in answer["faults"][name] for name, word in words.items()), answer["faults"]
