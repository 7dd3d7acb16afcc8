"""Tiny random models of many architectures, made from metadata alone.

Theory. llama.cpp asks ``llama_model_init_from_user``'s callback for every tensor an architecture wants, with its
shape, so metadata is all we need to know. Each tensor is filled with values that depend on (seed, name) only,
scaled by its fan-in so that activations stay of order one through the layers. The tensors are then written with the
metadata we gave (``llama_model_save_to_file`` would write llama.cpp's own normalised metadata instead, which real
files do not have). Optional tensors are all there, so biases, norms and scales are exercised too.

Wrong metadata **aborts the process** (a GGML assert): run this as ``python -m support.tiny_models FAMILY OUT``, or in
a child.
"""

from __future__ import annotations

import ctypes
import sys
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llamacpp import libggml, llama

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

BYTE_TOKENS = 256  # an SPM vocabulary with all byte tokens can spell any text
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
WORDS = ("▁", "▁the", "▁a", "e", "t", "he", "in", "▁s")
VOCAB_SIZE = len(SPECIAL_TOKENS) + BYTE_TOKENS + len(WORDS)

N_EMBD, N_HEAD, N_HEAD_KV, N_FF = 64, 4, 2, 96
HEAD = N_EMBD // N_HEAD
CONTEXT = 256
WINDOW = 8  # shorter than the sweep's prompt, so that a wrong sliding-window pattern shows


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the sweep: an architecture with metadata that makes one of its variants.

    keys: metadata added to (or, None, removed from) the common set, without the ``{arch}.`` prefix.
    drop: optional tensors to leave out of the file: ".bias" (a suffix, as it starts with a dot) or a whole name.
    """

    architecture: str
    n_layers: int = 5
    moe: bool = False
    keys: dict[str, Value | None] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


_MLA: dict[str, Value | None] = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 24,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 32 + 8,
    "attention.value_length": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 8,
    "leading_dense_block_count": 2,
}
_MHA_LATENT = _MLA | {
    "attention.head_count_kv": N_HEAD,
    "attention.key_length": 24,
    "attention.value_length": 16,
    "attention.key_length_mla": None,
    "attention.value_length_mla": None,
}
_LAYER_NORM: dict[str, Value | None] = {"attention.layer_norm_epsilon": 1e-5}
_MROPE: dict[str, Value | None] = {"rope.dimension_sections": [2, 3, 3, 0]}
_GRANITE: dict[str, Value | None] = {
    "logit_scale": 6.0,
    "residual_scale": 0.22,
    "embedding_scale": 12.0,
    "attention.scale": 0.0625,
}
_SINGLE_DENSE: dict[str, Value | None] = {"leading_dense_block_count": 1}
_NO_SWA: dict[str, Value | None] = {"attention.sliding_window": None}
_MULTI_HEAD: dict[str, Value | None] = {"attention.head_count_kv": N_HEAD}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", drop=("output.weight",)),
    "mistral": Family("llama", keys={"rope.freq_base": 1e6}, drop=(".bias", "rope_freqs.weight")),
    "mixtral": Family("llama", moe=True, drop=(".bias",)),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3moe": Family("qwen3moe", moe=True),
    "gemma": Family("gemma", keys={"attention.key_length": 24, "attention.value_length": 24}),
    "gemma2": Family("gemma2", n_layers=5, keys={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma3": Family("gemma3", n_layers=8, keys={"rope.freq_base_swa": 1e4, "rope.freq_base": 1e6}),
    "phi3": Family("phi3"),
    "deepseek2": Family("deepseek2", moe=True, keys=_MLA),
    "deepseek2-lite": Family("deepseek2", n_layers=27, moe=True, keys=_MHA_LATENT | {"attention.q_lora_rank": None}),
    "gpt-oss": Family("gpt-oss", n_layers=5, moe=True),
    "granite": Family("granite", keys=_GRANITE),
    "olmo2": Family("olmo2", keys=_NO_SWA),
    "starcoder2": Family("starcoder2", keys=_LAYER_NORM),
    "stablelm": Family("stablelm", keys=_LAYER_NORM),
    "command-r": Family("command-r", keys=_LAYER_NORM | {"logit_scale": 0.0625}),
    "falcon": Family("falcon", keys=_LAYER_NORM),
    "glm4": Family("glm4"),
    "qwen2vl": Family("qwen2vl", keys=_MROPE),
    # --- beyond the ones the project promises
    "granite-moe": Family("granitemoe", moe=True, keys=_GRANITE),
    "granite-no-input-scale": Family("granite", keys=_GRANITE | {"embedding_scale": None}),
    "gemma3-no-window": Family("gemma3", keys=_NO_SWA),
    "gemma3-flags": Family("gemma3", keys={"attention.sliding_window_pattern": [True, False, True, True, False]}),
    "olmo3": Family("olmo2", n_layers=6),
    "deepseek2-mha": Family("deepseek2", moe=True, keys=_MHA_LATENT),
    "glm4-mrope": Family("glm4", keys=_MROPE),
    "qwen3vl": Family("qwen3vl", keys=_MROPE | {"n_deepstack_layers": 2}),
    "qwen3vlmoe": Family("qwen3vlmoe", moe=True, keys=_MROPE | {"n_deepstack_layers": 2}),
    "hunyuan_vl": Family("hunyuan_vl", keys=_MROPE),
    "paddleocr": Family("paddleocr", keys=_MROPE),
    "llama4": Family("llama4", n_layers=8, moe=True, keys={"interleave_moe_layer_step": 2}),
    "smollm3": Family("smollm3", n_layers=9),
    "cohere2": Family("cohere2", n_layers=9, keys=_LAYER_NORM | {"logit_scale": 0.25}),
    "exaone-moe": Family("exaone-moe", n_layers=6, moe=True, keys=_SINGLE_DENSE),
    "exaone4": Family("exaone4", n_layers=6),
    "afmoe": Family("afmoe", n_layers=9, moe=True, keys=_SINGLE_DENSE),
    "laguna": Family("laguna", n_layers=6, moe=True, keys=_SINGLE_DENSE),
    "smallthinker": Family("smallthinker", n_layers=14, moe=True),
    "mellum": Family("mellum", n_layers=6, moe=True),
    "plamo3": Family("plamo3", n_layers=10),
    "mimo2": Family("mimo2", moe=True, keys={"attention.sliding_window_pattern": [1, 0, 1, 0, 1]}),
    "spark2_5": Family("spark2_5", keys={"attention.sliding_window_pattern": [1, 0, 1, 0, 1]}),
    "ernie4_5-moe": Family("ernie4_5-moe", moe=True, keys=_SINGLE_DENSE | {"interleave_moe_layer_step": 1}),
    "glm4moe": Family("glm4moe", moe=True, keys=_SINGLE_DENSE),
    "grok": Family("grok", moe=True),
    "minicpm": Family("minicpm"),
    "bloom": Family("bloom", keys=_LAYER_NORM | _MULTI_HEAD),
    "gpt2": Family("gpt2", keys=_LAYER_NORM | _MULTI_HEAD),
    "starcoder": Family("starcoder", keys=_LAYER_NORM),
    "mpt": Family("mpt", keys=_LAYER_NORM | {"attention.max_alibi_bias": 8.0}, drop=("position_embd.weight",)),
    "mpt-positions": Family("mpt", keys=_LAYER_NORM | {"attention.max_alibi_bias": 8.0}),
    "qwen2moe": Family("qwen2moe", moe=True),
    "phi2": Family("phi2", keys=_LAYER_NORM),
    "phimoe": Family("phimoe", moe=True),
    "gptneox": Family("gptneox", keys=_LAYER_NORM | _MULTI_HEAD | {"use_parallel_residual": True}),
    "internlm2": Family("internlm2"),
    "deepseek": Family("deepseek", moe=True, keys=_SINGLE_DENSE),
    "exaone": Family("exaone"),
    "olmo": Family("olmo", keys=_LAYER_NORM | {"attention.clamp_kqv": 4.0}),
    "olmoe": Family("olmoe", moe=True, keys=_MULTI_HEAD),
    "nemotron": Family("nemotron", keys=_LAYER_NORM),
    "dots1": Family("dots1", moe=True, keys=_SINGLE_DENSE | _MULTI_HEAD),
    "apertus": Family(
        "apertus",
        keys={
            "xielu.alpha_n": [0.8, 0.9, 1.0, 1.1, 1.2],
            "xielu.alpha_p": [1.2, 1.1, 1.0, 0.9, 0.8],
            "xielu.beta": [0.4, 0.5, 0.6, 0.5, 0.4],
            "xielu.eps": [1e-6] * 5,
        },
    ),
    "arcee": Family("arcee"),
    "arctic": Family("arctic", moe=True),
    "bailingmoe": Family("bailingmoe", moe=True, keys=_SINGLE_DENSE),
    "bailingmoe2": Family("bailingmoe2", moe=True, keys=_SINGLE_DENSE),
    "bitnet": Family("bitnet"),
    "chatglm": Family("chatglm"),
    "codeshell": Family("codeshell", keys=_LAYER_NORM),
    "dbrx": Family("dbrx", moe=True, keys=_LAYER_NORM | {"attention.clamp_kqv": 8.0}),
    "ernie4_5": Family("ernie4_5"),
    "grovemoe": Family(
        "grovemoe",
        moe=True,
        keys={"expert_group_scale": 0.05, "experts_per_group": 2, "expert_chunk_feed_forward_length": 32},
    ),
    "hunyuan-dense": Family("hunyuan-dense"),
    "hunyuan-moe": Family("hunyuan-moe", moe=True),
    "jais": Family("jais", keys=_LAYER_NORM | {"attention.max_alibi_bias": 8.0}),
    "jais2": Family("jais2", keys=_LAYER_NORM),
    "maincoder": Family("maincoder"),
    "minimax-m2": Family("minimax-m2", moe=True),
    "mistral3": Family("mistral3", keys={"attention.temperature_scale": 0.1}),
    "mistral4": Family("mistral4", moe=True, keys=_MLA),
    "openelm": Family(
        "openelm",
        keys={
            "attention.head_count": [2, 4, 4, 2, 4],
            "attention.head_count_kv": [1, 2, 1, 1, 2],
            "feed_forward_length": [64, 96, 128, 64, 96],
            "rope.dimension_count": None,
        },
    ),
    "orion": Family("orion", keys=_LAYER_NORM),
    "pangu-embedded": Family("pangu-embedded"),
    "phi3-long": Family("phi3", keys={"rope.scaling.original_context_length": 64}),
    "plamo": Family("plamo"),
    "qwen": Family("qwen", keys=_MULTI_HEAD),
    "refact": Family("refact"),
    "seed_oss": Family("seed_oss"),
    "xverse": Family("xverse"),
}


def metadata(family: Family) -> dict[str, Value]:
    """The full metadata of a family's model, keys as in the file."""
    common: dict[str, Value | None] = {
        "context_length": CONTEXT,
        "embedding_length": N_EMBD,
        "block_count": family.n_layers,
        "feed_forward_length": N_FF,
        "vocab_size": VOCAB_SIZE,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": WINDOW,
        "rope.dimension_count": HEAD,
    }
    if family.moe:
        common |= {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": N_FF // 2,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": N_FF // 3,
            "expert_gating_func": 2,  # sigmoid
            "expert_weights_scale": 1.5,
            "expert_weights_norm": True,
        }
    common |= family.keys
    prefix = family.architecture
    result: dict[str, Value] = {"general.architecture": prefix, "general.name": "tiny"}
    for key, value in common.items():
        if value is not None:  # a few keys have no prefix
            result[key if key.startswith("xielu.") else f"{prefix}.{key}"] = value
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(BYTE_TOKENS)), *WORDS]
    kinds = [2, 3, 3] + [6] * BYTE_TOKENS + [1] * len(WORDS)  # unknown, control, byte, normal
    return result | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def values(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Values of a tensor, GGML order (``shape[0]`` is contiguous, the fan-in of a weight)."""
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    noise = generator.standard_normal(int(np.prod(shape)), dtype=np.float32)
    if "rope_f" in name:  # frequency divisors: positive and away from 0
        result = 1 + np.abs(noise)
    elif name.endswith(".bias") or "sinks" in name:
        result = 0.2 * noise
    elif sum(n > 1 for n in shape) <= 1:  # norms and scales
        result = 1 + 0.2 * noise
    elif name.startswith(("token_embd.", "position_embd.")):
        result = 0.7 * noise
    else:
        result = noise * np.float32(1.3 / shape[0] ** 0.5)
    return result.astype(np.float32)


def make_tiny(
    architecture: str, path: Path, *, n_layers: int | None = None, seed: int = 1, moe: bool = False, **keys: Value
) -> Path:
    """Write a tiny GGUF of a family of FAMILIES, or of an architecture with common metadata. Returns ``path``.

    keys: more metadata, with ``__`` for a dot. Raises ValueError if llama.cpp refuses the metadata with an error;
    it may also abort the process.
    """
    family = FAMILIES.get(architecture, Family(architecture, moe=moe))
    family = replace(
        family,
        n_layers=n_layers or family.n_layers,
        moe=moe or family.moe,
        keys=family.keys | {key.replace("__", "."): value for key, value in keys.items()},
    )
    return write(family, path, seed)


def write(family: Family, path: Path, seed: int = 1) -> Path:
    """Write a family's model to ``path``. Errors as :func:`make_tiny`."""
    llamacpp.init()
    gguf = _bind()
    header = gguf.gguf_init_empty()
    for key, value in metadata(family).items():
        _set(gguf, header, key, value)
    tensors: dict[str, int] = {}

    def fill(tensor: int, _user: Any) -> None:
        name = gguf.ggml_get_name(tensor).decode()
        shape = tuple(_Tensor.from_address(tensor).ne)
        data = values(name, shape, seed)
        assert gguf.ggml_nbytes(tensor) == data.nbytes, name
        gguf.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        dropped = (".scale", ".input_scale", *family.drop)  # scales belong to NVFP4 files only
        if not any(name.endswith(d) if d.startswith(".") else name == d for d in dropped):
            tensors.setdefault(name, tensor)

    callback = _SET_TENSOR(fill)
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    init = llama._lib.llama_model_init_from_user
    init.restype = ctypes.c_void_p
    init.argtypes = [ctypes.c_void_p, _SET_TENSOR, ctypes.c_void_p, type(params)]
    model = init(header, callback, None, params)
    if not model:
        raise ValueError(f"{family.architecture}: {llamacpp.log_tail()}")
    for tensor in tensors.values():
        gguf.gguf_add_tensor(header, tensor)
    written = gguf.gguf_write_to_file(header, bytes(path), False)
    llama.llama_model_free(model)
    gguf.gguf_free(header)
    if not written:
        raise ValueError(f"could not write {path}")
    return path


_SET_TENSOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    """The head of ``struct ggml_tensor``."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))


_GGUF_UINT32, _GGUF_INT32, _GGUF_FLOAT32, _GGUF_BOOL = 4, 5, 6, 7


def _bind() -> Any:
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "gguf_init_empty": (pointer, ()),
        "gguf_free": (None, (pointer,)),
        "gguf_set_val_u32": (None, (pointer, text, ctypes.c_uint32)),
        "gguf_set_val_f32": (None, (pointer, text, ctypes.c_float)),
        "gguf_set_val_bool": (None, (pointer, text, ctypes.c_bool)),
        "gguf_set_val_str": (None, (pointer, text, text)),
        "gguf_set_arr_data": (None, (pointer, text, ctypes.c_int, pointer, size)),
        "gguf_set_arr_str": (None, (pointer, text, pointer, size)),
        "gguf_add_tensor": (None, (pointer, pointer)),
        "gguf_write_to_file": (ctypes.c_bool, (pointer, text, ctypes.c_bool)),
        "ggml_get_name": (text, (pointer,)),
        "ggml_nbytes": (size, (pointer,)),
        "ggml_backend_tensor_set": (None, (pointer, pointer, size, size)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(libggml, name)
        function.restype, function.argtypes = result, list(arguments)
    return libggml


def _set(gguf: Any, header: int, key: str, value: Value) -> None:
    name = key.encode()
    if isinstance(value, bool):
        gguf.gguf_set_val_bool(header, name, value)
    elif isinstance(value, int):
        gguf.gguf_set_val_u32(header, name, value)
    elif isinstance(value, float):
        gguf.gguf_set_val_f32(header, name, value)
    elif isinstance(value, str):
        gguf.gguf_set_val_str(header, name, value.encode())
    elif isinstance(value[0], str):
        texts = (ctypes.c_char_p * len(value))(*(str(item).encode() for item in value))
        gguf.gguf_set_arr_str(header, name, texts, len(value))
    else:
        kind, dtype = _GGUF_INT32, "i4"
        if isinstance(value[0], bool):
            kind, dtype = _GGUF_BOOL, "i1"
        elif isinstance(value[0], float):
            kind, dtype = _GGUF_FLOAT32, "f4"
        array = np.array(value, dtype)
        gguf.gguf_set_arr_data(header, name, kind, array.ctypes.data, len(value))


if __name__ == "__main__":
    make_tiny(sys.argv[1], Path(sys.argv[2]))
