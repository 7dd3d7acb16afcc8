"""Which file of the model each node runs its layers from, where several quantisations of it are permitted.

Theory. Only with the setting ``mixed`` a node may run layers from another file than the one that is served. Before such
a node is welcomed the coordinator asks what it has (``Look``), so that nothing is planned for a node whose file is not
known. It answers (``Offer``) that it has the very file, which is then the one it runs, whatever else lies there; or
tells of another: the one that its owner has named, or those found in its models folder. The coordinator compares them
with its own (``model.same_base``), takes the one nearest in size, or refuses the node with the difference. From then on
that file stands in the place of the served one in all that concerns this node: its bytes in plans, its fingerprint in
assignments, which the node checks as ever. Prompts are made tokens by the coordinator, with the served file.

Invariants. Without the setting nothing is asked, and a node without the very file is refused its stage, as ever. What
a node tells is believed within bounds only: ``MAX_OFFERED`` files, of as many layers as the served one has.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from dwarfstar_engine.errors import DwarfStarError, ModelError, PeerError
from dwarfstar_engine.model.arch import legal_cuts, rules
from dwarfstar_engine.model.catalogue import models_of, quantisation
from dwarfstar_engine.model.costs import ModelCosts, model_costs
from dwarfstar_engine.model.ggml_types import F32
from dwarfstar_engine.model.gguf import GgufModel, read_model
from dwarfstar_engine.model.same_base import MAX_FACTS, MAX_TEXT, Base, base_of, same_base
from dwarfstar_engine.node.source import DEMO, Source, find_model, fingerprint
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.stage.toy import PREFIX as TOY
from dwarfstar_engine.wire.generated import control_pb2 as pb

MAX_OFFERED = 8  # files of one architecture in a folder that are told of; each is some kilobytes
MAX_LOOKED_AT = 64  # files of a models folder whose directories are read for that
MAX_NAME = 4096  # characters of a path, a name, a problem
MAX_BYTES = 1 << 48  # of a layer or a head: more is no file
_NORMS = ("output_norm.weight", "attn_norm.weight", "ffn_norm.weight")


# --- of a node: the files there are -------------------------------------------------------------------------------


def find_file(wanted: pb.ModelRef, models: Path, named: Path | None, node: str) -> Path:
    """This machine's file of a model: of several of its name, the one that is asked for.

    Looked for where its owner says (``named``), in the models folder, in the demo's package, and last where the
    coordinator found its own. Raises ModelError, DwarfStarError: it is not here, or another is.
    """
    candidates = _candidates(wanted, models, named)
    for path in candidates:
        if fingerprint(read_model(path)) == wanted.fingerprint:
            return path
    permit = "; other quantisations of it are permitted by --mixed of the engine" if named is not None else ""
    if candidates:
        raise DwarfStarError(
            f"{candidates[0]} on {node} is not the file the coordinator serves: copy that one here{permit}",
            code="model_differs",
        )
    raise ModelError(
        f"{node} has no file of the model {wanted.name}: copy it into {models} there{permit}", code="model_not_found"
    )


def _candidates(wanted: pb.ModelRef, models: Path, named: Path | None) -> list[Path]:
    found = [Path(wanted.path_hint)] if wanted.path_hint and Path(wanted.path_hint).is_file() else []
    for name in (DEMO, wanted.name):
        with contextlib.suppress(ModelError):  # not there
            path = find_model(name, models)
            if name == wanted.name or path.stem == wanted.name:
                found.insert(0, path)
    return [named, *found] if named is not None else found


def offer(look: pb.Look, models: Path, named: Path | None) -> pb.Offer:
    """What this machine has of a model. It reads files: call it in a thread."""
    if look.model.name.startswith(TOY) or _has(look.model, models, named):
        return pb.Offer(same=True)
    if named is not None:
        return pb.Offer(files=[_described(named)])
    return pb.Offer(files=islice(_alike(look.architecture, models), MAX_OFFERED))


def _has(wanted: pb.ModelRef, models: Path, named: Path | None) -> bool:
    for path in _candidates(wanted, models, named):
        with contextlib.suppress(ModelError, OSError):  # it is not this one, whatever is wrong with it
            if fingerprint(read_model(path)) == wanted.fingerprint:
                return True
    return False


def _alike(architecture: str, models: Path) -> Iterator[pb.OtherFile]:
    """The files of an architecture in a folder that can be used, by name."""
    with contextlib.suppress(OSError):  # a folder that is not there holds no models
        for files in models_of(models.glob("*.gguf"))[:MAX_LOOKED_AT]:
            with contextlib.suppress(ModelError, OSError):
                if read_model(files.paths[0]).architecture == architecture:
                    told = _described(files.paths[0])
                    if not told.problem:
                        yield told


def _described(path: Path) -> pb.OtherFile:
    if not str(path).isprintable():
        return pb.OtherFile(path=ascii(path.name), problem="its name cannot be told: rename it")
    try:
        model = read_model(path)
        rules(model)  # refuses what cannot be sliced exactly
        costs, base = model_costs(model), read_base(model)
    except ModelError as error:
        return pb.OtherFile(path=str(path), problem=error.message)
    except OSError as error:
        return pb.OtherFile(path=str(path), problem=f"it cannot be read: {error.strerror}")
    return pb.OtherFile(
        path=str(path),
        fingerprint=fingerprint(model),
        quantisation=quantisation(model),
        architecture=base.architecture,
        facts=base.facts,
        tokens=base.tokens,
        vocabulary=base.vocabulary,
        norms=base.norms,
        layer_bytes=costs.layer_bytes,
        active_bytes=costs.active_bytes,
        head_bytes=costs.head_bytes,
        embedding_bytes=costs.embedding_bytes,
        shared_bytes=costs.shared_bytes,
    )


def read_base(model: GgufModel) -> Base:
    """What a file is compared by, with its norms, some kilobytes a layer. Raises OSError, ModelError."""
    digest, found = hashlib.sha256(), False
    for name, tensor in sorted(model.tensors.items()):
        if name.endswith(_NORMS) and tensor.type == F32 and len(tensor.shape) == 1:
            found = True
            with Path(tensor.path).open("rb") as file:
                file.seek(tensor.offset)
                digest.update(name.encode() + file.read(tensor.nbytes))
    return base_of(model, digest.hexdigest() if found else "", legal_cuts(model))


# --- of the coordinator: which of them a node runs ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offered:
    """A file that a node has told of. problem: why it cannot be used; then base and costs say nothing."""

    path: str
    fingerprint: str
    quantisation: str
    base: Base
    costs: ModelCosts
    problem: str = ""

    @property
    def name(self) -> str:
        return Path(self.path).name


def read_offer(told: pb.Offer) -> tuple[Offered, ...]:
    """What a node has told, of bounded size. Raises PeerError."""
    if len(told.files) > MAX_OFFERED:
        raise PeerError(f"a node tells of more than {MAX_OFFERED} files", code="bad_offer")
    return tuple(map(_offered, told.files))


def _offered(file: pb.OtherFile) -> Offered:
    facts = dict(file.facts)
    names = (file.path, file.fingerprint, file.quantisation, file.architecture, file.vocabulary, file.norms)
    words = (*names, file.problem)
    sizes = (*file.layer_bytes, *file.active_bytes, file.head_bytes, file.embedding_bytes, file.shared_bytes)
    longest = max((len(text) for pair in facts.items() for text in pair), default=0)
    if (
        max(map(len, words)) > MAX_NAME
        or not all(text.isprintable() for text in (*words, *facts, *facts.values()))
        or len(facts) > MAX_FACTS
        or longest > 2 * MAX_TEXT  # what is escaped is longer
        or max(sizes) > MAX_BYTES
    ):
        raise PeerError("what a node tells of a file is out of bounds", code="bad_offer")
    costs = ModelCosts(
        layer_bytes=tuple(file.layer_bytes),
        head_bytes=file.head_bytes,
        embedding_bytes=file.embedding_bytes,
        kv_bytes_per_token=(),
        n_embd=0,
        shared_bytes=file.shared_bytes,
        active_bytes=tuple(file.active_bytes),
    )
    base = Base(file.architecture, facts, file.tokens, file.vocabulary, file.norms)
    return Offered(file.path, file.fingerprint, file.quantisation, base, costs, file.problem)


def differs(node: str, file: str, served: str, difference: str) -> ModelError:
    """The error of a node whose file is another model than the served one."""
    told = f"{node} cannot run layers from {file} in the place of {served}: {difference}"
    return ModelError(told, code="model_differs")


def choose(source: Source, base: Base, files: Sequence[Offered], node: str) -> Source:
    """What a node runs in the place of the served model's own file: of those that are the same model the nearest in
    size. base: the served file's. Raises ModelError that names both files and the difference; PeerError."""
    if not files:
        raise ModelError(
            f"{node} has no file of the model {source.name}, nor one of another quantisation of it: copy one into its "
            "models folder, or name it there with `dwarfstar node --model FILE`",
            code="model_not_found",
        )
    served = Path(source.path).name
    compared = [(file, file.problem or same_base(base, file.base, served, file.name)) for file in files]
    good = [file for file, difference in compared if difference is None]
    if not good:
        file, difference = compared[0]
        raise differs(node, file.name, served, difference or "")
    for file in good:
        if len(file.costs.layer_bytes) != source.layers or len(file.costs.active_bytes) not in (0, source.layers):
            raise PeerError(f"what {node} tells of {file.name} is not of {source.layers} layers", code="bad_offer")
    nearest = min(good, key=lambda file: (abs(file.costs.total - source.costs.total), file.name, file.fingerprint))
    kept = source.costs
    return replace(
        source,
        name=Path(nearest.path).stem,
        path=nearest.path,
        quantisation=nearest.quantisation,
        fingerprint=nearest.fingerprint,
        costs=replace(
            nearest.costs,
            kv_bytes_per_token=kept.kv_bytes_per_token,
            n_embd=kept.n_embd,
            vocabulary=kept.vocabulary,
        ),
        stands_for=source.fingerprint,
    )


class Host(Protocol):
    """The coordinator, as it is seen from here. main: the model that is wanted."""

    settings: Settings
    main: Source


class Files:
    """See the module."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._base: tuple[str, Base] | None = None  # of the file of that fingerprint
        self._reading = asyncio.Lock()

    @property
    def look(self) -> pb.Look | None:
        """What a node is to be asked before it is welcomed; None: nothing."""
        main = self._host.main
        asks = self._host.settings.mixed and main.loaded
        return pb.Look(model=main.ref, architecture=main.architecture) if asks else None

    async def choose(self, look: pb.Look, told: pb.Offer, node: str) -> Source | None:
        """What a node runs in the place of the served file; None: that one. Raises ModelError, PeerError."""
        main = self._host.main
        if look.model.fingerprint != main.fingerprint:
            raise PeerError("another model is served meanwhile", code="model_changed")
        if told.same:
            return None
        offered = read_offer(told)
        return choose(main, await self._base_of(main), offered, node)

    async def _base_of(self, main: Source) -> Base:
        async with self._reading:
            if self._base is None or self._base[0] != main.fingerprint:
                model = await asyncio.to_thread(read_model, main.path)
                self._base = main.fingerprint, await asyncio.to_thread(read_base, model)
            return self._base[1]
