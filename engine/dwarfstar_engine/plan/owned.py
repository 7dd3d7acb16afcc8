"""What a cluster's owner has decided of its plan, as it is kept in the cluster's state. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from dwarfstar_engine.plan.forecast import Objective, Strategy
from dwarfstar_engine.plan.proportional import Plan

MAX_BYTES = 256 << 10  # of the text: a stage, a pin and an exclusion for each of a thousand nodes


@dataclass(frozen=True, slots=True)
class OwnedPlan:
    """stages: (node id, end of its layers) along the ring. fingerprint: of the model they are of. pins, excluded: by
    node id; they count also while the stages are not possible."""

    fingerprint: str
    stages: tuple[tuple[str, int], ...]
    strategy: Strategy
    objective: Objective
    pins: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(node for node, _ in self.stages)

    def is_of(self, plan: Plan) -> bool:
        """Whether the plan has these stages."""
        return self.stages == tuple((stage.node, stage.layers[1]) for stage in plan.stages)


def to_text(owned: OwnedPlan | None) -> str:
    """What to keep; empty: the owner has decided nothing."""
    if owned is None:
        return ""
    told = {
        "model": owned.fingerprint,
        "stages": owned.stages,
        "strategy": owned.strategy.value,
        "objective": owned.objective.value,
        "pins": dict(owned.pins),
        "excluded": sorted(owned.excluded),
    }
    return json.dumps(told, separators=(",", ":"))


def from_text(text: object) -> OwnedPlan | None:
    """As it was kept; None if it is none, or damaged."""
    if not isinstance(text, str) or not text or len(text) > MAX_BYTES:
        return None
    try:
        told = json.loads(text)
        stages = tuple((str(node), int(end)) for node, end in told["stages"])
        ends = [0, *(end for _, end in stages)]
        if len(ends) < 2 or any(a >= b for a, b in pairwise(ends)):
            return None
        return OwnedPlan(
            fingerprint=str(told["model"]),
            stages=stages,
            strategy=Strategy(told["strategy"]),
            objective=Objective(told["objective"]),
            pins={str(node): (int(a), int(b)) for node, (a, b) in dict(told["pins"]).items()},
            excluded=frozenset(map(str, told["excluded"])),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
