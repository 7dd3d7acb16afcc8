"""A sequence goes from one loaded slice to another of the same layers, in the middle of its text: are the bits alike?

Theory. Two chains of slices are driven alike. In one of them, after some steps, all slices are replaced by freshly
loaded ones, with the same cuts or with others, which take the slot's cells from those that had their layers; then both
go on. All logits must be equal bits, and what a new slice gives of these layers must be the bytes that it took.

``python -m support.carried FOLDER`` answers the requests of :func:`answer`; see ``exactness.Worker``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine.errors import FrameError, StageError
from dwarfstar_engine.model import arch
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding
from dwarfstar_engine.stage.cells import divide
from dwarfstar_engine.stage.llama import Embedder, LlamaOptions, LlamaSlice
from support import real_models, tiny_models
from support.exactness import serve

STEPS = 4  # before the move, and after it
ONE_CUT = "it has one cut"
OTHER = 2  # a slot with another text, which does not move


class Chain:
    """Slices one after the other. own: of slots with a context each, as where rows are not run together."""

    def __init__(self, path: Path, bounds: Sequence[int], options: LlamaOptions) -> None:
        self._model, self.options = read_model(path), options
        self._rules, self._bounds = arch.rules(self._model), bounds
        self._embedder = Embedder(token_embedding(self._model, self._rules))
        self.slices = [self._load(a, b) for a, b in pairwise(bounds)]

    def _load(self, a: int, b: int) -> LlamaSlice:
        file = slice_file(self._model, self._rules, a, b)
        return LlamaSlice(file, self._rules, self._model.n_embd, self.options)

    def feed(self, tokens: Sequence[int], position: int, slot: int) -> NDArray[np.float32]:
        """The last token's logits."""
        n = len(tokens)
        rows, wants = self._embedder.rows(np.array(tokens, np.int32)), np.zeros(n, np.uint8)
        wants[-1] = 1
        for slice_ in self.slices:
            out = slice_.step(rows, position, slot, wants, prompt=n > 1)
            rows = rows if out is None else out
        last = self.slices[-1]
        address = last.logits(n - 1, slot, prompt=n > 1)
        return np.ctypeslib.as_array((ctypes.c_float * last.vocab_size).from_address(address)).copy()

    def move(self, slot: int, positions: int, bounds: Sequence[int], *, own: bool) -> bool:
        """Load slices anew, and let them take the cells. Whether they give them again as the bytes that they took."""
        alike, olds = True, list(zip(pairwise(self._bounds), self.slices, strict=True))
        self._bounds, self.slices = bounds, []
        for a, b in pairwise(bounds):
            new = self._load(a, b)
            self.slices.append(new)
            if own:
                new.open_slots()
            parts = {(max(a, begin), min(b, end)): old for (begin, end), old in olds if max(a, begin) < min(b, end)}
            given = {layers: old.give(slot, positions, layers) for layers, old in parts.items()}
            taken = {layers: bytes(data) for layers, (data, _) in given.items()}
            floor = max(floor for _, floor in given.values())
            for layers in given if len(given) > 1 else ():
                alike = alike and self._refuses(new, slot, positions, taken, layers)
            new.take(slot, positions, floor, {layers: data for layers, (data, _) in given.items()})
            assert new.hot.held(slot)[0] == positions
            for layers, before in taken.items():
                after = bytes(new.give(slot, positions, layers)[0])
                same = after == before
                if not same:
                    same = self._cells(after, layers, positions) == self._cells(before, layers, positions)
                alike = alike and same
        for _, old in olds:
            old.close()
        return alike

    @staticmethod
    def _refuses(
        new: LlamaSlice, slot: int, positions: int, given: Mapping[tuple[int, int], bytes], lacking: tuple[int, int]
    ) -> bool:
        """Whether nothing is held after one part was cut off at its end, or left out."""
        parts = {layers: bytearray(data) for layers, data in given.items()}
        for damaged in (parts | {lacking: parts[lacking][:-1]}, {one: parts[one] for one in parts if one != lacking}):
            try:
                new.take(slot, positions, 0, damaged)
            except FrameError:
                if new.hot.held(slot)[0] == 0:
                    continue
            return False
        return True

    def _cells(self, data: bytes, layers: tuple[int, int], positions: int) -> bytearray:
        """Without the number of the sequence that they were written of."""
        a, b = layers
        return divide(data, self._rules.windowed[a:b] or (False,) * (b - a), 0, b - a, positions)

    def close(self) -> None:
        for slice_ in self.slices:
            slice_.close()


def moved(
    path: Path, bounds: Sequence[int], options: LlamaOptions, prompt: Sequence[int], **how: Any
) -> dict[str, Any]:
    """source, target: whether slots have contexts of their own there. ahead: steps done behind what is carried. slot:
    that moves; llama.cpp writes the number of a sequence with its cells, which is 0 in a context of its own. after:
    bounds of the slices that take them."""
    rows: list[list[NDArray[np.float32]]] = []
    out: dict[str, Any] = {}
    for moves in (False, True):
        chain = Chain(path, bounds, options)
        if how["source"]:
            for slice_ in chain.slices:
                slice_.open_slots()
        slot, other = how["slot"], OTHER if options.slots > 1 else 0
        logits, tokens = [chain.feed(prompt, 0, slot)], list(prompt)
        if other != slot:
            chain.feed(prompt[1:], 0, other)
        for step in range(2 * STEPS):
            if step == STEPS and moves:
                for _ in range(how["ahead"]):  # guesses that were not right
                    chain.feed([7], len(tokens), slot)
                out["alike"] = chain.move(slot, len(tokens), how["after"] or bounds, own=how["target"])
            tokens.append(int(logits[-1].argmax()))
            logits.append(chain.feed(tokens[-1:], len(tokens) - 1, slot))
        chain.close()
        rows.append(logits)
    want, got = (np.stack(one) for one in rows)
    assert np.isfinite(want).all()
    equal = np.array_equal(want.view(np.uint32), got.view(np.uint32))
    out["difference"] = 0.0 if equal else max(float(np.abs(want - got).max()), sys.float_info.min)
    return out


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """model: a name of ``real_models``, or ``family``: a tiny model. recut: other cuts behind the move; True: another
    one, which a tiny model may not have."""
    how: dict[str, Any] = {"source": False, "target": False, "ahead": 0, "slot": 1, **request.get("how", {})}
    how["after"] = None
    options = LlamaOptions(context=1024, slots=4, batch=640)
    if "model" in request:
        path = real_models.path_of(request["model"])
        model, prompt = read_model(path), real_models.words(path)[: request["prompt"]]
    else:
        path = Path(request["folder"]) / f"{request['family']}.gguf"
        tiny_models.make_tiny(request["family"], path)
        model = read_model(path)
        prompt = [3 + (37 * i * i + 11 * i) % 200 for i in range(12)]
        options = replace(options, context=256, batch=16)
    options = replace(options, **request.get("options", {}))
    forbidden = arch.rules(model).forbidden_lengths
    lengths = ((cut, model.n_layers - cut) for cut in arch.legal_cuts(model))
    first, *others = [one[0] for one in lengths if not set(one) & set(forbidden)]
    cuts, recut = request.get("cuts", [first]), request.get("recut")
    if recut is True and not others:
        return {"refused": ONE_CUT}
    if recut is not None:
        how["after"] = (0, *(others[-1:] if recut is True else recut), model.n_layers)
    try:
        return moved(path, (0, *cuts, model.n_layers), options, prompt, **how)
    except (StageError, FrameError) as error:
        return {"refused": error.message}


if __name__ == "__main__":
    serve(answer)
