"""The Python face of the native library: buffers, errors, lifetimes. The C++ side has its own test program."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from dwarfstar_engine import native
from dwarfstar_engine.errors import DwarfStarError, FrameError, ModelFileError, StageError
from dwarfstar_engine.model.slice import Extent, FileExtent, MemoryExtent, ZeroExtent
from dwarfstar_engine.native import WireType

FINITE_ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
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


# ---- filler and tap, on tensors of our own with ctypes functions in place of ggml's


class Tensor(ctypes.Structure):
    _fields_ = (("name", ctypes.c_void_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def __init__(self, name: str, values: NDArray[Any]) -> None:
        self.text, self.values = ctypes.create_string_buffer(name.encode()), values
        super().__init__(ctypes.addressof(self.text), values.ctypes.data, values.nbytes)


_At = ctypes.POINTER(Tensor)
_Move = ctypes.CFUNCTYPE(None, _At, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


def _copy_out(tensor: Any, to: int, offset: int, size: int) -> None:
    ctypes.memmove(to, tensor.contents.data + offset, size)


def _copy_in(tensor: Any, source: int, offset: int, size: int) -> None:
    ctypes.memmove(tensor.contents.data + offset, source, size)


_FUNCTIONS: dict[str, Any] = {
    "get_name": ctypes.CFUNCTYPE(ctypes.c_void_p, _At)(lambda tensor: tensor.contents.name),
    "nbytes": ctypes.CFUNCTYPE(ctypes.c_size_t, _At)(lambda tensor: tensor.contents.size),
    "tensor_get": _Move(_copy_out),
    "tensor_set": _Move(_copy_in),
}


def ggml(*names: str) -> dict[str, int]:
    return {name: ctypes.cast(_FUNCTIONS[name], ctypes.c_void_p).value or 0 for name in names}


def make_tap(capture: str | None, inject: str | None = None) -> native.Tap:
    return native.Tap(capture=capture, inject=inject, **ggml("get_name", "nbytes", "tensor_get", "tensor_set"))


def evaluate(tap: native.Tap, *tensors: Tensor) -> int:
    """As ggml's scheduler: ask for each node, show those wanted, stop when told. Returns how many were run."""
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, _At, ctypes.c_bool, ctypes.c_void_p)(tap.callback_address)
    for i, tensor in enumerate(tensors):
        at = ctypes.byref(tensor)
        if callback(at, True, tap.user_data) and not callback(at, False, tap.user_data):
            return i + 1
    return len(tensors)


def rows(first: float, n: int = 2) -> NDArray[np.float32]:
    return np.arange(first, first + 4 * n, dtype=np.float32).reshape(n, 4)


def test_tap_captures_over_micro_batches_and_ends_the_graph() -> None:
    tap, out = make_tap("l_out-4"), np.zeros((4, 4), np.float32)
    tap.begin(target=out)
    for first in (0, 8):
        assert evaluate(tap, Tensor("l_out-3", rows(90)), Tensor("l_out-4", rows(first)), Tensor("norm", rows(0))) == 2
    tap.check(captured=64, injected=0)
    np.testing.assert_array_equal(out, rows(0, 4))
    evaluate(tap, Tensor("l_out-4", rows(50)))
    np.testing.assert_array_equal(out, rows(0, 4))
    with pytest.raises(StageError, match="more rows"):
        tap.check()
    tap.begin(target=out)
    tap.check(captured=0)


def test_tap_injects_and_lets_the_graph_run() -> None:
    tap, source = make_tap(None, "inp_scaled"), rows(5, 4)
    scaled = [Tensor("inp_scaled", rows(70)) for _ in range(3)]
    tap.begin(source=source)
    assert [evaluate(tap, tensor, Tensor("l_out-4", rows(0))) for tensor in scaled[:2]] == [2, 2]
    tap.check(injected=64)
    np.testing.assert_array_equal(scaled[0].values, source[:2])
    np.testing.assert_array_equal(scaled[1].values, source[2:])
    evaluate(tap, scaled[2])
    np.testing.assert_array_equal(scaled[2].values, rows(70))
    with pytest.raises(StageError):
        tap.check()


def test_tap_without_buffers_asks_for_nothing_and_says_what_is_missing() -> None:
    tap = make_tap("l_out-4", "inp_scaled")
    tap.begin()
    assert evaluate(tap, Tensor("inp_scaled", rows(0)), Tensor("l_out-4", rows(0)), Tensor("norm", rows(0))) == 3
    with pytest.raises(StageError, match="0 bytes of hidden states were captured and 32 expected"):
        tap.check(captured=32)


