"""A plan that is being edited: which machines have which layers, and what is wished of the planner. Pure.

Theory. A draft is what a person has decided so far, and nothing of what that would cost: the engine's planner says so
for each new draft. It begins as the plan that serves. Boundaries are moved along legal cuts by hand; with ``planner``
the planner finds them, and the draft takes over what it has found. A draft names the epoch it is based on; when another
one serves, ``rebased`` moves it there, or says why that is impossible.

Invariants. Cuts rise, are legal, and leave each machine a layer. A boundary of a pinned stage does not move.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from dwarfstar_engine.views import AlternativeView, PlanRequest, PlanView, ProposalView

FAR = 1 << 20  # legal cuts: further than any boundary goes
Strategy = Literal["proportional", "fastest"]
Objective = Literal["single", "throughput"]
Wire = Literal["auto", "f32", "f16", "q8"]
WIRES: tuple[Wire | None, ...] = (None, "f32", "f16", "q8")  # as they come after each other; None: as the engine has it


@dataclass(frozen=True, slots=True)
class Draft:
    """nodes: along the ring, cuts between them. planner: it finds both. None: as the engine or its owner has it.

    context, wire: what an engine is started with, so with them a draft only says what would be.
    """

    base_epoch: int
    model: str
    layers: int
    legal: tuple[int, ...]
    nodes: tuple[str, ...]
    cuts: tuple[int, ...]
    pins: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    strategy: Strategy | None = None
    objective: Objective | None = None
    context: int | None = None
    wire: Wire | None = None
    planner: bool = False
    auto: bool = field(default=False)  # the planner decides from now on, whatever its owner has committed

    @property
    def stages(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        bounds = pairwise((0, *self.cuts, self.layers))
        return tuple(zip(self.nodes, bounds, strict=True))

    def request(self) -> PlanRequest:
        """The same as the engine takes it."""
        base = PlanRequest(strategy=self.strategy, objective=self.objective, context=self.context, wire=self.wire)
        if self.planner and self.auto and not self.pins and not self.excluded:
            return base.model_copy(update={"auto": True})
        pins = {node: layers for node, layers in self.stages if node in self.pins}
        wishes = base.model_copy(update={"pins": pins, "excluded": tuple(sorted(self.excluded))})
        return wishes if self.planner else wishes.model_copy(update={"cuts": self.cuts, "order": self.nodes})

    @property
    def start_options(self) -> str:
        """What an engine would have to be started with to have this draft; empty: nothing."""
        given = (("--context", self.context), ("--wire", self.wire))
        return " ".join(f"{name} {value}" for name, value in given if value is not None)


def layers_of(plan: PlanView) -> int:
    return plan.stages[-1].layers[1]


def begun(told: ProposalView) -> Draft | None:
    """The plan that serves as a draft; None: none does."""
    plan = told.present
    if plan is None or not plan.stages:
        return None
    stages = {stage.node: stage.layers for stage in plan.stages}
    if len(stages) < len(plan.stages):
        return None  # a machine with several stages: its boundaries are not one machine's each
    return Draft(
        base_epoch=told.epoch,
        model=plan.model,
        layers=layers_of(plan),
        legal=told.legal_cuts,
        nodes=tuple(stages),
        cuts=tuple(stage.layers[1] for stage in plan.stages[:-1]),
        pins=frozenset(node for node, layers in told.pins.items() if stages.get(node) == layers),
        excluded=frozenset(told.excluded),
    )


# --- boundaries ---


def possible(draft: Draft, boundary: int) -> tuple[int, ...]:
    """Legal cuts between the boundaries on both sides, each stage keeping a layer; whether they fit is not said."""
    bounds = (0, *draft.cuts, draft.layers)
    low, high = bounds[boundary], bounds[boundary + 2]
    return tuple(cut for cut in draft.legal if low < cut < high)


def held(draft: Draft, boundary: int) -> str:
    """Why a boundary may not be moved; empty if it may."""
    pinned = [node for node in draft.nodes[boundary : boundary + 2] if node in draft.pins]
    if pinned:
        return f"{pinned[0]} is pinned to its layers: P frees it"
    return "" if len(possible(draft, boundary)) > 1 else "the model may be cut nowhere else between these two"


def moved(draft: Draft, boundary: int, layer: int) -> Draft:
    """With a boundary at the legal cut nearest to ``layer``; of two the one towards where it is now."""
    cuts, now = possible(draft, boundary), draft.cuts[boundary]
    if not cuts or held(draft, boundary):
        return draft
    there = min(cuts, key=lambda cut: (abs(cut - layer), abs(cut - now)))
    if there == now:
        return draft
    return replace(draft, cuts=(*draft.cuts[:boundary], there, *draft.cuts[boundary + 1 :]), planner=False, auto=False)


def stepped(draft: Draft, boundary: int, by: int) -> Draft:
    """With a boundary ``by`` legal cuts further, as far as there are any."""
    cuts, now = possible(draft, boundary), draft.cuts[boundary]
    if not cuts:
        return draft
    at = sum(cut < now for cut in cuts) if by > 0 and now in cuts else sum(cut <= now for cut in cuts) - 1
    return moved(draft, boundary, cuts[max(0, min(len(cuts) - 1, at + by))])


# --- wishes ---


def by_planner(draft: Draft) -> Draft:
    """The planner's own plan, within pins and exclusions."""
    return replace(draft, planner=True, auto=True)


