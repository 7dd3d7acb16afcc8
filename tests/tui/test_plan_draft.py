"""Drafts of a plan: boundaries along legal cuts, wishes, and what becomes of them when another plan serves."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.views import PlanRequest, ProposalView
from dwarfstar_tui import plan_draft, plan_editor
from dwarfstar_tui.plan_draft import FAR, Draft
from dwarfstar_tui.plan_editor import Editor
from support.tui_plans import Planner

LEGAL = (6, 12, 18, 24, 30)
DRAFT = Draft(3, "m", 36, LEGAL, ("a", "b", "c"), (12, 24))


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    layers = draw(st.integers(4, 100))
    legal = tuple(sorted(draw(st.sets(st.integers(1, layers - 1), min_size=1))))
    cuts = tuple(sorted(draw(st.sets(st.sampled_from(legal), min_size=1, max_size=6))))
    nodes = tuple(f"n{index}" for index in range(len(cuts) + 1))
    pins = draw(st.frozensets(st.sampled_from(nodes)))
    return Draft(1, "m", layers, legal, nodes, cuts, pins)


@given(drafts(), st.data())
def test_a_moved_boundary_is_legal_and_leaves_every_machine_a_layer(draft: Draft, data: st.DataObject) -> None:
    boundary = data.draw(st.integers(0, len(draft.cuts) - 1))
    steps = st.integers(-7, 7) | st.sampled_from([-FAR, FAR])
    after = data.draw(
        st.builds(lambda by: plan_draft.stepped(draft, boundary, by), steps)
        | st.builds(lambda layer: plan_draft.moved(draft, boundary, layer), st.integers(-9, 200))
    )
    assert set(after.cuts) <= set(draft.legal)
    assert all(first < end for _, (first, end) in after.stages)
    others = [index for index in range(len(draft.cuts)) if index != boundary]
    assert all(after.cuts[index] == draft.cuts[index] for index in others)
    if set(draft.nodes[boundary : boundary + 2]) & draft.pins:
        assert after == draft


def test_a_step_goes_to_the_next_legal_cut_and_far_to_the_last() -> None:
    assert plan_draft.stepped(DRAFT, 0, 1).cuts == (18, 24)
    assert plan_draft.stepped(DRAFT, 0, -1).cuts == (6, 24)
    assert plan_draft.stepped(DRAFT, 1, 5).cuts == (12, 30)
    assert plan_draft.stepped(DRAFT, 0, FAR).cuts == (18, 24)
    assert plan_draft.moved(DRAFT, 1, 20).cuts == (12, 18)
    assert plan_draft.moved(DRAFT, 1, 21).cuts == (12, 24), "of two equally near the one where it is"


def test_what_is_asked_of_the_engine() -> None:
    by_hand = plan_draft.stepped(DRAFT, 0, 1)
    assert by_hand.request() == PlanRequest(cuts=(18, 24), order=("a", "b", "c"))
    pinned = plan_draft.pinned(by_hand, "c")
    assert pinned.request().pins == {"c": (24, 36)}
    assert plan_draft.by_planner(DRAFT).request() == PlanRequest(auto=True)
    assert plan_draft.by_planner(pinned).request() == PlanRequest(pins={"c": (24, 36)})
    excluded = plan_draft.excluding(pinned, "c")
    assert excluded.request() == PlanRequest(excluded=("c",))
    assert not plan_draft.excluding(excluded, "c").excluded
    wishing = plan_draft.wishing(DRAFT, strategy="fastest", objective="throughput")
    assert wishing.request() == PlanRequest(strategy="fastest", objective="throughput")


# --- the editor ---


def told(planner: Planner, request: PlanRequest | None = None) -> ProposalView:
    return planner.proposal(request or PlanRequest())


def begun(planner: Planner) -> Editor:
    return plan_editor.took(Editor(), 0, told(planner), "")


def step(editor: Editor, by: int, boundary: int = 0) -> Editor:
    return plan_editor.edited(editor, lambda draft: plan_draft.stepped(draft, boundary, by))


def answered(editor: Editor, planner: Planner) -> Editor:
    assert editor.draft is not None
    return plan_editor.took(editor, editor.number, told(planner, editor.draft.request()), "")


def test_an_answer_to_an_older_draft_is_not_taken() -> None:
    planner = Planner()
    first = step(begun(planner), 1)
    assert first.draft is not None
    late = told(planner, first.draft.request())
    second = plan_editor.took(step(first, 1), first.number, late, "")
    assert second.waiting
    assert second.draft is not None and second.draft.cuts == (46, 66)


def test_cuts_that_do_not_fit_come_back_where_they_do_with_the_reason() -> None:
    planner = Planner()
    editor = answered(step(begun(planner), FAR), planner)
    assert editor.draft is not None and editor.draft.cuts[0] < 65
    assert editor.settled
    assert "tower" in editor.clamped[0]


def test_undo_and_redo_go_through_drafts_and_back_to_none() -> None:
    planner = Planner()
    one = answered(step(begun(planner), 1), planner)
    two = answered(step(one, 1), planner)
    assert plan_editor.back(two).draft == one.draft
    none = plan_editor.back(plan_editor.back(two))
    assert none.draft is None
    assert plan_editor.back(none) == none
    assert plan_editor.forth(plan_editor.forth(none)).draft == two.draft


def test_a_discarded_draft_can_be_had_again() -> None:
    editor = step(begun(Planner()), 2)
    gone = plan_editor.discarded(editor)
    assert gone.draft is None
    assert plan_editor.forth(gone).draft == editor.draft


def test_a_draft_is_moved_onto_another_epoch_and_that_is_said() -> None:
    planner = Planner()
    editor = answered(step(begun(planner), -3), planner)
    planner.epoch = 9
    after = plan_editor.took(editor, editor.number - 1, told(planner), "")
    assert after.draft is not None and editor.draft is not None
    assert after.draft.cuts == editor.draft.cuts
    assert after.draft.base_epoch == 9
    assert "epoch 9" in after.note


def test_a_draft_of_another_model_is_stale() -> None:
    planner = Planner()
    editor = answered(step(begun(planner), -3), planner)
    other = told(planner)
    assert other.present is not None
    other = other.model_copy(update={"epoch": 9, "present": other.present.model_copy(update={"model": "other"})})
    after = plan_editor.took(editor, 0, other, "")
    assert "other is served" in after.stale
    assert after.draft == editor.draft


def test_a_commit_that_fails_keeps_the_draft_and_one_that_is_done_ends_it() -> None:
    planner = Planner()
    editor = answered(step(begun(planner), -3), planner)
    assert editor.draft is not None
    busy = plan_editor.begun(editor, 5.0)
    failed = plan_editor.ended(busy, None, "no room", undone=False)
    assert failed.draft == editor.draft
    assert (failed.note, failed.committing_at) == ("no room", None)
    done = plan_editor.ended(busy, planner.committed(editor.draft.request()), "", undone=False)
    assert done.draft is None and done.done is not None
    assert done.told is not None and done.told.epoch == 4


def test_a_look_while_it_is_carried_out_keeps_no_draft_alive() -> None:
    planner = Planner()
    editor = answered(step(begun(planner), -2), planner)
    assert editor.draft is not None
    busy = plan_editor.begun(editor, 5.0)
    done = planner.committed(editor.draft.request())
    seen = plan_editor.took(busy, busy.number, told(planner, editor.draft.request()), "")
    assert (seen.note, seen.committing_at) == ("", 5.0)
    assert plan_editor.ended(seen, done, "", undone=False).draft is None


def test_what_was_taken_back_can_be_carried_out_again() -> None:
    planner = Planner()
    cut = PlanRequest(cuts=(45, 66), order=("tower", "garage-box", "mini-pc"))
    planner.committed(cut)
    editor = begun(planner)
    back = planner.committed(PlanRequest(cuts=(44, 66), order=("tower", "garage-box", "mini-pc")))
    undone = plan_editor.ended(plan_editor.begun(editor, 1.0), back, "", undone=True)
    again = plan_editor.again(undone)
    assert again.draft is not None
    assert again.draft.cuts == (45, 66)
    assert again.draft.base_epoch == planner.epoch


def test_owners_pins_stay_in_a_draft() -> None:
    planner = Planner()
    view = told(planner).model_copy(update={"pins": {"tower": (0, 44)}, "excluded": ("laptop",)})
    editor = step(plan_editor.took(Editor(), 0, view, ""), 1, boundary=1)
    assert editor.draft is not None
    request = editor.draft.request()
    assert (request.pins, request.excluded) == ({"tower": (0, 44)}, ("laptop",))
    assert plan_draft.held(editor.draft, 0).startswith("tower is pinned")


def test_nothing_to_carry_out_is_known() -> None:
    planner = Planner()
    editor = answered(step(step(begun(planner), 1), -1), planner)
    assert editor.draft is not None and editor.answer is not None
    assert not plan_draft.changes(editor.draft, editor.answer)
    assert plan_draft.changes(plan_draft.pinned(editor.draft, "tower"), editor.answer)
    assert plan_draft.changes(replace(editor.draft, cuts=(43, 66)), editor.answer)
