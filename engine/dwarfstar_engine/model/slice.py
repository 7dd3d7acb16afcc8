"""A slice of a model's layers as a *virtual GGUF*: header bytes of our own, then byte ranges of the original files.

Theory. llama.cpp loads layers a … b-1 of a model if they are given to it as a whole model of b-a layers: layer count
and per-layer arrays cut, tensors renamed, what the slice does not use made tiny. Nothing is written or copied: a
:class:`SliceFile` lists extents that, one after the other, *are* the file, and the native library presents them as a
``FILE*``. Key-values that stay as they are, are copied byte for byte.

What becomes of the tensors that belong to no layer:

- *Token embedding and output head*, on a stage that is not last: one row of zeros, with a vocabulary of size 1. So
  the unused head costs nothing. Every stage is fed rows; :func:`token_embedding` tells where the first stage's lie.
- On the last stage a head of its own (``output.weight``) stays, and the embedding, which llama.cpp insists on but which
  nobody reads, becomes zeros of the cheapest type its rows can have. An embedding tied to the head stays.
- All else (final norm, RoPE factors, position embeddings) is small or needed everywhere, and goes to every stage.

Invariants. Every stage has the same non-layer tensors by name, so llama.cpp, which counts them, finds what it expects.
Over the slices of any division of the model each layer's bytes are there exactly once. Tensor data starts at multiples
of the file's alignment and lies without gaps, as llama.cpp demands.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from types import MappingProxyType

from dwarfstar_engine.errors import IllegalCutError, UnsupportedModelError
from dwarfstar_engine.model.arch import ArchRules, check_slice
from dwarfstar_engine.model.ggml_types import (
    F32,
    FLOAT_TYPES,
    INTEGER_TYPES,
    PLACEHOLDER_TYPES,
    TENSOR_TYPES,
    VALUE_FORMATS,
    ValueType,
    tensor_type,
)
from dwarfstar_engine.model.gguf import GgufModel, MetaArray, MetaEntry, Scalar, TensorInfo

TOKEN_EMBD, OUTPUT = "token_embd.weight", "output.weight"
VOCABULARY_TENSORS = (TOKEN_EMBD, OUTPUT, "output.bias")  # their last dimension is the vocabulary
# Arrays are taken to go by layer if their length is the number of layers, but for those in other namespaces (few layer
# keys, "xielu.*" among them, lack the architecture's prefix) and these, which may have that length by chance.
OTHER_NAMESPACES = ("general.", "tokenizer.", "split.", "adapter.", "imatrix.", "quantize.")
OTHER_ARRAYS = (".rope.dimension_sections", ".classifier.output_labels", ".target_layers")
VERSION = 3
NEAREST_SHOWN = 2  # legal cuts named in an error


@dataclass(frozen=True, slots=True)
class MemoryExtent:
    """Bytes given here."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class FileExtent:
    """``size`` bytes of a file, from ``offset``."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ZeroExtent:
    """``size`` zero bytes."""

    size: int


Extent = MemoryExtent | FileExtent | ZeroExtent


@dataclass(frozen=True, slots=True)
class SliceFile:
    """A virtual GGUF. Its bytes are those of ``extents`` one after the other, ``size`` in all.

    weights_bytes: tensor data, without padding. layers: [a, b) of the whole model.
    tensors: name in the slice → (bytes from the virtual file's start, bytes).
    """

    extents: tuple[Extent, ...]
    size: int
    weights_bytes: int
    layers: tuple[int, int]
    first: bool
    last: bool
    tensors: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class TokenEmbedding:
    """Where the embedding rows are. Row i is at ``offset + i * row_bytes``, n_embd values of ``type``.

    scale: factor on each value, for models whose graph scales embedded tokens but not rows it is given.
    """

    path: str
    offset: int
    row_bytes: int
    n_rows: int
    n_embd: int
    type: int
    scale: float


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a slice. ``source`` is None for zeros."""

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int
    source: TensorInfo | None


def slice_file(model: GgufModel, rules: ArchRules, a: int, b: int) -> SliceFile:
    """Layers a … b-1 as a virtual GGUF. ``rules`` are the model's.

    Raises IllegalCutError if they are no slice llama.cpp can compute exactly, ModelFileError for a damaged directory.
    """
    check_slice(model, a, b)
    last = b == model.n_layers
    parts = [*shared_parts(model, last=last)]
    for index, tensors in enumerate(model.layers[a:b]):
        parts += [Part(f"blk.{index}.{rest}", t.shape, t.type, t.nbytes, t) for rest, t in tensors]
    pairs = [*_pairs(model, _overrides(model, rules, a, b), keep_tokenizer=last)]
    return _assemble(pairs, parts, model.alignment, (a, b), first=a == 0, last=last)


def vocab_file(model: GgufModel) -> SliceFile:
    """The metadata alone, for loading with ``vocab_only``: a virtual GGUF without tensors."""
    layers = (0, model.n_layers)
    return _assemble([*_pairs(model, {}, keep_tokenizer=True)], [], model.alignment, layers, first=True, last=True)


def shared_parts(model: GgufModel, *, last: bool) -> Iterable[Part]:
    """The tensors that belong to no layer, as a stage has them."""
    layer_tensors = {t.name for tensors in model.layers for _, t in tensors}
    for name, t in model.tensors.items():
        if name in layer_tensors:
            continue
        if name in VOCABULARY_TENSORS and not last:
            yield _zeros(name, (*t.shape[:-1], 1), F32)
        elif name == TOKEN_EMBD and OUTPUT in model.tensors:
            kind = _cheapest(t)
            yield Part(name, t.shape, t.type, t.nbytes, t) if kind == t.type else _zeros(name, t.shape, kind)
        else:
            yield Part(name, t.shape, t.type, t.nbytes, t)


def token_embedding(model: GgufModel, rules: ArchRules) -> TokenEmbedding:
    """The rows the first stage embeds itself. Raises UnsupportedModelError if there are none of the right width."""
    tensor = model.tensors.get(TOKEN_EMBD) or model.tensors.get(OUTPUT)  # some files hold the shared matrix as output
    if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] != model.n_embd:
        raise UnsupportedModelError(
            f"the model has no token embedding of {model.n_embd} values a row: it cannot be fed with tokens"
        )
    return TokenEmbedding(
        path=tensor.path,
        offset=tensor.offset,
        row_bytes=tensor.nbytes // tensor.shape[1],
        n_rows=tensor.shape[1],
        n_embd=tensor.shape[0],
        type=tensor.type,
        scale=rules.embed_scale,
    )


