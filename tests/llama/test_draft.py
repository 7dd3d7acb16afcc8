"""The draft process with real models: SmolLM2 drafts for itself, and Gemma may not draft for it.

What it proposes is compared with the greedy text of the unsplit model, loaded in a child of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.errors import ModelError
from dwarfstar_engine.node import drafter
from dwarfstar_engine.node.child import Child
from dwarfstar_engine.node.drafter import Drafter, DraftOptions
from dwarfstar_engine.node.vocab import ProcessVocab
from dwarfstar_engine.stage.fingerprint import Fingerprint, fingerprint
from support.real_models import GEMMA3, SMOLLM2, TEXT, path_of

pytestmark = [pytest.mark.llama, pytest.mark.timeout(300)]

OPTIONS = DraftOptions(context=512, sequences=2)
DEADLINE_S = 60.0
COUNT = 8


async def of(path: Path) -> tuple[Fingerprint, list[int]]:
    """A model's vocabulary, and a prompt in it."""
    vocab = ProcessVocab(path)
    await vocab.start()
    try:
        return fingerprint(vocab.piece(token) for token in range(vocab.size)), await vocab.text(TEXT)
    finally:
        await vocab.close()


async def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The unsplit model's own continuation."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    child = Child("dwarfstar_engine.stage.whole", events.put_nowait)
    await child.start()
    try:
        child.send(path=str(path_of(SMOLLM2)), context=OPTIONS.context, threads=1)
        assert (await asyncio.wait_for(events.get(), DEADLINE_S))["event"] == "ready"
        child.send(prompt=list(prompt), count=count)
        tokens: list[int] = (await asyncio.wait_for(events.get(), DEADLINE_S))["tokens"]
        return tokens
    finally:
        await child.stop()


@asynccontextmanager
async def drafting(vocabulary: Fingerprint, options: DraftOptions = OPTIONS) -> AsyncIterator[Drafter]:
    draft = Drafter(path_of(SMOLLM2), "the target", vocabulary, options)
    await draft.start()
    try:
        yield draft
    finally:
        await draft.close()


async def ask(draft: Drafter, sequence: int, tokens: Sequence[int], count: int = COUNT) -> list[int]:
    answer: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    draft.propose(sequence, tokens, count, answer.set_result)
    return await asyncio.wait_for(answer, DEADLINE_S)


async def until(draft: Drafter, *, ready: bool) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while draft.ready is not ready:  # noqa: ASYNC110 - nothing tells it but the log
            await asyncio.sleep(0.01)


async def test_a_model_proposes_its_own_greedy_text_however_it_is_asked() -> None:
    """After right guesses, after a wrong one, from an earlier place, and for more sequences than it has slots.

    Each question leaves one token to be run, or the whole prompt: in batches of other shapes llama.cpp itself rounds
    otherwise, and where two tokens are nearly as likely the text goes another way.
    """
    vocabulary, prompt = await of(path_of(SMOLLM2))
    text = await greedy(prompt, 48)
    other = await greedy(prompt[:20], COUNT)
    async with drafting(vocabulary) as draft:
        for known in (0, 1, COUNT, COUNT - 3, 12):
            assert await ask(draft, 1, prompt + text[:known]) == text[known : known + COUNT]
        assert text[15] != text[0]
        assert await ask(draft, 1, [*prompt, *text[:15], text[0]]) != text[16 : 16 + COUNT]
        assert await ask(draft, 1, prompt + text[:16]) == text[16 : 16 + COUNT]
        for sequence in (2, 3, 4, 2):  # two slots: each of these takes another's
            assert await ask(draft, sequence, prompt[:20]) == other
        assert await ask(draft, 1, prompt) == text[:COUNT]
        draft.forget(1)
        assert await ask(draft, 1, prompt) == text[:COUNT]


async def test_a_new_sequence_takes_the_slot_unused_for_longest() -> None:
    """Asked in the child's own words, which tell whose text is lost."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    child = Child(drafter.DRAFT, events.put_nowait)
    await child.start()
    try:
        for command in (
            {"path": str(path_of(SMOLLM2))},
            {"context": 64, "sequences": 2, "threads": 1, "gpu_layers": 0},
        ):
            child.send(**command)
            assert (await asyncio.wait_for(events.get(), DEADLINE_S))["event"] in ("vocabulary", "ready")
        answers: list[str] = []
        for sequence, keep in ((1, 0), (2, 0), (1, 1), (3, 0), (1, 2), (2, 1)):
            child.send(id=len(answers), sequence=sequence, keep=keep, tokens=[100], count=1)
            answers.append((await asyncio.wait_for(events.get(), DEADLINE_S))["event"])
        assert answers == ["proposed"] * 5 + ["lost"]
    finally:
        await child.stop()


async def test_a_text_that_fills_its_slot_gets_fewer_guesses_and_then_none() -> None:
    vocabulary, prompt = await of(path_of(SMOLLM2))
    text = (prompt * 20)[: OPTIONS.context]
    async with drafting(vocabulary) as draft:
        assert len(await ask(draft, 1, text[:-3])) == 3
        none: list[int] = []
        draft.propose(1, text, COUNT, none.extend)
        assert len(await ask(draft, 2, prompt)) == COUNT  # answered after it
        assert none == []
        assert len(await ask(draft, 1, prompt)) == COUNT


async def test_a_killed_child_is_told_once_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drafter, "PAUSE_S", (0.05,))
    vocabulary, prompt = await of(path_of(SMOLLM2))
    async with drafting(vocabulary) as draft:
        before = await ask(draft, 1, prompt)
        pid = draft.pid
        with caplog.at_level(logging.WARNING, "dwarfstar.drafter"):
            late: list[int] = []
            draft.propose(1, [*prompt, *before], COUNT, late.extend)
            os.kill(pid, signal.SIGKILL)
            await until(draft, ready=False)
            draft.propose(1, prompt, COUNT, late.extend)
            await until(draft, ready=True)
        assert late == []
        assert draft.pid != pid and len(caplog.records) == 1
        assert await ask(draft, 1, prompt) == before


async def test_a_model_with_another_vocabulary_is_refused_and_both_are_named() -> None:
    vocabulary, _ = await of(path_of(SMOLLM2))
    draft = Drafter(path_of(GEMMA3), "SmolLM2-135M", vocabulary, OPTIONS)
    with pytest.raises(ModelError) as refused:
        await draft.start()
    await draft.close()
    assert refused.value.code == "draft_vocabulary"
    for part in (path_of(GEMMA3).name, "SmolLM2-135M", str(vocabulary.tokens)):
        assert part in refused.value.message


async def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "draft.gguf"
    path.write_bytes(b"no model at all")
    draft = Drafter(path, "the target", Fingerprint(1, ""), OPTIONS)
    with pytest.raises(ModelError, match=r"draft\.gguf"):
        await draft.start()
    await draft.close()
