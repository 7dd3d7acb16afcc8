"""What the wire's codecs cost in quality: how far they move the distributions of the next token, on real text.

Theory. Text of this repository is fed to the two real models, teacher forced, some tokens a step. The slice before the
cut does not depend on the wire, so it runs once; its hidden states are encoded and decoded by every codec, and each
result goes to a slot of its own of the slice after the cut. Slots share nothing (``test_real_models`` shows it), and
the slot of the exact wire is the reference: per token, KL(exact ‖ codec) in nats, and whether both have the same most
likely token. Whatever a codec lost stays in the KV cache of its slot, as it would in use.

llama.cpp's CPU kernels round activations to 8 bits before they multiply them by quantised weights. A change of the last
bit of an f32 flips some of these roundings, the flips spread from layer to layer, and after a few the two runs have
independent rounding noise. So two things are measured:

- the model **as it is**: what a user sees. ``ulp``, which moves each value to its f32 neighbour, is the floor here: no
  codec that loses anything can be expected below it;
- the same weights **in f32**, and an f32 KV cache: nothing is rounded to 8 bits, and what is left is the codec's own.

``bf16`` is there for comparison. ``PYTHONPATH=tests python -m support.wire_quality`` prints the table of
``docs/wire.md`` (and leaves 1.6 GB in ``.cache``); with a folder as its argument the module answers the
requests of :func:`answer`; see ``exactness.Worker``.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.model import arch
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding
from dwarfstar_engine.native import FloatRows, WireType
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llama import Embedder, LlamaOptions, LlamaSlice
from dwarfstar_engine.stage.vocab import Vocabulary
from support import gguf_bytes as g
from support import real_models
from support.exactness import serve

Codec = Callable[[FloatRows], FloatRows]  # what arrives, of what was sent
Logits = NDArray[np.float64]

ROOT = Path(__file__).resolve().parents[2]
# Prose of several kinds and source code. The licence never changes; the others do, and the figures with them, little.
TEXTS = ("LICENSE", "docs/design.md", "engine/dwarfstar_engine/batch/scheduler.py", "README.md")
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
WINDOW = 512  # tokens of one text, from its beginning: each starts with an empty KV cache
CHUNK = 32  # rows of a step: fewer reads of the weights; few enough that llama.cpp's buffer of logits stays small
FULL_TOKENS = WINDOW * len(TEXTS)
CUTS = {
    real_models.SMOLLM2: (15, 1),
    real_models.GEMMA3: (9, 1),
}  # the middle, and the cut that is worst for all codecs


def _through(wire: WireType) -> Codec:
    return lambda rows: native.decode(wire, native.encode(wire, rows), *rows.shape)


def _ulp(rows: FloatRows) -> FloatRows:
    """Every other value up, every other down."""
    away = np.where(np.arange(rows.shape[1]) % 2, np.float32(np.inf), np.float32(-np.inf))
    return np.nextafter(rows, away)


def _bf16(rows: FloatRows) -> FloatRows:
    bits = rows.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


CODECS: dict[str, Codec] = {
    "f32": _through(WireType.F32),  # loses nothing: shows that the slots are equal
    "f16": _through(WireType.F16),
    "q8": _through(WireType.Q8),
    "ulp": _ulp,
    "bf16": _bf16,
}


@dataclass(frozen=True)
class Quality:
    """Of one codec at one cut, over ``tokens`` positions. Divergences are KL(exact ‖ codec) in nats."""

    tokens: int
    mean: float
    p99: float
    worst: float
    agreement: float  # share of positions with the same most likely token


def measure(
    path: Path, cut: int, tokens: int, codecs: Mapping[str, Codec], *, in_f32: bool = False
) -> dict[str, Quality]:
    """All codecs at one cut of a model, over so many tokens (a multiple of CHUNK) of TEXTS. in_f32: see above."""
    assert tokens % CHUNK == 0 and tokens <= FULL_TOKENS
    divergences: dict[str, list[float]] = {name: [] for name in codecs}
    same: dict[str, int] = dict.fromkeys(codecs, 0)
    path, kv_type = (_in_f32(path), "f32") if in_f32 else (path, "f16")
    with _Halves(path, cut, 1 + len(codecs), kv_type) as halves:
        for hidden, position in islice(halves.hidden(), tokens // CHUNK):
            exact = [_log_softmax(row) for row in halves.after(hidden, position, 0)]
            for slot, (name, codec) in enumerate(codecs.items(), start=1):
                for one, logits in zip(exact, halves.after(codec(hidden), position, slot), strict=True):
                    moved = _log_softmax(logits)
                    divergences[name].append(float(np.exp(one) @ (one - moved)))
                    same[name] += int(moved.argmax() == one.argmax())
    out = {}
    for name, values in divergences.items():
        assert len(values) == tokens, (len(values), tokens)
        out[name] = Quality(
            tokens=tokens,
            mean=float(np.mean(values)),
            p99=float(np.quantile(values, 0.99)),
            worst=max(values),
            agreement=same[name] / tokens,
        )
    return out


def _log_softmax(logits: NDArray[np.float32]) -> Logits:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


class _Halves:
    """A model cut in two; the second half has ``slots`` sequences."""

    def __init__(self, path: Path, cut: int, slots: int, kv_type: str) -> None:
        model = read_model(path)
        rules = arch.rules(model)
        self._windows = [
            Vocabulary(path).tokens((ROOT / text).read_text(), add_special=True)[:WINDOW] for text in TEXTS
        ]
        self._embedder = Embedder(token_embedding(model, rules))
        self._first, self._last = (
            LlamaSlice(
                slice_file(model, rules, *layers),
                rules,
                model.n_embd,
                LlamaOptions(WINDOW, n, CHUNK, kv_type=kv_type),
            )
            # A last slice computes logits of as many rows as it has slots.
            for layers, n in (((0, cut), 1), ((cut, model.n_layers), max(slots, CHUNK)))
        )
        self._slots = slots

    def __enter__(self) -> _Halves:
        return self

    def __exit__(self, *_: object) -> None:
        self._first.close()
        self._last.close()

    def hidden(self) -> Iterator[tuple[FloatRows, int]]:
        """The first half's output and its position, token by token; a window replaces the one before it."""
        for window in self._windows:
            for position in range(0, WINDOW, CHUNK):
                rows = self._embedder.rows(np.array(window[position : position + CHUNK], np.int32))
                hidden = _step(self._first, rows, position, 0)
                assert hidden is not None
                yield hidden, position

    def after(self, hidden: FloatRows, position: int, slot: int) -> Iterator[NDArray[np.float32]]:
        """The logits of each row; valid until the next step."""
        _step(self._last, hidden, position, slot)
        for row in range(CHUNK):
            view = (ctypes.c_float * self._last.vocab_size).from_address(self._last.logits(row))
            yield np.ctypeslib.as_array(view)


