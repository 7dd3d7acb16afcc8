"""What `dwarfstar status` and `dwarfstar events` print fits the terminal, and says what is not known."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dwarfstar_engine.cli.events import lines
from dwarfstar_engine.cli.status_text import status_text
from dwarfstar_engine.views import (
    CoordinatorView,
    EventsView,
    EventView,
    ModelView,
    NodeView,
    StageView,
    StatusView,
    ThroughputView,
)


def node(name: str, **live: Any) -> NodeView:
    return NodeView(
        id=name, name=name, address="10.0.0.1", state="joined", device="x", memory_gib=128.0, used_gib=5.0,
        effective_vram_gib=123.45, heartbeat_age_s=12.3, **live,
    )  # fmt: skip


def stage(name: str, **live: Any) -> StageView:
    return StageView(
        node=name, layers=(100, 128), weights_gib=1.0, kv_gib=1.0, ms_per_token=1234.56, tok_s=12.0, busy=1.0,
        wait=0.0, wire="f32", link_ms=0.1, link_mb_s=900.0, pid=4194304, state="ready", **live,
    )  # fmt: skip


def view(*nodes: NodeView, stages: tuple[StageView, ...] = ()) -> StatusView:
    return StatusView(
        coordinator=CoordinatorView(address="x", term=1, api_url="http://127.0.0.1:8080"),
        model=ModelView(name="m", architecture="llama", layers=30, legal_cuts=(1,), weights_gib=1, context=512),
        epoch=3, state="serving", reason="", nodes=nodes, stages=stages,
        throughput=ThroughputView(tok_s=5, active=1, queued=0), warnings=("look here",), last_event=41,
    )  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 126, 127, 160])
def test_rows_fit_and_stand_under_their_headings(width: int) -> None:
    live = {"free_gib": 100.25, "load": 1.0, "temperature_c": 101.0, "power_w": 1400.0}
    name = "a-machine-with-a-very-long-name"
    shown = status_text(
        view(node(name, **live), stages=(stage(name, rss_gib=100.25, rows_s=1234.5),)), width
    ).splitlines()
    heading = next(line for line in shown if line.startswith("node"))
    row = next(line for line in shown if line.startswith("a-machine"))
    assert len(heading) == len(row) <= max(80, width)
    assert row.split()[-1] == "4194304" and "100–127" in row and "41 events" in shown[1] and "! look here" in shown
    for word in ("joined", "12.3", "123.45", "100–127", "1234.56", "100%", "100.25", "4194304"):
        assert word in row.split()
    assert {"101", "1400", "1234.5"} <= set(row.split()) if width >= 127 else "°C" not in heading


def test_what_is_not_known_is_a_dash() -> None:
    shown = status_text(view(node("a"), node("b"), stages=(stage("a"),)), 160).splitlines()
    a, b = (next(line for line in shown if line.startswith(name)) for name in ("a ", "b "))
    assert a.split().count("–") == 6 and b.split().count("–") == 5 and "None" not in a + b


def test_no_nodes() -> None:
    assert "(no node has joined)" in status_text(view(), 80)


def test_events_are_lines() -> None:
    event = EventView(number=7, time_s=0.5, kind="node_lost", node="a", cause="node a is lost: x", details={"k": 1})
    missed, line = lines(EventsView(events=(event,), missed=3))
    assert missed == "(3 older events are not kept)"
    assert line.split()[0] == "7" and ".500  node_lost" in line and line.endswith("  node a is lost: x")
    missed, line = lines(EventsView(events=(event,), missed=3), as_json=True)
    assert json.loads(missed) == {"missed": 3} and json.loads(line)["details"] == {"k": 1}


def test_what_was_set_is_marked() -> None:
    shown = status_text(view(node("a").model_copy(update={"override": "50%"}), node("b")), 80)
    marked, bare = (next(line for line in shown.splitlines() if line.startswith(name)) for name in ("a ", "b "))
    assert "123.45*" in marked and "*" not in bare and "* as it was set" in shown
    assert "*" not in status_text(view(node("b")), 80)


def test_several_pipelines_are_told_of() -> None:
    two = view(node("a"), node("b"), node("c"), stages=(stage("b", pipeline=1), stage("c")))
    shown = status_text(two, 80).splitlines()
    assert "· 2 pipelines ·" in shown[0]
    at = shown.index("pipeline 0")
    assert [line.split()[0] for line in shown[at + 1 : at + 6]] == ["c", "pipeline", "b", "in", "a"]
    assert "pipelines" not in status_text(view(node("a"), stages=(stage("a"),)), 80)
