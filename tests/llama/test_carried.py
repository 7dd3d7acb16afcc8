"""The cells of a slot, given by some processes and taken by others: the text goes on with the same bits.

In a child process, as llama.cpp may abort: see ``support.carried``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.carried import ONE_CUT
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


RECUTS = [([15], [18]), ([18], [15]), ([10, 20], [5, 17]), ([15], []), ([4, 9, 22], [20])]


@pytest.mark.parametrize(("cuts", "recut"), RECUTS)
def test_layers_of_several_slices_go_on_with_the_same_bits(ask: Ask, cuts: list[int], recut: list[int]) -> None:
    answer = ask(model=SMOLLM2, prompt=100, cuts=cuts, recut=recut)
    assert answer == {"alike": True, "difference": 0.0}


@pytest.mark.parametrize("kv", ["q8_0", "q4_0", "f32"])
def test_layers_of_several_slices_in_other_types(ask: Ask, kv: str) -> None:
    how = {"source": OWN, "target": SHARED, "ahead": 2}
    answer = ask(model=SMOLLM2, prompt=70, cuts=[15], recut=[18], options={"kv_type": kv}, how=how)
    assert answer == {"alike": True, "difference": 0.0}


def test_transposed_values_of_several_slices(ask: Ask) -> None:
    options = {"flash_attention": "off"}
    answer = ask(model=SMOLLM2, prompt=70, cuts=[15], recut=[18], options=options, how={"target": OWN})
    assert answer == {"alike": True, "difference": 0.0}


@pytest.mark.parametrize("prompt", [70, 600])
@pytest.mark.parametrize("target", [OWN, SHARED])
def test_layers_with_a_window_of_several_slices(ask: Ask, prompt: int, target: bool) -> None:
    answer = ask(model=GEMMA3, prompt=prompt, cuts=[6], recut=[12], how={"target": target, "slot": 0})
    assert answer == {"alike": True, "difference": 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_recut(family: str, ask: Ask) -> None:
    exact = {"alike": True, "difference": 0.0}
    assert ask(family=family, recut=True) == ({"refused": ONE_CUT} if family == "llama4" else exact)
