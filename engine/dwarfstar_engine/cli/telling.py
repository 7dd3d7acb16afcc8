"""What an engine without a screen tells the person who started it: what it will do, how far it is, what to try."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from dwarfstar_engine.cli.door import home_option
from dwarfstar_engine.node.facts import GIB
from dwarfstar_engine.node.needs import kv_cells, reserve_bytes
from dwarfstar_engine.node.source import DEFAULT_CONTEXT, Source
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import StatusView
from dwarfstar_engine.wire.loop import until_beat

ELECTION_S = 5.0  # after the start; a cluster that has no leader for longer is worth a line
LOOK_S, SERVED_LOOK_S = 0.25, 1.0  # while it comes up, and later
PROGRESS_EVERY_S = 1.0  # of a load: a line for each percent would scroll everything else away


def opening(source: Source, settings: Settings, local: int, lent_gib: float | None) -> Iterator[str]:
    """The first lines: the model, what it needs, and what it is given."""
    if not source.loaded:
        yield f"no model: `dwarfstar load MODEL{home_option(settings.home)}` loads one while the engine runs"
        yield f"starting {local} local node{'s' * (local > 1)}" if local else "starting; this machine is the first node"
        return
    context = min(settings.context or DEFAULT_CONTEXT, source.train_context)
    weights = sum(source.costs.layer_bytes) + source.costs.head_bytes
    kv = kv_cells(settings, context) * sum(source.costs.kv_bytes_per_token)
    yield (
        f"model {source.name} ({source.architecture}, {source.layers} layers): {weights / GIB:.2f} GiB of weights, "
        f"{kv / GIB:.2f} GiB of KV cache for {settings.slots} requests of {context} tokens"
    )
    if not local:
        yield "starting; this machine is the first node"
        return
    nodes = f"starting {local} local node{'s' * (local > 1)}"
    if lent_gib is None:
        yield nodes
        return
    whole = (weights + kv + reserve_bytes(source, settings)) / GIB
    fits = "" if whole <= lent_gib else f"; the whole model needs {whole:.2f} GiB, so it must be split"
    yield f"{nodes}, each lending {lent_gib:.2f} GiB{fits}"


class Told(Protocol):
    """Of what it is told."""

    def mark(self) -> object:
        """While it is equal to what it was, there is nothing new to tell. Quick. None: not known."""

    def status(self) -> StatusView: ...
    def loading(self) -> str: ...


async def tell(coordinator: Told, say: Callable[[str], None], started: float, home: Path, curl: str) -> None:
    """Say what changes, until cancelled.

    started: monotonic time the program began. curl: the options with which curl gets in.
    """
    told, invited, told_at = "", False, 0.0
    seen: object = None
    while True:
        mark = coordinator.mark()
        if mark is not None and mark == seen:
            await asyncio.sleep(until_beat(SERVED_LOOK_S))
            continue
        status, now = coordinator.status(), time.monotonic()
        loading = coordinator.loading() if status.stages else ""
        line = _line(status, loading, served=invited)
        if not status.coordinator.leader and now - started < ELECTION_S:
            line = ""  # who leads is being found out, as at every start
        hurry = not loading or now - told_at >= PROGRESS_EVERY_S
        if line and line != told and hurry:
            took = f" (after {now - started:.1f} s)" if status.state == "serving" and not invited else ""
            say(line + took)
            told, told_at = line, now
        if status.state == "serving" and not invited:
            invited = True
            for line in _invitation(status.coordinator.api_url, home, curl):
                say(line)
        seen = mark
        await asyncio.sleep(until_beat(SERVED_LOOK_S if invited else LOOK_S))


def _line(status: StatusView, loading: str, *, served: bool) -> str:
    """Where the engine is now; empty when there is nothing to say yet."""
    if status.state == "serving":
        rings: dict[int, list[str]] = {}
        for stage in status.stages:
            a, b = stage.layers
            told = f"{stage.node} layers {a}–{b - 1} ({stage.weights_gib + stage.kv_gib:.2f} GiB)"
            rings.setdefault(stage.pipeline, []).append(told)
        stages = "; ".join(" → ".join(ring) for ring in rings.values())
        return f"serving on {status.coordinator.api_url}: {stages}"
    if loading:
        return f"loading: {loading}"
    return "" if status.reason == "starting" else f"not serving{'' if served else ' yet'}: {status.reason}"


def _invitation(api_url: str, home: Path, curl: str) -> Iterator[str]:
    yield "ready. Try it from another terminal:"
    yield (
        f"curl {api_url}/v1/chat/completions {curl}-H 'Content-Type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "Hello!"}]}'"""
    )
    where = home_option(home)
    yield f"or: dwarfstar chat{where}. What runs where: dwarfstar status{where}. To end it: Ctrl-C"
