"""SmolLM2 and Gemma 3, divided in every way that is legal, give bit for bit the logits of the unsplit model.

Each model has one child process, which loads the unsplit model once and answers all questions: see
``support.real_models``. The figures are printed (``pytest -s``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.model import arch
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.native import WireType
from support import real_models
from support.exactness import Worker
from support.real_models import GEMMA3, GREEDY_STEPS, LONG_STEPS, NAMES, SMOLLM2

pytestmark = [pytest.mark.llama, pytest.mark.timeout(300)]

DEADLINE_S = 120.0  # of one question; they take at most 10 s on an idle core
DENSE_LAYERS = {5, 11, 17}  # Gemma's layers without a window, at which no slice may begin
LEGAL = {SMOLLM2: set(range(1, 30)), GEMMA3: set(range(1, 18)) - DENSE_LAYERS}
UNEVEN = {SMOLLM2: [1, 3, 10, 22, 29], GEMMA3: [1, 4, 6, 13, 16]}
TWO = {SMOLLM2: [7, 15], GEMMA3: [3, 10]}
CLOSE = {WireType.F16: 0.05, WireType.Q8: 0.3}  # nats; 8 bits of quantised activations amplify every rounding
REORDERED = 0.1  # nats, where llama.cpp itself rounds otherwise: other kernels for other batch shapes

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks a model's child: ``ask(model, check, …)``."""
    workers = {model: Worker(tmp_path_factory.mktemp(model), "support.real_models", DEADLINE_S) for model in NAMES}

    def put(model: str, check: str, **more: Any) -> dict[str, Any]:
        return workers[model].ask(check=check, **{"path": str(real_models.path_of(model)), **more})

    yield put
    for worker in workers.values():
        worker.close()


both = pytest.mark.parametrize("model", NAMES)


@both
def test_every_legal_cut(model: str, ask: Ask) -> None:
    cuts = arch.legal_cuts(read_model(real_models.path_of(model)))
    assert set(cuts) == LEGAL[model]
    answers = {cut: ask(model, "cuts", cuts=[cut]) for cut in cuts}
    assert {answer["steps"] for answer in answers.values()} == {1 + GREEDY_STEPS}
    assert {cut: answer["difference"] for cut, answer in answers.items()} == dict.fromkeys(cuts, 0.0)


@both
def test_six_uneven_stages(model: str, ask: Ask) -> None:
    answer = ask(model, "cuts", cuts=UNEVEN[model])
    assert (answer["difference"], answer["steps"]) == (0.0, 1 + GREEDY_STEPS)


@both
def test_a_prompt_longer_than_the_sliding_window(model: str, ask: Ask) -> None:
    answer = ask(model, "cuts", cuts=TWO[model], long=True)
    assert (answer["difference"], answer["steps"]) == (0.0, 1 + LONG_STEPS)


def test_the_comparison_notices_missing_rules(ask: Ask) -> None:
    assert ask(GEMMA3, "cuts", cuts=TWO[GEMMA3], ignore_rules=True)["difference"] > 1


@both
@pytest.mark.parametrize("wire", WireType)
def test_wire_types(model: str, ask: Ask, wire: WireType) -> None:
    """f32 is exact; the others are close, and not exact, which shows that they were used."""
    answer = ask(model, "cuts", cuts=TWO[model][:1], wire=int(wire))
    print(f"\n{model} {wire.name}: divergence {answer['divergence']:.4f}, logits differ by {answer['difference']:.2f}")
    if wire is WireType.F32:
        assert answer["difference"] == 0.0
    else:
        assert answer["difference"] > 0.0
        assert 0.0 < answer["divergence"] < CLOSE[wire]


@both
def test_sequences_in_turn(model: str, ask: Ask) -> None:
    """Four slots at different positions, a frame each in turn: a text does not depend on its neighbours."""
    answer = ask(model, "together", cuts=TWO[model])
    assert answer["steps"] == [9] * 4
    assert answer["differences"] == [0.0] * 4


