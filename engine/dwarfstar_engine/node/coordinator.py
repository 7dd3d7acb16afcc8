"""The coordinator: knows the nodes, makes the plan, brings an epoch up, and serves requests on it.

Theory. One task (``run``) brings epochs up, one after another: plan → assign → all stages ready → link → serving.
Anything that breaks the epoch (a stage's or node's death, a lost hop, a stuck frame) sets ``_broken``; streams wait
(``streams``), or get an error at once, as set, and ``run`` starts over with the nodes that are there. Nodes keep
weights they still need, so an epoch that only lost a link is back within milliseconds, and one that lost a stage of
which another node has a copy too. What goes on beside an epoch that serves (the next plan, copies, nodes that leave) is
``moves``.

The coordinator holds no weights. It is the engine behind the HTTP API (``serving.Engine``), and a hop of the ring:
its frames go to the first stage, and the last stage's results come back to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

from dwarfstar_engine.batch.scheduler import Scheduler
from dwarfstar_engine.batch.speculate import Speculation
from dwarfstar_engine.errors import DwarfStarError, PeerError, PlanError, StageError, Unavailable
from dwarfstar_engine.node.balancer import Balancer
from dwarfstar_engine.node.beside import CRASHED, loaded
from dwarfstar_engine.node.dispatcher import Dispatcher
from dwarfstar_engine.node.drafter import Drafter
from dwarfstar_engine.node.epoch import ANSWERED, Epoch, Stage
from dwarfstar_engine.node.gossip import Gossip
from dwarfstar_engine.node.hops import AVOID_S
from dwarfstar_engine.node.journal import Journal
from dwarfstar_engine.node.kept_plan import KeptPlan
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.node.moves import REPLAN_IDLE_S, Moves
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.news import News
from dwarfstar_engine.node.nodes import Nodes
from dwarfstar_engine.node.planner import WAITING, Planner, served_context
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.node.steering import Steering
from dwarfstar_engine.node.streams import MAX_RESCUES, Stream, WaitingRoom
from dwarfstar_engine.node.vocab import Vocab
from dwarfstar_engine.plan.proportional import (
    TOO_LARGE,
    Need,
    Plan,
    StagePlan,
    stage_plan,
)
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.serving import Generation, ModelInfo, Request, Sink
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import CoordinatorView, ModelView, StatusView, ThroughputView
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.handshake import BuildInfo, local_build
from dwarfstar_engine.wire.ring import RingReceiver, RingSender, SpareChannels
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.coordinator")

LOAD_DEADLINE_S = 600.0  # a stage of a large model from a slow disk
STALL_S = 60.0  # a load that makes no progress for so long is given up
LINK_DEADLINE_S = 15.0
WATCH_S = 0.5
STUCK_S = 5.0  # a stage that has not joined the ring after so long is stuck; those that live need a fraction of it
RETRY_AFTER_S = 2.0  # told to clients while an epoch is brought up
PAUSE_S = (0.0, 0.2, 1.0, 3.0, 10.0, 30.0)  # before attempts to bring an epoch up, by failures; the last one repeats
STEADY_S = 5.0  # an epoch that broke sooner counts as a failure: what it runs may be killing its stages
SETTLE_S = 0.1  # a lost hop is heard of before the death of the stage behind it, which decides what is to be done
SILENT = "stage_silent"  # code of a stage that did not do in time what it was told
HOP_FAILED = "hop_failed"  # code of a stage that is not reached (``wire.ring``)
WARNINGS = 8  # shown in the status at one time, each for WARNING_S
WARNING_S = 600.0
MAX_WAITED = 3  # such failures pause no longer than this many while streams wait, which is bounded by rescue_s
MAX_EPOCH_SEEN = 1 << 31  # what a node says to have seen is believed up to here
MAX_BRIEF = 2  # such failures pause no longer than this many: the model did load


class Coordinator:
    """See the module. ``api_url`` and ``address`` are for the status only, set once they are known. Before it runs:
    ``drafter``, if there is a draft model; ``planner.fallbacks``, smaller models for when ``source`` does not fit,
    with ``open_vocab``."""

    def __init__(self, settings: Settings, source: Source, vocab: Vocab, trust: NodeFiles, name: str) -> None:
        self.settings, self.source, self.vocab, self._trust, self._name = settings, source, vocab, trust, name
        self.drafter: Drafter | None = None
        self.address = self.api_url = ""
        self.term, self.epoch = 1, 0
        self._main = source
        self.open_vocab: Callable[[Source], Awaitable[Vocab]] | None = None
        self.journal = Journal()
        self.nodes = Nodes(settings, self, self.journal)
        self.members = self.nodes.members
        self.planner = Planner(settings, self.members, source)
        self._news = News(self.journal)
        self.gossip = Gossip()
        self._build: BuildInfo = local_build()
        self.receiver = RingReceiver(self._build, "the coordinator", self._on_frame, self._on_open, self._on_hop_lost)
        self._ring = Epoch(self.term, self.epoch, name)
        self._dispatcher: Dispatcher | None = None
        self._sender: RingSender | None = None
        self._spare = SpareChannels()
        self._next: Plan | None = None  # to be brought up when the present epoch is over
        self._broke_at = 0.0  # monotonic time at which the last epoch ended
        self._idle_since = 0.0  # monotonic time of the last sign of a request
        self._waiting = WaitingRoom(settings.rescue_s)
        self._keep = 0  # the epoch whose sequences stages are to keep; 0: none
        self._ran: frozenset[tuple[str, int]] = frozenset()  # node and process of the stages that served last
        self._crashed = False  # one of them ended by its own doing
        self.moves = Moves(self)
        self.steering = self.planner.owner = Steering(self)
        self._balancer = Balancer(self.steering, self.journal, self.warn)
        self._reviving = False  # a pipeline that served is being brought up again
        self._reason = "starting"
        self._code = "starting"
        self._changed = asyncio.Event()
        self._broken = asyncio.Event()
        self._returned = asyncio.Event()  # the last stage's hop to us is open
        self._came = asyncio.Event()  # a node came: a pause between attempts ends
        self._served_at = 0.0  # monotonic time the last epoch began to serve; 0.0: none has
        self._stopping = False
        self._floor = 0  # epochs begin above it: nodes have seen it
        self._warnings: dict[str, tuple[float, str]] = {}
        self._created = int(time.time())

    # --- serving.Engine ---

    def model(self) -> ModelInfo:
        return ModelInfo(
            name=self.source.name,
            created=self._created,
            context=self.context,
            vocab_size=self.vocab.size,
            layers=self.source.layers,
            eog_tokens=self.vocab.eog,
        )

    def health(self) -> Mapping[str, Any]:
        if self._dispatcher is not None:
            return {"status": "ok", "epoch": self.epoch, "cuts": [s.plan.layers[1] for s in self._ring.stages[:-1]]}
        return {"status": "unavailable", "code": self._code, "reason": self._reason}

    async def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return await self.vocab.chat(messages)

    async def text_tokens(self, text: str) -> list[int]:
        return await self.vocab.text(text)

    def token_bytes(self, token: int) -> bytes:
        return self.vocab.piece(token)

    def generate(self, request: Request, sink: Sink) -> Generation:
        if request.model not in ("", self.source.name):  # it changed since the prompt was made tokens
            raise Unavailable(f"{self.source.name} is served now: send the request again", retry_after_s=RETRY_AFTER_S)
        if self._dispatcher is None:
            if self._reviving and len(self._waiting) < self.settings.queue + self.settings.slots:
                stream = Stream(request, sink, secrets.randbits(64))
                self._waiting.put(stream, time.monotonic())
                return stream
            raise Unavailable(
                f"the model is not being served: {self._reason}", code=self._code, retry_after_s=RETRY_AFTER_S
            )
        return self._dispatcher.generate(request, sink)

    # --- terms ---

    def begin(self, term: int, kept: KeptPlan | None = None) -> None:
        """Lead ``term``: before ``run``, or while it runs, which assigns everything anew then. kept: nodes' slices."""
        if not self._stopping and self.epoch:
            self._break(f"term {term} begins")
        else:
            self._stopping, self._served_at = False, 0.0
            self.nodes.stopping = False
            self.planner.begin(kept)
            self._reason = self._code = "starting"
        self.term = term

    def retire(self, cause: str) -> None:
        """Lead no more: every request ends now, and nodes are sent away. ``run`` is to be cancelled."""
        self._stopping = True
        self._break(cause)
        self._keep = 0
        self._give_up(StageError(f"{cause}: send the request again", retry_after_s=RETRY_AFTER_S))
        self.nodes.stopping = True
        for member in list(self.members.values()):
            self.nodes.broken(member)
            member.dismiss()

    # --- nodes come, speak and go ---

    def joined(self, member: Member) -> None:
        """See ``nodes.Host``."""
        self.steering.joined(member)
        self.moves.came(member)
        self._floor = max(self._floor, min(member.epoch_seen, MAX_EPOCH_SEEN))
        self.gossip.changed()
        self.gossip.tell(member, self.members.values())
        self._came.set()
        self._changed.set()

    def gone(self, member: Member) -> None:
        """See ``nodes.Host``."""
        self.planner.hops.forget(member.id)
        self.gossip.forget(member)
        self._news.forget(member)
        self.gossip.changed()
        self.moves.beside.stir()
        if not member.drained:
            self.planner.gone_at = time.monotonic()
        if self._ring.has(member):
            self._break(f"node {member.name} was lost")
        self._changed.set()

    def warn(self, about: str, sentence: str) -> None:
        """Show the owner something in the status, for WARNING_S. It replaces what was said about the same."""
        self._warnings.pop(about, None)
        self._warnings[about] = (time.monotonic(), sentence)
        if len(self._warnings) > WARNINGS:
            del self._warnings[next(iter(self._warnings))]

    def heard(self, member: Member, message: pb.NodeMessage) -> None:
        """A message of a node, which may still wait to be let in."""
        kind = message.WhichOneof("message")
        if kind == "heartbeat":
            self.nodes.heard(member, message.heartbeat.number)
        if self.members.get(member.id) is not member:
            return
        match kind:
            case "heartbeat":
                member.live = message.heartbeat
                for report in message.heartbeat.stages:
                    stage = self._ring.stage(member, (report.layers.begin, report.layers.end))
                    if stage is not None:
                        stage.report = report
                self.gossip.tell(member, self.members.values())
            case "stage_event":
                self._on_stage(member, message.stage_event)
            case "leave":
                self.nodes.left(member, message.leave.reason)
            case "leave_wish":
                self.moves.wish(member)

    def _on_stage(self, member: Member, event: pb.StageEvent) -> None:
        self.moves.beside.heard(member, event)
        self._news.stage(member, event, self._ring)
        self._crashed |= event.code == CRASHED and (member.id, event.pid) in self._ran
        layers = (event.layers.begin, event.layers.end)
        stage = self._ring.stage(member, layers)
        if event.HasField("profile") and (stage is None or event.profile != stage.expected_profile()):
            self.steering.surveyor.heard(self.source, member.id, layers, event.profile)
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
            self._break(f"{member.name}: {event.detail}", event.code, sure=event.state != pb.STAGE_STATE_BROKEN)
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
            self.warn(f"hop {target.id}", told)

    # --- the ring ---

    async def _on_frame(self, data: bytes) -> None:
        if self._dispatcher is not None:
            await self._dispatcher.on_frame(data)

    def _on_open(self, epoch: int) -> None:
        if epoch == self.epoch:
            self._returned.set()

    def _on_hop_lost(self, epoch: int, sender: str) -> None:
        if epoch == self.epoch:
            self._break(f"the connection from {sender} was lost", sure=False)

    def _break(
        self, reason: str, code: str = "", *, sure: bool = True, planned: bool = False, spoiled: bool = False
    ) -> None:
        """The epoch is over: requests in flight get their error now, or wait; ``run`` does the rest.

        sure: this is why; else it may follow from what is not known yet. planned: by us. spoiled: what stages hold is
        not to be relied on.
        """
        if self._broken.is_set():
            return
        if self.epoch and not self._stopping:
            served = self._dispatcher is not None
            self._news.epoch_over(self.epoch, reason, served=served, sure=sure, planned=planned)
        self._reason, self._code = reason, code or StageError.code
        self._broken.set()
        self._changed.set()
        self._broke_at = time.monotonic()
        self.moves.stop()
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is None:
            return
        told = f"the pipeline broke during this request: {reason}; send it again"
        if (self.settings.on_loss == "fail" and not planned) or self._stopping:
            dispatcher.fail(told, RETRY_AFTER_S)
            return
        self._reviving = True
        self._keep = 0 if spoiled else self.epoch
        self._crashed |= spoiled
        streams = dispatcher.suspend(told, RETRY_AFTER_S)
        if planned:
            for stream in streams:
                self._waiting.put(stream, self._broke_at)
        else:
            self._waiting.rescue(streams, self._broke_at)
        self._news.waiting(len(self._waiting))

    def _give_up(self, error: DwarfStarError) -> None:
        """There will be no pipeline soon: who waits for one is told."""
        self._reviving = False
        self._news.given_up(self._waiting.fail(error), error.message)

    # --- bringing epochs up ---

    async def run(self) -> None:
        """Keep an epoch up until cancelled."""
        failures = 0
        watchers = [asyncio.create_task(self._watch()), asyncio.create_task(self.nodes.run())]
        for watcher in watchers:
            watcher.add_done_callback(_tell_fault)
        self._news.settings(self.settings)
        try:
            while True:
                longest = MAX_WAITED if len(self._waiting) else len(PAUSE_S) - 1
                await self._pause(PAUSE_S[min(failures, longest)])
                self._changed.clear()
                try:
                    source, plan = self._next_plan()
                except PlanError as error:
                    if self._reason != error.message:
                        self._news.no_plan(error.code, error.message)
                    self._reason, self._code = error.message, error.code
                    self.moves.no_plan(error)
                    if error.code != WAITING:
                        self._give_up(Unavailable(error.message, code=error.code, retry_after_s=RETRY_AFTER_S))
                    await self._until_changed(error.retry_after_s)
                    continue
                try:
                    await self._use(source)
                    self.planner.planned = plan
                    self.steering.made(plan)
                    await self._bring_up(plan)
                    await self._broken.wait()
                    await self._settle()
                    brief = self._next is None and time.monotonic() - self._served_at < STEADY_S
                    failures = min(failures + 1, MAX_BRIEF) if brief else 0
                except DwarfStarError as error:
                    self._break(error.message, error.code)
                    self.planner.sound = False
                    failures += 1
                finally:
                    await self._take_down()
        finally:
            for watcher in watchers:
                watcher.cancel()
            self._stopping = self.nodes.stopping = True
            self.moves.close()
            self.journal.release()
            self._break("the engine is stopping")
            self._give_up(StageError("the engine is stopping: send the request again", retry_after_s=RETRY_AFTER_S))
            await self._take_down()
            await self._spare.close()

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
        """Where copies wait, hear which stage was lost: the next plan leaves the others where they are."""
        until = time.monotonic() + SETTLE_S
        while self._next is None and self.settings.standby and (left := until - time.monotonic()) > 0:
            present = (stage for stage in self._ring.stages if self.members.get(stage.member.id) is stage.member)
            if sum(stage.plan.layers in loaded(stage.member) for stage in present) < len(self._ring.stages):
                return
            await self.moves.beside.wait(left)

    def _next_plan(self) -> tuple[Source, Plan]:
        """What to serve, and a plan. Raises PlanError, as ``Planner.now``."""
        prepared, self._next = self._next, None
        return self.planner.next(prepared, self.source, time.monotonic())

    async def _use(self, source: Source) -> None:
        """Serve another model from now on, if it is another: who waits has tokens of the old one. Raises ModelError."""
        if source is self.source:
            return
        assert self.open_vocab is not None
        vocab = await self.open_vocab(source)
        log.warning("serving %s from now on in the place of %s", source.name, self.source.name)
        told = f"{self.source.name} is not served any more, {source.name} is: send the request again"
        self._give_up(Unavailable(told, code=TOO_LARGE, retry_after_s=RETRY_AFTER_S))
        old, self.source, self.vocab = self.vocab, source, vocab
        await old.close()

    @property
    def context(self) -> int:
        """Tokens of one request, at most."""
        return served_context(self.settings, self.source)

    # --- moves.Pipeline ---

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
        return tuple(one.ms_per_token for one in self._ring.views(dispatcher.stages if dispatcher else None, 0.0))

    def idle_s(self, now: float) -> float:
        return now - self._idle_since

    def need(self) -> Need:
        return need(self.settings, self.source, self.context)

    def stage_plan(self, node: str, layers: Layers) -> StagePlan:
        return stage_plan(self.source.costs, self.need(), node, *layers)

    def assignment(self, plan: StagePlan, *, standby: bool) -> pb.Assign:
        return self._ring.assign(plan, self.settings, self.source, self.context, self.vocab.eog, standby)

    def switch(self, plan: Plan, why: str) -> None:
        if not self._broken.is_set():
            self._next = plan
            self._break(why, planned=True)

    def stir(self) -> None:
        self._came.set()
        self._changed.set()

    def plan(self, without: Collection[str] = ()) -> Plan:
        return self.planner.of(self.source, time.monotonic(), without)

    async def _bring_up(self, plan: Plan) -> None:
        """Assign, wait until all is loaded, close the ring. Raises DwarfStarError if the epoch breaks meanwhile."""
        self.epoch = max(self.epoch, self._floor) + 1
        self._broken.clear()
        self._returned.clear()
        stages = tuple(Stage(s, self.members[s.node]) for s in plan.stages)
        self._ring = Epoch(self.term, self.epoch, self._name, stages)
        self._reason, self._code = "the model is being loaded", "loading"
        self._news.plan_made(self._ring, plan.excluded, self.members)
        # First what is there already: a node gives up what it is not known to need for what it is to load.
        for stage in sorted(self._ring.stages, key=lambda one: one.plan.layers not in loaded(one.member)):
            assign = self.assignment(stage.plan, standby=False)
            if len(self._waiting) and (known := stage.expected_profile()) is not None:
                assign.known.CopyFrom(known)
            stage.member.send(pb.CoordinatorMessage(assign=assign))
        try:
            await self._until(pb.STAGE_STATE_READY, LOAD_DEADLINE_S, "load its layers")
        except StageError as error:
            if error.code == SILENT:  # nothing moved: asked again for the same, it would be waited for again
                self._release_stuck((pb.STAGE_STATE_LOADING,))
            raise
        began = time.monotonic()
        try:
            await self._close_ring()
        except DwarfStarError:
            if time.monotonic() - began > STUCK_S:  # else they had no time to answer: they keep their weights
                self._release_stuck(ANSWERED)
            raise

    async def _close_ring(self) -> None:
        """Join the loaded stages. Raises DwarfStarError."""
        stages = self._ring.stages
        self.receiver.set_epoch(self.epoch, {stages[-1].member.id})
        for index, stage in enumerate(stages):
            stage.member.send(pb.CoordinatorMessage(link=self._ring.link(index, self._keep)))
        told = "the connection to the first stage was lost"
        sender = RingSender(lambda reason: self._break(f"{told}: {reason}", sure=False), self._spare)
        self._sender = sender
        credentials = channel.channel_credentials(self._trust)
        try:
            await self._unless_broken(sender.open(stages[0].address, credentials, self._build, self.epoch, self._name))
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
                raise StageError(self._reason, code=self._code)
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
                    release = pb.Release(term=self.term, epoch=self.epoch, layers=pb.Slice(begin=begin, end=end))
                    stage.member.send(pb.CoordinatorMessage(release=release))

    def _serve(self, sender: RingSender) -> None:
        assert not self._broken.is_set()  # or nobody would tell the streams that are taken on now
        ring, settings = self._ring, self.settings
        drafter = self.drafter if self.source is self._main else None
        limits = ring.limits(settings, self.context, drafts=drafter is not None)
        speculation = Speculation(settings.speculation, ring.costs())
        self._dispatcher = Dispatcher(
            Scheduler(limits, self.vocab.eog, None if settings.speculation == "off" else speculation),
            self.epoch,
            len(ring.stages),
            sender.send,
            sender.flush,
            lambda message: self._break(message, spoiled=True),
            drafter,
        )
        self._dispatcher.always_draft = settings.speculation == "on"
        self._reason = self._code = ""
        self.planner.hops.closed()
        self._reviving = False
        self._news.epoch_up(ring, self.source, self.context)
        error = StageError("stages broke during this request, again and again", retry_after_s=RETRY_AFTER_S)
        lost = self._waiting.judge(self._crashed, error)
        self._news.given_up(lost, f"they were carried over {MAX_RESCUES} times already")
        self._ran = frozenset((one.member.id, one.event.pid) for one in ring.stages if one.event is not None)
        self._crashed = False
        streams, lost, whole = self._waiting.take(), 0, 0
        for stream in streams:
            kept = ring.kept(stream.slot, stream.through) if stream.slot >= 0 and self._keep else None
            stream.slot = -1
            whole += kept is None
            try:
                self._dispatcher.carry(stream, kept)
            except DwarfStarError as error:
                lost += 1
                stream.sink.fail(error)
        self._news.resumed(len(streams) - lost)
        self._news.given_up(lost, "they do not fit what is served now")
        if not self._served_at:  # once: what is frozen is never collected, and later there are requests among it
            gc.collect()
            gc.freeze()  # the vocabulary and all modules: collections between tokens need not walk them
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
                raise StageError(self._reason, code=self._code)
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
        self._ring = Epoch(self.term, self.epoch, self._name)

    async def _watch(self) -> None:
        """Find what does not announce itself: frames that do not come back, streams that wait for too long."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            waited_s, settings = self.settings.rescue_s, self.settings
            error = StageError(f"the pipeline was not back in {waited_s:.0f} s: {self._reason}", retry_after_s=waited_s)
            self._news.given_up(self._waiting.expire(now, error), error.message)
            if self._dispatcher is None or self._dispatcher.scheduler.active or self._dispatcher.scheduler.queued:
                self._idle_since = now
            self._return_to_main(now)
            self.moves.tick(now)
            self._balancer.tick(self, now)
            deadline_s = settings.frame_deadline_s
            if self._dispatcher is not None and self._dispatcher.oldest_age_s(now) > deadline_s:
                hangs = f"a frame has been in the ring for more than {deadline_s:.0f} s: a stage hangs"
                self._break(hangs, spoiled=True)

    def _return_to_main(self, now: float) -> None:
        """Serve the model that is wanted again when it fits and nobody is served: its streams would end."""
        if self.source is self._main or self.idle_s(now) < REPLAN_IDLE_S or not self.serving:
            return
        with contextlib.suppress(PlanError):
            self.planner.of(self._main, now)
            self._break(f"{self._main.name} fits again", planned=True)

    # --- what front ends see ---

    def status(self) -> StatusView:
        """A view of everything, now."""
        now = time.monotonic()
        dispatcher, source = self._dispatcher, self.source
        total = sum(source.costs.layer_bytes) + source.costs.head_bytes
        tok_s = dispatcher.tok_s(now) if dispatcher else 0.0
        return StatusView(
            coordinator=CoordinatorView(
                address=self.address, term=self.term, api_url=self.api_url, leader=self._name, leads=not self._stopping
            ),
            model=ModelView(
                name=source.name,
                architecture=source.architecture,
                layers=source.layers,
                legal_cuts=source.cuts,
                weights_gib=round(total / GIB, 4),
                context=self.context,
            ),
            epoch=self.epoch,
            state="serving" if dispatcher else "starting" if self._code in ("starting", "loading") else "unavailable",
            reason=self._reason,
            nodes=self.nodes.views(),
            stages=self._ring.views(dispatcher.stages if dispatcher else None, tok_s),
            throughput=ThroughputView(
                tok_s=round(tok_s, 2),
                active=dispatcher.scheduler.active if dispatcher else 0,
                queued=dispatcher.scheduler.queued if dispatcher else 0,
            ),
            last_event=self.journal.last,
            standbys=self.moves.views(),
            warnings=tuple(text for told, text in self._warnings.values() if now - told < WARNING_S),
        )

    def loading(self) -> str:
        """How far the stages are, for people; empty when nothing is being loaded."""
        return "" if self._dispatcher is not None else self._ring.loading()


def _tell_fault(task: asyncio.Task[None]) -> None:
    """A watcher that ends by itself is a fault of ours."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a fault of the coordinator", exc_info=error)
