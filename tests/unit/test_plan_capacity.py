"""Effective VRAM rises with bandwidth and is never more than what is usable; an owner's word replaces both."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.plan.capacity import (
    effective_bytes,
    multiplier,
    parse_override,
    stage_gb_s,
    usable_bytes,
)
from dwarfstar_engine.plan.cluster import Device, Kind, Node, Override
from support.clusters import GIB, gpu

SPEEDS = st.floats(1, 10_000)


@given(SPEEDS, SPEEDS)
def test_the_multiplier_rises_and_saturates(a: float, b: float) -> None:
    slow, fast = sorted((a, b))
    assert 0 < multiplier(slow) <= multiplier(fast) < 1
    if fast > slow * 1.001:
        assert multiplier(slow) < multiplier(fast)


def test_fast_memory_is_worth_more() -> None:
    assert effective_bytes(gpu("a", 24, 936)) > effective_bytes(gpu("b", 24, 448))
    assert multiplier(8000) - multiplier(4000) < multiplier(200) - multiplier(100)


def test_a_cpu_node_keeps_ram_for_its_system() -> None:
    device = Device(Kind.CPU, 64 * GIB, 42)
    assert 0.5 * 64 * GIB < usable_bytes(Node("mini", (device,))) < 0.9 * 64 * GIB
    assert usable_bytes(gpu("tower", 24, 936)) == 24 * GIB
    measured = Device(Kind.CPU, 64 * GIB, 42, usable_bytes=10 * GIB)
    assert usable_bytes(Node("mini", (measured,))) == 10 * GIB


def test_a_weight_is_never_more_than_what_is_usable() -> None:
    for speed in (10, 100, 1000, 10_000):
        node = gpu("a", 24, speed)
        assert 0 < effective_bytes(node) < usable_bytes(node)


@pytest.mark.parametrize(
    ("text", "usable"), [("18", 18.0), (" 7.5 ", 7.5), ("50%", 12.0), ("-2", 22.0), ("100%", 24.0), ("-30", 0.0)]
)
def test_an_override_is_both_what_fits_and_the_share(text: str, usable: float) -> None:
    node = Node("a", gpu("a", 24, 936).devices, override=parse_override(text))
    assert usable_bytes(node) == effective_bytes(node) == int(usable * GIB)


def test_an_override_lends_no_memory_that_is_not_there() -> None:
    assert usable_bytes(Node("a", gpu("a", 24, 936).devices, override=Override(lend_bytes=30 * GIB))) == 24 * GIB
    ram = Node("b", (Device(Kind.CPU, 64 * GIB, 42),), override=Override(lend_bytes=60 * GIB))
    assert usable_bytes(ram) == 60 * GIB  # more than is derived: the owner knows the machine


@pytest.mark.parametrize("text", ["", "x", "18 GiB", "0", "0%", "101%", "-5%", "--2", "1e9", "nan", "٣"])
def test_an_override_that_means_nothing(text: str) -> None:
    with pytest.raises(SettingsError, match=r"as in 18.*as in 50%.*as in -2"):
        parse_override(text)


def test_several_devices_read_one_after_another() -> None:
    two = Node("a", (Device(Kind.GPU, 24 * GIB, 900), Device(Kind.GPU, 24 * GIB, 300)))
    assert stage_gb_s(two) == pytest.approx(450)
    assert effective_bytes(two) == pytest.approx(24 * GIB * (multiplier(900) + multiplier(300)), rel=1e-6)
