"""What is planned, and what a plan promises: the types that the planner, the advisor and front ends share.

A :class:`~dwarfstar_engine.plan.proportional.Plan` says which layers run where; a :class:`Forecast` says how fast that
is and why; a :class:`Planned` is both with memory laid out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dwarfstar_engine.model.costs import ModelCosts
from dwarfstar_engine.plan.proportional import Need, Plan

F32_BYTES = 4.0
File = tuple[str, str]  # its name, its quantisation


class Strategy(StrEnum):
    PROPORTIONAL = "proportional"
    FASTEST = "fastest"


class Objective(StrEnum):
    """SINGLE: least time for a token of one stream. THROUGHPUT: most tokens a second of all streams together."""

    SINGLE = "single"
    THROUGHPUT = "throughput"


@dataclass(frozen=True, slots=True)
class Job:
    """A model as it is to be run.

    legal: layers at which it may be cut. context: tokens of one request. depth: tokens that a step's attention reads.
    kv_type: of costs' KV bytes. wire_bytes: of one element of a hidden state between stages.
    by_node: costs on nodes that hold another file of the model (other quantisation), and of devices of theirs.
    file: its name and quantisation, where it has them; files: those of the others, by the same names.
    """

    costs: ModelCosts
    legal: tuple[int, ...]
    need: Need
    context: int = 4096
    depth: int = 512
    kv_type: str = "f16"
    wire_bytes: float = F32_BYTES
    by_node: Mapping[str, ModelCosts] = field(default_factory=dict)
    file: File = ("", "")
    files: Mapping[str, File] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return len(self.costs.layer_bytes)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where slices may begin and end."""
        return (0, *self.legal, self.layers)

    def costs_on(self, node: str) -> ModelCosts:
        return self.by_node.get(node) or self.by_node.get(_whole(node), self.costs)

    def file_on(self, node: str) -> File:
        """What a node, or a device of it, runs its layers from."""
        return self.files.get(node) or self.files.get(_whole(node), self.file)


def _whole(stage: str) -> str:
    """The node of a device that is a stage of its own, as the planner calls it: tower of tower:1."""
    return stage.rpartition(":")[0]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator asks of a plan. pins: a node has exactly these layers. excluded: a node gets none."""

    pins: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A stage's memory in bytes, and its time for one generated token. headroom_bytes: of what the node may use."""

    node: str
    layers: tuple[int, int]
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    headroom_bytes: int
    ms: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """stages: in order. hop_ms: from each stage to the next; the last one's leads back to the first.

    single_tok_s: one stream. aggregate_tok_s: ``lanes`` lanes of ``batch`` streams, which keep the bottleneck busy.
    ttft_ms: of a prompt of ``prompt_tokens``. bottleneck: a node's name, "a → b" for a link, or "a + b" for the cores
    of a machine that these nodes share.
    """

    stages: tuple[StageForecast, ...]
    hop_ms: tuple[float, ...]
    single_tok_s: float
    aggregate_tok_s: float
    lanes: int
    batch: int
    prompt_tokens: int
    ttft_ms: float
    bottleneck: str

    @property
    def fits(self) -> bool:
        return all(stage.headroom_bytes >= 0 for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with its forecast. options: what would also be possible, in words. nodes: of its stages, in order."""

    plan: Plan
    forecast: Forecast
    strategy: Strategy
    objective: Objective
    options: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(stage.node for stage in self.plan.stages)

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(b - a for a, b in (stage.layers for stage in self.plan.stages))
