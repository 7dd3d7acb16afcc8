"""Asking the running engine, over its control plane, with this home's own certificate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from dwarfstar_engine.cli import running
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.views import (
    CommitView,
    EventsView,
    LoadRequest,
    LoadView,
    OverrideView,
    PlanRequest,
    ProposalView,
    StatusView,
)
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import ControlStub
from dwarfstar_engine.wire.trust import NodeFiles

CALL_S = 5.0
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION)  # with a sentence for people
DRAIN_S = 600.0  # a node's layers may have to be loaded from slow disks
LOAD_S = 1260.0  # requests finish, a model is loaded, and perhaps the one before once more
PLAN_S = 60.0  # a search over many nodes
STOP_S = 15.0  # until a stopped engine's process is gone


def _call(engine: running.Running, home: Path, name: str, request: Any, timeout_s: float = CALL_S) -> Any:
    credentials = channel.channel_credentials(NodeFiles(home / engine.trust))
    options = channel.channel_options(channel.MAX_CONTROL_BYTES)
    with grpc.secure_channel(engine.control, credentials, options=options) as link:
        try:
            return getattr(ControlStub(link), name)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise said(error, engine) from None


def said(error: grpc.RpcError, engine: running.Running) -> DwarfStarError:
    """What a call's end means for people: the engine's own sentence, or that it does not answer."""
    if not isinstance(error, grpc.Call):
        return DwarfStarError(f"the engine at {engine.control} does not answer: {error}")
    if error.code() in REFUSED:
        told = dict(error.trailing_metadata() or ())
        return DwarfStarError(str(error.details()), code=_text(told.get(channel.CODE)))
    return DwarfStarError(f"the engine at {engine.control} does not answer: {error.details()}")


def _text(value: str | bytes | None) -> str | None:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


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


def events(engine: running.Running, home: Path, since: int, *, follow: bool) -> Iterator[EventsView]:
    """The events after a number; with ``follow`` also those to come, without end. Raises DwarfStarError."""
    credentials = channel.channel_credentials(NodeFiles(home / engine.trust))
    options = channel.channel_options(channel.MAX_CONTROL_BYTES)
    request = pb.EventsRequest(since=since, follow=follow)
    with grpc.secure_channel(engine.control, credentials, options=options) as link:
        try:
            for reply in ControlStub(link).Events(request, timeout=None if follow else CALL_S):
                yield EventsView.model_validate_json(reply.json)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise DwarfStarError(str(error.details())) from None
            if running.gone(engine):
                raise DwarfStarError("the engine has ended", code="not_running") from None
            raise said(error, engine) from None


def drain(engine: running.Running, home: Path, wanted: str, *, undo: bool) -> str:
    """Move a node's layers away, or plan for it again; what came of it. Raises DwarfStarError."""
    reply = _call(engine, home, "Drain", pb.DrainRequest(node=wanted, undo=undo), DRAIN_S)
    if undo:
        return f"{reply.name} ({reply.node_id}) is planned for again"
    paused = "" if reply.loaded_first else "; streams waited while its layers were loaded elsewhere"
    return f"{reply.name} ({reply.node_id}) is drained and may leave{paused}"


def plan(engine: running.Running, home: Path, request: PlanRequest) -> ProposalView:
    """The plan that runs, and the one asked for. Raises DwarfStarError."""
    reply = _call(engine, home, "Plan", pb.PlanRequest(json=request.model_dump_json().encode()), PLAN_S)
    return ProposalView.model_validate_json(reply.json)


def commit(engine: running.Running, home: Path, request: PlanRequest, base_epoch: int) -> CommitView:
    """Carry a plan out; returns when it serves. Raises DwarfStarError, of code ``stale_epoch`` among others."""
    asked = pb.PlanRequest(json=request.model_dump_json().encode(), base_epoch=base_epoch)
    return CommitView.model_validate_json(_call(engine, home, "Commit", asked, DRAIN_S).json)


def undo(engine: running.Running, home: Path) -> CommitView:
    """Back to the plan before the last change. Raises DwarfStarError."""
    return CommitView.model_validate_json(_call(engine, home, "Undo", pb.UndoRequest(), DRAIN_S).json)


def rename(engine: running.Running, home: Path, node: str, name: str) -> str:
    """Call a node so, empty: as it calls itself; what came of it. Raises DwarfStarError."""
    reply = _call(engine, home, "Name", pb.NameRequest(node=node, name=name), CALL_S)
    return f"{reply.before} is called {reply.name} from now on"


def override(engine: running.Running, home: Path, node: str, text: str, *, replan: bool) -> OverrideView:
    """Set what a node lends; empty: as it was started. Raises DwarfStarError."""
    request = pb.OverrideRequest(node=node, text=text, replan=replan)
    return OverrideView.model_validate_json(_call(engine, home, "Override", request, DRAIN_S).json)


def load(engine: running.Running, home: Path, request: LoadRequest) -> LoadView:
    """Serve another model; returns when it serves. Raises DwarfStarError: what served before does."""
    asked = pb.LoadModelRequest(json=request.model_dump_json().encode())
    return LoadView.model_validate_json(_call(engine, home, "LoadModel", asked, LOAD_S).json)


def unload(engine: running.Running, home: Path) -> LoadView:
    """Serve no model. Raises DwarfStarError."""
    return LoadView.model_validate_json(_call(engine, home, "UnloadModel", pb.UnloadModelRequest(), LOAD_S).json)