def check_cut(n_layers: int, legal_cuts: Sequence[int], cuts: Sequence[int]) -> None:
    """Raise IllegalCutError unless ``cuts`` rise and each is legal. The message names the nearest legal ones."""
    for cut in cuts:
        if cut in legal_cuts:
            continue
        near = sorted(sorted(legal_cuts, key=lambda legal: (abs(legal - cut), legal))[:NEAREST_SHOWN])
        hint = f"the nearest legal cuts are {' and '.join(map(str, near))}" if near else "it cannot be divided"
        raise IllegalCutError(f"layer {cut} is not a legal cut of this {n_layers}-layer model: {hint}")
    if any(x >= y for x, y in pairwise(cuts)):
        raise IllegalCutError("the cuts must rise: give each boundary once, in order")


def _zeros(name: str, shape: tuple[int, ...], type_id: int) -> Part:
    return Part(name, shape, type_id, tensor_type(type_id).row_bytes(shape[0]) * prod(shape[1:]), None)


def _cheapest(tensor: TensorInfo) -> int:
    """The type in which a tensor that nobody reads takes the fewest bytes."""
    fitting = (kind for kind in PLACEHOLDER_TYPES if tensor.shape[0] % kind.block_size == 0)
    best = min(fitting, key=lambda kind: kind.row_bytes(tensor.shape[0]))
    return (
        best.id
        if best.row_bytes(tensor.shape[0]) < TENSOR_TYPES[tensor.type].row_bytes(tensor.shape[0])
        else tensor.type
    )


# Metadata.


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _pair(key: str, kind: ValueType, value: Scalar) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", kind) + _string(value)
    return _string(key) + struct.pack("<I" + VALUE_FORMATS[kind], kind, value)


def _array_pair(key: str, kind: ValueType, values: Sequence[Scalar]) -> bytes:
    head = _string(key) + struct.pack("<IIQ", ValueType.ARRAY, kind, len(values))
    return head + struct.pack(f"<{len(values)}{VALUE_FORMATS[kind]}", *values)


def _scalar_pair(entry: MetaEntry | None, key: str, value: int | float | bool) -> bytes:
    """A pair with the value's own type; an integer keeps the file's width if it has the key."""
    if isinstance(value, bool):
        return _pair(key, ValueType.BOOL, value)
    if isinstance(value, float):
        return _pair(key, entry.type if entry and entry.type in FLOAT_TYPES else ValueType.FLOAT32, value)
    known = entry.type if entry and entry.type in INTEGER_TYPES else ValueType.UINT32
    try:
        return _pair(key, known, value)
    except struct.error:  # negative, or wider than the file's type
        return _pair(key, ValueType.INT32 if value < 0 else ValueType.UINT32, value)


