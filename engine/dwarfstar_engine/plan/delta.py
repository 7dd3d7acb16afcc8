"""The way from one plan to another, and how far a boundary may be moved. Pure.

A slice that ends earlier needs no reload: llama.cpp may stop behind any of its layers. So a node that gives up layers
at its end drops them for free; one that begins elsewhere keeps the layers both slices share only as segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.plan.cost import Costs
from dwarfstar_engine.plan.proportional import GIB, Plan, StagePlan

Layers = tuple[int, int]


@dataclass(frozen=True, slots=True)
class NodeDelta:
    """What changes on a node. load, drop: ranges of layers, half open. headroom_bytes: after all is done; while both
    are held it is ``both_headroom_bytes``: negative means that something has to go before the new layers are loaded.
    """

    node: str
    load: tuple[Layers, ...]
    drop: tuple[Layers, ...]
    load_bytes: int
    drop_bytes: int
    headroom_bytes: int
    both_headroom_bytes: int


def delta(costs: Costs, old: Plan, new: Plan) -> tuple[NodeDelta, ...]:
    """For each node that either plan uses, in the new plan's order, then the old one's."""
    names = dict.fromkeys([*(stage.node for stage in new.stages), *(stage.node for stage in old.stages)])
    return tuple(_node(costs, name, _layers(old, name), _layers(new, name)) for name in names)


def _layers(plan: Plan, node: str) -> set[int]:
    return {layer for stage in plan.stages if stage.node == node for layer in range(*stage.layers)}


def _node(costs: Costs, name: str, old: set[int], new: set[int]) -> NodeDelta:
    there, need = costs.nodes[name], costs.job.need
    reserve = need.buffers_bytes(last=costs.job.layers - 1 in new)
    load, drop = new - old, old - new
    after = _bytes(costs, name, new)
    return NodeDelta(
        node=name,
        load=ranges(load),
        drop=ranges(drop),
        load_bytes=_weights(costs, name, load),
        drop_bytes=_weights(costs, name, drop),
        headroom_bytes=there.usable_bytes - after - (reserve if new else 0),
        both_headroom_bytes=there.usable_bytes - after - _bytes(costs, name, drop) - reserve,
    )


def _weights(costs: Costs, node: str, layers: set[int]) -> int:
    """Weights of layers, and of the head if the last is among them."""
    file = costs.nodes[node].costs
    head = file.head_bytes if costs.job.layers - 1 in layers else 0
    return sum(file.layer_bytes[layer] for layer in layers) + head


def _bytes(costs: Costs, node: str, layers: set[int]) -> int:
    kv = costs.nodes[node].costs.kv_bytes_per_token
    return _weights(costs, node, layers) + costs.job.need.cells * sum(kv[layer] for layer in layers)


def ranges(layers: set[int]) -> tuple[Layers, ...]:
    """Layers as half-open ranges, rising."""
    found: list[Layers] = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer:
            found[-1] = (found[-1][0], layer + 1)
        else:
            found.append((layer, layer + 1))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Clamped:
    """cut: the nearest boundary that is possible. why: why it is not the one wanted; empty if it is."""

    cut: int
    why: str


def clamp(costs: Costs, stages: Sequence[StagePlan], boundary: int, wanted: int) -> Clamped:
    """Where the boundary between stages[boundary] and the next may go, nearest to ``wanted``.

    Of two equally near, the one towards where it is now. Raises PlanError if no cut between the two is possible.
    """
    left, right = stages[boundary], stages[boundary + 1]
    low, now, high = left.layers[0], left.layers[1], right.layers[1]
    legal = [cut for cut in costs.job.legal if low < cut < high]
    possible = [cut for cut in legal if not _obstacle(costs, left, right, cut)]
    if not possible:
        raise PlanError(f"{left.node} and {right.node} cannot share layers {low}–{high}", code="no_cut")
    cut = min(possible, key=lambda one: (abs(one - wanted), abs(one - now)))
    return Clamped(cut, "" if cut == wanted else _why(costs, left, right, wanted, legal))


def _why(costs: Costs, left: StagePlan, right: StagePlan, wanted: int, legal: Sequence[int]) -> str:
    if wanted <= left.layers[0] or wanted >= right.layers[1]:
        empty = left.node if wanted <= left.layers[0] else right.node
        return f"{empty} would be left without a layer"
    if wanted not in legal:
        return f"the model may not be cut at layer {wanted}"
    return _obstacle(costs, left, right, wanted)


def _obstacle(costs: Costs, left: StagePlan, right: StagePlan, cut: int) -> str:
    """Why a legal cut is not possible; empty if it is."""
    for node, a, b in ((left.node, left.layers[0], cut), (right.node, cut, right.layers[1])):
        if b - a in costs.job.need.forbidden_lengths and b - a < costs.job.layers:
            return f"llama.cpp mistakes a slice of {b - a} layers for another model"
        takes, has = costs.stage_bytes(node, a, b), costs.nodes[node].usable_bytes
        if takes > has:
            return f"{node} has {has / GIB:.2f} GiB, and layers {a}–{b} take {takes / GIB:.2f} GiB there"
    return ""
