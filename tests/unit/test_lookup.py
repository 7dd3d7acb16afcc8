"""Prompt lookup against its definition, a scan of the whole text; what it does on texts that copy and on others."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwarfstar_engine.batch import lookup
from dwarfstar_engine.batch.lookup import MAX_NGRAM, MIN_NGRAM, Lookup

TEXTS = st.lists(st.integers(0, 3), max_size=60)  # so few words that most n-grams come again


def by_scanning(text: list[int], limit: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest suffix, read on into what is proposed."""
    for n in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        for place in range(len(text) - 1, n - 1, -1):
            if text[place - n : place] == text[-n:]:
                going_on = list(text)
                for i in range(limit):
                    going_on.append(going_on[place + i])
                return going_on[len(text) :]
    return []


@given(prompt=TEXTS, answer=TEXTS, limit=st.integers(0, 9))
@settings(deadline=None)
def test_proposals_are_what_followed_the_latest_occurrence_of_the_longest_suffix(
    prompt: list[int], answer: list[int], limit: int
) -> None:
    found = Lookup(prompt)
    assert found.propose(limit) == by_scanning(prompt, limit)
    for length, token in enumerate(answer, 1):
        found.append(token)
        assert found.propose(limit) == by_scanning(prompt + answer[:length], limit)


@given(text=TEXTS, cut=st.integers(0, 60))
@settings(deadline=None)
def test_a_prompt_and_the_same_tokens_appended_give_the_same_guesses(text: list[int], cut: int) -> None:
    appended = Lookup(text[:cut])
    for token in text[cut:]:
        appended.append(token)
    assert appended.propose(8) == Lookup(text).propose(8)


def test_a_loop_goes_round_within_one_proposal() -> None:
    assert Lookup([9, 1, 2, 3, 1, 2, 3]).propose(7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_text_without_repeats_gets_no_proposal() -> None:
    found = Lookup(range(100))
    proposed = []
    for token in range(100, 200):
        found.append(token)
        proposed += found.propose(8)
    assert proposed == []


def test_a_copy_is_followed_once_its_first_words_are_there() -> None:
    rng = random.Random(5)
    passage = [rng.randrange(50_000) for _ in range(200)]
    found = Lookup([*passage, 1, 2])
    right = 0
    for known, token in enumerate(passage):
        right += found.propose(1) == [token]
        assert known >= MIN_NGRAM or not found.propose(1)
        found.append(token)
    assert right == len(passage) - MIN_NGRAM


def test_hashes_that_collide_propose_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one hash for all n-grams the only place kept is that of the last: it counts if it is a match."""
    monkeypatch.setattr(lookup, "_MULTIPLIER", 0)  # the hash is then the n-gram's last token
    assert Lookup([1, 2, 3, 8, 4, 5, 3, 9, 1, 2, 3]).propose(1) == []
    assert Lookup([4, 5, 3, 8, 1, 2, 3, 9, 1, 2, 3]).propose(1) == [9]


@pytest.mark.parametrize("appended", [0, 400])
def test_memory_is_bounded_and_the_oldest_places_go_first(monkeypatch: pytest.MonkeyPatch, appended: int) -> None:
    monkeypatch.setattr(lookup, "MAX_PLACES", 100)
    text = list(range(1000))
    found = Lookup(text[: len(text) - appended])
    for token in text[len(text) - appended :]:
        found.append(token)
    held = [len(places._young) + len(places._old) for places in found._places]
    assert max(held) <= 2 * 100 and min(held) >= 90
    for token in (1, 2, 3):
        found.append(token)
    assert found.propose(1) == []  # forgotten
    for token in (951, 952, 953):
        found.append(token)
    assert found.propose(2) == [954, 955]
