"""Architecture rules: legal cuts, what is written into slices, and why a model is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import IllegalCutError, UnsupportedModelError
from dwarfstar_engine.model import arch


@dataclass(frozen=True)
class Model:
    """What the rules read of a model file."""

    architecture: str
    n_layers: int = 12
    n_embd: int = 64
    keys: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)
    vocab: int = 100

    @property
    def metadata(self) -> Mapping[str, Any]:
        prefixed = {f"{self.architecture}.{key}": value for key, value in self.keys.items()}
        return {"tokenizer.ggml.tokens": ["x"] * self.vocab, **prefixed}


WINDOW = {"attention.sliding_window": 8}


@pytest.mark.parametrize(
    ("model", "cuts"),
    [
        (Model("llama", 5), (1, 2, 3, 4)),
        (Model("llama", 1), ()),
        (Model("gemma2", 6), (2, 4)),
        (Model("gemma3", 14, keys=WINDOW), (1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13)),
        (Model("gemma3", 4), (1, 2, 3)),
        (Model("gpt-oss", 7), (2, 4, 6)),
        (Model("cohere2", 8, keys={"attention.sliding_window_pattern": 2}), (2, 4, 6)),
        (Model("gpt-oss", 5, keys={"attention.sliding_window_pattern": [True, True, False, False, True]}), (1, 4)),
        (Model("gpt-oss", 5, keys={"attention.sliding_window_pattern": [0, 0, 1, 1]}), (3,)),
        (Model("smollm3", 10), (4, 8)),
        (Model("llama4", 24, keys={"interleave_moe_layer_step": 6}), (12,)),
        (Model("smallthinker", 13, keys=WINDOW), (4, 8)),
        (Model("smallthinker", 4), (1, 2, 3)),
        (Model("ernie4_5-moe", 7, keys={"interleave_moe_layer_step": 3}), (3, 6)),
    ],
)
def test_legal_cuts(model: Model, cuts: tuple[int, ...]) -> None:
    assert arch.legal_cuts(model) == cuts


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model("mamba"), "recurrent"),
        (Model("gemma3n"), "token ids"),
        (Model("deepseek4"), "hyper-connections"),
        (Model("baichuan"), "number of layers"),
        (Model("gemma2", 46), "attention scale"),
        (Model("gemma3", 62), "attention scale"),
        (Model("command-r", 64), "only when all layers"),
        (Model("exaone4", 64), "sliding window"),
        (Model("llama4", 10), "multiple of 4"),
        (Model("llama4", 12, keys={"attention.sliding_window": 0}), "positions"),
        (Model("glm4moe", keys={"nextn_predict_layers": 1}), "further tokens"),
        (Model("granite", keys={"deepstack_mapping": [-1, 0] * 6}), "images"),
        (Model("bert"), "not a decoder"),
        (Model("never-heard-of"), "not verified"),
    ],
)
def test_refused_with_the_reason(model: Model, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        arch.rules(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        arch.legal_cuts(model)


def test_just_below_the_27b_sizes_is_accepted() -> None:
    assert arch.rules(Model("gemma2", 45)).inject_at == "inp_scaled"
    assert arch.legal_cuts(Model("gemma3", 61)) == tuple(range(1, 61))


def test_each_slice_gets_its_own_window_flags() -> None:
    [(key, flags)] = arch.rules(Model("gemma3", 8, keys=WINDOW)).layer_metadata
    assert key == "gemma3.attention.sliding_window_pattern"
    assert flags == (1, 1, 1, 1, 1, 0, 1, 1)
    [(_, flags)] = arch.rules(Model("laguna", 5, keys=WINDOW)).layer_metadata
    assert flags == (0, 1, 1, 1, 0)
    [(_, flags)] = arch.rules(Model("gpt-oss", 4, keys={"attention.sliding_window_pattern": 0})).layer_metadata
    assert flags == (1, 1, 1, 1)


def test_input_scales_are_applied_once() -> None:
    gemma3 = arch.rules(Model("gemma3", n_embd=640))
    assert gemma3.embed_scale == pytest.approx(math.sqrt(640), rel=1e-7)
    assert gemma3.inject_at is None
    assert arch.rules(Model("gemma")).embed_scale == 1.0
    assert arch.rules(Model("gemma")).inject_at == "inp_scaled"
    scaled = arch.rules(Model("granite", keys={"embedding_scale": 12.0}))
    assert scaled.later_metadata == (("granite.embedding_scale", 1.0),)
    assert arch.rules(Model("granite")).later_metadata == ()
    assert arch.rules(Model("grok")).later_metadata == (("grok.embedding_scale", 1.0),)
    assert arch.rules(Model("mpt")).inject_at is None
    assert arch.rules(Model("mpt", tensors={"position_embd.weight": None})).inject_at == "inpL"


def test_text_only_glm4_is_given_tokens_and_overwrites_their_rows() -> None:
    rule = arch.rules(Model("glm4"))
    assert rule.token_input
    assert rule.inject_at == "embd"
    multi = arch.rules(Model("glm4", keys={"rope.dimension_sections": [8, 12, 12, 0]}))
    assert (multi.token_input, multi.positions_per_token) == (False, 4)


def test_multi_dimensional_rope() -> None:
    assert arch.rules(Model("qwen2vl")).positions_per_token == 4
    assert arch.rules(Model("llama")).positions_per_token == 1
    assert arch.rules(Model("hunyuan_vl")).positions_per_token == 1
    deep = arch.rules(Model("qwen3vl", keys={"n_deepstack_layers": 3}))
    assert deep.metadata == (("qwen3vl.n_deepstack_layers", 0),)


def test_defaults_from_the_number_of_layers_are_written_out() -> None:
    [(key, value)] = arch.rules(Model("minicpm", 40)).metadata
    assert key == "minicpm.residual_scale"
    assert value == pytest.approx(1.4 / math.sqrt(40), rel=1e-6)
    assert arch.rules(Model("minicpm", keys={"residual_scale": 0.25})).metadata == ()
    heads = arch.rules(Model("openelm", 3, keys={"attention.head_count": [4, 2, 2]})).metadata
    assert heads == (("openelm.attention.key_length", 16), ("openelm.attention.value_length", 16))
    assert arch.rules(Model("openelm", 3, keys={"attention.head_count": [4, 4, 4]})).metadata == ()


def test_keys_without_prefix_are_cut_too() -> None:
    @dataclass(frozen=True)
    class Apertus(Model):
        @property
        def metadata(self) -> Mapping[str, Any]:
            return {"xielu.beta": [0.5, 0.25, 0.125], "xielu.eps": 1e-6}

    assert arch.rules(Apertus("apertus", 3)).layer_metadata == (("xielu.beta", (0.5, 0.25, 0.125)),)


def test_deepseek_lite_is_told_by_its_layers() -> None:
    lite = arch.rules(Model("deepseek2", 27))
    assert dict(lite.metadata) == {"deepseek2.attention.q_lora_rank": 0, "deepseek2.expert_gating_func": 1}
    assert lite.forbidden_lengths == ()
    kanana = arch.rules(Model("deepseek2", 48, vocab=128256, keys={"expert_gating_func": 2}))
    assert dict(kanana.metadata) == {"deepseek2.attention.q_lora_rank": 0}
    glm = arch.rules(Model("deepseek2", 47, vocab=154880, keys={"attention.q_lora_rank": 768}))
    assert dict(glm.metadata) == {"deepseek2.expert_gating_func": 2}
    assert {26, 27} <= set(glm.forbidden_lengths)


def test_a_slice_that_would_be_mistaken_for_another_model_is_refused() -> None:
    v3 = Model("deepseek2", 61, keys={"attention.q_lora_rank": 1536})
    arch.check_slice(v3, 0, 25)
    arch.check_slice(v3, 0, 61)
    with pytest.raises(IllegalCutError, match="27 layers"):
        arch.check_slice(v3, 10, 37)


@pytest.mark.parametrize(("a", "b"), [(-1, 4), (4, 4), (5, 4), (0, 13)])
def test_a_slice_outside_the_model_is_refused(a: int, b: int) -> None:
    with pytest.raises(IllegalCutError, match="range"):
        arch.check_slice(Model("llama"), a, b)


def test_a_slice_at_an_illegal_cut_names_the_legal_ones() -> None:
    arch.check_slice(Model("smollm3"), 4, 12)
    with pytest.raises(IllegalCutError, match="layer 6; choose one of 4, 8"):
        arch.check_slice(Model("smollm3"), 6, 12)


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
def test_no_slice_is_without_a_windowed_layer(flags: list[bool]) -> None:
    """llama.cpp aborts on one, whichever of the legal cuts are used."""
    model = Model("gpt-oss", len(flags), keys={"attention.sliding_window_pattern": flags})
    for a, b in pairwise((0, *arch.legal_cuts(model), len(flags))):
        assert any(flags[a:b])


@given(st.sampled_from(sorted(arch.supported())), st.integers(1, 45))
def test_cuts_lie_inside_and_rules_cover_every_layer(architecture: str, n_layers: int) -> None:
    model = Model(architecture, n_layers, keys=WINDOW)
    try:
        rule = arch.rules(model)
    except UnsupportedModelError:
        return
    cuts = arch.legal_cuts(model)
    assert list(cuts) == sorted(set(cuts))
    assert all(0 < cut < n_layers for cut in cuts)
    assert all(len(values) == n_layers for _, values in rule.layer_metadata)
    for key, _ in (*rule.metadata, *rule.later_metadata, *rule.layer_metadata):
        assert key.startswith(architecture + ".")
    arch.check_slice(model, 0, n_layers)


VALUE = st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(width=32), st.booleans(), st.just("x"))
KEYS = (
    "attention.sliding_window attention.sliding_window_pattern attention.head_count interleave_moe_layer_step "
    "nextn_predict_layers deepstack_mapping rope.dimension_sections embedding_scale expert_gating_func vocab_size "
    "attention.q_lora_rank n_deepstack_layers"
)


@given(
    st.sampled_from(sorted(arch.supported())),
    st.dictionaries(st.sampled_from(KEYS.split()), st.one_of(VALUE, st.lists(VALUE, max_size=6))),
)
def test_any_metadata_gives_rules_or_a_refusal(architecture: str, keys: dict[str, Any]) -> None:
    model = Model(architecture, 9, keys=keys)
    try:
        assert arch.rules(model).period >= 1
        assert all(0 < cut < 9 for cut in arch.legal_cuts(model))
    except UnsupportedModelError as refusal:
        assert architecture in refusal.message
