"""Engines and reference answers that several tests share: starting them takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dwarfstar_engine.node.source import DEMO, find_model
from process.prompts import PROMPTS
from process.reference import Answer, answers
from support.engine_process import EngineProcess

TOKENS = 32  # of each greedy answer
BLOCK = 512  # rows of llama.cpp's batches, as it comes


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return find_model(DEMO, Path())


@pytest.fixture(scope="session")
def reference(demo_model: Path) -> list[Answer]:
    """What unsplit llama.cpp answers to PROMPTS."""
    return answers(demo_model, PROMPTS, TOKENS, BLOCK)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """The demo as a user starts it. Tests that share it leave it serving and idle."""
    with EngineProcess(tmp_path_factory.mktemp("demo") / "home", "--demo") as engine:
        yield engine.wait_serving()
