"""The two type systems of a GGUF file: metadata value types, and tensor types with their block layouts.

A tensor row of n elements of a type takes ``n / block_size * block_bytes`` bytes, and n is a multiple of
``block_size``. The table is that of ``ggml.h`` in the pinned llama-cpp-python release; ids it has withdrawn
(4, 5, 31–33, 36–38) are absent, as they are unreadable there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from dwarfstar_engine.errors import UnsupportedModelError


class ValueType(IntEnum):
    """Metadata value types, with GGUF's numbers."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct formats of the fixed-size values; all little endian. A bool is one byte, any value but 0 is true.
VALUE_FORMATS: dict[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}

INTEGER_TYPES = frozenset(
    {
        ValueType.UINT8,
        ValueType.INT8,
        ValueType.UINT16,
        ValueType.INT16,
        ValueType.UINT32,
        ValueType.INT32,
        ValueType.UINT64,
        ValueType.INT64,
    }
)
FLOAT_TYPES = frozenset({ValueType.FLOAT32, ValueType.FLOAT64})


@dataclass(frozen=True, slots=True)
class TensorType:
    """One ggml tensor type: ``block_size`` elements are stored in ``block_bytes`` bytes."""

    id: int
    name: str
    block_size: int
    block_bytes: int

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of ``n`` elements. ``n`` must be a multiple of the block size."""
        assert n % self.block_size == 0, f"{n} elements are not whole blocks of {self.name}"
        return n // self.block_size * self.block_bytes


F32, F16 = 0, 1

TENSOR_TYPES: dict[int, TensorType] = {
    row[0]: TensorType(*row)
    for row in (
        (0, "f32", 1, 4),
        (1, "f16", 1, 2),
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (9, "q8_1", 32, 36),
        (10, "q2_K", 256, 84),
        (11, "q3_K", 256, 110),
        (12, "q4_K", 256, 144),
        (13, "q5_K", 256, 176),
        (14, "q6_K", 256, 210),
        (15, "q8_K", 256, 292),
        (16, "iq2_xxs", 256, 66),
        (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98),
        (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18),
        (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82),
        (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1),
        (25, "i16", 1, 2),
        (26, "i32", 1, 4),
        (27, "i64", 1, 8),
        (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56),
        (30, "bf16", 1, 2),
        (34, "tq1_0", 256, 54),
        (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17),
        (40, "nvfp4", 64, 36),
        (41, "q1_0", 128, 18),
        (42, "q2_0", 64, 18),
    )
}

# For tensors llama.cpp insists on and never computes with: CPU get_rows supports each, so any back end can load
# them. Fewest bits per element first; f16 fits any row length.
PLACEHOLDER_TYPES: tuple[TensorType, ...] = tuple(TENSOR_TYPES[i] for i in (41, 34, 42, 2, F16))


def tensor_type(type_id: int) -> TensorType:
    """The type with ggml's number ``type_id``. Raises UnsupportedModelError if this llama.cpp has no such type."""
    found = TENSOR_TYPES.get(type_id)
    if found is None:
        raise UnsupportedModelError(
            f"tensor type {type_id} is unknown to this version of llama.cpp: use another quantisation of the model"
        )
    return found


# What llama.cpp calls the mixture of types in a file (llama_ftype, general.file_type).
FILE_TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
