"""The session with a scripted engine: attaching, losing it, finding it again, answers, commands."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

from dwarfstar_engine.errors import DwarfStarError, PlanError
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
from dwarfstar_tui.session import Delta, Session
from dwarfstar_tui.updates import AnswerOver, AnswerPiece, Happened, Linked, LinkState, Notice, StatusSeen, Update
from support.tui_cluster import AROUND, MODELS, home_lab, story
from support.tui_plans import Planner

DEADLINE_S = 20.0


class FakeEngine:
    """lost: set when it shall not answer any more. reply: what chat gives; an exception is raised."""

    label = "fake:1"

    def __init__(self, since: list[int]) -> None:
        self.since, self.lost, self.closed = since, threading.Event(), False
        self.last_event = len(story().events)
        self.reply: Sequence[Delta | Exception | None] = ()
        self.asked: list[tuple[Sequence[tuple[str, str]], dict[str, float | int]]] = []
        self.drained: list[tuple[str, bool]] = []
        self.proposed: list[PlanRequest] = []
        self.slow = threading.Event()  # the planner thinks as long as it is set
        self.loaded: list[LoadRequest] = []

    async def status(self) -> StatusView:
        if self.lost.is_set():
            raise DwarfStarError("it is gone")
        return home_lab().model_copy(update={"last_event": self.last_event})

    async def events(self, since: int) -> AsyncIterator[EventsView]:
        self.since.append(since)
        view = story()
        yield view.model_copy(update={"events": view.events[since:]})
        await asyncio.Event().wait()

    async def drain(self, node: str, undo: bool) -> str:
        self.drained.append((node, undo))
        return f"{node} is drained"

    async def remove(self, node: str) -> str:
        raise DwarfStarError(f"there is no {node}")

    async def load(self, request: LoadRequest) -> LoadView:
        self.loaded.append(request)
        if request.model == "/m/bad.gguf":
            raise DwarfStarError("bad.gguf is no GGUF file")
        return LoadView(model="b", before="a", streams=0, took_s=2.1)

    async def unload(self) -> LoadView:
        return LoadView(model="", before="b", streams=2)

    async def stop(self) -> None:
        self.lost.set()

    async def propose(self, request: PlanRequest) -> ProposalView:
        self.proposed.append(request)
        while self.slow.is_set():  # noqa: ASYNC110 - set in another thread
            await asyncio.sleep(0)
        return Planner().proposal(request)

    async def commit(self, request: PlanRequest, base_epoch: int) -> CommitView:
        if base_epoch != 3:
            raise PlanError("another epoch serves", code="stale_epoch")
        return Planner().committed(request)

    async def undo(self) -> CommitView:
        raise PlanError("there is no plan to go back to", code="nothing_to_undo")

    async def rename(self, node: str, name: str) -> str:
        return f"{node} is called {name}"

    async def override(self, node: str, text: str, replan: bool) -> OverrideView:
        if not replan:
            raise PlanError(f"{node} must lend 3.21 GiB at least", code="in_use")
        return OverrideView(node=node, override=text, effective_vram_gib=2.0, replanned=True)

    async def chat(self, messages: Sequence[tuple[str, str]], options: dict[str, float | int]) -> AsyncIterator[Delta]:
        self.asked.append((messages, options))
        for step in self.reply:
            if step is None:
                await asyncio.Event().wait()
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    async def close(self) -> None:
        self.closed = True


class FakeStarting:
    def __init__(self, place: FakePlace) -> None:
        self._place = place

    def lines(self) -> list[str]:
        told, self._place.said = self._place.said, []
        return told

    def ended(self) -> bool:
        return self._place.died


class FakePlace:
    def __init__(self) -> None:
        self.since: list[int] = []
        self.engines: list[FakeEngine] = []
        self.there = True
        self.said: list[str] = []
        self.died = False
        self.started: list[Sequence[str]] = []
        self.kept: dict[str, str] = {}

    async def find(self) -> FakeEngine | None:
        if not self.there:
            return None
        self.engines.append(FakeEngine(self.since))
        return self.engines[-1]

    async def start(self, arguments: Sequence[str]) -> FakeStarting:
        self.started.append(arguments)
        return FakeStarting(self)

    async def models(self) -> updates.ModelsFound:
        return MODELS

    async def judge(self, paths: Sequence[str], status: StatusView) -> updates.ModelsJudged:
        return updates.ModelsJudged(tuple(updates.Fit(path, len(status.stages)) for path in paths))

    async def pull(self, wanted: str, tell: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        tell("pulling 1 %")
        while wanted == "slow" and not stopped():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        if stopped():
            raise DwarfStarError("stopped")
        return "pulled it"

    async def surroundings(self) -> updates.Surroundings:
        return AROUND

    async def token(self, hours: float) -> updates.TokenMade:
        return updates.TokenMade("dwarfstar node --token x", "x", "", ())

    async def read_chats(self) -> updates.ChatsRead:
        return updates.ChatsRead(tuple(self.kept.values()))

    async def keep_chat(self, chat_id: str, text: str) -> None:
        self.kept[chat_id] = text


class Listener:
    """Takes from a mailbox until what is waited for has come. ``told``: all so far, in order."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self.told: list[Update] = []

    def until(self, wanted: Callable[[Update], bool], times: int = 1) -> Update:
        """The update that is so for the ``times``-th time since the beginning."""
        waiting, end = threading.Event(), DEADLINE_S
        while end > 0:
            self.told += self.mailbox.take()
            found = [update for update in self.told if wanted(update)]
            if len(found) >= times:
                return found[times - 1]
            waiting.wait(0.01)  # a condition is polled: nothing is asserted of how long it takes
            end -= 0.01
        raise AssertionError(f"did not come; told: {[type(update).__name__ for update in self.told[-9:]]}")


