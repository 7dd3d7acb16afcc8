"""One GGUF file's directory: header, key-value pairs and tensor descriptions, bounds-checked.

Theory. The directory is read into memory once, in growing chunks, and kept: scalars are decoded at once, arrays stay
where they are and are decoded when asked for, so a vocabulary of 260 000 strings costs one walk over their lengths.

Invariants. Nothing read from a file is believed: every count, length, dimension, type and range is checked against a
named limit and against the real file size before memory is taken for it. Whatever the bytes are, the result is a
:class:`Directory` or a :class:`~dwarfstar_engine.errors.ModelFileError` that names file, offset and field. Memory taken
is a small multiple of the directory, and never grows with what a file merely claims.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol, overload

from dwarfstar_engine.errors import ModelFileError
from dwarfstar_engine.model.ggml_types import TENSOR_TYPES, VALUE_FORMATS, ValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had 32-bit lengths; llama.cpp dropped it too
CHUNK_BYTES = 1 << 20  # first read: holds the directory of most models without their vocabulary
MAX_DIRECTORY_BYTES = 256 << 20  # ten times the largest vocabularies known
MAX_STRING_BYTES = 16 << 20  # the longest strings are chat templates, some 100 kB
MAX_KEY_BYTES = 65535  # the GGUF specification's bound
MAX_METADATA_KEYS = 1 << 14  # real files have fewer than 100; each costs an object
MAX_TENSORS = 1 << 16  # real files have fewer than 3 000; each costs an object
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME, less the closing zero
MAX_ALIGNMENT = 1 << 16  # the largest page size in use
DEFAULT_ALIGNMENT = 32
MAX_SHOWN = 80  # characters of a key or tensor name in an error
ALIGNMENT_KEY = "general.alignment"
MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dimensions, one dimension, type, offset

Scalar = int | float | bool | str

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {kind: struct.Struct("<" + form) for kind, form in VALUE_FORMATS.items()}


class MetaArray(Sequence[Scalar]):
    """An array in the metadata, decoded on access. Strings that are not UTF-8 decode with surrogate escapes."""

    __slots__ = ("_count", "_data", "_offsets", "_start", "element_type")

    def __init__(self, data: bytes, start: int, element_type: ValueType, count: int) -> None:
        self._data, self._start = data, start
        self.element_type, self._count = element_type, count
        self._offsets: array[int] | None = None  # of strings' lengths

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Scalar: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Scalar]: ...
    def __getitem__(self, index: int | slice) -> Scalar | Sequence[Scalar]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        if self.element_type is ValueType.STRING:
            return self.raw(index).decode("utf-8", "surrogateescape")
        form = VALUE_FORMATS[self.element_type]
        value: Scalar = struct.unpack_from("<" + form, self._data, self._start + index * struct.calcsize("<" + form))[0]
        return value

    def __iter__(self) -> Iterator[Scalar]:
        return (self[i] for i in range(self._count))

    def raw(self, index: int) -> bytes:
        """The bytes of one string."""
        if self._offsets is None:
            self._offsets, at = array("Q"), self._start
            for _ in range(self._count):
                self._offsets.append(at)
                at += 8 + int.from_bytes(self._data[at : at + 8], "little")
        at = self._offsets[index]
        return self._data[at + 8 : at + 8 + int.from_bytes(self._data[at : at + 8], "little")]


MetaValue = Scalar | MetaArray


@dataclass(frozen=True, slots=True)
class MetaEntry:
    """One key-value pair. ``offset`` and ``end`` bound its bytes in the first file, key included."""

    key: str
    type: ValueType
    value: MetaValue
    offset: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. shape: elements per dimension, innermost first (ggml order). offset: bytes from its file's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    path: str
    offset: int
    nbytes: int


class Readable(Protocol):
    """What a directory is read from, front to back: a file, or one that is somewhere else."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Directory:
    """One file's directory. ``data`` holds its bytes, up to the padding before the data section."""

    path: str
    entries: Mapping[str, MetaEntry]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    data: bytes


def read_directory(path: str, what: str = "the GGUF file") -> Directory:
    """Read one file's directory. ``what`` names the file's part in an error. Raises ModelFileError."""
    try:
        # Opening a pipe would block, and reading a device may never end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ModelFileError(path, 0, "file", "is not a regular file: give the path of a GGUF file")
        file = Path(path).open("rb")  # noqa: SIM115 - closed below
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ModelFileError(path, 0, "file", f"cannot open {what}: {_reason(error)}") from error
    with file:
        return _Reader(file, path, os.fstat(file.fileno()).st_size).directory()


