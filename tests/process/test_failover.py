"""The coordinator is lost: another node that can lead takes over, with the stages as they are, and the old one yields.

An engine that lends (next to) nothing and three nodes, each a process with a home of its own, on loopback. Two of the
nodes can lead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.node.kept import Kept
from dwarfstar_engine.node.kept_plan import from_text
from dwarfstar_engine.views import StatusView
from process.test_join import Started, started, token_line
from support.engine_process import DEADLINE_S, EngineProcess, until

pytestmark = pytest.mark.process

TOY = "toy:9"
CAN_LEAD = ("attic", "barn")
NODES = (*CAN_LEAD, "cellar")
BAR_S = 10.0
CALL_S = 5.0
BODY = {"prompt": "abc", "max_tokens": 6, "temperature": 0}


@dataclass
class Cluster:
    folder: Path
    engine: EngineProcess
    nodes: dict[str, Started]
    arguments: tuple[str, ...]

    def home(self, name: str) -> Path:
        return self.folder / name

    def url(self, name: str) -> str:
        return running.require(self.home(name)).api_url

    def status(self, name: str) -> StatusView | None:
        """As a node that can lead sees it; None while it does not answer."""
        try:
            return remote.status(running.require(self.home(name)), self.home(name))
        except DwarfStarError:
            return None

    def leader(self) -> str:
        """The node that leads and serves; empty: none."""
        for name in CAN_LEAD:
            status = self.status(name)
            if status is not None and status.coordinator.leads and status.state == "serving":
                return name
        return ""

    def pids(self, status: StatusView | None) -> dict[str, int]:
        return {} if status is None else {stage.node: stage.pid for stage in status.stages}

    def output(self) -> str:
        parts = [f"--- {name}\n{node.output[-3000:]}" for name, node in self.nodes.items()]
        return f"{self.engine.output[-3000:]}\n" + "\n".join(parts)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """A failure comes with what the processes said."""
        try:
            yield
        except (AssertionError, httpx.HTTPError, DwarfStarError) as error:
            raise AssertionError(f"{error!r}\n{self.output()}") from error


def ask(url: str) -> httpx.Response | None:
    """An answer of status 200, or None."""
    try:
        answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=CALL_S)
    except httpx.HTTPError:
        return None
    return answer if answer.status_code == 200 else None


@contextlib.contextmanager
def stream(url: str) -> Iterator[Iterator[str]]:
    """A long answer, piece by piece."""
    body = {**BODY, "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=DEADLINE_S) as answer:
        yield answer.iter_text()


def text(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["text"])


@contextlib.contextmanager
def cluster(folder: Path, model: str, *options: str) -> Iterator[Cluster]:
    home = folder / "head"
    arguments = (model, "--wait-nodes", "4", "--effective-vram", "0.0001", *options)
    with contextlib.ExitStack() as stack:
        engine = EngineProcess(home, *arguments, variables={"DWARFSTAR_NAME": "head"})
        stack.enter_context(engine)
        until(lambda: (home / "run" / "engine.json").exists(), "the engine runs")
        line, nodes = token_line(home), {}
        for name in NODES:
            more = ["--home", str(folder / name), "--effective-vram", "1", "--threads", "1"]
            more += ["--can-lead", "--port", "0"] if name in CAN_LEAD else []
            nodes[name] = stack.enter_context(started(folder / f"{name}.log", [*line, *more], name))
        it = Cluster(folder, engine, nodes, arguments)
        with it.told():
            engine.wait_serving()
            for name in CAN_LEAD:
                until(partial(understudy, it, name), f"{name} could lead")
        yield it


def plan_kept(home: Path) -> int:
    """Stages of the plan that a node keeps."""
    plan = from_text(Kept(home / "member" / "lead").state().wishes.get("plan"), (), 0.0)
    return len(plan.nodes) if plan else 0


def understudy(it: Cluster, name: str) -> bool:
    """Whether this node could lead now, with all stages as they are."""
    return plan_kept(it.home(name)) == len(NODES) and "ready to lead" in it.nodes[name].output


def take_over(it: Cluster, fault: Callable[[], None]) -> tuple[str, float]:
    """Cause the fault. Who leads then, and after how many seconds a request was answered there."""
    began = time.monotonic()
    fault()
    leader = until(it.leader, "another node leads", DEADLINE_S)
    until(lambda: ask(it.url(leader)), "it answers")
    return leader, time.monotonic() - began


def run(folder: Path, model: str, *options: str) -> None:
    with cluster(folder, model, *options) as it, it.told():
        engine = it.engine
        before = engine.status()
        assert {stage.node for stage in before.stages} == set(NODES) and before.coordinator.leads
        said = until(lambda: ask(engine.url), "the engine answers")
        assert said is not None
        for name in CAN_LEAD:  # they forward
            answer = ask(it.url(name))
            assert answer is not None and text(answer) == text(said)
        old = engine.url
        with stream(it.url(CAN_LEAD[0])) as pieces:  # forwarded as it is written
            assert "data: " in next(pieces)
            leader, took_s = take_over(it, lambda: engine.kill(engine.pid))
            with pytest.raises(httpx.RemoteProtocolError):  # it ends, and not as if it were whole
                list(pieces)
        print(f"{model}: kill -9 to the first answer {took_s:.1f} s")
        assert took_s <= BAR_S
        status = it.status(leader)
        assert status is not None and status.coordinator.term > before.coordinator.term
        assert it.pids(status) == it.pids(before), "no stage was started anew"
        answers = [answer for url in (old, *map(it.url, CAN_LEAD)) if (answer := ask(url)) is not None]
        assert [text(answer) for answer in answers] == [text(said)] * 2, "a client with several addresses goes on"


def test_a_killed_coordinator_is_replaced_and_no_stage_loads_again(tmp_path: Path) -> None:
    run(tmp_path, TOY)


def test_a_killed_coordinator_is_replaced_with_a_real_model(tmp_path: Path, demo_model: Path) -> None:
    run(tmp_path, str(demo_model), "--context", "256", "--slots", "1")


def test_a_stopped_coordinator_steps_down_when_it_goes_on(tmp_path: Path) -> None:
    with cluster(tmp_path, TOY) as it, it.told():
        engine, before = it.engine, it.engine.status()
        leader, took_s = take_over(it, lambda: os.kill(engine.pid, signal.SIGSTOP))
        print(f"SIGSTOP to the first answer {took_s:.1f} s")
        os.kill(engine.pid, signal.SIGCONT)
        until(lambda: not engine.status().coordinator.leads, "the old one steps down")
        until(lambda: engine.status().state == "following", "it knows who leads")
        followed = engine.status()
        led = it.status(leader)
        assert led is not None and followed.coordinator.leader == led.coordinator.leader
        assert followed.coordinator.term == led.coordinator.term > before.coordinator.term
        assert it.pids(led) == it.pids(before)
        until(lambda: ask(engine.url), "it forwards")
        assert it.leader() == leader


def test_a_coordinator_that_is_started_again_follows_and_can_lead_again(tmp_path: Path) -> None:
    with cluster(tmp_path, TOY) as it, it.told():
        before = it.engine.status()
        leader, _ = take_over(it, lambda: it.engine.kill(it.engine.pid))
        with EngineProcess(it.engine.home, *it.arguments, variables={"DWARFSTAR_NAME": "head"}) as again:
            until(lambda: (again.home / "run" / "engine.json").exists(), "the engine runs")
            again.wait_serving()  # it forwards
            status = again.status()
            assert not status.coordinator.leads and it.leader() == leader
            first = it.status(leader)
            assert first is not None and it.pids(first) == it.pids(before)
            for name in CAN_LEAD:
                os.kill(it.nodes[name].process.pid, signal.SIGKILL)
            until(lambda: again.status().coordinator.leads, "the engine leads again")
            assert again.status().coordinator.term > first.coordinator.term > before.coordinator.term
