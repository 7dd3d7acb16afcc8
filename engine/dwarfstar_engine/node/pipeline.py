"""One pipeline: brings epochs of a ring up, one after another, and serves requests on the one that is up.

Theory. One task (``run``) brings epochs up: plan → assign → all stages ready → link → serving. Anything that breaks the
epoch (a stage's or node's death, a lost hop, a stuck frame) sets ``_broken``; streams wait (``streams``), or get an
error at once, as set, and ``run`` starts over with the nodes that are there. Nodes keep weights they still need, so an
epoch that only lost a link is back within milliseconds, and one that lost a stage of which another node has a copy too.
What goes on beside an epoch that serves (the next plan, copies, nodes that leave) is ``moves``.

A pipeline knows the nodes that were dealt to it and no others (``members``), and its epochs' numbers are no other
pipeline's: they are drawn from one counter, so that no frame, hop or event can be taken for one of another ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Collection, Coroutine, Iterator, Mapping
from typing import Any, Protocol

from dwarfstar_engine.batch.router import Load
from dwarfstar_engine.batch.scheduler import Scheduler
from dwarfstar_engine.batch.speculate import Speculation
from dwarfstar_engine.errors import DwarfStarError, NoModel, PeerError, PlanError, StageError, Unavailable
from dwarfstar_engine.node.balancer import Balancer
from dwarfstar_engine.node.beside import CRASHED, loaded
from dwarfstar_engine.node.carrying import Carrying, handovers
from dwarfstar_engine.node.dispatcher import Dispatcher
from dwarfstar_engine.node.drafter import Drafter
from dwarfstar_engine.node.epoch import ANSWERED, Epoch, Stage
from dwarfstar_engine.node.hops import AVOID_S
from dwarfstar_engine.node.journal import Journal
from dwarfstar_engine.node.kept_plan import KeptPlan
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.moves import REPLAN_IDLE_S, Moves
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.news import News
from dwarfstar_engine.node.planner import WAITING, Planner, served_context
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.node.steering import Decided, Steering
from dwarfstar_engine.node.streams import MAX_RESCUES, Stream, WaitingRoom
from dwarfstar_engine.node.vocab import Vocab
from dwarfstar_engine.plan.proportional import Need, Plan, StagePlan, stage_plan
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.serving import Generation, Request, Sink
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import StageView
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.handshake import BuildInfo
from dwarfstar_engine.wire.ring import RingReceiver, RingSender, SpareChannels
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.coordinator")

LOAD_DEADLINE_S = 600.0  # a stage of a large model from a slow disk
STALL_S = 60.0  # a load that makes no progress for so long is given up
LINK_DEADLINE_S = 15.0
STUCK_S = 5.0  # a stage that has not joined the ring after so long is stuck; those that live need a fraction of it
RETRY_AFTER_S = 2.0  # told to clients while an epoch is brought up
PAUSE_S = (0.0, 0.2, 1.0, 3.0, 10.0, 30.0)  # before attempts to bring an epoch up, by failures; the last one repeats
STEADY_S = 5.0  # an epoch that broke sooner counts as a failure: what it runs may be killing its stages
SETTLE_S = 0.1  # a lost hop is heard of before the death of the stage behind it, which decides what is to be done
SILENT = "stage_silent"  # code of a stage that did not do in time what it was told
HOP_FAILED = "hop_failed"  # code of a stage that is not reached (``wire.ring``)
MAX_WAITED = 3  # such failures pause no longer than this many while streams wait, which is bounded by rescue_s
MAX_BRIEF = 2  # such failures pause no longer than this many: the model did load


class Host(Protocol):
    """The coordinator, as it is seen from here: what all its pipelines have in common. main: the model that is wanted.
    source: the one that is served. sequences: their ids."""

    settings: Settings
    main: Source
    source: Source
    vocab: Vocab
    drafter: Drafter | None
    term: int
    name: str
    trust: NodeFiles
    build: BuildInfo
    journal: Journal
    news: News
    spare: SpareChannels
    sequences: Iterator[int]
    decided: Decided

    @property
    def stopping(self) -> bool: ...
    def next_epoch(self) -> int: ...
    def warn(self, about: str, sentence: str) -> None: ...
    async def use(self, source: Source) -> None:
        """Serve another model from now on, if it is another. Raises DwarfStarError."""

    def serves(self) -> None:
        """A pipeline is up."""

    def broke(self, pipeline: Pipeline, *, for_good: bool) -> None:
        """It is down, and why is known: others may carry its streams. for_good: they need not wait for it."""

    def failed(self, pipeline: Pipeline, error: DwarfStarError) -> None:
        """An epoch of it was not brought up, or there is no plan for one."""

    def gave_up(self, pipeline: Pipeline) -> bool:
        """It will not serve soon: who waits for it may wait for another that will. False: it gets other nodes."""

    def others_serve(self, pipeline: Pipeline) -> bool: ...
    def alone(self, pipeline: Pipeline) -> bool:
        """Whether all nodes are dealt to it."""

    def expected(self, pipeline: Pipeline) -> int:
        """Nodes that its plan waits for."""


class Pipeline:
    """See the module. number: the first is 0. members: the nodes that were dealt to it, a view that changes."""

    def __init__(self, host: Host, number: int, members: Mapping[str, Member]) -> None:
        self.host, self.number, self.members = host, number, members
        self.journal = host.journal
        self.epoch = 0
        self.planner = Planner(host.settings, members, host.main)
        self.planner.wanted, self.planner.alone = lambda: host.expected(self), lambda: host.alone(self)
        self.receiver = RingReceiver(host.build, "the coordinator", self.on_frame, self.on_open, self._on_hop_lost)
        self._ring = Epoch(host.term, self.epoch, host.name)
        self._dispatcher: Dispatcher | None = None
        self._sender: RingSender | None = None
        self._next: Plan | None = None  # to be brought up when the present epoch is over
        self._broke_at = 0.0  # monotonic time at which the last epoch ended
        self._idle_since = 0.0  # monotonic time of the last sign of a request
        self.waiting = WaitingRoom(host.settings.rescue_s)
        self._keep = 0  # the epoch whose sequences stages are to keep; 0: none
        self._ran: frozenset[tuple[str, int]] = frozenset()  # node and process of the stages that served last
        self._served = self._ring  # the ring that served last
        self._crashed = False  # one of them ended by its own doing
        self.carrying = Carrying(host.news)
        self.moves = Moves(self)
        self.steering = self.planner.owner = Steering(self, host.decided)
        self._balancer = Balancer(self.steering, self.journal, host.warn)
        self.reviving = False  # a pipeline that served is being brought up again
        self.reason = self.code = "starting"
        self._changed = asyncio.Event()
        self._broken = asyncio.Event()
        self._returned = asyncio.Event()  # the last stage's hop to us is open
        self._came = asyncio.Event()  # a node came: a pause between attempts ends
        self._served_at = 0.0  # monotonic time the last epoch began to serve; 0.0: none has
        self._down = -1  # the epoch at which it was put down last

    # --- what the coordinator tells ---

    def begin(self, kept: KeptPlan | None) -> None:
        """Before ``run``: of a coordinator that begins to lead. kept: the nodes' slices, where they served before: then
        requests wait until they do again, as they do after any other loss."""
        self._served_at = 0.0
        self.reviving = kept is not None and self.settings.on_loss == "rescue"
        self.planner.begin(kept)
        self.reason = self.code = "starting"

    def end(self, cause: str) -> None:
        """There will be no more epochs: every request ends now."""
        self.moves.close()
        self.break_up(cause)
        self._keep = 0
        self.give_up(StageError(f"{cause}: send the request again", retry_after_s=RETRY_AFTER_S))

    def joined(self, member: Member) -> None:
        """A node may be planned for."""
        self.moves.came(member)
        self.stir()

    def gone(self, member: Member) -> None:
        """A node of it may not any more."""
        self.planner.hops.forget(member.id)
        self.moves.beside.stir()
        if not member.drained:
            self.planner.gone_at = time.monotonic()
        if self._ring.has(member):
            self.break_up(f"node {member.name} was lost")
        self._changed.set()

    def lose(self, nodes: Collection[str]) -> None:
        """Nodes are dealt to others now; perhaps they were its own."""
        if not self._ring.nodes & set(nodes):
            return
        self.planner.sound, self.planner.planned = False, None
        self.break_up("its nodes are dealt out anew", planned=True)

    def reported(self, member: Member, report: pb.StageReport) -> None:
        """Live figures of a stage."""
        stage = self._ring.stage(member, (report.layers.begin, report.layers.end))
        if stage is not None:
            stage.report = report

    def heard(self, member: Member, event: pb.StageEvent) -> None:
        """What a node says of a stage."""
        self.moves.beside.heard(member, event)
        self.host.news.stage(member, event, self._ring)
        self._crashed |= event.code == CRASHED and (member.id, event.pid) in self._ran
        layers = (event.layers.begin, event.layers.end)
        stage = self._ring.stage(member, layers)
        if event.HasField("profile") and (stage is None or event.profile != stage.expected_profile()):
            self.steering.surveyor.heard(member.runs(self.source), member.id, layers, event.profile)
        if event.epoch != self.epoch or event.standby or stage is None:
            return
        stage.heard(event)
        if event.HasField("link") and (after := self._ring.after(stage)) is not None:
            self.steering.surveyor.linked(member, after.member, event.link)
        if event.HasField("profile"):
            member.profile, member.profiled = event.profile, event.layers.end - event.layers.begin
        if event.state == pb.STAGE_STATE_BROKEN and event.code == HOP_FAILED:
            self._not_reached(stage)
        if event.state in (pb.STAGE_STATE_FAILED, pb.STAGE_STATE_EXITED, pb.STAGE_STATE_BROKEN):
            self.break_up(f"{member.name}: {event.detail}", event.code, sure=event.state != pb.STAGE_STATE_BROKEN)
        self._changed.set()

    def _not_reached(self, stage: Stage | None) -> None:
        """A stage, or this process if None, did not reach the next one."""
        stages = self._ring.stages
        following = stages[stages.index(stage) + 1 :] if stage is not None else stages
        if following and self.planner.hops.failed(following[0].member.id, time.monotonic()):
            target, source = following[0].member, stage.member.name if stage is not None else "the engine"
            told = (
                f"node {target.name} is left out for {AVOID_S:.0f} s if the model fits the others: "
                f"{source} does not reach its stage at {target.host}; "
                "check that a firewall lets machines of the cluster through"
            )
            log.warning("%s", told)
            self.host.warn(f"hop {target.id}", told)

    # --- the ring ---

    async def on_frame(self, data: bytes) -> None:
        if self._dispatcher is not None:
            await self._dispatcher.on_frame(data)

    def on_open(self, epoch: int) -> None:
        if epoch == self.epoch:
            self._returned.set()

    def _on_hop_lost(self, epoch: int, sender: str) -> None:
        if epoch == self.epoch:
            self.break_up(f"the connection from {sender} was lost", sure=False)

    def break_up(
        self, reason: str, code: str = "", *, sure: bool = True, planned: bool = False, spoiled: bool = False
    ) -> None:
        """The epoch is over: requests in flight get their error now, or wait; ``run`` does the rest.

        sure: this is why; else it may follow from what is not known yet. planned: by us. spoiled: what stages hold is
        not to be relied on.
        """
        if self._broken.is_set():
            return
        if self.epoch and not self.host.stopping:
            served = self._dispatcher is not None
            self.host.news.epoch_over(self.epoch, reason, served=served, sure=sure, planned=planned)
        self.reason, self.code = reason, code or StageError.code
        self._broken.set()
        self._changed.set()
        self._broke_at = time.monotonic()
        self.moves.stop()
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is None:
            return
        told = f"the pipeline broke during this request: {reason}; send it again"
        if (self.settings.on_loss == "fail" and not planned) or self.host.stopping:
            dispatcher.fail(told, RETRY_AFTER_S)
            return
        self.reviving = True
        self._keep = 0 if spoiled else self.epoch
        self._crashed |= spoiled
        streams = dispatcher.suspend(told, RETRY_AFTER_S)
        if planned:
            for stream in streams:
                self.waiting.put(stream, self._broke_at)
        else:
            self.waiting.rescue(streams, self._broke_at)
        self.host.news.waiting(len(self.waiting))

    def put_down(self, why: str, reason: str, code: str) -> int:
        """What it serves is served no more: streams end with an error that may be tried again; how many. reason, code:
        for who asks from now on. What is to be served instead is set already."""
        self.break_up(why, code, planned=True)
        self._keep, self._next, self._down = 0, None, self.epoch
        self.reason, self.code = reason, code
        ended = len(self.waiting)
        self.give_up(Unavailable(f"{why}: send the request again", retry_after_s=RETRY_AFTER_S))
        return ended

    def give_up(self, error: DwarfStarError) -> None:
        """There will be no pipeline soon: who waits for one is told."""
        self.reviving = False
        self.host.news.given_up(self.waiting.fail(error), error.message)

    # --- requests ---

    @property
    def dispatcher(self) -> Dispatcher | None:
        """While it serves."""
        return self._dispatcher

    @property
    def takes_in(self) -> bool:
        """Whether a request may wait until it serves."""
        return self.reviving and len(self.waiting) < self.settings.queue + self.settings.slots

    def judge(self) -> None:
        """Of the streams that wait, give up those under which it broke too often."""
        error = StageError("stages broke during this request, again and again", retry_after_s=RETRY_AFTER_S)
        lost = self.waiting.judge(self._crashed, error)
        self.host.news.given_up(lost, f"they were carried over {MAX_RESCUES} times already")
        self._crashed = False

    def carry(self, stream: Stream) -> None:
        """Go on with a stream of another pipeline. While this one serves."""
        assert self._dispatcher is not None
        stream.slot = -1
        try:
            self._dispatcher.carry(stream)
        except DwarfStarError as error:
            stream.sink.fail(error)

    def load(self, prompt: list[int] | None) -> Load:
        """While it serves: as the router sees it, for a prompt; None: for one that takes nothing from a cache."""
        assert self._dispatcher is not None
        scheduler = self._dispatcher.scheduler
        cached = scheduler.cached(prompt) if prompt else 0
        return Load(
            self.number, scheduler.limits.slots, scheduler.active, scheduler.queued, cached, self._ring.speed or 1.0
        )

    def hand_over(self, why: str) -> None:
        """Go down for others, which carry its streams."""
        self.break_up(why, planned=True)
        self.epoch = self.host.next_epoch()  # its stages are of an older one, and may be released
        self.host.broke(self, for_good=True)

    @property
    def dispensable(self) -> bool:
        """Whether others serve without it."""
        return self.host.others_serve(self)

    @property
    def broke_at(self) -> float:
        """Monotonic time, s."""
        return self._broke_at

    def wait(self, request: Request, sink: Sink) -> Generation:
        """Have a request wait until it serves."""
        stream = Stream(request, sink, secrets.randbits(64))
        self.waiting.put(stream, time.monotonic())
        return stream

    # --- bringing epochs up ---

    async def run(self) -> None:
        """Keep an epoch up until cancelled."""
        failures = 0
        try:
            while True:
                longest = MAX_WAITED if len(self.waiting) else len(PAUSE_S) - 1
                await self._pause(PAUSE_S[min(failures, longest)])
                self._changed.clear()
                try:
                    source, plan = self._next_plan()
                except PlanError as error:
                    self._no_plan(error)
                    await self._until_changed(error.retry_after_s)
                    continue
                try:
                    await self.host.use(source)
                    self.planner.planned = plan
                    self.steering.made(plan)
                    await self._bring_up(plan)
                    await self._broken.wait()
                    await self._settle()
                    if self._next is None:
                        self.host.broke(self, for_good=False)
                    brief = self._next is None and time.monotonic() - self._served_at < STEADY_S
                    failures = min(failures + 1, MAX_BRIEF) if brief else 0
                except DwarfStarError as error:
                    if self.epoch != self._down:  # else it was an attempt for what was put down
                        self.host.failed(self, error)
                    self.break_up(error.message, error.code)
                    self.planner.sound = False
                    failures += 1
                finally:
                    await self._take_down()
        finally:
            await self._take_down()

    def _no_plan(self, error: PlanError) -> None:
        told = error.code != NoModel.code and (self.members or not self.number)
        if self.reason != error.message and told:
            self.host.news.no_plan(error.code, error.message)
        if error.code != WAITING:
            self.host.failed(self, error)
        self.reason, self.code = error.message, error.code
        self.moves.no_plan(error)
        self.host.broke(self, for_good=True)
        if error.code != WAITING and self.host.gave_up(self):
            self.give_up(Unavailable(error.message, code=error.code, retry_after_s=RETRY_AFTER_S))

    async def _pause(self, pause_s: float) -> None:
        """Wait, but not longer than until a node comes: it may be what was missing."""
        self._came.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._came.wait()

    async def _until_changed(self, at_most_s: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._changed.wait()

    async def _settle(self) -> None:
        """Where copies wait, hear which stage was lost: the next plan leaves the others where they are. And where
        others may carry the streams, whether it crashed: perhaps one of them did it."""
        until = time.monotonic() + SETTLE_S
        listens = self.settings.standby or self.host.others_serve(self)
        while self._next is None and listens and (left := until - time.monotonic()) > 0:
            present = (stage for stage in self._ring.stages if self.members.get(stage.member.id) is stage.member)
            if sum(stage.plan.layers in loaded(stage.member) for stage in present) < len(self._ring.stages):
                return
            await self.moves.beside.wait(left)

    def _next_plan(self) -> tuple[Source, Plan]:
        """What to serve, and a plan. Raises PlanError, as ``Planner.now``."""
        prepared, self._next = self._next, None
        if not self.host.main.loaded:
            raise PlanError(NoModel().message, code=NoModel.code)
        if self.source is not self.host.main and not self.host.alone(self):
            told = f"{self.source.name} is served in the place of {self.host.main.name}, by another pipeline"
            raise PlanError(told, code=WAITING, retry_after_s=RETRY_AFTER_S)
        return self.planner.next(prepared, self.source, time.monotonic())

    # --- moves.Pipeline and steering.Host ---

    @property
    def settings(self) -> Settings:
        return self.host.settings

    @property
    def term(self) -> int:
        return self.host.term

    @property
    def source(self) -> Source:
        return self.host.source

    @property
    def context(self) -> int:
        """Tokens of one request, at most."""
        return served_context(self.settings, self.source)

    @property
    def ring(self) -> Epoch:
        return self._ring

    @property
    def planned(self) -> Plan | None:
        return self.planner.planned

    @property
    def gone_at(self) -> float:
        return self.planner.gone_at

    @property
    def serving(self) -> bool:
        return self._dispatcher is not None

    @property
    def tok_s(self) -> float:
        return self._dispatcher.tok_s(time.monotonic()) if self._dispatcher is not None else 0.0

    @property
    def measured_ms(self) -> tuple[float, ...]:
        dispatcher = self._dispatcher
        stages = self._ring.views(self.source, dispatcher.stages if dispatcher else None, 0.0)
        return tuple(one.ms_per_token for one in stages)

    @property
    def alone_ms(self) -> tuple[float, ...]:
        return tuple(stage.alone_ms for stage in self._dispatcher.stages) if self._dispatcher is not None else ()

    def idle_s(self, now: float) -> float:
        return now - self._idle_since

    def need(self) -> Need:
        return need(self.settings, self.source, self.context)

    def stage_plan(self, node: str, layers: Layers) -> StagePlan:
        return stage_plan(self._file_on(node).costs, self.need(), node, *layers)

    def _file_on(self, node: str) -> Source:
        """What a node runs its layers from."""
        member = self.members.get(node)
        return self.source if member is None else member.runs(self.source)

    def assignment(self, plan: StagePlan, *, standby: bool) -> pb.Assign:
        file = self._file_on(plan.node)
        return self._ring.assign(plan, self.settings, file, self.context, self.host.vocab.eog, standby)

    def switch(self, plan: Plan, why: str) -> None:
        if not self._broken.is_set():
            self._next = plan
            self.break_up(why, planned=True)

    def stir(self) -> None:
        self._came.set()
        self._changed.set()

    def plan(self, without: Collection[str] = ()) -> Plan:
        return self.planner.of(self.source, time.monotonic(), without)

    def whole(self, without: Collection[str]) -> Plan | None:
        return self.planner.whole(self.source, time.monotonic(), without)

    async def _bring_up(self, plan: Plan) -> None:
        """Assign, wait until all is loaded, close the ring. Raises DwarfStarError if the epoch breaks meanwhile."""
        self.epoch = self.host.next_epoch()
        self._broken.clear()
        self._returned.clear()
        stages = tuple(Stage(s, self.members[s.node]) for s in plan.stages)
        self._ring = Epoch(self.host.term, self.epoch, self.host.name, stages)
        self.reason, self.code = "the model is being loaded", "loading"
        self.host.news.plan_made(self._ring, plan.excluded, self.members)
        # First what is there already: a node gives up what it is not known to need for what it is to load.
        for stage in sorted(self._ring.stages, key=lambda one: one.plan.layers not in loaded(one.member)):
            assign = self.assignment(stage.plan, standby=False)
            if len(self.waiting) and (known := stage.expected_profile()) is not None:
                assign.known.CopyFrom(known)
            stage.member.send(pb.CoordinatorMessage(assign=assign))
        try:
            await self._until(pb.STAGE_STATE_READY, LOAD_DEADLINE_S, "load its layers")
        except StageError as error:
            if error.code == SILENT:  # nothing moved: asked again for the same, it would be waited for again
                self._release_stuck((pb.STAGE_STATE_LOADING,))
            raise
        await self._carry()
        began = time.monotonic()
        try:
            await self._close_ring()
        except DwarfStarError:
            if time.monotonic() - began > STUCK_S:  # else they had no time to answer: they keep their weights
                self._release_stuck(ANSWERED)
            raise

    async def _carry(self) -> None:
        """Have cells of streams that wait carried to where their layers are now. Raises StageError: the epoch broke."""
        if self.settings.carry == "off" or not self._keep or self._served.number != self._keep:
            return
        found = handovers(self._served, self._ring, self.members)
        if found and len(self.waiting):
            cells, ring, keep = self.need().cells, self._ring, self._keep
            work = self.carrying.run(found, self.waiting, ring, keep, cells, self._kv_bytes, self.settings)
            await self._unless_broken(work)

    def _kv_bytes(self, stage: Stage, layers: Layers) -> int:
        return self.stage_plan(stage.member.id, layers).kv_bytes

    async def _close_ring(self) -> None:
        """Join the loaded stages. Raises DwarfStarError."""
        stages = self._ring.stages
        self.receiver.set_epoch(self.epoch, {stages[-1].member.id})
        for index, stage in enumerate(stages):
            stage.member.send(pb.CoordinatorMessage(link=self._ring.link(index, self._keep)))
        told = "the connection to the first stage was lost"
        sender = RingSender(lambda reason: self.break_up(f"{told}: {reason}", sure=False), self.host.spare)
        self._sender = sender
        credentials = channel.channel_credentials(self.host.trust)
        try:
            await self._unless_broken(
                sender.open(stages[0].address, credentials, self.host.build, self.epoch, self.host.name)
            )
        except PeerError as error:
            if error.code == HOP_FAILED:
                self._not_reached(None)
            raise
        await self._until(pb.STAGE_STATE_LINKED, LINK_DEADLINE_S, "join the ring")
        try:
            async with asyncio.timeout(LINK_DEADLINE_S):
                await self._unless_broken(self._returned.wait())
        except TimeoutError:
            raise PeerError("the last stage did not connect to the coordinator", code="hop_failed") from None
        self._serve(sender)

    async def _unless_broken(self, work: Coroutine[Any, Any, object]) -> None:
        """Await ``work``, which is cancelled if the epoch breaks first. Raises StageError then, and also if both."""
        task, broken = asyncio.create_task(work), asyncio.create_task(self._broken.wait())
        try:
            await asyncio.wait({task, broken}, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.is_set():
                raise StageError(self.reason, code=self.code)
            await task
        finally:
            task.cancel()
            broken.cancel()
            await asyncio.gather(task, broken, return_exceptions=True)

    def _release_stuck(self, states: Collection[pb.StageState.ValueType]) -> None:
        """Have stages that gave no answer replaced, whose last word was one of ``states``: a stopped process would fail
        every attempt to come."""
        for stage in self._ring.stages:
            event, (begin, end) = stage.event, stage.plan.layers
            if event is not None and event.state in states and stage.member.id in self.members:
                log.warning("the stage on %s does not answer: it is replaced", stage.member.name)
                with contextlib.suppress(PeerError):
                    release = pb.Release(term=self.host.term, epoch=self.epoch, layers=pb.Slice(begin=begin, end=end))
                    stage.member.send(pb.CoordinatorMessage(release=release))

    def _serve(self, sender: RingSender) -> None:
        assert not self._broken.is_set()  # or nobody would tell the streams that are taken on now
        ring, settings = self._ring, self.settings
        drafter = self.host.drafter if self.source is self.host.main else None
        limits = ring.limits(settings, self.context, drafts=drafter is not None)
        speculation = Speculation(settings.speculation, ring.costs())
        self._dispatcher = Dispatcher(
            Scheduler(limits, self.host.vocab.eog, None if settings.speculation == "off" else speculation),
            self.epoch,
            len(ring.stages),
            sender.send,
            sender.flush,
            lambda message: self.break_up(message, spoiled=True),
            drafter,
            self.host.sequences,
        )
        self._dispatcher.always_draft = settings.speculation == "on"
        self.reason = self.code = ""
        self.planner.hops.closed()
        self.reviving = False
        self.host.news.epoch_up(ring, self.source, self.context)
        self.judge()
        self._served = ring
        self._ran = frozenset((one.member.id, one.event.pid) for one in ring.stages if one.event is not None)
        streams, lost, whole = self.waiting.take(), 0, 0
        for stream in streams:
            kept = ring.kept(stream.slot, stream.through) if stream.slot >= 0 and self._keep else None
            stream.slot = -1
            whole += kept is None
            try:
                self._dispatcher.carry(stream, kept)
            except DwarfStarError as error:
                lost += 1
                stream.sink.fail(error)
        self.host.news.resumed(len(streams) - lost)
        self.host.news.given_up(lost, "they do not fit what is served now")
        self.host.serves()
        self._served_at = time.monotonic()
        self.planner.sound = self.planner.served = True
        self.moves.served(self._served_at)
        if streams:  # said when their first frames are on their way
            asyncio.get_running_loop().call_soon(self._tell_pause, len(streams), whole)

    def _tell_pause(self, streams: int, whole: int) -> None:
        """whole: streams of which no stage has anything."""
        pause_ms = 1000 * (time.monotonic() - self._broke_at)
        told = "%d streams go on, %d of them from their beginning, %.0f ms after epoch %d"
        log.info(told, streams, whole, pause_ms, self.epoch - 1)

    async def _until(self, state: pb.StageState.ValueType, deadline_s: float, what: str) -> None:
        """Wait until every stage has reached ``state``. Raises if the epoch breaks, or nothing moves for STALL_S."""
        give_up = time.monotonic() + deadline_s
        while True:
            self._changed.clear()
            if self._broken.is_set():
                raise StageError(self.reason, code=self.code)
            late = [stage.member.name for stage in self._ring.stages if not stage.reached(state)]
            if not late:
                return
            left = min(STALL_S, give_up - time.monotonic())
            try:
                async with asyncio.timeout(max(0.0, left)):
                    await self._changed.wait()
            except TimeoutError:
                raise StageError(f"{late[0]} did not {what} in time", code=SILENT) from None

    async def _take_down(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            await sender.close()
        self._ring = Epoch(self.host.term, self.epoch, self.host.name)

    def tick(self, now: float) -> None:
        """Find what does not announce itself: frames that do not come back, streams that wait for too long."""
        settings, dispatcher = self.settings, self._dispatcher
        if len(self.waiting):
            waited_s = settings.rescue_s
            error = StageError(f"the pipeline was not back in {waited_s:.0f} s: {self.reason}", retry_after_s=waited_s)
            self.host.news.given_up(self.waiting.expire(now, error), error.message)
        if dispatcher is None or dispatcher.scheduler.active or dispatcher.scheduler.queued:
            self._idle_since = now
        self.steering.learn(now)
        self._return_to_main(now)
        self.moves.tick(now)
        self._balancer.tick(self, now)
        deadline_s = settings.frame_deadline_s
        if self._dispatcher is not None and self._dispatcher.oldest_age_s(now) > deadline_s:
            hangs = f"a frame has been in the ring for more than {deadline_s:.0f} s: a stage hangs"
            self.break_up(hangs, spoiled=True)

    def _return_to_main(self, now: float) -> None:
        """Serve the model that is wanted again when it fits and nobody is served: its streams would end."""
        main = self.host.main
        if self.source is main or self.idle_s(now) < REPLAN_IDLE_S or not self.serving:
            return
        with contextlib.suppress(PlanError):
            self.planner.of(main, now)
            self.break_up(f"{main.name} fits again", planned=True)

    # --- what front ends see ---

    def views(self) -> tuple[StageView, ...]:
        """Its stages."""
        times = self._dispatcher.stages if self._dispatcher else None
        return self._ring.views(self.source, times, self.tok_s, self.number)

    def loading(self) -> str:
        """How far the stages are, for people; empty when nothing is being loaded."""
        return "" if self._dispatcher is not None else self._ring.loading()
