"""The plan as it is kept in the cluster's state, so that another leader asks each node for the slice it has. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from dwarfstar_engine.plan.proportional import Plan


@dataclass(frozen=True, slots=True)
class KeptPlan:
    """nodes: ids, in the order of the ring. cuts: between them. awaited: those of them that can be expected to come,
    until that monotonic time."""

    nodes: tuple[str, ...]
    cuts: tuple[int, ...]
    awaited: frozenset[str] = frozenset()
    until: float = 0.0


def to_text(plan: Plan | None) -> str:
    """What to keep of a plan; empty: nothing."""
    if plan is None:
        return ""
    return json.dumps([[stage.node, stage.layers[1]] for stage in plan.stages], separators=(",", ":"))


def from_text(text: object, gone: Collection[str], until: float) -> KeptPlan | None:
    """The plan of a text that was kept; None if it is none. gone: nodes that will not come."""
    try:
        told = json.loads(text) if isinstance(text, str) else ()
        nodes = tuple(str(node) for node, _ in told)
        ends = tuple(int(end) for _, end in told)
    except (ValueError, TypeError, RecursionError):
        return None
    return KeptPlan(nodes, ends[:-1], frozenset(nodes) - frozenset(gone), until) if nodes else None
