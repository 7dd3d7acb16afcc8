"""The proportional strategy: layers in proportion to effective VRAM, at legal cuts, never past what fits.

Pure and deterministic. Shares are rounded by largest remainder; of the cuts at which every stage fits, those nearest
to these shares are taken, and nodes that would get no layer are left out with the reason. The last stage also holds the
output head, which counts as memory. Weight and room are two figures: a share never makes a stage fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.model.costs import ModelCosts, stage_bytes
from dwarfstar_engine.model.slice import check_cut

TOO_LARGE = "model_too_large_for_remaining_capacity"
GIB = 1 << 30
_FAR = np.iinfo(np.int64).max // 4  # a distance that stands for "does not fit"; two of them can still be added
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Slices = Sequence[tuple[str, int, int]]  # (node, first layer, end)


@dataclass(frozen=True, slots=True)
class Capacity:
    """A node as the planner sees it. usable_bytes: what its stage may take. share_bytes: its weight when layers are
    shared out, its effective VRAM; 0: what it may take."""

    node: str
    usable_bytes: int
    share_bytes: int = 0

    @property
    def weight(self) -> int:
        return self.share_bytes or self.usable_bytes


@dataclass(frozen=True, slots=True)
class Need:
    """What a run of the model asks beyond weights. cells: KV cells. reserve_bytes: a stage's compute buffers and its
    process; last_bytes: what the last one takes besides, its vocabulary and logits.

    forbidden_lengths: slices of so many layers cannot be loaded, unless they are the whole model.
    """

    cells: int
    reserve_bytes: int
    forbidden_lengths: tuple[int, ...] = ()
    last_bytes: int = 0

    def buffers_bytes(self, *, last: bool) -> int:
        """What a stage takes besides weights and KV cache."""
        return self.reserve_bytes + (self.last_bytes if last else 0)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers [a, b) on a node. weights_bytes are those of the slice, with what every stage holds and the last one's
    head. last: follows from the layers and the model."""

    node: str
    layers: tuple[int, int]
    weights_bytes: int
    kv_bytes: int
    last: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Plan:
    stages: tuple[StagePlan, ...]
    excluded: tuple[tuple[str, str], ...] = ()  # (node, reason)


def stage_plan(costs: ModelCosts, need: Need, node: str, a: int, b: int) -> StagePlan:
    """What layers [a, b) of the model take on a node."""
    last = b == len(costs.layer_bytes)
    weights = stage_bytes(costs, a, b, last=last)
    kv = need.cells * sum(costs.kv_bytes_per_token[a:b])
    return StagePlan(node, (a, b), weights, kv, last)


def with_cuts(
    costs: ModelCosts,
    legal: Sequence[int],
    need: Need,
    nodes: Sequence[Capacity],
    cuts: Sequence[int],
    by_node: Mapping[str, ModelCosts] | None = None,
) -> Plan:
    """The plan whose boundaries are ``cuts``, on the first len(cuts)+1 nodes.

    by_node: costs on nodes that hold another file of the model.
    Raises IllegalCutError for a boundary the model may not be divided at, PlanError if nodes are missing or too small.
    """
    layers = len(costs.layer_bytes)
    check_cut(layers, legal, cuts)
    if len(nodes) < len(cuts) + 1:
        raise PlanError(f"{len(cuts) + 1} stages need as many nodes, and there are {len(nodes)}")
    bounds, there = [0, *cuts, layers], by_node or {}
    stages = tuple(
        stage_plan(there.get(node.node, costs), need, node.node, a, b)
        for node, a, b in zip(nodes, bounds[:-1], bounds[1:], strict=False)
    )
    for stage, node in zip(stages, nodes, strict=False):
        _check_fits(stage, node, need)
    left_out = tuple((node.node, "the given cuts leave no layer for it") for node in nodes[len(stages) :])
    return Plan(stages, left_out)


def _bytes(stage: StagePlan, need: Need) -> int:
    return stage.weights_bytes + stage.kv_bytes + need.buffers_bytes(last=stage.last)


