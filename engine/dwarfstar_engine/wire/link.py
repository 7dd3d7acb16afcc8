"""What a hop's link is worth, and what hidden states should travel as on it. Pure.

f32 is exact and costs 4 bytes a value. On a gigabit link or a faster one that is less time than computing the values
takes, so nothing would be won by less. Where it is not, the link would set the pace of prompts: then the first coding
that keeps up is taken, or the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

from dwarfstar_engine import native
from dwarfstar_engine.native import WireType

PROBES = (1, 1, 1, 1 << 16, 1 << 18, 1 << 18)  # bytes of the messages that are sent when a hop is opened
MAX_PROBES = 16  # that a receiver answers


@dataclass(frozen=True, slots=True)
class Link:
    """round_trip_s: of a small message. bytes_s: of large ones, one way."""

    round_trip_s: float
    bytes_s: float

    @classmethod
    def of(cls, times_s: list[float]) -> Link:
        """From the time between sending and being answered, of each of PROBES."""
        small = [time_s for size, time_s in zip(PROBES, times_s, strict=True) if size == 1]
        round_trip_s = min(small)
        rates = [size / max(time_s - round_trip_s, 1e-6) for size, time_s in zip(PROBES, times_s, strict=True)]
        return cls(round_trip_s, max(rates))


def choose_wire(link: Link, width: int, row_s: float) -> WireType:
    """The coding for rows of ``width`` values, one of which a stage computes in ``row_s``."""
    for wire in (WireType.F32, WireType.F16, WireType.Q8):
        if native.encoded_size(wire, 1, width) / link.bytes_s <= row_s:
            return wire
    return WireType.Q8
