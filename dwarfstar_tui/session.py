"""The one that talks to the engine: a thread with an event loop of its own, apart from the app's.

Theory. What the app asks for goes in as commands, what there is to know comes out as updates (:mod:`.updates`) into a
mailbox. The session attaches, asks for the status at a steady pace and follows the events from the last number it has.
When the engine does not answer it says so once, and tries again, at first soon and then every BACKOFF_S[-1] seconds;
the events go on where they ended. An engine that is started anew counts from 1, which its first status tells; a later
one says nothing of the kind, as events may have come since it was asked for.

Bounds: TASKS_MAX commands under way (what comes beyond is refused, and said), one answer for each number.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.views import (
    CommitView,
    EventsView,
    LoadRequest,
    LoadView,
    OverrideView,
    PlanRequest,
    ProposalView,
    StatusView,
)
from dwarfstar_tui import updates
from dwarfstar_tui.mailbox import Mailbox
from dwarfstar_tui.model_change import done_text
from dwarfstar_tui.plan_calls import Plans
from dwarfstar_tui.updates import (
    AnswerOver,
    AnswerPiece,
    Command,
    Happened,
    Linked,
    LinkState,
    Notice,
    StatusSeen,
    Update,
)

STATUS_S = 0.25
SLOW_STATUS_S = 1.0  # over a thin line
BACKOFF_S = (0.25, 0.5, 1.0, 2.0, 5.0)
PIECES_S = 0.1  # pieces of an answer are put together for so long: Markdown is laid out that often
PULL_S = 0.25  # between two states of a download
LOOK_S = 0.2  # at what a starting engine says
TASKS_MAX = 64
STOP_S = 2.0  # for tasks to end when the app does


@dataclass(frozen=True, slots=True)
class Delta:
    """Some of an answer. The last one has its finish and what it took."""

    text: str
    finish: str = ""
    prompt_tokens: int = 0
    tokens: int = 0


class Engine(Protocol):
    """A running engine, attached. All raise DwarfStarError."""

    @property
    def label(self) -> str:
        """Where it is, for people."""
        ...

    async def status(self) -> StatusView: ...
    def events(self, since: int) -> AsyncIterator[EventsView]: ...
    async def drain(self, node: str, undo: bool) -> str: ...
    async def remove(self, node: str) -> str: ...
    async def rename(self, node: str, name: str) -> str: ...
    async def stop(self) -> None: ...
    async def propose(self, request: PlanRequest) -> ProposalView: ...
    async def commit(self, request: PlanRequest, base_epoch: int) -> CommitView: ...
    async def undo(self) -> CommitView: ...
    async def override(self, node: str, text: str, replan: bool) -> OverrideView: ...
    async def load(self, request: LoadRequest) -> LoadView: ...
    async def unload(self) -> LoadView: ...
    def chat(self, messages: Sequence[tuple[str, str]], options: dict[str, float | int]) -> AsyncIterator[Delta]: ...
    async def close(self) -> None: ...


class Starting(Protocol):
    """An engine process that was started and has not answered yet."""

    def lines(self) -> list[str]:
        """What it has said since the last call."""
        ...

    def ended(self) -> bool: ...


class Place(Protocol):
    """This machine, and the home an engine runs from. All raise DwarfStarError."""

    async def find(self) -> Engine | None:
        """The running engine; None: there is none."""
        ...

    async def start(self, arguments: Sequence[str]) -> Starting: ...
    async def models(self) -> updates.ModelsFound: ...
    async def judge(self, paths: Sequence[str], status: StatusView) -> updates.ModelsJudged: ...
    async def pull(self, wanted: str, tell: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        """Have a model in the models folder; what to say of it. tell: from any thread, how far it is."""
        ...

    async def surroundings(self) -> updates.Surroundings: ...
    async def token(self, hours: float) -> updates.TokenMade: ...
    async def read_chats(self) -> updates.ChatsRead: ...
    async def keep_chat(self, chat_id: str, text: str) -> None: ...


class Session:
    """See the module. ``submit`` and ``close`` are called from the app's thread, everything else runs in its own."""

    def __init__(
        self,
        place: Place,
        mailbox: Mailbox,
        *,
        low_bandwidth: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._mailbox, self._clock = place, mailbox, clock
        self._every_s = SLOW_STATUS_S if low_bandwidth else STATUS_S
        self._engine: Engine | None = None
        self._link: tuple[LinkState, str] | None = None  # as it was told last
        self._last_event, self._number = 0, 0  # the number of the engine that they are of
        self._starting: Starting | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: dict[int, asyncio.Task[None]] = {}
        self._plans = Plans(self._attached_engine, mailbox.put)
        self._pulling, self._pull_stopped = "", threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._hurry: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)

    # --- the app's thread ---

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def submit(self, command: Command) -> None:
        """Carry out a command; what comes of it is an update. After the end it is nobody's any more."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._accept, command)

    def close(self) -> None:
        """End the thread. The engine runs on."""
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_S * 2)

    # --- the session's own ---

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._hurry = asyncio.Event()
        self._ready.set()
        attached = asyncio.create_task(self._keep_attached())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([attached, stopping], return_when=asyncio.FIRST_COMPLETED)
        if attached.done() and (fault := attached.exception()) is not None:
            self._linked(LinkState.DOWN, f"a fault of this program: {fault!r}")
            await self._stopping.wait()
        self._pull_stopped.set()
        waiting = [attached, stopping, *self._tasks]
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=STOP_S)
        if self._engine is not None:
            with contextlib.suppress(DwarfStarError, TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._engine.close()

    def _say(self, text: str, severity: str = "information") -> None:
        self._mailbox.put(Notice(text, severity))

    def _linked(self, state: LinkState, detail: str = "") -> None:
        """Tell how we stand, when it is news."""
        if (state, detail) != self._link:
            self._link = state, detail
            self._mailbox.put(Linked(state, self._clock(), detail))

    async def _keep_attached(self) -> None:
        """Attach again and again. Each failure is told; how long it waits is bounded."""
        failures = 0
        self._linked(LinkState.CONNECTING)
        while True:
            try:
                engine = await self._place.find()
                if engine is None:
                    self._linked(LinkState.NONE if self._starting is None else LinkState.STARTING)
                    self._anew()
                else:
                    failures = await self._attached(engine, failures)
            except DwarfStarError as error:
                failures += 1
                self._linked(LinkState.DOWN, error.message)
            assert self._hurry is not None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]):
                    await self._hurry.wait()
            self._hurry.clear()

    async def _attached(self, engine: Engine, failures: int) -> int:
        """With one engine until it is lost. Returns the failures so far: none, if it answered at all."""
        self._engine = engine
        try:
            await self._look(engine, first=True)
            failures = 0
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(engine))
                group.create_task(self._watch(engine))
        except* DwarfStarError as group_of:
            failures += 1
            self._linked(LinkState.DOWN, str(group_of.exceptions[0]))
        finally:
            self._engine = None
            await engine.close()
        return failures

    def _anew(self) -> None:
        """The next engine is another one."""
        if self._last_event:
            self._last_event, self._number = 0, self._number + 1

    async def _look(self, engine: Engine, *, first: bool = False) -> None:
        asked = self._clock()
        view = await engine.status()
        now = self._clock()
        if first and view.last_event < self._last_event:
            self._anew()
        self._linked(LinkState.UP, engine.label)
        self._mailbox.put(StatusSeen(view, now, (now - asked) * 1000, self._number))

    async def _watch(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._look(engine)

    async def _follow(self, engine: Engine) -> None:
        async for batch in engine.events(self._last_event):
            if batch.events:
                self._last_event = batch.events[-1].number
            self._mailbox.put(Happened(batch, self._clock(), self._number))
        raise DwarfStarError("the engine has ended its events", code="not_running")

    # --- commands ---

    def _accept(self, command: Command) -> None:
        if isinstance(command, updates.StopAnswer):
            if (answer := self._answers.get(command.answer)) is not None:
                answer.cancel()
            return
        if len(self._tasks) >= TASKS_MAX:
            self._say("too much is under way: try again in a moment", "warning")
            return
        task = asyncio.create_task(self._obey(command))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if isinstance(command, updates.Ask):
            self._answers[command.answer] = task
            task.add_done_callback(lambda _: self._answers.pop(command.answer, None))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._say(f"a fault of this program: {fault!r}", "error")

    async def _obey(self, command: Command) -> None:
        try:
            await self._carry_out(command)
        except DwarfStarError as error:
            self._say(error.message, "error")

    async def _carry_out(self, command: Command) -> None:
        put, place = self._mailbox.put, self._place
        match command:
            case updates.Drain(node, undo):
                self._say(await self._attached_engine().drain(node, undo))
            case updates.Remove(node):
                self._say(await self._attached_engine().remove(node))
            case updates.NameNode(node, name):
                self._say(await self._attached_engine().rename(node, name))
            case updates.StopEngine():
                await self._attached_engine().stop()
                self._say("the engine has ended")
            case updates.StartEngine(arguments):
                await self._start(arguments)
            case updates.Ask():
                await self._answer(command)
            case updates.MakeToken(hours):
                put(await place.token(hours))
            case updates.FindModels():
                put(await place.models())
            case updates.LookAround():
                put(await place.surroundings())
            case updates.ReadChats():
                put(await place.read_chats())
            case updates.KeepChat(chat_id, text):
                await place.keep_chat(chat_id, text)
            case updates.Propose():
                await self._plans.propose(command)
            case updates.CommitPlan() | updates.UndoPlan():
                put(await self._plans.change(command))
            case updates.SetLent():
                put(await self._plans.lend(command))
            case updates.JudgeModels(paths, status):
                put(await place.judge(paths, status))
            case updates.PullModel(wanted):
                await self._pull(wanted)
            case updates.StopPull():
                self._pull_stopped.set()
            case updates.CheckModel() | updates.LoadModel() | updates.UnloadModel():
                await self._change_model(command)
            case updates.StopAnswer():
                pass  # is done when it is accepted

    async def _change_model(self, order: updates.CheckModel | updates.LoadModel | updates.UnloadModel) -> None:
        """Check, load or unload; its end is told whatever becomes of it."""
        told: Update = updates.ModelOrderOver()
        try:
            engine = self._attached_engine()
            match order:
                case updates.CheckModel(path):
                    told = updates.ModelChecked(path, await engine.load(LoadRequest(model=path, check=True)))
                case updates.LoadModel(path):
                    self._say(done_text(await engine.load(LoadRequest(model=path))))
                case updates.UnloadModel():
                    self._say(done_text(await engine.unload()))
        finally:
            self._mailbox.put(told)

    def _attached_engine(self) -> Engine:
        if self._engine is None:
            raise DwarfStarError("no engine is attached", code="not_running")
        return self._engine

    async def _start(self, arguments: Sequence[str]) -> None:
        """Start an engine and tell what it says until it serves, or ends."""
        if self._starting is not None:
            return
        self._starting = starting = await self._place.start(arguments)
        self._linked(LinkState.STARTING)
        try:
            while True:
                ended = starting.ended()
                lines = starting.lines()
                for line in lines:
                    self._mailbox.put(updates.StartLine(line))
                if ended:
                    self._mailbox.put(updates.StartLine("", over=True, failed=True))
                    return
                if any("ready. Try it" in line for line in lines):
                    self._mailbox.put(updates.StartLine("", over=True))
                    return
                assert self._hurry is not None
                if self._engine is None:
                    self._hurry.set()
                await asyncio.sleep(LOOK_S)
        finally:
            self._starting = None

    async def _pull(self, wanted: str) -> None:
        """Get a model; one at a time, and its end is told whatever becomes of it."""
        if self._pulling:
            raise DwarfStarError(f"{self._pulling} is being pulled: one at a time")
        self._pulling = wanted
        self._pull_stopped.clear()
        put, last = self._mailbox.put, [0.0]

        def tell(line: str) -> None:
            now = self._clock()
            if now - last[0] >= PULL_S:
                last[0] = now
                put(updates.PullSeen(wanted, line))

        try:
            put(updates.PullSeen(wanted, "asking what there is"))
            line = await self._place.pull(wanted, tell, self._pull_stopped.is_set)
            put(updates.PullSeen(wanted, line, over=True))
            put(await self._place.models())
        except DwarfStarError as error:
            put(updates.PullSeen(wanted, "", over=True, problem=error.message))
        finally:
            self._pulling = ""

    async def _answer(self, ask: updates.Ask) -> None:
        """Stream an answer; whatever becomes of it, its end is told."""
        over = AnswerOver(ask.answer, 0.0, "stopped")
        pieces = _Pieces(ask.answer, self._mailbox, self._clock)
        try:
            async for delta in self._attached_engine().chat(ask.messages, ask.options):
                if delta.finish:
                    over = AnswerOver(ask.answer, 0.0, delta.finish, delta.prompt_tokens, delta.tokens)
                if delta.text:
                    pieces.add(delta.text)
        except DwarfStarError as error:
            over = AnswerOver(ask.answer, 0.0, "failed", problem=error.message)
        finally:
            pieces.flush()
            now = self._clock()
            self._mailbox.put(AnswerOver(ask.answer, now, over.finish, over.prompt_tokens, over.tokens, over.problem))


class _Pieces:
    """Puts pieces of an answer together for PIECES_S; the first goes at once, as TTFT is what the person waits for."""

    def __init__(self, answer: int, mailbox: Mailbox, clock: Callable[[], float]) -> None:
        self._answer, self._mailbox, self._clock = answer, mailbox, clock
        self._held: list[str] = []
        self._first_at = self._last_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._begun = False

    def add(self, text: str) -> None:
        self._last_at = self._clock()
        self._first_at = self._first_at if self._held else self._last_at
        self._held.append(text)
        if not self._begun:
            self._begun = True
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PIECES_S, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            piece = AnswerPiece(self._answer, "".join(self._held), len(self._held), self._first_at, self._last_at)
            self._mailbox.put(piece)
            self._held = []
