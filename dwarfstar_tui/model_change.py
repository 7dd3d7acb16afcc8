"""What loading and unloading a model is shown as: the questions before, and a line while it is under way. Pure."""

from __future__ import annotations

from dwarfstar_engine.views import LoadView, StatusView
from dwarfstar_tui import text

STAGES_TOLD = 8  # of a plan; more would fill the box


def in_flight(count: int) -> str:
    """What becomes of requests."""
    if not count:
        return "No request runs now."
    if count == 1:
        return "1 request runs now: it has 10 s to finish, and new ones wait meanwhile."
    return f"{count} requests run now: they have 10 s to finish, and new ones wait meanwhile."


def rate(tok_s: float) -> str:
    return f"{tok_s:.0f}" if tok_s >= 100 else f"{tok_s:.1f}"


def load_question(checked: LoadView) -> tuple[str, str]:
    """Title and consequences of what the engine has checked: it fits."""
    lines = []
    if checked.before:
        again = " It is loaded anew." if checked.before == checked.model else ""
        lines.append(f"{text.clean(checked.before)} is served now, and is unloaded first.{again}")
        lines.append(in_flight(checked.streams))
        lines.append("If it cannot be loaded after all, what is served now is loaded again.")
    else:
        lines.append("No model is served now.")
    plan = checked.plan
    if plan is not None:
        stages = [f"{text.clean(one.node)} {one.layers[0]}–{one.layers[1] - 1}" for one in plan.stages]
        more = f" and {len(stages) - STAGES_TOLD} more" if len(stages) > STAGES_TOLD else ""
        lines.append(f"It fits: {', '.join(stages[:STAGES_TOLD])}{more}.")
        told = plan.predicted
        speed = f"{rate(told.single_tok_s)} tok/s for one request, {rate(told.aggregate_tok_s)} for all"
        lines.append(f"About {speed}; requests of up to {checked.context} tokens, {checked.slots} at a time.")
    return f"Load {text.clean(checked.model)}?", "\n".join(lines)


def unload_question(status: StatusView) -> tuple[str, str]:
    """Title and consequences."""
    assert status.model is not None
    running = status.throughput.active + status.throughput.queued
    then = "Then no model is served: memory is free, and the endpoint answers 503 until one is loaded."
    return f"Unload {text.clean(status.model.name)}?", f"{in_flight(running)}\n{then}"


def under_way(name: str, status: StatusView | None, *, checking: bool) -> str:
    """The line while it lasts."""
    name = text.clean(name)
    if checking:
        return f"{name}: looking whether it can be served …"
    if not name:
        return "unloading: requests finish first …"
    stages = status.stages if status is not None and status.model is not None and status.state != "serving" else ()
    ready = sum(stage.state == "ready" for stage in stages)
    return f"{name}: being loaded, {ready} of {len(stages)} stages ready" if stages else f"{name}: being loaded …"


def done_text(view: LoadView) -> str:
    """What to say when it is done."""
    ended = f"; {view.streams} request{'s' * (view.streams > 1)} did not finish in time" if view.streams else ""
    if not view.model:
        return f"{view.before} is unloaded{ended}"
    return f"{view.model} is loaded, in {view.took_s:.1f} s{ended}"
