"""The model files there are, each described by its directory alone, for people to choose from.

A file that cannot be read is one line that says why, and never the end of the listing. The parts of a split model are
one entry, under the name that serves it. How many files are looked at, and how long, has a bound: folders of models
lie on network disks, too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dwarfstar_engine.errors import ModelError, ModelFileError
from dwarfstar_engine.model.arch import rules
from dwarfstar_engine.model.costs import model_costs
from dwarfstar_engine.model.ggml_types import FILE_TYPES, TENSOR_TYPES
from dwarfstar_engine.model.gguf import SHARD_NAME, GgufModel, read_model
from dwarfstar_engine.model.hub_names import DOWNLOADS, SUFFIX
from dwarfstar_engine.views import ModelFilesView, ModelFileView

MAX_FILES = 2000  # names looked at; each costs a look at the disk
MAX_MODELS = 500  # directories read; each may be some megabytes
MAX_TIME_S = 20.0  # a person waits; local disks need a few milliseconds for each file
GIB = 1 << 30

_WHERE = re.compile(r" \(field .*\)$", re.DOTALL)  # what a ModelFileError says for those who mend files


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model. name: what serves it."""

    name: str
    paths: tuple[Path, ...]


def catalogue(
    folders: Iterable[Path], demo: tuple[str, Path] | None, now: Callable[[], float], max_time_s: float = MAX_TIME_S
) -> ModelFilesView:
    """Every model in ``folders`` (subfolders are not looked into), and the demo under its name.

    now: a clock, in seconds. Raises nothing for what is in the files.
    """
    until = now() + max_time_s
    folders = tuple(dict.fromkeys(folders))
    names, unseen = _names(folders)
    entries = models_of(names)
    if demo is not None:
        entries.append(ModelFiles(demo[0], (demo[1],)))
    found: list[ModelFileView] = []
    for entry in entries:
        if len(found) >= MAX_MODELS or now() > until:
            break
        found.append(describe(entry))
    unfinished = sum(map(_unfinished, folders)) / GIB
    return ModelFilesView(
        models=tuple(found), left_out=len(entries) - len(found) + unseen, unfinished_gib=round(unfinished, 4)
    )


def models_of(paths: Iterable[Path]) -> list[ModelFiles]:
    """Files grouped to models, by name: ``X-00001-of-00003.gguf`` and its like in one folder are model ``X``."""
    groups: dict[tuple[Path, str, str], list[Path]] = {}
    for path in sorted(paths):
        match = SHARD_NAME.match(path.name)
        key = (path.parent, match["stem"], match["count"]) if match else (path.parent, path.stem, "")
        groups.setdefault(key, []).append(path)
    entries = (ModelFiles(name, tuple(paths)) for (_, name, _), paths in groups.items())
    return sorted(entries, key=lambda entry: (entry.name.lower(), entry.paths))


def describe(entry: ModelFiles) -> ModelFileView:
    """What the files say."""
    path = str(entry.paths[0])
    try:
        model = read_model(path)
        architecture, layers = model.architecture, model.n_layers
        context = model.get_int(model.key("context_length"), 0)
        reason = _unsupported(model)
    except ModelFileError as error:
        return _broken(entry, problem(error))
    except OSError as error:  # it went away meanwhile
        return _broken(entry, error.strerror or "cannot be read")
    return ModelFileView(
        name=entry.name,
        path=path,
        files=len(model.paths),
        size_gib=round(sum(tensor.nbytes for tensor in model.tensors.values()) / GIB, 4),
        architecture=architecture,
        layers=layers,
        parameters=sum(math.prod(tensor.shape) for tensor in model.tensors.values()),
        quantisation=quantisation(model),
        context=max(0, context),
        supported=not reason,
        reason=reason,
    )


def quantisation(model: GgufModel) -> str:
    """What llama.cpp calls the file's mixture of types; where it does not say, the type of most of its bytes."""
    stated = model.metadata.get("general.file_type")
    if isinstance(stated, int) and stated in FILE_TYPES:
        return FILE_TYPES[stated]
    weights: Counter[int] = Counter()
    for tensor in model.tensors.values():
        weights[tensor.type] += tensor.nbytes
    return TENSOR_TYPES[weights.most_common(1)[0][0]].name.upper() if weights else "–"


def problem(error: ModelFileError) -> str:
    """What is wrong with a file, without its path and offset, which a listing says elsewhere or not at all."""
    return _WHERE.sub("", error.message.removeprefix(f"{error.path}: "))


def _unsupported(model: GgufModel) -> str:
    """Why a model that can be read cannot be served; empty if it can. Raises ModelFileError."""
    try:
        rules(model)
        model_costs(model)
    except ModelFileError:
        raise
    except ModelError as error:
        return error.message
    return ""


def _broken(entry: ModelFiles, reason: str) -> ModelFileView:
    return ModelFileView(
        name=entry.name,
        path=str(entry.paths[0]),
        files=len(entry.paths),
        size_gib=round(sum(map(_size, entry.paths)) / GIB, 4),
        architecture="",
        layers=0,
        parameters=0,
        quantisation="",
        context=0,
        supported=False,
        reason=reason,
        broken=True,
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _unfinished(folder: Path) -> int:
    """Bytes of a folder's downloads that are not complete."""
    files = islice((folder / DOWNLOADS).glob(f"*/*{SUFFIX}*"), MAX_FILES)
    return sum(map(_size, files))


def _names(folders: Iterable[Path]) -> tuple[list[Path], int]:
    """GGUF files in ``folders``, at most MAX_FILES, and how many more there are."""
    found: list[Path] = []
    unseen = 0
    for path in _listed(folders):
        if len(found) < MAX_FILES:
            found.append(path)
        else:
            unseen += 1
    return found, unseen


def _listed(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        try:
            yield from (p for p in folder.iterdir() if p.name.endswith(SUFFIX) and not p.name.startswith("."))
        except OSError:
            continue  # a folder that is not there holds no models
