"""The C++ helper library: the only module that loads it.

Theory. ``libdwarfstar_native`` (folder ``native/``) has a C ABI and no link to llama.cpp: functions of ggml are given
to it as addresses (integers). It does what must not run in Python (callbacks called for each graph node, work on
every activation byte) and nothing else. Every call here releases the GIL, as any ``ctypes.CDLL`` call does: a stage's
event loop keeps running while its compute thread encodes.

Invariants. Signatures are bound once, when the library is first used. Objects keep alive what C borrows from them.
Sizes are checked on the C side too. Arrays are C-contiguous; float arrays are f32 of shape rows × cols.

The library lies beside this package in a wheel, in ``site-packages/dwarfstar_engine`` in an editable install, or where
the environment variable ``DWARFSTAR_NATIVE`` says (tests of an uninstalled tree).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import sys
import sysconfig
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine.errors import DwarfStarError, FrameError, ModelFileError, StageError
from dwarfstar_engine.model.slice import Extent, FileExtent, MemoryExtent, ZeroExtent

FloatRows = NDArray[np.float32]  # rows × cols, C order
Buffer = bytes | bytearray | memoryview | NDArray[Any]  # anything contiguous with the buffer protocol

ABI_VERSION = 4  # DS_ABI_VERSION of native/include/dwarfstar_native.h
MAX_TOP = 20  # DS_MAX_TOP: OpenAI's bound on top_logprobs
FILL_CHUNK_BYTES = 4 << 20  # staging buffer of TensorFiller: large reads, small memory
PROBE_BYTES = 256 << 20  # larger than the caches of the machines people lend
PROBE_SECONDS = 0.2  # long enough to be repeatable, short enough to run at start
_NAME_BYTES = 64  # GGML_MAX_NAME

_ARG, _RANGE, _SIZE, _IO, _NAME, _OVERFLOW, _DATA = -1, -2, -3, -4, -5, -6, -7  # ds_status


class WireType(IntEnum):
    """How hidden states travel: exact; halves with a power-of-two scale a row; int8 with a scale for each 16, the
    largest of each row apart. Layouts: native/src/codec.cpp; what they cost: docs/wire.md."""

    F32 = 1
    F16 = 2
    Q8 = 3


class _CExtent(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("data", ctypes.c_char_p),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


_i32, _i64, _u32, _u64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64
_float, _double, _pointer, _text = ctypes.c_float, ctypes.c_double, ctypes.c_void_p, ctypes.c_char_p
_out_pointer = ctypes.POINTER(ctypes.c_void_p)

# name -> (result, arguments), as in dwarfstar_native.h
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ds_vfile_open": (_i32, (_pointer, ctypes.c_size_t, _out_pointer, ctypes.POINTER(ctypes.c_size_t))),
    "ds_vfile_close": (None, (_pointer,)),
    "ds_vfile_size": (_u64, (_pointer,)),
    "ds_vfile_bytes_read": (_u64, (_pointer,)),
    "ds_vfile_pread": (_i64, (_pointer, _pointer, _u64, _u64)),
    "ds_vfile_stream": (_pointer, (_pointer,)),
    "ds_filler_new": (
        _i32,
        (_pointer, _pointer, _pointer, _pointer, ctypes.c_size_t, _u64, _pointer, _pointer, _pointer, _out_pointer),
    ),
    "ds_filler_free": (None, (_pointer,)),
    "ds_filler_error": (_i32, (_pointer, _text, ctypes.c_size_t)),
    "ds_filler_count": (_u64, (_pointer,)),
    "ds_tap_new": (_i32, (_pointer, _pointer, _pointer, _pointer, _out_pointer)),
    "ds_tap_free": (None, (_pointer,)),
    "ds_tap_set_names": (_i32, (_pointer, _text, _text)),
    "ds_tap_begin": (_i32, (_pointer, _pointer, _u64, _pointer, _u64)),
    "ds_tap_captured": (_u64, (_pointer,)),
    "ds_tap_injected": (_u64, (_pointer,)),
    "ds_tap_error": (_i32, (_pointer,)),
    "ds_encoded_size": (_i64, (_i32, _i64, _i64)),
    "ds_encode": (_i64, (_i32, _pointer, _i64, _i64, _pointer, _u64)),
    "ds_decode": (_i32, (_i32, _pointer, _u64, _i64, _i64, _pointer, _u64)),
    "ds_crc32c": (_u32, (_u32, _pointer, _u64)),
    "ds_crc32c_portable": (_u32, (_u32, _pointer, _u64)),
    "ds_force_portable_half": (None, (ctypes.c_bool,)),
    "ds_embed_rows": (_i32, (_pointer, _pointer, _i64, _i64, _i64, _pointer, _i64, _float, _pointer)),
    "ds_argmax": (_i32, (_pointer, _i32)),
    "ds_top_logprobs": (_i32, (_pointer, _i32, _i32, _i32, _pointer, _pointer, _pointer)),
    "ds_stage_new": (_i32, (_pointer, ctypes.c_size_t, _out_pointer)),
    "ds_stage_free": (None, (_pointer,)),
    "ds_stage_tune": (_i32, (_pointer, _i32, ctypes.c_bool)),
    "ds_stage_step": (_i32, (_pointer, ctypes.c_bool, _i32, _pointer, _i32, _i32, _pointer, _pointer)),
    "ds_stage_error": (_i32, (_pointer,)),
    "ds_stage_copy": (_i32, (_pointer, _i32, _i32, _i32)),
    "ds_stage_give": (_i64, (_pointer, _i32, _i32)),
    "ds_stage_given": (_i32, (_pointer, _pointer, ctypes.c_size_t)),
    "ds_stage_take": (_i32, (_pointer, _i32, _i32, _i32, _pointer, ctypes.c_size_t)),
    "ds_stage_clear": (_i32, (_pointer,)),
    "ds_stage_sampler": (_i32, (_pointer, _i32, _i32, _pointer, _i32, _u64, ctypes.c_bool)),
    "ds_stage_draw": (_i32, (_pointer, ctypes.c_bool, _i32, _i32, _i32, _i32)),
    "ds_stage_run": (_i64, (_pointer, _pointer, ctypes.c_size_t, _u32, _pointer, ctypes.c_size_t, _pointer)),
    "ds_stage_halt": (_i32, (_pointer, _i32)),
    "ds_stage_ends": (_i32, (_pointer, _pointer, _i32)),
    "ds_stage_held": (_i32, (_pointer, _i32, _pointer)),
    "ds_stage_busy_us": (_u64, (_pointer,)),
    "ds_draw_seed": (_u32, (_u64, _i32)),
    "ds_memory_bandwidth": (_double, (_i32, _u64, _double)),
}


_FILE_NAMES = {"win32": "dwarfstar_native.dll", "darwin": "libdwarfstar_native.dylib"}
FILE_NAME = _FILE_NAMES.get(sys.platform, "libdwarfstar_native.so")


def _folders() -> Iterator[Path]:
    """Where the library may lie: beside the package (wheel), or in site-packages (editable install)."""
    package = sys.modules["dwarfstar_engine"]
    yield from (Path(folder) for folder in package.__path__)
    with suppress(importlib.metadata.PackageNotFoundError):
        yield Path(str(importlib.metadata.distribution("dwarfstar-tui").locate_file("dwarfstar_engine")))
    yield from (Path(sysconfig.get_path(kind)) / "dwarfstar_engine" for kind in ("platlib", "purelib"))


def find() -> Path:
    """The library's path. Raises DwarfStarError if it is nowhere it should be."""
    told = os.environ.get("DWARFSTAR_NATIVE")
    candidates = [Path(told)] if told else [folder / FILE_NAME for folder in _folders()]
    for path in candidates:
        if path.is_file():
            return path
    raise DwarfStarError(
        f"DwarfStar's native library is not at {candidates[0]}: install the package (pip install .), "
        "or set DWARFSTAR_NATIVE to the library's path",
        code="native_library_missing",
    )


