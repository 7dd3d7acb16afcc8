"""What a plan must leave room for on each node."""

from __future__ import annotations

from dwarfstar_engine.batch.chunks import LARGEST, SLACK
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.plan.proportional import Need
from dwarfstar_engine.settings import Settings


def need(settings: Settings, source: Source, context: int) -> Need:
    """What each stage takes besides its weights."""
    return Need(kv_cells(settings, context), reserve_bytes(source, settings), source.forbidden_lengths)


def reserve_bytes(source: Source, settings: Settings) -> int:
    """Compute buffers of a stage, roughly: some ten times a chunk's activations, and what the process itself takes."""
    return (16 << 20) + most_rows(settings) * source.costs.n_embd * 4 * 16


def kv_cells(settings: Settings, context: int) -> int:
    """KV cells of a stage: a context for each slot, and one in which a prompt is read apart from them."""
    return context * (settings.slots + (settings.slots > 1))


def most_rows(settings: Settings) -> int:
    """Rows of a frame, at most: a chunk of a prompt may be longer than asked for by ``SLACK``."""
    return (settings.chunk or LARGEST) + SLACK
