"""Which plan the coordinator brings up next, by what happened: no IO, and time is an argument.

After a loss the cuts stay as they are wherever that is possible. Then other stages keep their cells with their weights,
and streams wait for the lost slice only. A plan that divides the layers better is made later, beside the epoch that
serves (``moves``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from dwarfstar_engine.errors import IllegalCutError, PlanError
from dwarfstar_engine.node.beside import loaded
from dwarfstar_engine.node.hops import Hops
from dwarfstar_engine.node.kept_plan import KeptPlan
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.room import MAX_STAGES
from dwarfstar_engine.node.source import DEFAULT_CONTEXT, Source
from dwarfstar_engine.plan.proportional import Capacity, Need, Plan, StagePlan, stage_plan, with_cuts
from dwarfstar_engine.plan.standby import Layers, moved, without_loading
from dwarfstar_engine.settings import Settings

WAITING = "waiting_for_nodes"  # code of a plan that is not made yet


def served_context(settings: Settings, source: Source) -> int:
    """Tokens of one request, at most."""
    return min(settings.context or DEFAULT_CONTEXT, source.train_context)


class Owner(Protocol):
    """What the owner has decided, and the planner proper (``steering``)."""

    def owned(self, source: Source, here: Sequence[Member]) -> Plan | None:
        """The owner's plan, if these nodes can have it."""

    def find(self, source: Source, here: Sequence[Member]) -> Plan:
        """The planner's. Raises PlanError."""

    def awaited_s(self, now: float) -> float:
        """How long nodes of the owner's plan are waited for before the first plan; 0.0: none is."""


