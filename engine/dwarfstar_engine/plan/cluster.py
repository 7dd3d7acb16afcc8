"""What the planner knows of a cluster: nodes, their devices, what was measured of them, and links. Data, no decisions.

Units are last in each name. ``usable_bytes`` is what a stage may really take and bounds every plan; a node's *share* is
a weight and is derived in :mod:`dwarfstar_engine.plan.capacity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Device:
    """memory_bytes: as built in. usable_bytes: what it lends; 0: derived from memory_bytes.

    bandwidth_gb_s: of its memory, 1e9 bytes; 0: not known.
    """

    kind: Kind
    memory_bytes: int
    bandwidth_gb_s: float = 0.0
    usable_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Override:
    """What its owner says a node lends, instead of what is derived: one of bytes, a share of usable, a reserve."""

    lend_bytes: int = 0
    share: float = 0.0
    reserve_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What a slice took on a node, in ms. It needs not be a slice of the plan: rates are derived from it.

    step_ms: one generated token. prompt: (rows, ms) of prompt chunks. batches: (sequences, ms) of steps run together;
    of a stage's profile its rows together, where it runs them so.
    last: the slice had the head. head_ms: what of step_ms that took; 0: not told apart.
    """

    layers: tuple[int, int]
    step_ms: float
    last: bool = False
    batches: tuple[tuple[int, float], ...] = ()
    prompt: tuple[tuple[int, float], ...] = ()
    head_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. Several devices are one stage together, or a stage each: the planner tries both.

    host: the machine it is a part of; nodes of one host need no network between them. Empty: it is its own.
    cores: of that machine, which all its nodes share; 0: not known, as many as they want. threads: that a stage has
    on processors. ran: what a slice takes there in use: where ``measured`` says otherwise, the pace has changed.
    """

    name: str
    devices: tuple[Device, ...]
    override: Override | None = None
    measured: tuple[Measured, ...] = ()
    host: str = ""
    cores: int = 0
    threads: int = 1
    ran: Measured | None = None

    @property
    def machine(self) -> str:
        return self.host or self.name


@dataclass(frozen=True, slots=True)
class Link:
    """gbit_s: 1e9 bits a second. latency_ms: one way."""

    gbit_s: float = 1.0
    latency_ms: float = 0.3


LOOPBACK = Link(gbit_s=40.0, latency_ms=0.05)  # between processes of one machine


@dataclass(frozen=True, slots=True)
class Cluster:
    """pairs: links that differ from ``link``; (a, b) also stands for (b, a). head: the machine that the coordinator
    shares with nodes, if it does."""

    nodes: tuple[Node, ...]
    link: Link = Link()
    pairs: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    head: str = ""

    def between(self, a: Node, b: Node) -> Link:
        if a.machine == b.machine:
            return LOOPBACK
        for pair in ((a.machine, b.machine), (b.machine, a.machine)):
            if pair in self.pairs:
                return self.pairs[pair]
        return self.link
