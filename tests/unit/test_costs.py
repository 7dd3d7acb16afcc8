"""Costs: exactly what slices weigh, and the KV bytes llama.cpp allocates."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwarfstar_engine.errors import ModelFileError
from dwarfstar_engine.model.arch import ArchRules
from dwarfstar_engine.model.costs import ModelCosts, model_costs, stage_bytes
from dwarfstar_engine.model.gguf import GgufModel, read_model
from dwarfstar_engine.model.slice import slice_file
from support import gguf_bytes as g


def make(tmp_path: Path, *more: g.Pair, n_layers: int = 4, tied: bool = True) -> GgufModel:
    drop = {pair.key for pair in more}
    pairs = [*(pair for pair in g.llama_pairs(n_layers) if pair.key not in drop), *more]
    return read_model(g.write(tmp_path / "m.gguf", pairs, g.llama_tensors(n_layers, tied=tied)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_stage_weighs_what_its_slice_weighs(tmp_path: Path, tied: bool) -> None:
    model = make(tmp_path, tied=tied)
    costs = model_costs(model)
    for a in range(4):
        for b in range(a + 1, 5):
            assert stage_bytes(costs, a, b, last=b == 4) == slice_file(model, ArchRules(), a, b).weights_bytes
    assert costs.total == slice_file(model, ArchRules(), 0, 4).weights_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_layers_head_and_embedding(tmp_path: Path, tied: bool) -> None:
    costs = model_costs(make(tmp_path, tied=tied))
    norm, embedding, row = 32 * 4, 6 * 34, 32 * 4
    assert costs.layer_bytes == tuple(norm + (5 + i) * 34 for i in range(4))
    assert costs.embedding_bytes == embedding
    assert costs.shared_bytes == norm + 3 * 4 + row * (1 if tied else 2)
    placeholder = 6 * 18  # q4_0: 32 values in 18 bytes
    head = embedding if tied else 6 * 32 * 2 + placeholder
    assert costs.head_bytes == head - row * (1 if tied else 2)
    assert costs.n_embd == 32


def kv(tmp_path: Path, *more: g.Pair) -> tuple[int, ...]:
    return model_costs(make(tmp_path, *more)).kv_bytes_per_token


def test_kv_of_grouped_heads(tmp_path: Path) -> None:
    assert kv(tmp_path) == (2 * (8 + 8) * 2,) * 4


def test_kv_by_layer(tmp_path: Path) -> None:
    heads = g.Pair("llama.attention.head_count_kv", g.ARR, [4, 0, 2, 1], g.I32)
    assert kv(tmp_path, heads) == (4 * 16 * 2, 0, 2 * 16 * 2, 1 * 16 * 2)


def test_kv_heads_default_to_heads(tmp_path: Path) -> None:
    pairs = [pair for pair in g.llama_pairs(4) if pair.key != "llama.attention.head_count_kv"]
    model = read_model(g.write(tmp_path / "m.gguf", pairs, g.llama_tensors(4)))
    assert model_costs(model).kv_bytes_per_token == (4 * 16 * 2,) * 4


def test_kv_with_head_widths_of_its_own(tmp_path: Path) -> None:
    widths = (g.Pair("llama.attention.key_length", g.U32, 24), g.Pair("llama.attention.value_length", g.U32, 20))
    assert kv(tmp_path, *widths) == (2 * 44 * 2,) * 4
    window = g.Pair("llama.attention.key_length_swa", g.U32, 30)  # some layers have more: an upper bound
    assert kv(tmp_path, *widths, window) == (2 * 50 * 2,) * 4


def test_kv_of_latent_attention_has_no_values(tmp_path: Path) -> None:
    keys = {"head_count_kv": 1, "key_length": 576, "value_length": 512, "key_length_mla": 192, "value_length_mla": 128}
    pairs = [g.Pair(f"llama.attention.{key}", g.U32, value) for key, value in keys.items()]
    assert kv(tmp_path, *pairs) == (576 * 2,) * 4


def test_of_routed_experts_a_token_reads_those_it_is_sent_to(tmp_path: Path) -> None:
    """All are resident. Shared experts, and the router, are read always."""
    experts = [
        tensor
        for i in range(4)
        for tensor in (
            g.Tensor(f"blk.{i}.ffn_up_exps.weight", (32, 4, 8), g.TENSOR_Q8_0),
            g.Tensor(f"blk.{i}.ffn_up_shexp.weight", (32, 4), g.TENSOR_Q8_0),
            g.Tensor(f"blk.{i}.ffn_gate_inp.weight", (32, 8)),
        )
    ]

    def costs(*more: g.Pair) -> ModelCosts:
        pairs, tensors = [*g.llama_pairs(4), *more], [*g.llama_tensors(4), *experts]
        return model_costs(read_model(g.write(tmp_path / "m.gguf", pairs, tensors)))

    dense = costs()
    assert dense.active_bytes == () and dense.read_bytes == dense.layer_bytes
    mixture = costs(g.Pair("llama.expert_count", g.U32, 8), g.Pair("llama.expert_used_count", g.U32, 2))
    assert mixture.layer_bytes == dense.layer_bytes
    routed = 4 * 8 * 34
    assert mixture.read_bytes == tuple(size - routed * 6 // 8 for size in mixture.layer_bytes)


def test_no_attention_no_kv(tmp_path: Path) -> None:
    assert kv(tmp_path, g.Pair("llama.attention.head_count", g.U32, 0)) == (0,) * 4


@pytest.mark.parametrize(
    "pair",
    [
        g.Pair("llama.attention.head_count_kv", g.ARR, [2, 2, 2], g.U32),
        g.Pair("llama.attention.head_count_kv", g.I32, -1),
        g.Pair("llama.attention.head_count_kv", g.U32, 2**31),
    ],
)
def test_kv_heads_that_cannot_be(tmp_path: Path, pair: g.Pair) -> None:
    with pytest.raises(ModelFileError) as caught:
        kv(tmp_path, pair)
    assert caught.value.field == pair.key


def test_stage_bytes() -> None:
    costs = ModelCosts(
        (1, 2, 4), head_bytes=100, embedding_bytes=7, kv_bytes_per_token=(0,) * 3, n_embd=1, shared_bytes=1000
    )
    assert stage_bytes(costs, 0, 2, last=False) == 1003
    assert stage_bytes(costs, 2, 3, last=True) == 1104
    assert costs.total == 1107
