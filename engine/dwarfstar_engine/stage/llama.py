"""One slice of a model, loaded into llama.cpp and run frame by frame.

Theory. A slice [a, b) is loaded as a complete small model from a virtual GGUF (``model.slice``); no file is
written. Its input is always hidden states (``llama_batch.embd``): token rows are embedded outside
(:class:`Embedder`) so that a stage before the last needs no vocabulary and computes no logits. Its output is the
tensor ``l_out-{b-a-1}``, copied out by an evaluation callback which then ends the graph, or, on the last stage,
logits. Every operation is the one the unsplit model runs, in the same order, so results are bit-exact.

Invariants. One thread owns a :class:`LlamaSlice`. Every token of a stage before the last is marked as an output,
because llama.cpp drops unmarked rows in its last layer. Each slot has a KV cache of its own (``kv_unified`` off): in
a shared one other slots' cells change the order of summation, so a text would depend on its neighbours (measured: log
probabilities moved by up to 0.25). llama.cpp then reorders batches of several sequences, so a frame holds rows of one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import StageError
from dwarfstar_engine.model.arch import ArchRules
from dwarfstar_engine.model.slice import SliceFile, TokenEmbedding
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.hot import FloatRows, HotStage, Table
from dwarfstar_engine.stage.llamacpp import llama

SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
FLASH_MODES = {"auto": -1, "off": 0, "on": 1}
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How a slice runs. The same on every stage of a plan, but for threads and GPU settings.

    cells: KV cells, divided evenly among the slots. batch: most rows of one frame. gpu_layers: -1 means all.
    """

    cells: int
    slots: int
    batch: int
    threads: int = 1
    gpu_layers: int = -1
    split_mode: str = "layer"
    flash_attention: str = "auto"
    kv_type: str = "f16"


