"""The timeline as lines of runs. Pure, but for the local time zone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, tzinfo

from dwarfstar_engine.views import EventView
from dwarfstar_tui import text
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.text import Glyphs, fit, matches

BAD = frozenset({"node_lost", "stage_failed", "streams_given_up", "no_plan", "node_refused"})
WARN = frozenset({"node_late", "epoch_over", "streams_waiting", "node_removed", "node_left"})
GOOD = frozenset({"node_joined", "node_rejoined", "node_heard", "epoch_up", "stage_ready", "streams_resumed",
                  "model_loaded", "owner_model", "cells_carried"})  # fmt: skip
KIND = 17


def role_of(kind: str) -> str:
    return "lost" if kind in BAD else "late" if kind in WARN else "ok" if kind in GOOD else "muted"


def wanted_events(events: Sequence[EventView], wanted: str) -> Sequence[EventView]:
    """Those that the filter lets through, oldest first."""
    if not wanted:
        return events
    return [
        event for event in events if matches(wanted, event.kind, event.kind.replace("_", " "), event.node, event.cause)
    ]


def event_line(event: EventView, width: int, zone: tzinfo | None, glyphs: Glyphs) -> Runs:
    """Time, mark and kind, cause. Marks differ as well as colours."""
    role = role_of(event.kind)
    mark = {"lost": glyphs.lost, "late": glyphs.late, "ok": glyphs.ok}.get(role, glyphs.dot)
    when = datetime.fromtimestamp(event.time_s, zone).strftime("%H:%M:%S")
    kind = event.kind.replace("_", " ")
    runs: list[tuple[str, str]] = [(f"{when}  ", "muted"), (f"{mark} ", role)]
    if width >= 76:
        runs.append((f"{fit(kind, KIND, ellipsis=glyphs.ellipsis)} ", role))
    used = sum(len(part) for part, _ in runs)
    cause = text.clean(event.cause)
    if glyphs is text.ASCII:
        cause = text.spelled(cause, ascii_only=True)
    runs.append((fit(cause, width - used, ellipsis=glyphs.ellipsis), "plain"))
    return tuple(runs)
