"""``dwarfstar plan``: who would get which layers, how fast that would be, and what else there is.

The cluster is described in a file, or is the one that runs from this home; the model is a GGUF file, or figures. What
is decided is decided in :mod:`dwarfstar_engine.plan`; here its inputs are gathered and its answer is told.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.errors import DwarfStarError, PlanError, SettingsError
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.same_base import same_base
from dwarfstar_engine.node.files import differs, read_base
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.source import DEFAULT_CONTEXT, DEMO, DEMO_FILE, Source, open_source
from dwarfstar_engine.plan.advisor import Advice, advise
from dwarfstar_engine.plan.capacity import parse_override
from dwarfstar_engine.plan.cluster import Cluster, Device, Kind, Link, Measured, Node
from dwarfstar_engine.plan.forecast import Job, Objective, Planned, Strategy, Wishes
from dwarfstar_engine.plan.planner import plan_cluster
from dwarfstar_engine.plan.remedy import DoesNotFitError, explained, tight
from dwarfstar_engine.plan.shown import plan_view
from dwarfstar_engine.plan.topology import MAX_BYTES, ModelShape, read_topology
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import PlanView, StatusView

GIB = 1 << 30
GPU_WORDS = ("nvidia", "geforce", "radeon", "cuda", "rocm", "metal", "vulkan", "gpu", "rtx", "apple")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line said."""

    model: str | None
    shape: dict[str, Any]  # of a model without a file
    topology: Path | None
    strategy: Strategy
    objective: Objective
    context: int | None
    exclude: Sequence[str] = ()
    pin: Sequence[str] = ()
    lend: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What is told. name: of the model."""

    name: str
    job: Job
    planned: Planned
    advice: Advice


def answer(asked: Asked, settings: Settings) -> Answer:
    """Plan. Raises DwarfStarError: of the model, of the topology, or that there is no plan."""
    shape: ModelShape | None = None
    status: StatusView | None = None
    files: Mapping[str, str] = {}
    if asked.topology is not None:
        described = read_topology(_read(asked.topology), str(asked.topology))
        cluster, shape, files = described.cluster, described.model, described.files
    else:
        status = _status(settings)
        cluster = running_cluster(status)
    name, job = _job(asked, settings, shape, status, files)
    served = status.model.name if status is not None and status.model else ""
    if status is not None and name != served:  # what was measured was of another model
        cluster = replace(cluster, nodes=tuple(replace(node, measured=()) for node in cluster.nodes))
    cluster = replace(cluster, nodes=_lent(cluster.nodes, asked.lend))
    wishes = Wishes(pins=pins_of(asked.pin), excluded=frozenset(asked.exclude))
    try:
        planned = plan_cluster(cluster, job, asked.strategy, asked.objective, wishes)
    except PlanError as error:
        raise explained(cluster, job, wishes, error) from None
    planned = replace(planned, options=tight(job, planned.forecast))
    return Answer(name, job, planned, advise(cluster, job, planned, wishes))


# --- what is given ---


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None


def _status(settings: Settings) -> StatusView:
    engine = running.find(settings.home)
    if engine is None:
        raise SettingsError(
            "no engine runs here whose nodes could be planned for: describe a cluster with --topology FILE, or start "
            "one with `dwarfstar --serve`"
        )
    return remote.status(engine, settings.home)


def running_cluster(status: StatusView) -> Cluster:
    """The nodes of a running engine, with what is known of its stages and links; bandwidths are taken as usual."""
    nodes = []
    for node in status.nodes:
        if node.state not in ("joined", "late"):
            continue
        gpu = any(word in node.device.lower() for word in GPU_WORDS)
        usable = int(node.effective_vram_gib * GIB)
        device = Device(Kind.GPU if gpu else Kind.CPU, max(usable, int(node.memory_gib * GIB)), usable_bytes=usable)
        layers = status.model.layers if status.model else 0
        ran = tuple(
            Measured(stage.layers, stage.ms_per_token, last=stage.layers[1] == layers)
            for stage in status.stages
            if stage.node == node.name and stage.ms_per_token > 0
        )
        nodes.append(Node(node.name, (device,), measured=ran))
    if not nodes:
        raise PlanError("no node has joined the engine yet: start one with `dwarfstar node`", code="no_nodes")
    links = [stage for stage in status.stages if stage.link_mb_s > 0]
    if not links:
        return Cluster(tuple(nodes))
    slowest = min(stage.link_mb_s for stage in links)
    return Cluster(tuple(nodes), Link(slowest * 8 / 1000, max(stage.link_ms for stage in links) / 2))


def _job(
    asked: Asked, settings: Settings, shape: ModelShape | None, status: StatusView | None, files: Mapping[str, str]
) -> tuple[str, Job]:
    """The model: figures on the command line, else its name, else what the topology or the engine has. files: by node,
    other quantisations of it."""
    if asked.shape:
        if asked.model is not None:
            raise SettingsError("give a model or --layers and --weights-gib, not both")
        shape = _shape(asked.shape)
    elif asked.model is not None or shape is None:
        served = status.model if status is not None else None
        if asked.model is None and served is None:
            raise SettingsError("no model is named: give a GGUF file, 'demo', or --layers and --weights-gib")
        if asked.model is None and served is not None:
            name = DEMO if served.name == Path(DEMO_FILE).stem else served.name
            return file_job(name, settings, served.context, files)
        return file_job(asked.model or "", settings, None, files)
    if files:
        raise SettingsError(f"node.model of {min(files)!r} is a file: then name the model it is of by a file, too")
    job = shape.job(asked.context)
    weights = job.costs.total / GIB
    return f"{shape.layers} layers, {weights:.1f} GiB", job


def _shape(given: dict[str, Any]) -> ModelShape:
    if "layers" not in given or "weights_gib" not in given:
        raise SettingsError("a model without a file needs both --layers and --weights-gib")
    try:
        return ModelShape(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{'-'.join(str(part) for part in first['loc'])} ".replace("_", "-") if first["loc"] else ""
        said = first["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
        raise SettingsError(f"{option}{said}") from None


def file_job(name: str, settings: Settings, served: int | None, files: Mapping[str, str]) -> tuple[str, Job]:
    """A model file's name and figures. Raises DwarfStarError. served: the context it is served with now, if it is.
    files: those of other quantisations, by node."""
    source = open_source(name, settings.models_dir, settings.kv)
    context = settings.context or served or min(source.train_context, DEFAULT_CONTEXT)
    job = Job(source.costs, source.cuts, need(settings, source, context), context, kv_type=settings.kv)
    others = _others(source, settings, files)
    job = replace(
        job,
        by_node={node: other.costs for node, other in others.items()},
        file=(source.name, source.quantisation),
        files={node: (other.name, other.quantisation) for node, other in others.items()},
    )
    return source.name, replace(job, depth=min(job.depth, context))


def _others(source: Source, settings: Settings, files: Mapping[str, str]) -> dict[str, Source]:
    """The files that nodes hold in the place of ``source``. Raises ModelError: one is another model."""
    if not files:
        return {}
    base, served, found = read_base(read_model(source.path)), Path(source.path).name, dict[str, Source]()
    for node, file in files.items():
        other = open_source(file, settings.models_dir, settings.kv)
        there = Path(other.path).name
        if (difference := same_base(base, read_base(read_model(other.path)), served, there)) is not None:
            raise differs(node, there, served, difference)
        found[node] = other
    return found


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise SettingsError(f"--{option} takes NODE={form} (given: {text!r})")
    return name, value


def _lent(nodes: Sequence[Node], given: Sequence[str]) -> tuple[Node, ...]:
    """With ``--effective-vram NODE=18`` applied."""
    said = dict(_pair(text, "effective-vram", "GIB") for text in given)
    names = [node.name for node in nodes]
    for name in said.keys() - set(names):
        raise SettingsError(f"--effective-vram: no node is called {name!r}; there are {', '.join(names)}")
    return tuple(
        replace(node, override=parse_override(said[node.name])) if node.name in said else node for node in nodes
    )


def pins_of(given: Sequence[str]) -> dict[str, tuple[int, int]]:
    """``NODE=0:12``: layers 0 … 11."""
    found = {}
    for text in given:
        name, value = _pair(text, "pin", "FIRST:END")
        first, colon, end = value.partition(":")
        if not (colon and first.isdecimal() and end.isdecimal()):
            raise SettingsError(f"--pin takes NODE=FIRST:END, as in tower=0:12 (given: {text!r})")
        found[name] = (int(first), int(end))
    return found


# --- what is told ---


def view(told: Answer) -> PlanView:
    """The plan as design and docs describe it."""
    return plan_view(told.name, told.job, told.planned, told.advice)


def as_json(told: Answer) -> dict[str, Any]:
    """The same, without what only a running plan has."""
    return view(told).model_dump(mode="json", exclude_none=True)


def error_json(error: DwarfStarError) -> dict[str, Any]:
    told: dict[str, Any] = {"code": error.code, "message": error.message}
    if isinstance(error, DoesNotFitError):
        told["options"] = list(error.options)
    return {"error": told}


def save(told: PlanView, kv: str, path: Path) -> None:
    """Write a plan as TOML, whole or not at all. Raises SettingsError."""
    stages = [{"node": stage.node, "layers": list(stage.layers)} for stage in told.stages]
    kept = {"model": told.model, "context": told.context, "kv": kv, "stage": stages}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(tomli_w.dumps(kept).encode())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None


def show(asked: Asked, settings: Settings, *, json_wanted: bool, save_to: Path | None) -> None:
    """The whole command."""
    try:
        told = answer(asked, settings)
        if save_to is not None:
            save(view(told), told.job.kv_type, save_to)
    except DwarfStarError as error:
        if not json_wanted:
            raise
        print(json.dumps(error_json(error), indent=2))
        raise SystemExit(error.exit_code) from None
    if json_wanted:
        print(json.dumps(as_json(told), indent=2))
        return
    from rich.console import Console

    from dwarfstar_engine.cli.plan_view import render

    console = Console(file=sys.stdout, highlight=False)
    for part in render(view(told), console.width):
        console.print(part)