def _check_fits(stage: StagePlan, node: Capacity, need: Need) -> None:
    if (total := _bytes(stage, need)) > node.usable_bytes:
        a, b = stage.layers
        raise PlanError(
            f"layers {a}–{b} need {total / GIB:.2f} GiB on {node.node}, which has {node.usable_bytes / GIB:.2f} GiB: "
            "give it fewer layers or a smaller context",
            code=TOO_LARGE,
        )


def proportional(
    costs: ModelCosts,
    legal: Sequence[int],
    need: Need,
    nodes: Sequence[Capacity],
    *,
    by_node: Mapping[str, ModelCosts] | None = None,
    pins: Mapping[str, tuple[int, int]] | None = None,
) -> Plan:
    """Split over all ``nodes``, in their order.

    by_node: costs on nodes that hold another file of the model. pins: nodes with exactly these layers, wherever they
    stand in the order. Raises PlanError if nothing fits.
    """
    if not nodes:
        raise PlanError("no node has joined yet: start one with `dwarfstar node`", code="no_nodes", retry_after_s=2.0)
    here = {node.node: node for node in nodes}
    check_pins(costs, legal, need, here, pins or {}, by_node or {})
    split = _Split(costs, legal, need, by_node or {}, {n: p for n, p in (pins or {}).items() if n in here})
    used = [node for node in nodes if node.node not in split.pins]
    excluded: list[tuple[str, str]] = []
    while True:
        counts = split.fit(used, _largest_remainder([n.weight for n in used], split.free))
        if counts is None:
            raise too_large(costs, need, nodes)
        taken = {node for node, _, _ in counts}
        empty = [n for n in used if n.node not in taken]
        if not empty:
            stages = tuple(stage_plan(split.costs_on(node), need, node, a, b) for node, a, b in counts)
            return Plan(stages, tuple(excluded))
        excluded += [(n.node, "its share is less than one layer") for n in empty]
        used = [n for n in used if n not in empty]


def check_pins(
    costs: ModelCosts,
    legal: Sequence[int],
    need: Need,
    here: Mapping[str, Capacity],
    pins: Mapping[str, tuple[int, int]],
    by_node: Mapping[str, ModelCosts],
) -> None:
    """Raises IllegalCutError or PlanError for pins that no plan can honour."""
    layers, end, last = len(costs.layer_bytes), 0, ""
    for node, (a, b) in sorted(pins.items(), key=lambda pin: pin[1]):
        if node not in here:
            continue
        if not 0 <= a < b <= layers:
            raise PlanError(f"{node} is pinned to layers {a}–{b}, and the model has layers 0–{layers}", code="bad_pin")
        if a < end:
            raise PlanError(f"{last} and {node} are both pinned to layer {a}: pin them apart", code="bad_pin")
        check_cut(layers, legal, [cut for cut in (a, b) if 0 < cut < layers])
        _check_fits(stage_plan(by_node.get(node, costs), need, node, a, b), here[node], need)
        end, last = b, node


def too_large(costs: ModelCosts, need: Need, nodes: Sequence[Capacity]) -> PlanError:
    """The error of a model that does not fit ``nodes``."""
    have = sum(n.usable_bytes for n in nodes)
    whole = stage_plan(costs, need, "", 0, len(costs.layer_bytes))
    takes = whole.weights_bytes + whole.kv_bytes + need.last_bytes
    several = f"the {len(nodes)} nodes have" if len(nodes) > 1 else "the only node has"
    return PlanError(
        f"the model needs {takes / GIB:.2f} GiB with its KV cache, and "
        f"{need.reserve_bytes / GIB:.2f} GiB on each node for buffers; {several} {have / GIB:.2f} GiB, into which "
        "its layers do not fit: add a node or choose a smaller model or context",
        code=TOO_LARGE,
        retry_after_s=5.0,
    )


def _largest_remainder(weights: Sequence[int], total: int) -> list[int]:
    """Whole shares of ``total`` in proportion to ``weights``; the spare goes to the largest remainders."""
    exact = [w * total / max(1, sum(weights)) for w in weights]
    shares = [int(x) for x in exact]
    order = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def slice_bytes(costs: ModelCosts, need: Need, bounds: Sequence[int]) -> Ints:
    """Bytes of a stage from bounds[i] to bounds[j], buffers included, as a matrix; where j > i only it means that."""
    cells = [need.cells * kv for kv in costs.kv_bytes_per_token]
    upto = np.concatenate(([0], np.cumsum(np.add(costs.layer_bytes, cells, dtype=np.int64))))[list(bounds)]
    found: Ints = upto[None, :] - upto[:, None] + costs.shared_bytes + need.reserve_bytes
    found[:, -1] += costs.head_bytes + need.last_bytes
    return found


