"""What each architecture needs so that a slice of its layers computes exactly what the whole model does.

Theory. A slice [a, b) is loaded by llama.cpp as a small model of the same architecture, fed hidden states instead
of tokens. That is exact as long as nothing in a layer depends on its index, on the number of layers, on token ids,
or on the input being tokens. Where llama.cpp's code does depend on one of these, a rule here undoes it:

- *Layer index.* Sliding windows and position-free layers repeat with a period. llama.cpp takes the window pattern
  as one flag a layer too, so each slice is given its own flags (:attr:`ArchRules.layer_metadata`) and may begin at
  any windowed layer (a slice without one would abort llama.cpp). A period that is fixed in llama.cpp's code makes
  legal cuts its multiples (:attr:`ArchRules.period`).
- *Number of layers.* Defaults derived from it are written out (:attr:`ArchRules.metadata`). Where llama.cpp offers
  no key for it the model is refused, or slices of the misleading length are (:attr:`ArchRules.forbidden_lengths`).
- *Input.* Most graphs scale, normalise or position their input before the first layer. Later stages must not do it
  again: a key turns it off (:attr:`ArchRules.later_metadata`), or the hidden states overwrite the tensor that
  results from it (:attr:`ArchRules.inject_at`).

Invariant. An architecture is in the tables below only if the sweep in ``tests/llama/test_families.py`` has shown a
tiny model of it to be bit-exact at every legal cut. Everything else is refused with the reason. The facts were read
from, and the sweep ran on, the llama.cpp of the pinned llama-cpp-python release.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dwarfstar_engine.errors import IllegalCutError, UnsupportedModelError
from dwarfstar_engine.model.facts import Directory, Facts

Scalar = int | float | bool


@dataclass(frozen=True, slots=True)
class ArchRules:
    """How to slice one model. Keys are full names as in the file; layer indices are the whole model's.

    period: legal cuts are its multiples.
    positions_per_token: positions llama.cpp reads for each row of hidden states; 4 for multi-dimensional RoPE.
    embed_scale: factor on token embedding rows before the first stage, where the graph scales tokens but not rows.
    capture: graph tensor (``{capture}-{layer}``) that holds the hidden states after a layer.
    inject_at: graph tensor to overwrite with the hidden states on every stage but the first.
    token_input: the graph aborts on rows: give it tokens (id 0), and overwrite ``inject_at`` on every stage.
    metadata: keys to set on every stage.
    later_metadata: keys to set on every stage but the first.
    layer_metadata: keys with one number for each layer of the model; every stage gets those of its layers.
    windowed: for each layer whether its attention has a window; empty where no layer's has. A slice needs one.
    forbidden_lengths: slices of so many layers load wrongly (:func:`check_slice`).
    """

    period: int = 1
    positions_per_token: int = 1
    embed_scale: float = 1.0
    capture: str = "l_out"
    inject_at: str | None = None
    token_input: bool = False
    metadata: tuple[tuple[str, Scalar], ...] = ()
    later_metadata: tuple[tuple[str, Scalar], ...] = ()
    layer_metadata: tuple[tuple[str, tuple[int | float, ...]], ...] = ()
    windowed: tuple[bool, ...] = ()
    forbidden_lengths: tuple[int, ...] = ()

    def cuttable(self, cut: int) -> bool:
        """Whether a slice may end and the next begin at layer ``cut``, strictly between 0 and the last."""
        if cut % self.period:
            return False
        return not self.windowed or (any(self.windowed[:cut]) and any(self.windowed[cut : cut + self.period]))


def rules(model: Directory) -> ArchRules:
    """The rules of a model. Raises UnsupportedModelError with the reason if it cannot be sliced exactly."""
    facts = Facts(model)
    refused = _REFUSED.get(facts.architecture)
    if refused is not None:
        raise UnsupportedModelError(
            f"models of architecture {facts.architecture} cannot be split by layers: {refused}; run it on one machine"
        )
    build = _RULES.get(facts.architecture)
    if build is None:
        raise UnsupportedModelError(
            f"architecture {facts.architecture} is not verified to split exactly; run it on one machine"
        )
    if facts.number("nextn_predict_layers") > 0:
        raise facts.refusal("it carries layers that predict further tokens, which belong to no slice")
    return _with_head_size(facts, build(facts))


def supported() -> frozenset[str]:
    """The architectures of which some models at least can be split."""
    return frozenset(_RULES)


def legal_cuts(model: Directory) -> tuple[int, ...]:
    """The layer indices, strictly between 0 and the number of layers, at which the model may be divided.

    Raises UnsupportedModelError as :func:`rules` does.
    """
    rule = rules(model)
    return tuple(cut for cut in range(1, model.n_layers) if rule.cuttable(cut))


def check_slice(model: Directory, a: int, b: int) -> None:
    """Raise IllegalCutError unless layers a … b-1 can be loaded as one slice. Else errors as :func:`rules`."""
    n, rule = model.n_layers, rules(model)
    if not 0 <= a < b <= n:
        raise IllegalCutError(f"layers {a}–{b} are not a range of the model's layers 0–{n}; choose 0 ≤ a < b ≤ {n}")
    for cut in (a, b):
        if 0 < cut < n and not rule.cuttable(cut):
            legal = ", ".join(map(str, legal_cuts(model)))
            raise IllegalCutError(f"the model may not be cut at layer {cut}; choose one of {legal or 'none'}")
    if b - a < n and b - a in rule.forbidden_lengths:
        raise IllegalCutError(
            f"llama.cpp mistakes a slice of {b - a} layers for another model; use one layer more or less"
        )


def _f32(value: float) -> float:
    """Rounded to single precision, as llama.cpp computes."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _windowed(
    facts: Facts, period: int, *, optional: bool = False, dense_first: bool = False, step: int = 1, **more: Any
) -> ArchRules:
    """Rules of a model with sliding-window layers, as llama.cpp's load_swa_pattern and set_swa_pattern see them.

    period: llama.cpp's default, every how manieth layer is without a window: the last, or the first of each.
    optional: without a window size there is no window. step: the cuts' own period.
    """
    if optional and facts.number("attention.sliding_window") == 0:
        return ArchRules(period=step, **more)
    name, n = "attention.sliding_window_pattern", facts.n_layers
    given = facts.array(name)
    if given is not None:
        flags = [value != 0 for value in given[:n]]
        flags += [False] * (n - len(flags))
    else:
        period = int(facts.number(name, period))
        dense = 0 if dense_first else period - 1
        flags = [period == 0 or i % period != dense for i in range(n)]
    return ArchRules(
        period=step, layer_metadata=((facts.key(name), tuple(map(int, flags))),), windowed=tuple(flags), **more
    )


