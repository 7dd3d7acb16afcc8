"""The model files of this machine, as the app shows them. Blocks: call it from a thread."""

from __future__ import annotations

import time
from pathlib import Path

from dwarfstar_engine.errors import ModelError
from dwarfstar_engine.model.catalogue import catalogue
from dwarfstar_engine.node.source import DEMO, demo_path
from dwarfstar_engine.views import ModelFileView
from dwarfstar_tui.updates import ModelFile, ModelsFound

GIB = 1 << 30


def find_models(folder: Path) -> ModelsFound:
    """The demo model if it is installed, and the files of ``folder`` by name."""
    try:
        demo = (DEMO, demo_path())
    except ModelError:
        demo = None
    view = catalogue([folder], demo, time.monotonic)
    files = [_file(model, demo=demo is not None and model.path == str(demo[1])) for model in view.models]
    files.sort(key=lambda file: not file.demo)
    return ModelsFound(str(folder), tuple(files), view.left_out, _problem(folder))


def _problem(folder: Path) -> str:
    """Why the folder cannot be read; one that is not there is just empty."""
    try:
        next(folder.iterdir(), None)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def _file(view: ModelFileView, *, demo: bool) -> ModelFile:
    return ModelFile(
        name=view.name,
        path=view.path,
        size_bytes=round(view.size_gib * GIB),
        layers=view.layers,
        architecture=view.architecture,
        quantisation=view.quantisation,
        context=view.context,
        problem=view.reason,
        demo=demo,
    )
