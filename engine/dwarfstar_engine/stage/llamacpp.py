"""The one place where llama.cpp is imported, with what every user of it needs: symbols, logging, GPU facts.

Importing this module loads llama.cpp into the process. GGML asserts abort a process, so only stage and
vocabulary processes (and tests) may import it; an import contract keeps that so.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from typing import Any

import llama_cpp.llama_cpp as llama
from llama_cpp._ggml import libggml

__all__ = ["TypeTraits", "address", "gpu_offload", "init", "libggml", "llama", "log_tail", "to_float_address"]

log = logging.getLogger("dwarfstar.llama")

LOG_TAIL_LINES = 8  # enough to explain a failed load, short enough for one message

_tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
_GGML_LOG_WARN, _GGML_LOG_ERROR = 3, 4


def _on_log(level: int, text: bytes, _user: Any) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if not line or line == ".":
        return
    if level == _GGML_LOG_ERROR:
        _tail.append(line)
        log.error("%s", line)
    elif level == _GGML_LOG_WARN:
        log.debug("%s", line)


# Kept alive for the life of the process: llama.cpp holds the pointer.
_log_callback = llama.llama_log_callback(_on_log)
_initialised = False


def init() -> None:
    """Prepare llama.cpp: its log goes to Python's logging, errors only. Idempotent."""
    global _initialised
    if not _initialised:
        llama.llama_log_set(_log_callback, ctypes.c_void_p(0))
        llama.llama_backend_init()
        _initialised = True


def log_tail() -> str:
    """The last error lines llama.cpp logged, joined; empty if none. Clears them."""
    text = "; ".join(_tail)
    _tail.clear()
    return text


def gpu_offload() -> bool:
    """Whether this build of llama.cpp can run layers on a GPU."""
    return bool(llama.llama_supports_gpu_offload())


def address(name: str) -> int:
    """The address of an exported ggml function, to be handed to the native library."""
    value = ctypes.cast(getattr(libggml, name), ctypes.c_void_p).value
    assert value, name
    return value


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h; only ``to_float`` is used."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


def to_float_address(ggml_type: int) -> int:
    """The address of the dequantiser (``ggml_to_float_t``) of a tensor type; 0 for f32, which needs none."""
    get = libggml.ggml_get_type_traits
    get.restype = ctypes.POINTER(TypeTraits)
    get.argtypes = [ctypes.c_int]
    return int(get(ggml_type).contents.to_float or 0)
