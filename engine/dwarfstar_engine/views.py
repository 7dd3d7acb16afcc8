"""What front ends see: frozen pydantic models, one definition for ``status --json``, the TUI and the docs.

Sizes are GiB, times are in the unit their name ends in, layer ranges are half open.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_STAGES = 1024  # of a plan that is asked for: as many as a cluster has nodes


class View(BaseModel):
    model_config = ConfigDict(frozen=True)


class CoordinatorView(View):
    address: str
    term: int
    api_url: str
    leader: str = ""  # id of the node that leads; empty: nobody, as far as is known
    leads: bool = True  # whether it is the one asked


class ModelView(View):
    name: str
    architecture: str
    layers: int
    legal_cuts: tuple[int, ...]
    weights_gib: float
    context: int


class NodeView(View):
    id: str
    name: str
    address: str
    state: str  # joined | late | lost | left | drained
    device: str
    memory_gib: float
    used_gib: float
    effective_vram_gib: float
    heartbeat_age_s: float
    free_gib: float | None = None  # None here and below: not known
    load: float | None = None  # share of its processors in use, 0 … 1
    temperature_c: float | None = None  # of what computes, the hottest part
    power_w: float | None = None  # of what computes
    bandwidth_gb_s: float | None = None  # of its memory, 1e9 bytes, measured or by its clock
    usable_gib: float | None = None  # what it would lend without an override
    override: str = ""  # what its owner set instead: 18, 50% or -2; empty: nothing


class StageView(View):
    node: str
    layers: tuple[int, int]
    weights_gib: float
    kv_gib: float
    ms_per_token: float
    tok_s: float
    busy: float  # share of the last seconds spent computing, 0 … 1
    wait: float  # share spent waiting for a frame
    wire: str  # what hidden states leave as: f32 | f16 | q8; ids: it is the last
    link_ms: float  # round trip to the next stage
    link_mb_s: float  # 1e6 bytes
    pid: int
    state: str  # loading | ready | failed
    rss_gib: float | None = None  # memory of its process; None here and below: not known
    rows_s: float | None = None  # tokens that passed it in the last second, guesses and prompts among them
    pipeline: int = 0  # the number of its pipeline, where there are several


class StandbyView(View):
    """A slice that waits on a node, in no ring."""

    node: str
    layers: tuple[int, int]
    pid: int
    state: str  # loading | ready


class ThroughputView(View):
    tok_s: float
    active: int
    queued: int


class StatusView(View):
    coordinator: CoordinatorView
    model: ModelView | None
    epoch: int
    state: str  # starting | serving | unavailable | following
    reason: str  # why not serving; empty when it is
    nodes: tuple[NodeView, ...]
    stages: tuple[StageView, ...]
    throughput: ThroughputView
    standbys: tuple[StandbyView, ...] = ()
    warnings: tuple[str, ...] = ()  # what its owner should look into, newest last
    last_event: int = 0  # number of the latest; 0: none yet

    def chains(self) -> tuple[StatusView, ...]:
        """Of each pipeline one with its stages only, along its ring."""
        rings: dict[int, list[StageView]] = {}
        for stage in sorted(self.stages, key=lambda one: (one.pipeline, one.layers)):
            rings.setdefault(stage.pipeline, []).append(stage)
        return tuple(self.model_copy(update={"stages": tuple(ring)}) for ring in rings.values())


class EventView(View):
    number: int  # from 1, without gaps
    time_s: float  # since 1970, by the coordinator's clock
    kind: str  # a stable word, such as node_lost
    node: str  # name; empty: about none
    cause: str  # for people
    details: dict[str, str | int | float]  # for programs


class EventsView(View):
    events: tuple[EventView, ...]  # oldest first
    missed: int = 0  # events before these that are not kept any more


class ModelFileView(View):
    """A model file, or the files of a split model together. Of a broken one nothing but names, size and reason."""

    name: str  # what serves it
    path: str  # of the first file
    files: int
    size_gib: float  # of the weights; of a broken one, of the files
    architecture: str
    layers: int
    parameters: int
    quantisation: str
    context: int  # tokens it was trained for; 0: not said
    supported: bool
    reason: str  # why not; empty if it is supported
    broken: bool = False  # cannot be read, and so is not supported


class ModelFilesView(View):
    models: tuple[ModelFileView, ...]  # by name, the demo last
    left_out: int = 0  # files that were not looked at: too many, or too slow to read
    unfinished_gib: float = 0.0  # of downloads that may go on


# --- plans ---


class MemoryView(View):
    """Of a planned stage, GiB. headroom: of what its node may use, negative where it does not fit."""

    weights: float
    kv: float
    compute: float
    headroom: float


class PlannedStageView(View):
    node: str
    layers: tuple[int, int]
    memory_gib: MemoryView
    ms: float  # predicted, of one generated token
    measured_ms: float | None = None  # of the stage that runs


class PredictedView(View):
    """lanes, batch: at the aggregate. hop_ms: from each stage to the next; the last one's leads back to the first."""

    single_tok_s: float
    aggregate_tok_s: float
    ttft_ms: float
    prompt_tokens: int
    lanes: int
    batch: int
    hop_ms: tuple[float, ...]