def load(path: Path) -> ctypes.CDLL:
    """Load and bind the library at ``path``. Raises DwarfStarError if it cannot be used."""
    try:
        library = ctypes.CDLL(str(path))
        library.ds_abi_version.restype = ctypes.c_int32
        version = int(library.ds_abi_version())
    except (OSError, AttributeError) as error:
        raise DwarfStarError(
            f"{path} is not a usable DwarfStar library ({error}): reinstall the package", code="native_library_invalid"
        ) from error
    if version != ABI_VERSION:
        raise DwarfStarError(
            f"{path} has ABI version {version} and this code needs {ABI_VERSION}: reinstall the package to rebuild it",
            code="native_library_mismatch",
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded at first use. Raises DwarfStarError if it is missing or of another version."""
    return load(find())


def _address(function: Any) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value
    return value


def _data(array: NDArray[Any]) -> int:
    """The address of a C-contiguous array. Quicker than ``array.ctypes.data``."""
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]
    return address


def _span(data: Buffer) -> tuple[bytes | int, int]:
    """A buffer as ctypes takes it, without a copy, and its size in bytes."""
    if isinstance(data, bytes):
        return data, len(data)
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    return _data(array), array.nbytes


class VirtualFile:
    """Extents, end to end, as one read-only file. A context manager.

    pointer: a C ``FILE*``, closed with this object and by nobody else; 0 where the platform cannot make one (use
    TensorFiller there). Raises ModelFileError if a file cannot be opened or is shorter than its extent says.
    """

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._library = library()
        self._extents = tuple(extents)  # their bytes are borrowed by C
        table = (_CExtent * len(self._extents))()
        handle, bad = ctypes.c_void_p(), ctypes.c_size_t()
        with ExitStack() as opened:
            descriptors: dict[str, int] = {}
            for row, extent in zip(table, self._extents, strict=True):
                match extent:
                    case MemoryExtent(data):
                        row.kind, row.data, row.size = 0, data, len(data)
                    case FileExtent(path, offset, size):
                        if path not in descriptors:
                            descriptors[path] = _open(path)
                            opened.callback(os.close, descriptors[path])
                        row.kind, row.fd, row.offset, row.size = 1, descriptors[path], offset, size
                    case ZeroExtent(size):
                        row.kind, row.size = 2, size
            status = self._library.ds_vfile_open(table, len(table), ctypes.byref(handle), ctypes.byref(bad))
        if status == _RANGE and isinstance(extent := self._extents[bad.value], FileExtent):
            raise ModelFileError(
                extent.path, extent.offset, "tensor data", f"the file ends before the {extent.size} bytes expected here"
            )
        if status != 0:
            raise StageError(f"the model's data could not be laid out for loading (status {status})")
        self.handle = handle.value
        self._free = weakref.finalize(self, self._library.ds_vfile_close, self.handle)
        self.size: int = self._library.ds_vfile_size(self.handle)
        self.pointer: int = self._library.ds_vfile_stream(self.handle) or 0

    @property
    def bytes_read(self) -> int:
        """Bytes delivered so far, read-ahead included."""
        assert self._free.alive, "closed"
        return int(self._library.ds_vfile_bytes_read(self.handle))

    def pread(self, size: int, offset: int) -> bytes:
        """Bytes at ``offset``, fewer than ``size`` only at the end. Safe on several threads. Raises StageError."""
        assert self._free.alive and size >= 0 and offset >= 0
        buffer = np.empty(min(size, max(0, self.size - offset)), np.uint8)
        got = self._library.ds_vfile_pread(self.handle, _data(buffer), buffer.nbytes, offset)
        if got != buffer.nbytes:
            raise StageError(f"reading {size} bytes of model data at {offset} failed: was the file changed?")
        return buffer.tobytes()

    def close(self) -> None:
        """Close the stream and the files. Idempotent."""
        self.pointer = 0
        self._free()

    def __enter__(self) -> VirtualFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise ModelFileError(path, 0, "file", f"it cannot be opened: {error.strerror}") from error


class TensorFiller:
    """Fills tensors for ``llama_model_init_from_user``: callback_address and user_data are its two arguments.

    places: tensor name -> (offset, size) in the virtual file, which must outlive the load. get_name, nbytes,
    tensor_set: addresses of ggml_get_name, ggml_nbytes, ggml_backend_tensor_set. chunk_bytes bounds the staging
    buffer; 0 sets each tensor in one piece, as back-ends with split tensors demand.

    llama.cpp asks for *every* tensor the architecture knows, also for optional ones the file lacks: places must give
    those neutral values (extents of zeros for ``.bias``, of ones for scales and RoPE factors). A head tied to the
    embedding needs an ``output.weight`` of the embedding's type in the metadata, at the embedding's place.
    """

    def __init__(
        self,
        file: VirtualFile,
        places: Mapping[str, tuple[int, int]],
        *,
        get_name: int,
        nbytes: int,
        tensor_set: int,
        chunk_bytes: int = FILL_CHUNK_BYTES,
    ) -> None:
        self._library, self._file = library(), file
        n = len(places)
        names = (ctypes.c_char_p * n)(*(name.encode() for name in places))
        offsets = (ctypes.c_uint64 * n)(*(offset for offset, _ in places.values()))
        sizes = (ctypes.c_uint64 * n)(*(size for _, size in places.values()))
        handle = ctypes.c_void_p()
        status = self._library.ds_filler_new(
            file.handle, names, offsets, sizes, n, chunk_bytes, get_name, nbytes, tensor_set, ctypes.byref(handle)
        )
        if status != 0:
            raise StageError(f"the table of tensors does not fit the model's data (status {status})")
        self.callback_address = _address(self._library.ds_fill_tensor)
        self.user_data = handle.value
        self._free = weakref.finalize(self, self._library.ds_filler_free, self.user_data)

    @property
    def count(self) -> int:
        """Tensors filled so far."""
        return int(self._library.ds_filler_count(self.user_data))

    def check(self) -> None:
        """Raise StageError if a tensor could not be filled. Ask before using the model: llama.cpp cannot know."""
        name = ctypes.create_string_buffer(_NAME_BYTES)
        status = self._library.ds_filler_error(self.user_data, name, _NAME_BYTES)
        if status != 0:
            what = {
                _NAME: "it is not in the slice",
                _SIZE: "its size in the file is not what llama.cpp expects",
                _IO: "reading the file failed",
            }.get(status, f"status {status}")
            raise StageError(f"tensor {name.value.decode()} could not be loaded: {what}", code="stage_load_failed")


class Tap:
    """Captures one tensor of each decode, and may overwrite another: callback_address and user_data are ``cb_eval``
    and ``cb_eval_user_data`` of llama.cpp's context parameters.

    capture: tensor whose value is copied out, after which the graph ends. inject: tensor whose value is replaced.
    get_name, nbytes, tensor_get, tensor_set: addresses of the ggml functions. Lives at least as long as the context.
    """

    def __init__(
        self,
        *,
        capture: str | None,
        inject: str | None = None,
        get_name: int,
        nbytes: int,
        tensor_get: int,
        tensor_set: int,
    ) -> None:
        self._library = library()
        handle = ctypes.c_void_p()
        status = self._library.ds_tap_new(get_name, nbytes, tensor_get, tensor_set, ctypes.byref(handle))
        assert status == 0, status
        self.callback_address = _address(self._library.ds_tap_callback)
        self.user_data = handle.value
        self._free = weakref.finalize(self, self._library.ds_tap_free, self.user_data)
        self._held: tuple[FloatRows | None, FloatRows | None] = (None, None)  # borrowed by C until the next begin
        self.retarget(capture, inject)

    def retarget(self, capture: str | None, inject: str | None = None) -> None:
        """Name other tensors, between decodes: an earlier ``l_out-k`` makes the slice shorter."""
        names = (None if name is None else name.encode() for name in (capture, inject))
        status = self._library.ds_tap_set_names(self.user_data, *names)
        assert status == 0, (capture, inject)

    def begin(self, target: FloatRows | None = None, source: FloatRows | None = None) -> None:
        """Before a decode: where captured rows go and injected rows come from. None: do not capture, or inject."""
        assert target is None or (target.dtype == np.float32 and target.flags.writeable)
        assert source is None or source.dtype == np.float32
        self._held = (target, source)
        status = self._library.ds_tap_begin(
            self.user_data,
            None if target is None else _data(target),
            0 if target is None else target.nbytes,
            None if source is None else _data(source),
            0 if source is None else source.nbytes,
        )
        assert status == 0, status

    @property
    def captured_bytes(self) -> int:
        return int(self._library.ds_tap_captured(self.user_data))

    @property
    def injected_bytes(self) -> int:
        return int(self._library.ds_tap_injected(self.user_data))

    def check(self, captured: int | None = None, injected: int | None = None) -> None:
        """After a decode: raise StageError unless exactly so many bytes were captured and injected. None: any."""
        if self._library.ds_tap_error(self.user_data) == _OVERFLOW:
            raise StageError("llama.cpp computed more rows than the frame holds", code="capture_failed")
        for verb, want, got in (
            ("captured", captured, self.captured_bytes),
            ("injected", injected, self.injected_bytes),
        ):
            if want is not None and want != got:
                raise StageError(
                    f"{got} bytes of hidden states were {verb} and {want} expected: this llama.cpp build names "
                    "its tensors differently",
                    code="capture_failed",
                )


def encoded_size(dtype: WireType, rows: int, cols: int) -> int:
    """Bytes of rows × cols values on the wire. Raises FrameError if there can be no such frame."""
    size = int(library().ds_encoded_size(dtype, rows, cols))
    if size < 0:
        raise FrameError(f"hidden states of {rows} × {cols} in format {int(dtype)} cannot be sent")
    return size


def encode(dtype: WireType, rows: FloatRows) -> NDArray[np.uint8]:
    """f32 rows × cols → wire bytes, in a new array (a buffer: join or send it without a copy)."""
    assert rows.dtype == np.float32
    n, cols = rows.shape
    out = np.empty(encoded_size(dtype, n, cols), np.uint8)
    written = library().ds_encode(dtype, _data(rows), n, cols, _data(out), out.nbytes)
    assert written == out.nbytes, written
    return out


def decode(dtype: WireType, data: Buffer, rows: int, cols: int) -> FloatRows:
    """Wire bytes → f32 rows × cols. F32 is a read-only view of ``data`` if that is aligned; others are new.

    Raises FrameError if the size is not exactly right or the bytes are none an encoder writes.
    """
    size = encoded_size(dtype, rows, cols)
    source, given = _span(data)
    if given != size:
        raise FrameError(f"hidden states of {rows} × {cols} came in {given} bytes and not {size}")
    if dtype is WireType.F32:
        view: FloatRows = np.frombuffer(data, np.float32)
        if view.flags.aligned:
            view.flags.writeable = False
            return view.reshape(rows, cols)
    out = np.empty((rows, cols), np.float32)
    if library().ds_decode(dtype, source, given, rows, cols, _data(out), out.size) != 0:
        raise FrameError("hidden states came in bytes that no encoder writes: run the same version on all nodes")
    return out


def crc32c(data: Buffer, seed: int = 0) -> int:
    """CRC-32C of a buffer; ``seed`` is the value of the bytes before it."""
    source, size = _span(data)
    return int(library().ds_crc32c(seed, source, size))


def embed_rows(
    *,
    to_float: int,
    base: int,
    n_rows: int,
    row_bytes: int,
    ids: NDArray[np.int32],
    scale: float,
    out: FloatRows,
) -> None:
    """out[i] = scale · row ids[i] of a matrix of ``n_rows`` rows at address ``base``, ``row_bytes`` apart.

    to_float: address of the type's ``ggml_to_float_t``, 0 for f32. out: len(ids) × n_embd. Raises StageError if an id
    is out of range.
    """
    assert ids.dtype == np.int32 and out.dtype == np.float32 and out.shape[0] == ids.shape[0] and out.flags.writeable
    status = library().ds_embed_rows(
        to_float, base, n_rows, row_bytes, out.shape[1], _data(ids), ids.shape[0], scale, _data(out)
    )
    if status == _RANGE:
        raise StageError(f"a token id is outside this model's vocabulary of {n_rows}", code="bad_token")
    assert status == 0, status


def argmax(logits: int, n: int) -> int:
    """Index of the first maximum of n floats at an address: llama.cpp's greedy choice."""
    token = int(library().ds_argmax(logits, n))
    assert token >= 0, token
    return token


def top_logprobs(logits: int, n: int, chosen: int, k: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-softmax over n floats at an address: that of ``chosen``, and the k ≤ MAX_TOP best (id, logprob).

    Best first, ties to the lower id. Raises StageError if the logits have no finite maximum.
    """
    ids = (ctypes.c_int32 * MAX_TOP)()
    values = (ctypes.c_float * MAX_TOP)()
    own = ctypes.c_float()
    count = library().ds_top_logprobs(logits, n, chosen, k, ids, values, ctypes.byref(own))
    if count == _DATA:
        raise StageError("the model computed logits that are not finite: its file may be damaged", code="bad_logits")
    assert count >= 0, (count, chosen, k)
    return own.value, tuple(zip(ids[:count], values[:count], strict=True))


def memory_bandwidth_gb_s(
    threads: int | None = None, size_bytes: int = PROBE_BYTES, seconds: float = PROBE_SECONDS
) -> float:
    """Measured read bandwidth in GB/s (1e9 bytes). threads: None for one on each core this process may use.

    Takes ``seconds`` plus the time to write ``size_bytes`` once. Raises StageError if memory is short.
    """
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    speed = float(library().ds_memory_bandwidth(threads, size_bytes, seconds))
    assert speed != _ARG, (threads, size_bytes, seconds)
    if speed < 0:
        raise StageError("there is not enough memory to measure its bandwidth: free some or lower the probe's size")
    return speed
