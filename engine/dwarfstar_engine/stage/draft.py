"""The draft process: a small model, loaded whole, that guesses tokens for a large one of the same vocabulary.

As a process (``python -m dwarfstar_engine.stage.draft``) it answers questions over the pipe; it is one of its own
because GGML may abort. Commands and answers, in this order:

    {"path"}                                            →  "vocabulary": tokens, digest; the parent compares
    {"context", "sequences", "threads", "gpu_layers"}   →  "ready"; or, to either, "failed": code, message
    {"id", "sequence", "keep", "tokens", "count"}       →  "proposed": id, sequence, tokens; or "lost": id, sequence
    {"forget": sequence}                                →  nothing

A question's text is the first ``keep`` tokens of the sequence's last question, then ``tokens``; the answer is
``count`` greedy tokens after it, fewer where the slot ends. If the child does not hold those ``keep`` tokens (any
more), they are lost, and the parent sends the whole text.

Theory. Each sequence has a slot of KV cells, which hold its text and the proposals made after it. The longest prefix
that a new text shares with its cells is used again, and as long as proposals come true those behind them stay: a
question then costs as many steps as its text has grown. Slots are few; a new sequence gets the one unused for longest.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwarfstar_engine import native
from dwarfstar_engine.errors import DwarfStarError, ModelError
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.settings import MAX_SLOTS
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.fingerprint import fingerprint
from dwarfstar_engine.stage.llamacpp import llama
from dwarfstar_engine.stage.pipe import ChildPipe
from dwarfstar_engine.stage.vocab import Vocabulary

MAX_SEQUENCES = MAX_SLOTS
MAX_COUNT = 16  # tokens of one answer: no pipeline sends more guesses
BATCH = 512  # tokens of a text that run at once


@dataclass(slots=True)
class _Held:
    """A sequence. text: of its last question. proposed: the greedy tokens after it, as far as they are known.

    cells: the tokens in its KV cells; where something is proposed, the text and all proposals but the last.
    """

    slot: int
    text: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)


class Lost(Exception):
    """The tokens a question builds on are not held here."""


class DraftModel:
    """A small model with a few sequences, each of at most ``context`` tokens. Raises ModelError if it cannot load."""

    def __init__(self, path: Path, *, context: int, sequences: int, threads: int = 1, gpu_layers: int = -1) -> None:
        assert 0 < sequences <= MAX_SEQUENCES and context > 0
        read_model(path)  # llama.cpp aborts on some bad files, this says what is wrong
        llamacpp.init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self._model: Any = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelError(f"{path}: llama.cpp could not load the draft model: {llamacpp.log_tail()}")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max = context * sequences, sequences
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = False  # a sequence's cells are its own: none can take another's room
        options.no_perf = True
        self._context: Any = llama.llama_init_from_model(self._model, options)
        if not self._context:
            llama.llama_model_free(self._model)
            raise ModelError(
                f"{path}: there is no memory for the draft model's KV cache of {sequences} × {context} tokens: "
                "use a smaller context or fewer slots",
            )
        self._memory = llama.llama_get_memory(self._context)
        self._size = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        self._room = context
        self._held: OrderedDict[int, _Held] = OrderedDict()  # the one unused for longest first
        self._slots = list(range(sequences))

    def propose(self, sequence: int, keep: int, tokens: Sequence[int], count: int) -> list[int]:
        """The greedy continuation of a text; fewer than ``count`` tokens where the slot ends. Raises Lost."""
        held = self._held.get(sequence)
        if keep > (len(held.text) if held else 0):
            raise Lost
        if held is None:
            held = self._held[sequence] = _Held(self._slot())
        self._held.move_to_end(sequence)
        came_true = keep == len(held.text) and held.proposed[: len(tokens)] == list(tokens)
        proposed, held.proposed = held.proposed[len(tokens) :] if came_true else [], []
        held.text[keep:] = tokens
        count = min(count, MAX_COUNT, self._room - len(held.text))
        if not held.text or count <= 0:
            return []
        if not proposed:
            self._trim(held)
        while len(proposed) < count:
            proposed.append(self._feed(held, proposed[-1:] or held.text[len(held.cells) :]))
        held.proposed = proposed
        return proposed[:count]

    def forget(self, sequence: int) -> None:
        """Its slot is free. Unknown ones are ignored: it may have been the one unused for longest."""
        if (held := self._held.pop(sequence, None)) is not None:
            self._slots.append(held.slot)

    def _slot(self) -> int:
        if not self._slots:
            self.forget(next(iter(self._held)))
        return self._slots.pop()

    def _trim(self, held: _Held) -> None:
        """Keep the cells that fit the text, but for its last token: its logits are wanted."""
        most = min(len(held.cells), len(held.text) - 1)
        same = next((i for i in range(most) if held.cells[i] != held.text[i]), most)
        if not llama.llama_memory_seq_rm(self._memory, held.slot, same, -1):
            same = 0  # recurrent models cannot go back: they start again
            llama.llama_memory_seq_rm(self._memory, held.slot, -1, -1)
        del held.cells[same:]

    def _feed(self, held: _Held, tokens: Sequence[int]) -> int:
        """Run tokens after those in the cells; the greedy next one."""
        batch = self._batch
        for start in range(0, len(tokens), BATCH):
            chunk = tokens[start : start + BATCH]
            batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk):
                batch.token[i], batch.pos[i] = token, len(held.cells) + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, held.slot
                batch.logits[i] = i == len(chunk) - 1
            code = llama.llama_decode(self._context, batch)
            assert code == 0, code
            held.cells += chunk
        pointer = llama.llama_get_logits_ith(self._context, -1)
        return native.argmax(int(ctypes.cast(pointer, ctypes.c_void_p).value or 0), self._size)

    def close(self) -> None:
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)


async def serve(pipe: ChildPipe) -> None:
    """Answer until the parent is gone."""
    try:
        first = await pipe.command()
        path = Path(first["path"])
        vocabulary = Vocabulary(path)
        known = fingerprint(vocabulary.piece(token) for token in range(vocabulary.size))
        pipe.emit("vocabulary", tokens=known.tokens, digest=known.digest)
        options = await pipe.command()
        model = DraftModel(
            path,
            context=options["context"],
            sequences=options["sequences"],
            threads=options["threads"],
            gpu_layers=options["gpu_layers"],
        )
    except DwarfStarError as error:
        pipe.emit("failed", code=error.code, message=error.message)
        await pipe.command()  # that the parent ends it, once it has read this
        return
    pipe.emit("ready")
    while True:
        command = await pipe.command()
        if "forget" in command:
            model.forget(command["forget"])
            continue
        answer = {"id": command["id"], "sequence": command["sequence"]}
        try:
            tokens = model.propose(command["sequence"], command["keep"], command["tokens"], command["count"])
        except Lost:
            pipe.emit("lost", **answer)
        else:
            pipe.emit("proposed", **answer, tokens=tokens)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(ChildPipe()))


if __name__ == "__main__":
    main()
