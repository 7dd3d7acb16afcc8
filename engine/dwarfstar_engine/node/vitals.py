"""The live figures of a machine that its heartbeats carry: memory, load, temperature, power.

A heartbeat must not be late because a sensor is slow, so sensors are read in a thread, each SENSE_S, and a heartbeat
takes what was read last. What cannot be known is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from dwarfstar_engine.node.facts import memory
from dwarfstar_engine.node.nvidia import Gpus, Nvidia
from dwarfstar_engine.wire.generated import control_pb2 as pb

SENSE_S = 5.0  # between two readings of sensors: each is a file of the kernel or a call of the driver
HOTTEST_C = 150.0  # sensors that are not connected show more, or 0 and less


@dataclass(frozen=True, slots=True)
class Sensed:
    """None: not known. gpus: only where they are what is lent."""

    temperature_c: float | None = None
    gpus: Gpus | None = None


class Vitals:
    """See the module. kind: of the device that is lent; of a GPU, its own memory and sensors count."""

    def __init__(self, kind: str) -> None:
        self._on_gpu = kind == "cuda"
        self._nvidia: Nvidia | None = None
        self._sensed = Sensed()

    async def watch(self) -> None:
        """Read the sensors until cancelled."""
        while True:
            self._sensed = await asyncio.to_thread(self._sense)
            await asyncio.sleep(SENSE_S)

    def heartbeat(self, number: int, stages: Iterable[pb.StageReport]) -> pb.Heartbeat:
        """What to tell now. number: counts up."""
        gpus, temperature_c, power_w = self._sensed.gpus, self._sensed.temperature_c, None
        total, free = memory()
        if gpus is not None:
            total, free = gpus.total_bytes, gpus.free_bytes
            temperature_c, power_w = gpus.temperature_c, gpus.power_w
        return pb.Heartbeat(
            number=number,
            memory_used_bytes=max(0, total - free),
            memory_free_bytes=free,
            load=psutil.cpu_percent() / 100,
            temperature_c=temperature_c,
            power_w=power_w,
            stages=stages,
        )

    def _sense(self) -> Sensed:
        if not self._on_gpu:
            return Sensed(processor_c())
        if self._nvidia is None:
            self._nvidia = Nvidia()
        return Sensed(gpus=self._nvidia.read())


def processor_c() -> float | None:
    """Temperature of the hottest part of the processor, if this machine tells it."""
    read = getattr(psutil, "sensors_temperatures", None)  # not on every system
    try:
        sensors = read() if read is not None else {}
    except (OSError, ValueError, RuntimeError):  # a sensor that answers nonsense
        return None
    of_processor = [one for name in ("coretemp", "k10temp", "zenpower", "cpu_thermal") for one in sensors.get(name, ())]
    shown = of_processor or [
        one for name, found in sensors.items() if "cpu" in name or name == "acpitz" for one in found
    ]
    sound = [float(one.current) for one in shown if 0 < one.current < HOTTEST_C]
    return max(sound, default=None)


def reported(stats: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's own figures as fields of a StageReport."""
    return {
        "busy": stats.get("busy", 0.0),
        "rss_bytes": stats.get("rss", 0),
        "compute_ms": stats.get("compute_ms", 0.0),
        "wait_ms": stats.get("wait_ms", 0.0),
        "rows_s": stats.get("rows_s", 0.0),
    }


def read_bytes(pid: int) -> int:
    """What a process of ours has had read from disks: what the page cache gave it is not counted. 0: not known."""
    try:
        return int(psutil.Process(pid).io_counters().read_bytes)
    except (psutil.Error, AttributeError, OSError):  # it is gone; macOS does not tell
        return 0