def _with_head_size(facts: Facts, rule: ArchRules) -> ArchRules:
    """With a head count of its own for each layer, llama.cpp would derive the head size from the slice's first."""
    heads = facts.array("attention.head_count")
    if not heads or len(set(heads)) == 1:
        return rule
    size = facts.n_embd // max(1, int(heads[0]))
    missing = (name for name in ("attention.key_length", "attention.value_length") if facts.get(name) is None)
    return replace(rule, metadata=(*rule.metadata, *((facts.key(name), size) for name in missing)))


def _plain(facts: Facts) -> ArchRules:
    return ArchRules()


def _injected(tensor: str) -> Callable[[Facts], ArchRules]:
    return lambda facts: ArchRules(inject_at=tensor)


def _mrope(facts: Facts) -> ArchRules:
    # Images enter deeper layers by extra input columns ("deepstack"); text has none, so the columns are dropped.
    metadata = ((facts.key("n_deepstack_layers"), 0),) if facts.number("n_deepstack_layers") > 0 else ()
    return ArchRules(positions_per_token=4, metadata=metadata)


def _maybe_mrope(facts: Facts) -> ArchRules:
    sections = facts.sections()
    return ArchRules(positions_per_token=4 if sections[0] > 0 and sections[1] > 0 else 1)


def _glm4(facts: Facts) -> ArchRules:
    # llama.cpp aborts on rows for text-only GLM-4 files ("does not support multimodal").
    rule = _maybe_mrope(facts)
    return rule if rule.positions_per_token > 1 else ArchRules(token_input=True, inject_at="embd")


def _input_scale(default: float) -> Callable[[Facts], ArchRules]:
    def build(facts: Facts) -> ArchRules:
        if facts.get("deepstack_mapping") is not None and facts.number("deepstack_mapping") >= 0:
            raise facts.refusal("images enter its deeper layers")
        if facts.number("embedding_scale", default) == 0:
            return ArchRules()
        return ArchRules(later_metadata=((facts.key("embedding_scale"), 1.0),))

    return build


