"""Hostile, damaged and truncated GGUF files: a typed error that says where, in bounded memory, whatever the bytes."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dwarfstar_engine.errors import ModelError, ModelFileError
from dwarfstar_engine.model import gguf_reader
from dwarfstar_engine.model.arch import rules
from dwarfstar_engine.model.costs import model_costs
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding, vocab_file
from support import gguf_bytes as g

SMALL = g.gguf_bytes(g.llama_pairs(2), g.llama_tensors(2))
HUGE = 2**64 - 1
MANY_TIMES_SMALL = 1 << 20  # Python objects of a file of 3 kB, with room to spare; far below what it can claim

hostile = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def problem(path: Path, content: bytes) -> ModelFileError:
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_model(path)
    error = caught.value
    assert error.path == str(path)
    assert 0 <= error.offset <= len(content)
    assert error.field and error.field in error.message
    return error


def use_everything(path: Path) -> None:
    """All that is done with a directory. Raises ModelError or nothing."""
    model = read_model(path)
    for value in model.metadata.values():
        if isinstance(value, gguf_reader.MetaArray):
            list(value)
    try:
        rule = rules(model)
        model_costs(model)
        token_embedding(model, rule)
        vocab_file(model)
        for a in range(model.n_layers):
            slice_file(model, rule, a, model.n_layers)
    except ModelError:
        pass


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    padding = len(SMALL) - max(t.offset + t.nbytes for t in _tensors(tmp_path))
    for end in range(len(SMALL) - padding):
        problem(path, SMALL[:end])


def _tensors(tmp_path: Path) -> list[gguf_reader.TensorInfo]:
    path = tmp_path / "whole.gguf"
    path.write_bytes(SMALL)
    return list(read_model(path).tensors.values())


@hostile
@given(flips=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_model_or_a_typed_error(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(SMALL)
    for at, bits in flips:
        content[at] ^= bits
    check_bounded(tmp_path, bytes(content))


@hostile
@given(
    at=st.integers(0, len(SMALL) - 8),
    value=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**63 - 1, 2**63, HUGE]),
    wide=st.booleans(),
)
def test_huge_numbers_anywhere(tmp_path: Path, at: int, value: int, wide: bool) -> None:
    patch = struct.pack("<Q", value) if wide else struct.pack("<I", value & 0xFFFFFFFF)
    check_bounded(tmp_path, SMALL[:at] + patch + SMALL[at + len(patch) :])


@hostile
@given(tail=st.binary(max_size=200))
@example(tail=struct.pack("<IQQ", 3, HUGE, HUGE))
@example(tail=struct.pack("<IQQ", 3, 0, 0))
def test_any_bytes_after_the_magic(tmp_path: Path, tail: bytes) -> None:
    check_bounded(tmp_path, b"GGUF" + tail)


def check_bounded(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        use_everything(path)
    except ModelFileError as error:
        assert error.path.startswith(str(tmp_path))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MANY_TIMES_SMALL


def header(n_tensors: int = 0, n_pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs)


def one_pair(key: bytes, rest: bytes) -> bytes:
    return header(0, 1) + g.string(key) + rest + bytes(64)


def one_tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    n = len(dims) if n_dims is None else n_dims
    body = header(1) + g.string(name) + struct.pack(f"<I{len(dims)}QIQ", n, *dims, kind, offset)
    return body + bytes(-len(body) % 32) + bytes(64)


@pytest.mark.parametrize(
    ("content", "field", "words"),
    [
        (b"", "magic", "truncated"),
        (b"GGML" + bytes(40), "magic", "not a GGUF file"),
        (b"<html>please log in</html>", "magic", "not a GGUF file"),
        (header(version=1), "version", "version 1"),
        (header(version=4), "version", "version 4"),
        (header(version=0x03000000), "version", "big-endian"),
        (header(n_tensors=HUGE), "tensor_count", "more than"),
        (header(n_pairs=HUGE), "metadata_kv_count", "more than"),
        (header(n_tensors=1000), "tensor_count", "truncated"),
        (header(n_pairs=1000), "metadata_kv_count", "truncated"),
        (one_pair(b"", struct.pack("<IB", g.U8, 0)), "metadata key 0", "empty"),
        (one_pair(b"\xff", struct.pack("<IB", g.U8, 0)), "metadata key 0", "UTF-8"),
        (one_pair(b"k", struct.pack("<I", 13)), "k", "value type 13"),
        (one_pair(b"k", struct.pack("<IQ", g.STR, HUGE)), "k", "longer than"),
        (one_pair(b"k", struct.pack("<IQ", g.STR, 1000)), "k", "truncated"),
        (one_pair(b"k", struct.pack("<IIQ", g.ARR, g.ARR, 1)), "k", "arrays of arrays"),
        (one_pair(b"k", struct.pack("<IIQ", g.ARR, 77, 1)), "k", "value type 77"),
        (one_pair(b"k", struct.pack("<IIQ", g.ARR, g.F64, HUGE)), "k", "truncated"),
        (one_pair(b"k", struct.pack("<IIQ", g.ARR, g.STR, 2**61)), "k", "truncated"),
        (one_pair(b"k", struct.pack("<IIQQ", g.ARR, g.STR, 1, HUGE)), "k", "longer than"),
        (one_pair(b"k", struct.pack("<IIQQ", g.ARR, g.STR, 1, 1000)), "k", "truncated"),
        (header(0, 1) + struct.pack("<Q", 65536) + bytes(70000), "metadata key 0", "longer than"),
        (g.gguf_bytes([g.Pair("k", g.U8, 1), g.Pair("k", g.U8, 2)]), "k", "twice"),
        (g.gguf_bytes([g.Pair("general.alignment", g.U32, 0)]), "general.alignment", "power of two"),
        (g.gguf_bytes([g.Pair("general.alignment", g.U32, 48)]), "general.alignment", "power of two"),
        (g.gguf_bytes([g.Pair("general.alignment", g.U32, 1 << 31)]), "general.alignment", "power of two"),
        (g.gguf_bytes([g.Pair("general.alignment", g.U64, 32)]), "general.alignment", "u32"),
        (one_tensor(b"", (1,)), "tensor 0", "no name"),
        (one_tensor(b"\xff", (1,)), "tensor 0", "UTF-8"),
        (one_tensor(b"x" * 64, (1,)), "tensor 0", "longer than 63"),
        (one_tensor(b"t", (), n_dims=0), "t", "0 dimensions"),
        (one_tensor(b"t", (1, 1, 1, 1, 1)), "t", "5 dimensions"),
        (one_tensor(b"t", (1,), n_dims=2**32 - 1), "t", "dimensions"),
        (one_tensor(b"t", (0,)), "t", "does not fit"),
        (one_tensor(b"t", (2, 0)), "t", "does not fit"),
        (one_tensor(b"t", (33,), kind=8), "t", "does not fit"),
        (one_tensor(b"t", (1,), kind=4), "t", "tensor type 4"),
        (one_tensor(b"t", (1,), kind=2**32 - 1), "t", "tensor type"),
        (one_tensor(b"t", (17,)), "t", "truncated"),
        (one_tensor(b"t", (2**63, 2**63, 2**63, 2**63)), "t", "truncated"),
        (one_tensor(b"t", (2**62, 4)), "t", "truncated"),  # 2^64 elements: 0 where sizes wrap
        (one_tensor(b"t", (1,), offset=64), "t", "truncated"),
        (one_tensor(b"t", (1,), offset=2**64 - 32), "t", "truncated"),
        (one_tensor(b"t", (1,), offset=4), "t", "multiple of 32"),
        (g.gguf_bytes([], [g.Tensor("t", (1,)), g.Tensor("t", (1,))]), "t", "twice"),
    ],
)
def test_each_lie_is_told_from_the_others(tmp_path: Path, content: bytes, field: str, words: str) -> None:
    error = problem(tmp_path / "m.gguf", content)
    assert error.field == field
    assert words in error.message


def test_names_in_errors_do_not_steer_a_terminal(tmp_path: Path) -> None:
    key = b"\x1b[2J\n" + b"k" * 5000
    path = tmp_path / "m.gguf"
    path.write_bytes(one_pair(key, struct.pack("<I", 13)))
    with pytest.raises(ModelFileError) as caught:
        read_model(path)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < len(str(path)) + 300


def test_a_tensor_may_end_where_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(one_tensor(b"t", (16,)))
    assert read_model(path).tensors["t"].nbytes == 64


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "regular file"),
        (tmp_path / "pipe", "regular file"),
        (tmp_path / "absent.gguf", "No such file"),
        (tmp_path / "a\0b", "null"),
    ):
        with pytest.raises(ModelFileError, match=words):
            read_model(path)


def test_a_directory_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_reader, "MAX_DIRECTORY_BYTES", 1000)
    content = g.gguf_bytes([g.Pair("k", g.ARR, ["x" * 90] * 20, g.STR)])
    assert "more than 1000 bytes" in problem(tmp_path / "m.gguf", content).message


def test_a_directory_read_in_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SMALL)
    whole = read_model(path)
    monkeypatch.setattr(gguf_reader, "CHUNK_BYTES", 1)
    chunked = read_model(path)
    assert chunked.directory == whole.directory
    assert chunked.tensors == whole.tensors


def test_weights_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        n = 1 << 32
        file.write(one_tensor(b"t", (n,)))
        file.truncate(n * 4 + 4096)  # a hole: takes no disk
    tracemalloc.start()
    try:
        model = read_model(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert model.tensors["t"].nbytes == n * 4
    assert peak < 4 * gguf_reader.CHUNK_BYTES
