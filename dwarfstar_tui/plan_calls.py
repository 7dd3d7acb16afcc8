"""The session's calls about plans: what is proposed, carried out, taken back, and lent.

Theory. While a boundary is dragged there are many wishes and only the last one matters. So one is asked at a time, and
while it is, of those that come only the latest waits. That keeps pace with the engine by itself; ASK_S bounds it where
the engine is quick, as its planner runs in the process that serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.views import CommitView, OverrideView, PlanRequest, ProposalView
from dwarfstar_tui.updates import CommitPlan, LentSet, PlanChanged, Propose, Proposed, SetLent, UndoPlan, Update

ASK_S = 0.1  # between two questions


class Planning(Protocol):
    """What is wanted of an engine here. All raise DwarfStarError."""

    async def propose(self, request: PlanRequest) -> ProposalView: ...
    async def commit(self, request: PlanRequest, base_epoch: int) -> CommitView: ...
    async def undo(self) -> CommitView: ...
    async def override(self, node: str, text: str, replan: bool) -> OverrideView: ...


class Plans:
    """See the module. engine: the one that is attached; raises DwarfStarError if none is."""

    def __init__(self, engine: Callable[[], Planning], put: Callable[[Update], None]) -> None:
        self._engine, self._put = engine, put
        self._next: Propose | None = None
        self._asking = False

    async def propose(self, wish: Propose) -> None:
        """Ask what becomes of a wish, unless a later one comes first."""
        self._next = wish
        if self._asking:
            return
        self._asking = True
        try:
            while (wanted := self._next) is not None:
                self._next = None
                self._put(await self._proposed(wanted))
                await asyncio.sleep(ASK_S)
        finally:
            self._asking = False

    async def _proposed(self, wish: Propose) -> Proposed:
        try:
            return Proposed(wish.number, await self._engine().propose(wish.request))
        except DwarfStarError as error:
            return Proposed(wish.number, None, error.message)

    async def change(self, command: CommitPlan | UndoPlan) -> PlanChanged:
        """Carry a plan out, or go back to the one before."""
        undone = isinstance(command, UndoPlan)
        try:
            if isinstance(command, CommitPlan):
                view = await self._engine().commit(command.request, command.base_epoch)
            else:
                view = await self._engine().undo()
        except DwarfStarError as error:
            return PlanChanged(None, undone, error.message, error.code)
        return PlanChanged(view, undone)

    async def lend(self, command: SetLent) -> LentSet:
        try:
            view = await self._engine().override(command.node, command.text, command.replan)
        except DwarfStarError as error:
            return LentSet(command, None, error.message, error.code)
        return LentSet(command, view)
