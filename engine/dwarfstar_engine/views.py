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
    state: str  # joined | late | lost | left
    device: str
    memory_gib: float
    used_gib: float
    effective_vram_gib: float
    heartbeat_age_s: float


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
    warnings: tuple[str, ...] = ()  # what its owner should look into, newest last
