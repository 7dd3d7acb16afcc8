"""A GGUF model: the directories of one file, or of the several a split model consists of. Never the weights.

A split model's metadata is that of its first file, its tensors are all files' together. What a reader of one file
guarantees is said in :mod:`dwarfstar_engine.model.gguf_reader`; here come the checks that need more than one value:
parts that belong together, a tensor for each layer, keys of the type that is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dwarfstar_engine.errors import ModelFileError
from dwarfstar_engine.model.ggml_types import FLOAT_TYPES, INTEGER_TYPES, ValueType
from dwarfstar_engine.model.gguf_reader import (
    MAX_TENSORS,
    Directory,
    MetaArray,
    MetaEntry,
    MetaValue,
    Readable,
    Scalar,
    TensorInfo,
    read_directory,
    read_directory_of,
    shown,
)

__all__ = ["GgufModel", "MetaArray", "MetaEntry", "MetaValue", "Scalar", "TensorInfo", "read_head", "read_model"]

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EMBEDDING = 1 << 20  # the widest models have 2^14; bounds what is allocated for a row
MAX_SHARDS = 1024  # a directory is kept in memory for each while they are joined

SHARD_NAME = re.compile(r"^(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)
LAYER_TENSOR = re.compile(r"^blk\.(?P<layer>\d{1,6})\.(?P<rest>.+)$", re.DOTALL | re.ASCII)
ARCHITECTURE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


@dataclass(frozen=True, eq=False)
class GgufModel:
    """A model's directory. All getters raise ModelFileError if the key is missing (without default) or of another type.

    paths: its files, in shard order. directory_bytes: bytes before the data section in each.
    entries: metadata with its types, in file order. tensors: all files' tensors, in file order.
    directory: the first file's directory, for verbatim copies.
    """

    paths: tuple[str, ...]
    directory_bytes: tuple[int, ...]
    alignment: int
    entries: Mapping[str, MetaEntry]
    tensors: Mapping[str, TensorInfo]
    directory: bytes

    @cached_property
    def metadata(self) -> Mapping[str, MetaValue]:
        """Key → value."""
        return {key: entry.value for key, entry in self.entries.items()}

    @cached_property
    def architecture(self) -> str:
        name = self.get_str("general.architecture")
        if not ARCHITECTURE.fullmatch(name):
            raise self.problem("general.architecture", "is not the name of an architecture")
        return name

    @cached_property
    def n_layers(self) -> int:
        return self._sized("block_count", MAX_LAYERS)

    @cached_property
    def n_embd(self) -> int:
        """Elements of a hidden state."""
        return self._sized("embedding_length", MAX_EMBEDDING)

    @cached_property
    def layers(self) -> tuple[tuple[tuple[str, TensorInfo], ...], ...]:
        """For each layer its tensors as (name without ``blk.<i>.``, tensor). Raises if a layer has none."""
        found: list[list[tuple[str, TensorInfo]]] = [[] for _ in range(self.n_layers)]
        for name, tensor in self.tensors.items():
            if match := LAYER_TENSOR.match(name):
                index = int(match["layer"])
                if index >= len(found) or str(index) != match["layer"]:
                    raise self.problem(
                        self.key("block_count"), f"says {len(found)} layers, but tensor {shown(name)} is there"
                    )
                found[index].append((match["rest"], tensor))
        for index, tensors in enumerate(found):
            if not tensors:
                raise self.problem(
                    self.key("block_count"), f"says {len(found)} layers, but layer {index} has no tensors"
                )
        return tuple(tuple(tensors) for tensors in found)

    def key(self, name: str) -> str:
        """``name`` under the architecture's prefix."""
        return f"{self.architecture}.{name}"

    def get_int(self, key: str, default: int | None = None) -> int:
        value = self._get(key, INTEGER_TYPES, default)
        assert isinstance(value, int)
        return value

    def get_float(self, key: str, default: float | None = None) -> float:
        value = self._get(key, FLOAT_TYPES | INTEGER_TYPES, default)
        assert isinstance(value, int | float)
        return float(value)

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, frozenset({ValueType.BOOL}), default)
        assert isinstance(value, bool)
        return value

    def get_str(self, key: str, default: str | None = None) -> str:
        value = self._get(key, frozenset({ValueType.STRING}), default)
        assert isinstance(value, str)
        return value

    def get_per_layer(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """One integer a layer: an array's elements, or a scalar repeated."""
        value = self.metadata.get(key)
        if not isinstance(value, MetaArray):
            return (self.get_int(key, default),) * self.n_layers
        if value.element_type not in INTEGER_TYPES or len(value) != self.n_layers:
            raise self.problem(key, f"must hold one integer for each of the {self.n_layers} layers")
        return tuple(int(v) for v in value)

    def problem(self, key: str, text: str) -> ModelFileError:
        """The error to raise about a key's value."""
        entry = self.entries.get(key)
        return ModelFileError(self.paths[0], entry.offset if entry else 0, shown(key), text)

    def _get(self, key: str, types: frozenset[ValueType], default: Scalar | None) -> MetaValue:
        entry = self.entries.get(key)
        if entry is None:
            if default is None:
                raise self.problem(key, "the key is missing: this is not a complete model")
            return default
        if entry.type not in types:
            raise self.problem(key, f"has type {entry.type.name.lower()}, which does not fit")
        return entry.value

    def _sized(self, name: str, most: int) -> int:
        value = self.get_int(self.key(name))
        if not 1 <= value <= most:
            raise self.problem(self.key(name), f"is {value}, not between 1 and {most}")
        return value


def read_model(path: str | os.PathLike[str]) -> GgufModel:
    """Read the directory of a model: a GGUF file, or any part of a split one with the others beside it.

    Raises ModelFileError.
    """
    given = _single(read_directory(os.fspath(path)))
    count = _split_number(given, "split.count", 1)
    if count <= 1:
        return given
    parts = [
        given if name == given.paths[0] else _single(read_directory(name, f"part {no} of {count} of the split model"))
        for no, name in enumerate(_part_paths(given, count), start=1)
    ]
    return _join(parts)


def read_head(file: Readable, name: str, size: int) -> GgufModel:
    """The directory of one file of ``size`` bytes, read front to back from where it is; of a split model, of that part.

    Raises ModelFileError, and what ``file`` raises.
    """
    return _single(read_directory_of(file, name, size))


def _single(directory: Directory) -> GgufModel:
    return GgufModel(
        paths=(directory.path,),
        directory_bytes=(len(directory.data),),
        alignment=directory.alignment,
        entries=directory.entries,
        tensors=directory.tensors,
        directory=directory.data,
    )


def _split_number(model: GgufModel, key: str, default: int | None, most: int = MAX_SHARDS) -> int:
    value = model.get_int(key, default)
    if not 0 <= value <= most:
        raise model.problem(key, f"is {value}, not between 0 and {most}")
    return value


def _part_paths(model: GgufModel, count: int) -> list[str]:
    folder, name = os.path.split(model.paths[0])
    match = SHARD_NAME.match(name)
    if match is None or int(match["count"]) != count:
        raise model.problem(
            "split.count", f"the model is split in {count} files, which must be named NAME-00001-of-{count:05}.gguf"
        )
    return [os.path.join(folder, f"{match['stem']}-{no:05}-of-{count:05}.gguf") for no in range(1, count + 1)]  # noqa: PTH118


def _join(parts: Sequence[GgufModel]) -> GgufModel:
    tensors: dict[str, TensorInfo] = {}
    for no, part in enumerate(parts):
        if (_split_number(part, "split.no", None), _split_number(part, "split.count", None)) != (no, len(parts)):
            raise part.problem("split.no", f"the file is not part {no + 1} of {len(parts)}, as its name says")
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise ModelFileError(part.paths[0], tensor.offset, shown(name), "the tensor is in another part too")
            tensors[name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise ModelFileError(part.paths[0], 0, "tensor_count", f"the parts hold more than {MAX_TENSORS} tensors")
    first = parts[0]
    expected = _split_number(first, "split.tensors.count", len(tensors), MAX_TENSORS)
    if expected != len(tensors):
        raise first.problem("split.tensors.count", f"is {expected}, but the parts hold {len(tensors)} tensors")
    return GgufModel(
        paths=tuple(part.paths[0] for part in parts),
        directory_bytes=tuple(part.directory_bytes[0] for part in parts),
        alignment=first.alignment,
        entries=first.entries,
        tensors=tensors,
        directory=first.directory,
    )
