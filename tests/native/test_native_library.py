"""The Python face of the native library: buffers, errors, lifetimes. The C++ side has its own test program."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dwarfstar_engine import native
from dwarfstar_engine.errors import ModelFileError, StageError
from dwarfstar_engine.model.slice import Extent, FileExtent, MemoryExtent, ZeroExtent

FINITE_ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-1e30, 1e30, width=32, allow_subnormal=False),
)


@pytest.fixture
def content(tmp_path: Path) -> tuple[str, bytes]:
    data = bytes(np.random.default_rng(1).integers(0, 256, 50_000, np.uint8))
    (tmp_path / "data").write_bytes(data)
    return str(tmp_path / "data"), data


# ---- virtual file


def test_virtual_file_is_its_extents_end_to_end(content: tuple[str, bytes]) -> None:
    path, data = content
    whole = b"head" + data[100:40_100] + bytes(60) + data[:1000] + b"tail"
    extents: list[Extent] = [
        MemoryExtent(b"head"),
        FileExtent(path, 100, 40_000),
        ZeroExtent(60),
        FileExtent(path, 0, 1000),
        MemoryExtent(b"tail"),
    ]
    with native.VirtualFile(extents) as file:
        assert file.size == len(whole)
        assert file.pread(len(whole) + 5, 0) == whole
        assert file.pread(100, 40_000) == whole[40_000:40_100]
        assert file.pread(5, len(whole)) == b""
        assert file.bytes_read == len(whole) + 100


@pytest.mark.skipif(os.name == "nt", reason="no FILE* over callbacks on Windows")
def test_virtual_file_pointer_is_a_stdio_file(content: tuple[str, bytes]) -> None:
    path, data = content
    libc = ctypes.CDLL(None)
    libc.fread.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    libc.fseek.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    libc.ftell.argtypes, libc.ftell.restype = [ctypes.c_void_p], ctypes.c_long
    buffer = ctypes.create_string_buffer(30_000)
    with native.VirtualFile([MemoryExtent(b"abc"), FileExtent(path, 7, 30_000)]) as file:
        assert libc.fseek(file.pointer, 0, os.SEEK_END) == 0
        assert libc.ftell(file.pointer) == 30_003
        assert libc.fseek(file.pointer, 3, os.SEEK_SET) == 0
        assert libc.fread(buffer, 30_000, 1, file.pointer) == 1
        assert buffer.raw == data[7:30_007]


def test_virtual_file_names_the_file_at_fault(content: tuple[str, bytes], tmp_path: Path) -> None:
    path, data = content
    with pytest.raises(ModelFileError, match="ends before") as short:
        native.VirtualFile([ZeroExtent(1), FileExtent(path, 40_000, len(data))])
    assert (short.value.path, short.value.offset) == (path, 40_000)
    with pytest.raises(ModelFileError, match="cannot be opened") as missing:
        native.VirtualFile([FileExtent(str(tmp_path / "none"), 0, 1)])
    assert missing.value.path.endswith("none")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_virtual_file_leaves_no_descriptor_open(content: tuple[str, bytes], tmp_path: Path) -> None:
    path, _ = content

    def ours() -> int:
        links = (fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
        return sum(str(link) == path for link in links)

    with native.VirtualFile([FileExtent(path, 0, 10), FileExtent(path, 20, 10)]) as file:
        assert ours() == 1
        file.pread(5, 0)
    assert ours() == 0
    with pytest.raises(ModelFileError):
        native.VirtualFile([FileExtent(path, 0, 10), FileExtent(str(tmp_path / "none"), 0, 1)])
    assert ours() == 0
    dropped: native.VirtualFile | None = native.VirtualFile([FileExtent(path, 0, 10)])
    assert dropped is not None and ours() == 1
    dropped = None
    gc.collect()
    assert ours() == 0


def test_virtual_file_notices_a_file_that_shrinks(content: tuple[str, bytes]) -> None:
    path, _ = content
    with native.VirtualFile([FileExtent(path, 0, 50_000)]) as file:
        os.truncate(path, 30_000)
        with pytest.raises(StageError, match="was the file changed"):
            file.pread(50_000, 0)


# ---- filler and tap, with tensors of our own: ctypes functions in place of ggml's


class Tensor(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


_get_name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.POINTER(Tensor))
_nbytes = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.POINTER(Tensor))
_move = ctypes.CFUNCTYPE(None, ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


class Ggml:
    """Addresses as llama.cpp's would be; must live as long as they are used."""

    def __init__(self) -> None:
        name = ctypes.cast(ctypes.pythonapi.PyBytes_AsString, ctypes.c_void_p)  # placeholder type for mypy
        del name
        self._functions: dict[str, Any] = {
            # The name is the first member: an address of a char* is what ggml_get_name returns the value of.
            "nbytes": _nbytes(lambda t: t.contents.size),
            "tensor_get": _move(lambda t, p, offset, n: ctypes.memmove(p, t.contents.data + offset, n) and None),
            "tensor_set": _move(lambda t, p, offset, n: ctypes.memmove(t.contents.data + offset, p, n) and None),
        }

    def __getitem__(self, name: str) -> int:
        value = ctypes.cast(self._functions[name], ctypes.c_void_p).value
        assert value
        return value