@contextmanager
def running(place: FakePlace, *, slow: bool = False) -> Iterator[tuple[Session, Listener]]:
    listener = Listener()
    session = Session(place, listener.mailbox, low_bandwidth=slow)
    session.start()
    try:
        yield session, listener
    finally:
        session.close()


def linked(state: LinkState) -> Callable[[Update], bool]:
    return lambda update: isinstance(update, Linked) and update.state is state


def test_it_attaches_and_tells_status_and_events() -> None:
    place = FakePlace()
    with running(place) as (_, listener):
        listener.until(lambda update: isinstance(update, Happened))
        listener.until(lambda update: isinstance(update, StatusSeen))
    assert any(linked(LinkState.UP)(update) for update in listener.told)
    assert place.engines[0].closed


def test_a_lost_engine_is_told_once_and_events_go_on_where_they_ended() -> None:
    place = FakePlace()
    with running(place) as (_, listener):
        listener.until(lambda update: isinstance(update, Happened))
        place.engines[0].lost.set()
        down = listener.until(linked(LinkState.DOWN))
        assert isinstance(down, Linked)
        assert down.detail == "it is gone"
        listener.until(linked(LinkState.UP), times=2)
        listener.until(lambda update: isinstance(update, Happened), times=2)
    assert place.since[:2] == [0, len(story().events)]
    assert sum(linked(LinkState.DOWN)(update) for update in listener.told) == 1


def test_only_another_engine_begins_anew() -> None:
    """A status that was asked for before events came says nothing of an engine that is another."""
    place = FakePlace()
    with running(place) as (_, listener):
        listener.until(lambda update: isinstance(update, Happened))
        place.engines[0].last_event = 3
        listener.until(lambda update: isinstance(update, StatusSeen) and update.view.last_event == 3)
        place.engines[0].lost.set()
        listener.until(lambda update: isinstance(update, Happened), times=2)
        place.there = False
        place.engines[1].lost.set()
        listener.until(linked(LinkState.NONE))
        place.there = True
        listener.until(lambda update: isinstance(update, Happened), times=3)
    assert place.since == [0, len(story().events), 0]
    assert [update.engine for update in listener.told if isinstance(update, Happened)] == [0, 0, 1]


def test_no_engine_is_told_and_one_that_comes_is_found() -> None:
    place = FakePlace()
    place.there = False
    with running(place) as (_, listener):
        listener.until(linked(LinkState.NONE))
        place.there = True
        listener.until(linked(LinkState.UP))


