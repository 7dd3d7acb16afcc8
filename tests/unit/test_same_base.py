"""Files of one model in different quantisations are told from files of different models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.same_base import MAX_FACTS, MAX_TEXT, Base, base_of, same_base
from support import gguf_bytes as g


def make(path: Path, *more: g.Pair, tied: bool = True) -> Base:
    drop = {pair.key for pair in more}
    pairs = [*(pair for pair in g.llama_pairs(4) if pair.key not in drop), *more]
    return base_of(read_model(g.write(path, pairs, g.llama_tensors(4, tied=tied))))


def test_another_quantisation_is_the_same_model(tmp_path: Path) -> None:
    a = make(tmp_path / "a.gguf", g.Pair("general.file_type", g.U32, 2), g.Pair("general.basename", g.STR, "Llama"))
    b = make(tmp_path / "b.gguf", g.Pair("general.file_type", g.U32, 18), tied=False)
    assert same_base(a, a) is None
    assert same_base(a, b) is None and same_base(b, a) is None


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (g.Pair("llama.embedding_length", g.U32, 64), "llama.embedding_length is 32 in one and 64 in the other"),
        (
            g.Pair("llama.rope.freq_base", g.F32, 5e5),
            "llama.rope.freq_base is missing in one and 500000 in the other",
        ),
        (
            g.Pair("llama.attention.head_count_kv", g.ARR, [2, 2, 2, 1], g.U32),
            "llama.attention.head_count_kv is 2 in one",
        ),
        (g.Pair("tokenizer.ggml.tokens", g.ARR, ["<unk>", "a"], g.STR), "tokens"),
        (g.Pair("llama.logit_scale", g.F32, 8.0), "llama.logit_scale is 4 in one and 8 in the other"),
        (g.Pair("llama.rope.scaling.factor", g.F32, 8.0), "llama.rope.scaling.factor is missing in one and 8 in"),
        (g.Pair("general.finetune", g.STR, "Chat"), "general.finetune is Base in one and Chat in the other"),
    ],
)
def test_the_difference_is_told(tmp_path: Path, pair: g.Pair, words: str) -> None:
    other = {"general.finetune": "Base", "llama.logit_scale": 4.0}  # they say something only if both have them
    a = make(tmp_path / "a.gguf", *([g.Pair(pair.key, pair.kind, other[pair.key])] if pair.key in other else []))
    b = make(tmp_path / "b.gguf", pair)
    told = same_base(a, b)
    assert told is not None and words in told


def test_tokens_are_compared_one_by_one(tmp_path: Path) -> None:
    words = {name: [f"t{i}" for i in range(6)] for name in "ab"}
    words["b"][4] = "other"
    a, b = (
        make(tmp_path / f"{name}.gguf", g.Pair("tokenizer.ggml.tokens", g.ARR, tokens, g.STR))
        for name, tokens in words.items()
    )
    assert same_base(a, b, "a.gguf", "b.gguf") == "the vocabularies of a.gguf and b.gguf have different tokens"


def test_a_key_that_one_file_only_has_and_what_a_file_claims_say_nothing(tmp_path: Path) -> None:
    a = make(tmp_path / "a.gguf", g.Pair("llama.logit_scale", g.F32, 8.0))
    assert same_base(a, make(tmp_path / "b.gguf", g.Pair("llama.context_length", g.U32, 77))) is None


def test_files_that_may_be_divided_elsewhere_are_not_mixed(tmp_path: Path) -> None:
    model = read_model(g.write(tmp_path / "a.gguf", g.llama_pairs(4), g.llama_tensors(4)))
    told = same_base(base_of(model, cuts=(1, 2, 3)), base_of(model, cuts=(2,)))
    assert told == "the list of legal cuts is 1,2,3 in one and 2 in the other"


def test_norms_tell_other_weights_where_both_are_known(tmp_path: Path) -> None:
    a = make(tmp_path / "a.gguf")
    one, other = replace(a, norms="1"), replace(a, norms="2")
    assert same_base(one, one) is None and same_base(one, a) is None and same_base(a, other) is None
    assert "they are other weights" in (same_base(one, other) or "")


def test_what_is_compared_is_of_bounded_size(tmp_path: Path) -> None:
    keys = [g.Pair(f"llama.{'k' * 300}{index}", g.STR, f"{'v' * 5000}{index}") for index in range(2 * MAX_FACTS)]
    base = make(tmp_path / "a.gguf", *keys, g.Pair("general.basename", g.STR, "a\x1b[2J"))
    assert len(base.facts) == MAX_FACTS and "llama.block_count" in base.facts
    assert all(len(text) <= MAX_TEXT and text.isprintable() for pair in base.facts.items() for text in pair)
    assert len(set(base.facts.values())) > MAX_FACTS // 2, "long values are told apart"


def test_architectures_first(tmp_path: Path) -> None:
    pairs = g.llama_pairs(4, n_embd=64, architecture="qwen2")
    other = base_of(read_model(g.write(tmp_path / "b.gguf", pairs, g.llama_tensors(4, n_embd=64))))
    assert same_base(make(tmp_path / "a.gguf"), other) == "one is of architecture llama, the other of qwen2"


def test_a_number_stands_for_one_in_each_layer(tmp_path: Path) -> None:
    once = make(tmp_path / "a.gguf", g.Pair("llama.attention.head_count_kv", g.U32, 2))
    assert same_base(once, make(tmp_path / "b.gguf")) is None
