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
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any

from dwarfstar_engine.batch.scheduler import Scheduler
from dwarfstar_engine.batch.speculate import Speculation
from dwarfstar_engine.errors import DwarfStarError, PeerError, PlanError, StageError, Unavailable
from dwarfstar_engine.node.dispatcher import Dispatcher
from dwarfstar_engine.node.drafter import Drafter
from dwarfstar_engine.node.epoch import ANSWERED, Epoch, Stage
from dwarfstar_engine.node.gossip import Gossip
from dwarfstar_engine.node.hops import AVOID_S, Hops
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
OVERSLEPT_S = 1.0  # woken so much later than asked, this process was stopped: the silence of that time is its own
STUCK_S = 5.0  # a stage that has not joined the ring after so long is stuck; those that live need a fraction of it
RETRY_AFTER_S = 2.0  # told to clients while an epoch is brought up
PAUSE_S = (0.0, 0.2, 1.0, 3.0, 10.0, 30.0)  # before attempts to bring an epoch up, by failures; the last one repeats
STEADY_S = 5.0  # an epoch that broke sooner counts as a failure: what it runs may be killing its stages
REPLAN_IDLE_S = 2.0  # without a request, before a better plan is carried out: it may take loading
SILENT = "stage_silent"  # code of a stage that did not do in time what it was told
HOP_FAILED = "hop_failed"  # code of a stage that is not reached (``wire.ring``)
WAITING = "waiting_for_nodes"  # code of a plan that is not made yet
WARNINGS = 8  # shown in the status at one time, each for WARNING_S
WARNING_S = 600.0
MAX_WAITED = 3  # such failures pause no longer than this many while streams wait, which is bounded by rescue_s
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
        self._hops = Hops()
        self._build: BuildInfo = local_build()
        self.receiver = RingReceiver(self._build, "the coordinator", self._on_frame, self._on_open, self._on_hop_lost)
        self._ring = Epoch(self.term, self.epoch)
        self._dispatcher: Dispatcher | None = None
        self._sender: RingSender | None = None
        self._planned: Plan | None = None
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

    # --- nodes come, speak and go ---

    def attach(self, member: Member) -> None:
        """A node is here. One of the same id that was here before is replaced: it has reconnected."""
        if (old := self.members.get(member.id)) is not None:
            self.detach(old)
            old.dismiss()
        self.members[member.id] = member
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
        self._hops.forget(member.id)
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
        if event.state == pb.STAGE_STATE_BROKEN and event.code == HOP_FAILED:
            self._not_reached(member)
        if event.state in (pb.STAGE_STATE_FAILED, pb.STAGE_STATE_EXITED, pb.STAGE_STATE_BROKEN):
            self._break(f"{member.name}: {event.detail}", event.code)
        self._changed.set()

    def _not_reached(self, member: Member | None) -> None:
        """A stage, or this process if None, did not reach the next one."""
        members = [stage.member for stage in self._ring.stages]
        index = members.index(member) + 1 if member is not None else 0
        if index < len(members) and self._hops.failed(members[index].id, time.monotonic()):
            told = (
                f"node {members[index].name} is left out for {AVOID_S:.0f} s if the model fits the others: "
                f"{member.name if member else 'the engine'} does not reach its stage at {members[index].host}; "
                "check that a firewall lets machines of the cluster through"
            )
            log.warning("%s", told)
            self.warn(f"hop {members[index].id}", told)

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
                longest = MAX_WAITED if len(self._waiting) else len(PAUSE_S) - 1
                await self._pause(PAUSE_S[min(failures, longest)])
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
                    self._planned = plan
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

    def _plan(self) -> Plan:
        costs, nodes = self.source.costs, sorted(self.members.values(), key=lambda m: (m.name, m.id))
        room = need(self.settings, self.source, self.context)
        capacities = [member.capacity for member in nodes]
        if self.settings.cuts:
            return with_cuts(costs, self.source.cuts, room, capacities, self.settings.cuts)
        if avoided := self._hops.avoided(time.monotonic()):
            with contextlib.suppress(PlanError):  # then those that were not reached are tried again
                others = [member.capacity for member in nodes if member.id not in avoided]
                return proportional(costs, self.source.cuts, room, others)
        return proportional(costs, self.source.cuts, room, capacities)

    async def _bring_up(self, plan: Plan) -> None:
        """Assign, wait until all is loaded, close the ring. Raises DwarfStarError if the epoch breaks meanwhile."""
        self.epoch += 1
        self._broken.clear()
        self._returned.clear()
        self._ring = Epoch(self.term, self.epoch, tuple(Stage(s, self.members[s.node]) for s in plan.stages))
        self._reason, self._code = "the model is being loaded", "loading"
        log.info("epoch %d: %s", self.epoch, self._ring)
        for index, stage in enumerate(self._ring.stages):
            stage.member.stage = None
            assign = self._ring.assign(index, self.settings, self.source, self.context, self.vocab.eog)
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
            stage.member.send(pb.CoordinatorMessage(link=self._ring.link(index)))
        sender = RingSender(lambda reason: self._break(f"the connection to the first stage was lost: {reason}"))
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
            event = stage.member.stage
            if event is not None and event.state in states and stage.member.id in self.members:
                log.warning("the stage on %s does not answer: it is replaced", stage.member.name)
                with contextlib.suppress(PeerError):
                    stage.member.send(pb.CoordinatorMessage(release=pb.Release(term=self.term, epoch=self.epoch)))

    def _serve(self, sender: RingSender) -> None:
        assert not self._broken.is_set()  # or nobody would tell the streams that are taken on now
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
        self._hops.closed()
        self._reviving = False
        for stream in self._waiting.take():
            try:
                self._dispatcher.carry(stream)
            except DwarfStarError as error:
                stream.sink.fail(error)
        if not self._served_at:  # once: what is frozen is never collected, and later there are requests among it
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
                raise StageError(f"{late[0]} did not {what} in time", code=SILENT) from None

    async def _take_down(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            await sender.close()
        self._ring = Epoch(self.term, self.epoch)

    async def _watch(self) -> None:
        """Find what does not announce itself: silent nodes and frames that do not come back."""
        now = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            due, now = now + WATCH_S, time.monotonic()
            if now - due > OVERSLEPT_S:
                self._woke(now)
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

    def _woke(self, now: float) -> None:
        """This process was stopped for a while: what others said meanwhile is not read yet."""
        for member in self.members.values():
            member.heard = now

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
        if plan != self._planned and any(stage.node in unused for stage in plan.stages):
            self._break("a better plan is possible")

    # --- what front ends see ---

    def status(self) -> StatusView:
        """A view of everything, now."""
        now = time.monotonic()
        dispatcher, source = self._dispatcher, self.source
        total = sum(source.costs.layer_bytes) + source.costs.head_bytes
        tok_s = dispatcher.tok_s(now) if dispatcher else 0.0
        return StatusView(
            coordinator=CoordinatorView(address=self.address, term=self.term, api_url=self.api_url),
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
