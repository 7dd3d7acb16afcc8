"""Chunks of prompts and what may be kept of a slot: the rules under which llama.cpp gives the same bits."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from dwarfstar_engine.batch.chunks import (
    BLOCK,
    SLACK,
    STEP,
    WIDE,
    ChunkCosts,
    chunk_start,
    common_prefix,
    next_chunk,
    reusable,
    wide_rows,
)

LENGTHS = st.integers(1, 3000)


def rest_of_block(position: int, prompt: int) -> int:
    return min(position - position % BLOCK + BLOCK, prompt) - position


def check_chunks(start: int, prompt: int, chunk: int) -> list[int]:
    """Cut the rest of a prompt; every chunk obeys the rules."""
    rows = []
    while start < prompt:
        block = rest_of_block(start - start % BLOCK, prompt)
        rows.append(next_chunk(start, prompt, chunk))
        assert 1 <= rows[-1] <= min(chunk + SLACK, rest_of_block(start, prompt))
        assert block < WIDE or (rows[-1] >= WIDE and start % STEP == 0)
        start += rows[-1]
    return rows


@given(prompt=LENGTHS, chunk=st.sampled_from([64, 96, 128, 256, 512]))
def test_chunks_give_the_bits_of_whole_blocks(prompt: int, chunk: int) -> None:
    assert sum(check_chunks(0, prompt, chunk)) == prompt


@given(prompt=LENGTHS, chunk=st.integers(1, 63))
def test_smaller_chunks_are_as_asked_for(prompt: int, chunk: int) -> None:
    at = 0
    while at < prompt:
        rows = next_chunk(at, prompt, chunk)
        assert 1 <= rows <= chunk
        at += rows


@given(prompt=LENGTHS, common=LENGTHS, wide=LENGTHS)
def test_what_is_kept_is_common_and_computed_alike(prompt: int, common: int, wide: int) -> None:
    common = min(common, prompt)
    kept = reusable(prompt, common, wide)
    assert 0 <= kept <= min(common, wide, prompt - 1)
    assert kept <= wide_rows(prompt)
    check_chunks(kept, prompt, 64)
    if min(common, wide) == prompt == wide_rows(prompt):
        assert prompt - kept <= WIDE + STEP


@given(prompt=LENGTHS, position=LENGTHS)
def test_a_chunk_may_start_at_what_chunk_start_gives(prompt: int, position: int) -> None:
    assume(prompt % BLOCK == 0 or prompt % BLOCK >= WIDE)  # callers leave a short last block out
    start = chunk_start(min(position, prompt), prompt)
    assert 0 <= start <= position and start % STEP == 0
    assert rest_of_block(start, prompt) >= WIDE


@given(prompt=LENGTHS, common=LENGTHS)
def test_with_small_chunks_all_rows_are_alike(prompt: int, common: int) -> None:
    assert reusable(prompt, min(common, prompt), 0, 32) == min(common, prompt - 1)


@given(a=st.lists(st.integers(0, 2), max_size=40), b=st.lists(st.integers(0, 2), max_size=40))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    length = common_prefix(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


def test_the_chunk_is_the_one_that_is_soonest_through() -> None:
    """Efficient large chunks are worth waiting for; where all cost alike, small ones follow each other sooner."""
    gpu = tuple((rows, 5.0 + rows / 200) for rows in (64, 128, 256, 512))
    cpu = tuple((rows, rows * 2.0) for rows in (64, 128, 256, 512))
    assert ChunkCosts((gpu, gpu)).choose(4000, 512) == 512
    assert ChunkCosts((cpu, cpu)).choose(4000, 512) == 64
    assert ChunkCosts((gpu,)).choose(100, 256) == 128
    assert ChunkCosts((cpu[:1], gpu)).choose(4000) == 64  # the only size both were measured with
