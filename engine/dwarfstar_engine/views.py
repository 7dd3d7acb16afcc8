"""What front ends see: frozen pydantic models, one definition for ``status --json``, the TUI and the docs.

Sizes are GiB, times are in the unit their name ends in, layer ranges are half open.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
