"""The model is changed while the engine runs: with the commands an owner uses, under streams, and over a restart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.views import LoadRequest, LoadView
from process.conftest import BLOCK, TOKENS
from process.prompts import PROMPTS
from process.reference import answers
from process.test_exactness import check as check_answer
from support.crowd import TEXT, Heard, bodies, crowd
from support.engine_process import EngineProcess, command, until

pytestmark = pytest.mark.process

SMOL = "SmolLM2-135M-Instruct.Q4_1"
TOY = "toy:6:20"  # 20 ms a frame in each stage
LENT_GIB = "0.25"  # by each of two nodes
OPTIONS = ("--local-nodes", "2", "--threads", "1", "--context", "512", "--effective-vram", LENT_GIB)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load") / "home"


@pytest.fixture(scope="module")
def engine(home: Path) -> Iterator[EngineProcess]:
    """Started without a model, and given one."""
    with EngineProcess(home, *OPTIONS) as engine:
        until(lambda: engine.health()[1].get("code") == "no_model", "it waits for a model")
        until(lambda: len(engine.status().nodes) == 2, "its nodes are there")
        assert direct(engine, TOY).before == ""
        yield engine


def load(engine: EngineProcess, model: str, *options: str) -> dict[str, Any]:
    done = command("load", model, *options, "--json", "--home", str(engine.home))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def direct(engine: EngineProcess, model: str, **given: Any) -> LoadView:
    """Without a process of its own for each order."""
    return remote.load(running.require(engine.home), engine.home, LoadRequest(model=model, **given))


def refusal(engine: EngineProcess, *arguments: str) -> str:
    """One sentence on stderr."""
    done = command(*arguments, "--home", str(engine.home))
    assert done.returncode and not done.stdout and done.stderr.count("\n") == 1, (done.stdout, done.stderr)
    return done.stderr


def served(engine: EngineProcess) -> list[str]:
    return [card["id"] for card in httpx.get(engine.url + "/v1/models").json()["data"]]


def events(engine: EngineProcess) -> str:
    return command("events", "--home", str(engine.home)).stdout


def test_what_cannot_be_served_changes_nothing(engine: EngineProcess, tmp_path: Path) -> None:
    before = engine.status()
    letter = tmp_path / "letter.gguf"
    letter.write_text("to my aunt " * 100)
    assert "letter.gguf" in refusal(engine, "load", str(letter))
    with pytest.raises(DwarfStarError, match="no model"):
        direct(engine, str(tmp_path / "gone.gguf"))
    with pytest.raises(DwarfStarError, match="GiB"):
        direct(engine, "demo", context=8192, slots=64)
    after = engine.status()
    assert (after.epoch, after.model) == (before.epoch, before.model) and served(engine) == [TOY]
    assert [one.pid for one in after.stages] == [one.pid for one in before.stages]


def test_a_check_says_how_it_would_run(engine: EngineProcess) -> None:
    done = command("load", "demo", "--check", "--home", str(engine.home))
    assert done.returncode == 0, done.stderr
    assert f"{SMOL} can be loaded in the place of {TOY}: node1 0–" in done.stdout and "tok/s" in done.stdout
    assert served(engine) == [TOY]


def test_a_model_is_loaded_under_streams_and_answers_as_the_unsplit_one(
    engine: EngineProcess, demo_model: Path
) -> None:
    """Streams that run finish; what comes meanwhile waits, and the new model answers it."""
    late: list[httpx.Response] = []

    async def strike_and_ask() -> list[Heard]:
        struck = asyncio.Event()
        loop = asyncio.get_running_loop()

        def strike() -> None:
            loop.call_soon_threadsafe(struck.set)
            view = load(engine, "demo", "--slots", "3")
            assert (view["model"], view["before"], view["streams"], view["slots"]) == (SMOL, TOY, 0, 3)

        async def ask() -> None:
            await struck.wait()
            async with httpx.AsyncClient(base_url=engine.url, timeout=60) as client:
                while not late or late[-1].json()["model"] == TOY:  # until the gate is closed
                    late.append(await client.post(TEXT, json={"prompt": "Hi", "max_tokens": 2}))

        asking = asyncio.create_task(ask())
        heards = await crowd(engine, bodies(["a", "b", "c", "d"], 60), strike, 3)
        await asking
        return heards

    heards = asyncio.run(strike_and_ask())
    assert [(heard.error, heard.tokens, heard.finish) for heard in heards] == [(None, 60, "length")] * 4
    assert all(answer.status_code == 200 for answer in late) and late[-1].json()["model"] == SMOL
    assert served(engine) == [SMOL] and engine.health()[0] == 200
    for number, expected in enumerate(answers(demo_model, PROMPTS[:2], TOKENS, BLOCK)):
        check_answer(engine, number, expected)
    told = events(engine)
    assert f"the model {SMOL} is loaded by the owner in " in told and " end: " not in told
    status = command("status", "--home", str(engine.home)).stdout
    assert SMOL in status and TOY not in status


def test_unloaded_nothing_is_served_and_memory_is_free(engine: EngineProcess) -> None:
    pids = {stage.pid for stage in engine.status().stages}
    done = command("unload", "--home", str(engine.home))
    assert done.stdout == f"dwarfstar: {SMOL} is unloaded\n"
    until(lambda: not pids & {process.pid for process in engine.processes()}, "its stages end")
    assert served(engine) == []
    answer = engine.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_model"
    assert "no model is loaded" in answer.json()["error"]["message"]
    code, health = engine.health()
    assert (code, health["code"]) == (503, "no_model")
    status = command("status", "--home", str(engine.home)).stdout
    assert "no model" in status
    assert "no model is loaded" in refusal(engine, "unload")


def test_what_was_loaded_is_served_after_a_restart_that_names_no_model(engine: EngineProcess, home: Path) -> None:
    assert direct(engine, "demo", context=256, slots=2).before == ""
    remote.stop(running.require(home), home)
    engine.end()
    kept = ("--local-nodes", "2", "--threads", "1", "--effective-vram", LENT_GIB)
    with EngineProcess(home, *kept) as again:
        again.wait_serving()
        model = again.status().model
        assert model is not None and (model.name, model.context) == (SMOL, 256)
        assert direct(again, "demo", check=True, context=256).slots == 4, (
            "without --slots it is as this engine was started"
        )