def test_an_answer_comes_in_pieces_with_its_end() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        place.engines[-1].reply = [Delta("Hel"), Delta("lo"), Delta("", "stop", 3, 2)]
        session.submit(updates.Ask(7, (("user", "hi"),), {"seed": 1}))
        over = listener.until(lambda update: isinstance(update, AnswerOver))
    pieces = [update for update in listener.told if isinstance(update, AnswerPiece)]
    assert "".join(piece.text for piece in pieces) == "Hello"
    assert isinstance(over, AnswerOver)
    assert (over.answer, over.finish, over.tokens, over.problem) == (7, "stop", 2, "")
    assert place.engines[-1].asked == [((("user", "hi"),), {"seed": 1})]


def test_a_stopped_answer_keeps_what_came() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        place.engines[-1].reply = [Delta("some "), Delta("text"), None]
        session.submit(updates.Ask(1, (("user", "hi"),)))
        listener.until(lambda update: isinstance(update, AnswerPiece))
        session.submit(updates.StopAnswer(1))
        over = listener.until(lambda update: isinstance(update, AnswerOver))
    assert isinstance(over, AnswerOver)
    assert over.finish == "stopped"
    assert "".join(update.text for update in listener.told if isinstance(update, AnswerPiece)) == "some text"


def test_a_failed_answer_says_why() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        place.engines[-1].reply = [Delta("so"), DwarfStarError("no node is left")]
        session.submit(updates.Ask(1, (("user", "hi"),)))
        over = listener.until(lambda update: isinstance(update, AnswerOver))
    assert isinstance(over, AnswerOver)
    assert (over.finish, over.problem) == ("failed", "no node is left")


def test_commands_are_carried_out_and_refusals_told() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        session.submit(updates.Drain("n-1"))
        session.submit(updates.Remove("n-2"))
        session.submit(updates.NameNode("n-1", "attic"))
        session.submit(updates.KeepChat("a", "{}"))
        session.submit(updates.ReadChats())
        listener.until(lambda update: isinstance(update, Notice) and update.severity == "error")
        listener.until(lambda update: isinstance(update, updates.ChatsRead))
    assert place.engines[-1].drained == [("n-1", False)]
    told = {update.text for update in listener.told if isinstance(update, Notice)}
    assert told == {"n-1 is drained", "n-1 is called attic", "there is no n-2"}


def test_a_model_is_checked_loaded_and_unloaded_and_each_end_is_told() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        session.submit(updates.CheckModel("/m/b.gguf"))
        checked = listener.until(lambda update: isinstance(update, updates.ModelChecked))
        session.submit(updates.LoadModel("/m/b.gguf"))
        listener.until(lambda update: isinstance(update, updates.ModelOrderOver))
        session.submit(updates.CheckModel("/m/bad.gguf"))
        listener.until(lambda update: isinstance(update, updates.ModelOrderOver), times=2)
        session.submit(updates.UnloadModel())
        listener.until(lambda update: isinstance(update, updates.ModelOrderOver), times=3)
        listener.until(lambda update: isinstance(update, Notice), times=3)
    assert isinstance(checked, updates.ModelChecked) and (checked.path, checked.view.model) == ("/m/b.gguf", "b")
    assert [(one.model, one.check) for one in place.engines[-1].loaded] == [
        ("/m/b.gguf", True),
        ("/m/b.gguf", False),
        ("/m/bad.gguf", True),
    ]
    told = [update.text for update in listener.told if isinstance(update, Notice)]
    assert told == [
        "b is loaded, in 2.1 s",
        "bad.gguf is no GGUF file",
        "b is unloaded; 2 requests did not finish in time",
    ]


def test_a_fault_of_ours_is_told_and_ends_nothing_else() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        place.engines[-1].reply = [ValueError("oops")]
        session.submit(updates.Ask(1, (("user", "hi"),)))
        fault = listener.until(lambda update: isinstance(update, Notice))
        session.submit(updates.FindModels())
        listener.until(lambda update: isinstance(update, updates.ModelsFound))
    assert isinstance(fault, Notice)
    assert "oops" in fault.text


