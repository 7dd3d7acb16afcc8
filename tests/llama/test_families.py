"""Every architecture that the rules accept, as a tiny random model, is bit-exact at every legal cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dwarfstar_engine.model import arch
from support.exactness import Worker
from support.tiny_models import FAMILIES

pytestmark = pytest.mark.llama

PROMISED = (
    "llama mistral qwen2 qwen3 qwen3moe gemma gemma2 gemma3 phi3 deepseek2 mixtral gpt-oss granite olmo2 starcoder2 "
    "stablelm command-r falcon glm4 qwen2vl"
)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("families"))
    yield worker
    worker.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_equal_the_whole_model(family: str, worker: Worker) -> None:
    differences = worker.sweep(family)
    assert differences
    assert set(differences.values()) == {0.0}


@pytest.mark.parametrize("family", ["gemma3", "gemma", "granite", "bloom", "minicpm", "qwen3vl"])
def test_the_sweep_notices_missing_rules(family: str, worker: Worker) -> None:
    try:
        differences = worker.sweep(family, ignore_rules=True)
    except RuntimeError:
        return  # it did not even run
    assert max(differences.values()) > 0


def test_every_architecture_accepted_is_swept() -> None:
    assert arch.supported() == {family.architecture for family in FAMILIES.values()}
    assert set(PROMISED.split()) <= set(FAMILIES)
