"""Copies of slices on nodes with room, and the plan that needs no loading. Pure and deterministic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dwarfstar_engine.plan.proportional import Capacity, Need, Plan, StagePlan

Layers = tuple[int, int]
Place = Callable[[str, Layers], StagePlan]  # what a slice takes on a node, which may hold another file of the model


@dataclass(frozen=True, slots=True)
class Copy:
    """``stage`` is what is copied, with the node that holds the copy in it."""

    stage: StagePlan
    of: str


def whole_bytes(stage: StagePlan, need: Need) -> int:
    """What a stage takes: weights, KV cache and buffers."""
    return stage.weights_bytes + stage.kv_bytes + need.buffers_bytes(last=stage.last)


def _on(stage: StagePlan, node: str, place: Place | None) -> StagePlan:
    """The same layers on a node. place None: all nodes hold the same file."""
    return replace(stage, node=node) if place is None else place(node, stage.layers)


def copies(
    stages: Sequence[StagePlan],
    nodes: Sequence[Capacity],
    need: Need,
    most: int,
    held: Mapping[str, Collection[Layers]] | None = None,
    place: Place | None = None,
) -> tuple[Copy, ...]:
    """A copy of each stage on another node, as far as there is room; largest stages first, each where most room is
    left. A node that has the slice loaded (``held``) and room for it keeps it. No node gets more than ``most`` stages,
    its own among them.
    """
    room = {node.node: node.usable_bytes for node in nodes}
    count: Counter[str] = Counter()
    for stage in stages:
        room[stage.node] = room.get(stage.node, 0) - whole_bytes(stage, need)
        count[stage.node] += 1
    found = []
    for stage in sorted(stages, key=lambda one: (-whole_bytes(one, need), one.layers)):
        there = {name: _on(stage, name, place) for name in room if name != stage.node and count[name] < most}
        fit = [name for name, copy in there.items() if room[name] >= whole_bytes(copy, need)]
        if fit:
            has = [name for name in fit if stage.layers in (held or {}).get(name, ())]
            name = max(sorted(has or fit), key=room.__getitem__)
            room[name] -= whole_bytes(there[name], need)
            count[name] += 1
            found.append(Copy(there[name], stage.node))
    return tuple(found)


def moved(
    plan: Plan,
    loaded: Mapping[str, Collection[Layers]],
    nodes: Sequence[Capacity],
    need: Need,
    most: int,
    place: Place | None = None,
) -> Plan | None:
    """The same cuts with each stage where its slice is ``loaded``, and those that are nowhere on the nodes with most
    room, so that nothing else has to be loaded, and what other stages hold stays good. None: there is no room."""
    room = {node.node: node.usable_bytes for node in nodes}
    count: Counter[str] = Counter()
    there = {stage.layers: stage.node for stage in plan.stages if stage.layers in loaded.get(stage.node, ())}
    for stage in plan.stages:
        holders = [name for name in sorted(room) if stage.layers in loaded.get(name, ())]
        if stage.layers not in there and holders:
            there[stage.layers] = min(holders, key=count.__getitem__)
        if (name := there.get(stage.layers, "")) in room:
            room[name] -= whole_bytes(_on(stage, name, place), need)
            count[name] += 1
        else:
            there.pop(stage.layers, None)
    for stage in sorted(plan.stages, key=lambda one: (-whole_bytes(one, need), one.layers)):
        if stage.layers in there:
            continue
        free = [name for name in sorted(room) if count[name] < most]
        takes = {name: whole_bytes(_on(stage, name, place), need) for name in free}
        fit = [name for name in free if room[name] >= takes[name]]
        if not fit:
            return None
        name = there[stage.layers] = max(fit, key=room.__getitem__)
        room[name] -= takes[name]
        count[name] += 1
    return replace(plan, stages=tuple(_on(stage, there[stage.layers], place) for stage in plan.stages))


def without_loading(plan: Plan, loaded: Mapping[str, Collection[Layers]], place: Place | None = None) -> Plan | None:
    """The same cuts with each stage where it is, or where its slice is ``loaded`` if its node has lost it. None: a
    slice is nowhere."""
    count = Counter(stage.node for stage in plan.stages if stage.layers in loaded.get(stage.node, ()))
    stages = []
    for stage in plan.stages:
        node = stage.node
        if stage.layers not in loaded.get(node, ()):
            others = [name for name in sorted(loaded) if stage.layers in loaded[name]]
            if not others:
                return None
            node = min(others, key=count.__getitem__)
            count[node] += 1
        stages.append(_on(stage, node, place))
    return replace(plan, stages=tuple(stages))
