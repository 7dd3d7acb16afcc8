"""The cells of a slot, given by one process and taken by another: the text goes on with the same bits.

In a child process, as llama.cpp may abort: see ``support.carried``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.exactness import Worker
from support.real_models import GEMMA3, SMOLLM2
from support.tiny_models import FAMILIES

pytestmark = [pytest.mark.llama, pytest.mark.timeout(300)]

DEADLINE_S = 120.0  # of one question; they take a few seconds on an idle core
OWN, SHARED = True, False  # a context for each slot, or one for all

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    folder = tmp_path_factory.mktemp("carried")
    worker = Worker(folder, "support.carried", DEADLINE_S)
    yield lambda **request: worker.ask(folder=str(folder), **request)
    worker.close()


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize(("source", "target"), [(OWN, OWN), (OWN, SHARED), (SHARED, OWN), (SHARED, SHARED)])
def test_a_long_text_goes_on_with_the_same_bits(ask: Ask, kv: str, source: bool, target: bool) -> None:
    how = {"source": source, "target": target, "slot": int(source == target)}
    answer = ask(model=SMOLLM2, prompt=100, options={"kv_type": kv}, how=how)
    assert answer == {"alike": True, "difference": 0.0}


def test_steps_behind_what_is_carried_are_forgotten(ask: Ask) -> None:
    assert ask(model=SMOLLM2, prompt=70, how={"ahead": 3}) == {"alike": True, "difference": 0.0}


def test_with_one_slot(ask: Ask) -> None:
    assert ask(model=SMOLLM2, prompt=70, options={"slots": 1}, how={"slot": 0}) == {"alike": True, "difference": 0.0}


@pytest.mark.parametrize("prompt", [70, 600])
@pytest.mark.parametrize("target", [OWN, SHARED])
def test_layers_with_a_window(ask: Ask, prompt: int, target: bool) -> None:
    """600 tokens are more than the window's 512."""
    assert ask(model=GEMMA3, prompt=prompt, how={"target": target, "slot": 0}) == {"alike": True, "difference": 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(family: str, ask: Ask) -> None:
    assert ask(family=family) == {"alike": True, "difference": 0.0}
