"""The vocabulary process: tokeniser and chat template of a model, without its weights.

It runs apart because both are driven by the model file: llama.cpp may abort on a bad vocabulary, and a chat template
is a program that may never end. The coordinator kills and restarts it on a missed deadline. Text pieces of all
tokens are handed over once at the start, so turning tokens into text needs no call.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import datetime
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwarfstar_engine import native
from dwarfstar_engine.errors import DwarfStarError, ModelError, RequestError
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.slice import vocab_file
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llamacpp import llama
from dwarfstar_engine.stage.pipe import ChildPipe
from dwarfstar_engine.stage.template import render_chat

MAX_MEMORY_BYTES = 4 << 30  # address space; the largest vocabularies need a tenth of it
PIECE_BYTES = 512  # longest token text; longer ones are asked for again with the size llama.cpp names


class Vocabulary:
    """A model's tokeniser and chat template. Raises ModelError if llama.cpp cannot load it."""

    def __init__(self, path: Path) -> None:
        llamacpp.init()
        params = llama.llama_model_default_params()
        params.vocab_only = True
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        with native.VirtualFile(vocab_file(read_model(path)).extents) as virtual:
            self._model = llama.llama_model_load_from_file_ptr(ctypes.c_void_p(virtual.pointer), params)
        if not self._model:
            raise ModelError(f"{path}: llama.cpp could not load the vocabulary: {llamacpp.log_tail()}")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.size = int(llama.llama_vocab_n_tokens(self._vocab))
        template = llama.llama_model_chat_template(self._model, None)
        self.template = template.decode("utf-8", "replace") if template else ""
        self._bos = int(llama.llama_vocab_bos(self._vocab))
        self._eos = int(llama.llama_vocab_eos(self._vocab))

    def eog_tokens(self) -> list[int]:
        """Tokens that end a generation."""
        return [token for token in range(self.size) if llama.llama_vocab_is_eog(self._vocab, token)]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; control tokens are empty unless ``special``."""
        size = PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def tokens(self, text: str, *, add_special: bool) -> list[int]:
        """Tokenise; special tokens written in ``text`` are recognised."""
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 16
        buffer = (llama.llama_token * room)()
        count = llama.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, True)
        if count < 0:
            room = -count
            buffer = (llama.llama_token * room)()
            count = llama.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, True)
        return list(buffer[: max(0, count)])

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The prompt of a conversation. BOS is added once, by the template or by the tokeniser."""
        bos = self.piece(self._bos, special=True).decode("utf-8", "replace") if self._bos >= 0 else ""
        eos = self.piece(self._eos, special=True).decode("utf-8", "replace") if self._eos >= 0 else ""
        text = render_chat(
            self.template,
            messages,
            bos_token=bos,
            eos_token=eos,
            now=datetime.datetime.now(datetime.UTC),
            chatml=len(self.tokens("<|im_start|>", add_special=False)) == 1,
        )
        return self.tokens(text, add_special=not (bos and text.startswith(bos)))


async def serve(pipe: ChildPipe) -> None:
    """Answer commands until the parent is gone. The first command names the model."""
    vocabulary: Vocabulary | None = None
    while True:
        command = await pipe.command()
        try:
            if vocabulary is None:
                vocabulary = Vocabulary(Path(command["path"]))
                pieces = [vocabulary.piece(token) for token in range(vocabulary.size)]
                pipe.emit(
                    "ready",
                    size=vocabulary.size,
                    eog=vocabulary.eog_tokens(),
                    lengths=[len(piece) for piece in pieces],
                    pieces=base64.b64encode(b"".join(pieces)).decode(),
                )
            elif command["op"] == "chat":
                pipe.emit("tokens", id=command["id"], tokens=vocabulary.chat(command["messages"]))
            else:
                pipe.emit("tokens", id=command["id"], tokens=vocabulary.tokens(command["text"], add_special=True))
        except (DwarfStarError, MemoryError) as error:
            if isinstance(error, MemoryError):
                error = RequestError("preparing the prompt takes too much memory", code="chat_template_failed")
            pipe.emit(
                "failed",
                id=command.get("id", 0),
                code=error.code,
                message=error.message,
                param=getattr(error, "param", None),
            )


def _bound_memory() -> None:
    """A template may ask for any amount of memory; it then fails alone, in this process."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def main() -> None:
    _bound_memory()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(ChildPipe()))


if __name__ == "__main__":
    main()