def _step(half: LlamaSlice, rows: FloatRows, position: int, slot: int) -> FloatRows | None:
    return half.step(rows, position, slot, np.ones(CHUNK, np.uint8))


def _in_f32(path: Path) -> Path:
    """The model with all weights as f32, made once: llama.cpp then multiplies without rounding activations."""
    target = real_models.CACHE / f"{path.stem}.f32.gguf"
    if target.exists():
        return target
    llamacpp.init()
    model = read_model(path)
    tensors = []
    with path.open("rb") as file:
        for name, tensor in model.tensors.items():
            file.seek(tensor.offset)
            data = file.read(tensor.nbytes)
            if address := llamacpp.to_float_address(tensor.type):
                values = np.empty(math.prod(tensor.shape), np.float32)
                source = ctypes.create_string_buffer(data, len(data))
                _ToFloat(address)(source, values.ctypes.data, values.size)
                data = values.tobytes()
            tensors.append(g.Tensor(name, tensor.shape, g.TENSOR_F32, data))
    real_models.CACHE.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")  # its own name: two runs may write at the same time
    try:
        part.write_bytes(g.gguf_bytes(real_models.pairs_of(model), tensors))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """``model``: its name. ``cut``, ``tokens``, ``codecs`` (names), ``in_f32``: as :func:`measure`."""
    codecs = {name: CODECS[name] for name in request["codecs"]}
    path = real_models.path_of(request["model"])
    found = measure(path, request["cut"], request["tokens"], codecs, in_f32=request["in_f32"])
    return {name: asdict(quality) for name, quality in found.items()}


def table(models: Sequence[str] = real_models.NAMES) -> Iterator[str]:
    """The lines of the table of all codecs, as Markdown."""
    codecs = {name: codec for name, codec in CODECS.items() if name != "f32"}
    yield "| model | cut | weights | codec | bytes per value | mean KL | 99 % | largest | same token |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for model in models:
        path = real_models.path_of(model)
        cols = read_model(path).n_embd
        size = {"ulp": 4.0, "bf16": 2.0} | {
            wire.name.lower(): native.encoded_size(wire, 1, cols) / cols for wire in WireType
        }
        for cut in CUTS[model]:
            for in_f32 in (False, True):
                weights = "f32" if in_f32 else "as they are"
                for name, q in measure(path, cut, FULL_TOKENS, codecs, in_f32=in_f32).items():
                    figures = f"{size[name]:.3f} | {q.mean:.1e} | {q.p99:.1e} | {q.worst:.1e} | {q.agreement:.2%}"
                    yield f"| {model} | {cut} | {weights} | {name} | {figures} |"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(answer)
    else:
        for line in table():
            print(line, flush=True)
