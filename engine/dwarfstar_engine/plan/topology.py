"""A described cluster: TOML bytes in, typed out. Units are in the key names. Pure.

Nothing is taken that is not understood: an unknown key, a negative number or a cluster that cannot be is an error that
names the key. ``[expect]`` is for tests and is not read.
"""

from __future__ import annotations

import tomllib
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.model.costs import ModelCosts
from dwarfstar_engine.plan.capacity import parse_override
from dwarfstar_engine.plan.cluster import Cluster, Device, Kind, Link, Measured, Node
from dwarfstar_engine.plan.forecast import Job
from dwarfstar_engine.plan.proportional import GIB, Need

MAX_BYTES = 1 << 20  # a description is written by hand
MAX_NODES = 4096
MAX_LAYERS = 512  # of llama.cpp
DEFAULT_CONTEXT = 4096
DEFAULT_WIDTH = 4096  # elements of a hidden state, of models around 8B
DEFAULT_LAYER_GIB = 0.1  # where only capacities in layers are told
CAPACITY_MS = 20.0  # in which a node of ``capacity_layers`` reads all it holds

Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("must be printable")
    return name


Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Device(_Part):
    device: Kind
    memory_gib: Positive
    bandwidth_gb_s: Positive | None = None
    usable_gib: Positive | None = None

    @model_validator(mode="after")
    def _lends_what_it_has(self) -> Self:
        if self.usable_gib is not None and self.usable_gib > self.memory_gib:
            raise ValueError(f"usable_gib ({self.usable_gib:g}) is more than memory_gib ({self.memory_gib:g})")
        return self

    def typed(self) -> Device:
        usable = int((self.usable_gib or 0) * GIB)
        return Device(self.device, int(self.memory_gib * GIB), self.bandwidth_gb_s or 0.0, usable)


