"""Processes killed and stopped under a request that is not to be rescued: a clean error at once, and the next works."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from dwarfstar_engine.stage import toy
from support.engine_process import EngineProcess, until

pytestmark = pytest.mark.process

TEXT = "/v1/completions"
LAYERS = 12
MODEL = f"toy:{LAYERS}:20"  # 20 ms a frame and stage: slow enough to be struck in the middle
PROMPT = "strike"
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 2000, "temperature": 0}
SHORT: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
FRAME_DEADLINE_S = 3


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("slow") / "home"
    settings = {"DWARFSTAR_FRAME_DEADLINE_S": str(FRAME_DEADLINE_S), "DWARFSTAR_REJOIN_S": "600"}
    with EngineProcess(home, MODEL, "--local-nodes", "3", "--on-loss", "fail", variables=settings) as engine:
        yield engine.wait_serving()


def check(answer: httpx.Response) -> None:
    """It answers `SHORT`, and right."""
    text = answer.raise_for_status().json()["choices"][0]["text"]
    assert text == bytes(toy.expected(PROMPT.encode(), SHORT["max_tokens"], LAYERS)).decode()


def works(engine: EngineProcess) -> None:
    """The engine serves again, over all its nodes, and right."""
    engine.wait_serving()
    check(engine.post(TEXT, SHORT))
    engine.wait_idle()
    nodes = ["node1", "node2", "node3"]  # meanwhile those left may have served; who came back gets its share
    until(lambda: [stage.node for stage in engine.status().stages] == nodes, "all nodes have their share")
    engine.wait_serving()


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def strike(engine: EngineProcess, pid: int, number: signal.Signals = signal.SIGKILL) -> dict[str, Any]:
    """Signal a process in the middle of a stream; the error event that ends the stream."""
    with httpx.stream("POST", engine.url + TEXT, json={**LONG, "stream": True}, timeout=60.0) as answer:
        assert answer.status_code == 200
        said = events(answer.iter_lines())
        for _ in range(3):
            assert "choices" in next(said)
        engine.kill(pid, number)
        *_, last = said
    assert "error" in last
    error: dict[str, Any] = last["error"]
    return error


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_killed_stage(slow: EngineProcess, index: int) -> None:
    before = slow.status()
    error = strike(slow, before.stages[index].pid)
    assert error["type"] == "server_error" and "broke" in error["message"]
    works(slow)
    after = slow.status()
    assert after.epoch > before.epoch
    kept = [stage.pid for number, stage in enumerate(before.stages) if number != index]
    assert set(kept) <= {stage.pid for stage in after.stages}  # the others kept their weights


def test_a_killed_stage_without_streaming(slow: EngineProcess) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(slow.post, TEXT, LONG)
        until(lambda: slow.status().throughput.active == 1, "the request is generated")
        slow.kill(slow.stage(1).pid)
        answer = waiting.result()
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "server_error"
    works(slow)


def test_a_killed_node(slow: EngineProcess) -> None:
    pid, stage = slow.node_pid("node2"), slow.stage(1).pid
    assert strike(slow, pid)["type"] == "server_error"
    until(lambda: stage not in [process.pid for process in slow.processes()], "its stage ends with it")
    works(slow)
    assert slow.node_pid("node2") != pid


def test_a_stopped_node_is_lost_and_comes_back(slow: EngineProcess) -> None:
    pid = slow.node_pid("node3")
    slow.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: slow.node("node3") is None, "the silent node is lost")
        answer = slow.post(TEXT, SHORT)  # refused until the others have its layers, which may be at once
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
        else:
            check(answer)
    finally:
        slow.kill(pid, signal.SIGCONT)
    works(slow)
    assert slow.node_pid("node3") == pid


def test_a_stopped_stage_is_replaced(slow: EngineProcess) -> None:
    pid = slow.stage(1).pid
    error = strike(slow, pid, signal.SIGSTOP)
    assert error["type"] == "server_error"
    works(slow)
    assert pid not in [process.pid for process in slow.processes()]


def test_a_killed_engine_leaves_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    with EngineProcess(tmp_path_factory.mktemp("gone") / "home", MODEL, "--local-nodes", "2") as engine:
        engine.wait_serving()
        with httpx.stream("POST", engine.url + TEXT, json={**LONG, "stream": True}, timeout=60.0) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert len(engine.processes()) == 5
            engine.kill(engine.pid)
            engine.wait_gone()
        # The same home serves again: nothing stale is in its way.
        with EngineProcess(engine.home, MODEL, "--local-nodes", "1") as again:
            again.wait_serving()
            assert again.post(TEXT, {**LONG, "max_tokens": 2}).status_code == 200