@both
@pytest.mark.parametrize("cuts", [[], None], ids=["one stage", "three stages"])
def test_slots_given_away_read_on_and_copied(model: str, cuts: list[int] | None, ask: Ask) -> None:
    """Also where cells come back from the slot, as another slot's prompt was read meanwhile."""
    differences = ask(model, "reuse", cuts=TWO[model] if cuts is None else cuts)
    assert len(differences) == 8 and set(differences.values()) == {0.0}, differences


def test_a_slot_longer_than_the_sliding_window_is_read_on(ask: Ask) -> None:
    """And refused where cells before a window are missing, which llama.cpp would not notice."""
    answer = ask(GEMMA3, "window", cuts=TWO[GEMMA3])
    assert answer["differences"] == {"read on": 0.0, "again": 0.0, "copied": 0.0}
    assert "do not follow" in answer["early"]


@both
def test_right_and_wrong_guesses_change_no_text(model: str, ask: Ask) -> None:
    answer = ask(model, "guesses", cuts=TWO[model])
    assert (answer["difference"], answer["drawn"]) == (0.0, True) and answer["steps"] > 10


@both
def test_steps_that_overtake_a_prompt_change_no_bit_of_either(model: str, ask: Ask) -> None:
    answer = ask(model, "overtaken", cuts=TWO[model], prompts=2)
    print(f"\n{model}: {answer['within']} steps while prompts were read")
    assert (answer["prompt"], answer["steps"], answer["after"]) == (0.0, 0.0, 0.0) and answer["within"] > 0


@both
@pytest.mark.parametrize("batched", [False, True])
def test_rows_of_several_slots_in_a_frame(model: str, batched: bool, ask: Ask) -> None:
    """Those of each alone. As one decode Gemma's are close: llama.cpp has other kernels for several rows."""
    answer = ask(model, "several", cuts=TWO[model], batched=batched)
    if batched and model == GEMMA3:
        assert 0.0 < answer["divergence"] < REORDERED
    else:
        assert (answer["difference"], answer["right"]) == (0.0, True)


@both
def test_measuring_gives_sane_figures_and_leaves_every_slot_empty(model: str, ask: Ask) -> None:
    answer = ask(model, "measure", cuts=TWO[model])
    assert answer["gaps"] == 3 * 4 * 2  # every slot of every stage refuses a row at position 1, of a prompt or not
    assert answer["difference"] == 0.0
    for profile in answer["profiles"]:
        rows = [rows for rows, _ in profile["prompt"]]
        assert rows[0] == 64 and rows == sorted(set(rows)) and all(ms > 0 for _, ms in profile["prompt"])
        assert profile["step_ms"] > 0 and profile["together_ms"] > 0
    heads = [profile["head_ms"] for profile in answer["profiles"]]
    assert heads[:-1] == [0.0] * (len(heads) - 1) and 0 < heads[-1] < answer["profiles"][-1]["step_ms"]


@both
def test_prompt_chunks(model: str, ask: Ask) -> None:
    """Chunks of 64 tokens or more, but for the last one multiples of 16, give what one batch gives."""
    divisions = [[512], [256, 256], [80, 432], [64] * 8, [208, 112, 192], [400, 101]]
    answers = ask(model, "chunks", cuts=TWO[model], divisions=divisions)["chunks"]
    assert [answer["difference"] for answer in answers] == [0.0] * len(divisions)


def test_a_short_last_chunk_is_close(ask: Ask) -> None:
    """It takes another attention kernel."""
    (rest,) = ask(SMOLLM2, "chunks", cuts=TWO[SMOLLM2], divisions=[[256, 44]])["chunks"]
    print(f"\nSmolLM2: 300 tokens as 256 + 44: divergence {rest['divergence']:.4f}")
    assert 0.0 < rest["divergence"] < REORDERED


def test_a_split_file(ask: Ask, tmp_path: Path) -> None:
    """Three shards, the first with metadata only: read, loaded whole by llama.cpp, and sliced."""
    shards = real_models.split_in_three(real_models.path_of(SMOLLM2), tmp_path)
    assert len(read_model(shards[1]).tensors) == len(read_model(real_models.path_of(SMOLLM2)).tensors)
    answer = ask(SMOLLM2, "cuts", path=str(shards[0]), cuts=TWO[SMOLLM2][:1])
    assert (answer["difference"], answer["steps"]) == (0.0, 1 + GREEDY_STEPS)