def read_directory_of(file: Readable, name: str, size: int) -> Directory:
    """Read the directory of a file of ``size`` bytes that is not on this disk. Raises ModelFileError."""
    return _Reader(file, name, size).directory()


def shown(text: str) -> str:
    """A name from a file as it may be printed: short, and without what would steer a terminal."""
    short = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
    return short if short.isprintable() else ascii(short)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


class _ArrayAt(NamedTuple):
    """Where an array lies, until the directory is complete."""

    start: int
    element_type: ValueType
    length: int


class _TensorAt(NamedTuple):
    """A tensor's description as it stands in the file, at ``start``; ``offset`` counts from the data section."""

    start: int
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Reader:
    """A cursor over a growing prefix of the file. ``_at`` is the next byte; a method's field names what it reads."""

    def __init__(self, file: Readable, path: str, size: int) -> None:
        self._file, self._path, self._size = file, path, size
        self._data = bytearray()
        self._at = 0

    def directory(self) -> Directory:
        if self._take(4, "magic") != MAGIC:
            self._fail("magic", "this is not a GGUF file: give a .gguf file", 0)
        version = self._u32("version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            hint = "is big-endian" if swapped else f"has version {version}"
            self._fail("version", f"the GGUF file {hint}; convert it to little-endian version 3", 4)
        n_tensors = self._count("tensor_count", MIN_TENSOR_BYTES, MAX_TENSORS)
        n_pairs = self._count("metadata_kv_count", MIN_PAIR_BYTES, MAX_METADATA_KEYS)
        pairs = [self._pair(i) for i in range(n_pairs)]
        records = [self._tensor(i) for i in range(n_tensors)]
        data = bytes(memoryview(self._data)[: self._at])  # without what was read ahead
        self._data = bytearray()
        entries: dict[str, MetaEntry] = {}
        for key, kind, value, start, end in pairs:
            if key in entries:
                self._fail(key, "the key is there twice", start)
            known = MetaArray(data, *value) if isinstance(value, _ArrayAt) else value
            entries[key] = MetaEntry(key, kind, known, start, end)
        alignment = self._alignment(entries)
        return Directory(self._path, entries, self._tensors(records, alignment, len(data)), alignment, data)

    def _alignment(self, entries: Mapping[str, MetaEntry]) -> int:
        entry = entries.get(ALIGNMENT_KEY)
        if entry is None:
            return DEFAULT_ALIGNMENT
        value = entry.value
        if entry.type is not ValueType.UINT32 or not isinstance(value, int):
            self._fail(ALIGNMENT_KEY, "must be a u32", entry.offset)
        if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            self._fail(ALIGNMENT_KEY, f"is {value}, not a power of two up to {MAX_ALIGNMENT}", entry.offset)
        return value

    def _pair(self, index: int) -> tuple[str, ValueType, Scalar | _ArrayAt, int, int]:
        start, field = self._at, f"metadata key {index}"
        raw = self._string(field, MAX_KEY_BYTES)
        try:
            key = raw.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(field, "the key is not UTF-8", start)
        if not key:
            self._fail(field, "the key is empty", start)
        kind = self._value_type(key)
        value: Scalar | _ArrayAt
        if kind is ValueType.ARRAY:
            value = self._array(key)
        elif kind is ValueType.STRING:
            value = self._string(key, MAX_STRING_BYTES).decode("utf-8", "replace")
        else:
            form = _SCALARS[kind]
            value = form.unpack(self._take(form.size, key))[0]
        return key, kind, value, start, self._at

    def _array(self, key: str) -> _ArrayAt:
        element = self._value_type(key)
        if element is ValueType.ARRAY:
            self._fail(key, "arrays of arrays are not supported", self._at - 4)
        count = self._u64(key)
        if element is ValueType.STRING:
            self._fits(count * 8, key)  # each has a length at least
            start = self._at
            self._skip_strings(count, key)
            return _ArrayAt(start, element, count)
        size = count * _SCALARS[element].size
        self._fill(size, key)
        self._at += size
        return _ArrayAt(self._at - size, element, count)

    def _skip_strings(self, count: int, key: str) -> None:
        at, have, data, unpack = self._at, len(self._data), self._data, _U64.unpack_from
        for _ in range(count):  # the hot loop: once for each token and merge of the vocabulary
            if at + 8 > have:
                self._at = at
                self._fill(8, key)
                have = len(data)
            length: int = unpack(data, at)[0]
            at += 8 + length
            if length > MAX_STRING_BYTES or at > have:
                self._at = at - length
                self._check_length(length, MAX_STRING_BYTES, key)
                self._fill(length, key)
                have = len(data)
        self._at = at

    def _tensor(self, index: int) -> _TensorAt:
        start, field = self._at, f"tensor {index}"
        try:
            name = self._string(field, MAX_TENSOR_NAME_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            self._fail(field, "the tensor's name is not UTF-8", start)
        if not name:
            self._fail(field, "the tensor has no name", start)
        n_dims = self._u32(name)
        if not 1 <= n_dims <= MAX_DIMS:
            self._fail(name, f"the tensor has {n_dims} dimensions, not 1 to {MAX_DIMS}", start)
        shape = tuple(self._u64(name) for _ in range(n_dims))
        kind = self._u32(name)
        return _TensorAt(start, name, shape, kind, self._u64(name))

    def _tensors(self, records: Sequence[_TensorAt], alignment: int, end: int) -> dict[str, TensorInfo]:
        """Check each tensor against the file. Python's integers cannot overflow, so sizes are compared as they are."""
        base = -(-end // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for record in records:
            kind = TENSOR_TYPES.get(record.type)
            if kind is None:
                self._fail(
                    record.name, f"tensor type {record.type} is unknown to this version of llama.cpp", record.start
                )
            if min(record.shape) < 1 or record.shape[0] % kind.block_size:
                self._fail(record.name, f"shape {record.shape} does not fit type {kind.name}", record.start)
            nbytes = kind.row_bytes(record.shape[0])
            for n in record.shape[1:]:
                nbytes *= n
            if record.offset % alignment:
                self._fail(record.name, f"data offset {record.offset} is not a multiple of {alignment}", record.start)
            if base + record.offset + nbytes > self._size:
                self._fail(
                    record.name,
                    f"the tensor's data ends at byte {base + record.offset + nbytes}, but the file has {self._size}: "
                    "it is truncated or damaged, download it again",
                    record.start,
                )
            if record.name in tensors:
                self._fail(record.name, "the tensor is there twice", record.start)
            tensors[record.name] = TensorInfo(
                record.name, record.shape, record.type, self._path, base + record.offset, nbytes
            )
        return tensors

    # Primitives. Each checks that what it takes is in the file.

    def _fail(self, field: str, problem: str, offset: int) -> NoReturn:
        raise ModelFileError(self._path, offset, shown(field), problem)

    def _fits(self, n: int, field: str) -> None:
        """Fail unless ``n`` more bytes are in the file and in the limit of a directory."""
        if self._at + n > self._size:
            missing = self._at + n - self._size
            self._fail(field, f"the file ends {missing} bytes too early: it is truncated or damaged", self._at)
        if self._at + n > MAX_DIRECTORY_BYTES:
            self._fail(field, f"the metadata takes more than {MAX_DIRECTORY_BYTES} bytes", self._at)

    def _fill(self, n: int, field: str) -> None:
        """Have ``n`` bytes from the cursor on in memory."""
        self._fits(n, field)
        missing = self._at + n - len(self._data)
        if missing <= 0:
            return
        # At least double, so that reading byte by byte costs linear time; never past what a directory may take, so
        # that whatever is in memory has passed that limit.
        most = min(self._size, MAX_DIRECTORY_BYTES) - len(self._data)
        want = min(max(missing, len(self._data), CHUNK_BYTES), most)
        try:
            self._data += self._file.read(want)
        except OSError as error:
            raise ModelFileError(
                self._path, self._at, shown(field), f"cannot read the file: {_reason(error)}"
            ) from error
        if len(self._data) < self._at + n:
            self._fail(field, "the file shrank while it was read", self._at)

    def _take(self, n: int, field: str) -> bytes:
        self._fill(n, field)
        self._at += n
        return bytes(self._data[self._at - n : self._at])

    def _u32(self, field: str) -> int:
        return int(_U32.unpack(self._take(4, field))[0])

    def _u64(self, field: str) -> int:
        return int(_U64.unpack(self._take(8, field))[0])

    def _check_length(self, n: int, most: int, field: str) -> None:
        if n > most:
            self._fail(field, f"a string of {n} bytes is longer than {most}", self._at - 8)

    def _string(self, field: str, most: int) -> bytes:
        n = self._u64(field)
        self._check_length(n, most, field)
        return self._take(n, field)

    def _count(self, field: str, each: int, most: int) -> int:
        n = self._u64(field)
        if n > most:
            self._fail(field, f"is {n}, more than the {most} supported", self._at - 8)
        self._fits(n * each, field)
        return n

    def _value_type(self, key: str) -> ValueType:
        n = self._u32(key)
        try:
            return ValueType(n)
        except ValueError:
            self._fail(key, f"has unknown value type {n}", self._at - 4)