def test_tap_can_be_retargeted() -> None:
    tap, out = make_tap("l_out-4"), np.zeros((2, 4), np.float32)
    tap.retarget("l_out-3")
    tap.begin(target=out)
    assert evaluate(tap, Tensor("l_out-3", rows(3)), Tensor("l_out-4", rows(9))) == 1
    np.testing.assert_array_equal(out, rows(3))


@pytest.mark.parametrize("chunk", [0, 1000, native.FILL_CHUNK_BYTES])
def test_filler_fills_tensors_by_name(content: tuple[str, bytes], chunk: int) -> None:
    path, data = content
    a, b = np.zeros(4000, np.uint8), np.zeros(12_345, np.uint8)
    with native.VirtualFile([FileExtent(path, 0, 50_000), ZeroExtent(10)]) as file:
        filler = native.TensorFiller(
            file,
            {"a": (46_000, 4000), "b": (0, 12_345)},
            chunk_bytes=chunk,
            **ggml("get_name", "nbytes", "tensor_set"),
        )
        fill = ctypes.CFUNCTYPE(None, _At, ctypes.c_void_p)(filler.callback_address)
        for name, values in (("a", a), ("b", b)):
            fill(ctypes.byref(Tensor(name, values)), filler.user_data)
        filler.check()
        assert filler.count == 2
        assert (a.tobytes(), b.tobytes()) == (data[46_000:], data[:12_345])
        fill(ctypes.byref(Tensor("blk.0.c", a)), filler.user_data)
        with pytest.raises(StageError, match=r"blk\.0\.c .* not in the slice"):
            filler.check()
        with pytest.raises(StageError, match="does not fit"):
            native.TensorFiller(file, {"a": (50_000, 11)}, **ggml("get_name", "nbytes", "tensor_set"))


# ---- codecs


@given(FINITE_ROWS)
def test_codecs_keep_their_promise(x: NDArray[np.float32]) -> None:
    n, cols = x.shape
    top = np.abs(x).max(axis=1, keepdims=True)
    for dtype in WireType:
        data = native.encode(dtype, x)
        assert data.nbytes == native.encoded_size(dtype, n, cols)
        back = native.decode(dtype, data, n, cols)
        error = np.abs(back.astype(np.float64) - x)
        if dtype is WireType.F32:
            assert back.tobytes() == x.tobytes()
        elif dtype is WireType.F16:
            assert (error <= np.maximum(np.abs(x) * 2.0**-11, top * 2.0**-38)).all()
        else:
            blocks = np.repeat(np.maximum.reduceat(np.abs(x), range(0, cols, 16), axis=1), 16, axis=1)[:, :cols]
            assert (error <= np.maximum(np.maximum(blocks / 254 * 1.0626, top * 2.0**-23), 2.0**-100)).all()