class LlamaSlice:
    """A loaded slice. ``step`` runs rows through it; ``logits`` reads what the last stage computed.

    ``hot`` makes its llama.cpp calls; with an ``embedder`` it runs whole token frames, and sends on in ``wire``.
    Raises StageError if llama.cpp refuses to load it.
    """

    def __init__(
        self,
        file: SliceFile,
        rules: ArchRules,
        n_embd: int,
        options: LlamaOptions,
        on_progress: Callable[[float], None] | None = None,
        *,
        embedder: Embedder | None = None,
        wire: WireType = WireType.F32,
    ) -> None:
        llamacpp.init()
        self.file, self.n_embd, self.options = file, n_embd, options
        self._model: Any = None
        self._context: Any = None
        self._tap = native.Tap(
            capture=None if file.last else f"{rules.capture}-{file.layers[1] - file.layers[0] - 1}",
            inject=rules.inject_at if rules.token_input or not file.first else None,
            get_name=llamacpp.address("ggml_get_name"),
            nbytes=llamacpp.address("ggml_nbytes"),
            tensor_get=llamacpp.address("ggml_backend_tensor_get"),
            tensor_set=llamacpp.address("ggml_backend_tensor_set"),
        )
        self._injects = rules.inject_at is not None and (rules.token_input or not file.first)
        try:
            self._model = self._load(on_progress)
            self._context = self._open_context()
        except BaseException:
            self.close()
            raise
        self._memory = llama.llama_get_memory(self._context)
        self.vocab = llama.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama.llama_vocab_n_tokens(self.vocab))
        self.hot = HotStage(
            context=self._context,
            tap=self._tap,
            n_embd=n_embd,
            n_vocab=self.vocab_size,
            capacity=options.batch,
            slots=options.slots,
            planes=rules.positions_per_token,
            wire=wire,
            last=file.last,
            injects=self._injects,
            token_input=rules.token_input,
            table=None if embedder is None else embedder.table,
        )

    def _load(self, on_progress: Callable[[float], None] | None) -> Any:
        options = self.options
        params = llama.llama_model_default_params()
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        params.n_gpu_layers = options.gpu_layers
        params.split_mode = SPLIT_MODES[options.split_mode]

        def progress(share: float, _user: Any) -> bool:
            if on_progress is not None:
                on_progress(share)
            return True

        callback = llama.llama_progress_callback(progress)
        params.progress_callback = callback
        with native.VirtualFile(self.file.extents) as virtual:
            if not virtual.pointer:
                raise StageError("slices cannot be loaded on this platform: run the node on Linux or macOS")
            model = llama.llama_model_load_from_file_ptr(ctypes.c_void_p(virtual.pointer), params)
        if not model:
            a, b = self.file.layers
            raise StageError(
                f"llama.cpp could not load layers {a}–{b}: {llamacpp.log_tail() or 'it gave no reason'}",
                code="stage_load_failed",
            )
        return model

    def _open_context(self) -> Any:
        options = self.options
        params = llama.llama_context_default_params()
        params.n_ctx = options.cells
        params.n_batch = params.n_ubatch = options.batch
        params.n_seq_max = options.slots
        if self.file.last:
            # The compute buffer then holds logits for so many rows, and not for a whole chunk.
            params.n_outputs_max = options.slots
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = FLASH_MODES[options.flash_attention]
        params.type_k = params.type_v = KV_TYPES[options.kv_type]
        params.kv_unified = False
        params.no_perf = True
        params.offload_kqv = True
        if not self.file.last or self._injects:
            # The field's type is a ctypes prototype; a cast of the C function's address avoids Python in the loop.
            kind = type(params.cb_eval)
            params.cb_eval = ctypes.cast(ctypes.c_void_p(self._tap.callback_address), kind)
            params.cb_eval_user_data = self._tap.user_data
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise StageError(
                f"llama.cpp could not allocate KV cache or buffers: {llamacpp.log_tail() or 'it gave no reason'}",
                code="stage_load_failed",
            )
        return context

    def step(
        self, rows: FloatRows, positions: NDArray[np.int32], slots: NDArray[np.uint16], wants: NDArray[np.uint8]
    ) -> FloatRows | None:
        """Run n rows. Returns the hidden states n × n_embd after the slice's last layer, or None on the last stage.

        positions, slots, wants: one a row. Raises StageError if the KV cache is full or llama.cpp fails.
        """
        return self.hot.step(rows, positions, slots, wants)

    def logits(self, row: int) -> int:
        """The address of the logits (float × vocab_size) of batch row ``row``. Valid until the next step."""
        pointer = llama.llama_get_logits_ith(self._context, row)
        value = ctypes.cast(pointer, ctypes.c_void_p).value
        assert value, row
        return value

    def trim(self, slot: int, position: int) -> None:
        """Forget a slot's tokens from ``position`` on; 0 frees it."""
        llama.llama_memory_seq_rm(self._memory, slot, position, -1)

    def copy(self, source: int, target: int, position: int) -> None:
        """Share the cells of ``source`` before ``position`` with ``target``, which loses its own."""
        if source == target:
            return
        llama.llama_memory_seq_rm(self._memory, target, -1, -1)
        # Between caches llama.cpp copies a sequence whole, or aborts.
        llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        llama.llama_memory_seq_rm(self._memory, target, position, -1)

    def close(self) -> None:
        """Free the model. Idempotent."""
        if self._context is not None:
            llama.llama_free(self._context)
            self._context = None
        if self._model is not None:
            llama.llama_model_free(self._model)
            self._model = None


class Embedder:
    """Token ids → embedding rows, exactly as llama.cpp's ``get_rows`` computes them, from the file's own bytes.

    The tensor is mapped, not read: only rows that are used become resident.
    """

    def __init__(self, embedding: TokenEmbedding) -> None:
        start = embedding.offset - embedding.offset % mmap.ALLOCATIONGRANULARITY
        end = embedding.offset + embedding.row_bytes * embedding.n_rows
        with Path(embedding.path).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), end - start, offset=start, access=mmap.ACCESS_READ)
        if hasattr(os, "posix_fadvise") and hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # rows are scattered: read-ahead would only fill memory
        self._view = np.frombuffer(self._map, np.uint8)
        self.table = Table(
            to_float=llamacpp.to_float_address(embedding.type),
            base=self._view.ctypes.data + (embedding.offset - start),
            n_rows=embedding.n_rows,
            row_bytes=embedding.row_bytes,
            scale=embedding.scale,
        )
        self._n_embd = embedding.n_embd

    def rows(self, tokens: NDArray[np.int32]) -> FloatRows:
        """n token ids → n × n_embd f32, scaled as the architecture asks. Raises StageError on an id out of range."""
        t = self.table
        out = np.empty((tokens.shape[0], self._n_embd), np.float32)
        native.embed_rows(
            to_float=t.to_float,
            base=t.base,
            n_rows=t.n_rows,
            row_bytes=t.row_bytes,
            ids=tokens,
            scale=t.scale,
            out=out,
        )
        return out
