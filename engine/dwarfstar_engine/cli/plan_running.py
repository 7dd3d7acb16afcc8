"""``dwarfstar plan`` on the engine that runs: what it does, what is proposed, and carrying that out.

Nothing changes without ``--commit`` (or ``--apply``, ``--undo``, ``--auto``), and not before the difference was shown
and, unless ``--yes`` says so, agreed to.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console, RenderableType
from rich.text import Text

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.cli.plan import save
from dwarfstar_engine.cli.plan_view import render, render_change
from dwarfstar_engine.errors import DwarfStarError, PlanError, SettingsError
from dwarfstar_engine.plan.planner import rate
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import CommitView, PlanRequest, ProposalView

MAX_FILE_BYTES = 1 << 20  # a plan of a thousand stages is a tenth of it
NO_PLAN = "no_plan"


class SavedStage(BaseModel):
    model_config = ConfigDict(frozen=True)

    node: str = Field(max_length=64)
    layers: tuple[int, int]


class SavedPlan(BaseModel):
    """A file that ``--save`` wrote."""

    model_config = ConfigDict(frozen=True)

    model: str
    stage: tuple[SavedStage, ...] = Field(min_length=1, max_length=1024)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line said. apply: a file that ``--save`` wrote."""

    request: PlanRequest
    commit: bool = False
    undo: bool = False
    apply: Path | None = None
    yes: bool = False
    save_to: Path | None = None

    @property
    def asks(self) -> bool:
        """Whether anything but a look at what runs is wanted."""
        return self.commit or self.undo or self.apply is not None or self.request != PlanRequest()


def show(wish: Wish, settings: Settings, *, json_wanted: bool) -> None:
    """The whole command. Raises DwarfStarError."""
    try:
        _show(wish, settings, json_wanted=json_wanted)
    except DwarfStarError as error:
        if not json_wanted:
            raise
        print(json.dumps({"error": {"code": error.code, "message": error.message}}, indent=2))
        raise SystemExit(error.exit_code) from None


def _show(wish: Wish, settings: Settings, *, json_wanted: bool) -> None:
    engine, home = running.require(settings.home), settings.home
    console = Console(file=sys.stdout, highlight=False)
    if wish.undo:
        _done(remote.undo(engine, home), console, json_wanted=json_wanted)
        return
    request = wish.request
    if request.take is not None:
        _take(wish, request.take, engine, home, console, json_wanted=json_wanted)
        return
    if wish.apply is not None:
        request = _applied(wish.apply, remote.status(engine, home).model)
    told = remote.plan(engine, home, request)
    asked = wish.asks
    if asked and told.proposed is None:
        raise PlanError(told.error, code=told.code or NO_PLAN)
    chosen = told.proposed if asked else told.present or told.proposed
    if chosen is None:
        raise PlanError(told.error or "nothing is served now: wait until it is", code=told.code or NO_PLAN)
    if wish.save_to is not None:
        save(chosen, settings.kv, wish.save_to)
    carry_out = wish.commit or wish.apply is not None or request.auto
    if json_wanted and not carry_out:
        print(json.dumps(_as_json(told, asked=asked), indent=2))
        return
    if not json_wanted:
        for part in _parts(told, console.width, asked=asked):
            console.print(part)
    if not carry_out:
        return
    if told.clamped:
        raise PlanError("not carried out, as it is not what was asked for: give cuts that are possible", code=NO_PLAN)
    if not wish.yes and not _agreed():
        print("dwarfstar: nothing was changed")
        return
    _done(remote.commit(engine, home, request, told.epoch), console, json_wanted=json_wanted)


