"""The state of the Plan screen: what serves, the draft, its history, and what the engine says of it. Pure.

Theory. ``told`` is the engine's latest look at what serves, ``draft`` what the person makes of it, ``answer`` what the
planner says of that draft. Each new draft gets a number and is asked about; an answer to an older one is not taken. An
answer may move cuts: then the draft is where they were moved to, and ``clamped`` says why. Nothing here is lost when
the engine is: the draft waits, and is asked about again.

Bounds: HISTORY drafts to go back to; TYPED_MAX digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dwarfstar_engine.views import CommitView, PlanView, ProposalView
from dwarfstar_tui import plan_draft
from dwarfstar_tui.plan_draft import Draft

HISTORY = 64  # a person remembers less
TYPED_MAX = 4  # digits of a layer: no model has ten thousand


@dataclass(frozen=True, slots=True)
class Editor:
    """See the module. past, future: drafts to go back and forth to; None among them: no draft. number: of the wish
    that the draft is. note: of what was done last. committing_at: since when a change is carried out."""

    told: ProposalView | None = None
    draft: Draft | None = None
    number: int = 0
    answer: ProposalView | None = None
    problem: str = ""
    past: tuple[Draft | None, ...] = ()
    future: tuple[Draft | None, ...] = ()
    boundary: int = 0
    stage: int = 0
    typed: str = ""
    note: str = ""
    clamped: tuple[str, ...] = ()
    committing_at: float | None = None
    done: CommitView | None = None
    taken_back: Draft | None = None  # what `U` would carry out again

    @property
    def base(self) -> Draft | None:
        """What an edit begins with."""
        if self.draft is not None:
            return self.draft
        return plan_draft.begun(self.told) if self.told is not None else None

    @property
    def shown(self) -> PlanView | None:
        """The plan with figures that are known: the draft's if the planner has answered, else the one that serves."""
        if self.draft is not None and self.answer is not None and self.answer.proposed is not None:
            return self.answer.proposed
        return self.told.present if self.told is not None else None

    @property
    def settled(self) -> bool:
        """Whether what is shown are the draft's own figures."""
        plan = self.answer.proposed if self.answer is not None else None
        return self.draft is None or (plan is not None and plan_draft.same_stages(self.draft, plan))

    @property
    def stale(self) -> str:
        """Why the draft cannot be carried out any more."""
        if self.draft is None or self.told is None:
            return ""
        return plan_draft.stale(self.draft, self.told)

    @property
    def waiting(self) -> bool:
        """Whether the planner has not answered for this draft yet."""
        return self.draft is not None and self.answer is None and not self.problem


def edited(editor: Editor, change: Callable[[Draft], Draft], *, note: str = "", dragging: bool = False) -> Editor:
    """After an edit. dragging: it goes on with the one before, and both are undone together."""
    base = editor.base
    if base is None:
        return replace(editor, typed="", note="there is no plan that could be changed")
    draft = change(base)
    if draft == base:
        return replace(editor, typed="", note=note)
    past = editor.past if dragging else (*editor.past, editor.draft)[-HISTORY:]
    return _with(replace(editor, past=past, future=(), done=None, note=note), draft)


def _with(editor: Editor, draft: Draft | None) -> Editor:
    """Another draft, which the planner has to be asked about."""
    return replace(
        editor,
        draft=draft,
        number=editor.number + 1,
        answer=None,
        problem="",
        typed="",
        clamped=(),
        boundary=_within(editor.boundary, len(draft.cuts) if draft is not None else None),
        stage=_within(editor.stage, len(draft.nodes) if draft is not None else None),
    )


def _within(at: int, count: int | None) -> int:
    return at if count is None else max(0, min(at, count - 1))


def back(editor: Editor) -> Editor:
    """Undo the last edit."""
    if not editor.past:
        return editor
    future = (*editor.future, editor.draft)[-HISTORY:]
    return _with(replace(editor, past=editor.past[:-1], future=future, note=""), editor.past[-1])


def forth(editor: Editor) -> Editor:
    if not editor.future:
        return editor
    past = (*editor.past, editor.draft)[-HISTORY:]
    return _with(replace(editor, future=editor.future[:-1], past=past, note=""), editor.future[-1])


def discarded(editor: Editor) -> Editor:
    """Without a draft; U brings it back."""
    if editor.draft is None:
        return editor
    return replace(
        _with(editor, None), past=(), future=(editor.draft,), note="the draft is discarded: U brings it back"
    )


def took(editor: Editor, number: int, view: ProposalView | None, problem: str) -> Editor:
    """What the engine says; of the plan that serves at any time, of a draft only if it is still this one."""
    if view is not None:
        editor = _looked(editor, view)
    if number != editor.number:
        return editor
    if view is None:
        return replace(editor, problem=problem)
    if editor.draft is None:
        return replace(editor, problem="", answer=view)
    if view.proposed is None:
        return replace(editor, answer=None, problem=view.error or "no such plan is possible")
    draft = plan_draft.answered(editor.draft, view.proposed)
    return replace(
        editor,
        draft=draft,
        answer=view,
        problem="",
        clamped=view.clamped,
        boundary=_within(editor.boundary, len(draft.cuts)),
        stage=_within(editor.stage, len(draft.nodes)),
    )


def _looked(editor: Editor, view: ProposalView) -> Editor:
    """With what serves now. A draft based on another epoch is moved onto it, which is said."""
    draft = editor.draft
    told = replace(editor, told=view)
    if draft is None:
        base = told.base
        count = (len(base.cuts), len(base.nodes)) if base is not None else (1, 1)
        return replace(told, boundary=_within(editor.boundary, count[0]), stage=_within(editor.stage, count[1]))
    if view.epoch == draft.base_epoch or told.stale or editor.committing_at is not None:
        return told
    note = f"epoch {view.epoch} serves now: the draft is based on it, and its difference is to that"
    return replace(told, draft=plan_draft.rebased(draft, view), note=note)


# --- carrying out ---


def begun(editor: Editor, now: float) -> Editor:
    """A change is carried out; until it has ended there are no edits."""
    return replace(editor, committing_at=now, note="", done=None)


def ended(editor: Editor, view: CommitView | None, problem: str, *, undone: bool) -> Editor:
    """After a commit, or after going back. What failed leaves the draft."""
    over = replace(editor, committing_at=None)
    if view is None:
        return replace(over, note=problem)
    taken_back = _as_draft(editor, view.before) if undone else None
    if over.told is not None:  # until the next look
        known = over.told.present.alternatives if over.told.present is not None else ()
        present = view.after.model_copy(update={"alternatives": known})
        over = replace(over, told=over.told.model_copy(update={"epoch": view.epoch, "present": present}))
    return replace(_with(replace(over, past=(), future=(), note=""), None), done=view, taken_back=taken_back)


def _as_draft(editor: Editor, plan: PlanView) -> Draft | None:
    """A plan that was taken back as a draft, to be carried out again."""
    base = plan_draft.begun(editor.told) if editor.told is not None else None
    return plan_draft.answered(base, plan) if base is not None else None


def again(editor: Editor) -> Editor:
    """What was taken back, as a draft of the plan that serves now."""
    if editor.taken_back is None or editor.told is None:
        return editor
    draft = replace(editor.taken_back, base_epoch=editor.told.epoch)
    return _with(replace(editor, past=(None,), taken_back=None, done=None), draft)
