"""Greedy answers over HTTP, split over processes, are token for token what unsplit llama.cpp says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from process.conftest import BLOCK, TOKENS
from process.prompts import PROMPTS, is_chat
from process.reference import Answer
from support.engine_process import EngineProcess

pytestmark = pytest.mark.process

LOGPROB_TOLERANCE = 1e-4  # the logits are equal; what is left is the rounding of the softmax
AT_ONCE = 8  # more than the slots, so that some wait


def ask(engine: EngineProcess, prompt: Any) -> tuple[int, str, list[bytes] | list[str], list[float]]:
    """Prompt tokens, text, tokens drawn and their log probabilities."""
    same = {"model": "any", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    if is_chat(prompt):
        body = {**same, "messages": prompt, "logprobs": True}
        answer = engine.post("/v1/chat/completions", body).raise_for_status().json()
        choice = answer["choices"][0]
        tokens = choice["logprobs"]["content"]
        text, pieces = choice["message"]["content"], [bytes(token["bytes"]) for token in tokens]
        return answer["usage"]["prompt_tokens"], text, pieces, [token["logprob"] for token in tokens]
    answer = engine.post("/v1/completions", {**same, "prompt": prompt, "logprobs": 0}).raise_for_status().json()
    choice = answer["choices"][0]
    scores = choice["logprobs"]
    return answer["usage"]["prompt_tokens"], choice["text"], scores["tokens"], scores["token_logprobs"]


def spelled(piece: bytes) -> str:
    """A token as /v1/completions names it."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def check(engine: EngineProcess, number: int, expected: Answer) -> None:
    """Ask prompt ``number`` and compare all that is told with the reference."""
    count, text, pieces, scores = ask(engine, PROMPTS[number])
    wanted = list(expected.pieces) if is_chat(PROMPTS[number]) else [spelled(piece) for piece in expected.pieces]
    assert (count, text, pieces) == (expected.prompt, expected.text, wanted), f"prompt {number}"
    assert scores == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE), f"prompt {number}"


def check_all(engine: EngineProcess, reference: list[Answer]) -> None:
    """All prompts, several at the same time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(check, engine, number, answer) for number, answer in enumerate(reference)]:
            done.result()


def test_the_prompts_are_what_the_bar_asks_for(reference: list[Answer]) -> None:
    lengths = [answer.prompt for answer in reference]
    assert len(lengths) == 22
    assert sum(length > BLOCK // 2 for length in lengths) >= 3 and min(lengths) <= 3
    assert {length % BLOCK < 64 for length in lengths if length > BLOCK} == {True, False}
    assert len({answer.ids for answer in reference}) == 22  # so that mixed up answers show


def test_one_after_the_other(demo: EngineProcess, reference: list[Answer]) -> None:
    assert len(demo.status().stages) == 3
    for number, answer in enumerate(reference):
        check(demo, number, answer)


def test_at_the_same_time(demo: EngineProcess, reference: list[Answer]) -> None:
    check_all(demo, reference)


@pytest.mark.parametrize(
    ("nodes", "cuts"), [(2, ()), (5, ()), (3, (3, 29)), (5, (1, 2, 15, 28))], ids=lambda value: str(value)
)
def test_other_splits(tmp_path: Path, reference: list[Answer], nodes: int, cuts: tuple[int, ...]) -> None:
    given = ["--cuts", ",".join(map(str, cuts))] if cuts else []
    with EngineProcess(tmp_path / "home", "demo", "--local-nodes", str(nodes), *given) as engine:
        engine.wait_serving()
        stages = engine.status().stages
        assert len(stages) == nodes
        assert not cuts or tuple(stage.layers[1] for stage in stages[:-1]) == cuts
        check_all(engine, reference)
