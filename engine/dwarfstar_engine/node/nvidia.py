"""NVIDIA GPUs, through NVIDIA's own library: the one place that imports it. It is an extra and may be missing."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

MAX_GPUS = 64  # of one machine


@dataclass(frozen=True, slots=True)
class Gpus:
    """All GPUs of this machine together. temperature_c: of the hottest one. bandwidth_gb_s: of memory, at which they
    read their layers one after another, 1e9 bytes. None: not known."""

    name: str
    total_bytes: int
    free_bytes: int
    temperature_c: float | None
    power_w: float | None
    bandwidth_gb_s: float | None = None


class Nvidia:
    """The library, opened once and kept open, as opening it takes long. All calls block: a driver may be slow."""

    def __init__(self) -> None:
        self._library: ModuleType | None = None
        self._handles: list[Any] = []
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return
        with contextlib.suppress(library.NVMLError):  # no driver, or no GPU
            library.nvmlInit()
            count = min(int(library.nvmlDeviceGetCount()), MAX_GPUS)
            self._handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            self._library = library

    def read(self) -> Gpus | None:
        """As they are now; None if there is none, or they do not answer."""
        library, handles = self._library, self._handles
        if library is None or not handles:
            return None
        try:
            name = str(library.nvmlDeviceGetName(handles[0]))
            memory = [library.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        except library.NVMLError:
            return None
        degrees = [self._ask("nvmlDeviceGetTemperature", handle, library.NVML_TEMPERATURE_GPU) for handle in handles]
        milliwatts = [self._ask("nvmlDeviceGetPowerUsage", handle) for handle in handles]
        known_c, known_mw = [c for c in degrees if c is not None], [mw for mw in milliwatts if mw is not None]
        return Gpus(
            name,
            sum(int(one.total) for one in memory),
            sum(int(one.free) for one in memory),
            max(known_c) if known_c else None,
            sum(known_mw) / 1000 if known_mw else None,
            self._bandwidth_gb_s([int(one.total) for one in memory]),
        )

    def _bandwidth_gb_s(self, sizes: list[int]) -> float | None:
        """By the memory's highest clock, MHz, and the bus's width, bits: two transfers a clock. Of several GPUs the
        harmonic mean, by size."""
        assert self._library is not None
        took = 0.0
        for handle, size in zip(self._handles, sizes, strict=True):
            mhz = self._ask("nvmlDeviceGetMaxClockInfo", handle, self._library.NVML_CLOCK_MEM)
            bits = self._ask("nvmlDeviceGetMemoryBusWidth", handle)
            if not mhz or not bits:
                return None
            took += size / (2 * mhz * bits / 8 / 1000)
        return sum(sizes) / took if took else None

    def _ask(self, call: str, *arguments: Any) -> float | None:
        """A figure that not every GPU has."""
        assert self._library is not None
        try:
            return float(getattr(self._library, call)(*arguments))
        except self._library.NVMLError:
            return None