def q8_apart(cols: int) -> int:
    return min(cols, max(8, cols // 128))


def test_the_layout_of_q8() -> None:
    """Bytes worked out by hand: another CPU, or another version of this code, must write the same."""
    x = np.zeros((1, 20), np.float32)
    x[0, 10:18] = [-1000, 999, 998, 997, 996, 995, 994, 993]
    x[0, [0, 1, 2, 3]] = [127, -127, 0.5, 63.5]  # scale 1; ties go to even
    x[0, [18, 19]] = [31.75, -0.125]  # scale 1/4: 32 steps below
    columns = np.arange(10, 18, dtype="<u2").tobytes()
    values = x[0, 10:18].astype("<f4").tobytes()
    scales = np.array([127 << 4], "<u2").tobytes() + bytes([0, 32])
    quants = np.zeros(20, np.int8)
    quants[[0, 1, 2, 3, 18, 19]] = [127, -127, 0, 64, 127, 0]
    assert native.encode(WireType.Q8, x).tobytes() == columns + values + scales + quants.tobytes()


@given(FINITE_ROWS)
def test_q8_keeps_the_largest_of_a_row_as_they_are(x: NDArray[np.float32]) -> None:
    n, cols = x.shape
    back = native.decode(WireType.Q8, native.encode(WireType.Q8, x), n, cols)
    largest = np.argsort(-np.abs(x), axis=1, kind="stable")[:, : q8_apart(cols)]
    np.testing.assert_array_equal(np.take_along_axis(back, largest, 1), np.take_along_axis(x, largest, 1))


@given(st.integers(9, 3000), st.integers(0, 2**32 - 1), st.floats(1, 2.0**40, width=32))
def test_q8_outliers_cost_their_neighbours_nothing(cols: int, seed: int, outlier: float) -> None:
    """However large K values of a row are: the error of the others is that of blocks without them."""
    random = np.random.default_rng(seed)
    x = random.uniform(-1, 1, (1, cols)).astype(np.float32)
    x[0, random.choice(cols, q8_apart(cols), replace=False)] = outlier
    back = native.decode(WireType.Q8, native.encode(WireType.Q8, x), 1, cols)
    assert np.abs(back - x).max() <= 1 / 254 * 1.0626


@given(FINITE_ROWS)
def test_every_row_is_encoded_by_itself(x: NDArray[np.float32]) -> None:
    for dtype in WireType:
        rows = [native.encode(dtype, row[np.newaxis]).tobytes() for row in x]
        assert native.encode(dtype, x).tobytes() == b"".join(rows)


def test_codecs_show_what_is_not_finite() -> None:
    x = np.array([[math.inf, -math.inf, math.nan, 2.0, 0.0]], np.float32)
    half = native.decode(WireType.F16, native.encode(WireType.F16, x), 1, 5)
    np.testing.assert_array_equal(half, x)
    eight = native.decode(WireType.Q8, native.encode(WireType.Q8, x), 1, 5)
    np.testing.assert_array_equal(eight, np.array([[math.nan, math.nan, math.nan, 2.0, 0.0]], np.float32))


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [slice(17, 18), slice(3, 60), slice(0, 100)])
def test_q8_shows_every_value_that_is_not_finite(broken: float, where: slice) -> None:
    """More of them than are kept apart, too; the others are what they would be with zeros in their place."""
    x = np.linspace(-3, 3, 100, dtype=np.float32).reshape(1, 100)
    x[0, where] = 0
    sound = native.decode(WireType.Q8, native.encode(WireType.Q8, x), 1, 100)
    x[0, where] = broken
    back = native.decode(WireType.Q8, native.encode(WireType.Q8, x), 1, 100)
    sound[0, where] = math.nan
    np.testing.assert_array_equal(back, sound)


@pytest.mark.parametrize("dtype", WireType)
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_decode_takes_any_buffer(dtype: WireType, wrap: Callable[[bytes], native.Buffer]) -> None:
    data = native.encode(dtype, rows(1, 3)).tobytes()
    np.testing.assert_allclose(native.decode(dtype, wrap(data), 3, 4), rows(1, 3), rtol=0.01)


@pytest.mark.parametrize("dtype", WireType)
def test_decode_aligns_what_is_not_aligned(dtype: WireType) -> None:
    data = b"?" + native.encode(dtype, rows(1, 3)).tobytes()
    back = native.decode(dtype, memoryview(data)[1:], 3, 4)
    assert back.flags.aligned
    np.testing.assert_allclose(back, rows(1, 3), rtol=0.01)


def test_decode_of_f32_copies_nothing() -> None:
    data = rows(1).tobytes()
    view = native.decode(WireType.F32, data, 2, 4)
    assert np.shares_memory(view, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("dtype", WireType)
def test_decode_refuses_wrong_sizes(dtype: WireType) -> None:
    data = native.encode(dtype, rows(1)).tobytes()
    for wrong, n, cols in (
        (data[:-1], 2, 4),
        (data + b"x", 2, 4),
        (data, 3, 4),
        (data, 2, 0),
        (data, -1, 4),
        (data, 2**60, 2**60),
    ):
        with pytest.raises(FrameError):
            native.decode(dtype, wrong, n, cols)
    assert native.decode(dtype, b"", 0, 4).shape == (0, 4)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 0.0])
def test_decode_refuses_f16_scales_no_encoder_writes(scale: float) -> None:
    data = native.encode(WireType.F16, rows(1))
    data[:4] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    with pytest.raises(FrameError, match="no encoder writes"):
        native.decode(WireType.F16, data, 2, 4)


