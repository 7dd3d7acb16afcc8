"""What a coordinator does beside the epoch that serves: the next plan is loaded before the old one ends, copies of
slices wait for a loss, and nodes are drained.

Theory. A switch from one plan to another costs the streams a new ring and the replay of their tokens; loading is what
takes long, and it happens here, while the old epoch serves: the slices that are missing are assigned as standbys, and
when all are loaded the pipeline is told to ``switch``. If that fails the old epoch goes on. Nodes that have no room for
both slices at a time are switched when nobody is served, or, where a node is to leave, with the loading in between.

``tick`` starts one piece of work at a time, best first: a better plan, then copies. A drain ends what goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Collection, Coroutine, Iterable, Mapping
from typing import Any, Protocol

from dwarfstar_engine.cluster.membership import MAX_NODES
from dwarfstar_engine.errors import DwarfStarError, PeerError, PlanError, StageError
from dwarfstar_engine.node.beside import LOADED, NO_ROOM, Beside, loaded
from dwarfstar_engine.node.epoch import Epoch
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.room import MAX_STAGES
from dwarfstar_engine.plan.proportional import Need, Plan, StagePlan
from dwarfstar_engine.plan.standby import Copy, Layers, copies, whole_bytes
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import StandbyView
from dwarfstar_engine.wire.generated import control_pb2 as pb

log = logging.getLogger("dwarfstar.coordinator")

LOAD_S = 600.0  # a slice of a large model from a slow disk
REST_S = 2.0  # after an epoch began: streams are replayed, which loading would slow down
REPLAN_IDLE_S = 2.0  # without a request: then nobody minds a switch
REPLAN_EVERY_S = 30.0  # between switches to a better plan under streams, which pause for each, as for a lost node
AGAIN_S = 30.0  # after something could not be loaded beside the epoch
IDLE_LOOK_S = 0.2


class Pipeline(Protocol):
    """A pipeline, as it is seen from here."""

    epoch: int

    @property
    def settings(self) -> Settings: ...
    @property
    def term(self) -> int: ...
    @property
    def members(self) -> Mapping[str, Member]: ...
    @property
    def planned(self) -> Plan | None: ...
    @property
    def gone_at(self) -> float:
        """Monotonic time at which a node was lost last."""

    @property
    def ring(self) -> Epoch: ...
    @property
    def serving(self) -> bool: ...
    def idle_s(self, now: float) -> float:
        """How long nobody has asked anything."""

    def plan(self, without: Collection[str] = ()) -> Plan:
        """The best one for the nodes that are here. Raises PlanError."""

    def whole(self, without: Collection[str]) -> Plan | None:
        """The present cuts on the other nodes; None: they have no room for whole slices."""

    def need(self) -> Need: ...
    def stage_plan(self, node: str, layers: Layers) -> StagePlan: ...
    def assignment(self, plan: StagePlan, *, standby: bool) -> pb.Assign: ...
    def switch(self, plan: Plan, why: str) -> None:
        """End the epoch, and bring up the next one with this plan; streams are carried over."""

    def stir(self) -> None:
        """What can be planned with has changed."""

    @property
    def dispensable(self) -> bool:
        """Whether other pipelines serve without it."""

    def hand_over(self, why: str) -> None:
        """Go down for them: they carry its streams."""


class Moves:
    """See the module. All calls come from the event loop."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.beside = Beside(pipeline.members)
        self._work: asyncio.Task[None] | None = None
        self._wishes: dict[str, asyncio.Task[None]] = {}  # by node: each has one at most
        self._drained: dict[str, str] = {}  # ids, and the processes that were drained
        self._order = asyncio.Lock()  # held by a drain
        self._settled = asyncio.Event()  # an epoch serves, or there is no plan
        self._no_plan: DwarfStarError | None = None
        self._crowded: Plan | None = None  # there is no room for it beside the present one
        self._switched_at = self._failed_at = self._served_at = -math.inf

    # --- what the coordinator tells ---

    def came(self, member: Member) -> None:
        """A node is here. A drained one that was started again is planned for again."""
        if self._drained.get(member.id) == member.instance:
            member.drained = True
        else:
            self._drained.pop(member.id, None)
        self._crowded = None
        self.beside.stir()

    def served(self, now: float) -> None:
        """An epoch serves. ``now``: monotonic, s."""
        self._no_plan, self._served_at = None, now
        self._settled.set()

    def no_plan(self, error: DwarfStarError) -> None:
        """There is no plan for the nodes that are left."""
        self._no_plan = error
        self._settled.set()

    @property
    def order(self) -> asyncio.Lock:
        """Held while a plan is changed or a node is drained."""
        return self._order

    def stop(self) -> None:
        """The epoch is over: what is done beside it is in vain."""
        work, self._work = self._work, None
        if work is not None and work is not asyncio.current_task():
            work.cancel()

    def close(self) -> None:
        """The engine ends."""
        self.stop()
        for wish in list(self._wishes.values()):
            wish.cancel()

    def tick(self, now: float) -> None:
        """Begin what is to be done. ``now``: monotonic, s."""
        pipeline = self._pipeline
        busy = self._work is not None or self._order.locked()
        if not pipeline.serving or busy or now - self._served_at < REST_S:
            return
        wanted = self._copies()
        self._tidy(wanted)
        plan = self._better(now)
        if plan is not None:
            self._start(self._improve(plan))
        elif now - self._failed_at > AGAIN_S:
            missing = [one for one in wanted if one.stage.layers not in loaded(pipeline.members[one.stage.node])]
            if missing:
                self._start(self._copy(missing))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._work = asyncio.create_task(work, name="moves")
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        if self._work is task:
            self._work = None
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("a fault beside the epoch", exc_info=fault)
            self._failed_at = time.monotonic()

    # --- copies ---

    def _copies(self) -> tuple[Copy, ...]:
        pipeline = self._pipeline
        if not pipeline.settings.standby:
            return ()
        nodes = [member for member in pipeline.members.values() if not member.drained]
        nodes.sort(key=lambda member: (member.name, member.id))
        held = {member.id: loaded(member) for member in nodes}
        stages = [stage.plan for stage in pipeline.ring.stages]
        capacities = [member.capacity for member in nodes]
        return copies(stages, capacities, pipeline.need(), MAX_STAGES, held, pipeline.stage_plan)

    def _own(self, member: Member) -> set[Layers]:
        return {stage.plan.layers for stage in self._pipeline.ring.stages if stage.member is member}

    def _tidy(self, wanted: Iterable[Copy]) -> None:
        """Give back what neither serves nor waits for a loss."""
        pipeline = self._pipeline
        for member in pipeline.members.values():
            if not pipeline.ring.has(member) and not member.drained:
                continue  # it came back, perhaps with the slice that it gets again
            keep = self._own(member) | {one.stage.layers for one in wanted if one.stage.node == member.id}
            if member.tidied != pipeline.epoch or member.held.keys() - keep:
                member.tidied = pipeline.epoch
                self.beside.release(member, keep, pipeline.term, pipeline.epoch)

    async def _copy(self, missing: Iterable[Copy]) -> None:
        pipeline = self._pipeline
        for one in missing:
            member = pipeline.members.get(one.stage.node)
            if member is None:
                return
            try:
                await self.beside.load([(member, pipeline.assignment(one.stage, standby=True))], LOAD_S)
            except StageError as error:
                log.warning("a copy of layers %d–%d is missing: %s", *_shown(one.stage.layers), error.message)
                self._failed_at = time.monotonic()
            else:
                log.info("%s has a copy of layers %d–%d", member.name, *_shown(one.stage.layers))

    # --- the next plan ---

    def _better(self, now: float) -> Plan | None:
        """A plan that uses nodes better than the present one, if it is time for it."""
        pipeline, mode = self._pipeline, self._pipeline.settings.replan
        idle = pipeline.idle_s(now) >= REPLAN_IDLE_S
        ring = pipeline.ring
        unused = {member.id for member in pipeline.members.values() if not member.drained} - ring.nodes
        back = now - pipeline.gone_at > pipeline.settings.rejoin_s  # else it may be here again in a moment
        doubled = len(ring.nodes) < len(ring.stages) and back
        if mode == "off" or not (unused or doubled) or now - self._failed_at < AGAIN_S:
            return None
        paused = max(self._switched_at, pipeline.gone_at)
        if not idle and (mode == "idle" or now - paused < REPLAN_EVERY_S):
            return None
        try:
            plan = pipeline.plan()
        except PlanError:
            return None  # it was possible before they came; it goes on as it is
        if plan == pipeline.planned or not (doubled or any(stage.node in unused for stage in plan.stages)):
            return None
        return None if plan == self._crowded and not idle else plan

    async def _improve(self, plan: Plan) -> None:
        pipeline = self._pipeline
        try:
            if plan != self._crowded:
                await self._prepare(plan)
        except StageError as error:
            if error.code == NO_ROOM:
                log.info("a better plan waits until nobody is served: %s", error.message)
                self._crowded = plan
            else:
                log.warning("a better plan cannot be loaded, epoch %d goes on: %s", pipeline.epoch, error.message)
                self._failed_at = time.monotonic()
            return
        while pipeline.settings.replan == "idle" and pipeline.idle_s(time.monotonic()) <= 0:  # noqa: ASYNC110 - told by nobody
            await asyncio.sleep(IDLE_LOOK_S)
        self._switched_at = time.monotonic()
        pipeline.switch(plan, "a better plan is loaded")

    async def _prepare(self, plan: Plan) -> None:
        """Load what a plan needs and nodes have not. Raises StageError, of code NO_ROOM if that is what is missing."""
        pipeline = self._pipeline
        wanted: list[tuple[Member, pb.Assign]] = []
        for stage in plan.stages:
            member = pipeline.members.get(stage.node)
            if member is None:
                raise StageError("a node of the next plan was lost")
            if stage.layers not in loaded(member):
                self._make_room(member, stage)
                wanted.append((member, pipeline.assignment(stage, standby=True)))
        await self.beside.load(wanted, LOAD_S)

    def _make_room(self, member: Member, stage: StagePlan) -> None:
        """Have copies make way for a stage of the next plan. Raises StageError (NO_ROOM) if that is not enough."""
        pipeline, need = self._pipeline, self._pipeline.need()

        def takes(slices: Iterable[Layers]) -> int:
            return sum(whole_bytes(pipeline.stage_plan(member.id, layers), need) for layers in slices)

        own = self._own(member) | {stage.layers}
        if takes(own) > member.usable_bytes or len(own) > MAX_STAGES:
            a, b = _shown(stage.layers)
            raise StageError(f"{member.name} has no room for layers {a}–{b} beside those it serves", code=NO_ROOM)
        both = own | set(member.held)
        if takes(both) > member.usable_bytes or len(both) > MAX_STAGES:
            self.beside.release(member, own, pipeline.term, pipeline.epoch)

    async def change(self, plan: Plan, why: str, *, beside_only: bool = False) -> bool:
        """Switch to a plan; whether it was loaded first. Returns when it serves. beside_only: or not at all.

        Raises DwarfStarError: what served goes on, or another plan has taken its place.
        """
        pipeline = self._pipeline
        async with self._order:
            self.stop()
            epoch, prepared = pipeline.epoch, True
            try:
                await self._prepare(plan)
            except StageError as error:
                if error.code != NO_ROOM or beside_only:
                    raise
                log.warning("streams wait while layers are loaded: %s", error.message)
                prepared = False
            if pipeline.epoch != epoch or not pipeline.serving:
                raise PlanError("the pipeline has changed meanwhile: look at the plan again", code="stale_epoch")
            self._settled.clear()
            self._switched_at = time.monotonic()
            pipeline.switch(plan, why)
            async with asyncio.timeout(LOAD_S):
                while not pipeline.serving:
                    await self._settled.wait()
                    self._settled.clear()
                    if self._no_plan is not None:
                        raise self._no_plan
            if pipeline.planned is None or pipeline.planned.stages != plan.stages:
                raise PlanError("that plan could not be brought up: another one serves", code="not_brought_up")
            return prepared

    # --- leaving ---

    async def drain(self, member: Member) -> bool:
        """Move a node's layers to the others; whether that took them no loading. It gets none until ``undo``, or until
        its process is another one. Raises DwarfStarError: it has its layers still."""
        pipeline = self._pipeline
        async with self._order:
            if pipeline.members.get(member.id) is not member:
                raise PeerError(f"node {member.name} is gone", code="no_such_node")
            used = pipeline.ring.has(member)
            plan = self._plan_without(member) if used else None
            self._mark(member)
            try:
                if used and plan is None:
                    pipeline.hand_over(f"{member.name} is drained")
                prepared = plan is None or await self._move(member, plan)
            except BaseException:
                self.undo(member)
                raise
            self.beside.release(member, (), pipeline.term, pipeline.epoch)
            with contextlib.suppress(PeerError):
                member.send(pb.CoordinatorMessage(drained=pb.Drained()))
            log.info("node %s is drained", member.name)
            return prepared

    def _plan_without(self, member: Member) -> Plan | None:
        """None: there is none, and none is needed. While streams run their cells count for more than how layers are
        divided, which is looked at again later."""
        pipeline, without = self._pipeline, (member.id,)
        try:
            plan = pipeline.plan(without)
            busy = pipeline.idle_s(time.monotonic()) < REPLAN_IDLE_S
            return (pipeline.whole(without) if busy else None) or plan
        except PlanError as error:
            if self._pipeline.dispensable:
                return None
            raise PlanError(
                f"{member.name} cannot be drained, as the others cannot take its layers: {error.message}",
                code=error.code,
            ) from None

    def _mark(self, member: Member) -> None:
        member.drained = True
        self._drained[member.id] = member.instance
        while len(self._drained) > MAX_NODES:
            del self._drained[next(iter(self._drained))]

    async def _move(self, member: Member, plan: Plan) -> bool:
        pipeline = self._pipeline
        self.stop()
        prepared = False
        if pipeline.serving:
            try:
                await self._prepare(plan)
                prepared = True
            except StageError as error:
                log.warning("streams wait while the layers of %s are loaded elsewhere: %s", member.name, error.message)
                plan = self._pipeline.plan(without=(member.id,))
        self._settled.clear()
        if pipeline.ring.has(member):
            self._switched_at = time.monotonic()
            pipeline.switch(plan, f"{member.name} is drained")
        async with asyncio.timeout(LOAD_S):
            while not pipeline.serving or pipeline.ring.has(member):
                await self._settled.wait()
                self._settled.clear()
                if self._no_plan is not None:
                    raise self._no_plan
        return prepared

    def undo(self, member: Member) -> None:
        """Plan for a node again."""
        self._drained.pop(member.id, None)
        member.drained = False
        self._crowded = None
        self._pipeline.stir()

    def wish(self, member: Member) -> None:
        """A node wants to leave. Said again while that is under way, it changes nothing."""
        if member.id not in self._wishes:
            task = self._wishes[member.id] = asyncio.create_task(self._grant(member), name="wish")
            task.add_done_callback(lambda _: self._wishes.pop(member.id, None))

    async def _grant(self, member: Member) -> None:
        try:
            await self.drain(member)
        except (DwarfStarError, TimeoutError) as error:
            told = error.message if isinstance(error, DwarfStarError) else "its layers were not loaded in time"
            code = error.code if isinstance(error, DwarfStarError) else "not_drained"
            log.warning("node %s wants to leave: %s", member.name, told)
            with contextlib.suppress(PeerError):
                member.send(pb.CoordinatorMessage(drained=pb.Drained(code=code, message=told)))

    # --- what front ends see ---

    def views(self) -> tuple[StandbyView, ...]:
        """The slices that wait."""
        found = []
        for member in sorted(self._pipeline.members.values(), key=lambda one: (one.name, one.id)):
            own = self._own(member)
            for layers, event in sorted(member.held.items()):
                if layers not in own and (event.state in LOADED or event.state == pb.STAGE_STATE_LOADING):
                    state = "ready" if event.state in LOADED else "loading"
                    found.append(StandbyView(node=member.name, layers=layers, pid=event.pid, state=state))
        return tuple(found)


def find(members: Iterable[Member], wanted: str) -> Member:
    """The node of that id, or of that name if one only has it. Raises PeerError."""
    here = list(members)
    found = [one for one in here if one.id == wanted] or [one for one in here if one.name == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(one.id for one in found)
        raise PeerError(f"Several nodes are called {wanted!r}: give the id of one, of {ids}.", code="no_such_node")
    names = ", ".join(sorted(one.name for one in here)) or "none"
    raise PeerError(f"No node called {wanted!r} is here; these are: {names}.", code="no_such_node")


def _shown(layers: Layers) -> tuple[int, int]:
    return layers[0], layers[1] - 1
