"""Asking the running engine, over its control plane, with this home's own certificate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc

from dwarfstar_engine.cli import running
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.views import StatusView
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import ControlStub
from dwarfstar_engine.wire.trust import NodeFiles

CALL_S = 5.0
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION)  # with a sentence for people
STOP_S = 15.0  # until a stopped engine's process is gone


def _call(engine: running.Running, home: Path, name: str, request: Any) -> Any:
    credentials = channel.channel_credentials(NodeFiles(home / engine.trust))
    options = channel.channel_options(channel.MAX_CONTROL_BYTES)
    with grpc.secure_channel(engine.control, credentials, options=options) as link:
        try:
            return getattr(ControlStub(link), name)(request, timeout=CALL_S)
        except grpc.RpcError as error:
            detail = error.details() if isinstance(error, grpc.Call) else error
            if isinstance(error, grpc.Call) and error.code() in REFUSED:
                raise DwarfStarError(str(detail)) from None
            raise DwarfStarError(f"the engine at {engine.control} does not answer: {detail}") from None


def status(engine: running.Running, home: Path) -> StatusView:
    """The engine's status. Raises DwarfStarError."""
    return StatusView.model_validate_json(_call(engine, home, "Status", pb.StatusRequest()).json)


def status_json(engine: running.Running, home: Path) -> str:
    """The status as JSON, indented."""
    return status(engine, home).model_dump_json(indent=2)


def stop(engine: running.Running, home: Path) -> None:
    """End the engine, and wait until it is gone. Raises DwarfStarError."""
    _call(engine, home, "Stop", pb.StopRequest())
    deadline = time.monotonic() + STOP_S
    while not running.gone(engine):
        if time.monotonic() > deadline:
            raise DwarfStarError(f"the engine (process {engine.pid}) has not ended after {STOP_S:.0f} s")
        time.sleep(0.05)


def remove_node(engine: running.Running, home: Path, wanted: str) -> tuple[str, str, bool]:
    """(id, name, whether it was attached) of the node removed. Raises DwarfStarError."""
    reply = _call(engine, home, "RemoveNode", pb.RemoveNodeRequest(node=wanted))
    return reply.node_id, reply.name, reply.attached


def status_text(engine: running.Running, home: Path) -> str:
    """The status for people, at most 80 columns for usual names."""
    view = status(engine, home)
    if not view.coordinator.leads:
        return f"{view.state}: term {view.coordinator.term} · {view.coordinator.api_url}\n  {view.reason}"
    model = f"{view.model.name}, {view.model.layers} layers" if view.model else "no model"
    lines = [
        f"{view.state}: {model} · epoch {view.epoch} · {view.coordinator.api_url}",
        *([f"  {view.reason}"] if view.reason else []),
        f"  {view.throughput.tok_s:.1f} tok/s, {view.throughput.active} active, {view.throughput.queued} queued",
        "",
        f"{'node':16}{'state':8}{'beat s':>7}{'lends GiB':>11}{'layers':>10}{'ms/tok':>8}{'busy':>6}{'pid':>9}",
    ]
    stages = {stage.node: stage for stage in view.stages}
    for node in view.nodes:
        row = f"{node.name[:15]:16}{node.state:8}{node.heartbeat_age_s:7.1f}{node.effective_vram_gib:11.2f}"
        if (stage := stages.get(node.name)) is not None:
            layers = f"{stage.layers[0]}–{stage.layers[1] - 1}"
            row += f"{layers:>10}{stage.ms_per_token:8.2f}{stage.busy:6.0%}{stage.pid:9}"
        else:
            row += f"{'–':>10}"
        lines.append(row)
    if not view.nodes:
        lines.append("(no node has joined)")
    lines += [f"! {warning}" for warning in view.warnings]
    return "\n".join(lines)
