"""A tiny GGUF writer for tests, written apart from the engine's so that one cannot hide the other's mistakes.

It writes what it is told to, right or wrong: lengths and counts may be overridden to make hostile files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwarfstar_engine.model.slice import FileExtent, MemoryExtent, SliceFile, ZeroExtent

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
TENSOR_F32, TENSOR_F16, TENSOR_Q8_0 = 0, 1, 8
_BLOCKS = {TENSOR_F32: (1, 4), TENSOR_F16: (1, 2), TENSOR_Q8_0: (32, 34)}


@dataclass(frozen=True)
class Pair:
    """A key-value. For an array: kind ARR, element its elements' kind."""

    key: str
    kind: int
    value: Any
    element: int = U32


@dataclass(frozen=True)
class Tensor:
    """A tensor. Without ``data``, its bytes are distinct for each name."""

    name: str
    shape: tuple[int, ...]
    kind: int = TENSOR_F32
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        size, each = _BLOCKS[self.kind]
        n = 1
        for dim in self.shape:
            n *= dim
        return n // size * each

    def bytes(self) -> bytes:
        if self.data is not None:
            return self.data
        stamp = f"<{self.name}>".encode()
        return (stamp * (self.nbytes // len(stamp) + 1))[: self.nbytes]


def string(text: str | bytes) -> bytes:
    raw = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(kind: int, value: Any, element: int = U32) -> bytes:
    if kind == STR:
        return string(value)
    if kind == ARR:
        return struct.pack("<IQ", element, len(value)) + b"".join(value_bytes(element, v) for v in value)
    return struct.pack("<" + FORMATS[kind], value)


def pair_bytes(pair: Pair) -> bytes:
    return string(pair.key) + struct.pack("<I", pair.kind) + value_bytes(pair.kind, pair.value, pair.element)


def gguf_bytes(
    pairs: Sequence[Pair],
    tensors: Sequence[Tensor] = (),
    *,
    alignment: int = 32,
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
) -> bytes:
    """A whole file. The alignment is written as a key only if it is not the default."""
    pairs = [*pairs, *([] if alignment == 32 else [Pair("general.alignment", U32, alignment)])]
    out = b"GGUF" + struct.pack(
        "<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs
    )
    out += b"".join(map(pair_bytes, pairs))
    data = bytearray()  # bytes would be copied for each tensor
    for tensor in tensors:
        out += string(tensor.name) + struct.pack(
            f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape, tensor.kind, len(data)
        )
        data += tensor.bytes()
        data += bytes(-len(data) % alignment)
    return out + bytes(-len(out) % alignment) + data if tensors else out


def llama_pairs(n_layers: int = 4, n_embd: int = 32, architecture: str = "llama", vocab: int = 6) -> list[Pair]:
    """Metadata of a small model."""
    a = architecture
    return [
        Pair("general.architecture", STR, a),
        Pair("general.name", STR, "tiny ⭐"),
        Pair(f"{a}.block_count", U32, n_layers),
        Pair(f"{a}.embedding_length", U32, n_embd),
        Pair(f"{a}.context_length", U32, 128),
        Pair(f"{a}.attention.head_count", U32, 4),
        Pair(f"{a}.attention.head_count_kv", ARR, [2] * n_layers, U32),
        Pair(f"{a}.vocab_size", U32, vocab),
        Pair("tokenizer.ggml.model", STR, "llama"),
        Pair("tokenizer.ggml.tokens", ARR, [f"t{i}" for i in range(vocab)], STR),
        Pair("tokenizer.ggml.scores", ARR, [float(-i) for i in range(vocab)], F32),
    ]


def llama_tensors(n_layers: int = 4, n_embd: int = 32, vocab: int = 6, *, tied: bool = True) -> list[Tensor]:
    """Tensors of a small model: few, of several types, with sizes that need padding."""
    tensors = [Tensor("token_embd.weight", (n_embd, vocab), TENSOR_Q8_0)]
    tensors += [] if tied else [Tensor("output.weight", (n_embd, vocab), TENSOR_F16)]
    tensors += [Tensor("output_norm.weight", (n_embd,)), Tensor("rope_freqs.weight", (3,))]
    for i in range(n_layers):
        tensors.append(Tensor(f"blk.{i}.attn_norm.weight", (n_embd,)))
        tensors.append(Tensor(f"blk.{i}.ffn_up.weight", (n_embd, 5 + i), TENSOR_Q8_0))
    return tensors


def write(path: Path, *args: Any, **kwargs: Any) -> Path:
    """Write :func:`gguf_bytes` to a file."""
    path.write_bytes(gguf_bytes(*args, **kwargs))
    return path


def write_split(folder: Path, pairs: Sequence[Pair], shards: Sequence[Sequence[Tensor]]) -> list[Path]:
    """A split model; the first file has all metadata, each ``split.*``."""
    total, count = sum(map(len, shards)), len(shards)
    paths = []
    for no, tensors in enumerate(shards):
        split = [
            Pair("split.no", U16, no),
            Pair("split.count", U16, count),
            Pair("split.tensors.count", I32, total),
        ]
        path = folder / f"m-{no + 1:05}-of-{count:05}.gguf"
        paths.append(write(path, [*(pairs if no == 0 else []), *split], tensors))
    return paths


def contents(file: SliceFile) -> bytes:
    """A virtual file's bytes."""
    return b"".join(_extents(file))


def _extents(file: SliceFile) -> Iterable[bytes]:
    for extent in file.extents:
        match extent:
            case MemoryExtent(data):
                yield data
            case ZeroExtent(size):
                yield bytes(size)
            case FileExtent(path, offset, size):
                with Path(path).open("rb") as source:
                    source.seek(offset)
                    yield source.read(size)


def by_name(tensors: Iterable[Tensor]) -> Mapping[str, Tensor]:
    return {tensor.name: tensor for tensor in tensors}
