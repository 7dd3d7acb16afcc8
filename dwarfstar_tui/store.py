"""What the app knows: a pure reduce of the session's updates. Nothing here knows Textual, or reads a clock.

Theory. The engine's status is the truth, a few times a second; between two of them only time passes. So a row keeps
the moment its last heartbeat was heard, and its age is a function of now: it runs on between updates, and on when they
stop. A node that the engine no longer names stays, with what was last known of it and why it went, until GONE_MAX
others have gone after it.

Bounds: EVENTS_MAX events, HISTORY samples of each figure, GONE_MAX nodes that have gone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from dwarfstar_engine.views import EventsView, EventView, NodeView, StageView, StatusView
from dwarfstar_tui.updates import Happened, Linked, LinkState, StatusSeen, Update

EVENTS_MAX = 2000  # lines of the timeline; the engine keeps no more
HISTORY = 60  # samples of a sparkline, a minute of them
SAMPLE_S = 1.0
GONE_MAX = 64  # nodes that have gone and are still shown
LATE_S, LOST_S = 2.5, 5.0  # the engine's own defaults; only used for what time does between two updates
GONE_STATES = frozenset({"lost", "left", "removed"})
CAUSES = frozenset({"node_lost", "node_left", "node_removed", "node_refused", "node_late", "stage_failed"})
WORDS = {"joined": "ok"}


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A machine as it is shown. heard_at: when its last heartbeat came. rates: tokens a second, oldest first."""

    view: NodeView
    stages: tuple[StageView, ...]
    heard_at: float
    rates: tuple[float, ...] = ()
    sampled_at: float = -1e9
    cause: str = ""  # of what happened to it last
    copy: tuple[int, int] | None = None  # layers of another stage that it holds ready
    gone: bool = False  # the engine does not name it any more
    bottleneck: bool = False
    several: bool = False  # there are other pipelines than its own

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def planned_gib(self) -> float:
        return sum(stage.weights_gib + stage.kv_gib for stage in self.stages)

    @property
    def tok_s(self) -> float | None:
        """Tokens that passed it in the last second, guesses and prompts among them; without that the pipeline's."""
        if not self.stages:
            return None
        rates = [stage.tok_s if stage.rows_s is None else stage.rows_s for stage in self.stages]
        return min(rates)  # its stages see the same tokens one after the other

    @property
    def ms(self) -> float | None:
        """For one token; None: nothing was measured yet."""
        return sum(stage.ms_per_token for stage in self.stages) or None

    @property
    def busy(self) -> float | None:
        return min(1.0, sum(stage.busy for stage in self.stages)) if self.stages else None

    @property
    def wait(self) -> float | None:
        return max(0.0, 1.0 - (self.busy or 0.0)) if self.stages else None

    @property
    def link_ms(self) -> float | None:
        """Round trip to the next stage."""
        known = [stage.link_ms for stage in self.stages if stage.link_ms > 0]
        return max(known) if known else None

    def age_s(self, now: float) -> float:
        return max(0.0, now - self.heard_at)

    def state(self, now: float, *, live: bool = True) -> str:
        """ok | late | lost | left | drained | removed, or the engine's own newer word. live: the engine is heard."""
        told = WORDS.get(self.view.state, self.view.state)
        if told in ("ok", "late") and live:
            age = self.age_s(now)
            if age >= LOST_S:
                return "lost"
            return "late" if age >= LATE_S else told
        return told


@dataclass(frozen=True, slots=True)
class Alert:
    """severity: warning | error."""

    text: str
    severity: str = "warning"


@dataclass(frozen=True, slots=True)
class State:
    """See the module. events: oldest first, numbers rising. missed: events that the engine did not keep for us."""

    link: Linked = field(default_factory=lambda: Linked(LinkState.CONNECTING, 0.0))
    status: StatusView | None = None
    status_at: float = 0.0
    rows: tuple[NodeRow, ...] = ()
    events: tuple[EventView, ...] = ()
    missed: int = 0
    rates: tuple[float, ...] = ()
    sampled_at: float = -1e9

    @property
    def live(self) -> bool:
        return self.link.state is LinkState.UP

    @property
    def serving(self) -> bool:
        return self.live and self.status is not None and self.status.state == "serving"

    @property
    def last_event(self) -> int:
        return self.events[-1].number if self.events else 0

    def row(self, node_id: str) -> NodeRow | None:
        return next((row for row in self.rows if row.id == node_id), None)


def reduce(state: State, update: Update) -> State:
    """The state after an update; those that are none of its business leave it as it is."""
    if isinstance(update, Linked):
        return replace(state, link=update)
    if isinstance(update, StatusSeen):
        return _with_status(state, update)
    if isinstance(update, Happened):
        return _with_events(state, update.batch)
    return state


