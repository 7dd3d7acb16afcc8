"""``dwarfstar plan`` on a running engine: what it shows, when it asks, and what it refuses. The engine is played."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dwarfstar_engine.cli import plan_running, remote, running
from dwarfstar_engine.cli.main import app
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.plan.advisor import advise
from dwarfstar_engine.plan.cost import cluster_costs
from dwarfstar_engine.plan.forecast import Objective, Strategy
from dwarfstar_engine.plan.propose import Wanted, propose
from dwarfstar_engine.plan.shown import delta_views, plan_view
from dwarfstar_engine.views import CommitView, OverrideView, PlanRequest, PlanView, ProposalView, ReadView, StatusView
from unit.test_propose import JOB, cluster

THERE = cluster(24, 24)


def plan(*cuts: int, measured: tuple[float, ...] = ()) -> PlanView:
    planned = propose(THERE, JOB, Wanted(Strategy.FASTEST, Objective.SINGLE, cuts)).planned
    return plan_view("m", JOB, planned, advise(THERE, JOB, planned), strategy="given", measured_ms=measured)


def proposed(*cuts: int) -> ProposalView:
    wanted = [Wanted(Strategy.FASTEST, Objective.SINGLE, one) for one in ((10,), cuts)]
    old, new = (propose(THERE, JOB, one).planned.plan for one in wanted)
    delta = delta_views(cluster_costs(THERE, JOB), old, new)
    present = plan(10, measured=(3.0, 4.0))
    return ProposalView(epoch=7, legal_cuts=JOB.legal, present=present, proposed=plan(*cuts), delta=delta, tok_s=12.5)


class Engine:
    """What was asked of it."""

    def __init__(self) -> None:
        self.asked: list[PlanRequest] = []
        self.committed: list[tuple[PlanRequest, int]] = []
        self.answer = proposed(12)

    def plan(self, _engine: Any, _home: Path, request: PlanRequest) -> ProposalView:
        self.asked.append(request)
        return self.answer

    def commit(self, _engine: Any, _home: Path, request: PlanRequest, epoch: int) -> CommitView:
        self.committed.append((request, epoch))
        reads = (ReadView(node="a", layers=(0, 12), read_gib=1.5),)
        return CommitView(epoch=8, loaded_first=True, before=plan(10), after=plan(12), reads=reads)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    played = Engine()
    there = running.Running(pid=1, started=0.0, control="127.0.0.1:1", api_url="http://x")
    monkeypatch.setattr(running, "find", lambda home: there)
    monkeypatch.setattr(remote, "plan", played.plan)
    monkeypatch.setattr(remote, "commit", played.commit)
    monkeypatch.setattr(remote, "status", lambda *_: StatusView.model_construct(model=None))
    yield played


def invoke(home: Path, *arguments: str, said: str = "") -> Result:
    return CliRunner().invoke(app, ["plan", "--home", str(home), *arguments], input=said, env={"COLUMNS": "80"})


def shown(home: Path, *arguments: str) -> str:
    done = invoke(home, *arguments)
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith("dwarfstar:"))
    return done.stdout


def test_the_plan_that_runs_has_measured_beside_predicted(engine: Engine, tmp_path: Path) -> None:
    text = shown(tmp_path)
    assert "epoch 7 serves, 12.5 tok/s now" in text and "alternative" in text
    assert text.splitlines()[3].split()[-2:] == ["ms", "now"] and "3.00" in text
    assert "the planner would take a 0–11, b 12–19" in text
    assert engine.asked == [PlanRequest()] and not engine.committed


def test_a_proposal_shows_the_difference_and_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    text = shown(tmp_path, "--cuts", "12", "--strategy", "fastest", "--exclude", "x", "--pin", "a=0:12")
    assert "predicted: one stream" in text and "a: loads 10–11 (2.00 GiB); 12.00 GiB are left" in text
    assert "b: drops 10–11 (2.00 GiB)" in text and not engine.committed
    assert engine.asked == [PlanRequest(cuts=(12,), strategy="fastest", excluded=("x",), pins={"a": (0, 12)})]
    told = json.loads(invoke(tmp_path, "--cuts", "12", "--json").stdout)
    assert told["stages"] == told["proposed"]["stages"] and told["epoch"] == 7 and told["delta"]


def test_it_is_carried_out_only_if_somebody_agrees(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = invoke(tmp_path, "--cuts", "12", "--commit").exception
    assert isinstance(error, DwarfStarError) and "--yes" in error.message and not engine.committed
    answers = iter([False, True])
    monkeypatch.setattr(plan_running, "_agreed", lambda: next(answers))
    assert "nothing was changed" in shown(tmp_path, "--cuts", "12", "--commit") and not engine.committed
    text = shown(tmp_path, "--cuts", "12", "--commit")
    assert engine.committed == [(PlanRequest(cuts=(12,)), 7)]
    assert "epoch 8 serves: a 0–11, b 12–19; a read 1.50 GiB from its disk" in text


def test_what_is_not_as_asked_is_not_carried_out(engine: Engine, tmp_path: Path) -> None:
    engine.answer = engine.answer.model_copy(update={"clamped": ("12 became 11: why",)})
    error = invoke(tmp_path, "--cuts", "12", "--commit", "--yes").exception
    assert isinstance(error, DwarfStarError) and not engine.committed
    engine.answer = engine.answer.model_copy(update={"proposed": None, "error": "no room", "code": "full"})
    told = json.loads(invoke(tmp_path, "--cuts", "12", "--commit", "--yes", "--json").stdout)
    assert told == {"error": {"code": "full", "message": "no room"}} and not engine.committed


def test_a_saved_plan_is_applied(engine: Engine, tmp_path: Path) -> None:
    saved = tmp_path / "plan.toml"
    shown(tmp_path, "--cuts", "12", "--save", str(saved))
    shown(tmp_path, "--apply", str(saved), "--yes")
    assert engine.committed == [(PlanRequest(cuts=(12,), order=("a", "b")), 7)]
    saved.write_text("model = 1\n")
    assert "is no plan" in str(invoke(tmp_path, "--apply", str(saved), "--yes").exception)
    assert "cannot be read" in str(invoke(tmp_path, "--apply", str(tmp_path / "none"), "--yes").exception)


def test_described_clusters_are_not_steered(engine: Engine, tmp_path: Path) -> None:
    error = invoke(tmp_path, "--topology", "x.toml", "--commit").exception
    assert isinstance(error, DwarfStarError) and "takes no --topology" in error.message and not engine.asked


@pytest.mark.parametrize(("value", "text"), [("18", "18"), ("-2", "-2"), ("50%", "50%"), ("reset", "")])
def test_an_override_is_said_in_words(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, text: str
) -> None:
    asked: list[tuple[str, str, bool]] = []

    def override(_engine: Any, _home: Path, node: str, said: str, *, replan: bool) -> OverrideView:
        asked.append((node, said, replan))
        return OverrideView(node=node, override=said, effective_vram_gib=1.5, replanned=replan)

    monkeypatch.setattr(remote, "override", override)
    done = CliRunner().invoke(app, ["node", "override", "tower", value, "--replan", "--home", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert asked == [("tower", text, True)] and "tower lends 1.50 GiB" in done.output and "were moved" in done.output
