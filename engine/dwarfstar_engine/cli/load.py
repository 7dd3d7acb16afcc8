"""``dwarfstar load`` and ``dwarfstar unload``: the model of the engine that runs is changed, while it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.plan.planner import rate
from dwarfstar_engine.settings import load_settings
from dwarfstar_engine.views import LoadRequest, LoadView

Home = Annotated[Path | None, typer.Option(help="Folder of identity, certificates and logs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, a name in the models folder, or 'demo'.")],
    context: Annotated[
        int | None, typer.Option(min=16, max=1 << 20, help="Tokens of one request; default: as the engine was started.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, max=64, help="Requests at the same time; default: as the engine was started.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it can be, and how it would run.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Serve another model from now on. Requests under way have 10 seconds to finish; new ones wait."""
    folder = load_settings({"home": home}, os.environ).home
    request = LoadRequest(model=_absolute(model), context=context, slots=slots, check=check)
    view = remote.load(running.require(folder), folder, request)
    print(
        view.model_dump_json(indent=2, exclude_none=True) if as_json else f"dwarfstar: {load_text(view, check=check)}"
    )


def unload(home: Home = None, as_json: AsJson = False) -> None:
    """Serve no model: its memory is free, and the engine waits for `dwarfstar load`."""
    folder = load_settings({"home": home}, os.environ).home
    view = remote.unload(running.require(folder), folder)
    told = f"dwarfstar: {view.before} is unloaded{_ended(view.streams)}"
    print(view.model_dump_json(indent=2, exclude_none=True) if as_json else told)


def _absolute(model: str) -> str:
    """The engine has another working folder: a file that is there from here is named in full."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_file() else model


def load_text(view: LoadView, *, check: bool) -> str:
    """What came, or would come, of a load."""
    stages = view.plan.stages if view.plan is not None else ()
    where = ", ".join(f"{one.node} {one.layers[0]}–{one.layers[1] - 1}" for one in stages)
    if not check:
        return f"{view.model} is loaded, in {view.took_s:.1f} s: {where}{_ended(view.streams)}"
    speed = ""
    if view.plan is not None:
        told = view.plan.predicted
        speed = f"; about {rate(told.single_tok_s)} tok/s one stream, {rate(told.aggregate_tok_s)} all"
    instead = f" in the place of {view.before}" if view.before else ""
    return f"{view.model} can be loaded{instead}: {where}{speed}"


def _ended(streams: int) -> str:
    return f"; {streams} request{'s' * (streams > 1)} did not finish in time" if streams else ""
