"""The live figures of a machine: what is known is told, what is not is left out, and nothing a sensor does harms."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from dwarfstar_engine.node import vitals as vitals_module
from dwarfstar_engine.node.nvidia import Gpus, Nvidia
from dwarfstar_engine.node.vitals import Sensed, Vitals, processor_c, reported
from dwarfstar_engine.stage.worker import Counted
from dwarfstar_engine.wire.generated import control_pb2 as pb


class NVMLError(Exception):
    pass


@dataclass
class Library:
    """NVIDIA's, played. lacks: calls that the GPUs do not have."""

    lacks: set[str] = field(default_factory=set)
    NVMLError: type[Exception] = NVMLError
    NVML_TEMPERATURE_GPU: int = 0
    NVML_CLOCK_MEM: int = 2

    def _answer(self, call: str, answer: Any) -> Any:
        if call in self.lacks:
            raise NVMLError(call)
        return answer

    def nvmlInit(self) -> None:
        self._answer("init", None)

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "a GPU"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return self._answer("memory", SimpleNamespace(total=100, free=60 + handle))

    def nvmlDeviceGetTemperature(self, handle: int, what: int) -> int:
        return int(self._answer("temperature", 50 + handle))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return int(self._answer("power", 1500))

    def nvmlDeviceGetMaxClockInfo(self, handle: int, what: int) -> int:
        assert what == self.NVML_CLOCK_MEM
        return int(self._answer("clock", (9751, 7501)[handle]))

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:
        return int(self._answer("bus", (384, 192)[handle]))


def with_library(patch: pytest.MonkeyPatch, *lacks: str) -> Gpus | None:
    patch.setitem(sys.modules, "pynvml", Library(set(lacks)))
    return Nvidia().read()


def test_gpus_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_library(monkeypatch)
    # An RTX 3090 reads at 936 GB/s and a 3060 at 360, one after the other.
    assert found is not None and found.bandwidth_gb_s == pytest.approx(2 / (1 / 936.1 + 1 / 360.0), rel=1e-3)
    assert replace(found, bandwidth_gb_s=None) == Gpus("a GPU", 200, 121, 51.0, 3.0)
    assert with_library(monkeypatch, "temperature", "power", "bus") == Gpus("a GPU", 200, 121, None, None)


def test_no_library_no_driver_and_no_answer_are_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_library(monkeypatch, "init") is None
    assert with_library(monkeypatch, "memory") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert Nvidia().read() is None


@pytest.mark.parametrize(
    ("sensors", "hottest"),
    [
        ({}, None),
        ({"coretemp": [41.0, 55.5], "nvme": [80.0]}, 55.5),
        ({"k10temp": [0.0, 255.0, 38.0]}, 38.0),
        ({"acpitz": [27.8], "nvme": [70.0]}, 27.8),
        ({"nvme": [70.0]}, None),
    ],
)
def test_the_hottest_sound_sensor_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, sensors: Mapping[str, list[float]], hottest: float | None
) -> None:
    found = {name: [SimpleNamespace(current=degrees) for degrees in all_of] for name, all_of in sensors.items()}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    assert processor_c() == hottest


def test_sensors_that_fail_or_are_not_there_are_no_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise OSError("a sensor")

    monkeypatch.setattr(psutil, "sensors_temperatures", fail, raising=False)
    assert processor_c() is None
    monkeypatch.delattr(psutil, "sensors_temperatures")
    assert processor_c() is None


def test_a_heartbeat_has_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals_module, "memory", lambda: (1000, 300))
    beat = Vitals("cpu").heartbeat(3, [pb.StageReport(epoch=5)])
    assert (beat.number, beat.memory_used_bytes, beat.memory_free_bytes, beat.stages[0].epoch) == (3, 700, 300, 5)
    assert not beat.HasField("temperature_c") and not beat.HasField("power_w")
    lending = Vitals("cuda")
    monkeypatch.setattr(lending, "_sensed", Sensed(gpus=Gpus("a GPU", 200, 120, 51.0, None)))
    beat = lending.heartbeat(4, [])
    assert (beat.memory_used_bytes, beat.memory_free_bytes, beat.temperature_c) == (80, 120, 51.0)
    assert not beat.HasField("power_w")


async def test_sensors_are_read_beside_the_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals_module, "processor_c", lambda: 44.0)
    vitals = Vitals("cpu")
    assert not vitals.heartbeat(1, []).HasField("temperature_c")
    monkeypatch.setattr(asyncio, "sleep", _end)
    with pytest.raises(_Over):
        await vitals.watch()
    assert vitals.heartbeat(2, []).temperature_c == 44.0


class _Over(Exception):
    pass


async def _end(_: float) -> None:
    raise _Over


def test_a_stage_tells_the_means_of_its_last_second() -> None:
    before, after = Counted(rows=10, frames=5, compute_s=1.0, wait_s=0.5), Counted()
    after.add(10, 1.0, 0.5)
    after.add(4, 0.02, 0.01)
    assert Counted().until(Counted(), 1.0) == {"rows_s": 0.0}
    told = before.until(Counted(14, 7, 1.02, 0.52), 1.0)
    assert told == {"rows_s": 4.0, "compute_ms": 5.0, "wait_ms": 10.0}
    assert (after.rows, after.frames) == (14, 2)
    report = pb.StageReport(**reported({**told, "busy": 0.5, "rss": 99}))
    assert (report.rows_s, report.compute_ms, report.wait_ms, report.busy, report.rss_bytes) == (4, 5, 10, 0.5, 99)
    assert pb.StageReport(**reported({})) == pb.StageReport()
