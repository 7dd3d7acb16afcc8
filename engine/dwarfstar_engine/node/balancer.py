"""Watches how busy stages are, and says when layers should move, or has them moved (``plan.balance``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from dwarfstar_engine.errors import DwarfStarError, PlanError
from dwarfstar_engine.node.journal import Journal, Kind
from dwarfstar_engine.node.steering import Host, Steering
from dwarfstar_engine.plan.balance import Balance, Move, Observation, observe
from dwarfstar_engine.plan.cost import Costs, cluster_costs
from dwarfstar_engine.plan.proportional import StagePlan

log = logging.getLogger("dwarfstar.coordinator")

LOOK_BEATS = 5  # heartbeats from one look to the next: it takes minutes to come to a conclusion


class Balancer:
    """See the module. warn: what the owner is to know, by what it is about."""

    def __init__(self, steering: Steering, journal: Journal, warn: Callable[[str, str], None]) -> None:
        self._steering, self._journal, self._warn = steering, journal, warn
        self._state = Balance()
        self._looked_s = float("-inf")
        self._work: asyncio.Task[None] | None = None

    def tick(self, host: Host, now_s: float) -> None:
        """Look, every few heartbeats. now_s: monotonic."""
        settings, stages = host.settings, host.ring.stages
        if settings.auto_balance == "off" or now_s - self._looked_s < LOOK_BEATS * settings.heartbeat_s:
            return
        heard = all(stage.report.epoch == host.epoch for stage in stages)
        if not host.serving or len(stages) < 2 or not heard or len(host.ring.nodes) < len(stages):
            return
        self._looked_s = now_s
        plans, busy = tuple(stage.plan for stage in stages), tuple(stage.report.busy for stage in stages)
        self._state, advice = observe(self._state, Observation(plans, busy, host.tok_s), self._present, now_s)
        if advice is not None:
            on = settings.auto_balance == "on" and not self._steering.decided
            self._tell(advice.sentence, advice.cuts, moves=isinstance(advice, Move), on=on)

    def _present(self) -> tuple[Costs, Sequence[StagePlan]] | None:
        """The plan that runs, on nodes by their names. It takes two milliseconds."""
        try:
            survey, present = self._steering.survey_present()
        except PlanError:
            return None
        return None if present is None else (cluster_costs(survey.cluster, survey.job), present.plan.stages)

    def _tell(self, sentence: str, cuts: tuple[int, ...], *, moves: bool, on: bool) -> None:
        shown = ",".join(map(str, cuts))
        advised = f"{sentence} (dwarfstar plan --cuts {shown} --commit)"
        self._warn("balance", f"{sentence}: being done" if on else advised)
        self._journal.add(Kind.BALANCE, sentence, details={"cuts": shown, "back": int(not moves)})
        if on and (self._work is None or self._work.done()):
            self._work = asyncio.create_task(self._follow(cuts, sentence, advised), name="balance")

    async def _follow(self, cuts: tuple[int, ...], sentence: str, advised: str) -> None:
        try:
            await self._steering.balance(cuts, sentence)
        except (DwarfStarError, TimeoutError) as error:
            told = error.message if isinstance(error, DwarfStarError) else "it was not loaded in time"
            log.warning("layers are not moved by themselves: %s", told)
            self._warn("balance", advised)
        else:
            self._warn("balance", f"done: {sentence}")
