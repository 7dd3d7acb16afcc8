"""What a node can hold, and what it is worth when layers are shared out: two figures, kept apart.

*Usable* bytes bound what a node is given: a GPU's memory as it is lent (buffers are counted with each stage), and of a
CPU's RAM the share that leaves its system usable.

*Effective VRAM* is a weight: usable × m(B), with m(B) = 1 / (1 + (KNEE / B)²) for a memory bandwidth B. It rises with B
everywhere and saturates at 1. Why this form: above the knee, where graphics and unified memories are, memory is what
runs short, so it alone should decide. Below it a stage's time for what it holds grows as 1/B, so a fair weight falls
with B; and slow memory is bought in proportion larger, about as 1/B again, which a weight linear in B would only
undo: hence the square. The knee is what the fastest two-channel RAM reaches. These are the only two constants.

A weight never lets a node be given more than it can hold. What an owner says (``Override``) replaces both figures.
"""

from __future__ import annotations

import re

from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.plan.cluster import Device, Kind, Node, Override

GIB = 1 << 30
KNEE_GB_S = 100.0
RAM_SHARE = 0.8  # of a CPU node's RAM; as node.facts takes of what is available
DEFAULT_GB_S = {Kind.GPU: 300.0, Kind.CPU: 40.0}  # where it is not known: a modest card, two channels of DDR4
_OVERRIDE = re.compile(r"(?P<minus>-)?(?P<number>\d+(?:\.\d+)?)(?P<percent>%)?", re.ASCII)


def bandwidth_gb_s(device: Device) -> float:
    """What is known, or what is usual for its kind."""
    return device.bandwidth_gb_s or DEFAULT_GB_S[device.kind]


def multiplier(gb_s: float) -> float:
    """m(B) of the module's theory: between 0 and 1, rising with bandwidth."""
    return 1 / (1 + (KNEE_GB_S / gb_s) ** 2)


def device_usable_bytes(device: Device) -> int:
    if device.usable_bytes:
        return device.usable_bytes
    return int(device.memory_bytes * (RAM_SHARE if device.kind is Kind.CPU else 1.0))


def usable_bytes(node: Node) -> int:
    """What stages on a node may take in all, its owner's override applied."""
    derived = sum(device_usable_bytes(device) for device in node.devices)
    return derived if node.override is None else overridden(node.override, derived, _built_in(node))


def effective_bytes(node: Node) -> int:
    """A node's weight when layers are shared out, its owner's override applied."""
    if node.override is not None:
        return usable_bytes(node)
    return int(sum(device_usable_bytes(device) * multiplier(bandwidth_gb_s(device)) for device in node.devices))


def stage_gb_s(node: Node) -> float:
    """Bandwidth at which a stage on all of a node's devices reads: one after another, each its part of the layers."""
    sizes = [max(1, device_usable_bytes(device)) for device in node.devices]
    took = sum(size / bandwidth_gb_s(device) for size, device in zip(sizes, node.devices, strict=True))
    return sum(sizes) / took


def _built_in(node: Node) -> int:
    return sum(max(device.memory_bytes, device.usable_bytes) for device in node.devices)


def overridden(override: Override, derived: int, built_in: int) -> int:
    """Bytes that an override comes to, where ``derived`` would be lent of those built in."""
    if override.lend_bytes:
        return min(override.lend_bytes, built_in)
    if override.share:
        return int(derived * override.share)
    return max(0, derived - override.reserve_bytes)


def parse_override(text: str) -> Override:
    """``18`` (GiB), ``50%`` (of what is usable) or ``-2`` (GiB to keep back). Raises SettingsError."""
    match = _OVERRIDE.fullmatch(text.strip())
    number = float(match["number"]) if match else 0.0
    if match and match["minus"] and not match["percent"]:
        return Override(reserve_bytes=int(number * GIB))
    if match and not match["minus"] and 0 < number <= (100 if match["percent"] else 1 << 20):
        return Override(share=number / 100) if match["percent"] else Override(lend_bytes=int(number * GIB))
    raise SettingsError(
        f"effective VRAM is GiB, as in 18, a share of what is usable, as in 50%, or GiB to keep back, as in -2 "
        f"(given: {text!r})"
    )