def _overrides(model: GgufModel, rules: ArchRules, a: int, b: int) -> dict[str, bytes]:
    """Key → the pair that takes its place. Keys the file lacks are added."""
    scalars: dict[str, int | float | bool] = {model.key("block_count"): b - a}
    leading_dense = model.key("leading_dense_block_count")
    if leading_dense in model.entries:
        scalars[leading_dense] = min(max(model.get_int(leading_dense) - a, 0), b - a)
    scalars.update(rules.metadata)
    if a > 0:
        scalars.update(rules.later_metadata)
    pairs: dict[str, bytes] = {}
    for key, entry in model.entries.items():
        if _by_layer(model, entry) and isinstance(entry.value, MetaArray):
            pairs[key] = _array_pair(key, entry.value.element_type, entry.value[a:b])
    for key, values in rules.layer_metadata:
        value = model.metadata.get(key)
        kind = value.element_type if isinstance(value, MetaArray) else ValueType.UINT32
        pairs[key] = _array_pair(key, kind, values[a:b])
    if b < model.n_layers:
        pairs["tokenizer.ggml.model"] = _pair("tokenizer.ggml.model", ValueType.STRING, "no_vocab")
        scalars[model.key("vocab_size")] = 1
    pairs.update((key, _scalar_pair(model.entries.get(key), key, value)) for key, value in scalars.items())
    return pairs


def _by_layer(model: GgufModel, entry: MetaEntry) -> bool:
    """Whether an array has one element for each layer. Nothing but its length says so."""
    return (
        isinstance(entry.value, MetaArray)
        and entry.value.element_type is not ValueType.STRING
        and len(entry.value) == model.n_layers
        and not entry.key.startswith(OTHER_NAMESPACES)
        and not entry.key.endswith(OTHER_ARRAYS)
    )


def _pairs(model: GgufModel, overrides: Mapping[str, bytes], *, keep_tokenizer: bool) -> Iterable[bytes]:
    """The key-values of a slice, each as bytes, in the file's order and then those it lacks."""
    for key, entry in model.entries.items():
        if key in overrides:
            yield overrides[key]
        elif not key.startswith("split.") and (keep_tokenizer or not key.startswith("tokenizer.")):
            yield model.directory[entry.offset : entry.end]
    yield from (pair for key, pair in overrides.items() if key not in model.entries)


# The virtual file.


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _assemble(
    pairs: Sequence[bytes],
    parts: Sequence[Part],
    alignment: int,
    layers: tuple[int, int],
    *,
    first: bool,
    last: bool,
) -> SliceFile:
    header = [b"GGUF", struct.pack("<IQQ", VERSION, len(parts), len(pairs)), *pairs]
    offsets, at = [], 0
    for part in parts:
        offsets.append(at)
        at += _padded(part.nbytes, alignment)
    for part, offset in zip(parts, offsets, strict=True):
        n = len(part.shape)
        header.append(_string(part.name) + struct.pack(f"<I{n}QIQ", n, *part.shape, part.type, offset))
    directory = b"".join(header)
    base = _padded(len(directory), alignment)
    return SliceFile(
        extents=_merged([MemoryExtent(directory.ljust(base, b"\0")), *_data(parts, alignment)]),
        size=base + at,
        weights_bytes=sum(part.nbytes for part in parts),
        layers=layers,
        first=first,
        last=last,
        tensors=MappingProxyType({p.name: (base + o, p.nbytes) for p, o in zip(parts, offsets, strict=True)}),
    )


def _data(parts: Iterable[Part], alignment: int) -> Iterable[Extent]:
    for part in parts:
        source = part.source
        yield ZeroExtent(part.nbytes) if source is None else FileExtent(source.path, source.offset, part.nbytes)
        yield ZeroExtent(_padded(part.nbytes, alignment) - part.nbytes)


def _merged(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The same bytes in as few extents: empty ones dropped, neighbours in a file or of zeros joined."""
    merged: list[Extent] = []
    for extent in extents:
        before = merged[-1] if merged else None
        match before, extent:
            case _, ZeroExtent(0):
                pass
            case ZeroExtent(size), ZeroExtent(more):
                merged[-1] = ZeroExtent(size + more)
            case FileExtent(path, offset, size), FileExtent(same, start, more) if (path, offset + size) == (
                same,
                start,
            ):
                merged[-1] = FileExtent(path, offset, size + more)
            case _:
                merged.append(extent)
    return tuple(merged)
