"""Processes killed under streams: the streams pause, go on, and say what they would have said."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator

import httpx
import pytest

from dwarfstar_engine.stage import toy
from process.prompts import PROMPTS
from support.crowd import DEADLINE_S, TEXT, Heard, bodies, check, crowd
from support.engine_process import EngineProcess, until

pytestmark = pytest.mark.process

REQUESTS = bodies(PROMPTS[:8], 120)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("rescue") / "home"
    options = ("--local-nodes", "3", "--threads", "1", "--slots", "8", "--context", "512", "-v")
    with EngineProcess(home, "demo", *options) as engine:
        yield engine.wait_serving()


@pytest.fixture(scope="module")
def undisturbed(engine: EngineProcess) -> list[Heard]:
    heards = asyncio.run(crowd(engine, REQUESTS))
    assert all(heard.finish == "length" and heard.error is None for heard in heards)
    return heards


def all_back(engine: EngineProcess) -> None:
    engine.wait_idle()
    until(lambda: len(engine.status().stages) == 3, "every node has its share again")
    engine.wait_serving()


def only_lost_layers_computed_again(engine: EngineProcess, before: int) -> bool:
    """Since the output was ``before`` characters long: every stream that went on had its cells in the other stages."""
    told = re.findall(r"streams go on, (\d+) of them from their beginning", engine.output[before:])
    return bool(told) and set(told) == {"0"}


def test_eight_streams_outlive_a_killed_stage(engine: EngineProcess, undisturbed: list[Heard]) -> None:
    epoch, before = engine.status().epoch, len(engine.output)
    heards = asyncio.run(crowd(engine, REQUESTS, lambda: engine.kill(engine.stage(1).pid)))
    check(heards, undisturbed)
    assert only_lost_layers_computed_again(engine, before)
    assert engine.status().epoch > epoch
    all_back(engine)


def test_eight_streams_outlive_a_killed_node(engine: EngineProcess, undisturbed: list[Heard]) -> None:
    before = len(engine.output)
    heards = asyncio.run(crowd(engine, REQUESTS, lambda: engine.kill(engine.node_pid("node2"))))
    check(heards, undisturbed)
    assert only_lost_layers_computed_again(engine, before)
    all_back(engine)


def test_streams_outlive_a_stopped_stage(engine: EngineProcess, undisturbed: list[Heard]) -> None:
    """A process that is alive and does nothing: its daemon finds out within the lost time-out."""
    pid = engine.stage(2).pid
    heards = asyncio.run(crowd(engine, REQUESTS[:2], lambda: engine.kill(pid, signal.SIGSTOP)))
    check(heards, undisturbed[:2])
    assert pid not in [process.pid for process in engine.processes()]
    all_back(engine)


def test_requests_that_come_meanwhile_wait_too(engine: EngineProcess, undisturbed: list[Heard]) -> None:
    async def both() -> tuple[list[Heard], httpx.Response]:
        late: list[asyncio.Task[httpx.Response]] = []
        loop = asyncio.get_running_loop()

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(base_url=engine.url, timeout=DEADLINE_S) as client:
                return await client.post(TEXT, json={**REQUESTS[0], "stream": False})

        def strike() -> None:
            engine.kill(engine.stage(0).pid)
            until(lambda: engine.health()[0] == 503, "the loss is noticed")
            loop.call_soon_threadsafe(lambda: late.append(loop.create_task(ask())))

        heards = await crowd(engine, REQUESTS[1:3], strike)
        return heards, await late[0]

    heards, answer = asyncio.run(both())
    check(heards, undisturbed[1:3])
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == undisturbed[0].text
    all_back(engine)


def test_what_does_not_fit_any_more_is_said(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two nodes that are both needed; one is gone, and comes back."""
    home = tmp_path_factory.mktemp("full") / "home"
    options = ("--local-nodes", "2", "--threads", "1", "--slots", "1", "--context", "512", "--effective-vram", "0.2")
    with EngineProcess(home, "demo", *options, variables={"DWARFSTAR_REJOIN_S": "0"}) as engine:
        engine.wait_serving()
        assert len(engine.status().stages) == 2
        body = {**REQUESTS[0], "max_tokens": 450}
        machine = (engine.node_pid("node2"), engine.stage(1).pid)

        def stop() -> None:
            for pid in machine:
                engine.kill(pid, signal.SIGSTOP)

        try:
            (heard,) = asyncio.run(crowd(engine, [body], stop, 3))
            assert heard.error is not None and heard.error["code"] == "model_too_large_for_remaining_capacity"
            answer = engine.post(TEXT, {**body, "stream": False})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "model_too_large_for_remaining_capacity"
        finally:
            for pid in machine:
                engine.kill(pid, signal.SIGCONT)
        engine.wait_serving()
        again = engine.post(TEXT, {**body, "stream": False}).json()
        assert again["choices"][0]["text"].startswith(heard.text)


def served(engine: EngineProcess) -> str:
    model = engine.status().model
    assert model is not None
    return model.name


def test_a_smaller_model_serves_while_the_other_does_not_fit(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("fallback") / "home"
    options = ("--local-nodes", "2", "--threads", "1", "--slots", "1", "--context", "512", "--effective-vram", "0.2")
    variables = {"DWARFSTAR_REJOIN_S": "0"}
    with EngineProcess(home, "demo", *options, "--fallback", "toy:6:1", variables=variables) as engine:
        engine.wait_serving()
        main = served(engine)
        machine = (engine.node_pid("node2"), engine.stage(1).pid)

        def stop() -> None:
            for pid in machine:
                engine.kill(pid, signal.SIGSTOP)

        try:
            (heard,) = asyncio.run(crowd(engine, [{**REQUESTS[0], "max_tokens": 450}], stop, 3))
            assert heard.error is not None and heard.error["code"] == "model_too_large_for_remaining_capacity"
            engine.wait_serving()
            answer = engine.post(TEXT, {"prompt": "small", "max_tokens": 9, "temperature": 0}).json()
            assert answer["choices"][0]["text"] == bytes(toy.expected(b"small", 9, 6)).decode()
            assert answer["model"] == served(engine) != main
        finally:
            for pid in machine:
                engine.kill(pid, signal.SIGCONT)
        until(lambda: served(engine) == main and engine.status().state == "serving", "the model is back")
        again = engine.post(TEXT, {**REQUESTS[0], "stream": False, "max_tokens": 450}).json()
        assert again["choices"][0]["text"].startswith(heard.text)
