"""The proportional strategy: layers in proportion to effective VRAM, at legal cuts, never past what fits.

Pure and deterministic. Shares are rounded by largest remainder, then layers move from a stage that does not fit to
its neighbours until all fit; nodes that would get no layer are left out with the reason. The last stage also holds
the output head, which counts as memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.model.costs import ModelCosts, stage_bytes
from dwarfstar_engine.model.slice import check_cut

TOO_LARGE = "model_too_large_for_remaining_capacity"
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Capacity:
    """A node as the planner sees it. ``usable_bytes`` is its effective VRAM, override applied."""

    node: str
    usable_bytes: int


@dataclass(frozen=True, slots=True)
class Need:
    """What a run of the model asks beyond weights. cells: KV cells. reserve_bytes: compute buffers of a stage.

    forbidden_lengths: slices of so many layers cannot be loaded, unless they are the whole model.
    """

    cells: int
    reserve_bytes: int
    forbidden_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers [a, b) on a node. weights_bytes are those of the slice, with what every stage holds and the last one's
    head."""

    node: str
    layers: tuple[int, int]
    weights_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    stages: tuple[StagePlan, ...]
    excluded: tuple[tuple[str, str], ...] = ()  # (node, reason)


def stage_plan(costs: ModelCosts, need: Need, node: str, a: int, b: int) -> StagePlan:
    """What layers [a, b) of the model take on a node."""
    weights = stage_bytes(costs, a, b, last=b == len(costs.layer_bytes))
    kv = need.cells * sum(costs.kv_bytes_per_token[a:b])
    return StagePlan(node, (a, b), weights, kv)


def with_cuts(
    costs: ModelCosts, legal: Sequence[int], need: Need, nodes: Sequence[Capacity], cuts: Sequence[int]
) -> Plan:
    """The plan whose boundaries are ``cuts``, on the first len(cuts)+1 nodes.

    Raises IllegalCutError for a boundary the model may not be divided at, PlanError if nodes are missing or too small.
    """
    layers = len(costs.layer_bytes)
    check_cut(layers, legal, cuts)
    if len(nodes) < len(cuts) + 1:
        raise PlanError(f"{len(cuts) + 1} stages need as many nodes, and there are {len(nodes)}")
    bounds = [0, *cuts, layers]
    stages = tuple(
        stage_plan(costs, need, node.node, a, b) for node, a, b in zip(nodes, bounds[:-1], bounds[1:], strict=False)
    )
    for stage, node in zip(stages, nodes, strict=False):
        _check_fits(stage, node, need)
    left_out = tuple((node.node, "the given cuts leave no layer for it") for node in nodes[len(stages) :])
    return Plan(stages, left_out)


def _bytes(stage: StagePlan, need: Need) -> int:
    return stage.weights_bytes + stage.kv_bytes + need.reserve_bytes


def _check_fits(stage: StagePlan, node: Capacity, need: Need) -> None:
    if (total := _bytes(stage, need)) > node.usable_bytes:
        a, b = stage.layers
        raise PlanError(
            f"layers {a}–{b} need {total / GIB:.2f} GiB on {node.node}, which has {node.usable_bytes / GIB:.2f} GiB: "
            "give it fewer layers or a smaller context",
            code=TOO_LARGE,
        )


def proportional(costs: ModelCosts, legal: Sequence[int], need: Need, nodes: Sequence[Capacity]) -> Plan:
    """Split over all ``nodes``, in their order. Raises PlanError if nothing fits."""
    if not nodes:
        raise PlanError("no node has joined yet: start one with `dwarfstar node`", code="no_nodes", retry_after_s=2.0)
    layers = len(costs.layer_bytes)
    bounds = [0, *legal, layers]
    blocks = len(bounds) - 1  # a block is what lies between neighbouring legal cuts
    used = list(nodes)
    excluded: list[tuple[str, str]] = []
    while used:
        counts = _fit(costs, need, used, bounds, _largest_remainder([n.usable_bytes for n in used], blocks))
        if counts is None:
            break
        empty = [n for n, count in zip(used, counts, strict=True) if count == 0]
        if not empty:
            return Plan(_stages(costs, need, used, bounds, counts), tuple(excluded))
        excluded += [(n.node, "its share is less than one layer") for n in empty]
        used = [n for n in used if n not in empty]
    have = sum(n.usable_bytes for n in nodes)
    whole = stage_plan(costs, need, "", 0, layers)
    several = f"the {len(nodes)} nodes have" if len(nodes) > 1 else "the only node has"
    raise PlanError(
        f"the model needs {(whole.weights_bytes + whole.kv_bytes) / GIB:.2f} GiB with its KV cache, and "
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


def _stages(
    costs: ModelCosts, need: Need, nodes: Sequence[Capacity], bounds: Sequence[int], counts: Sequence[int]
) -> tuple[StagePlan, ...]:
    stages, start = [], 0
    for node, count in zip(nodes, counts, strict=True):
        if count:
            stages.append(stage_plan(costs, need, node.node, bounds[start], bounds[start + count]))
        start += count
    return tuple(stages)


def _fit(
    costs: ModelCosts, need: Need, nodes: Sequence[Capacity], bounds: Sequence[int], wish: Sequence[int]
) -> list[int] | None:
    """The counts of blocks nearest to ``wish`` that fit, or None.

    best[j] holds, for the nodes so far covering the first j blocks, the least sum of squared distances from the wish.
    """
    blocks = len(bounds) - 1
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for node, wanted in zip(nodes, wish, strict=True):
        following: dict[int, tuple[int, list[int]]] = {}
        for start, (distance, counts) in best.items():
            for end in range(start, blocks + 1):
                if end > start:
                    length = bounds[end] - bounds[start]
                    if length in need.forbidden_lengths and length < bounds[-1]:
                        continue
                    stage = stage_plan(costs, need, node.node, bounds[start], bounds[end])
                    if _bytes(stage, need) > node.usable_bytes:
                        break
                candidate = (distance + (end - start - wanted) ** 2, [*counts, end - start])
                if end not in following or candidate < following[end]:
                    following[end] = candidate
        best = following
    return best[blocks][1] if blocks in best else None