# A Q8 row of 40: columns of 8 values kept apart, these values, the row's scale, 3 blocks' distances from it, 40 quants.
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, np.uint16(40)),  # a column past the row
        (14, np.uint16(65535)),
        (2, np.uint16(0)),  # columns that do not ascend
        (16, np.float32(math.inf)),
        (48, np.uint16(248 * 16 + 1)),  # scales that are too large, too small, or 0 with something below it
        (48, np.uint16(65535)),
        (48, np.uint16(19 * 16 - 1)),
        (48, np.uint16(0)),
    ],
)
def test_decode_refuses_q8_bytes_no_encoder_writes(at: int, value: np.generic) -> None:
    x = np.arange(40, 0, -1, dtype=np.float32).reshape(1, 40)
    data = native.encode(WireType.Q8, x)
    assert data.nbytes == 8 * 2 + 8 * 4 + 2 + 3 + 40
    native.decode(WireType.Q8, data, 1, 40)
    data[at : at + value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
    with pytest.raises(FrameError, match="no encoder writes"):
        native.decode(WireType.Q8, data, 1, 40)


@given(st.binary(min_size=93, max_size=93))
def test_decode_of_any_q8_bytes_gives_numbers_or_a_refusal(data: bytes) -> None:
    # High bytes of the columns made small, so that some of them pass.
    columns = np.sort(np.frombuffer(data[:16], np.uint16) % 48)
    try:
        back = native.decode(WireType.Q8, columns.tobytes() + data[16:], 1, 40)
    except FrameError:
        return
    assert back.shape == (1, 40) and not np.isinf(back).any()


@given(st.binary(max_size=300), st.integers(0, 300))
def test_crc32c_chains_and_matches_the_table(data: bytes, cut: int) -> None:
    crc = native.crc32c(data)
    assert native.crc32c(data[cut:], native.crc32c(data[:cut])) == crc
    assert native.crc32c(memoryview(b"x" + data)[1:]) == crc
    table = native.library().ds_crc32c_portable
    assert table(0, data, len(data)) & 0xFFFFFFFF == crc


def test_crc32c_is_castagnoli() -> None:
    assert native.crc32c(b"123456789") == 0xE3069283


# ---- rows and logits


def test_embed_rows_scales_f32_rows() -> None:
    table = rows(0, 5)
    ids, out = np.array([4, 0, 4], np.int32), np.empty((3, 4), np.float32)
    at: dict[str, Any] = {"to_float": 0, "base": table.ctypes.data, "n_rows": 5, "row_bytes": 16}
    native.embed_rows(**at, ids=ids, scale=2.5, out=out)
    np.testing.assert_array_equal(out, table[ids] * np.float32(2.5))
    for bad in (5, -1):
        with pytest.raises(StageError, match="vocabulary of 5"):
            native.embed_rows(**at, ids=np.array([0, bad], np.int32), scale=1.0, out=out[:2])


@given(hnp.arrays(np.float32, st.integers(1, 90), elements=st.sampled_from([0, 1, 2, -5, -math.inf, math.nan])))
def test_argmax_is_greedy(x: NDArray[np.float32]) -> None:
    best = 0
    for i, value in enumerate(x.tolist()):  # llama_sampler_greedy_apply
        best = i if value > x[best] else best
    assert native.argmax(x.ctypes.data, x.size) == best


@given(
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.integers(-30, 30).map(lambda n: n / 2)), st.integers(0, 20)
)
def test_top_logprobs_is_a_log_softmax(x: NDArray[np.float32], k: int) -> None:
    wide = x.astype(np.float64)
    want = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    order = sorted(range(x.size), key=lambda i: (-wide[i], i))[:k]
    own, top = native.top_logprobs(x.ctypes.data, x.size, x.size - 1, k)
    assert own == pytest.approx(want[-1], abs=1e-5)
    assert [token for token, _ in top] == order
    assert [logprob for _, logprob in top] == pytest.approx([want[i] for i in order], abs=1e-5)


def test_top_logprobs_of_a_broken_model() -> None:
    for value in (math.inf, math.nan, -math.inf):
        x = np.full(5, value, np.float32)
        with pytest.raises(StageError, match="not finite"):
            native.top_logprobs(x.ctypes.data, 5, 0, 3)


def test_memory_bandwidth_is_a_plausible_number() -> None:
    speed = native.memory_bandwidth_gb_s(threads=2, size_bytes=4 << 20, seconds=0.005)
    assert 0.01 < speed < 100_000


# ---- finding the library


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DWARFSTAR_NATIVE", str(tmp_path / "none.so"))
    with pytest.raises(DwarfStarError, match=r"none\.so: install") as error:
        native.load(native.find())
    assert error.value.code == "native_library_missing"


def test_a_library_beside_the_package_or_in_site_packages_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DWARFSTAR_NATIVE", raising=False)
    monkeypatch.setattr("dwarfstar_engine.__path__", [str(tmp_path / "source"), str(tmp_path / "installed")])
    (tmp_path / "installed").mkdir()
    copy = shutil.copy(native.library()._name, tmp_path / "installed" / native.FILE_NAME)
    assert native.find() == Path(copy)


def test_another_file_or_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    junk = tmp_path / "junk.so"
    junk.write_bytes(b"not a library")
    with pytest.raises(DwarfStarError, match="not a usable") as error:
        native.load(junk)
    assert error.value.code == "native_library_invalid"
    built = Path(native.library()._name)
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    with pytest.raises(DwarfStarError, match="needs 99") as error:
        native.load(built)
    assert error.value.code == "native_library_mismatch"
