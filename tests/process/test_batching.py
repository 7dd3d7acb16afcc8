"""Many requests at once on whole engines: what they say, what is cached, guessed, refused and given up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from dwarfstar_engine.bench import soak
from support.engine_process import EngineProcess, command, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

REPEATING = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n" * 3
PLAIN = "Explain in a few sentences why the sky is blue."
LONG = "The harbour lay still, and the keeper counted the boats that had come home before the storm. " * 30


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("batching") / "home"
    with EngineProcess(home, "demo", "--local-nodes", "2", "--threads", "1", "--slots", "4") as started:
        yield started.wait_serving()


def complete(engine: EngineProcess, prompt: str, tokens: int = 24, **more: Any) -> dict[str, Any]:
    body = {"model": "any", "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
    answer: dict[str, Any] = engine.post("/v1/completions", body).raise_for_status().json()
    return answer


def text(answer: dict[str, Any]) -> str:
    said: str = answer["choices"][0]["text"]
    return said


def cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_a_crowd_gets_the_texts_of_requests_run_alone(engine: EngineProcess) -> None:
    """Lengths, shared beginnings, stops, several choices, sampling, clients that leave; see bench/soak.py."""
    tally = asyncio.run(soak.crowd(engine.url, engine.pid, count=80, at_once=16, seed=3))
    assert tally.wrong == []
    assert set(tally.kinds) == {"greedy", "cancel", "stop", "several", "sampled"}
    engine.wait_idle()


def test_a_prompt_that_begins_alike_is_not_computed_again(engine: EngineProcess) -> None:
    cold = complete(engine, LONG, cache_prompt=False)
    first, again = complete(engine, LONG), complete(engine, LONG)
    longer = complete(engine, LONG + text(first) + " And then")
    assert cached(cold) == 0
    assert again["usage"]["prompt_tokens"] - 128 < cached(again) < again["usage"]["prompt_tokens"]
    assert cached(longer) > 0.8 * cached(again)
    assert text(cold) == text(first) == text(again)
    assert text(complete(engine, LONG + text(first) + " And then", cache_prompt=False)) == text(longer)


def test_choices_of_one_prompt_share_its_cells(engine: EngineProcess) -> None:
    answer = complete(engine, "First: " + LONG, n=3)
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    assert text(complete(engine, "First: " + LONG, cache_prompt=False)) == text(answer)


def test_guesses_change_no_text(engine: EngineProcess, tmp_path: Path) -> None:
    said = {prompt: text(complete(engine, prompt, 96)) for prompt in (REPEATING, PLAIN)}
    seeded = {"temperature": 0.9, "seed": 5}
    drawn = text(complete(engine, REPEATING, 60, **seeded))
    with EngineProcess(tmp_path / "off", "demo", "--local-nodes", "2", "--speculation", "off") as other:
        other.wait_serving()
        assert {prompt: text(complete(other, prompt, 96)) for prompt in said} == said
        assert text(complete(other, REPEATING, 60, **seeded)) == drawn
    with EngineProcess(
        tmp_path / "draft", "demo", "--local-nodes", "2", "--speculation", "on", "--draft-model", "demo"
    ) as other:
        other.wait_serving()
        assert {prompt: text(complete(other, prompt, 96)) for prompt in said} == said
        assert text(complete(other, REPEATING, 60, **seeded)) == drawn


def test_beyond_the_queue_requests_are_told_to_come_back(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "home", "toy:8:20", "--local-nodes", "1", "--slots", "2", "--queue", "1") as engine:
        engine.wait_serving()
        with ThreadPoolExecutor(8) as pool:
            body = {"model": "any", "prompt": "abc", "max_tokens": 60, "ignore_eos": True}
            answers = [done.result() for done in [pool.submit(engine.post, "/v1/completions", body) for _ in range(8)]]
        codes = [answer.status_code for answer in answers]
        assert codes.count(200) == 3 and codes.count(429) == 5
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        engine.wait_idle()


def test_a_request_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "home", "toy:8:20", "--local-nodes", "1", "--request-timeout", "1") as engine:
        engine.wait_serving()
        answer = engine.post("/v1/completions", {"model": "any", "prompt": "abc", "max_tokens": 2000})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "request_timed_out"
        until(lambda: engine.status().throughput.active == 0, "its slot is free")


def test_a_client_that_leaves_frees_its_slot(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "home", "toy:8:20", "--local-nodes", "1", "--slots", "1") as engine:
        engine.wait_serving()
        body = {"model": "any", "prompt": "abc", "max_tokens": 2000, "stream": True}
        with httpx.stream("POST", f"{engine.url}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()  # kept: a stream that nobody iterates is closed
            next(lines)
            assert engine.status().throughput.active == 1
        until(lambda: engine.status().throughput.active == 0, "its slot is free", 5.0)


@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
def test_quantised_caches_take_less_and_answer(tmp_path: Path, kv: str) -> None:
    with EngineProcess(tmp_path / "home", "demo", "--local-nodes", "2", "--kv", kv) as engine:
        engine.wait_serving()
        taken = sum(stage.kv_gib for stage in engine.status().stages)
        share = {"q8_0": 34 / 64, "q4_0": 18 / 64}[kv]
        assert taken == pytest.approx(5 * 4096 * 30 * 768 * share / 2**30, rel=0.01)
        assert "Paris" in text(complete(engine, "The capital of France is"))


def test_what_links_are_worth_is_measured_and_shown(engine: EngineProcess) -> None:
    first, last = engine.status().stages
    assert (first.wire, last.wire) == ("f32", "ids")  # loopback is faster than any stage computes
    assert 0 < first.link_ms < 1000 and first.link_mb_s > 1


def test_quantised_caches_need_flash_attention() -> None:
    done = command("--serve", "demo", "--kv", "q8_0", DWARFSTAR_FLASH_ATTENTION="off")
    assert done.returncode == 2 and "flash_attention" in done.stderr
