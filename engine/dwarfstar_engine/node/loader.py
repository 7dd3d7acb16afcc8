"""The owner's hand on the model: another one is loaded, or none, while the engine runs.

Theory. ``check`` finds out all that can be known without touching what runs: the file, its family, its vocabulary, and
whether there is a plan for it. Then the model is changed in four steps. Requests that come wait at a *gate*, before
they are made tokens, as these would be the old model's. Those in flight have DRAIN_S to finish; then they end with an
error that may be tried again. All stages are put down, and pipelines bring up what is served from now on, as they do
at a start (``pipeline``). If one of them cannot, the model before is loaded again in the same way, and the error says
so.

Invariants. One change at a time, and beside it none of plans, pipelines or nodes by the owner's hand. A change goes on
when whoever ordered it goes away. What the cluster keeps (``kept``) is what has served, never what is being tried.

Bounds. As many requests wait as may wait for a slot, and for ``rescue_s`` at most, as when a pipeline is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dwarfstar_engine.errors import (
    DwarfStarError,
    ModelError,
    Overloaded,
    PeerError,
    PlanError,
    StageError,
    Unavailable,
)
from dwarfstar_engine.node.dealer import Dealer
from dwarfstar_engine.node.drafter import Drafter
from dwarfstar_engine.node.journal import Journal, Kind
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.news import News
from dwarfstar_engine.node.pipeline import LOAD_DEADLINE_S, RETRY_AFTER_S, Pipeline
from dwarfstar_engine.node.planner import served_context
from dwarfstar_engine.node.source import NO_MODEL, Source, open_source
from dwarfstar_engine.node.steering import Decided
from dwarfstar_engine.node.vocab import ToyVocab, Vocab
from dwarfstar_engine.plan.forecast import Objective, Strategy
from dwarfstar_engine.plan.planner import plan_cluster
from dwarfstar_engine.plan.proportional import with_cuts
from dwarfstar_engine.plan.shown import plan_view
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import LoadRequest, LoadView, PlanView

log = logging.getLogger("dwarfstar.coordinator")

DRAIN_S = 10.0  # for requests in flight to finish: a short answer's time; a long one would hold up the owner
LOOK_S = 0.05  # at whether they have
BUSY = "busy"
LOADING = "loading"
TRIED = (DwarfStarError, TimeoutError)


class Host(Protocol):
    """The coordinator, as it is seen from here. open_vocab: see ``vocab.open_vocab``."""

    settings: Settings
    main: Source
    source: Source
    vocab: Vocab
    drafter: Drafter | None
    members: dict[str, Member]
    journal: Journal
    news: News
    decided: Decided
    dealer: Dealer
    taking: asyncio.Lock
    pipelines: list[Pipeline]
    term: int
    open_vocab: Callable[[Source], Awaitable[Vocab]]

    @property
    def first(self) -> Pipeline:
        """One that serves, if any does."""

    @property
    def serving(self) -> bool: ...
    @property
    def stopping(self) -> bool: ...
    @property
    def epoch(self) -> int: ...
    @property
    def in_flight(self) -> int:
        """Requests that pipelines carry, or that wait for them."""

    def next_epoch(self) -> int: ...
    def deal_anew(self) -> None:
        """Deal the nodes out to pipelines for the model that is served from now on."""

    def warn(self, about: str, sentence: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """A model and how it is served. main: that is wanted; source: a smaller one may be served in its place, whose
    vocabulary this is. owned: what its owner has decided of plans, by pipeline. taken: and of pipelines."""

    settings: Settings
    main: Source
    source: Source
    vocab: Vocab
    owned: Mapping[int, str] = field(default_factory=dict)
    taken: str = ""


class Loader:
    """See the module. All calls come from the event loop. base: the settings that the engine was started with, which
    count for a model that is loaded with no others."""

    def __init__(self, host: Host, base: Settings) -> None:
        self._host, self.base = host, base
        self._cuts_of = host.main.fingerprint  # the model that the cuts of ``base`` are meant for
        self._changing = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self.waiting = 0  # requests at the gate
        self._news = asyncio.Event()
        self._failure: DwarfStarError | None = None
        self._work: asyncio.Task[LoadView] | None = None
        self._drafter: tuple[str, int, int, Drafter] | None = None  # fingerprint, context and slots it is meant for
        self.kept = host.settings, host.main

    # --- requests ---

    async def settled(self) -> None:
        """Wait at the gate. Raises Overloaded, Unavailable."""
        if self._open.is_set():
            return
        settings = self._host.settings
        if self.waiting >= settings.queue + settings.slots:
            told = "the model is being changed, and as many requests wait as may: send it again in a moment"
            raise Overloaded(told, retry_after_s=RETRY_AFTER_S)
        self.waiting += 1
        try:
            async with asyncio.timeout(settings.rescue_s):
                await self._open.wait()
        except TimeoutError:
            told = f"the model is being changed, for more than {settings.rescue_s:.0f} s now: send the request again"
            raise Unavailable(told, code=LOADING, retry_after_s=settings.rescue_s) from None
        finally:
            self.waiting -= 1

    @property
    def changing(self) -> bool:
        """Whether what is served may be taken back."""
        return self._changing.locked()

    # --- what the coordinator tells ---

    def served(self) -> None:
        """A pipeline serves."""
        self._news.set()

    def failed(self, error: DwarfStarError) -> None:
        """A pipeline cannot serve what is to be served now."""
        self._failure = self._failure or error
        self._news.set()

    # --- orders ---

    async def load(self, wanted: LoadRequest) -> LoadView:
        """Serve another model; returns when it serves. Raises DwarfStarError: what served before does again."""
        if self._changing.locked():
            raise _busy()
        chosen, plan = await self._check(wanted)
        view = LoadView(
            model=chosen.main.name,
            before=self._host.main.name,
            streams=self._host.in_flight,
            plan=plan,
            context=plan.context,
            slots=chosen.settings.slots,
            epoch=self._host.epoch,
        )
        if wanted.check:
            await chosen.vocab.close()
            return view
        return await self._ordered(self._load(chosen, view))

    async def unload(self) -> LoadView:
        """Serve no model. Raises PlanError: there is none, or something else is being changed."""
        main = self._host.main
        if not main.loaded:
            raise PlanError("no model is loaded", code="no_model")
        return await self._ordered(self._unload(LoadView(model="", before=main.name, streams=0)))

    async def _ordered(self, work: Coroutine[None, None, LoadView]) -> LoadView:
        """Carry out, also if the caller goes away meanwhile."""
        task = self._work = asyncio.create_task(work, name="model")
        return await asyncio.shield(task)

    def adopt(self, chosen: Chosen) -> None:
        """Serve this model: before the coordinator runs, or while it does not."""
        self._install(chosen)
        self.kept = chosen.settings, chosen.main

    # --- what can be known before ---

    async def _check(self, wanted: LoadRequest) -> tuple[Chosen, PlanView]:
        """Raises DwarfStarError, ModelError among them: it cannot be served here."""
        base = self.base
        if base.mixed:  # nodes are asked when they come, and only then
            told = "nodes told their files of the model that the engine was started with: with --mixed, start it anew"
            raise PlanError(told, code="needs_restart")
        try:
            source = await asyncio.to_thread(open_source, wanted.model, base.models_dir, base.kv)
        except OSError as error:
            raise ModelError(f"{wanted.model} cannot be read: {error.strerror or error}") from None
        given = {name: size for name in ("context", "slots") if (size := getattr(wanted, name)) is not None}
        cuts = base.cuts if source.fingerprint == self._cuts_of else ()
        settings = base.model_copy(update={**given, "cuts": cuts})
        plan = await self._planned(source, settings)
        return Chosen(settings, source, source, await self._host.open_vocab(source)), plan

    async def _planned(self, source: Source, settings: Settings) -> PlanView:
        """The plan of all nodes that are here, as if nothing ran. Raises PlanError, IllegalCutError."""
        nodes = sorted(self._host.members.values(), key=lambda one: (one.name, one.id))
        here = [one for one in nodes if not one.drained]
        if not here:
            raise PlanError("no node has joined yet: start one with `dwarfstar node`", code="no_nodes")
        context = served_context(settings, source)
        survey = self._host.decided.surveyor.survey(here, source, settings, context)
        capacities = [one.capacity for one in here]

        def plan() -> PlanView:
            if settings.cuts:
                with_cuts(source.costs, source.cuts, need(settings, source, context), capacities, settings.cuts)
            wishes = Strategy(settings.strategy), Objective(settings.objective)
            return plan_view(source.name, survey.job, plan_cluster(survey.cluster, survey.job, *wishes), None)

        return await asyncio.to_thread(plan)

    # --- changes ---

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """With nothing else being changed by the owner, and requests at the gate. Raises PlanError: something is."""
        pipelines = self._host.pipelines
        locks = [
            self._changing,
            self._host.taking,
            *(lock for one in pipelines for lock in (one.steering.order, one.moves.order)),
        ]
        if any(lock.locked() for lock in locks):
            raise _busy()
        async with contextlib.AsyncExitStack() as stack:
            for lock in locks:
                await stack.enter_async_context(lock)  # free, so at once
            self._open.clear()
            stack.callback(self._open.set)
            yield

    async def _load(self, chosen: Chosen, view: LoadView) -> LoadView:
        host, began = self._host, time.monotonic()
        name = chosen.main.name
        before: Chosen | None = None
        try:
            async with self._alone():
                await self._drain()
                before = self._present()
                streams = self._change(chosen, f"its owner loads {name}", f"{name} is being loaded")
                try:
                    await self._serves()
                except TRIED as error:
                    raise await self._back(before, name, _said(error)) from None
                self.kept = chosen.settings, chosen.main
        except BaseException:
            if host.vocab is not chosen.vocab:
                await chosen.vocab.close()
            raise
        await before.vocab.close()
        took_s = time.monotonic() - began
        self._tell(f"the model {name} is loaded by the owner in {took_s:.1f} s", name)
        told = {"streams": streams, "epoch": host.epoch, "took_s": round(took_s, 2)}
        with contextlib.suppress(PlanError):  # it broke in this moment
            return view.model_copy(update={**told, "plan": host.first.steering.present_view()})
        return view.model_copy(update=told)

    async def _unload(self, view: LoadView) -> LoadView:
        host, began = self._host, time.monotonic()
        async with self._alone():
            await self._drain()
            before = self._present()
            none = Chosen(self.base, NO_MODEL, NO_MODEL, ToyVocab())
            streams = self._change(none, f"its owner unloads {view.before}", "")
            self.kept = none.settings, NO_MODEL
        await before.vocab.close()
        self._tell(f"the model {view.before} is unloaded by the owner", "")
        took_s = round(time.monotonic() - began, 2)
        return view.model_copy(update={"streams": streams, "epoch": host.epoch, "took_s": took_s})

    async def _drain(self) -> None:
        """Let requests in flight finish, for DRAIN_S."""
        end = time.monotonic() + DRAIN_S
        while self._host.in_flight and time.monotonic() < end:  # noqa: ASYNC110 - told by nobody
            await asyncio.sleep(LOOK_S)
        self._still_leads()

    def _still_leads(self) -> None:
        if self._host.stopping:
            raise PeerError("this node leads no more: nothing was changed", code="not_leading")

    def _present(self) -> Chosen:
        host = self._host
        owned = {one.number: one.steering.owner_text for one in host.pipelines}
        return Chosen(host.settings, host.main, host.source, host.vocab, owned, host.dealer.text)

    def _change(self, chosen: Chosen, why: str, reason: str) -> int:
        """Put down what runs and have this brought up; how many streams ended. reason: for who asks meanwhile."""
        host = self._host
        self._failure = None
        self._install(chosen)
        host.news.unloaded()
        code = LOADING if chosen.main.loaded else "no_model"
        ended = sum(one.put_down(why, reason or "no model is loaded", code) for one in host.pipelines)
        epoch = host.next_epoch()
        for member in list(host.members.values()):
            host.pipelines[0].moves.beside.release(member, (), host.term, epoch)
        if chosen.main.loaded:
            host.deal_anew()
        for one in host.pipelines:
            one.stir()
        return ended

    def _install(self, chosen: Chosen) -> None:
        """Have the coordinator's parts know what is served."""
        host = self._host
        if self._drafter is None and host.drafter is not None:
            self._drafter = (
                host.main.fingerprint,
                served_context(host.settings, host.main),
                host.settings.slots,
                host.drafter,
            )
        same = host.main.fingerprint == chosen.main.fingerprint
        taken = chosen.taken or (host.dealer.text if same else "")
        host.settings, host.main, host.source, host.vocab = chosen.settings, chosen.main, chosen.source, chosen.vocab
        host.drafter = self._drafter_of(chosen)
        host.dealer.for_model(taken)
        for one in host.pipelines:
            one.planner.serve(chosen.main, chosen.settings)
            one.steering.other_model(chosen.owned.get(one.number, one.steering.owner_text if same else ""))

    def _drafter_of(self, chosen: Chosen) -> Drafter | None:
        """The draft model, where it is one for this."""
        if self._drafter is None or not chosen.main.loaded:
            return None
        fingerprint, context, slots, drafter = self._drafter
        fits = served_context(chosen.settings, chosen.main) <= context and chosen.settings.slots <= slots
        if fingerprint == chosen.main.fingerprint and fits:
            return drafter
        self._host.warn(
            "drafter", f"the draft model is not used: it was started for another model than {chosen.main.name}"
        )
        return None

    async def _serves(self) -> None:
        """Until what was installed serves. Raises DwarfStarError: it does not; TimeoutError."""
        host = self._host
        async with asyncio.timeout(LOAD_DEADLINE_S):
            while True:
                self._news.clear()
                self._still_leads()
                if self._failure is not None:
                    raise self._failure
                if host.serving and all(one.serving for one in host.pipelines if one.members):
                    break
                await self._news.wait()
        if host.source is not host.main:
            raise PlanError(f"it does not fit the nodes that are left, and {host.source.name} does", code="no_plan")

    async def _back(self, before: Chosen, name: str, why: str) -> DwarfStarError:
        """Serve what served before, after ``name`` could not be loaded; the error to raise."""
        told = f"{name} could not be loaded: {why}"
        if self._host.stopping:
            self._install(before)
            return StageError(told)
        self._change(before, told, f"{before.main.name} is loaded again: {told}" if before.main.loaded else "")
        end = "no model is loaded, as before"
        if before.main.loaded:
            try:
                await self._serves()
                end = f"{before.main.name} is loaded again"
            except TRIED as error:
                end = f"and {before.main.name} is not loaded again yet: {_said(error)}"
        self._tell(f"{told}; {end}", name, level=logging.WARNING)
        return StageError(f"{told}; {end}", code="not_loaded")

    def _tell(self, text: str, name: str, level: int = logging.INFO) -> None:
        self._host.journal.add(Kind.OWNER_MODEL, text, details={"model": name, "epoch": self._host.epoch}, level=level)


def _said(error: BaseException) -> str:
    if isinstance(error, DwarfStarError):
        return error.message
    return f"it was not loaded within {LOAD_DEADLINE_S:.0f} s"


def _busy() -> PlanError:
    return PlanError("something else is being changed now: wait until that is done", code=BUSY)
