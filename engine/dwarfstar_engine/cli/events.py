"""``dwarfstar events``: what happened in the cluster, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated

import typer

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import EventsView, EventView

SinceOption = Annotated[
    int, typer.Option(min=0, help="Only those after this number, as `dwarfstar status --json` gives it in last_event.")
]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on with those to come, until Ctrl-C.")]


def show(settings: Settings, since: int, *, follow: bool, as_json: bool) -> None:
    """Print them; with ``follow`` and ``as_json`` one object a line. Raises DwarfStarError."""
    batches = remote.events(running.require(settings.home), settings.home, since, follow=follow)
    try:
        if as_json and not follow:
            print(_document(batches))
            return
        for batch in batches:
            for line in lines(batch, as_json=as_json):
                print(line, flush=True)
    except KeyboardInterrupt:
        pass  # how following ends


def lines(batch: EventsView, *, as_json: bool = False) -> Iterable[str]:
    """A line for each event, and one for those that are missed."""
    if batch.missed:
        yield json.dumps({"missed": batch.missed}) if as_json else f"({batch.missed} older events are not kept)"
    for event in batch.events:
        yield event.model_dump_json() if as_json else line(event)


def line(event: EventView) -> str:
    """Number, local time, kind, cause."""
    when = datetime.fromtimestamp(event.time_s).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    return f"{event.number:>5}  {when}  {event.kind:<16}  {event.cause}"


def _document(batches: Iterable[EventsView]) -> str:
    """All in one, as other listings are."""
    events: list[EventView] = []
    missed = 0
    for batch in batches:
        events += batch.events
        missed += batch.missed
    return EventsView(events=tuple(events), missed=missed).model_dump_json(indent=2)
