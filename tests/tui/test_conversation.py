"""Conversations, answers, and the files they are kept in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from dwarfstar_engine.views import EventView
from dwarfstar_tui.chat_files import ChatFiles
from dwarfstar_tui.conversation import (
    CHATS_MAX,
    TURNS_MAX,
    Answer,
    Conversation,
    Sampling,
    Turn,
    ended,
    read,
    titled,
    written,
)


def said(number: int) -> tuple[Turn, Turn]:
    return Turn(role="user", text=f"ask {number}"), Turn(role="assistant", text=f"answer {number}")


def happened(kind: str, cause: str) -> EventView:
    return EventView(number=1, time_s=0, kind=kind, node="", cause=cause, details={})


def test_what_is_sent_is_the_system_prompt_the_turns_and_the_prompt() -> None:
    chat = Conversation(id="a", system="be brief").with_turns(*said(1), used_s=1)
    assert chat.messages("more") == (
        ("system", "be brief"),
        ("user", "ask 1"),
        ("assistant", "answer 1"),
        ("user", "more"),
    )


def test_the_oldest_turns_go_in_pairs() -> None:
    chat = Conversation(id="a")
    for number in range(TURNS_MAX):
        chat = chat.with_turns(*said(number), used_s=number)
    assert len(chat.turns) == TURNS_MAX
    assert chat.turns[0].role == "user"
    assert chat.title == "ask 0"


def test_the_last_prompt_is_taken_back_with_its_answer() -> None:
    chat = Conversation(id="a").with_turns(*said(1), used_s=1).with_turns(*said(2), used_s=2)
    shorter, prompt = chat.before_last_prompt()
    assert (prompt, [turn.text for turn in shorter.turns]) == ("ask 2", ["ask 1", "answer 1"])
    assert Conversation(id="a").before_last_prompt()[1] == ""


def test_a_conversation_survives_its_file() -> None:
    chat = Conversation(id="a", sampling=Sampling(temperature=0.2, seed=3)).with_turns(*said(1), used_s=5)
    assert read(written(chat)) == chat


@pytest.mark.parametrize("text", ["", "{", '{"id": "../x"}', '{"id": "a", "turns": [{"role": "system", "text": ""}]}'])
def test_what_is_no_conversation_is_none(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize("given", [{"temperature": 3}, {"top_p": 0}, {"max_tokens": 0}, {"seed": -1}])
def test_sampling_has_bounds(given: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Sampling.model_validate(given)


def test_titles_are_one_short_line() -> None:
    assert titled("a\n b  c") == "a b c"
    assert len(titled("word " * 40)) <= 48


def test_rate_and_ttft_do_not_count_what_was_before_or_paused() -> None:
    answer = Answer(1, "p", asked_at=10.0).with_piece("a", 1, 12.0, 12.0).with_piece("b", 4, 12.5, 14.0)
    assert (answer.ttft_s, answer.tok_s) == (2.0, 2.0)
    answer = answer.with_event(happened("node_lost", "x is lost")).with_event(happened("epoch_over", "epoch 1 is over"))
    assert answer.pause == "x is lost"
    answer = answer.with_event(happened("streams_resumed", "1 stream goes on"))
    assert answer.pause == "going on"
    answer = answer.with_piece("c", 1, 24.0, 24.0)
    assert (answer.pause, answer.paused_s, answer.tok_s) == ("", 10.0, 2.5)


def test_the_note_says_how_it_ended() -> None:
    answer = Answer(1, "p", 0.0).with_piece("a", 2, 1.0, 2.0)
    assert (
        ended(answer, "stopped", 0, 0, "").note() == "1.0 tok/s · first token after 1.00 s · 2 tokens · stopped by you"
    )
    assert "no node is left" in ended(answer, "failed", 0, 0, "no node is left").note()
    assert "token limit" in ended(answer, "length", 3, 9, "").note()


def test_files_are_whole_newest_first_and_bounded(tmp_path: Path) -> None:
    files = ChatFiles(tmp_path / "chats")
    assert files.read().texts == ()
    for number in range(CHATS_MAX + 3):
        files.keep(f"chat-{number}", f"text {number}")
        path = tmp_path / "chats" / f"chat-{number}.json"
        os.utime(path, (number, number))
    assert len(list((tmp_path / "chats").iterdir())) <= CHATS_MAX + 1
    assert files.read().texts[0] == f"text {CHATS_MAX + 2}"
    files.keep(f"chat-{CHATS_MAX + 2}", "")
    assert files.read().texts[0] == f"text {CHATS_MAX + 1}"


def test_files_that_cannot_be_read_are_told_and_left(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    (tmp_path / "good.json").write_text("good")
    found = ChatFiles(tmp_path).read()
    assert found.texts == ("good",)
    assert "bad.json" in found.problems[0]
    assert (tmp_path / "bad.json").exists()


def test_an_id_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        ChatFiles(tmp_path).keep("../escape", "x")


def test_the_note_names_the_machines_that_served_it() -> None:
    answer = Answer(1, "go on", 0.0).with_piece("a b", 2, 1.0, 2.0)
    there = answer.with_ring(("tower", "nas", "pi")).with_ring(("tower", "nas", "pi"))
    assert there.note().endswith("2 tokens · served by tower → nas → pi")
    moved = there.with_ring(()).with_ring(("tower", "pi"))
    assert moved.note().endswith("served by tower → nas → pi, then tower → pi")
    many = answer.with_ring(tuple(f"node{index}" for index in range(64)))
    assert many.note().endswith("served by node0 → 62 more → node63")


def test_a_prompt_that_failed_was_served_by_nobody() -> None:
    answer = Answer(1, "go on", 0.0).with_ring(("tower",))
    assert ended(answer, "failed", 0, 0, "no").note() == "no"