class Planner:
    """See the module. Times are monotonic, s. main: the model that is wanted; fallbacks: smaller ones. planned: the
    plan that was brought up last; sound: it served. served: one has. kept: nodes' slices, under another leader.
    gone_at: the last node was lost. wanted: nodes that are waited for. alone: no others serve the model that is wanted;
    then a smaller one may be served."""

    def __init__(self, settings: Settings, members: Mapping[str, Member], main: Source) -> None:
        self.settings, self.members, self.main = settings, members, main
        self.fallbacks: tuple[Source, ...] = ()
        self.hops = Hops()
        self.owner: Owner | None = None  # set before anything is planned
        self.wanted: Callable[[], int] = lambda: settings.wait_nodes
        self.alone: Callable[[], bool] = lambda: True
        self.planned: Plan | None = None
        self.kept: KeptPlan | None = None
        self.begin(None)

    def begin(self, kept: KeptPlan | None) -> None:
        """Plan for a coordinator that begins to lead."""
        self.sound = self.served = False
        self.gone_at = 0.0 if kept is None else kept.until  # who does not come over is lost
        self.kept = kept

    def serve(self, main: Source, settings: Settings) -> None:
        """Plan for another model from now on, and for the nodes that are here: who ordered it has seen them."""
        self.main, self.settings = main, settings
        self.planned = self.kept = None
        self.sound, self.served = False, True

    def next(self, prepared: Plan | None, source: Source, now: float) -> tuple[Source, Plan]:
        """What to serve, and a plan: what was prepared; else the cuts of before, each slice where it is loaded, and one
        that is nowhere where there is room; else a new one. source: served now. Raises as ``now``."""
        if prepared is not None and all(stage.node in self.members for stage in prepared.stages):
            return source, prepared
        plan = self.whole(source, now)
        return self.now(source, now) if plan is None else (source, plan)

    def whole(self, source: Source, now: float, without: Collection[str] = ()) -> Plan | None:
        """The cuts of the plan that serves, or did, and whole slices elsewhere where that must be: so the others keep
        their cells, and those of a slice that moves may be carried. None: there is no room for it."""
        if not self.sound or self.planned is None or source is not self.main:
            return None
        here = [member for member in self.members.values() if not member.drained and member.id not in without]
        there = {member.id: loaded(member) for member in here}
        return without_loading(self.planned, there, self._place) or self._moved(self.planned, there, now)

    def _moved(self, plan: Plan, there: Mapping[str, Collection[Layers]], now: float) -> Plan | None:
        avoided = self.hops.avoided(now)
        nodes = [self.members[node].capacity for node in sorted(there.keys() - avoided)]
        return moved(plan, there, nodes, self._need(self.main), MAX_STAGES, self._place)

    def now(self, source: Source, now: float) -> tuple[Source, Plan]:
        """What to serve, and a plan for the nodes that are here.

        Raises PlanError: nodes are awaited (code WAITING), all of them before the cluster's first plan, later a lost
        one for ``rejoin_s`` if no model fits those left; or none fits.
        """
        here = sum(not member.drained for member in self.members.values())
        wanted = self.wanted()
        if here < wanted and not self.served and self.kept is None:
            raise PlanError(f"{here} of {wanted} nodes have joined", code=WAITING)
        if not self.served and self.owner is not None and (left := self.owner.awaited_s(now)):
            raise PlanError("nodes of the owner's plan have not joined yet", code=WAITING, retry_after_s=left)
        if self.kept is not None and not self.served and (plan := self._kept_plan(self.kept, source, now)) is not None:
            return source, plan
        try:
            return self.main, self.of(self.main, now)
        except PlanError as error:
            for smaller in self.fallbacks if self.alone() else ():
                with contextlib.suppress(PlanError):
                    return smaller, self.of(smaller, now)
            left = self.gone_at + self.settings.rejoin_s - now
            if here >= wanted or left <= 0:
                raise
            raise PlanError(
                f"a node was lost ({here} of {wanted} are here): it is waited for, at most "
                f"{self.settings.rejoin_s:.0f} s, as the model does not fit the others: {error.message}",
                code=WAITING,
                retry_after_s=left,
            ) from None

    def _kept_plan(self, kept: KeptPlan, source: Source, now: float) -> Plan | None:
        """The plan whose slices the nodes hold; None: it is no more possible. Raises PlanError: they are awaited."""
        left, missing = kept.until - now, kept.awaited - self.members.keys()
        if missing and left > 0:
            raise PlanError(f"{len(missing)} nodes have not come over yet", code=WAITING, retry_after_s=left)
        if not all(node in self.members for node in kept.nodes):
            return None
        capacities = [self.members[node].capacity for node in kept.nodes]
        with contextlib.suppress(PlanError, IllegalCutError):
            return self._with_cuts(source, capacities, kept.cuts)
        return None

    def of(self, source: Source, now: float, without: Collection[str] = ()) -> Plan:
        """The best plan of a model for the nodes that are here. Raises PlanError."""
        nodes = sorted(self.members.values(), key=lambda m: (m.name, m.id))
        here = [member for member in nodes if not member.drained and member.id not in without]
        assert self.owner is not None
        if (own := self.owner.owned(source, here)) is not None:
            return own
        if self.settings.cuts:
            capacities = [member.capacity for member in here]
            return self._with_cuts(source, capacities, self.settings.cuts)
        if avoided := self.hops.avoided(now):
            with contextlib.suppress(PlanError):  # then those that were not reached are tried again
                return self.owner.find(source, [member for member in here if member.id not in avoided])
        return self.owner.find(source, here)

    def _with_cuts(self, source: Source, capacities: Sequence[Capacity], cuts: Sequence[int]) -> Plan:
        there = {node: member.runs(source).costs for node, member in self.members.items()}
        return with_cuts(source.costs, source.cuts, self._need(source), capacities, cuts, there)

    def _place(self, node: str, layers: Layers) -> StagePlan:
        """A slice of the model that is wanted, on a node that is here."""
        return stage_plan(self.members[node].runs(self.main).costs, self._need(self.main), node, *layers)

    def _need(self, source: Source) -> Need:
        return need(self.settings, source, served_context(self.settings, source))