def pinned(draft: Draft, node: str) -> Draft:
    """Pin a stage to the layers it has, or free it."""
    return replace(draft, pins=draft.pins ^ {node})


def excluding(draft: Draft, node: str) -> Draft:
    """Give a machine no layer, or let the planner give it some again."""
    return replace(draft, excluded=draft.excluded ^ {node}, pins=draft.pins - {node}, planner=True)


def wishing(draft: Draft, *, strategy: Strategy | None = None, objective: Objective | None = None) -> Draft:
    """With another strategy or objective: the planner plans anew."""
    return replace(
        draft, strategy=strategy or draft.strategy, objective=objective or draft.objective, planner=True, auto=False
    )


def with_context(draft: Draft, tokens: int | None) -> Draft:
    """If requests could be so long; None: as they are."""
    return replace(draft, context=tokens)


def with_next_wire(draft: Draft) -> Draft:
    """If hidden states went over the wire in another precision."""
    return replace(draft, wire=WIRES[(WIRES.index(draft.wire) + 1) % len(WIRES)])


def applicable(one: AlternativeView) -> bool:
    """Whether one engine can run it: one pipeline can be committed, several need an engine each."""
    return len(one.pipelines) == 1


def taking(draft: Draft, one: AlternativeView) -> Draft:
    """The stages of an alternative of one pipeline."""
    assert applicable(one)
    ring = one.pipelines[0]
    return replace(
        draft,
        nodes=tuple(stage.node for stage in ring),
        cuts=tuple(stage.layers[1] for stage in ring[:-1]),
        pins=frozenset(),
        planner=False,
        auto=False,
    )


# --- what the engine says ---


def answered(draft: Draft, plan: PlanView) -> Draft:
    """With the stages that the planner has found, or has moved cuts to."""
    nodes = tuple(stage.node for stage in plan.stages)
    return replace(
        draft,
        nodes=nodes,
        cuts=tuple(stage.layers[1] for stage in plan.stages[:-1]),
        pins=draft.pins & set(nodes),
    )


def same_stages(draft: Draft, plan: PlanView | None) -> bool:
    return plan is not None and draft.stages == tuple((stage.node, stage.layers) for stage in plan.stages)


def changes(draft: Draft, told: ProposalView) -> bool:
    """Whether there is anything to carry out."""
    base = begun(told)
    if base is None or not same_stages(draft, told.present):
        return True
    wishes = (draft.strategy, draft.objective) != (None, None) or (draft.auto and told.owner)
    return wishes or (draft.pins, draft.excluded) != (base.pins, base.excluded)


def stale(draft: Draft, told: ProposalView) -> str:
    """Why a draft cannot be moved onto what serves now; empty if it can."""
    plan = told.present
    if plan is None:
        return "nothing is served now"
    if (plan.model, layers_of(plan), told.legal_cuts) != (draft.model, draft.layers, draft.legal):
        return f"it is a draft for {draft.model}, and {plan.model} is served"
    return ""


def rebased(draft: Draft, told: ProposalView) -> Draft:
    """The draft as a change of what serves now; ``stale`` says when that is impossible."""
    assert not stale(draft, told)
    return replace(draft, base_epoch=told.epoch)
