"""Loading and unloading on the Models screen: what is asked, of whom, and what is shown meanwhile."""

from __future__ import annotations

import pytest

from dwarfstar_engine.views import (
    LoadView,
    MemoryView,
    PlannedStageView,
    PlanView,
    PredictedView,
    StatusView,
    ThroughputView,
)
from dwarfstar_tui import model_change
from dwarfstar_tui.app import DwarfStarApp
from dwarfstar_tui.screens.dialogs import Confirm
from dwarfstar_tui.screens.models import ModelsScreen
from dwarfstar_tui.updates import CheckModel, LoadModel, ModelChecked, ModelOrderOver, StatusSeen, UnloadModel
from dwarfstar_tui.widgets.runs_view import RunsView
from support.tui_cluster import MODELS, NOW, Stage, history, home_lab
from tui.test_app import SIZE, AppPilot, asked, begin, shown

GEMMA = "/m/gemma-3-27b-it-Q4_K_M.gguf"
NO_MEMORY = MemoryView(weights=1.0, kv=0.1, compute=0.1, headroom=2.0)


def planned(*nodes: str) -> PlanView:
    stages = tuple(
        PlannedStageView(node=name, layers=(10 * index, 10 * index + 10), memory_gib=NO_MEMORY, ms=1.0)
        for index, name in enumerate(nodes)
    )
    told = PredictedView(
        single_tok_s=18.31, aggregate_tok_s=140.2, ttft_ms=1.0, prompt_tokens=1, lanes=1, batch=1, hop_ms=()
    )
    return PlanView(
        model="m", context=4096, strategy="fastest", objective="single", stages=stages, predicted=told, excluded=(),
        alternatives=(), take="", advice="", options=(), bottleneck="",
    )  # fmt: skip


CHECKED = LoadView(
    model="gemma-3", before="Llama-3.3", streams=2, plan=planned("tower", "attic"), context=4096, slots=4
)


async def to_models(stage: Stage, pilot: AppPilot) -> DwarfStarApp:
    app = await begin(stage, pilot)
    await pilot.press("5")
    await pilot.pause()
    stage.tell(MODELS)
    await pilot.pause()
    return app


def note(app: DwarfStarApp) -> str:
    return app.screen.query_one("#files-note", RunsView).text.strip()


def toasts(app: DwarfStarApp) -> list[str]:
    return [toast.message for toast in app._notifications]


def question(app: DwarfStarApp) -> str:
    assert isinstance(app.screen, Confirm)
    return shown(app)


async def test_a_load_is_checked_then_asked_then_ordered() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await to_models(stage, pilot)
        await pilot.press("down", "l")
        assert asked(stage, CheckModel) == [CheckModel(GEMMA)] and not asked(stage, LoadModel)
        assert "looking whether it can be served" in note(app)
        stage.tell(ModelChecked(GEMMA, CHECKED))
        await pilot.pause()
        told = question(app)
        for words in ("Load gemma-3?", "Llama-3.3 is served now", "2 requests run now", "tower 0–9, attic 10–19",
                      "18.3 tok/s for one request, 140 for all", "4 at a time"):  # fmt: skip
            assert words in told
        await pilot.press("n")
        assert not asked(stage, LoadModel)
        await pilot.press("l")
        stage.tell(ModelChecked(GEMMA, CHECKED))
        await pilot.pause()
        await pilot.press("y")
        assert asked(stage, LoadModel) == [LoadModel(GEMMA)]
        stage.tell(StatusSeen(home_lab().model_copy(update={"state": "starting"}), NOW, 1.0))
        assert note(app) == "gemma-3: being loaded, 3 of 3 stages ready"
        await pilot.press("l", "u")
        assert len(asked(stage, CheckModel)) == 2 and isinstance(app.screen, ModelsScreen), "one order at a time"
        stage.tell(ModelOrderOver(), StatusSeen(home_lab(), NOW, 1.0))
        assert "models folder" in note(app)


async def test_a_refused_load_is_over() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await to_models(stage, pilot)
        await pilot.press("l")
        stage.tell(ModelOrderOver())
        assert "models folder" in note(app)
        await pilot.press("l")
        assert len(asked(stage, CheckModel)) == 2


async def test_a_file_that_cannot_be_served_is_not_asked_for() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await to_models(stage, pilot)
        await pilot.press("down", "down", "down", "l")
        assert not asked(stage, CheckModel) and "whisper-large cannot be served" in toasts(app)[-1]


async def test_unloading_tells_what_ends_and_asks() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await to_models(stage, pilot)
        await pilot.press("u")
        await pilot.pause()
        told = question(app)
        assert "Unload Llama-3.3-70B-Instruct-Q3_K_M?" in told and "2 requests run now" in told and "503" in told
        await pilot.press("escape")
        assert not asked(stage, UnloadModel)
        await pilot.press("u", "y")
        assert asked(stage, UnloadModel) == [UnloadModel()]
        stage.tell(ModelOrderOver(), StatusSeen(home_lab().model_copy(update={"model": None}), NOW, 1.0))
        await pilot.press("u")
        assert toasts(app)[-1] == "no model is loaded"
        assert len(asked(stage, UnloadModel)) == 1 and isinstance(app.screen, ModelsScreen)


async def test_readonly_orders_nothing() -> None:
    stage = Stage(history(home_lab()), readonly=True)
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await to_models(stage, pilot)
        await pilot.press("l", "u")
        app.submit(LoadModel(GEMMA))
        app.submit(UnloadModel())
        assert isinstance(app.screen, ModelsScreen)
        assert not [one for one in stage.asked if isinstance(one, (CheckModel, LoadModel, UnloadModel))]


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (CHECKED.model_copy(update={"before": "", "streams": 0}), "No model is served now."),
        (CHECKED.model_copy(update={"before": "gemma-3"}), "It is loaded anew."),
        (CHECKED.model_copy(update={"streams": 1}), "1 request runs now: it has 10 s"),
        (CHECKED.model_copy(update={"plan": planned(*"abcdefghij")}), "h 70–79 and 2 more."),
    ],
)
def test_consequences(view: LoadView, words: str) -> None:
    assert words in model_change.load_question(view)[1]


def test_what_is_under_way() -> None:
    busy: StatusView = home_lab().model_copy(update={"throughput": ThroughputView(tok_s=0.0, active=0, queued=0)})
    assert "No request runs now." in model_change.unload_question(busy)[1]
    assert model_change.under_way("", busy, checking=False).startswith("unloading")
    assert model_change.under_way("x", None, checking=False) == "x: being loaded …"