def _minicpm(facts: Facts) -> ArchRules:
    metadata: tuple[tuple[str, Scalar], ...] = ()
    if facts.get("residual_scale") is None:  # llama.cpp's default depends on the number of layers
        metadata = ((facts.key("residual_scale"), _f32(_f32(1.4) / _f32(math.sqrt(facts.n_layers)))),)
    return ArchRules(metadata=metadata, later_metadata=((facts.key("embedding_scale"), 1.0),))


GEMMA2_27B_LAYERS = 46  # with so many layers llama.cpp takes another attention scale
GEMMA3_27B_LAYERS = 62


def _gemma2(facts: Facts) -> ArchRules:
    if facts.n_layers >= GEMMA2_27B_LAYERS:
        raise facts.refusal("its attention scale depends on the number of layers")
    return _windowed(facts, 2, inject_at="inp_scaled")


def _gemma3(facts: Facts) -> ArchRules:
    if facts.n_layers >= GEMMA3_27B_LAYERS:
        raise facts.refusal("its attention scale depends on the number of layers")
    return _windowed(facts, 6, optional=True, embed_scale=_f32(math.sqrt(facts.n_embd)))


def _command_r(facts: Facts) -> ArchRules:
    if facts.n_layers >= 64:  # Command R+: only then does llama.cpp read the query and key norms
        raise facts.refusal("llama.cpp reads some of its tensors only when all layers are there")
    return ArchRules()


def _exaone4(facts: Facts) -> ArchRules:
    if facts.n_layers >= 64:  # EXAONE 4.0 32B: only then does llama.cpp use a sliding window
        raise facts.refusal("its sliding window depends on the number of layers")
    return ArchRules()


# llama.cpp tells DeepSeek's "lite" models, and GLM 4.7 Lite, by their number of layers and vocabulary.
_LITE_LAYERS = (26, 27)
_LITE_LAYERS_128K, _VOCAB_128K = 48, 128256
_GLM_LITE_LAYERS, _GLM_LITE_VOCAB = (47, 48), 154880
_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func


def _deepseek2(facts: Facts) -> ArchRules:
    n, vocab = facts.n_layers, facts.vocab_size()
    lite = n in _LITE_LAYERS or (n == _LITE_LAYERS_128K and vocab == _VOCAB_128K)
    metadata: list[tuple[str, Scalar]] = []
    if lite:  # no compressed queries; a slice would ask for their rank
        metadata.append((facts.key("attention.q_lora_rank"), 0))
    if facts.number("expert_gating_func") == 0:
        sigmoid = n in _GLM_LITE_LAYERS and vocab == _GLM_LITE_VOCAB
        metadata.append((facts.key("expert_gating_func"), _SIGMOID if sigmoid else _SOFTMAX))
    compressed_queries = not lite and facts.number("attention.q_lora_rank") > 0
    return ArchRules(
        metadata=tuple(metadata),
        forbidden_lengths=(*_LITE_LAYERS, _LITE_LAYERS_128K) if compressed_queries else (),
    )


NO_ROPE_PERIOD = 4  # every fourth layer has no RoPE: fixed in llama.cpp's code (n_no_rope_layer_step)


def _no_rope(facts: Facts) -> ArchRules:
    return ArchRules(period=NO_ROPE_PERIOD)


def _llama4(facts: Facts) -> ArchRules:
    if facts.get("attention.sliding_window") == 0:
        raise facts.refusal("which of its layers use positions depends on the number of layers")
    step = math.lcm(NO_ROPE_PERIOD, facts.count("interleave_moe_layer_step"))
    if facts.n_layers % step:  # the last slice might have no layer without RoPE, and llama.cpp would abort
        raise facts.refusal(f"its layers are not a multiple of {step}")
    return _windowed(facts, 4, step=step)


def _afmoe(facts: Facts) -> ArchRules:
    return _windowed(facts, 4, optional=True, step=NO_ROPE_PERIOD, inject_at="inp_embd_scaled")


def _smallthinker(facts: Facts) -> ArchRules:
    if facts.number("attention.sliding_window") == 0:
        return ArchRules()
    # a period equal to the number of layers means RoPE everywhere
    return _windowed(facts, 4, dense_first=True, step=NO_ROPE_PERIOD, forbidden_lengths=(NO_ROPE_PERIOD,))