def _with_status(state: State, seen: StatusSeen) -> State:
    view, at = seen.view, seen.at
    other = state.status is not None and _another_engine(state, view)
    before = {} if other else {row.id: row for row in state.rows}
    chains = view.chains()
    slowest = {bottleneck(chain) for chain in chains}
    rows = [_row(before.get(node.id), node, view, at, slowest) for node in view.nodes]
    if len(chains) > 1:
        rows = [replace(row, several=True) for row in rows]
    here = {row.id for row in rows}
    gone = [_gone(row) for row in before.values() if row.id not in here]
    sample = at - state.sampled_at >= SAMPLE_S
    rates = state.rates if not other else ()
    link = replace(state.link, round_trip_ms=seen.round_trip_ms)
    if at >= state.link.at:  # else it was seen before the link was lost, and has waited
        link = replace(link, state=LinkState.UP)
    return replace(
        state,
        status=view,
        status_at=at,
        rows=(*rows, *gone[-GONE_MAX:]),
        rates=(*rates, view.throughput.tok_s)[-HISTORY:] if sample else rates,
        sampled_at=at if sample else state.sampled_at,
        events=() if other else state.events,
        missed=0 if other else state.missed,
        link=link,
    )


def _another_engine(state: State, view: StatusView) -> bool:
    """An engine that was started anew counts its events from 1: what is kept belongs to the one before."""
    return view.last_event < state.last_event


def _row(old: NodeRow | None, node: NodeView, view: StatusView, at: float, slowest: Collection[str]) -> NodeRow:
    stages = tuple(stage for stage in view.stages if stage.node == node.name)
    copy = next((one.layers for one in view.standbys if one.node == node.name and one.state == "ready"), None)
    # The engine rounds ages: unless it hears from the node again, the moment that is kept is the better one.
    heard_at = at - node.heartbeat_age_s
    if old is not None and not old.gone and abs(heard_at - old.heard_at) < 0.1:
        heard_at = old.heard_at
    row = NodeRow(node, stages, heard_at, copy=copy, bottleneck=bool(stages) and node.name in slowest)
    if old is None:
        return replace(row, rates=(row.tok_s or 0.0,), sampled_at=at)
    sample = at - old.sampled_at >= SAMPLE_S
    return replace(
        row,
        rates=(*old.rates, row.tok_s or 0.0)[-HISTORY:] if sample else old.rates,
        sampled_at=at if sample else old.sampled_at,
        cause="" if node.state == "joined" else old.cause,
    )


def _gone(row: NodeRow) -> NodeRow:
    state = row.view.state if row.view.state in GONE_STATES else "lost"
    if row.cause.startswith("removed"):
        state = "removed"
    return replace(row, gone=True, stages=(), copy=None, bottleneck=False, view=_stated(row.view, state))


def _stated(view: NodeView, state: str) -> NodeView:
    return view if view.state == state else view.model_copy(update={"state": state})


def _with_events(state: State, batch: EventsView) -> State:
    if batch.events and batch.events[-1].number <= state.last_event and batch.events[0].number == 1:
        state = replace(state, events=(), missed=0)  # told from the beginning, by another engine
    new = tuple(event for event in batch.events if event.number > state.last_event)
    causes = {event.node: event.cause for event in new if event.kind in CAUSES and event.node}
    ended = {event.node: event.kind for event in new if event.kind in ("node_left", "node_removed") and event.node}
    rows = tuple(_caused(row, causes, ended) for row in state.rows) if causes else state.rows
    return replace(state, rows=rows, events=(*state.events, *new)[-EVENTS_MAX:], missed=state.missed + batch.missed)


def _caused(row: NodeRow, causes: dict[str, str], ended: dict[str, str]) -> NodeRow:
    cause = causes.get(row.view.name)
    if cause is None:
        return row
    row = replace(row, cause=cause)
    if row.gone and row.view.name in ended:
        row = replace(row, view=_stated(row.view, ended[row.view.name].removeprefix("node_")))
    return row


def bottleneck(view: StatusView) -> str:
    """The node of a pipeline whose stages take longest for a token; empty when there are less than two, or nothing was
    measured."""
    took: dict[str, float] = {}
    for stage in view.stages:
        took[stage.node] = took.get(stage.node, 0.0) + stage.ms_per_token
    if len(took) < 2 or max(took.values()) <= 0:
        return ""
    return max(took, key=lambda node: took[node])


def alerts(state: State, now: float) -> tuple[Alert, ...]:
    """What its owner should look at, the worst first."""
    found: list[Alert] = []
    if state.link.state is LinkState.DOWN:
        found.append(Alert(f"the engine does not answer: {state.link.detail}", "error"))
    status = state.status
    if status is not None and state.live:
        if status.state == "unavailable" and status.reason:
            found.append(Alert(status.reason, "error"))
        for row in state.rows:
            word = row.state(now)
            if word in ("lost", "late") and not row.gone:
                why = f": {row.cause}" if row.cause and word == "lost" else ""
                found.append(Alert(f"{row.view.name} is {word}{why}", "error" if word == "lost" else "warning"))
        found += [Alert(text) for text in status.warnings]
    return tuple(sorted(found, key=lambda alert: alert.severity != "error"))
