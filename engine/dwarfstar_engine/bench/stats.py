"""The few statistics of the benchmark. Machines drift, so peers alternate and ratios are taken within a run."""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Sequence

median = statistics.median


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed (nearest rank). Not empty."""
    ranked = sorted(values)
    return ranked[max(math.ceil(share * len(ranked)), 1) - 1]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of ours ÷ theirs, run by run: both met the same weather."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])


def novelty(text: str) -> float:
    """How little a text repeats itself: its size compressed ÷ plain. Prose has 0.5, a loop less than 0.2."""
    plain = text.encode()
    return len(zlib.compress(plain, 9)) / len(plain) if plain else 1.0
