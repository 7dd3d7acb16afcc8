"""Reading an answer's stream, finding engines, and an engine that is started in the background."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dwarfstar_engine.cli.background import Background, log_file
from dwarfstar_engine.errors import DwarfStarError, SettingsError
from dwarfstar_engine.settings import Settings
from dwarfstar_tui.client import MAX_LINE_CHARS, HomePlace, Reading
from dwarfstar_tui.session import Delta

DEADLINE_S = 60.0


def data(**event: object) -> str:
    return "data: " + json.dumps({"choices": [], **event})


def test_an_answer_is_read_to_its_end_with_what_it_took() -> None:
    reading = Reading()
    lines = [
        data(choices=[{"delta": {"role": "assistant"}}]),
        "",
        data(choices=[{"delta": {"content": "Hi"}}]),
        data(choices=[{"delta": {}, "finish_reason": "stop"}]),
        data(usage={"prompt_tokens": 3, "completion_tokens": 2}),
        "data: [DONE]",
    ]
    assert [delta for line in lines for delta in reading.line(line)] == [Delta("Hi")]
    assert reading.over() == Delta("", "stop", 3, 2)


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    reading = Reading()
    reading.line(data(choices=[{"delta": {"content": "Hi"}}]))
    with pytest.raises(DwarfStarError, match="broke off"):
        reading.over()


def test_an_error_in_the_stream_is_said_with_its_code() -> None:
    with pytest.raises(DwarfStarError, match="no node is left") as raised:
        Reading().line("data: " + json.dumps({"error": {"message": "no node is left", "code": "unavailable"}}))
    assert raised.value.code == "unavailable"


def test_a_line_without_end_is_refused() -> None:
    with pytest.raises(DwarfStarError, match="too long"):
        Reading().line("data: " + "x" * (MAX_LINE_CHARS + 1))


async def test_a_home_without_an_engine_has_none(tmp_path: Path) -> None:
    assert await HomePlace(Settings(home=tmp_path), {}).find() is None


async def test_attaching_needs_a_certificate_of_the_cluster(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no certificate"):
        await HomePlace(Settings(home=tmp_path), {}, attach="10.0.0.1:8477").find()


async def test_conversations_are_kept_in_the_home(tmp_path: Path) -> None:
    place = HomePlace(Settings(home=tmp_path), {})
    await place.keep_chat("a", "{}")
    assert (await place.read_chats()).texts == ("{}",)
    assert (tmp_path / "chats" / "a.json").exists()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "did not come"
        time.sleep(0.02)  # between two looks at another process


@pytest.mark.skipif(sys.platform == "win32", reason="sessions are POSIX")
def test_an_engine_in_the_background_has_a_session_and_a_log_of_its_own(tmp_path: Path) -> None:
    engine = Background(tmp_path, ["no-such-model"])
    assert os.getsid(engine.pid) == engine.pid
    until(engine.ended)
    said = engine.lines()
    assert any("no model 'no-such-model'" in line for line in said), said
    assert not any(line.startswith("dwarfstar:") for line in said)
    first = log_file(tmp_path).read_text("utf-8")
    until(Background(tmp_path, ["another"]).ended)
    assert log_file(tmp_path).with_suffix(".log.1").read_text("utf-8") == first


def test_a_home_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(SettingsError, match="another --home"):
        Background(tmp_path, [])
