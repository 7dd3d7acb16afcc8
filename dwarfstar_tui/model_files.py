"""GGUF files on this machine: found in folders, described from their directories. Blocks: call it from a thread."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.model.arch import legal_cuts, rules
from dwarfstar_engine.model.ggml_types import tensor_type
from dwarfstar_engine.model.gguf import SHARD_NAME, GgufModel, read_model
from dwarfstar_engine.node.source import DEMO, DEMO_PACKAGE, find_model
from dwarfstar_tui.updates import ModelFile, ModelsFound

MAX_FILES = 200  # described; each costs a read of its directory, some megabytes of a large model
MAX_LOOKED_AT = 5000  # entries of the folder


def find_models(folder: Path) -> ModelsFound:
    """The files of ``folder``, by name, and the demo model if it is installed."""
    try:
        found, more = _listed(folder)
        problem = ""
    except OSError as error:
        found, more, problem = [], 0, "" if isinstance(error, FileNotFoundError) else f"{folder}: {error.strerror}"
    files = [describe(path, path.stem) for path in found]
    if importlib.util.find_spec(DEMO_PACKAGE) is not None:
        files.insert(0, describe(find_model(DEMO, folder), DEMO, demo=True))
    return ModelsFound(str(folder), tuple(files), more, problem)


def _listed(folder: Path) -> tuple[list[Path], int]:
    """The first part stands for a model that is split over files."""
    names: list[Path] = []
    for index, path in enumerate(folder.iterdir()):
        if index >= MAX_LOOKED_AT:
            break
        if path.suffix.lower() == ".gguf" and path.is_file() and _first_part(path.name):
            names.append(path)
    names.sort(key=lambda path: path.name.lower())
    return names[:MAX_FILES], max(0, len(names) - MAX_FILES)


def _first_part(name: str) -> bool:
    part = SHARD_NAME.match(name)
    return part is None or int(part["no"]) == 1


def describe(path: Path, name: str, *, demo: bool = False) -> ModelFile:
    """One file. What is wrong with it is part of the answer."""
    size = 0
    try:
        size = path.stat().st_size
        model = read_model(path)
        size = sum(Path(part).stat().st_size for part in model.paths)
        return ModelFile(
            name=re.sub(r"-00001-of-\d{5}$", "", name),
            path=str(path),
            size_bytes=size,
            layers=model.n_layers,
            architecture=model.architecture,
            quantisation=quantisation(model),
            context=model.get_int(f"{model.architecture}.context_length", 0),
            problem=_cannot_split(model),
            demo=demo,
        )
    except (DwarfStarError, OSError) as error:
        problem = error.message if isinstance(error, DwarfStarError) else str(error.strerror)
        return ModelFile(name, str(path), size, problem=problem, demo=demo)


def _cannot_split(model: GgufModel) -> str:
    try:
        rules(model)
        legal_cuts(model)
    except DwarfStarError as error:
        return error.message
    return ""


def quantisation(model: GgufModel) -> str:
    """The type most bytes of the weights have: what a file is usually named after, without its S, M or L."""
    sizes: Counter[int] = Counter()
    for tensor in model.tensors.values():
        sizes[tensor.type] += tensor.nbytes
    return tensor_type(sizes.most_common(1)[0][0]).name.upper() if sizes else ""
