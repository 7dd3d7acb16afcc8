"""The coordinator: knows the nodes, makes the plan, brings an epoch up, and serves requests on it.

Theory. One task (``run``) brings epochs up, one after another: plan → assign → all stages ready → link → serving.
Anything that breaks the epoch (a stage's or node's death, a lost hop, a stuck frame) sets ``_broken``; streams wait
(``streams``), or get an error at once, as set, and ``run`` starts over with the nodes that are there. Nodes keep
weights they still need, so an epoch that only lost a link is back within milliseconds. A node that the plan does not
use, as it came later, gets its share when nobody has asked anything for a while.

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
from collections.abc import Mapping, Sequence
from typing import Any

from dwarfstar_engine.batch.scheduler import Scheduler
from dwarfstar_engine.batch.speculate import Speculation
from dwarfstar_engine.errors import DwarfStarError, IllegalCutError, PeerError, PlanError, StageError, Unavailable
from dwarfstar_engine.node.dispatcher import Dispatcher
from dwarfstar_engine.node.drafter import Drafter
from dwarfstar_engine.node.epoch import ANSWERED, Epoch, Stage
from dwarfstar_engine.node.gossip import Gossip
from dwarfstar_engine.node.kept_plan import KeptPlan
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.source import DEFAULT_CONTEXT, Source
from dwarfstar_engine.node.streams import Stream, WaitingRoom
from dwarfstar_engine.node.vocab import Vocab
from dwarfstar_engine.plan.proportional import Plan, proportional, with_cuts
from dwarfstar_engine.serving import Generation, ModelInfo, Request, Sink
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import CoordinatorView, ModelView, StatusView, ThroughputView
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.handshake import BuildInfo, local_build
from dwarfstar_engine.wire.ring import RingReceiver, RingSender
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.coordinator")

LOAD_DEADLINE_S = 600.0  # a stage of a large model from a slow disk
STALL_S = 60.0  # a load that makes no progress for so long is given up
LINK_DEADLINE_S = 15.0
WATCH_S = 0.5
RETRY_AFTER_S = 2.0  # told to clients while an epoch is brought up
PAUSE_S = (0.0, 0.2, 1.0, 3.0, 10.0, 30.0)  # before attempts to bring an epoch up, by failures; the last one repeats
STEADY_S = 5.0  # an epoch that broke sooner counts as a failure: what it runs may be killing its stages
REPLAN_IDLE_S = 2.0  # without a request, before a better plan is carried out: it may take loading
WAITING = "waiting_for_nodes"  # code of a plan that is not made yet
WARNINGS = 8  # shown in the status at one time, each for WARNING_S
WARNING_S = 600.0
MAX_EPOCH_SEEN = 1 << 31  # what a node says to have seen is believed up to here
MAX_BRIEF = 2  # such failures pause no longer than this many: the model did load


class Coordinator:
    """See the module. ``api_url`` and ``address`` are for the status only, set once they are known; ``drafter``: before
    it runs, if there is a draft model."""

    def __init__(self, settings: Settings, source: Source, vocab: Vocab, trust: NodeFiles, name: str) -> None:
        self.settings, self.source, self.vocab, self._trust, self._name = settings, source, vocab, trust, name
        self.drafter: Drafter | None = None
        self.address = self.api_url = ""
        self.term, self.epoch = 1, 0
        self.context = min(settings.context or DEFAULT_CONTEXT, source.train_context)
        self.members: dict[str, Member] = {}
        self.gossip = Gossip()
        self._build: BuildInfo = local_build()
        self.receiver = RingReceiver(self._build, "the coordinator", self._on_frame, self._on_open, self._on_hop_lost)
        self._ring = Epoch(self.term, self.epoch, name)
        self._dispatcher: Dispatcher | None = None
        self._sender: RingSender | None = None
        self.planned: Plan | None = None
        self._kept: KeptPlan | None = None
        self._idle_since = 0.0  # monotonic time of the last sign of a request
        self._waiting = WaitingRoom(settings.rescue_s)
        self._reviving = False  # a pipeline that served is being brought up again
        self._reason = "starting"
        self._code = "starting"
        self._changed = asyncio.Event()
        self._broken = asyncio.Event()
        self._returned = asyncio.Event()  # the last stage's hop to us is open
        self._came = asyncio.Event()  # a node came: a pause between attempts ends
        self._served_at = 0.0  # monotonic time the last epoch began to serve; 0.0: none has
        self._gone_at = 0.0  # monotonic time the last node was lost
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
            self._stopping, self._served_at, self._gone_at = False, 0.0, 0.0
            self._reason = self._code = "starting"
            self._kept = kept
        self.term = term

    def retire(self, cause: str) -> None:
        """Lead no more: every request ends now, and nodes are sent away. ``run`` is to be cancelled."""
        self._stopping = True
        self._break(cause)
        self._give_up(StageError(f"{cause}: send the request again", retry_after_s=RETRY_AFTER_S))
        for member in list(self.members.values()):
            self.detach(member)
            member.dismiss()

    # --- nodes come, speak and go ---

    def attach(self, member: Member) -> None:
        """A node is here. One of the same id that was here before is replaced: it has reconnected."""
        if (old := self.members.get(member.id)) is not None:
            self.detach(old)
        self.members[member.id] = member
        self._floor = max(self._floor, min(member.epoch_seen, MAX_EPOCH_SEEN))
        self.gossip.changed()
        self.gossip.tell(member, self.members.values())
        log.info("node %s joined with %.2f GiB", member.name, member.usable_bytes / GIB)
        self._came.set()
        self._changed.set()

    def detach(self, member: Member) -> None:
        """A node is gone."""
        if self.members.get(member.id) is not member:
            return
        del self.members[member.id]
        self.gossip.forget(member)
        self.gossip.changed()
        self._gone_at = time.monotonic()
        if not self._stopping:
            log.warning("node %s is gone", member.name)
        if self._ring.has(member):
            self._break(f"node {member.name} was lost")
        self._changed.set()

    def expel(self, node_id: str, code: str, reason: str) -> bool:
        """End a node's part in the cluster, and tell it why. Whether it was here."""
        member = self.members.get(node_id)
        if member is None:
            return False
        with contextlib.suppress(PeerError):  # it has stopped reading: its stream ends without a word
            member.send(pb.CoordinatorMessage(refused=pb.Refused(code=code, message=reason)))
        self.detach(member)
        member.dismiss()
        return True

    def warn(self, about: str, sentence: str) -> None:
        """Show the owner something in the status, for WARNING_S. It replaces what was said about the same."""
        self._warnings.pop(about, None)
        self._warnings[about] = (time.monotonic(), sentence)
        if len(self._warnings) > WARNINGS:
            del self._warnings[next(iter(self._warnings))]

    def heard(self, member: Member, message: pb.NodeMessage) -> None:
        """A message of an attached node."""
        member.heard = time.monotonic()
        match message.WhichOneof("message"):
            case "heartbeat":
                member.used_bytes = message.heartbeat.memory_used_bytes
                member.busy = message.heartbeat.stages[0].busy if message.heartbeat.stages else 0.0
                self.gossip.tell(member, self.members.values())
            case "stage_event":
                self._on_stage(member, message.stage_event)
            case "leave":
                self.detach(member)

    def _on_stage(self, member: Member, event: pb.StageEvent) -> None:
        if event.epoch != self.epoch or not self._ring.has(member):
            return
        member.stage = event
        if event.HasField("profile"):
            member.profile = event.profile
        if event.HasField("link"):
            member.link = event.link
        if event.state in (pb.STAGE_STATE_FAILED, pb.STAGE_STATE_EXITED, pb.STAGE_STATE_BROKEN):
            self._break(f"{member.name}: {event.detail}", event.code)
        self._changed.set()

    # --- the ring ---

    async def _on_frame(self, data: bytes) -> None:
        if self._dispatcher is not None:
            await self._dispatcher.on_frame(data)

    def _on_open(self, epoch: int) -> None:
        if epoch == self.epoch:
            self._returned.set()

    def _on_hop_lost(self, epoch: int, sender: str) -> None:
        if epoch == self.epoch:
            self._break(f"the connection from {sender} was lost")

    def _break(self, reason: str, code: str = "") -> None:
        """The epoch is over: requests in flight get their error now, ``run`` does the rest."""
        if self._broken.is_set():
            return
        if self.epoch and not self._stopping:
            # While an epoch is brought up this is one attempt of several, and the status tells it.
            level = logging.INFO if self._dispatcher is None else logging.WARNING
            log.log(level, "epoch %d is over: %s", self.epoch, reason)
        self._reason, self._code = reason, code or StageError.code
        self._broken.set()
        self._changed.set()
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is None:
            return
        told = f"the pipeline broke during this request: {reason}; send it again"
        if self.settings.on_loss == "fail" or self._stopping:
            dispatcher.fail(told, RETRY_AFTER_S)
            return
        self._reviving = True
        streams = dispatcher.suspend(told, RETRY_AFTER_S)
        self._waiting.rescue(streams, time.monotonic(), StageError(told, retry_after_s=RETRY_AFTER_S))
        if len(self._waiting):
            log.info("%d streams wait for the next epoch", len(self._waiting))

    def _give_up(self, error: DwarfStarError) -> None:
        """There will be no pipeline soon: who waits for one is told."""
        self._reviving = False
        if lost := self._waiting.fail(error):
            log.warning("%d streams end: %s", lost, error.message)

    # --- bringing epochs up ---

    async def run(self) -> None:
        """Keep an epoch up until cancelled."""
        failures = 0
        watcher = asyncio.create_task(self._watch())
        try:
            while True:
                await self._pause(PAUSE_S[min(failures, len(PAUSE_S) - 1)])
                self._changed.clear()
                try:
                    plan = self._plan_now()
                except PlanError as error:
                    if self._reason != error.message:
                        log.info("no plan: %s", error.message)
                    self._reason, self._code = error.message, error.code
                    if error.code != WAITING:
                        self._give_up(Unavailable(error.message, code=error.code, retry_after_s=RETRY_AFTER_S))
                    await self._until_changed(error.retry_after_s)
                    continue
                try:
                    self.planned = plan
                    await self._bring_up(plan)
                    await self._broken.wait()
                    brief = time.monotonic() - self._served_at < STEADY_S
                    failures = min(failures + 1, MAX_BRIEF) if brief else 0
                except DwarfStarError as error:
                    self._break(error.message, error.code)
                    failures += 1
                finally:
                    await self._take_down()
        finally:
            watcher.cancel()
            self._stopping = True
            self._break("the engine is stopping")
            self._give_up(StageError("the engine is stopping: send the request again", retry_after_s=RETRY_AFTER_S))
            await self._take_down()

    async def _pause(self, pause_s: float) -> None:
        """Wait, but not longer than until a node comes: it may be what was missing."""
        self._came.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._came.wait(), pause_s)

    async def _until_changed(self, at_most_s: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), at_most_s)

    def _plan_now(self) -> Plan:
        """A plan for the nodes that are here. Raises PlanError: nodes are awaited (code WAITING), all of them before
        the first plan, later a lost one for ``rejoin_s`` if the model does not fit those left; or it does not fit."""
        here, wanted = len(self.members), self.settings.wait_nodes
        if here < wanted and not self._served_at:
            raise PlanError(f"{here} of {wanted} nodes have joined", code=WAITING)
        if self._kept is not None and not self._served_at and (plan := self._kept_plan(self._kept)) is not None:
            return plan
        try:
            return self._plan()
        except PlanError as error:
            left = self._gone_at + self.settings.rejoin_s - time.monotonic()
            if here >= wanted or left <= 0:
                raise
            raise PlanError(
                f"a node was lost ({here} of {wanted} are here): it is waited for, at most "
                f"{self.settings.rejoin_s:.0f} s, as the model does not fit the others: {error.message}",
                code=WAITING,
                retry_after_s=left,
            ) from None

    def _kept_plan(self, kept: KeptPlan) -> Plan | None:
        """The plan whose slices the nodes hold; None: it is no more possible. Raises PlanError: they are awaited."""
        left, missing = kept.until - time.monotonic(), kept.awaited - self.members.keys()
        if missing and left > 0:
            raise PlanError(f"{len(missing)} nodes have not come over yet", code=WAITING, retry_after_s=left)
        if not all(node in self.members for node in kept.nodes):
            return None
        capacities = [self.members[node].capacity for node in kept.nodes]
        with contextlib.suppress(PlanError, IllegalCutError):
            room = need(self.settings, self.source, self.context)
            return with_cuts(self.source.costs, self.source.cuts, room, capacities, kept.cuts)
        return None

    def _plan(self) -> Plan:
        costs, nodes = self.source.costs, sorted(self.members.values(), key=lambda m: (m.name, m.id))
        room = need(self.settings, self.source, self.context)
        capacities = [member.capacity for member in nodes]
        if self.settings.cuts:
            return with_cuts(costs, self.source.cuts, room, capacities, self.settings.cuts)
        return proportional(costs, self.source.cuts, room, capacities)

    async def _bring_up(self, plan: Plan) -> None:
        """Assign, wait until all is loaded, close the ring. Raises DwarfStarError if the epoch breaks meanwhile."""
        self.epoch = max(self.epoch, self._floor) + 1
        self._broken.clear()
        self._returned.clear()
        stages = tuple(Stage(s, self.members[s.node]) for s in plan.stages)
        self._ring = Epoch(self.term, self.epoch, self._name, stages)
        self._reason, self._code = "the model is being loaded", "loading"
        log.info("epoch %d: %s", self.epoch, self._ring)
        for index, stage in enumerate(self._ring.stages):
            stage.member.stage = None
            assign = self._ring.assign(index, self.settings, self.source, self.context, self.vocab.eog)
            stage.member.send(pb.CoordinatorMessage(assign=assign))
        await self._until(pb.STAGE_STATE_READY, LOAD_DEADLINE_S, "load its layers")
        try:
            await self._close_ring()
        except DwarfStarError:
            self._release_stuck()
            raise

    async def _close_ring(self) -> None:
        """Join the loaded stages. Raises DwarfStarError."""
        stages = self._ring.stages
        self.receiver.set_epoch(self.epoch, {stages[-1].member.id})
        for index, stage in enumerate(stages):
            stage.member.send(pb.CoordinatorMessage(link=self._ring.link(index)))
        sender = RingSender(lambda reason: self._break(f"the connection to the first stage was lost: {reason}"))
        self._sender = sender
        credentials = channel.channel_credentials(self._trust)
        await sender.open(stages[0].address, credentials, self._build, self.epoch, self._name)
        await self._until(pb.STAGE_STATE_LINKED, LINK_DEADLINE_S, "join the ring")
        try:
            await asyncio.wait_for(self._returned.wait(), LINK_DEADLINE_S)
        except TimeoutError:
            raise PeerError("the last stage did not connect to the coordinator", code="hop_failed") from None
        self._serve(sender)

    def _release_stuck(self) -> None:
        """Have stages that gave no answer replaced: a stopped process would fail every attempt to come."""
        for stage in self._ring.stages:
            event = stage.member.stage
            if event is not None and event.state in ANSWERED and stage.member.id in self.members:
                log.warning("the stage on %s does not answer: it is replaced", stage.member.name)
                with contextlib.suppress(PeerError):
                    stage.member.send(pb.CoordinatorMessage(release=pb.Release(term=self.term, epoch=self.epoch)))

    def _serve(self, sender: RingSender) -> None:
        ring, settings = self._ring, self.settings
        limits = ring.limits(settings, self.context, drafts=self.drafter is not None)
        speculation = Speculation(settings.speculation, ring.costs())
        self._dispatcher = Dispatcher(
            Scheduler(limits, self.vocab.eog, None if settings.speculation == "off" else speculation),
            self.epoch,
            len(ring.stages),
            sender.send,
            sender.flush,
            lambda message: self._break(message),
            self.drafter,
        )
        self._dispatcher.always_draft = settings.speculation == "on"
        self._reason = self._code = ""
        self._reviving = False
        for stream in self._waiting.take():
            try:
                self._dispatcher.carry(stream)
            except DwarfStarError as error:
                stream.sink.fail(error)
        gc.collect()
        gc.freeze()  # the vocabulary and all modules: collections between tokens need not walk them
        self._served_at = time.monotonic()
        count = len(ring.stages)
        log.info("epoch %d serves %s over %d stage%s", self.epoch, self.source.name, count, "s" * (count > 1))

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
                await asyncio.wait_for(self._changed.wait(), max(0.0, left))
            except TimeoutError:
                raise StageError(f"{late[0]} did not {what} in time") from None

    async def _take_down(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            await sender.close()
        self._ring = Epoch(self.term, self.epoch, self._name)

    async def _watch(self) -> None:
        """Find what does not announce itself: silent nodes and frames that do not come back."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for member in [m for m in self.members.values() if m.state(now) == "lost"]:
                log.warning("node %s has been silent for %.1f s", member.name, now - member.heard)
                self.detach(member)
                member.dismiss()
            waited_s, settings = self.settings.rescue_s, self.settings
            error = StageError(f"the pipeline was not back in {waited_s:.0f} s: {self._reason}", retry_after_s=waited_s)
            self._waiting.expire(now, error)
            self._improve(now)
            deadline_s = settings.frame_deadline_s
            if self._dispatcher is not None and self._dispatcher.oldest_age_s(now) > deadline_s:
                self._break(f"a frame has been in the ring for more than {deadline_s:.0f} s: a stage hangs")

    def _improve(self, now: float) -> None:
        """Carry out a plan with nodes that came after the last one, when nobody is served."""
        dispatcher = self._dispatcher
        if dispatcher is None or dispatcher.scheduler.active or dispatcher.scheduler.queued:
            self._idle_since = now
        unused = self.members.keys() - self._ring.nodes
        if now - self._idle_since < REPLAN_IDLE_S or not unused or not self.settings.replan:
            return
        try:
            plan = self._plan()
        except PlanError:
            return  # it was possible before they came; it goes on as it is
        if plan != self.planned and any(stage.node in unused for stage in plan.stages):
            self._break("a better plan is possible")

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
            nodes=tuple(member.view(now) for member in sorted(self.members.values(), key=lambda m: (m.name, m.id))),
            stages=self._ring.views(dispatcher.stages if dispatcher else None, tok_s),
            throughput=ThroughputView(
                tok_s=round(tok_s, 2),
                active=dispatcher.scheduler.active if dispatcher else 0,
                queued=dispatcher.scheduler.queued if dispatcher else 0,
            ),
            warnings=tuple(text for told, text in self._warnings.values() if now - told < WARNING_S),
        )

    def loading(self) -> str:
        """How far the stages are, for people; empty when nothing is being loaded."""
        return "" if self._dispatcher is not None else self._ring.loading()
