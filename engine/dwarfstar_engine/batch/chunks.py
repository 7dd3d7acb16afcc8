"""How a prompt is cut into chunks, and what of it need not be computed again. Pure.

Theory. llama.cpp reads a prompt in batches of 512 rows. Its attention has one kernel for batches of 64 rows and more,
and another for fewer, which differ in the last bits; some weights have kernels for 4 rows or 16. So a chunk gives the
bits of the unsplit model if it lies in one of these blocks, begins at a multiple of 16 and has 64 rows or more, unless
the block itself has fewer. Chunks are as large as the measured times of the stages say: small ones follow each other
through the stages sooner, large ones are more efficient.

What a slot holds is in two parts: rows of blocks that large (``wide``), then rows of a short last block and of the
answer. A new prompt may keep the wide rows, for it would compute the same bits. So a text does not depend on what was
cached, on what else is running, or on how long its prompt took to arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 512  # llama.cpp's n_ubatch
WIDE = 64  # rows from which on its attention takes the other kernel (GGML_FA_TILE_Q)
STEP = 16  # no kernel works on more rows at once, so chunks begin at multiples of it
LARGEST = 256  # of a chunk, unless set: beyond it nothing is gained
SLACK = WIDE  # a chunk may be so much longer than asked for, so that the one behind it is wide enough


@dataclass(frozen=True, slots=True)
class ChunkCosts:
    """Measured: for each stage (rows, ms) of frames of a prompt, rows increasing."""

    stages: tuple[tuple[tuple[int, float], ...], ...] = ()

    def choose(self, rows: int, largest: int = LARGEST) -> int:
        """The chunk with which ``rows`` are soonest through all stages; ``largest`` if nothing was measured."""
        tables = [dict(stage) for stage in self.stages if stage]
        if not tables:
            return largest
        sizes = [size for size in sorted(set.intersection(*map(set, tables))) if size <= largest]

        def total(size: int) -> float:
            slowest = max(table[size] for table in tables)
            return (max(1.0, rows / size) + len(tables) - 1) * slowest

        return min(sizes, key=lambda size: (total(size), -size), default=largest)


UNMEASURED = ChunkCosts()


def wide_rows(prompt: int, chunk: int = WIDE) -> int:
    """How many rows of a prompt of ``prompt`` tokens are in blocks of WIDE rows or more."""
    rest = prompt % BLOCK
    return 0 if chunk < WIDE else prompt if rest == 0 or rest >= WIDE else prompt - rest


def next_chunk(position: int, prompt: int, chunk: int) -> int:
    """Rows of the chunk that begins at ``position`` of a prompt: at most ``chunk`` + SLACK, at least 1."""
    left = min(position - position % BLOCK + BLOCK, prompt) - position
    if chunk < WIDE:
        return min(chunk, left)
    if left < chunk + WIDE:
        return left
    parts = max(left // chunk, -(-left // (chunk + WIDE - 1)))
    rows = _up(-(-left // parts))
    return rows if left - rows >= WIDE or left == rows else left // parts // STEP * STEP


def reusable(prompt: int, common: int, wide: int, chunk: int = WIDE) -> int:
    """Rows a prompt may keep of a slot that begins with ``common`` of its tokens, ``wide`` rows of which are wide.

    At least the last row is computed, for its token. With chunks below WIDE all rows are computed alike.
    """
    if chunk < WIDE:
        return min(common, prompt - 1)
    last = (prompt - 1) // BLOCK * BLOCK  # where the last block begins
    held = min(common, wide)
    if prompt - last < WIDE and held >= last:
        return last
    return chunk_start(held, last if prompt - last < WIDE else prompt)


def chunk_start(position: int, end: int) -> int:
    """The largest start of a chunk at or before ``position``, such that WIDE rows follow in its block.

    ``end`` must not leave a last block of fewer rows.
    """
    position -= position % STEP
    block_end = min(position - position % BLOCK + BLOCK, end)
    if position % BLOCK and block_end - position < WIDE:
        position = block_end - WIDE
        position -= position % STEP
    if position == end:  # the prompt ends with a full block, all of it held
        position = (end - WIDE) // STEP * STEP
    return max(0, position)


def _up(rows: int) -> int:
    return -(-rows // STEP) * STEP


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences of one type begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared in C: ten comparisons and not ten thousand
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