def _ernie_moe(facts: Facts) -> ArchRules:
    return ArchRules(period=facts.count("interleave_moe_layer_step"))


def _mpt(facts: Facts) -> ArchRules:
    # With position embeddings (rare) the graph adds them to any input; without, there is no such tensor.
    return ArchRules(inject_at="inpL" if facts.has_tensor("position_embd.weight") else None)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _apertus(facts: Facts) -> ArchRules:
    # Keys without the architecture's prefix; as numbers they hold for every layer.
    arrays = ((key, facts.array_at(key)) for key in ("xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"))
    return ArchRules(layer_metadata=tuple((key, tuple(values)) for key, values in arrays if values is not None))


_PLAIN = _names(
    "arcee arctic bailingmoe bailingmoe2 bitnet chatglm codeshell dbrx deepseek dots1 ernie4_5 exaone "
    "falcon gptneox grovemoe hunyuan-dense hunyuan-moe internlm2 jais jais2 llama maincoder minimax-m2 mistral3 "
    "nemotron olmo olmoe openelm orion pangu-embedded phi2 phi3 phimoe plamo qwen qwen2 qwen2moe qwen3 qwen3moe refact "
    "seed_oss stablelm starcoder2 xverse mistral4"
)

_RULES: dict[str, Callable[[Facts], ArchRules]] = {
    **dict.fromkeys(_PLAIN, _plain),
    "gpt-oss": partial(_windowed, period=2),
    "cohere2": partial(_windowed, period=4),
    "exaone-moe": partial(_windowed, period=4),
    "mellum": partial(_windowed, period=4, optional=True),
    "olmo2": partial(_windowed, period=4, optional=True),
    "plamo3": partial(_windowed, period=8, optional=True),
    "laguna": partial(_windowed, period=4, optional=True, dense_first=True),
    "mimo2": partial(_windowed, period=0),
    "spark2_5": partial(_windowed, period=0),
    "bloom": _injected("inp_norm-0"),
    "gemma": _injected("inp_scaled"),
    "gpt2": _injected("inpL"),
    "starcoder": _injected("inpL"),
    "apertus": _apertus,
    "qwen2vl": _mrope,
    "qwen3vl": _mrope,
    "qwen3vlmoe": _mrope,
    "hunyuan_vl": _maybe_mrope,
    "paddleocr": _mrope,
    "glm4": _glm4,
    "glm4moe": _glm4,
    "granite": _input_scale(0),
    "granitemoe": _input_scale(0),
    "grok": _input_scale(1),
    "minicpm": _minicpm,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "command-r": _command_r,
    "exaone4": _exaone4,
    "deepseek2": _deepseek2,
    "smollm3": _no_rope,
    "llama4": _llama4,
    "afmoe": _afmoe,
    "smallthinker": _smallthinker,
    "ernie4_5-moe": _ernie_moe,
    "mpt": _mpt,
}
_TOKENS = "its deeper layers need token ids"
_WIDE = "hyper-connections carry several hidden states from layer to layer"
_RECURRENT = "its recurrent layers are not supported"
_LOOPED = "its layers run more than once"
_NUMBER = "what its layers compute depends on the number of layers"
_ENCODER = "it is not a decoder of text"
_DRAFT = "it is a draft model that reads another model's layers"

_REFUSED: dict[str, str] = {
    **dict.fromkeys(("gemma3n", "gemma4", "graniteswitch", "cogvlm"), _TOKENS),
    **dict.fromkeys(("deepseek4", "glm5-next", "hy_v4", "qwen4exp"), _WIDE),
    **dict.fromkeys(
        _names(
            "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7 jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe kimi-linear "
            "kimi-k3 qwen3next qwen35 qwen35moe nemotron_h nemotron_h_moe minimax-01 bailingmoe3"
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(("hrm_text", "nanbeige"), _LOOPED),
    **dict.fromkeys(("baichuan", "minicpm3"), _NUMBER),
    **dict.fromkeys(
        _names(
            "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding "
            "llama-embed t5 t5encoder clip wavtokenizer-dec dream llada llada-moe rnd1"
        ),
        _ENCODER,
    ),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), _DRAFT),
}