class LeftOutView(View):
    node: str
    reason: str


class SliceView(View):
    node: str
    layers: tuple[int, int]


class AlternativeView(View):
    kind: str  # single | replicas | split | pipelines
    nodes: tuple[str, ...]
    single_tok_s: float
    aggregate_tok_s: float
    pipelines: tuple[tuple[SliceView, ...], ...]


class PlanView(View):
    """What ``dwarfstar plan --json`` tells."""

    model: str
    context: int
    strategy: str  # proportional | fastest; given: by its owner
    objective: str
    stages: tuple[PlannedStageView, ...]
    predicted: PredictedView
    excluded: tuple[LeftOutView, ...]
    alternatives: tuple[AlternativeView, ...]
    take: str  # the kind of the best of them
    advice: str
    options: tuple[str, ...]
    bottleneck: str  # a node, or "a → b" for a link


class PlanRequest(View):
    """What is wished of a plan; nothing: what the planner finds with the engine's own strategy.

    cuts: boundaries by hand. order: nodes along the ring, names or ids; with cuts, as many as stages. pins: a node has
    exactly these layers. excluded: a node gets none. context: of a proposal only. auto: forget what the owner has
    committed, the planner decides again. pipeline: which one is meant, where there are several; the nodes are its own.
    take: of a commit: serve as that alternative of the advisor's, and nothing else of this counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: Literal["proportional", "fastest"] | None = None
    objective: Literal["single", "throughput"] | None = None
    cuts: tuple[int, ...] | None = Field(default=None, max_length=MAX_STAGES)
    order: tuple[str, ...] = Field(default=(), max_length=MAX_STAGES)
    pins: dict[str, tuple[int, int]] = Field(default_factory=dict, max_length=MAX_STAGES)
    excluded: tuple[str, ...] = Field(default=(), max_length=MAX_STAGES)
    context: int | None = Field(default=None, ge=16, le=1 << 20)
    auto: bool = False
    pipeline: int = Field(default=0, ge=0)
    take: Literal["single", "replicas", "split", "pipelines"] | None = None


class DeltaView(View):
    """What changes on a node. Layers are those it did not hold, or holds no more. beside_gib: left while the old slice
    and the new one are both loaded; negative: streams wait while it loads."""

    node: str
    load: tuple[tuple[int, int], ...]
    drop: tuple[tuple[int, int], ...]
    load_gib: float
    drop_gib: float
    headroom_gib: float
    beside_gib: float


class ProposalView(View):
    """The plan that runs beside one that is proposed. epoch: to be given with a commit.

    clamped: cuts that were moved, and why. error, code: why there is no proposal. owner: the running plan is kept as
    its owner committed it. undo: there is a plan to go back to.
    """

    epoch: int
    legal_cuts: tuple[int, ...]
    present: PlanView | None
    proposed: PlanView | None
    delta: tuple[DeltaView, ...] = ()
    clamped: tuple[str, ...] = ()
    error: str = ""
    code: str = ""
    owner: bool = False
    undo: bool = False
    tok_s: float = 0.0  # of all streams, now


class ReadView(View):
    node: str
    layers: tuple[int, int]
    read_gib: float  # from the disk; the rest was in its page cache


class CommitView(View):
    """A plan that was carried out. loaded_first: beside the one before it; else streams waited."""

    epoch: int
    loaded_first: bool
    before: PlanView
    after: PlanView
    reads: tuple[ReadView, ...] = ()


class OverrideView(View):
    node: str
    override: str  # that counts now: 18, 50% or -2; empty: none
    effective_vram_gib: float
    replanned: bool
