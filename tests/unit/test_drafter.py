"""The coordinator's side of a draft model, against a child played by the test."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.errors import ModelError
from dwarfstar_engine.node import drafter
from dwarfstar_engine.node.drafter import ANSWER_DEADLINE_S, Drafter, DraftOptions
from dwarfstar_engine.stage.fingerprint import Fingerprint, fingerprint

OURS = fingerprint([b"a", b"b", b""])


class FakeChild:
    """Answers a start by itself; what else it is sent lies in ``questions``."""

    vocabulary = OURS
    refuses = False  # a start
    started: list[FakeChild]

    def __init__(self, module: str, on_event: Callable[[dict[str, Any]], None], on_exit: Callable[[int], None]) -> None:
        self.alive, self.pid, self.last_words = True, len(self.started), ["GGML_ASSERT"]
        self.tell, self._on_exit = on_event, on_exit
        self.questions: list[dict[str, Any]] = []
        self.forgotten: list[int] = []

    async def start(self) -> None:
        self.started.append(self)

    def send(self, **command: Any) -> None:
        loop = asyncio.get_running_loop()
        if "path" in command:
            ours = {"event": "vocabulary", "tokens": self.vocabulary.tokens, "digest": self.vocabulary.digest}
            failed = {"event": "failed", "code": "model_error", "message": "no such model"}
            loop.call_soon(self.tell, failed if self.refuses else ours)
        elif "context" in command:
            loop.call_soon(self.tell, {"event": "ready"})
        elif "forget" in command:
            self.forgotten.append(command["forget"])
        else:
            self.questions.append(command)

    def answer(self, index: int, tokens: list[int] | None) -> None:
        """None: it does not hold what the question builds on."""
        question = self.questions[index]
        event: dict[str, Any] = {"id": question["id"], "sequence": question["sequence"]}
        self.tell(event | ({"event": "lost"} if tokens is None else {"event": "proposed", "tokens": tokens}))

    def die(self) -> None:
        self.alive = False
        self._on_exit(-6)

    async def stop(self) -> None:
        self.alive = False


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch) -> list[FakeChild]:
    started: list[FakeChild] = []
    monkeypatch.setattr(FakeChild, "started", started, raising=False)
    monkeypatch.setattr(drafter, "Child", FakeChild)
    return started


def new() -> Drafter:
    return Drafter(Path("small.gguf"), "large.gguf", OURS, DraftOptions(context=100, sequences=2))


def sent(question: dict[str, Any]) -> tuple[int, list[int]]:
    return question["keep"], question["tokens"]


async def test_only_what_is_new_of_a_text_is_sent(children: list[FakeChild]) -> None:
    draft, got = new(), list[list[int]]()
    await draft.start()
    texts = ([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 9], [1, 2])
    for index, text in enumerate(texts):
        draft.propose(7, text, 4, got.append)
        children[0].answer(index, [index])
    assert [sent(q) for q in children[0].questions] == [(0, [1, 2, 3]), (3, [4, 5]), (2, [9]), (2, [])]
    assert got == [[0], [1], [2], [3]]
    await draft.close()


async def test_one_question_is_open_and_the_newest_waits_so_that_stale_answers_are_dropped(
    children: list[FakeChild],
) -> None:
    draft, got = new(), list[tuple[str, list[int]]]()
    await draft.start()
    for name, text in (("old", [1]), ("passed over", [1, 2]), ("new", [1, 2, 3])):
        draft.propose(7, text, 4, lambda tokens, name=name: got.append((name, tokens)))  # type: ignore[misc]
    draft.propose(8, [5], 4, lambda tokens: got.append(("other", tokens)))
    assert [sent(q) for q in children[0].questions] == [(0, [1]), (0, [5])]
    children[0].answer(0, [2])
    assert got == [] and sent(children[0].questions[2]) == (1, [2, 3])
    children[0].answer(1, [6])
    children[0].answer(2, [4])
    assert got == [("other", [6]), ("new", [4])]
    await draft.close()


async def test_a_text_the_child_has_lost_is_sent_whole(children: list[FakeChild]) -> None:
    draft, got = new(), list[list[int]]()
    await draft.start()
    draft.propose(7, [1, 2], 4, got.append)
    children[0].answer(0, [3])
    draft.propose(7, [1, 2, 3], 4, got.append)
    children[0].answer(1, None)
    assert sent(children[0].questions[2]) == (0, [1, 2, 3])
    children[0].answer(2, [4])
    assert got == [[3], [4]]
    await draft.close()


async def test_answers_for_a_forgotten_sequence_are_dropped_even_if_its_number_comes_again(
    children: list[FakeChild],
) -> None:
    draft, got = new(), list[list[int]]()
    await draft.start()
    draft.propose(7, [1], 4, got.append)
    draft.forget(7)
    draft.forget(8)  # never asked about
    assert children[0].forgotten == [7]
    draft.propose(7, [5], 4, got.append)
    children[0].answer(0, [2])
    assert got == [] and sent(children[0].questions[1]) == (0, [5])
    children[0].answer(1, [6])
    assert got == [[6]]
    await draft.close()


async def test_a_child_that_dies_or_fails_to_start_is_started_after_pauses_that_grow(
    children: list[FakeChild], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses = list[float]()
    sleep = asyncio.sleep

    async def no_sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        FakeChild.refuses = len(pauses) in (1, 2)
        await sleep(0)

    monkeypatch.setattr(FakeChild, "refuses", False)
    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    draft, got = new(), list[list[int]]()
    await draft.start()
    draft.propose(7, [1], 4, got.append)
    with caplog.at_level(logging.WARNING, "dwarfstar.drafter"):
        for _ in range(3):
            children[-1].die()
            assert not draft.ready
            draft.propose(7, [1, 2], 4, got.append)
            for _ in range(50):
                await sleep(0)
            assert draft.ready
    assert pauses == [*drafter.PAUSE_S[:3], drafter.PAUSE_S[3], drafter.PAUSE_S[3]]
    assert len(caplog.records) == 3 and "GGML_ASSERT" in caplog.text
    draft.propose(7, [1, 2], 4, got.append)
    assert sent(children[-1].questions[0]) == (0, [1, 2])  # the new child holds nothing
    children[0].answer(0, [9])
    assert got == []
    await draft.close()


async def test_a_child_that_hangs_is_replaced_when_it_is_asked_again(
    children: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = new()
    await draft.start()
    loop, now = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    draft.propose(7, [1], 4, print)
    monkeypatch.setattr(loop, "time", lambda: now + ANSWER_DEADLINE_S - 1)
    draft.propose(7, [1, 2], 4, print)
    assert draft.ready
    monkeypatch.setattr(loop, "time", lambda: now + ANSWER_DEADLINE_S + 1)
    draft.propose(7, [1, 2, 3], 4, print)
    assert not draft.ready
    await asyncio.sleep(0)
    assert not children[0].alive
    monkeypatch.undo()
    await draft.close()


@pytest.mark.parametrize("theirs", [Fingerprint(4, OURS.digest), fingerprint([b"a", b"", b"b"])])
async def test_another_vocabulary_is_refused(
    children: list[FakeChild], monkeypatch: pytest.MonkeyPatch, theirs: Fingerprint
) -> None:
    monkeypatch.setattr(FakeChild, "vocabulary", theirs)
    with pytest.raises(ModelError, match=r"small\.gguf has another vocabulary than large\.gguf") as refused:
        await new().start()
    assert refused.value.code == "draft_vocabulary" and not children[0].alive


async def test_a_start_that_takes_too_long_is_given_up(
    children: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter, "START_DEADLINE_S", 0.01)
    monkeypatch.setattr(FakeChild, "send", lambda self, **command: None)
    with pytest.raises(ModelError, match="choose a smaller"):
        await new().start()
    assert not children[0].alive


async def test_a_child_that_dies_while_it_loads_fails_the_start(
    children: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeChild, "send", lambda self, **command: self.die())
    with pytest.raises(ModelError, match="GGML_ASSERT"):
        await new().start()
    assert len(children) == 1


def test_fingerprints_tell_where_one_token_ends_and_the_next_begins() -> None:
    assert fingerprint([b"ab", b"c"]) != fingerprint([b"a", b"bc"])
    assert fingerprint([b"ab", b"c"]) == Fingerprint(2, fingerprint(iter([b"ab", b"c"])).digest)
