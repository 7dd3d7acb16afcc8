"""What two models must share for one to draft for the other: the same tokens, in the same order.

Kept apart from :mod:`dwarfstar_engine.stage.draft`, which loads llama.cpp: the parent compares, the child computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A vocabulary. tokens: their number. digest: hex SHA-256 over the length and the bytes of each one's text."""

    tokens: int
    digest: str


def fingerprint(pieces: Iterable[bytes]) -> Fingerprint:
    """Of the texts of all tokens, in order; control tokens are empty, as :meth:`Vocabulary.piece` gives them."""
    digest, count = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(len(piece).to_bytes(4, "little"))
        digest.update(piece)
        count += 1
    return Fingerprint(count, digest.hexdigest())
