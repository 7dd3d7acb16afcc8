"""Plan: which machine has which layers, how full it is, and where the time goes."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll

from dwarfstar_tui import text
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.plan_lines import in_order, legend, summary, table_lines, titled
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.store import State
from dwarfstar_tui.widgets.plan_bar import PlanBar
from dwarfstar_tui.widgets.runs_view import RunsView


class PlanScreen(AppScreen):
    NAME = "plan"
    LESSON = (
        "The plan that runs: one bar for all layers, each stage as wide as its layers. In it, the memory its machine "
        "lends: █ weights, ▓ KV cache, ░ free. ▲ marks the bottleneck: the stage that takes longest for a token."
    )

    def body(self) -> ComposeResult:
        with VerticalScroll(id="plan-body"):
            yield RunsView(id="plan-summary")
            yield PlanBar(id="bar")
            yield RunsView(id="plan-legend")
            yield RunsView(id="plan-table")

    def present(self, state: State, now: float) -> None:
        glyphs, status = self.host.glyphs, state.status
        width = self.query_one("#plan-table", RunsView).size.width
        top: list[Runs] = []
        table: list[Runs] = []
        if status is not None and status.stages:
            top = titled(status, lambda chain: summary(chain, width, glyphs))
            table = titled(status, lambda chain: table_lines(chain, state.rows, width, glyphs))
            loading = [stage for stage in status.stages if stage.state == "loading"]
            if loading:
                names = ", ".join(text.clean(stage.node) for stage in loading)
                top.append(((f"loading on {names}", "late"),))
        else:
            reason = status.reason if status is not None else "no engine is attached"
            top = [(("No plan runs.", "name"),), ((text.clean(reason), "muted"),)]
        self._lines("plan-summary", top)
        bar = self.query_one("#bar", PlanBar)
        bar.show(state, glyphs)
        bar.display = bool(bar.lines)
        self._lines("plan-legend", [legend(glyphs)] if bar.lines else [])
        self._lines("plan-table", table)

    def _lines(self, name: str, lines: list[Runs]) -> None:
        view = self.query_one(f"#{name}", RunsView)
        view.display = bool(lines)
        view.styles.height = len(lines)
        view.set_lines(lines)

    def as_toml(self) -> dict[str, object] | None:
        status = self.host.state.status
        if status is None or not status.stages:
            return None
        several = len(status.chains()) > 1
        stages = [
            {"node": stage.node, "layers": list(stage.layers)} | ({"pipeline": stage.pipeline} if several else {})
            for stage in in_order(status)
        ]
        return {"plan": {"epoch": status.epoch, "stages": stages}}
