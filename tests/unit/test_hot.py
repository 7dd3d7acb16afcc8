"""The seed of a draw: from (seed, position) alone, spread over 32 bits, never llama.cpp's "choose one yourself"."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from dwarfstar_engine.stage.hot import draw_seed

CHOOSE_YOURSELF = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED
SEEDS, POSITIONS = st.integers(0, 2**64 - 1), st.integers(0, 2**24 - 1)
MASK = (1 << 64) - 1


def _unmix(x: int) -> int:
    """The inverse of splitmix64's finaliser: the state whose output is ``x``."""
    x ^= x >> 31 ^ x >> 62
    x = x * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return x ^ x >> 30 ^ x >> 60


@given(SEEDS, POSITIONS)
def test_32_bits_and_never_the_reserved_value(seed: int, position: int) -> None:
    assert 0 <= draw_seed(seed, position) < CHOOSE_YOURSELF


@given(st.integers(0, 2**32 - 1), POSITIONS)
@example(0, 0)
def test_seeds_that_would_give_the_reserved_value(high: int, position: int) -> None:
    """Built to hit it: about one seed in 2^32 does, so drawing at random would never find out."""
    seed = (_unmix(high << 32 | CHOOSE_YOURSELF) - (position + 1) * 0x9E3779B97F4A7C15) & MASK
    assert draw_seed(seed, position) == CHOOSE_YOURSELF - 1


@given(SEEDS, POSITIONS)
def test_it_depends_on_nothing_else(seed: int, position: int) -> None:
    assert draw_seed(seed, position) == draw_seed(seed, position)


def test_it_depends_on_seed_and_position() -> None:
    """Neighbouring seeds and positions draw apart: no repeats among 4096, and every bit is set in about half."""
    for drawn in ([draw_seed(7, p) for p in range(4096)], [draw_seed(s, 7) for s in range(4096)]):
        assert len(set(drawn)) == len(drawn)
        for bit in range(32):
            assert 1800 < sum(value >> bit & 1 for value in drawn) < 2300
    assert draw_seed(1, 2) != draw_seed(2, 1)
    assert draw_seed(1 << 63, 0) != draw_seed(0, 0)  # all 64 bits of the seed count
