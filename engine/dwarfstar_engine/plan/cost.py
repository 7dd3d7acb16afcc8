"""What stages and hops take, in ms: from bytes and bandwidth, or from what was measured where that is known.

Theory. A generated token reads every active byte of a stage once, so a row takes bytes ÷ bandwidth, ÷ the share of it
that llama.cpp reaches, and a fixed part for each stage. All layers of a node cost the same per byte; so one measured
slice of a node gives its rate, and with it every other slice. The head is read like a layer of its size, unless it was
measured apart, or slices with and without it were: then their difference is the head.

What was measured after loading holds for that moment. Where a slice is seen in use (``Node.ran``), all figures of its
node change with it.

Rows of several streams run together cost what was measured of that; where nothing was, as much as apart. A prompt's
rows share one reading of the weights, until arithmetic is what takes the time: at ``FREE_ROWS`` rows.

Nodes of one machine share its cores. What a stage computes on them, what its process does for each row to pass, and
what the coordinator does for each token if it is there, takes core time, and a machine has so many cores' time a
second. Where stages compute at the same time each is ``CROWDED`` times as slow: they share caches and memory. Several
cores are never kept busy all the time by more stages than there are, as some idle when few stages are due: twice as
many take ``UNEVEN`` longer.

A hop takes its link's latency, the bytes of the rows, and ``HOP_MS`` for the processes that wake. The last stage feeds
the first one, with ids: that hop carries no activations. A ring of one stage has no hop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from dwarfstar_engine.model.costs import ModelCosts, stage_bytes
from dwarfstar_engine.plan.capacity import effective_bytes, stage_gb_s, usable_bytes
from dwarfstar_engine.plan.cluster import Cluster, Kind, Link, Measured, Node
from dwarfstar_engine.plan.forecast import Job
from dwarfstar_engine.plan.proportional import Capacity

EFFICIENCY = {Kind.GPU: 0.7, Kind.CPU: 0.85}  # of the memory's bandwidth that llama.cpp's decode reaches
STAGE_MS = {Kind.GPU: 0.3, Kind.CPU: 0.1}  # launching a graph, sampling, encoding a frame
FREE_ROWS = {Kind.GPU: 32.0, Kind.CPU: 4.0}  # rows of a prompt that cost as much as one
HOP_MS = 0.3  # a frame is written and read, processes wake; measured on loopback: a round less what stages compute
COORDINATOR_MS = 0.1  # of a token: results read, text sent
# Of nodes that share a machine, measured on two cores with two to four stages:
CROWDED = 1.04
UNEVEN = 0.2
ROW_CORE_MS = 0.25  # of a core, that a stage's process takes for a row beside computing: frames in and out
TOKEN_CORE_MS = 0.2  # of a core, that the coordinator takes for a token: result, text, HTTP
MAX_PACE = 8.0  # times as slow, or as fast, as measured after loading: no machine changes so much
FIXED_SHARE = 0.1  # of a measured step, at most, is taken as fixed
BATCHES = (1, 2, 4, 8)  # streams run together in a lane that are considered


@dataclass(frozen=True, slots=True)
class NodeCosts:
    """What slices take on one node. upto_ms, upto_bytes, upto_kv: sums over the layers before each.

    fixed_ms: of each stage; head_ms: of the last one. batches: (streams, cost as a multiple of one's), rising.
    prompt: (rows, cost of their layers as a multiple of one's), rising.
    """

    node: Node
    costs: ModelCosts
    usable_bytes: int
    upto_ms: tuple[float, ...]
    head_ms: float
    fixed_ms: float
    batches: tuple[tuple[float, float], ...]
    prompt: tuple[tuple[float, float], ...]

    def step_ms(self, a: int, b: int, streams: int = 1) -> float:
        """One generated token of each of so many streams through layers [a, b)."""
        head = self.head_ms if b == len(self.upto_ms) - 1 else 0.0
        return (self.upto_ms[b] - self.upto_ms[a] + head + self.fixed_ms) * self.batch_factor(streams)

    def prompt_ms(self, a: int, b: int, rows: int) -> float:
        """A chunk of a prompt through layers [a, b), without the head."""
        return (self.upto_ms[b] - self.upto_ms[a]) * _along(self.prompt, rows) + self.fixed_ms

    def batch_factor(self, streams: int) -> float:
        """What so many streams run together take, as a multiple of one; apart if that is less."""
        return min(float(streams), _along(self.batches, streams)) if self.batches else float(streams)

    @property
    def capacity(self) -> Capacity:
        return Capacity(self.node.name, self.usable_bytes, effective_bytes(self.node))


def _along(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through ``points``; beyond the last as steep as the mean up to it, below the first constant."""
    i = bisect_left(points, (x, float("-inf")))
    if i == len(points):
        return points[-1][1] * max(1.0, x / points[-1][0])
    if i == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def kind_of(node: Node) -> Kind:
    """Of the device that holds most: it decides how a stage behaves."""
    return max(node.devices, key=lambda device: device.memory_bytes or device.usable_bytes).kind


def node_costs(node: Node, job: Job) -> NodeCosts:
    costs, kind = job.costs_on(node.name), kind_of(node)
    read = [w + kv * job.depth for w, kv in zip(costs.read_bytes, costs.kv_bytes_per_token, strict=True)]
    measured = [one for one in node.measured if one.layers[1] <= job.layers]  # else it was of another model
    if measured:
        per_byte, head_ms, fixed = _measured_rates(measured, read, costs.head_bytes, STAGE_MS[kind])
    else:
        per_byte = 1 / (stage_gb_s(node) * 1e6 * EFFICIENCY[kind])
        head_ms, fixed = costs.head_bytes * per_byte, STAGE_MS[kind]
    prompt = _measured_prompt(measured, read, per_byte, fixed) or ((FREE_ROWS[kind], 1.0),)
    upto_ms = (0.0, *(per_byte * total for total in accumulate(read)))
    found = NodeCosts(
        node=node,
        costs=costs,
        usable_bytes=usable_bytes(node),
        upto_ms=upto_ms,
        head_ms=head_ms,
        fixed_ms=fixed,
        batches=_measured_batches(measured),
        prompt=prompt,
    )
    return found if node.ran is None or node.ran.layers[1] > job.layers else _at_pace(found, node.ran)


def _at_pace(costs: NodeCosts, ran: Measured) -> NodeCosts:
    """Costs of a node on which a slice takes in use what ``ran`` says."""
    pace = ran.step_ms / max(1e-9, costs.step_ms(*ran.layers))
    pace = min(MAX_PACE, max(1 / MAX_PACE, pace))
    return replace(
        costs,
        upto_ms=tuple(ms * pace for ms in costs.upto_ms),
        head_ms=costs.head_ms * pace,
        fixed_ms=costs.fixed_ms * pace,
    )


def _measured_rates(
    measured: Sequence[Measured], read: Sequence[int], head_bytes: int, usual_ms: float
) -> tuple[float, float, float]:
    """(ms per byte of layers, ms of the head, fixed ms) that explain what was measured."""
    fixed = min(usual_ms, *(FIXED_SHARE * one.step_ms for one in measured))
    sizes = [(one, sum(read[slice(*one.layers)])) for one in measured]
    without = [(one.step_ms - one.head_ms - fixed, size) for one, size in sizes if not one.last or one.head_ms]
    with_head = [(one.step_ms - fixed, size) for one, size in sizes if one.last and not one.head_ms]
    if without:
        per_byte = sum(ms for ms, _ in without) / max(1, sum(size for _, size in without))
        heads = [one.head_ms for one in measured if one.last and one.head_ms]
        heads = heads or [max(0.0, ms - per_byte * size) for ms, size in with_head]
        return per_byte, sum(heads) / len(heads) if heads else per_byte * head_bytes, fixed
    per_byte = sum(ms for ms, _ in with_head) / max(1, sum(size + head_bytes for _, size in with_head))
    return per_byte, per_byte * head_bytes, fixed


def _measured_batches(measured: Sequence[Measured]) -> tuple[tuple[float, float], ...]:
    """Of the slice measured at most sizes, its cost as a multiple of a single row's."""
    best = max(measured, key=lambda one: len(one.batches), default=None)
    if best is None or not best.batches:
        return ()
    return tuple(sorted({1: 1.0, **{n: ms / best.step_ms for n, ms in best.batches if n > 1}}.items()))


def _measured_prompt(
    measured: Sequence[Measured], read: Sequence[int], per_byte: float, fixed: float
) -> tuple[tuple[float, float], ...]:
    best = max(measured, key=lambda one: len(one.prompt), default=None)
    if best is None:
        return ()
    one_row = max(1e-9, per_byte * sum(read[slice(*best.layers)]))
    return tuple(sorted((rows, max(0.0, ms - fixed) / one_row) for rows, ms in best.prompt))


def row_bytes(job: Job) -> float:
    """One row of hidden states on the wire."""
    return job.costs.n_embd * job.wire_bytes


def busy_ms(link: Link, size_bytes: float) -> float:
    """How long a link is taken by so many bytes."""
    return size_bytes * 8 / (link.gbit_s * 1e6)


def link_hop_ms(link: Link, size_bytes: float) -> float:
    """From one stage's end to the next one's start, over a link."""
    return link.latency_ms + busy_ms(link, size_bytes) + HOP_MS


@dataclass(frozen=True, slots=True)
class Costs:
    """A cluster's costs for a job, by node name."""

    cluster: Cluster
    job: Job
    nodes: dict[str, NodeCosts]

    def hop_ms(self, a: str, b: str, rows: int = 1) -> float:
        """Rows of hidden states from one stage to the next."""
        return link_hop_ms(self.link(a, b), rows * row_bytes(self.job))

    def closing_ms(self, last: str, first: str) -> float:
        """Drawn ids from the last stage to the first."""
        return 0.0 if last == first else link_hop_ms(self.link(last, first), 0)

    def link(self, a: str, b: str) -> Link:
        return self.cluster.between(self.nodes[a].node, self.nodes[b].node)

    def stage_bytes(self, node: str, a: int, b: int) -> int:
        """What a stage takes there, buffers included."""
        costs, need = self.nodes[node].costs, self.job.need
        kv = need.cells * sum(costs.kv_bytes_per_token[a:b])
        last = b == self.job.layers
        return stage_bytes(costs, a, b, last=last) + kv + need.buffers_bytes(last=last)


def cluster_costs(cluster: Cluster, job: Job) -> Costs:
    return Costs(cluster, job, {node.name: node_costs(node, job) for node in cluster.nodes})
