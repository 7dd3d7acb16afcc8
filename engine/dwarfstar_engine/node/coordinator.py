"""The coordinator: knows the nodes, deals them out to pipelines, and serves requests on these.

Theory. What concerns one ring is the ring's (``pipeline``): its plan, its epochs, the streams it carries. Here is what
all have in common: which nodes there are, the model, the journal, the engine behind the HTTP API (``serving.Engine``),
and the service that the last stages' hops come in by. The coordinator holds no weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from dwarfstar_engine.batch.router import route
from dwarfstar_engine.errors import DwarfStarError, NoModel, PlanError, StageError, Unavailable
from dwarfstar_engine.node.dealer import Dealer, Seen
from dwarfstar_engine.node.drafter import Drafter
from dwarfstar_engine.node.epoch import Epoch
from dwarfstar_engine.node.files import Files
from dwarfstar_engine.node.gossip import Gossip
from dwarfstar_engine.node.journal import Journal
from dwarfstar_engine.node.journal import Kind as Happening
from dwarfstar_engine.node.kept_plan import KeptPlan
from dwarfstar_engine.node.loader import Loader
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.node.moves import REPLAN_IDLE_S, Moves
from dwarfstar_engine.node.news import News
from dwarfstar_engine.node.nodes import Nodes
from dwarfstar_engine.node.pipeline import LOAD_DEADLINE_S, RETRY_AFTER_S, Pipeline
from dwarfstar_engine.node.planner import Planner, served_context
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.node.steering import STALE, Decided, Steering
from dwarfstar_engine.node.vocab import Vocab, open_vocab
from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.plan.proportional import TOO_LARGE, Plan
from dwarfstar_engine.plan.shares import SPARE
from dwarfstar_engine.serving import Generation, ModelInfo, Request, Sink
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import CommitView, CoordinatorView, ModelView, StatusView, ThroughputView
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.loop import until_beat
from dwarfstar_engine.wire.ring import RingReceivers, SpareChannels
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.coordinator")

WATCH_S = 0.5
CARRY_S = 1.0  # a pipeline that is down for so long may be loading: what waits for it goes where slots become free
WARNINGS = 8  # shown in the status at one time, each for WARNING_S
WARNING_S = 600.0
MAX_EPOCH_SEEN = 1 << 31  # what a node says to have seen is believed up to here


class Coordinator:
    """See the module. ``api_url`` and ``address`` are for the status only, set once they are known. Before it runs:
    ``drafter``, if there is a draft model; ``planner.fallbacks``, smaller models for when ``source`` does not fit.
    source may be ``NO_MODEL``."""

    def __init__(self, settings: Settings, source: Source, vocab: Vocab, trust: NodeFiles, name: str) -> None:
        self.settings, self.source, self.vocab, self.trust, self.name = settings, source, vocab, trust, name
        self.drafter: Drafter | None = None
        self.address = self.api_url = ""
        self.term = 1
        self.main = source
        self.open_vocab: Callable[[Source], Awaitable[Vocab]] = open_vocab
        self.journal = Journal()
        self.nodes = Nodes(settings, self, self.journal)
        self.members = self.nodes.members
        self.news = News(self.journal)
        self.gossip = Gossip()
        self.files = Files(self)
        self.build = local_build()
        self.receiver = RingReceivers()
        self.spare = SpareChannels()
        self.decided = Decided()
        self.sequences: Iterator[int] = itertools.count(1)
        self._stopping = self._frozen = False
        self._last_epoch = 0
        self._floor = 0  # epochs begin above it: nodes have seen it
        self._warnings: dict[str, tuple[float, str]] = {}
        self._created = int(time.time())
        self.dealer = Dealer(self, self.decided.surveyor)
        self.taking = asyncio.Lock()  # held while nodes are dealt out as ordered
        self._served = asyncio.Event()  # a pipeline began to
        self._group: asyncio.TaskGroup | None = None  # while it runs
        self.pipelines: list[Pipeline] = []
        self._add_pipelines()
        self.loader = Loader(self, settings)

    def _add_pipelines(self) -> None:
        """Have as many as nodes are dealt out to."""
        for number in range(len(self.pipelines), self.dealer.count):
            pipeline = Pipeline(self, number, self.dealer.share(number))
            self.receiver.add(pipeline.receiver)
            self.pipelines.append(pipeline)
            if self._group is not None:
                self._group.create_task(pipeline.run(), name=f"pipeline-{number}")

    # --- the first pipeline, which is the only one mostly ---

    @property
    def epoch(self) -> int:
        """The newest that was begun."""
        return max(one.epoch for one in self.pipelines)

    @property
    def planner(self) -> Planner:
        return self.pipelines[0].planner

    @property
    def moves(self) -> Moves:
        return self.pipelines[0].moves

    @property
    def steering(self) -> Steering:
        return self.pipelines[0].steering

    @property
    def ring(self) -> Epoch:
        return self.pipelines[0].ring

    @property
    def planned(self) -> Plan | None:
        return self.pipelines[0].planned

    def plan(self, without: Collection[str] = ()) -> Plan:
        """See ``moves.Pipeline``."""
        return self.pipelines[0].plan(without)

    @property
    def first(self) -> Pipeline:
        """The first that serves, or else that has nodes: a new dealing may leave the one with number 0 none."""
        return max(self.pipelines, key=lambda one: (one.serving, len(one.members) > 0, -one.number))

    @property
    def serving(self) -> bool:
        """Whether a pipeline is up."""
        return any(one.serving for one in self.pipelines)

    # --- serving.Engine ---

    async def settled(self) -> None:
        await self.loader.settled()

    def model(self) -> ModelInfo:
        if not self.source.loaded:
            raise NoModel
        return ModelInfo(
            name=self.source.name,
            created=self._created,
            context=self.context,
            vocab_size=self.vocab.size,
            layers=self.source.layers,
            eog_tokens=self.vocab.eog,
        )

    def health(self) -> Mapping[str, Any]:
        first = self.first
        if self.serving:
            return {"status": "ok", "epoch": self.epoch, "cuts": [s.plan.layers[1] for s in first.ring.stages[:-1]]}
        return {"status": "unavailable", "code": first.code, "reason": first.reason}

    async def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return await self.vocab.chat(messages)

    async def text_tokens(self, text: str) -> list[int]:
        return await self.vocab.text(text)

    def token_bytes(self, token: int) -> bytes:
        return self.vocab.piece(token)

    def generate(self, request: Request, sink: Sink) -> Generation:
        if request.model not in ("", self.source.name):  # it changed since the prompt was made tokens
            raise Unavailable(f"{self.source.name} is served now: send the request again", retry_after_s=RETRY_AFTER_S)
        pipeline = self._route([one for one in self.pipelines if one.serving], request)
        if pipeline is not None and pipeline.dispatcher is not None:
            return pipeline.dispatcher.generate(request, sink)
        for one in self.pipelines:
            if one.takes_in:
                return one.wait(request, sink)
        first = self.first
        told = f"the model is not being served: {first.reason}"
        raise Unavailable(told, code=first.code, retry_after_s=RETRY_AFTER_S)

    def _route(
        self, among: Sequence[Pipeline], request: Request, answer: Sequence[int] = (), *, waits: bool = True
    ) -> Pipeline | None:
        """The one of these, all of which serve, that is to take a request; see ``batch.router``."""
        if len(among) == 1 and waits:
            return among[0]
        prompt = [*request.prompt, *answer] if request.cache else None
        loads = [one.load(prompt) for one in among]
        number = route(loads, waits=waits)
        return None if number is None else self.pipelines[number]

    # --- terms ---

    def begin(self, term: int, kept: KeptPlan | None = None) -> None:
        """Lead ``term``: before ``run``, or while it runs, which assigns everything anew then. kept: nodes' slices."""
        goes_on = not self._stopping and self._last_epoch > 0
        if not goes_on:
            self._stopping = self.nodes.stopping = False
        for pipeline in self.pipelines:
            if goes_on:
                pipeline.break_up(f"term {term} begins")
            else:
                pipeline.begin(None if self.dealer.wanted.several else kept)
        self.term = term

    def retire(self, cause: str) -> None:
        """Lead no more: every request ends now, and nodes are sent away. ``run`` is to be cancelled."""
        self._stopping = True
        self.loader.served()  # it looks
        for pipeline in self.pipelines:
            pipeline.end(cause)
        self.nodes.stopping = True
        for member in list(self.members.values()):
            self.nodes.broken(member)
            member.dismiss()

    # --- nodes come, speak and go ---

    def joined(self, member: Member) -> None:
        """See ``nodes.Host``."""
        self.steering.joined(member)
        self._floor = max(self._floor, min(member.epoch_seen, MAX_EPOCH_SEEN))
        self.gossip.changed()
        self.gossip.tell(member, self.members.values())
        changed = self.dealer.joined(member, on_main=self.on_main)
        self._dealt(changed)
        if member.id not in changed:
            self.pipeline_of(member).joined(member)
        if not self.main.loaded:
            self.moves.beside.release(member, (), self.term, self.next_epoch())  # it was away when that was unloaded

    def gone(self, member: Member) -> None:
        """See ``nodes.Host``."""
        self.gossip.forget(member)
        self.news.forget(member)
        self.gossip.changed()
        self.dealer.gone()
        self.pipeline_of(member).gone(member)

    def pipeline_of(self, member: Member) -> Pipeline:
        """The pipeline a node is dealt to; the first hears what spare ones say."""
        return self.pipelines[max(0, self.dealer.dealt.get(member.id, 0))]

    def pipeline_at(self, number: int) -> Pipeline:
        """0: the first that can be spoken of. Raises PlanError: there is none of that number."""
        if number == 0:
            return self.first
        if number < len(self.pipelines):
            return self.pipelines[number]
        count = len(self.pipelines)
        raise PlanError(f"there is no pipeline {number}: there are {count}, from 0", code="no_such_pipeline")

    def pipeline_in(self, epoch: int) -> Pipeline:
        """The one that serves that epoch; the first if none does, which will say so, or if it is 0."""
        return next((one for one in self.pipelines if epoch and one.epoch == epoch), self.pipelines[0])

    def restore(self, taken: object) -> None:
        """What its owner has taken, as the cluster has kept it; before ``begin``."""
        self.dealer.restore(taken)
        self._add_pipelines()

    async def take(self, kind: Kind | None, base_epoch: int = 0) -> CommitView:
        """Serve as one of the advisor's alternatives from now on, also after a restart; None: as it was told to.
        Returns when all of it serves. Streams wait meanwhile. Raises DwarfStarError: that is not possible, or no more;
        TimeoutError: it is being loaded still."""
        why = "what its owner had taken is over" if kind is None else f"its owner has taken: {kind}"
        async with self.taking:
            if base_epoch not in (0, self.first.epoch):
                raise PlanError("another plan serves than the one this was proposed for: look again", code=STALE)
            if self.source is not self.main:
                raise PlanError(f"{self.source.name} is served in the place of {self.main.name}", code="not_possible")
            before = self.first.steering.present_view()
            changed = self.dealer.take(kind)
            self._dealt(changed)
            for number in {one for one in changed.values() if one != SPARE}:
                pipeline = self.pipelines[number]
                if pipeline.serving:  # it keeps what it has and gets more: what is missing is loaded first
                    await pipeline.moves.change(pipeline.plan(), why)
            async with asyncio.timeout(LOAD_DEADLINE_S):
                while not all(one.serving for one in self.pipelines if one.members):
                    self._served.clear()
                    await self._served.wait()
        self.journal.add(Happening.OWNER_PLAN, why, details={"epoch": self.epoch})
        return CommitView(epoch=self.epoch, loaded_first=False, before=before, after=self.first.steering.present_view())

    def _dealt(self, changed: Mapping[str, int]) -> None:
        """Nodes are in other pipelines now."""
        if not changed:
            return
        self._add_pipelines()
        for pipeline in self.pipelines:
            pipeline.lose({node for node, number in changed.items() if number != pipeline.number})
        for node, number in changed.items():
            member = self.members.get(node)
            if member is not None and number != SPARE:
                self.pipelines[number].joined(member)
            elif member is not None:
                self.moves.beside.release(member, (), self.term, self.next_epoch())  # nothing it holds is needed
        for pipeline in self.pipelines:
            pipeline.stir()  # also those whose nodes stay: they may have waited for more

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
        pipeline = self.pipeline_of(member)
        match kind:
            case "heartbeat":
                member.live = message.heartbeat
                for report in message.heartbeat.stages:
                    pipeline.reported(member, report)
                self.gossip.tell(member, self.members.values())
            case "stage_event":
                pipeline.heard(member, message.stage_event)
            case "carried":
                pipeline.carrying.heard(member, message.carried)
            case "leave":
                self.nodes.left(member, message.leave.reason)
            case "leave_wish":
                pipeline.moves.wish(member)

    @property
    def on_main(self) -> bool:
        """Whether the model that is wanted is served, and no smaller one, nor none."""
        return self.source is self.main and self.main.loaded

    def deal_anew(self) -> None:
        """See ``loader.Host``."""
        self._add_pipelines()
        if len(self.pipelines) > 1 or self.dealer.wanted.several:
            with contextlib.suppress(PlanError):  # nobody is here
                self._dealt(self.dealer.anew())

    @property
    def in_flight(self) -> int:
        schedulers = [one.dispatcher.scheduler for one in self.pipelines if one.dispatcher is not None]
        return sum(one.active + one.queued for one in schedulers) + sum(len(one.waiting) for one in self.pipelines)

    # --- pipeline.Host ---

    @property
    def stopping(self) -> bool:
        return self._stopping

    def others_serve(self, pipeline: Pipeline) -> bool:
        return any(one.serving for one in self.pipelines if one is not pipeline)

    def alone(self, pipeline: Pipeline) -> bool:
        return len(self.dealer.share(pipeline.number)) == len(self.members)

    def expected(self, pipeline: Pipeline) -> int:
        return self.dealer.expected(pipeline.number)

    def broke(self, pipeline: Pipeline, *, for_good: bool) -> None:
        others = [one for one in self.pipelines if one is not pipeline and one.serving]
        if not others:
            return
        pipeline.judge()
        carried = 0
        while (stream := pipeline.waiting.first()) is not None:
            target = self._route(others, stream.request, stream.answer, waits=for_good)
            if target is None:
                break
            pipeline.waiting.release(stream)
            target.carry(stream)
            carried += 1
        self.news.carried_over(carried)

    @property
    def context(self) -> int:
        """Tokens of one request, at most."""
        return served_context(self.settings, self.source)

    def next_epoch(self) -> int:
        self._last_epoch = max(self._last_epoch, self._floor) + 1
        return self._last_epoch

    def failed(self, pipeline: Pipeline, error: DwarfStarError) -> None:
        if pipeline.members or not pipeline.number:
            self.loader.failed(error)

    def serves(self) -> None:
        self._served.set()
        self.loader.served()
        if not self._frozen:  # once: what is frozen is never collected, and later there are requests among it
            self._frozen = True
            gc.collect()
            gc.freeze()  # the vocabulary and all modules: collections between tokens need not walk them

    def gave_up(self, pipeline: Pipeline) -> bool:
        now = time.monotonic()
        changed = self.dealer.mended(now, self._seen(now)) if self.on_main else {}
        self._dealt(changed)
        if pipeline.number in changed.values():
            return False
        others = (one for one in self.pipelines if one is not pipeline and one.members)
        heir = next((one for one in others if one.reviving or one.number in changed.values()), None)
        while heir is not None and (stream := pipeline.waiting.first()) is not None:
            pipeline.waiting.release(stream)
            stream.slot = -1  # where it was, another ring's stages held it
            heir.waiting.put(stream, now)
            heir.reviving = True
        return True

    async def use(self, source: Source) -> None:
        """Who waits has tokens of the old one. Raises ModelError."""
        if source is self.source:
            return
        main = self.main
        vocab = await self.open_vocab(source)
        if self.main is not main:
            await vocab.close()
            raise StageError("its owner has changed the model meanwhile")
        log.warning("serving %s from now on in the place of %s", source.name, self.source.name)
        told = f"{self.source.name} is not served any more, {source.name} is: send the request again"
        for pipeline in self.pipelines:
            pipeline.give_up(Unavailable(told, code=TOO_LARGE, retry_after_s=RETRY_AFTER_S))
        old, self.source, self.vocab = self.vocab, source, vocab
        await old.close()

    # --- running ---

    async def run(self) -> None:
        """Keep the pipelines up until cancelled."""
        watchers = [asyncio.create_task(self._watch()), asyncio.create_task(self.nodes.run())]
        for watcher in watchers:
            watcher.add_done_callback(_tell_fault)
        self.news.settings(self.settings)
        try:
            async with asyncio.TaskGroup() as self._group:
                for pipeline in self.pipelines:
                    self._group.create_task(pipeline.run(), name=f"pipeline-{pipeline.number}")
                try:
                    await asyncio.Event().wait()
                finally:
                    self._group = None
                    self._end(watchers)
        finally:
            await self.spare.close()

    def _end(self, watchers: Sequence[asyncio.Task[None]]) -> None:
        for watcher in watchers:
            watcher.cancel()
        self._stopping = self.nodes.stopping = True
        self.loader.served()  # it looks
        self.journal.release()
        for pipeline in self.pipelines:
            pipeline.end("the engine is stopping")

    async def _watch(self) -> None:
        """Have the pipelines look for what does not announce itself."""
        while True:
            await asyncio.sleep(until_beat(WATCH_S))
            now = time.monotonic()
            for pipeline in self.pipelines:
                pipeline.tick(now)
                if not pipeline.serving and len(pipeline.waiting) and now - pipeline.broke_at > CARRY_S:
                    self.broke(pipeline, for_good=False)
            if len(self.pipelines) > 1:
                self._level()
            self._dealt(self.dealer.look(now, self._seen(now), on_main=self.on_main))

    def _seen(self, now: float) -> list[Seen]:
        return [Seen(one.serving, one.gone_at, one.idle_s(now) >= REPLAN_IDLE_S) for one in self.pipelines]

    def _level(self) -> None:
        """Requests that wait for a slot go where one has become free."""
        for pipeline in self.pipelines:
            others = [one for one in self.pipelines if one is not pipeline and one.serving]
            if pipeline.dispatcher is None or not others:
                continue
            free = sum(one.load(None).free for one in others)
            for stream in pipeline.dispatcher.recall(min(free, pipeline.load(None).excess)):
                target = self._route(others, stream.request, stream.answer, waits=True)
                assert target is not None
                target.carry(stream)

    # --- what front ends see ---

    def status(self) -> StatusView:
        """A view of everything, now."""
        now = time.monotonic()
        source, first = self.source, self.first
        total = sum(source.costs.layer_bytes) + source.costs.head_bytes
        serving = [one.dispatcher for one in self.pipelines if one.dispatcher is not None]
        return StatusView(
            coordinator=CoordinatorView(
                address=self.address, term=self.term, api_url=self.api_url, leader=self.name, leads=not self._stopping
            ),
            model=ModelView(
                name=source.name,
                architecture=source.architecture,
                layers=source.layers,
                legal_cuts=source.cuts,
                weights_gib=round(total / GIB, 4),
                context=self.context,
            )
            if source.loaded
            else None,
            epoch=self.epoch,
            state="serving" if serving else "starting" if first.code in ("starting", "loading") else "unavailable",
            reason="" if serving else first.reason,
            nodes=self.nodes.views(),
            stages=tuple(view for one in self.pipelines for view in one.views()),
            throughput=ThroughputView(
                tok_s=round(sum(one.tok_s(now) for one in serving), 2),
                active=sum(one.scheduler.active for one in serving),
                queued=sum(one.scheduler.queued for one in serving) + self.loader.waiting,
            ),
            last_event=self.journal.last,
            standbys=tuple(view for one in self.pipelines for view in one.moves.views()),
            warnings=tuple(text for told, text in self._warnings.values() if now - told < WARNING_S),
        )

    def loading(self) -> str:
        """How far the stages are, for people; empty when nothing is being loaded."""
        return "" if self.serving else "; ".join(told for one in self.pipelines if (told := one.loading()))


def _tell_fault(task: asyncio.Task[None]) -> None:
    """A watcher that ends by itself is a fault of ours."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a fault of the coordinator", exc_info=error)