class _Measured(_Part):
    layers: tuple[int, int]
    step_ms: Positive
    last: bool = False
    batches: tuple[tuple[int, Positive], ...] = Field(default=(), max_length=64)
    prompt: tuple[tuple[int, Positive], ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _slice(self) -> Self:
        if not 0 <= self.layers[0] < self.layers[1] <= MAX_LAYERS:
            raise ValueError("layers must be [first, end) with first < end")
        if any(rows < 1 for rows, _ in (*self.batches, *self.prompt)):
            raise ValueError("batches and prompt hold [rows, ms] with 1 row or more")
        return self

    def typed(self) -> Measured:
        return Measured(self.layers, self.step_ms, self.last, self.batches, self.prompt)


class _Node(_Part):
    name: Name
    device: Kind | None = None
    memory_gib: Positive | None = None
    bandwidth_gb_s: Positive | None = None
    usable_gib: Positive | None = None
    devices: tuple[_Device, ...] = Field(default=(), max_length=64)
    effective_vram: str | float | None = None
    host: str = Field(default="", max_length=64)
    model: str | None = Field(default=None, max_length=4096)
    cores: int = Field(default=0, ge=0, le=4096)
    threads: int = Field(default=1, ge=1, le=4096)
    measured: tuple[_Measured, ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _one_or_many(self) -> Self:
        if self.devices:
            if self.device or self.memory_gib or self.bandwidth_gb_s or self.usable_gib:
                raise ValueError("has both devices and a device of its own: leave one of them out")
        elif self.device is None or self.memory_gib is None:
            raise ValueError("needs device and memory_gib, or devices")
        return self

    def typed(self) -> Node:
        devices = self.devices
        if not devices:
            assert self.device is not None and self.memory_gib is not None
            own = _Device(
                device=self.device,
                memory_gib=self.memory_gib,
                bandwidth_gb_s=self.bandwidth_gb_s,
                usable_gib=self.usable_gib,
            )
            devices = (own,)
        said = self.effective_vram
        text = f"{said:g}" if isinstance(said, float | int) else said
        return Node(
            name=self.name,
            devices=tuple(device.typed() for device in devices),
            override=parse_override(text) if text is not None else None,
            measured=tuple(one.typed() for one in self.measured),
            host=self.host,
            cores=self.cores,
            threads=self.threads,
        )


class _Link(_Part):
    gbit_s: Positive = 1.0
    latency_ms: NotNegative = 0.3

    def typed(self) -> Link:
        return Link(self.gbit_s, self.latency_ms)


class _Pair(_Link):
    between: tuple[Name, Name]


class ModelShape(_Part):
    """A model without a file. Layers are equal; kv_gib: of ``context`` tokens, all layers together."""

    layers: int = Field(ge=1, le=MAX_LAYERS)
    weights_gib: Positive | None = None
    head_gib: NotNegative = 0.0
    active_gib: Positive | None = None
    kv_gib: NotNegative = 0.0
    compute_gib_per_node: NotNegative = 0.0
    embedding_length: int = Field(default=DEFAULT_WIDTH, ge=1, le=1 << 20)
    context: int = Field(default=DEFAULT_CONTEXT, ge=16, le=1 << 24)
    legal_cuts: tuple[int, ...] | None = Field(default=None, max_length=MAX_LAYERS)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.weights_gib is not None and self.head_gib + (self.active_gib or 0) > self.weights_gib:
            raise ValueError("head_gib and active_gib are more than weights_gib, which has them all")
        cuts = self.legal_cuts or ()
        if list(cuts) != sorted({cut for cut in cuts if 0 < cut < self.layers}):
            raise ValueError(f"legal_cuts must rise and lie between 0 and {self.layers}")
        return self

    def job(self, context: int | None = None) -> Job:
        """The model as it is to be run with a context, or with its own."""
        layers, cells = self.layers, context or self.context
        weights = self.weights_gib or DEFAULT_LAYER_GIB * layers + self.head_gib
        active = () if self.active_gib is None else (int(self.active_gib * GIB / layers),) * layers
        costs = ModelCosts(
            layer_bytes=(int((weights - self.head_gib) * GIB / layers),) * layers,
            head_bytes=int(self.head_gib * GIB),
            embedding_bytes=0,
            kv_bytes_per_token=(int(self.kv_gib * GIB / layers / self.context),) * layers,
            n_embd=self.embedding_length,
            active_bytes=active,
        )
        legal = tuple(range(1, layers)) if self.legal_cuts is None else self.legal_cuts
        return Job(costs, legal, Need(cells, int(self.compute_gib_per_node * GIB)), cells)


class _File(_Part):
    node: tuple[_Node, ...] = Field(default=(), max_length=MAX_NODES)
    capacity_layers: dict[Name, Positive] = Field(default_factory=dict, max_length=MAX_NODES)
    link: _Link = _Link()
    links: tuple[_Pair, ...] = Field(default=(), max_length=MAX_NODES)
    model: ModelShape | None = None
    expect: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = [node.name for node in self.node] + list(self.capacity_layers)
        if not names:
            raise ValueError("there is no node: describe each in a [[node]] table")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two nodes are called {twice[0]!r}: give each a name of its own")
        machines = {*names, *(node.host for node in self.node)}
        for pair in self.links:
            for name in pair.between:
                if name not in machines:
                    raise ValueError(f"links joins {name!r}, and no node is called that")
            if pair.between[0] == pair.between[1]:
                raise ValueError(f"links joins {pair.between[0]!r} to itself")
        return self


class Topology:
    """A described cluster, and its model if one is described. files: of nodes that hold another quantisation of it."""

    def __init__(self, file: _File) -> None:
        shape = file.model
        layer_gib = DEFAULT_LAYER_GIB
        if shape is not None and shape.weights_gib is not None:
            layer_gib = (shape.weights_gib + shape.kv_gib) / shape.layers
        described = tuple(node.typed() for node in file.node)
        counted = tuple(_of_capacity(name, layers, layer_gib, shape) for name, layers in file.capacity_layers.items())
        self.cluster = Cluster(
            nodes=described + counted,
            link=file.link.typed(),
            pairs={pair.between: pair.typed() for pair in file.links},
        )
        self.model = shape
        self.files = {node.name: node.model for node in file.node if node.model}
        self.expect = file.expect


def _of_capacity(name: str, layers: float, layer_gib: float, shape: ModelShape | None) -> Node:
    """A node known by the layers it can hold. Such figures count speed, too: it reads them all in ``CAPACITY_MS``."""
    extra = (shape.head_gib + shape.compute_gib_per_node if shape is not None else 0.0) + layer_gib / 2
    size = int((layers * layer_gib + extra) * GIB)
    return Node(name, (Device(Kind.GPU, size, layers * layer_gib * GIB / (CAPACITY_MS * 1e6)),))


def read_topology(data: bytes, name: str = "the topology") -> Topology:
    """Raises SettingsError naming the key at fault."""
    if len(data) > MAX_BYTES:
        raise SettingsError(f"{name} is larger than {MAX_BYTES} bytes: it does not describe a cluster")
    try:
        raw = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name} is not valid TOML: {error}") from None
    try:
        return Topology(_File(**raw))
    except ValidationError as error:
        raise SettingsError(f"{name}: {problem(error, raw)}") from None


def problem(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first thing wrong, as a sentence that begins with its key."""
    first = error.errors()[0]
    where = _where(first["loc"], raw)
    if first["type"] == "extra_forbidden":
        return f"{where} is no key of a topology: see docs/planning.md"
    if first["type"] == "missing":
        return f"{where} is missing"
    said = first["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    given = first["input"] if isinstance(first["input"], str | int | float) else None
    return f"{where} {said}".strip() + (f" (given: {given!r})" if given is not None else "")


def _where(loc: tuple[str | int, ...], raw: dict[str, Any]) -> str:
    """``node.memory_gib of 'tower'`` rather than a number in a list."""
    keys = ".".join(str(part) for part in loc if isinstance(part, str))
    if len(loc) > 1 and loc[0] == "node" and isinstance(loc[1], int):
        name = raw["node"][loc[1]].get("name") if isinstance(raw["node"][loc[1]], dict) else None
        return f"{keys} of {name!r}" if name else f"{keys} of node {loc[1] + 1}"
    return keys
