"""``dwarfstar plan``: what it prints, as JSON and for people, and how it refuses."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dwarfstar_engine.cli.main import app
from dwarfstar_engine.cli.plan import Asked, answer, running_cluster
from dwarfstar_engine.errors import DwarfStarError, PlanError
from dwarfstar_engine.model.costs import model_costs, stage_bytes
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.plan.capacity import usable_bytes
from dwarfstar_engine.plan.cluster import Kind, Link, Measured
from dwarfstar_engine.plan.forecast import Objective, Strategy
from dwarfstar_engine.plan.shown import shares
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import CoordinatorView, ModelView, NodeView, StageView, StatusView, ThroughputView
from support import gguf_bytes as g
from support.clusters import GIB

TOPOLOGIES = Path(__file__).parent.parent / "topologies"
HOMELAB, ROUNDING = TOPOLOGIES / "homelab-3.toml", TOPOLOGIES / "rounding.toml"


def invoke(home: Path, *arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner().invoke(
        app, ["plan", "--home", str(home), *map(str, arguments)], env={"COLUMNS": str(columns), "FORCE_COLOR": None}
    )


def as_json(home: Path, *arguments: str | Path) -> dict[str, Any]:
    done = invoke(home, *arguments, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def shown(home: Path, *arguments: str | Path, columns: int = 80) -> str:
    done = invoke(home, *arguments, columns=columns)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(home: Path, *arguments: str | Path) -> DwarfStarError:
    error = invoke(home, *arguments).exception
    assert isinstance(error, DwarfStarError), error
    return error


def test_json_says_who_gets_what_and_why(tmp_path: Path) -> None:
    told = as_json(tmp_path, "--topology", HOMELAB, "--strategy", "proportional")
    assert {stage["node"]: stage["layers"] for stage in told["stages"]} == {
        "tower": [0, 22],
        "workstation": [22, 33],
        "mini": [33, 40],
    }
    for stage, room in zip(told["stages"], (24, 12, 51.2), strict=True):
        assert sum(stage["memory_gib"].values()) == pytest.approx(room, abs=0.001) and stage["ms"] > 0
    assert told["bottleneck"] == "mini" and told["excluded"] == []
    assert 0 < told["predicted"]["single_tok_s"] < told["predicted"]["aggregate_tok_s"]
    assert {one["kind"] for one in told["alternatives"]} == {"single", "replicas", "split", "pipelines"}
    assert all({"kind", "nodes", "single_tok_s", "aggregate_tok_s"} <= one.keys() for one in told["alternatives"])
    assert told["take"] == "single" and told["advice"].startswith("one machine would be faster")
    fastest = as_json(tmp_path, "--topology", HOMELAB)
    assert [stage["node"] for stage in fastest["stages"]] == ["tower"]
    assert {one["node"] for one in fastest["excluded"]} == {"workstation", "mini"}


def test_a_model_by_figures_replaces_the_described_one(tmp_path: Path) -> None:
    figures = ("--layers", "80", "--weights-gib", "40", "--kv-gib", "5", "--topology", HOMELAB)
    told = as_json(tmp_path, *figures)
    assert told["stages"][-1]["layers"][1] == 80
    assert sum(stage["memory_gib"]["weights"] for stage in told["stages"]) == pytest.approx(40, rel=0.01)
    assert sum(stage["memory_gib"]["kv"] for stage in told["stages"]) == pytest.approx(5, rel=0.01)


def test_a_model_file_is_planned_by_its_own_bytes(tmp_path: Path) -> None:
    path = g.write(tmp_path / "tiny.gguf", g.llama_pairs(6), g.llama_tensors(6))
    told = as_json(tmp_path, path, "--topology", HOMELAB, "--context", "64", "--slots", "2")
    assert told["model"] == "tiny" and told["context"] == 64 and told["stages"][0]["layers"] == [0, 6]
    (tmp_path / "models").mkdir()
    path.rename(tmp_path / "models" / "other.gguf")
    assert as_json(tmp_path, "other", "--topology", HOMELAB)["model"] == "other"


def quantised(path: Path, kind: int, layers: int = 6) -> Path:
    tensors = [
        g.Tensor(one.name, one.shape, kind if len(one.shape) == 2 else one.kind) for one in g.llama_tensors(layers)
    ]
    return g.write(path, g.llama_pairs(layers), tensors)


def described(path: Path, model: Path) -> Path:
    """Two nodes; the second holds ``model``."""
    rows = [f'[[node]]\nname = "{name}"\ndevice = "gpu"\nmemory_gib = 4\n' for name in ("tower", "box")]
    path.write_text("".join(rows) + f'model = "{model}"\n', "utf-8")
    return path


def test_nodes_may_be_described_with_another_quantisation(tmp_path: Path) -> None:
    small, large = (quantised(tmp_path / f"{kind}.gguf", kind) for kind in (g.TENSOR_Q8_0, g.TENSOR_F16))
    topology = described(tmp_path / "two.toml", large)
    arguments = (small, "--topology", topology, "--strategy", "proportional", "--context", "64")
    told = {stage["node"]: stage for stage in as_json(tmp_path, *arguments)["stages"]}
    assert {node: stage["file"] for node, stage in told.items()} == {"tower": small.stem, "box": large.stem}
    a, b = told["box"]["layers"]
    asked = Asked(str(small), {}, topology, Strategy.PROPORTIONAL, Objective.SINGLE, None)
    planned = {one.node: one for one in answer(asked, Settings(home=tmp_path, context=64)).planned.plan.stages}
    assert planned["box"].weights_bytes == stage_bytes(model_costs(read_model(large)), a, b, last=b == 6)
    text = shown(tmp_path, *arguments)
    assert f"{large.stem} (" in text and f"box {a}–{b - 1}" in text
    other = described(tmp_path / "other.toml", quantised(tmp_path / "other.gguf", g.TENSOR_F16, 5))
    error = refused(tmp_path, small, "--topology", other)
    assert error.code == "model_differs" and "is 6 in 8.gguf and 5 in other.gguf" in error.message
    figures = ("--layers", "6", "--weights-gib", "1", "--topology", topology)
    assert "node.model of 'box'" in refused(tmp_path, *figures).message


def test_wishes(tmp_path: Path) -> None:
    told = as_json(tmp_path, "--topology", HOMELAB, "--exclude", "tower", "--pin", "mini=0:10")
    assert [(stage["node"], stage["layers"]) for stage in told["stages"]] == [
        ("mini", [0, 10]),
        ("workstation", [10, 40]),
    ]
    assert told["excluded"] == [{"node": "tower", "reason": "left out as you asked"}]
    lent = as_json(tmp_path, "--topology", HOMELAB, "--effective-vram", "tower=0.1", "--effective-vram", "mini=-52")
    assert [stage["node"] for stage in lent["stages"]] == ["workstation"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pin", "mini"), "--pin takes NODE=FIRST:END"),
        (("--pin", "mini=3-5"), "--pin takes NODE=FIRST:END"),
        (("--effective-vram", "tower"), "--effective-vram takes NODE=GIB"),
        (("--effective-vram", "tower=lots"), "as in 18"),
        (("--effective-vram", "nobody=3"), "no node is called 'nobody'"),
        (("--exclude", "nobody"), "no node is called 'nobody'"),
        (("--layers", "8"), "needs both --layers and --weights-gib"),
        (("--layers", "8", "--weights-gib", "-1"), "--weights-gib must be greater than 0"),
        (("model.gguf", "--layers", "8", "--weights-gib", "1"), "not both"),
        (("nothing",), "no model 'nothing'"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(tmp_path, "--topology", HOMELAB, *arguments).message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path, "--topology", tmp_path / "none.toml").message
    assert "cannot be read" in refused(tmp_path, "--topology", tmp_path).message


def test_without_a_topology_and_without_an_engine(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert "--topology FILE" in error.message and error.exit_code == 2


def test_no_plan_is_exit_3_and_says_what_would_help(tmp_path: Path) -> None:
    arguments = ("--topology", HOMELAB, "--layers", "40", "--weights-gib", "80", "--kv-gib", "10")
    done = invoke(tmp_path, *arguments, "--json")
    told = json.loads(done.stdout)["error"]
    assert done.exit_code == 3 and told["code"] == "model_too_large_for_remaining_capacity"
    assert told["options"] == ["with --kv q8_0", "with --context 2048"] and "--kv q8_0" in told["message"]
    error = refused(tmp_path, *arguments)
    assert error.exit_code == 3 and error.message == told["message"]


def test_a_saved_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    shown(tmp_path, "--topology", HOMELAB, "--strategy", "proportional", "--save", file)
    saved = tomllib.loads(file.read_text())
    assert [(stage["node"], stage["layers"]) for stage in saved["stage"]] == [
        ("tower", [0, 22]),
        ("workstation", [22, 33]),
        ("mini", [33, 40]),
    ]
    assert "cannot be written" in refused(tmp_path, "--topology", HOMELAB, "--save", tmp_path / "no" / "x").message
    assert [path.name for path in tmp_path.iterdir() if "plan" in path.name] == ["plan.toml"]


# --- for people ---


@pytest.mark.parametrize("columns", [60, 80, 120, 160])
@pytest.mark.parametrize("file", sorted(TOPOLOGIES.glob("*.toml")), ids=lambda file: file.stem)
def test_no_line_is_wider_than_the_terminal_and_there_is_no_colour_in_a_pipe(
    tmp_path: Path, columns: int, file: Path
) -> None:
    for objective in ("single", "throughput"):
        text = shown(tmp_path, "--topology", file, "--objective", objective, columns=columns)
        assert all(len(line) <= columns for line in text.splitlines()) and "\x1b" not in text
        assert "tok/s" in text and "→ " in text


def test_bars_are_of_one_length_and_figures_stand_below_each_other(tmp_path: Path) -> None:
    for columns in (80, 160):
        text = shown(tmp_path, "--topology", ROUNDING, "--strategy", "proportional", columns=columns)
        rows = [line for line in text.splitlines() if "█" in line and "weights" not in line]
        assert len(rows) > 2
        figures = [row.removesuffix(" ◀ bottleneck") for row in rows]
        assert len({row.index("█") for row in rows}) == len({len(row) for row in figures}) == 1
        assert len({sum(row.count(glyph) for glyph in "█▓▒░") for row in rows}) == 1
        assert sum("◀ bottleneck" in row for row in rows) == 1


def test_why_nodes_are_left_out_is_told(tmp_path: Path) -> None:
    text = shown(tmp_path, "--topology", HOMELAB, columns=160)
    assert "workstation: it only slows the model down: with 1 layer on it " in text
    assert "→ keep it whole on tower" in text


def test_names_are_text(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(HOMELAB.read_text().replace('"tower"', '"[red]t[/red]"'))
    assert "[red]t[/red]" in shown(tmp_path, "--topology", file, columns=160)


def test_a_bar_s_parts_fill_it() -> None:
    assert shares([50, 25, 0, 25], 20) == [10, 5, 0, 5]
    assert shares([10, 0, 0, 990], 20) == [0, 0, 0, 20]
    assert shares([20, 20, 20, 940], 20) == [1, 1, 1, 17]
    assert shares([0, 0, 0, 0], 20) == [20, 0, 0, 0]


# --- the running engine ---


def status(*nodes: NodeView, stages: tuple[StageView, ...] = ()) -> StatusView:
    return StatusView(
        coordinator=CoordinatorView(address="x", term=1, api_url="http://127.0.0.1:8080"),
        model=ModelView(name="m", architecture="llama", layers=30, legal_cuts=(1,), weights_gib=1, context=512),
        epoch=1, state="serving", reason="", nodes=nodes, stages=stages,
        throughput=ThroughputView(tok_s=0, active=0, queued=0),
    )  # fmt: skip


def node(name: str, device: str = "x86_64", state: str = "joined") -> NodeView:
    return NodeView(
        id=name, name=name, address="", state=state, device=device, memory_gib=16, used_gib=1, effective_vram_gib=8,
        heartbeat_age_s=0,
    )  # fmt: skip


def test_the_running_cluster_is_planned_with_what_was_measured() -> None:
    stage = StageView(
        node="a", layers=(0, 18), weights_gib=1, kv_gib=1, ms_per_token=2.5, tok_s=0, busy=0, wait=0, wire="f32",
        link_ms=0.4, link_mb_s=125.0, pid=1, state="ready",
    )  # fmt: skip
    last = stage.model_copy(update={"node": "b", "layers": (18, 30), "ms_per_token": 3.0, "link_mb_s": 0.0})
    views = (node("a"), node("b", "NVIDIA GeForce RTX 3090", "late"), node("gone", state="lost"))
    cluster = running_cluster(status(*views, stages=(stage, last)))
    a, b = cluster.nodes
    assert (a.devices[0].kind, b.devices[0].kind) == (Kind.CPU, Kind.GPU)
    assert usable_bytes(a) == 8 * GIB
    assert (a.measured, b.measured) == ((Measured((0, 18), 2.5),), (Measured((18, 30), 3.0, last=True),))
    assert cluster.link == Link(1.0, 0.2)
    with pytest.raises(PlanError, match="no node has joined"):
        running_cluster(status(node("gone", state="lost")))


def test_what_was_measured_counts_for_the_served_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageView(
        node="a", layers=(0, 6), weights_gib=1, kv_gib=1, ms_per_token=250.0, tok_s=0, busy=0, wait=0, wire="ids",
        link_ms=0, link_mb_s=0, pid=1, state="ready",
    )  # fmt: skip
    model = ModelView(name="tiny", architecture="llama", layers=6, legal_cuts=(), weights_gib=1, context=64)
    served = status(node("a"), stages=(stage,)).model_copy(update={"model": model})
    monkeypatch.setattr("dwarfstar_engine.cli.plan._status", lambda settings: served)
    models = tmp_path / "models"
    models.mkdir()
    for name in ("tiny", "other"):
        g.write(models / f"{name}.gguf", g.llama_pairs(6), g.llama_tensors(6))
    told = as_json(tmp_path)
    assert told["model"] == "tiny" and told["context"] == 64 and told["stages"][0]["ms"] == pytest.approx(250)
    assert as_json(tmp_path, "other")["stages"][0]["ms"] < 1
    assert as_json(tmp_path, "--layers", "6", "--weights-gib", "0.001")["stages"][0]["ms"] < 1
