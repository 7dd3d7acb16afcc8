"""One slice of a model, loaded into llama.cpp and run frame by frame.

Theory. A slice [a, b) is loaded as a complete small model from a virtual GGUF (``model.slice``); no file is
written. Its input is always hidden states (``llama_batch.embd``): token rows are embedded outside
(:class:`Embedder`) so that a stage before the last needs no vocabulary and computes no logits. Its output is the
tensor ``l_out-{b-a-1}``, copied out by an evaluation callback which then ends the graph, or, on the last stage,
logits. Every operation is the one the unsplit model runs, in the same order, so results are bit-exact.

Two contexts share the weights, and a slot's rows may be in either (``native/src/stage.cpp``): one holds a sequence for
each slot and runs what is generated; the other reads one prompt in large batches and lets the first go before it. The
few models whose cells llama.cpp cannot move from one to the other have one context for both.

Invariants. Every token of a stage before the last is marked as an output, because llama.cpp drops unmarked rows in its
last layer. Each slot has a KV cache of its own (``kv_unified`` off): in a shared one other slots' cells change the
order of summation, so a text would depend on its neighbours (measured: log probabilities moved by up to 0.25).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import FrameError, StageError
from dwarfstar_engine.model.arch import ArchRules
from dwarfstar_engine.model.slice import SliceFile, TokenEmbedding
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.stage import cells, llamacpp
from dwarfstar_engine.stage.hot import FloatRows, HotStage, Side, Table
from dwarfstar_engine.stage.llamacpp import llama

log = logging.getLogger("dwarfstar.slice")

SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
FLASH_MODES = {"auto": -1, "off": 0, "on": 1}
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
_seq_pos_min, _seq_pos_max = llama.llama_memory_seq_pos_min, llama.llama_memory_seq_pos_max
STEP_ROWS = 64  # rows of a frame that is not of a prompt: tokens of that many streams, or guesses
STEP_OUTPUTS = 16  # of these, tokens of one decode: its logits have a place each


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How a slice runs. The same on every stage of a plan, but for threads and GPU settings.

    context: KV cells of each slot; the prompt's context has as many. batch: most rows of a prompt's frame.
    gpu_layers: -1 means all. exact: run rows of several slots together only if that changes no bit.
    """

    context: int
    slots: int
    batch: int
    threads: int = 1
    gpu_layers: int = -1
    split_mode: str = "layer"
    flash_attention: str = "auto"
    kv_type: str = "f16"
    exact: bool = False


