"""The owner's hand on the plan: what the planner would do, plans committed and taken back, overrides, balance.

Theory. ``propose`` looks and changes nothing: it surveys the cluster and asks the pure planner, in a thread. ``commit``
is the same and then a move beside what serves (``moves``). A plan that its owner committed counts until they let the
planner decide again: while one of its nodes is away it is set aside, which is told, and it comes back with the node.
Everything that is decided by hand is the state of an ``OwnedPlan`` and of overrides by node id; both are kept by the
cluster (``owner_text``, ``lent``) and given back by ``restore``.

Invariants. One change at a time. An override is in force only once what serves fits it. What is committed is what was
asked for: a cut that had to be moved is refused, with the one that is possible.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dwarfstar_engine.cluster.state import MAX_ENTRIES
from dwarfstar_engine.errors import DwarfStarError, IllegalCutError, NoModel, PeerError, PlanError, SettingsError
from dwarfstar_engine.node.epoch import Epoch
from dwarfstar_engine.node.journal import Journal, Kind
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.node.moves import Moves, find
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.planner import served_context
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.node.surveyor import Survey, Surveyor
from dwarfstar_engine.plan.advisor import advise
from dwarfstar_engine.plan.capacity import parse_override
from dwarfstar_engine.plan.cost import cluster_costs
from dwarfstar_engine.plan.forecast import Objective, Planned, Strategy, Wishes
from dwarfstar_engine.plan.owned import OwnedPlan, from_text, to_text
from dwarfstar_engine.plan.planner import NO_WISHES, plan_cluster, value
from dwarfstar_engine.plan.predict import plan_of, predict
from dwarfstar_engine.plan.proportional import Need, Plan, stage_plan
from dwarfstar_engine.plan.propose import Proposal, Wanted, propose
from dwarfstar_engine.plan.shown import delta_views, plan_view
from dwarfstar_engine.plan.standby import whole_bytes
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import CommitView, OverrideView, PlanRequest, PlanView, ProposalView, ReadView
from dwarfstar_engine.wire.generated import control_pb2 as pb

STALE = "stale_epoch"
MAX_UNDO = 16  # plans that can be taken back; further back nobody remembers what it was
MEMORY = 4  # questions to the planner that are not asked again: the coordinator asks the same twice a second
STICKS = 0.1  # of the objective: a plan that serves is left for one that is better by more only; figures have noise
LEAST_GIB = 0.01  # steps in which a smallest value is told


class Host(Protocol):
    """A pipeline, as it is seen from here."""

    epoch: int
    journal: Journal
    moves: Moves

    @property
    def settings(self) -> Settings: ...
    @property
    def source(self) -> Source: ...
    @property
    def members(self) -> Mapping[str, Member]: ...
    @property
    def planned(self) -> Plan | None: ...
    @property
    def ring(self) -> Epoch: ...
    @property
    def serving(self) -> bool: ...
    @property
    def context(self) -> int: ...
    @property
    def tok_s(self) -> float:
        """Of all streams, now."""

    @property
    def measured_ms(self) -> tuple[float, ...]:
        """Of each stage that runs, for a token; 0.0: none went through it yet."""

    @property
    def alone_ms(self) -> tuple[float, ...]:
        """The same while nothing else goes on; empty: nothing serves."""

    def need(self) -> Need: ...


@dataclass(frozen=True, slots=True)
class Decided:
    """What all pipelines have in common. lent: overrides by node id. surveyor: what was measured."""

    lent: dict[str, str] = field(default_factory=dict)
    surveyor: Surveyor = field(default_factory=Surveyor)


class Steering:
    """See the module. All calls come from the event loop."""

    def __init__(self, host: Host, decided: Decided) -> None:
        self._host = host
        self.surveyor, self.lent = decided.surveyor, decided.lent
        self._owned: OwnedPlan | None = None
        self._coming: OwnedPlan | None = None  # the owner's next one, while it is brought up
        self._undo: list[tuple[OwnedPlan | None, Plan]] = []
        self._aside = False
        self._order = asyncio.Lock()
        self._found: list[tuple[object, Plan | PlanError]] = []
        self._awaited_until = math.inf

    # --- what is kept ---

    def restore(self, owner_text: object, overrides: Mapping[str, object]) -> None:
        """As the cluster has kept it."""
        self._owned, self._aside, self._undo = from_text(owner_text), False, []
        self.lent.clear()
        for node, text in overrides.items():
            with contextlib.suppress(SettingsError):  # another release wrote it
                if isinstance(text, str) and text:
                    parse_override(text)
                    self.lent[node] = text
        for member in self._host.members.values():
            self._lend(member)

    def other_model(self, owner_text: str) -> None:
        """Another model is served: plans of the one before are none of it. owner_text: kept for this one."""
        self._owned, self._aside, self._undo, self._found = from_text(owner_text), False, [], []

    @property
    def order(self) -> asyncio.Lock:
        """Held while a plan is changed."""
        return self._order

    @property
    def decided(self) -> bool:
        """Whether the owner's plan counts, rather than the planner's."""
        return self._owned is not None

    @property
    def owner_text(self) -> str:
        return to_text(self._owned)

    def joined(self, member: Member) -> None:
        """A node may be planned for."""
        self._lend(member)

    def _lend(self, member: Member) -> None:
        before, member.lent = member.lent, self.lent.get(member.id, "")
        if member.lent != before:
            told = pb.Lend(bytes=member.usable_bytes if member.lent else 0)
            with contextlib.suppress(PeerError):  # it does not read: it will be lost
                member.send(pb.CoordinatorMessage(lend=told))

    # --- the coordinator's plans ---

    def awaited_s(self, now: float) -> float:
        """How long, from ``now``, nodes of the owner's plan are waited for before the first plan; 0.0: none is."""
        owned = self._owned
        if owned is None or owned.fingerprint != self._host.source.fingerprint:
            return 0.0
        if all(node in self._host.members for node in owned.nodes):
            return 0.0
        self._awaited_until = min(self._awaited_until, now + self._host.settings.rejoin_s)
        return max(0.0, self._awaited_until - now)

    def owned(self, source: Source, here: Sequence[Member]) -> Plan | None:
        """The owner's plan, if these nodes can have it."""
        own = self._coming or self._owned
        nodes = {member.id: member for member in here}
        if own is None or own.fingerprint != source.fingerprint or not all(node in nodes for node in own.nodes):
            return None
        ends = [0, *(end for _, end in own.stages)]
        if ends[-1] != source.layers or not set(ends[1:-1]) <= set(source.cuts):
            return None
        room = need(self._host.settings, source, served_context(self._host.settings, source))
        stages = [
            stage_plan(nodes[node].runs(source).costs, room, node, a, b)
            for (node, b), a in zip(own.stages, ends[:-1], strict=True)
        ]
        if any(whole_bytes(stage, room) > nodes[stage.node].usable_bytes for stage in stages):
            return None
        left_out = tuple((node, "its owner's plan has no layer for it") for node in nodes if node not in own.nodes)
        return Plan(tuple(stages), left_out)

    def find(self, source: Source, here: Sequence[Member]) -> Plan:
        """The planner's plan for these nodes, as the owner wishes as far as that is possible. Raises PlanError."""
        if not here:
            raise PlanError(
                "no node has joined yet: start one with `dwarfstar node`", code="no_nodes", retry_after_s=2.0
            )
        host, own = self._host, self._owned
        survey = self.surveyor.survey(here, source, host.settings, served_context(host.settings, source))
        strategy = own.strategy if own else Strategy(host.settings.strategy)
        objective = own.objective if own else Objective(host.settings.objective)
        names = survey.names
        wishes = NO_WISHES
        if own is not None:
            pins = {names[node]: layers for node, layers in own.pins.items() if node in names}
            wishes = Wishes(pins, frozenset(names[node] for node in own.excluded if node in names))
        try:
            plan = self._ask(survey, strategy, objective, wishes)
        except (PlanError, IllegalCutError):
            if wishes == NO_WISHES:
                raise
            plan = self._ask(survey, strategy, objective, NO_WISHES)
        near = strategy is Strategy.FASTEST and source is host.source and self._is_near(plan, survey, objective)
        return host.planned if near and host.planned is not None else plan

    def _is_near(self, plan: Plan, survey: Survey, objective: Objective) -> bool:
        """Whether the plan that serves is as good, but for what measuring again may change."""
        host, names = self._host, survey.names
        stages = host.planned.stages if host.serving and host.planned is not None else ()
        nodes = [stage.node for stage in stages]
        if not nodes or len(set(nodes)) < len(nodes) or not all(node in names for node in nodes):
            return False
        costs = cluster_costs(survey.cluster, survey.job)
        now, then = (
            predict(costs, plan_of(costs, [(names[one.node], *one.layers) for one in found]).stages)
            for found in (stages, plan.stages)
        )
        return now.fits and value(now, objective) >= value(then, objective) * (1 - STICKS)

    def _ask(self, survey: Survey, strategy: Strategy, objective: Objective, wishes: Wishes) -> Plan:
        question = (survey, strategy, objective, wishes)
        for asked, answer in self._found:
            if asked == question:
                if isinstance(answer, PlanError):
                    raise answer
                return answer
        try:
            plan: Plan | PlanError = survey.with_ids(
                plan_cluster(survey.cluster, survey.job, strategy, objective, wishes).plan
            )
        except PlanError as error:
            plan = error
        self._found = [*self._found, (question, plan)][-MEMORY:]
        if isinstance(plan, PlanError):
            raise plan
        return plan

    def made(self, plan: Plan) -> None:
        """This plan is brought up now."""
        if self._coming is not None and self._coming.is_of(plan):
            self._owned, self._coming = self._coming, None
        own = self._owned
        if own is None:
            return
        aside = not own.is_of(plan)
        if aside != self._aside:
            self._aside = aside
            here = self._host.members
            gone = [node for node in own.nodes if node not in here]
            why = f"{len(gone)} of its nodes are gone" if gone else "its nodes have not the room"
            text = f"the owner's plan is set aside: {why}; it counts again when they are back, until `plan --auto`"
            self._host.journal.add(Kind.OWNER_PLAN, text if aside else "the owner's plan counts again")

    # --- proposals ---

    def _survey(self, lent: Mapping[str, str] | None = None) -> Survey:
        host = self._host
        nodes = sorted(host.members.values(), key=lambda one: (one.name, one.id))
        here = [one for one in nodes if not one.drained]
        if not here:
            raise PlanError("no node has joined yet: start one with `dwarfstar node`", code="no_nodes")
        if not host.source.loaded:
            raise PlanError(NoModel().message, code=NoModel.code)
        return self.surveyor.survey(here, host.source, host.settings, host.context, lent)

    def learn(self, now_s: float) -> None:
        """Tell the surveyor what stages take in use: now and then, as a ring may break. now_s: monotonic.

        Not of a node with several stages, which may be of devices that differ.
        """
        host, surveyor = self._host, self.surveyor
        nodes = Counter(stage.member.id for stage in host.ring.stages)
        for stage, ms in zip(host.ring.stages, host.alone_ms, strict=False):
            if ms and nodes[stage.member.id] == 1:
                file = stage.member.runs(host.source)
                surveyor.ran(host.source, file, stage.member.id, stage.plan.layers, ms, now_s)
        surveyor.forget(now_s)

    def survey_present(self) -> tuple[Survey, Planned | None]:
        """The cluster, and the plan that runs. Raises PlanError: no node is here."""
        survey = self._survey()
        return survey, self._present(survey)

    def _wanted(self, request: PlanRequest, survey: Survey) -> Wanted:
        settings, own, names = self._host.settings, None if request.auto else self._owned, survey.names
        strategy = request.strategy or (own.strategy if own else settings.strategy)
        objective = request.objective or (own.objective if own else settings.objective)
        wishes = Wishes(
            {names.get(node, node): layers for node, layers in request.pins.items()},
            frozenset(names.get(node, node) for node in request.excluded),
        )
        order = tuple(names.get(node, node) for node in request.order)
        cuts = request.cuts
        if cuts is None and request.auto and settings.cuts:
            cuts = settings.cuts
        return Wanted(Strategy(strategy), Objective(objective), cuts, order, wishes)

    def _present(self, survey: Survey) -> Planned | None:
        """The plan that runs, with its forecast; None: nothing does, or a node of it goes."""
        host = self._host
        stages, names = host.ring.stages, survey.names
        if not host.serving or not all(stage.member.id in names for stage in stages):
            return None
        costs = cluster_costs(survey.cluster, survey.job)
        left_out = [(names.get(node, node), why) for node, why in (host.planned.excluded if host.planned else ())]
        plan = plan_of(costs, [(names[stage.member.id], *stage.plan.layers) for stage in stages], left_out)
        settings = host.settings
        strategy, objective = Strategy(settings.strategy), Objective(settings.objective)
        return Planned(plan, predict(costs, plan.stages), strategy, objective)

    async def propose(self, request: PlanRequest) -> ProposalView:
        """The plan that runs, and the one asked for. Nothing changes. Raises PlanError: no node is here."""
        host = self._host
        survey = self._survey()
        present, wanted = self._present(survey), self._wanted(request, survey)
        measured, own, names = host.measured_ms, self._owned, survey.names
        said = "given" if own is not None and not self._aside else ""
        asked = survey
        if request.context is not None or request.wire is not None:
            context = min(request.context or host.context, host.source.train_context)
            settings = host.settings.model_copy(update={"wire": request.wire or host.settings.wire})
            asked = self.surveyor.survey(self._members(survey), host.source, settings, context)

        def answer() -> ProposalView:
            shown = None
            if present is not None:
                told = advise(survey.cluster, survey.job, present)
                shown = plan_view(host.source.name, survey.job, present, told, strategy=said, measured_ms=measured)
            view = ProposalView(
                epoch=host.epoch,
                legal_cuts=host.source.cuts,
                present=shown,
                proposed=None,
                owner=own is not None,
                pins={names.get(node, node): layers for node, layers in own.pins.items()} if own else {},
                excluded=tuple(sorted(names.get(node, node) for node in own.excluded)) if own else (),
                undo=bool(self._undo),
                tok_s=round(host.tok_s, 2),
            )
            try:
                proposal = propose(asked.cluster, asked.job, wanted, present.nodes if present else ())
            except DwarfStarError as error:
                return view.model_copy(update={"error": error.message, "code": error.code})
            costs = cluster_costs(asked.cluster, asked.job)
            return view.model_copy(
                update={
                    "proposed": _proposed_view(host.source.name, asked, wanted, proposal),
                    "delta": delta_views(costs, present.plan, proposal.planned.plan) if present else (),
                    "clamped": proposal.clamped,
                }
            )

        return await asyncio.to_thread(answer)

    def _members(self, survey: Survey) -> list[Member]:
        return [self._host.members[node] for node in survey.ids.values()]

    # --- changes ---

    def _serves(self, base_epoch: int) -> Plan:
        """The plan that serves. Raises PlanError: it is of another epoch."""
        host = self._host
        if not host.serving or host.planned is None:
            raise PlanError("nothing is served now: wait until it is", code="not_serving")
        if base_epoch not in (0, host.epoch):
            raise PlanError(
                f"this was proposed for epoch {base_epoch}, and epoch {host.epoch} serves now: look at the plan again",
                code=STALE,
            )
        return host.planned

    async def commit(self, request: PlanRequest, base_epoch: int) -> CommitView:
        """Carry a plan out; returns when it serves. Raises DwarfStarError: what served goes on."""
        host = self._host
        if request.context not in (None, host.context):
            raise PlanError("the context is set when the engine starts: --context there", code="needs_restart")
        if request.wire not in (None, host.settings.wire):
            raise PlanError("the wire's precision is set when the engine starts: --wire there", code="needs_restart")
        async with self._order:
            self._serves(base_epoch)
            survey = self._survey()
            wanted, present = self._wanted(request, survey), self._present(survey)
            proposal = await asyncio.to_thread(
                propose, survey.cluster, survey.job, wanted, present.nodes if present else ()
            )
            if proposal.clamped:
                raise PlanError(f"not as asked: {'; '.join(proposal.clamped)}", code="not_possible")
            plan = survey.with_ids(proposal.planned.plan)
            owned = None if request.auto else self._as_owned(plan, wanted, survey)
            return await self._carry_out(plan, owned, "its owner has committed a plan", base_epoch)

    def _as_owned(self, plan: Plan, wanted: Wanted, survey: Survey) -> OwnedPlan:
        return OwnedPlan(
            self._host.source.fingerprint,
            tuple((stage.node, stage.layers[1]) for stage in plan.stages),
            wanted.strategy,
            wanted.objective,
            {survey.ids[name]: layers for name, layers in wanted.wishes.pins.items()},
            frozenset(survey.ids[name] for name in wanted.wishes.excluded),
        )

    async def undo(self, base_epoch: int) -> CommitView:
        """Back to the plan before the last change. Raises DwarfStarError."""
        async with self._order:
            self._serves(base_epoch)
            if not self._undo:
                raise PlanError("there is no plan to go back to", code="nothing_to_undo")
            owned, plan = self._undo[-1]
            here = self._host.members
            if gone := [stage.node for stage in plan.stages if stage.node not in here]:
                raise PlanError(f"{len(gone)} nodes of the plan before are gone: propose another", code="node_gone")
            left = self._undo[:-1]
            view = await self._carry_out(plan, owned, "its owner has gone back to the plan before", base_epoch)
            self._undo = left  # without the way back
            return view

    async def balance(self, cuts: tuple[int, ...], why: str) -> CommitView:
        """Move boundaries of the plan that runs, if that is loaded beside it. Raises DwarfStarError."""
        async with self._order:
            base = self._host.epoch
            plan = self._serves(base)
            survey = self._survey()
            order = tuple(survey.names[stage.node] for stage in plan.stages)
            settings = self._host.settings
            wanted = Wanted(Strategy(settings.strategy), Objective(settings.objective), cuts, order)
            proposal = await asyncio.to_thread(propose, survey.cluster, survey.job, wanted)
            if proposal.clamped:
                raise PlanError("; ".join(proposal.clamped), code="not_possible")
            return await self._carry_out(survey.with_ids(proposal.planned.plan), None, why, base, beside_only=True)

    async def _carry_out(
        self, plan: Plan, owned: OwnedPlan | None, why: str, base_epoch: int, *, beside_only: bool = False
    ) -> CommitView:
        host = self._host
        before = self._serves(base_epoch)
        was, before_view = self._owned, self.present_view()
        pids = {stage.event.pid for stage in host.ring.stages if stage.event is not None}
        loaded_first = True
        if plan.stages == before.stages:
            self._owned, self._aside = owned, False
        else:
            if owned is None:
                self._owned = None
            self._coming = owned
            try:
                loaded_first = await host.moves.change(plan, why, beside_only=beside_only)
            except BaseException:
                self._owned = was
                raise
            finally:
                self._coming = None
            self._undo = [*self._undo, (was, before)][-MAX_UNDO:]
        text = f"epoch {host.epoch} serves a plan as asked: {why}"
        host.journal.add(Kind.OWNER_PLAN, text, details={"epoch": host.epoch, "loaded_first": int(loaded_first)})
        return CommitView(
            epoch=host.epoch,
            loaded_first=loaded_first,
            before=before_view,
            after=self.present_view(),
            reads=self._reads(pids),
        )

    def present_view(self) -> PlanView:
        """The plan that serves. Raises PlanError: none does."""
        survey = self._survey()
        present = self._present(survey)
        if present is None:
            raise PlanError("nothing is served now: wait until it is", code="not_serving")
        said = "given" if self._owned is not None and not self._aside else ""
        measured = self._host.measured_ms
        return plan_view(self._host.source.name, survey.job, present, None, strategy=said, measured_ms=measured)

    def _reads(self, before: Collection[int]) -> tuple[ReadView, ...]:
        """What new stage processes have read from disks."""
        return tuple(
            ReadView(node=stage.member.name, layers=stage.plan.layers, read_gib=round(stage.read_bytes / GIB, 4))
            for stage in self._host.ring.stages
            if stage.event is not None and stage.event.pid not in before
        )

    # --- overrides ---

    async def override(self, wanted: str, text: str, *, replan: bool) -> OverrideView:
        """Set what a node lends; empty: as it was started. Raises DwarfStarError: nothing has changed."""
        host = self._host
        async with self._order:
            member = find(host.members.values(), wanted)
            lent = text.strip()
            if lent:
                parse_override(lent)
            if lent and member.id not in self.lent and len(self.lent) >= MAX_ENTRIES:
                raise SettingsError(f"{MAX_ENTRIES} nodes have an override, which is the most: reset some")
            held, member.lent = member.lent, lent
            usable = member.usable_bytes
            member.lent = held
            serves = [stage.plan for stage in host.ring.stages if stage.member is member]
            in_use = sum(whole_bytes(stage, host.need()) for stage in serves)
            replanned = False
            if usable < in_use or (replan and self._owned is None):
                if not replan:
                    least = math.ceil(in_use / GIB / LEAST_GIB) * LEAST_GIB
                    layers = ", ".join(f"{stage.layers[0]}–{stage.layers[1] - 1}" for stage in serves)
                    raise PlanError(
                        f"{member.name} serves layers {layers}, for which it must lend {least:.2f} GiB at least "
                        f"({lent or 'that'} is {usable / GIB:.2f} GiB): give as much, or --replan to move layers",
                        code="in_use",
                    )
                replanned = await self._replan(member, lent)
            self.lent.pop(member.id, None)
            if lent:
                self.lent[member.id] = lent
            self._lend(member)
            said = f"lends {member.usable_bytes / GIB:.2f} GiB" + (f", as its owner set it: {lent}" if lent else "")
            host.journal.add(Kind.OVERRIDE, f"{member.name} {said}", member.name, {"override": lent})
            return OverrideView(
                node=member.name,
                override=member.override,
                effective_vram_gib=round(member.usable_bytes / GIB, 3),
                replanned=replanned,
            )

    async def _replan(self, member: Member, lent: str) -> bool:
        """Serve a plan in which a node lends as ``lent`` says; whether that is another one. Raises DwarfStarError."""
        before = self._serves(0)
        survey = self._survey({member.id: lent})
        wanted = self._wanted(PlanRequest(auto=True), survey)
        proposal = await asyncio.to_thread(propose, survey.cluster, survey.job, wanted)
        plan = survey.with_ids(proposal.planned.plan)
        if plan.stages == before.stages:
            return False
        await self._carry_out(plan, None, f"what {member.name} lends has changed", 0)
        return True


def _proposed_view(model: str, survey: Survey, wanted: Wanted, proposal: Proposal) -> PlanView:
    planned = proposal.planned
    if wanted.cuts is not None:
        return plan_view(model, survey.job, planned, None, strategy="given")
    return plan_view(model, survey.job, planned, advise(survey.cluster, survey.job, planned, wanted.wishes))