def test_a_start_is_followed_until_it_serves() -> None:
    place = FakePlace()
    place.there = False
    with running(place) as (session, listener):
        listener.until(linked(LinkState.NONE))
        place.said = ["loading: 40 %"]
        session.submit(updates.StartEngine(("--demo",)))
        listener.until(lambda update: isinstance(update, updates.StartLine) and "40" in update.text)
        listener.until(linked(LinkState.STARTING))
        place.there = True
        place.said = ["ready. Try it from another terminal:"]
        listener.until(lambda update: isinstance(update, updates.StartLine) and update.over)
        listener.until(linked(LinkState.UP))
    assert place.started == [("--demo",)]


def test_a_start_that_fails_is_told() -> None:
    place = FakePlace()
    place.there, place.died, place.said = False, True, ["no model 'x'"]
    with running(place) as (session, listener):
        session.submit(updates.StartEngine(("x",)))
        over = listener.until(lambda update: isinstance(update, updates.StartLine) and update.over)
    assert isinstance(over, updates.StartLine)
    assert over.failed


def cut(at: int) -> PlanRequest:
    return PlanRequest(cuts=(at, 66), order=("tower", "garage-box", "mini-pc"))


def test_of_wishes_that_wait_only_the_latest_is_asked() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        engine = place.engines[-1]
        engine.slow.set()
        for number in range(5):
            session.submit(updates.Propose(number, cut(40 + number)))
        session.submit(updates.FindModels())
        listener.until(lambda update: isinstance(update, updates.ModelsFound))
        engine.slow.clear()
        last = listener.until(lambda update: isinstance(update, updates.Proposed) and update.number == 4)
    assert isinstance(last, updates.Proposed) and last.view is not None
    assert engine.proposed == [cut(40), cut(44)]


def test_plans_are_carried_out_and_refusals_keep_their_code() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        session.submit(updates.CommitPlan(cut(45), 3))
        done = listener.until(lambda update: isinstance(update, updates.PlanChanged))
        session.submit(updates.CommitPlan(cut(45), 2))
        stale = listener.until(lambda update: isinstance(update, updates.PlanChanged), times=2)
        session.submit(updates.UndoPlan())
        undone = listener.until(lambda update: isinstance(update, updates.PlanChanged), times=3)
    assert isinstance(done, updates.PlanChanged) and done.view is not None and done.view.epoch == 4
    assert stale == updates.PlanChanged(None, problem="another epoch serves", code="stale_epoch")
    assert undone == updates.PlanChanged(None, True, "there is no plan to go back to", "nothing_to_undo")


def test_an_override_is_set_or_refused_with_the_least_that_is_possible() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        listener.until(linked(LinkState.UP))
        session.submit(updates.SetLent("n-1", "2"))
        refused = listener.until(lambda update: isinstance(update, updates.LentSet))
        session.submit(updates.SetLent("n-1", "2", replan=True))
        done = listener.until(lambda update: isinstance(update, updates.LentSet), times=2)
    assert isinstance(refused, updates.LentSet) and isinstance(done, updates.LentSet)
    assert (refused.view, refused.code) == (None, "in_use")
    assert "3.21 GiB" in refused.problem
    assert done.view is not None and done.view.replanned


def test_a_proposal_without_an_engine_says_so() -> None:
    place = FakePlace()
    place.there = False
    with running(place) as (session, listener):
        session.submit(updates.Propose(1, cut(40)))
        told = listener.until(lambda update: isinstance(update, updates.Proposed))
    assert told == updates.Proposed(1, None, "no engine is attached")


def test_a_download_tells_how_far_it_is_and_can_be_stopped() -> None:
    place = FakePlace()
    with running(place) as (session, listener):
        session.submit(updates.PullModel("quick"))
        over = listener.until(lambda update: isinstance(update, updates.PullSeen) and update.over)
        listener.until(lambda update: isinstance(update, updates.ModelsFound))
        session.submit(updates.PullModel("slow"))
        listener.until(lambda update: isinstance(update, updates.PullSeen) and update.wanted == "slow")
        session.submit(updates.PullModel("another"))
        listener.until(lambda update: isinstance(update, Notice) and "one at a time" in update.text)
        session.submit(updates.StopPull())
        stopped = listener.until(lambda update: isinstance(update, updates.PullSeen) and update.over, times=2)
    assert over == updates.PullSeen("quick", "pulled it", over=True)
    assert stopped == updates.PullSeen("slow", "", over=True, problem="stopped")
