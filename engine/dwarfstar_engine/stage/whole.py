"""The unsplit model, loaded by llama.cpp's own loader: the reference that exactness tests and benchmarks compare with.

As a process (``python -m dwarfstar_engine.stage.whole``) it answers ``generate`` commands for ``dwarfstar bench``.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import ModelError
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llamacpp import llama
from dwarfstar_engine.stage.pipe import ChildPipe


class WholeModel:
    """One sequence on the unsplit model. Raises ModelError if it cannot be loaded."""

    def __init__(self, path: Path, *, context: int, threads: int = 1, batch: int = 512) -> None:
        llamacpp.init()
        self._model: Any = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            raise ModelError(f"{path}: llama.cpp could not load it: {llamacpp.log_tail()}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, batch, batch
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = llama.llama_init_from_model(self._model, params)
        assert self._context, "the model loaded, so its context is our own doing"
        self._memory = llama.llama_get_memory(self._context)
        self.vocab_size = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))
        self._batch = batch

    def feed(self, tokens: list[int]) -> int:
        """Run tokens after those fed before; returns the address of the last one's logits."""
        for start in range(0, len(tokens), self._batch):
            chunk = (llama.llama_token * len(tokens[start : start + self._batch]))(*tokens[start : start + self._batch])
            code = llama.llama_decode(self._context, llama.llama_batch_get_one(chunk, len(chunk)))
            assert code == 0, code
        pointer = llama.llama_get_logits_ith(self._context, -1)
        return int(ctypes.cast(pointer, ctypes.c_void_p).value or 0)

    def logits(self, address: int) -> NDArray[np.float32]:
        """A copy of the logits at an address ``feed`` returned: f32[vocab_size]."""
        view = np.ctypeslib.as_array((ctypes.c_float * self.vocab_size).from_address(address))
        return view.copy()

    def clear(self) -> None:
        """Start a new sequence."""
        llama.llama_memory_clear(self._memory, True)

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """``count`` greedy tokens after ``prompt``, and the time each was known, in seconds from the start."""
        self.clear()
        started = time.perf_counter()
        tokens, times = [], []
        feed = prompt
        for _ in range(count):
            token = native.argmax(self.feed(feed), self.vocab_size)
            tokens.append(token)
            times.append(time.perf_counter() - started)
            feed = [token]
        return tokens, times

    def close(self) -> None:
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)


async def _serve(pipe: ChildPipe) -> None:
    first = await pipe.command()
    if first.get("cpus") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, first["cpus"])
    model = WholeModel(Path(first["path"]), context=first["context"], threads=first["threads"])
    pipe.emit("ready")
    while True:
        command = await pipe.command()
        tokens, times = model.generate(command["prompt"], command["count"])
        pipe.emit("generated", tokens=tokens, times=times)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(_serve(ChildPipe()))


if __name__ == "__main__":
    main()
