"""Which sequences' cells are carried to the process that takes a slice, and how long that is tried. Pure.

Theory. Layers that move to another process leave their cells behind. They can be computed again, which takes a slice's
compute for each row, those of an answer one by one; or be carried, which takes the link's time for their bytes. Both
are known about: rows by what the slice was measured to take, the link by what is measured when it is opened. Where a
slice's layers come from several processes, each part has its own link and bytes, and saves the rows of the whole slice,
as it is computed again if one part is missing. What is not carried, for whatever reason, is computed again, so a wrong
estimate costs time and nothing else.

Bounds. All together are tried for no longer than computing them would take, between LEAST_S and MOST_S: so a link that
stalls costs no more than the carrying can gain. A sequence of more than ``most_bytes`` is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAST_S = 1.0  # a connection and its TLS handshake take a tenth of it, more on busy cores
MOST_S = 20.0  # streams wait meanwhile, for rescue_s at most, and may have to be replayed behind it
WAIT_SHARE = 1 / 3  # of what streams wait at most
WORTH_S = 0.1  # sequences that are computed again sooner need no connection, which takes as long
CELL_BYTES = 32  # of a position in a cache, beside its values: place, sequence, and what padding there may be
HEAD_BYTES = 64 << 10  # of a sequence, beside its cells
SLACK = 2  # times what cells should take: types and layouts of caches differ a little from what is planned with


@dataclass(frozen=True, slots=True)
class Cargo:
    """A sequence at a stage, or some layers of it. positions: from 0 on. bytes: about. replay_s: computing its rows at
    all layers of the stage again, about."""

    slot: int
    positions: int
    bytes: int
    replay_s: float

    def most_bytes(self, layers: int) -> int:
        """More are not what was asked for. layers: that it is of."""
        return SLACK * self.bytes + CELL_BYTES * layers * self.positions + HEAD_BYTES


def replay_s(prompt: int, positions: int, costs: Sequence[tuple[int, float]], step_ms: float) -> float:
    """What ``positions`` rows of a sequence take a slice, ``prompt`` of them its prompt's. costs: (rows, ms) of frames
    of a prompt; empty: not measured."""
    read = min(prompt, positions)
    row_ms = min((ms / rows for rows, ms in costs), default=0.0)
    return (read * row_ms + (positions - read) * step_ms) / 1000


def worth(size: int, bytes_s: float, round_trip_s: float, computing_s: float) -> bool:
    """Whether ``size`` bytes are carried sooner than their rows are computed again."""
    return size / bytes_s + round_trip_s < computing_s


def chosen(cargo: Iterable[Cargo], *, always: bool) -> tuple[Cargo, ...]:
    """Those of a stage for which a connection is opened, what is gained most by first: perhaps there is no time for
    all."""
    found = sorted(cargo, key=lambda one: (-one.replay_s, one.slot))
    return tuple(found) if always or sum(one.replay_s for one in found) >= WORTH_S else ()


def within_s(cargo: Iterable[Cargo], patience_s: float) -> float:
    """How long it is tried. patience_s: what streams wait at most."""
    longest = min(MOST_S, WAIT_SHARE * patience_s)
    return min(longest, max(LEAST_S, sum(one.replay_s for one in cargo)))
