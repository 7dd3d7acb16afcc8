"""The status for people, as wide as their terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from dwarfstar_engine.views import NodeView, StageView, StatusView

WIDE = 127  # columns from which live figures of the machines are shown beside the others
NAME, WIDE_NAME = 15, 24
UNKNOWN = "–"


def status_text(view: StatusView, width: int) -> str:
    """At most ``width`` columns for usual names, but not less than 80."""
    if not view.coordinator.leads:
        return f"{view.state}: term {view.coordinator.term} · {view.coordinator.api_url}\n  {view.reason}"
    model = f"{view.model.name}, {view.model.layers} layers" if view.model else "no model"
    lines = [
        f"{view.state}: {model} · {_epoch(view)} · {view.coordinator.api_url}",
        *([f"  {view.reason}"] if view.reason else []),
        f"  {view.throughput.tok_s:.1f} tok/s, {view.throughput.active} active, {view.throughput.queued} queued, "
        f"{view.last_event} event{'s' * (view.last_event != 1)}",
        "",
        *_table(view, wide=width >= WIDE),
        *([] if view.nodes else ["(no node has joined)"]),
        *(["* as it was set"] if any(node.override for node in view.nodes) else []),
        *(f"! {warning}" for warning in view.warnings),
    ]
    return "\n".join(lines)


def _epoch(view: StatusView) -> str:
    """And how many pipelines there are, if there are several."""
    count = len(view.chains())
    return f"epoch {view.epoch}" + (f" · {count} pipelines" if count > 1 else "")


def _table(view: StatusView, *, wide: bool) -> Iterator[str]:
    name = WIDE_NAME if wide else NAME
    heading = f"{'node':{name}}{'state':>7}{'beat s':>7}{'lends GiB':>10}"
    if wide:
        heading += f"{'free GiB':>9}{'load':>6}{'°C':>5}{'W':>6}"
    at = len(heading)
    heading += f"{'layers':>9}{'ms/tok':>8}"
    heading += f"{'rows/s':>8}{'busy':>6}{'wait':>6}{'GiB':>7}" if wide else f"{'busy':>6}{'GiB':>7}"
    yield heading + f"{'pid':>9}"
    for title, nodes in _groups(view):
        yield from title
        for node in nodes:
            row = _node(node, name, wide=wide)
            stages: list[StageView | None] = [stage for stage in view.stages if stage.node == node.name]
            for stage in stages or [None]:  # it may have taken over a second one
                yield (f"{row:{at}}" + _stage(stage, wide=wide)).rstrip()
                row = ""
    for copy in view.standbys:
        if copy.state == "ready":
            row = f"{copy.node[: name - 1]:{name}}{'copy':>7}"
            yield f"{row:{at}}{f'{copy.layers[0]}–{copy.layers[1] - 1}':>9}"


def _groups(view: StatusView) -> Iterator[tuple[tuple[str, ...], list[NodeView]]]:
    """The nodes under their titles: those of each pipeline along its ring, then the others. One pipeline needs none."""
    chains, left = view.chains(), {node.name: node for node in view.nodes}
    if len(chains) < 2:
        yield (), list(view.nodes)
        return
    for chain in chains:
        names = dict.fromkeys(stage.node for stage in chain.stages)
        yield (f"pipeline {chain.stages[0].pipeline}",), [left.pop(one) for one in names if one in left]
    if left:
        yield ("in no pipeline",), list(left.values())


def _node(node: NodeView, name: int, *, wide: bool) -> str:
    row = f"{node.name[: name - 1]:{name}}{node.state:>7}{node.heartbeat_age_s:7.1f}"
    row += f"{node.effective_vram_gib:9.2f}{'*' if node.override else ' '}"
    if wide:
        load = None if node.load is None else f"{node.load:.0%}"
        row += f"{_known(node.free_gib, '.2f'):>9}{load or UNKNOWN:>6}"
        row += f"{_known(node.temperature_c, '.0f'):>5}{_known(node.power_w, '.0f'):>6}"
    return row


def _stage(stage: StageView | None, *, wide: bool) -> str:
    if stage is None:
        return f"{UNKNOWN:>9}"
    layers = f"{stage.layers[0]}–{stage.layers[1] - 1}"
    row = f"{layers:>9}{stage.ms_per_token:8.2f}"
    if wide:
        row += f"{_known(stage.rows_s, '.1f'):>8}{stage.busy:6.0%}{stage.wait:6.0%}"
    else:
        row += f"{stage.busy:6.0%}"
    return row + f"{_known(stage.rss_gib, '.2f'):>7}{stage.pid:9}"


def _known(figure: float | None, how: str) -> str:
    return UNKNOWN if figure is None else format(figure, how)