class LlamaSlice:
    """A loaded slice. ``step`` runs rows through it; ``logits`` reads what the last stage computed.

    ``hot`` makes its llama.cpp calls; with an ``embedder`` it runs whole token frames.
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
    ) -> None:
        llamacpp.init()
        self.file, self.n_embd, self.options = file, n_embd, options
        self._model: Any = None
        self._contexts: list[Any] = []
        self._own: list[Side] = []  # of slots
        self._capture = None if file.last else f"{rules.capture}-{file.layers[1] - file.layers[0] - 1}"
        self._injects = rules.inject_at is not None and (rules.token_input or not file.first)
        self._inject = rules.inject_at if self._injects else None
        self._rules, self._table = rules, None if embedder is None else embedder.table
        self.embeds = embedder is not None
        try:
            self._model = self._load(on_progress)
            self.vocab = llama.llama_model_get_vocab(self._model)
            self.vocab_size = int(llama.llama_vocab_n_tokens(self.vocab))
            self.window = int(llama.llama_model_n_swa(self._model))
            self.hot = self._open(apart=options.slots > 1)  # one slot has nobody to go first
            if options.slots > 1 and not self._moves_cells():
                self.hot.close()
                self._close_contexts()
                self.hot = self._open(apart=False)
        except BaseException:
            self.close()
            raise

    def _open(self, *, apart: bool) -> HotStage:
        """Contexts for steps and for prompts; one for both unless ``apart``."""
        options = self.options
        outputs, rows = max(STEP_OUTPUTS, options.slots), max(STEP_ROWS, options.slots)
        if apart:
            self._prompt = self._open_context(1, options.batch, 1, pauses=True)
            self._steps = self._open_context(options.slots, rows, outputs)
        else:
            self._steps = self._prompt = self._open_context(options.slots, max(rows, options.batch), outputs)
        return self._hot()

    def open_slots(self) -> None:
        """Give each slot a context of its own: where rows of several slots are not run together, it is quicker.

        llama.cpp then uses a slot's graph again for the next row. Does nothing where prompts have no context apart.
        """
        options = self.options
        if self._steps is self._prompt:
            return
        self.hot.close()  # before another one listens at the prompt's context
        llama.llama_free(self._contexts.pop())
        self._own = [self._open_context(1, 1, 1) for _ in range(options.slots)]
        self._steps = replace(self._own[0], capacity=STEP_ROWS, outputs=STEP_ROWS)
        self.hot = self._hot()

    def _hot(self) -> HotStage:
        options, rules = self.options, self._rules
        return HotStage(
            steps=self._steps,
            prompt=self._prompt,
            own=self._own,
            n_embd=self.n_embd,
            n_vocab=self.vocab_size,
            slots=options.slots,
            planes=rules.positions_per_token,
            window=self.window,
            last=self.file.last,
            injects=self._injects,
            token_input=rules.token_input,
            table=self._table,
        )

    def _moves_cells(self) -> bool:
        """Whether llama.cpp can move this model's cells from one context to the other and back: tried, with noise."""
        noise = np.random.default_rng(0).standard_normal((2, self.n_embd), dtype=np.float32)
        try:
            self.hot.step(noise, 0, 0, np.array([0, 1], np.uint8), prompt=True)
            self.hot.step(noise[:1], 2, 0, np.ones(1, np.uint8), prompt=False)
            self.hot.step(noise[:1], 3, 0, np.zeros(1, np.uint8), prompt=True)
        except (StageError, FrameError) as error:
            log.info("prompts are read where steps are run: %s", error.message)
            return False
        finally:
            self.hot.clear()
        return True

    def _tap(self) -> native.Tap:
        return native.Tap(
            capture=self._capture,
            inject=self._inject,
            get_name=llamacpp.address("ggml_get_name"),
            nbytes=llamacpp.address("ggml_nbytes"),
            tensor_get=llamacpp.address("ggml_backend_tensor_get"),
            tensor_set=llamacpp.address("ggml_backend_tensor_set"),
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

    def _open_context(self, sequences: int, batch: int, outputs: int, *, pauses: bool = False) -> Side:
        options = self.options
        batch = min(batch, options.context * sequences)
        params = llama.llama_context_default_params()
        params.n_ctx = options.context * sequences
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max = sequences
        if self.file.last:
            # The compute buffer then holds logits for so many rows, and not for a whole chunk.
            outputs = params.n_outputs_max = min(outputs, batch)
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = FLASH_MODES[options.flash_attention]
        params.type_k = params.type_v = KV_TYPES[options.kv_type]
        params.kv_unified = False
        params.no_perf = True
        params.offload_kqv = True
        tap = self._tap()
        if not self.file.last or self._injects or pauses:
            # The field's type is a ctypes prototype; a cast of the C function's address avoids Python in the loop.
            params.cb_eval = ctypes.cast(ctypes.c_void_p(tap.callback_address), type(params.cb_eval))
            params.cb_eval_user_data = tap.user_data
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise StageError(
                f"llama.cpp could not allocate KV cache or buffers: {llamacpp.log_tail() or 'it gave no reason'}",
                code="stage_load_failed",
            )
        self._contexts.append(context)
        return Side(_address(context), _address(llama.llama_get_memory(context)), tap, batch, outputs)

    def step(
        self, rows: FloatRows, position: int, slot: int, wants: NDArray[np.uint8], *, prompt: bool = False
    ) -> FloatRows | None:
        """Run n rows of one slot, from ``position`` on; what the slot held from there on is forgotten.

        Returns the hidden states n × n_embd after the slice's last layer, or None on the last stage. wants: one a row.
        prompt: rows of a prompt, which others may overtake; it ends with a row that is wanted.
        Raises StageError if the KV cache is full or llama.cpp fails, FrameError if the slot does not reach so far.
        """
        return self.hot.step(rows, position, slot, wants, prompt=prompt)

    def logits(self, row: int, slot: int = 0, *, prompt: bool = False) -> int:
        """The address of the logits (float × vocab_size) of row ``row`` of a slot's last step; valid until the next."""
        side = self._prompt if prompt else self._own[slot] if self._own else self._steps
        pointer = llama.llama_get_logits_ith(side.context, row)
        value = ctypes.cast(pointer, ctypes.c_void_p).value
        assert value, row
        return value

    def give(self, slot: int, positions: int, layers: Layers) -> tuple[bytearray, int]:
        """As ``HotStage.give``, of these layers. Raises FrameError also if they cannot be told from the others."""
        data, floor = self.hot.give(slot, positions)
        begin, end = self.file.layers
        if layers == (begin, end):
            return data, floor
        return cells.divide(
            data, self._windowed(self.file.layers), layers[0] - begin, layers[1] - begin, positions
        ), floor

    def take(self, slot: int, positions: int, floor: int, parts: Mapping[Layers, bytearray]) -> None:
        """As ``HotStage.take``, and the cells must be of these positions. Raises FrameError or StageError."""
        try:
            ordered = cells.in_order(parts, self.file.layers)
            data = ordered[0][1]
            if len(ordered) > 1:
                data = cells.join([(one, self._windowed(layers)) for layers, one in ordered], positions)
        except FrameError:
            self.hot.forget(slot)
            raise
        self.hot.take(slot, positions, floor, data)
        side, sequence = (self._own[slot], 0) if self._own else (self._steps, slot)
        memory = ctypes.c_void_p(side.memory)
        first, last = (int(look(memory, sequence)) for look in (_seq_pos_min, _seq_pos_max))
        if last != positions - 1 or (first and not self.window):
            self.hot.forget(slot)
            raise FrameError(f"the cells given for {positions} positions of slot {slot} are of {first} to {last}")

    def _windowed(self, layers: Layers) -> tuple[bool, ...]:
        begin, end = layers
        return self._rules.windowed[begin:end] or (False,) * (end - begin)

    def _close_contexts(self) -> None:
        while self._contexts:
            llama.llama_free(self._contexts.pop())

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._close_contexts()
        if self._model is not None:
            llama.llama_model_free(self._model)
            self._model = None


def _address(pointer: Any) -> int:
    value = ctypes.cast(pointer, ctypes.c_void_p).value
    assert value
    return value


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
