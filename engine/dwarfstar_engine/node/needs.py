"""What a plan must leave room for on each node."""

from __future__ import annotations

from dwarfstar_engine.batch.chunks import LARGEST, SLACK
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.plan.proportional import Need
from dwarfstar_engine.settings import Settings

# Measured, as resident memory: half of it are pages of libraries' files, which stages of one machine share.
PROCESS_BYTES = 96 << 20
TOKEN_BYTES = 240
LOGIT_BYTES = 4
STEP_OUTPUTS = 16  # as stage.llama.STEP_OUTPUTS, which cannot be imported here: it loads llama.cpp


def need(settings: Settings, source: Source, context: int) -> Need:
    """What each stage takes besides its weights."""
    return Need(
        kv_cells(settings, context),
        reserve_bytes(source, settings),
        source.forbidden_lengths,
        last_bytes(source, settings),
    )


def reserve_bytes(source: Source, settings: Settings) -> int:
    """What a stage's process takes before it has a model, and compute buffers, roughly: some ten times a chunk's
    activations."""
    return PROCESS_BYTES + most_rows(settings) * source.costs.n_embd * 4 * 16


def last_bytes(source: Source, settings: Settings) -> int:
    """What the last stage takes besides: each token's text, its place in an index and merges, and logits, which are
    computed and then kept for as many rows as a frame may ask for, and for each slot."""
    rows = max(STEP_OUTPUTS, settings.slots) + settings.slots
    return source.costs.vocabulary * (TOKEN_BYTES + 2 * rows * LOGIT_BYTES)


def kv_cells(settings: Settings, context: int) -> int:
    """KV cells of a stage: a context for each slot, and one in which a prompt is read apart from them."""
    return context * (settings.slots + (settings.slots > 1))


def most_rows(settings: Settings) -> int:
    """Rows of a frame, at most: a chunk of a prompt may be longer than asked for by ``SLACK``."""
    return (settings.chunk or LARGEST) + SLACK
