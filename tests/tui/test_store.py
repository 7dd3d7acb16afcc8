"""The reduce of updates to what is shown."""

from __future__ import annotations

import pytest

from dwarfstar_engine.views import EventsView, EventView
from dwarfstar_tui.store import EVENTS_MAX, GONE_MAX, HISTORY, State, alerts, bottleneck, reduce
from dwarfstar_tui.updates import Happened, Linked, LinkState, StatusSeen, Update
from support.tui_cluster import NOW, home_lab, node, stage, status


def after(*told: Update, state: State | None = None) -> State:
    state = state or State()
    for update in told:
        state = reduce(state, update)
    return state


def event(number: int, kind: str = "plan_made", name: str = "", cause: str = "because") -> EventView:
    return EventView(number=number, time_s=0.0, kind=kind, node=name, cause=cause, details={})


def happened(*events: EventView, missed: int = 0) -> Happened:
    return Happened(EventsView(events=events, missed=missed), NOW)


def one(age: float = 0.3, **more: object) -> StatusSeen:
    return StatusSeen(status([node("a", "cpu", 8, 2, 6, heartbeat_age_s=age, **more)], []), NOW, 1.0)


def test_ages_run_on_between_updates_and_states_follow() -> None:
    row = after(one(0.3)).rows[0]
    assert row.age_s(NOW + 1.0) == pytest.approx(1.3)
    assert [row.state(NOW + later) for later in (0, 2.1, 2.3, 4.6, 4.8)] == ["ok", "ok", "late", "late", "lost"]


def test_without_the_engine_nobody_is_said_to_be_lost() -> None:
    row = after(one(0.3)).rows[0]
    assert row.state(NOW + 60, live=False) == "ok"
    assert row.age_s(NOW + 60) > 60


def test_a_rounded_age_does_not_make_the_heartbeat_jump() -> None:
    first = after(one(0.30))
    again = reduce(first, StatusSeen(status([node("a", "cpu", 8, 2, 6, heartbeat_age_s=0.53)], []), NOW + 0.25, 1.0))
    assert again.rows[0].heard_at == first.rows[0].heard_at
    heard = reduce(again, StatusSeen(status([node("a", "cpu", 8, 2, 6, heartbeat_age_s=0.1)], []), NOW + 1, 1.0))
    assert heard.rows[0].heard_at == NOW + 1 - 0.1


def test_a_node_the_engine_forgets_stays_with_its_cause_and_when_it_was_seen() -> None:
    state = after(one(), happened(event(1, "node_lost", "a", "its cable was pulled")))
    state = after(StatusSeen(status([], []), NOW + 10, 1.0), state=state)
    row = state.rows[0]
    assert (row.gone, row.state(NOW + 10), row.cause) == (True, "lost", "its cable was pulled")
    assert row.age_s(NOW + 10) == pytest.approx(10.3)


def test_a_removed_node_is_not_called_lost() -> None:
    state = after(one(), happened(event(1, "node_removed", "a", "removed by its owner")))
    state = after(StatusSeen(status([], []), NOW + 1, 1.0), state=state)
    assert state.rows[0].state(NOW + 1) == "removed"


def test_the_event_that_comes_after_the_node_is_gone_names_its_end() -> None:
    left = event(1, "node_left", "a", "it was closed")
    state = after(one(), StatusSeen(status([], []), NOW + 1, 1.0), happened(left))
    assert (state.rows[0].state(NOW + 1), state.rows[0].cause) == ("left", "it was closed")


def test_a_node_that_comes_back_is_itself_again() -> None:
    state = after(one(), happened(event(1, "node_lost", "a")), StatusSeen(status([], []), NOW + 1, 1.0))
    state = reduce(state, StatusSeen(status([node("a", "cpu", 8, 2, 6)], []), NOW + 2, 1.0))
    assert [(row.gone, row.cause, row.state(NOW + 2)) for row in state.rows] == [(False, "", "ok")]


def test_history_is_a_sample_a_second_and_bounded() -> None:
    state = State()
    for tick in range(4 * (HISTORY + 10)):
        state = reduce(state, StatusSeen(home_lab(), NOW + tick / 4, 1.0))
        if tick == 8:
            assert len(state.rates) == 3
    assert len(state.rates) == len(state.rows[0].rates) == HISTORY


def test_events_are_kept_once_in_order_and_bounded() -> None:
    state = after(happened(event(1), event(2)), happened(event(2), event(3)))
    assert [one.number for one in state.events] == [1, 2, 3]
    many = tuple(event(number) for number in range(4, EVENTS_MAX + 50))
    state = after(happened(*many, missed=7), state=state)
    assert (len(state.events), state.missed, state.last_event) == (EVENTS_MAX, 7, EVENTS_MAX + 49)


def test_another_engine_begins_anew() -> None:
    state = after(one(), happened(event(50)))
    state = reduce(state, StatusSeen(status([node("b", "cpu", 8, 2, 6)], [], last_event=3), NOW + 9, 1.0))
    assert ([row.view.name for row in state.rows], state.events) == (["b"], ())


def test_a_status_that_has_waited_does_not_hide_that_the_link_is_lost() -> None:
    down = after(one(), Linked(LinkState.DOWN, NOW + 5, "no answer"), one())
    assert down.link.state is LinkState.DOWN
    up = reduce(down, StatusSeen(home_lab(), NOW + 6, 1.0))
    assert up.link.state is LinkState.UP


def test_the_gone_are_bounded() -> None:
    crowd = [node(f"n{index}", "cpu", 8, 2, 6) for index in range(GONE_MAX + 20)]
    state = after(StatusSeen(status(crowd, []), NOW, 1.0), StatusSeen(status([], []), NOW + 1, 1.0))
    assert len(state.rows) == GONE_MAX


def test_the_bottleneck_is_the_slowest_machine_not_the_slowest_stage() -> None:
    stages = [stage("a", (0, 4), 3.0), stage("b", (4, 6), 4.0), stage("a", (6, 9), 3.0)]
    assert bottleneck(status([], stages)) == "a"
    assert bottleneck(status([], stages[:1])) == ""


def test_each_pipeline_has_a_bottleneck_of_its_own() -> None:
    stages = [stage("a", (0, 4), 3.0), stage("b", (4, 9), 4.0), stage("c", (0, 9), 9.0, pipeline=1)]
    nodes = [node(name, "cpu", 8, 2, 6) for name in "abc"]
    rows = after(StatusSeen(status(nodes, stages), NOW, 1.0)).rows
    assert [(row.view.name, row.bottleneck, row.several) for row in rows] == [
        ("a", False, True), ("b", True, True), ("c", False, True),
    ]  # fmt: skip


def test_alerts_begin_with_the_worst() -> None:
    state = after(StatusSeen(home_lab().model_copy(update={"warnings": ("the certificate ends soon",)}), NOW, 1.0))
    found = alerts(state, NOW + 4.0)
    assert [alert.severity for alert in found[:1]] == ["error"]
    assert any("certificate" in alert.text for alert in found)
    down = reduce(state, Linked(LinkState.DOWN, NOW, "no answer"))
    assert [alert.text for alert in alerts(down, NOW)] == ["the engine does not answer: no answer"]