def loadable(need: Need, bounds: Sequence[int], pins: Mapping[str, tuple[int, int]], node: str) -> Flags:
    """Whether a node may have bounds[i] to bounds[j], memory aside, as a matrix: order, lengths, pins."""
    at = np.array(bounds)
    length = at[None, :] - at[:, None]
    found: Flags = length > 0
    if need.forbidden_lengths:
        found &= ~np.isin(length, need.forbidden_lengths) | (length == bounds[-1])
    for name, (a, b) in pins.items():
        if name == node:
            found &= (at[:, None] == a) & (at[None, :] == b)
        else:
            found &= (at[None, :] <= a) | (at[:, None] >= b)
    return found


class _Split:
    """One model's blocks, which lie between neighbouring legal cuts, shared out in an order of nodes."""

    def __init__(
        self,
        costs: ModelCosts,
        legal: Sequence[int],
        need: Need,
        by_node: Mapping[str, ModelCosts],
        pins: Mapping[str, tuple[int, int]],
    ) -> None:
        self.bounds = [0, *legal, len(costs.layer_bytes)]
        self.pins = pins
        self._need, self._costs, self._by_node = need, costs, by_node
        index = {bound: i for i, bound in enumerate(self.bounds)}
        self._jumps = sorted((index[a], index[b], node) for node, (a, b) in pins.items())
        self.free = len(self.bounds) - 1 - sum(end - start for start, end, _ in self._jumps)
        self._bytes: dict[int, Ints] = {}

    def costs_on(self, node: str) -> ModelCosts:
        return self._by_node.get(node, self._costs)

    def _takes(self, node: str) -> Ints:
        costs = self.costs_on(node)
        if id(costs) not in self._bytes:
            self._bytes[id(costs)] = slice_bytes(costs, self._need, self.bounds)
        return self._bytes[id(costs)]

    def _jump(self, distance: Ints) -> Ints:
        """Past the layers that are pinned: nobody else leads there."""
        for start, end, _ in self._jumps:
            distance[end] = distance[start]
        return distance

    def fit(self, nodes: Sequence[Capacity], wish: Sequence[int]) -> Slices | None:
        """The slices whose counts of blocks are nearest to ``wish`` and which fit, or None.

        distance[j] holds, for the nodes so far covering the first j blocks, the least sum of squared distances.
        """
        size = len(self.bounds)
        distance = np.full(size, _FAR, np.int64)
        distance[0] = 0
        self._jump(distance)
        count = np.arange(size)[None, :] - np.arange(size)[:, None]
        ordered = loadable(self._need, self.bounds, self.pins, "")
        backs: list[Ints] = []
        for node, wanted in zip(nodes, wish, strict=True):
            allowed = (ordered & (self._takes(node.node) <= node.usable_bytes)) | (count == 0)
            through = np.where(allowed, distance[:, None] + (count - wanted) ** 2, _FAR)
            back = through.argmin(axis=0)
            distance = self._jump(np.minimum(through[back, np.arange(size)], _FAR))
            backs.append(back)
        return self._slices(nodes, backs) if distance[-1] < _FAR else None

    def _slices(self, nodes: Sequence[Capacity], backs: Sequence[Ints]) -> Slices:
        """Read back from the end."""
        starts = {end: (start, node) for start, end, node in self._jumps}
        found: list[tuple[str, int, int]] = []

        def past_pins(end: int) -> int:
            while end in starts:
                start, name = starts[end]
                found.append((name, self.bounds[start], self.bounds[end]))
                end = start
            return end

        end = len(self.bounds) - 1
        for node, back in zip(reversed(nodes), reversed(backs), strict=True):
            end = past_pins(end)
            start = int(back[end])
            if start < end:
                found.append((node.node, self.bounds[start], self.bounds[end]))
            end = start
        past_pins(end)
        return found[::-1]
