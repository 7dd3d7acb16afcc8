"""The Plan screen: every key, the mouse, and what the engine is asked, over a planner that answers at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from dwarfstar_engine.views import PlanRequest
from dwarfstar_tui.app import DwarfStarApp
from dwarfstar_tui.plan_draft import Draft
from dwarfstar_tui.plan_editor import Editor
from dwarfstar_tui.screens.dialogs import Confirm
from dwarfstar_tui.screens.plan import PlanScreen
from dwarfstar_tui.screens.plan_dialogs import Alternatives, Difference, Machines
from dwarfstar_tui.updates import CommitPlan, Linked, LinkState, PlanChanged, Propose, Proposed, StatusSeen, UndoPlan
from dwarfstar_tui.widgets.plan_bar import PlanBar
from dwarfstar_tui.widgets.runs_view import RunsView
from support.tui_cluster import NOW, Stage, history, home_lab, large, replaced, stage
from support.tui_plans import Planner

SIZE = (120, 34)
ORDER = ("tower", "garage-box", "mini-pc")


@dataclass
class Desk:
    """An app on its Plan screen, and a planner."""

    stage: Stage
    planner: Planner
    pilot: Pilot[None]

    @property
    def app(self) -> DwarfStarApp:
        return self.stage.running

    @property
    def screen(self) -> PlanScreen:
        screen = self.app._base_screen("plan")
        assert isinstance(screen, PlanScreen)
        return screen

    @property
    def draft(self) -> Draft:
        assert self.screen.editor.draft is not None
        return self.screen.editor.draft

    @property
    def cuts(self) -> tuple[int, ...]:
        return self.draft.cuts

    async def settle(self) -> None:
        """Until the app has nothing to ask any more."""
        await self.pilot.pause()
        self.app.tick()
        while self.planner.answer(self.stage):
            await self.pilot.pause()
            self.app.tick()
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        for key in keys:
            await self.pilot.press(key)
            await self.settle()

    def says(self, name: str) -> str:
        return self.screen.query_one(f"#{name}", RunsView).text

    def asked(self, kind: type[CommitPlan] | type[UndoPlan] | type[Propose]) -> list[object]:
        return [command for command in self.stage.asked if isinstance(command, kind)]


@asynccontextmanager
async def desk(size: tuple[int, int] = SIZE, *, readonly: bool = False) -> AsyncIterator[Desk]:
    stage = Stage(history(home_lab()), readonly=readonly)
    async with stage.app().run_test(size=size) as pilot:
        stage.play()
        found = Desk(stage, Planner(), pilot)
        await found.press("2")
        yield found


async def test_what_serves_is_shown_as_the_planner_sees_it() -> None:
    async with desk() as found:
        assert "predicted 17.8 tok/s for one stream" in found.says("plan-summary")
        assert "▒" in found.says("bar"), "the compute reserve has a part of its own"
        assert "garage-box is the bottleneck" in found.says("plan-summary")
        assert found.screen.editor.draft is None
        assert len(found.asked(Propose)) == 1, "nothing is asked again while nothing changes"


@pytest.mark.parametrize(
    ("keys", "cuts"),
    [
        (("left",), (43, 66)),
        (("right", "right"), (46, 66)),
        (("shift+right",), (49, 66)),
        (("right_square_bracket", "left"), (44, 65)),
        (("left_square_bracket", "shift+left"), (44, 61)),
        (("equals_sign", *"47", "enter"), (47, 66)),
        (("left", *"480", "backspace", "enter"), (48, 66)),
        (("left", "left", "u"), (43, 66)),
        (("left", "left", "u", "u", "U"), (43, 66)),
        (("left", "escape", "U"), (43, 66)),
    ],
)
async def test_keys_move_boundaries(keys: tuple[str, ...], cuts: tuple[int, ...]) -> None:
    async with desk() as found:
        await found.press(*keys)
        assert found.cuts == cuts
        assert found.screen.editor.settled
        assert found.asked(CommitPlan) == []


async def test_home_and_end_go_as_far_as_it_fits_and_the_clamp_is_explained() -> None:
    async with desk() as found:
        await found.press("end")
        assert found.cuts == (49, 66)
        assert "tower has 22.10 GiB" in found.says("plan-panel")
        await found.press("home")
        assert found.cuts[0] < 44
        assert "garage-box has 11.00 GiB" in found.says("plan-panel")


async def test_a_draft_says_what_it_costs() -> None:
    async with desk() as found:
        await found.press("right_square_bracket", "left", "left", "left")
        said = found.says("plan-panel")
        assert "boundary 2 of 2 at layer 63, was 66" in said
        assert "garage-box: 8.60 of 11.0 GiB, 2.40 free" in said
        assert "one stream 17.8 → 17.6 tok/s" in said
        assert "loads mini-pc 63–65 (1.26 GiB): about" in said


async def test_a_draft_is_drawn_before_the_planner_has_answered() -> None:
    async with desk() as found:
        await found.pilot.press("left")
        found.app.tick()
        assert "0–42" in found.says("bar")
        assert "asking the planner" in found.says("plan-panel")
        assert "≈" in found.says("plan-table")
        await found.settle()
        assert "≈" not in found.says("plan-table")


async def test_the_mouse_drags_a_boundary_and_all_of_it_is_one_edit() -> None:
    async with desk() as found:
        bar = found.screen.query_one(PlanBar)
        assert bar.geometry is not None
        x = bar.geometry.boundary_cell(1)
        begin = (bar.region.x + x, bar.region.y + 1)
        await found.pilot.mouse_down(PlanBar, offset=(x, 1))
        assert found.screen.editor.boundary == 1
        for by in (-1, -2, -4):
            await found.pilot.hover(None, offset=(begin[0] + by, begin[1]))
        await found.pilot.mouse_up(None, offset=(begin[0] - 4, begin[1]))
        await found.settle()
        layers = round(4 * bar.geometry.layers_per_cell())
        assert found.cuts == (44, 66 - layers)
        await found.pilot.hover(None, offset=(begin[0] - 9, begin[1]))
        await found.settle()
        assert found.cuts == (44, 66 - layers), "it was let go"
        await found.press("u")
        assert found.screen.editor.draft is None


async def test_a_click_chooses_a_stage_and_its_pin_holds_boundaries() -> None:
    async with desk() as found:
        await found.pilot.click(PlanBar, offset=(100, 1))
        assert found.screen.editor.stage == 2
        await found.press("P")
        assert found.draft.pins == {"mini-pc"}
        assert "◆mini-pc" in found.says("bar")
        await found.press("right_square_bracket", "left")
        assert found.cuts == (44, 66)
        assert "mini-pc is pinned" in found.says("plan-panel")
        await found.press("up", "P", "down", "P", "left")
        assert found.draft.pins == {"garage-box"}


async def test_a_machine_is_excluded_and_let_in_again() -> None:
    async with desk() as found:
        await found.press("down", "x")
        assert found.draft.excluded == {"garage-box"}
        assert "garage-box" not in found.draft.nodes
        assert "without garage-box" in found.says("plan-panel")
        await found.press("n")
        assert isinstance(found.app.screen, Machines)
        assert "excluded    garage-box" in str(found.app.screen.query_one(OptionList).get_option_at_index(1).prompt)
        await found.press("down", "enter")
        assert found.draft.excluded == frozenset()
        assert "garage-box" in found.draft.nodes


async def test_strategy_objective_and_the_planners_own() -> None:
    async with desk() as found:
        await found.press("s")
        assert found.draft.request() == PlanRequest(strategy="proportional")
        await found.press("o")
        assert found.draft.request() == PlanRequest(strategy="fastest", objective="throughput")
        await found.press("a")
        assert found.draft.request() == PlanRequest(auto=True, strategy="fastest", objective="throughput")
        assert found.screen.editor.settled


async def test_a_high_screen_has_the_alternatives_in_sight() -> None:
    for size, seen in (((160, 48), True), (SIZE, False)):
        async with desk(size) as found:
            told = found.planner.proposal(PlanRequest())
            assert told.present is not None
            one = told.present.alternatives[0]
            assert found.says("plan-others") == "", "one way is no choice"
            present = told.present.model_copy(update={"alternatives": (one, one)})
            found.stage.tell(Proposed(0, told.model_copy(update={"present": present})))
            assert ("tower, garage-box, mini-pc" in found.says("plan-others")) is seen


async def test_an_alternative_becomes_the_draft() -> None:
    async with desk() as found:
        await found.press("left", "A")
        assert isinstance(found.app.screen, Alternatives)
        await found.press("enter")
        assert found.cuts == (44, 66)


async def test_enter_shows_the_difference_and_asks() -> None:
    async with desk() as found:
        await found.press("left", "enter")
        assert isinstance(found.app.screen, Difference)
        shown = found.app.screen.query_one("#difference", RunsView).text
        assert "44–65" in shown and "43–65" in shown and "one stream 17.8" in shown
        await found.press("escape")
        assert found.asked(CommitPlan) == []
        assert found.cuts == (43, 66)
        await found.press("enter", "y")
        assert found.asked(CommitPlan) == [CommitPlan(PlanRequest(cuts=(43, 66), order=ORDER), 3)]
        assert "CHANGING" in found.says("plan-panel")
        await found.press("left", "escape")
        assert found.app.current_mode == "cluster", "a plan that is carried out is neither edited nor discarded"
        await found.press("2")
        assert found.cuts == (43, 66)


async def test_after_a_commit_predicted_stands_beside_measured_and_u_goes_back() -> None:
    async with desk() as found:
        await found.press("left", "enter", "y")
        found.stage.tell(PlanChanged(found.planner.committed(found.draft.request())))
        assert found.screen.editor.draft is None
        after = replaced(home_lab(), epoch=4)
        found.stage.tell(StatusSeen(after, NOW, 1.0))
        await found.settle()
        assert "epoch 4 serves" in found.says("plan-panel")
        assert "measured now 18.3 tok/s of 2 streams, predicted" in found.says("plan-panel")
        await found.press("u")
        assert isinstance(found.app.screen, Confirm)
        await found.press("y")
        assert found.asked(UndoPlan) == [UndoPlan()]
        back = found.planner.committed(PlanRequest(cuts=(44, 66), order=ORDER))
        found.stage.tell(PlanChanged(back, undone=True))
        await found.press("U")
        assert found.cuts == (43, 66)


async def test_a_refused_commit_keeps_the_draft_and_says_why() -> None:
    async with desk() as found:
        await found.press("left", "enter", "y")
        found.planner.epoch = 4
        found.stage.tell(PlanChanged(None, problem="epoch 4 serves now", code="stale_epoch"))
        await found.settle()
        assert found.cuts == (43, 66)
        assert found.draft.base_epoch == 4
        assert "epoch 4 serves now" in found.says("plan-panel")
        await found.press("enter", "y")
        assert found.asked(CommitPlan)[-1] == CommitPlan(PlanRequest(cuts=(43, 66), order=ORDER), 4)


async def test_an_engine_that_goes_and_comes_back_loses_no_draft() -> None:
    async with desk() as found:
        await found.press("right", "right")
        found.stage.tell(Linked(LinkState.DOWN, NOW, "no answer"))
        await found.press("right")
        assert found.screen.editor.waiting
        asked = len(found.asked(Propose))
        found.stage.tell(Linked(LinkState.UP, NOW + 1, "127.0.0.1:8477"))
        found.stage.tell(StatusSeen(home_lab(), NOW + 1, 1.0))
        await found.settle()
        assert len(found.asked(Propose)) == asked + 1
        assert found.cuts == (47, 66)
        assert found.screen.editor.settled


async def test_who_may_not_plan_sees_what_runs_and_why_there_is_no_more() -> None:
    async with desk() as found:
        found.screen._editor = Editor()
        found.stage.tell(Proposed(0, None, "only the owner plans"))
        assert "only the owner plans" in found.says("plan-panel")
        assert "0–43" in found.says("bar")
        await found.pilot.press("left")
        assert found.screen.editor.draft is None


async def test_readonly_shows_drafts_and_refuses_to_carry_them_out() -> None:
    async with desk(readonly=True) as found:
        await found.press("left")
        assert "one stream 17.8" in found.says("plan-panel")
        await found.press("enter")
        assert not isinstance(found.app.screen, Difference)
        assert found.asked(CommitPlan) == []


async def test_narrow_screens_have_steppers() -> None:
    async with desk((60, 20)) as found:
        assert not found.screen.query_one(PlanBar).display
        assert "44 ▸ ▲garage-box" in found.says("steppers")
        await found.press("right_square_bracket", "left")
        assert found.cuts == (44, 65)
        steppers = found.screen.query_one("#steppers", RunsView)
        line = found.says("steppers").splitlines()[0]
        await found.pilot.click(steppers, offset=(line.index("▸"), 0))
        await found.settle()
        assert found.cuts == (45, 65)
        await found.pilot.click(steppers, offset=(line.index("◂"), 0))
        await found.settle()
        assert found.cuts == (44, 65)


async def test_digits_are_screens_until_there_is_a_draft() -> None:
    async with desk() as found:
        await found.press("4")
        assert found.app.current_mode == "events"
        await found.press("2", "left", "4")
        assert found.app.current_mode == "plan"
        assert "to layer 4_" in found.says("plan-panel")
        await found.press("escape", "tab")
        assert found.app.current_mode == "chat"
        await found.press("escape", "2")
        assert found.cuts == (43, 66)


async def test_a_screen_of_one_part_has_nowhere_to_jump_to() -> None:
    async with desk() as found:
        await found.press("semicolon")
        assert found.app.screen is found.screen


async def test_many_machines_have_steppers_at_any_width() -> None:
    stage = Stage(history(large(64), 3))
    async with stage.app().run_test(size=SIZE) as pilot:
        stage.play()
        await pilot.press("2")
        stage.running.tick()
        await pilot.pause()
        screen = stage.running.screen
        assert not screen.query_one(PlanBar).display
        assert len(screen.query_one("#steppers", RunsView).lines) == 63


async def test_what_if_requests_were_longer_and_hidden_states_narrower() -> None:
    async with desk() as found:
        await found.press("c", *"7", "enter")
        assert found.screen.editor.draft is None, "no request is so short"
        before = found.planner.proposal(PlanRequest()).present
        await found.press("c", *"16384", "enter")
        assert found.draft.request() == PlanRequest(cuts=(44, 66), order=ORDER, context=16384)
        after = found.screen.editor.shown
        assert before is not None and after is not None
        assert after.stages[0].memory_gib.kv == pytest.approx(4 * before.stages[0].memory_gib.kv, rel=0.01)
        assert "started with --context 16384" in found.says("plan-panel")
        await found.press("w", "w")
        assert found.draft.wire == "f16"
        await found.press("enter")
        assert isinstance(found.app.screen, PlanScreen), "it cannot be carried out, and nothing is asked"
        await found.press("w", "w", "c", "enter")
        assert found.draft.start_options == ""
        await found.press("escape")
        assert found.screen.editor.draft is None


async def test_a_context_without_room_for_it_says_so() -> None:
    async with desk() as found:
        await found.press("c", *"500000", "enter")
        assert "do not fit" in found.says("plan-panel")
        assert "started with --context 500000" in found.says("plan-panel")


async def test_several_pipelines_are_shown_each_and_none_is_drafted() -> None:
    both = (stage("tower", (0, 80), 20.0), stage("garage-box", (0, 80), 40.0, pipeline=1))
    there = Stage([Linked(LinkState.UP, NOW), StatusSeen(replaced(home_lab(), stages=both), NOW, 2.0)])
    async with there.app().run_test(size=SIZE) as pilot:
        there.play()
        found = Desk(there, Planner(), pilot)
        await found.press("2", "left", "A", "enter", "escape")
        assert found.screen.editor.draft is None
        assert "pipeline 1" in found.says("bar") and "pipeline 1" in found.says("plan-table")
        told = found.screen.as_toml()
        assert told is not None and [one["pipeline"] for one in told["plan"]["stages"]] == [0, 1]  # type: ignore[index]
