"""Processes killed and stopped: what the events of the engine say of it, in which order, and how soon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.views import EventView
from support.engine_process import DEADLINE_S, PROGRAM, EngineProcess, command, environment, until

pytestmark = pytest.mark.process

MODEL = "toy:12:5"  # 5 ms a frame and stage
LOST_S = 2.0
TIMES = {"DWARFSTAR_HEARTBEAT_S": "0.4", "DWARFSTAR_LATE_S": "1", "DWARFSTAR_LOST_S": str(LOST_S)}
SOON_S = 2.0  # for news that needs no time-out, on a machine that others use, too


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("events") / "home"
    settings = {**TIMES, "DWARFSTAR_REJOIN_S": "0"}
    with EngineProcess(home, MODEL, "--local-nodes", "3", variables=settings) as engine:
        yield engine.wait_serving()


def events(engine: EngineProcess, since: int = 0) -> list[EventView]:
    batches = list(remote.events(running.require(engine.home), engine.home, since, follow=False))
    assert not any(batch.missed for batch in batches)
    return [event for batch in batches for event in batch.events]


def kinds(found: list[EventView]) -> list[str]:
    return [event.kind for event in found]


def first(found: list[EventView], kind: str, node: str = "") -> EventView:
    return next(event for event in found if event.kind == kind and node in ("", event.node))


def in_order(found: list[EventView], *wanted: str) -> None:
    """Each kind once, one behind the other."""
    said = kinds(found)
    assert [said.count(kind) for kind in wanted] == [1] * len(wanted), said
    places = [said.index(kind) for kind in wanted]
    assert places == sorted(places), said


@contextmanager
def stream(engine: EngineProcess) -> Iterator[Callable[[], str]]:
    """A text that is being written; what gives its end."""
    body = {"prompt": "events", "max_tokens": 400, "temperature": 0, "stream": True}
    said: list[str] = []
    with httpx.stream("POST", engine.url + "/v1/completions", json=body, timeout=DEADLINE_S) as answer:
        lines = answer.iter_lines()

        def read() -> None:
            said.extend(line for line in lines if line.startswith("data: "))

        while len(said) < 3:
            if (line := next(lines)).startswith("data: "):
                said.append(line)
        reader = threading.Thread(target=read)
        reader.start()

        def end() -> str:
            reader.join(DEADLINE_S)
            return said[-1]

        yield end


def settled(engine: EngineProcess) -> int:
    """All nodes serve; the number of the last event."""
    engine.wait_idle()
    # After a loss a node may have two stages for a while, so that the others keep what they have.
    until(lambda: len({stage.node for stage in engine.status().stages}) == 3, "all nodes have their share")
    engine.wait_serving()
    return engine.status().last_event


def test_from_the_start_everything_is_told_in_order(engine: EngineProcess) -> None:
    number = settled(engine)
    found = events(engine)
    assert [event.number for event in found] == list(range(1, number + 1))
    assert found[0].kind == "settings" and "lost_s = 2.0" in found[0].cause
    assert {event.node for event in found if event.kind == "node_joined"} == {"node1", "node2", "node3"}
    made = [event for event in found if event.kind == "plan_made"][-1]
    assert made.details["stages"] == "node1:0-4,node2:4-8,node3:8-12"
    assert kinds(found).count("model_loaded") == 1
    listed = json.loads(command("events", "--json", "--home", str(engine.home)).stdout)
    assert [event["number"] for event in listed["events"]] == list(range(1, number + 1)) and listed["missed"] == 0
    text = command("events", "--since", str(number - 1), "--home", str(engine.home)).stdout.splitlines()
    assert len(text) == 1 and text[0].split()[0] == str(number)


def test_a_killed_stage_is_named_with_its_signal(engine: EngineProcess) -> None:
    since = settled(engine)
    pid = engine.stage(1).pid
    with stream(engine) as end:
        struck = time.time()
        engine.kill(pid)
        assert end() == "data: [DONE]"
    settled(engine)
    found = events(engine, since)
    found = found[: kinds(found).index("streams_resumed") + 1]  # a better division may come later
    in_order(found, "stage_failed", "epoch_over", "streams_waiting", "plan_made", "epoch_up", "streams_resumed")
    failed = first(found, "stage_failed")
    assert (failed.node, failed.details["pid"]) == ("node2", pid) and "ended with signal 9" in failed.cause
    assert first(found, "streams_waiting").details["streams"] == first(found, "streams_resumed").details["streams"] == 1
    assert failed.cause in first(found, "epoch_over").cause
    assert failed.time_s - struck < SOON_S
    assert kinds(found).count("stage_ready") == 3


def test_a_killed_node_is_lost_and_comes_back(engine: EngineProcess) -> None:
    since = settled(engine)
    struck = time.time()
    engine.kill(engine.node_pid("node2"))
    until(lambda: "node_rejoined" in kinds(events(engine, since)), "it is back")
    settled(engine)
    found = events(engine, since)
    assert kinds(found)[:2] == ["node_lost", "epoch_over"]
    in_order(found, "node_lost", "node_rejoined")
    lost = first(found, "node_lost")
    assert lost.node == "node2" and "its connection broke: its process ended" in lost.cause
    assert lost.time_s - struck < SOON_S
    assert "node2 was lost" in first(found, "epoch_over").cause or lost.cause in first(found, "epoch_over").cause
    assert first(found, "node_rejoined").details["rejoins"] == 1


def test_a_stopped_node_is_late_then_lost_and_is_back_when_it_wakes(engine: EngineProcess) -> None:
    since = settled(engine)
    pid = engine.node_pid("node3")
    struck = time.time()
    engine.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: "node_lost" in kinds(events(engine, since)), "it is lost")
        until(lambda: "epoch_up" in kinds(events(engine, since)), "the others go on without it")
        told = events(engine, since)
    finally:
        engine.kill(pid, signal.SIGCONT)
    until(lambda: "node_rejoined" in kinds(events(engine, since)), "it is back")
    settled(engine)
    in_order(told, "node_late", "node_lost", "epoch_over", "plan_made", "epoch_up")
    late, lost = first(told, "node_late"), first(told, "node_lost")
    assert late.node == lost.node == "node3" and "nothing was heard of it for" in lost.cause
    assert lost.time_s - struck < LOST_S + 1.0 + SOON_S
    assert "node3" in first(told, "epoch_over").cause and "node3" not in str(first(told, "plan_made").details["stages"])
    found = events(engine, since)
    assert [kind for kind in kinds(found) if kind.startswith("node_")] == ["node_late", "node_lost", "node_rejoined"]


def test_a_front_end_that_follows_is_told_at_once_and_ends_with_the_engine(engine: EngineProcess) -> None:
    since = settled(engine)
    arguments = [*PROGRAM, "events", "--follow", "--json", "--since", str(since), "--home", str(engine.home)]
    # A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that.
    kept = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        follower = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment())
    finally:
        signal.signal(signal.SIGINT, kept)
    with follower:
        try:
            engine.kill(engine.stage(0).pid)
            assert follower.stdout is not None
            told = [json.loads(follower.stdout.readline()) for _ in range(3)]
            assert [event["number"] for event in told] == [since + 1, since + 2, since + 3]
            assert "stage_failed" in [event["kind"] for event in told]
            os.kill(follower.pid, signal.SIGINT)
            assert follower.wait(DEADLINE_S) == 0
        finally:
            follower.kill()
    settled(engine)
