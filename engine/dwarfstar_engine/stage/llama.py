"""One slice of a model, loaded into llama.cpp and run frame by frame.

Theory. A slice [a, b) is loaded as a complete small model from a virtual GGUF (``model.slice``); no file is
written. Its input is always hidden states (``llama_batch.embd``): token rows are embedded outside
(:class:`Embedder`) so that a stage before the last needs no vocabulary and computes no logits. Its output is the
tensor ``l_out-{b-a-1}``, copied out by an evaluation callback which then ends the graph, or, on the last stage,
logits. Every operation is the one the unsplit model runs, in the same order, so results are bit-exact.

Invariants. One thread owns a :class:`LlamaSlice`. Every token of a stage before the last is marked as an output,
because llama.cpp drops unmarked rows in its last layer. ``kv_unified`` is on: it keeps the captured rows in batch
order.
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
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llamacpp import llama

FloatRows = NDArray[np.float32]  # n × n_embd, C order
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
FLASH_MODES = {"auto": -1, "off": 0, "on": 1}
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How a slice runs. The same on every stage of a plan, but for threads and GPU settings.

    cells: KV cells shared by all slots. batch: most rows of one frame. gpu_layers: -1 means all.
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
    """A loaded slice. ``step`` runs rows through it; ``argmax``/``sample`` read the last stage's logits.

    Raises StageError if llama.cpp refuses to load it.
    """

    def __init__(
        self,
        file: SliceFile,
        rules: ArchRules,
        n_embd: int,
        options: LlamaOptions,
        on_progress: Callable[[float], None] | None = None,
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
        self._batch = _Batch(options.batch, rules.positions_per_token, token_input=rules.token_input)

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
            params.n_outputs_max = (
                options.slots
            )  # the compute buffer holds logits for so many rows, not for a whole chunk
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = FLASH_MODES[options.flash_attention]
        params.type_k = params.type_v = KV_TYPES[options.kv_type]
        params.kv_unified = True
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
        n = rows.shape[0]
        assert 0 < n <= self.options.batch and rows.dtype == np.float32 and rows.flags.c_contiguous
        batch = self._batch.fill(rows, positions, slots, wants if self.file.last else None)
        out: FloatRows | None = None
        if self.file.last:
            if self._injects:
                self._tap.begin(source=rows)
        else:
            out = np.empty((n, self.n_embd), np.float32)
            self._tap.begin(target=out, source=rows if self._injects else None)
        code = llama.llama_decode(self._context, batch)
        if code == 1:
            raise StageError("the KV cache of this stage is full", code="kv_full")
        if code != 0:
            raise StageError(f"llama.cpp failed to run a frame (code {code}): {llamacpp.log_tail()}")
        if out is not None or self._injects:
            self._tap.check(
                captured=None if out is None else out.nbytes, injected=rows.nbytes if self._injects else None
            )
        return out

    def logits(self, row: int) -> int:
        """The address of the logits (float × vocab_size) of batch row ``row``. Valid until the next step."""
        pointer = llama.llama_get_logits_ith(self._context, row)
        value = ctypes.cast(pointer, ctypes.c_void_p).value
        assert value, row
        return value

    def sample(self, chain: Any, row: int) -> int:
        """Draw with a llama.cpp sampler chain from row's logits; the chain accepts the token."""
        return int(llama.llama_sampler_sample(chain, self._context, row))

    def trim(self, slot: int, position: int) -> None:
        """Forget a slot's tokens from ``position`` on; 0 frees it."""
        llama.llama_memory_seq_rm(self._memory, slot, position, -1)

    def copy(self, source: int, target: int, position: int) -> None:
        """Share the cells of ``source`` before ``position`` with ``target``."""
        llama.llama_memory_seq_cp(self._memory, source, target, 0, position)

    def close(self) -> None:
        """Free the model. Idempotent."""
        if self._context is not None:
            llama.llama_free(self._context)
            self._context = None
        if self._model is not None:
            llama.llama_model_free(self._model)
            self._model = None


class _Batch:
    """A ``llama_batch`` over arrays allocated once; ``embd`` points into the caller's rows, nothing is copied."""

    def __init__(self, capacity: int, positions_per_token: int, *, token_input: bool = False) -> None:
        self._planes = positions_per_token
        self._position = np.zeros(capacity * positions_per_token, np.int32)
        self._slot = np.zeros(capacity, np.int32)
        self._counts = np.ones(capacity, np.int32)
        self._wants = np.zeros(capacity, np.int8)
        first = self._slot.ctypes.data
        self._slot_pointers = (ctypes.c_void_p * capacity)(*(first + 4 * i for i in range(capacity)))
        self._batch = llama.llama_batch()
        self._batch.pos = _pointer(self._position, type(self._batch.pos))
        self._batch.n_seq_id = _pointer(self._counts, type(self._batch.n_seq_id))
        self._batch.seq_id = ctypes.cast(self._slot_pointers, type(self._batch.seq_id))
        self._batch.logits = _pointer(self._wants, type(self._batch.logits))
        self._float_pointer = type(self._batch.embd)
        # Some graphs take token ids only: they are given zeros, and the rows are injected over their embeddings.
        self._tokens = np.zeros(capacity, np.int32) if token_input else None
        if self._tokens is not None:
            self._batch.token = _pointer(self._tokens, type(self._batch.token))

    def fill(
        self, rows: FloatRows, positions: NDArray[np.int32], slots: NDArray[np.uint16], wants: NDArray[np.uint8] | None
    ) -> Any:
        n = rows.shape[0]
        self._position[:n] = positions
        if self._planes > 1:  # M-RoPE: text positions in the first three planes, 0 in the fourth
            self._position[n : self._planes * n] = 0
            for plane in range(1, min(3, self._planes)):
                self._position[plane * n : (plane + 1) * n] = positions
        self._slot[:n] = slots
        if wants is None:
            self._wants[:n] = 1
        else:
            self._wants[:n] = wants
        self._batch.n_tokens = n
        if self._tokens is None:
            self._batch.embd = _pointer(rows, self._float_pointer)
        return self._batch


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, kind)


class Embedder:
    """Token ids → embedding rows, exactly as llama.cpp's ``get_rows`` computes them, from the file's own bytes.

    The tensor is mapped, not read: only rows that are used become resident.
    """

    def __init__(self, embedding: TokenEmbedding) -> None:
        self._embedding = embedding
        start = embedding.offset - embedding.offset % mmap.ALLOCATIONGRANULARITY
        end = embedding.offset + embedding.row_bytes * embedding.n_rows
        with Path(embedding.path).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), end - start, offset=start, access=mmap.ACCESS_READ)
        if hasattr(os, "posix_fadvise") and hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # rows are scattered: read-ahead would only fill memory
        self._view = np.frombuffer(self._map, np.uint8)
        self._base = self._view.ctypes.data + (embedding.offset - start)
        self._to_float = llamacpp.to_float_address(embedding.type)

    def rows(self, tokens: NDArray[np.int32]) -> FloatRows:
        """n token ids → n × n_embd f32, scaled as the architecture asks. Raises StageError on an id out of range."""
        e = self._embedding
        out = np.empty((tokens.shape[0], e.n_embd), np.float32)
        native.embed_rows(
            to_float=self._to_float,
            base=self._base,
            n_rows=e.n_rows,
            row_bytes=e.row_bytes,
            ids=tokens,
            scale=e.scale,
            out=out,
        )
        return out
