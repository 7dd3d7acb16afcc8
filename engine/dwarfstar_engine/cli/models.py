"""``dwarfstar models`` and ``dwarfstar pull``: what is there to serve, and how more gets there."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, TextIO

import typer

from dwarfstar_engine.cli.pull_text import Pace, models_text, offers_text
from dwarfstar_engine.errors import DwarfStarError, ModelError, UnsupportedModelError
from dwarfstar_engine.model.arch import legal_cuts
from dwarfstar_engine.model.catalogue import catalogue, quantisation
from dwarfstar_engine.model.gguf import GgufModel
from dwarfstar_engine.model.hub_names import Offer, Reference, Unclear, choose, offers, reference
from dwarfstar_engine.node.pull import Progress, Tools, pull, read_offer, unfinished
from dwarfstar_engine.node.source import DEMO, demo_path
from dwarfstar_engine.settings import Settings, load_settings

SCREEN_EVERY_S, LINE_EVERY_S = 0.25, 10.0  # between two states of a download, on a terminal and elsewhere
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
GIB = 1 << 30

Home = Annotated[Path | None, typer.Option(help="Folder of identity, certificates and logs.")]
Models = Annotated[Path | None, typer.Option(help="Folder of GGUF files.")]


def models(
    models: Models = None,
    home: Home = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The model files on this machine, and whether they can be served."""
    folder = _settings(home, models).models_dir
    try:
        demo = (DEMO, demo_path())
    except ModelError:
        demo = None  # not installed
    view = catalogue([folder], demo, time.monotonic)
    print(view.model_dump_json(indent=2) if as_json else models_text(view, folder, shutil.get_terminal_size().columns))


def pull_model(
    repo: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="OWNER/NAME, OWNER/NAME:Q4_K_M, OWNER/NAME/FILE.gguf, or an address."),
    ],
    wanted: Annotated[
        str | None, typer.Argument(metavar="FILE|TYPE", help="Which of its files, or quantisation.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also a model that cannot be split, and so not served.")
    ] = False,
    models: Models = None,
    home: Home = None,
) -> None:
    """Get a model from a hub, into the models folder. A pull that stopped goes on where it was."""
    # Its library takes a second to import, which no other command should wait for.
    from dwarfstar_engine.node.hub import Hub, endpoint

    settings = _settings(home, models)
    asked = reference(repo, wanted, endpoint())
    hub, meter = Hub(), _Meter(sys.stderr)
    tools = Tools(tell=meter.show)
    try:
        offer = _chosen(asked, offers(hub.files(asked)))
        model = read_offer(hub, offer, tools)
        _say(_described(offer, model, force=force))
        if had := unfinished(offer, settings.models_dir):
            _say(f"{had / GIB:.2f} GiB are here already: going on")
        path = pull(hub, offer, settings.models_dir, asked, tools)
    except KeyboardInterrupt:
        meter.end()
        _say(f"stopped; what came is kept, and this goes on there: {_again(asked, settings, force=force)}")
        raise SystemExit(INTERRUPTED) from None
    except DwarfStarError:
        meter.end()
        raise
    meter.end()
    done = "pulled" if meter.pulled else "it is there already"
    _say(f"{done}; to serve it: dwarfstar --serve {shlex.quote(path.stem)}{_where(settings)}")
    print(path)


def _chosen(asked: Reference, there: tuple[Offer, ...]) -> Offer:
    found = choose(asked, there)
    if isinstance(found, Unclear):
        if found.offers:
            print(offers_text(found.offers))
            example = found.offers[0].quantisation or found.offers[0].files[0].name
            raise ModelError(
                f"{found.reason}, as in `dwarfstar pull {asked.repo} {shlex.quote(example)}`", code="model_unclear"
            )
        raise ModelError(found.reason, code="model_not_found")
    return found


def _described(offer: Offer, model: GgufModel, *, force: bool) -> str:
    """What is about to be pulled. Raises ModelError if it cannot be served, unless ``force``."""
    try:
        cuts = legal_cuts(model)
        split = f"can be split at {len(cuts)} layer{'s' * (len(cuts) != 1)}"
    except UnsupportedModelError as error:
        if not force:
            raise UnsupportedModelError(f"{error.message}; --force pulls it all the same") from None
        split = f"cannot be served: {error.message}"
    kind = offer.quantisation or quantisation(model)
    parts = f" in {len(offer.files)} files" if len(offer.files) > 1 else ""
    size = model.metadata.get("general.size_label")
    label = f", {size}" if isinstance(size, str) and size.isprintable() and len(size) < 20 else ""
    hashed = "" if all(file.sha256 for file in offer.files) else "; no hash is told for it, so only its directory is"
    checked = f"{hashed} checked" if hashed else ""
    return (
        f"{offer.files[0].name}: {model.architecture}{label}, {model.n_layers} layers, {kind}, "
        f"{offer.size / GIB:.2f} GiB{parts}; {split}{checked}"
    )


def _settings(home: Path | None, models: Path | None) -> Settings:
    return load_settings({"home": home, "models": models}, os.environ)


def _where(settings: Settings) -> str:
    folder = settings.models_dir
    return "" if folder == load_settings({}, os.environ).models_dir else f" --models {shlex.quote(str(folder))}"


def _again(asked: Reference, settings: Settings, *, force: bool) -> str:
    return f"dwarfstar pull {shlex.quote(str(asked))}{' --force' * force}{_where(settings)}"


def _say(text: str) -> None:
    print(f"dwarfstar: {text}", file=sys.stderr, flush=True)


class _Meter:
    """Shows how far a download is: one line that changes on a terminal, else a line now and then."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._pace = out, Pace()
        self._screen = out.isatty()
        self._next = 0.0
        self._open = False
        self.pulled = False  # whether anything came

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        self.pulled = self.pulled or progress.doing == "pulling"
        if now < self._next and progress.done < progress.total and progress.doing != "waiting":
            return
        self._next = now + (SCREEN_EVERY_S if self._screen else LINE_EVERY_S)
        line = self._pace.line(progress, now)
        if self._screen:
            width = shutil.get_terminal_size().columns - 1
            self._out.write(f"\r{line[:width]:{width}}")
            self._open = True
        else:
            self._out.write(f"dwarfstar: {line}\n")
        self._out.flush()

    def end(self) -> None:
        """Leave the line that changes."""
        if self._open:
            self._out.write("\n")
            self._out.flush()
            self._open = False
