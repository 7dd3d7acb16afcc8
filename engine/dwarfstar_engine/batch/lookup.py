"""Prompt lookup: what followed the last time the text went like this.

Theory. Answers copy: names and lines of the prompt, an earlier turn, their own loops. If the last n tokens of a text
occurred before, what followed then is a fair guess of what follows now, and the longer the match the better the guess.
So for each n from ``MAX_NGRAM`` down to ``MIN_NGRAM`` the latest earlier place of the last n tokens is looked up, and
the first one found is copied from. A copy may run into what it proposes itself: a text with a period shorter than the
copy goes round.

Chosen on greedy texts of SmolLM2 and on human ones, tokenised alike. From two tokens on, 18 % of the rounds on human
English propose and 37 % of the guesses judged are right; from three on 7 % propose and 45 % are right, and most texts
that copy lose at most a tenth. Longer matches matter only where code is copied with changes (0.82 → 0.86 right).

Invariants. An index holds, for each n, hash of n tokens → where the token after them lies. The last n-gram of the text
is put in only when a token follows it, so a lookup never finds the suffix itself. Hashes may collide: a place counts
only if the tokens before it are the suffix. Places age in two generations, which bounds memory and forgets the oldest.
Pure: no clock, no IO; appending and proposing take a time that does not depend on the text's length.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

MAX_NGRAM = 5  # longer ones never chose a better place
MIN_NGRAM = 3  # shorter matches are mostly chance
MAX_PLACES = 1 << 15  # n-grams of one length and generation; two are kept of each: at most about 20 MiB a sequence
_MULTIPLIER, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1  # 2^64 ÷ golden ratio, odd: tokens that are close spread far


class _Places:
    """n-gram → where the token after its latest occurrence lies, for one n."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def fill(self, tokens: array[int]) -> None:
        """Enter all n-grams of a text that a token follows; of a longer text than the index holds, the last ones."""
        first = max(0, len(tokens) - self.n - MAX_PLACES)
        values = np.array(tokens[first:], np.uint64)
        count = max(0, len(values) - self.n)
        hashes = np.zeros(count, np.uint64)
        for offset in range(self.n):
            hashes = hashes * np.uint64(_MULTIPLIER) + values[offset : offset + count]
        self._young = dict(zip(hashes.tolist(), range(first + self.n, first + self.n + count), strict=True))

    def put(self, tokens: array[int]) -> None:
        """Enter the n tokens before the last one."""
        if len(tokens) <= self.n:
            return
        if len(self._young) >= MAX_PLACES:
            self._old, self._young = self._young, {}
        self._young[self._hash(tokens[-self.n - 1 : -1])] = len(tokens) - 1

    def find(self, tokens: array[int]) -> int | None:
        """Where the token lies that followed the last n tokens when they occurred before."""
        suffix = tokens[-self.n :]
        key = self._hash(suffix)
        place = self._young.get(key) or self._old.get(key)
        if place is None or tokens[place - self.n : place] != suffix:
            return None
        return place

    @staticmethod
    def _hash(ngram: array[int]) -> int:
        value = 0
        for token in ngram:
            value = (value * _MULTIPLIER + token) & _MASK
        return value


class Lookup:
    """The text of one sequence, and guesses of what follows it."""

    def __init__(self, tokens: Sequence[int], *, min_ngram: int = MIN_NGRAM, max_ngram: int = MAX_NGRAM) -> None:
        assert 1 <= min_ngram <= max_ngram
        self._tokens = array("i", tokens)
        self._places = [_Places(n) for n in range(max_ngram, min_ngram - 1, -1)]
        for places in self._places:
            places.fill(self._tokens)

    def append(self, token: int) -> None:
        """The text goes on with this token."""
        self._tokens.append(token)
        for places in self._places:
            places.put(self._tokens)

    def propose(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that may follow; none if the end of the text is new."""
        for places in self._places:
            if (place := places.find(self._tokens)) is not None:
                return self._copy(place, limit)
        return []

    def _copy(self, place: int, limit: int) -> list[int]:
        known = self._tokens[place : place + limit].tolist()
        return [known[i % len(known)] for i in range(limit)]
