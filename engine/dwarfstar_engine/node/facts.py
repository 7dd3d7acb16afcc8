"""What a machine can lend: its device, its memory, and the effective VRAM derived from them."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 1 << 30
RAM_SHARE = 0.8  # of the RAM available at start: the rest keeps the system usable
VRAM_SHARE = 0.92  # of free VRAM: the driver and the desktop take some later


@dataclass(frozen=True, slots=True)
class Facts:
    """kind: "cpu" or "cuda". usable_bytes: what would be lent. override_bytes: what its owner set instead, or 0."""

    kind: str
    device: str
    memory_bytes: int
    usable_bytes: int
    override_bytes: int


def _gpu() -> tuple[str, int, int] | None:
    """(name, total, free bytes) of the NVIDIA GPUs together, if llama.cpp was built for them; else None."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not any(any((Path(folder) / "lib").glob("*ggml-cuda*")) for folder in folders):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        if not handles:
            return None
        name = pynvml.nvmlDeviceGetName(handles[0])
        return str(name), sum(int(m.total) for m in memory), sum(int(m.free) for m in memory)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def measure(override_gib: float | None) -> Facts:
    """Look at this machine. ``override_gib`` replaces the derived effective VRAM."""
    gpu = _gpu()
    if gpu is not None:
        device, total, free = gpu
        kind, usable = "cuda", int(free * VRAM_SHARE)
    else:
        memory = psutil.virtual_memory()
        kind, device, total = "cpu", platform.processor() or platform.machine(), memory.total
        usable = int(memory.available * RAM_SHARE)
    return Facts(kind, device, total, usable, int((override_gib or 0) * GIB))


def used_bytes() -> int:
    """Memory in use on this machine now."""
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def cores() -> list[int]:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def default_threads(sharing: int) -> int:
    """Threads of a stage when ``sharing`` nodes run on this machine: physical cores, shared out."""
    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(physical, len(cores())) // max(1, sharing))