def _take(wish: Wish, kind: str, engine: running.Running, home: Path, console: Console, *, json_wanted: bool) -> None:
    """Serve as one of the advisor's alternatives, if it has such a one. Raises DwarfStarError."""
    told = remote.plan(engine, home, PlanRequest())
    if told.present is None:
        raise PlanError("nothing is served now: wait until it is", code="not_serving")
    found = next((one for one in told.present.alternatives if one.kind == kind), None)
    if found is not None and not json_wanted:
        here, there = told.present.predicted.aggregate_tok_s, found.aggregate_tok_s
        rings = "; ".join(", ".join(part.node for part in ring) for ring in found.pipelines)
        console.print(f"{kind}: {rings}: {rate(there)} tok/s all, the plan that serves {rate(here)}", markup=False)
        console.print("streams wait while layers are loaded", markup=False)
    if not wish.yes and not _agreed():
        print("dwarfstar: nothing was changed")
        return
    _done(remote.commit(engine, home, wish.request, told.epoch), console, json_wanted=json_wanted)


def _as_json(told: ProposalView, *, asked: bool) -> dict[str, Any]:
    """The plan asked for, or the one that runs, with everything beside it."""
    whole = told.model_dump(mode="json", exclude_none=True)
    chosen = whole.get("proposed" if asked or told.present is None else "present", {})
    return {**chosen, **whole}


def _parts(told: ProposalView, width: int, *, asked: bool) -> Iterator[RenderableType]:
    if asked and told.proposed is not None:
        yield from render(told.proposed, width)
        yield Text()
        yield from render_change(told, width)
        return
    present = told.present
    if present is None:
        yield Text(f"nothing is served now; planned would be (epoch {told.epoch}):")
        if told.proposed is not None:
            yield from render(told.proposed, width)
        return
    kept = "; its owner committed it" if told.owner else ""
    yield Text(f"epoch {told.epoch} serves, {rate(told.tok_s) if told.tok_s else 0} tok/s now{kept}")
    yield from render(present, width)
    if told.proposed is not None and [(s.node, s.layers) for s in told.proposed.stages] != [
        (s.node, s.layers) for s in present.stages
    ]:
        there = told.proposed.predicted
        where = ", ".join(f"{s.node} {s.layers[0]}–{s.layers[1] - 1}" for s in told.proposed.stages)
        yield Text()
        yield Text(
            f"the planner would take {where} ({told.proposed.strategy}): {rate(there.single_tok_s)} tok/s one stream, "
            f"{rate(there.aggregate_tok_s)} all"
        )


def _agreed() -> bool:
    """Whether the person at the terminal says yes. Raises SettingsError: there is none."""
    if not sys.stdin.isatty():
        raise SettingsError("nobody is there to agree: give --yes as well")
    return input("carry it out? [y/N] ").strip().lower() in ("y", "yes")


def _done(told: CommitView, console: Console, *, json_wanted: bool) -> None:
    if json_wanted:
        print(told.model_dump_json(indent=2, exclude_none=True))
        return
    where = ", ".join(f"{s.node} {s.layers[0]}–{s.layers[1] - 1}" for s in told.after.stages)
    first = "" if told.loaded_first else "; streams waited while layers were loaded"
    read = "".join(
        f"; {one.node} read {one.read_gib:.2f} GiB from its disk" for one in told.reads if one.read_gib >= 0.01
    )
    console.print(f"dwarfstar: epoch {told.epoch} serves: {where}{first}{read}", soft_wrap=True, markup=False)


def _applied(path: Path, model: Any) -> PlanRequest:
    """The request for a saved plan. Raises SettingsError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise SettingsError(f"{path} is larger than {MAX_FILE_BYTES} bytes: it is no plan")
        saved = SavedPlan.model_validate(tomllib.loads(data.decode("utf-8")))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError):
        raise SettingsError(f"{path} is no plan as `dwarfstar plan --save` writes it") from None
    if model is not None and saved.model != model.name:
        raise SettingsError(f"{path} is a plan of {saved.model}, and {model.name} is served")
    order = tuple(stage.node for stage in saved.stage)
    return PlanRequest(cuts=tuple(stage.layers[1] for stage in saved.stage[:-1]), order=order)
