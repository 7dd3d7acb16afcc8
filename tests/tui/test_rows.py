"""The table of machines and the lines around it: widths, words, and what stands where."""

from __future__ import annotations

from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dwarfstar_tui import text
from dwarfstar_tui.cluster_rows import (
    Moment,
    Runs,
    columns,
    detail_lines,
    heading,
    memory_shares,
    row_runs,
    second_runs,
)
from dwarfstar_tui.event_lines import event_line, role_of
from dwarfstar_tui.header_lines import Badges, status_line, tab_line, width_of
from dwarfstar_tui.plan_lines import bar_lines, table_lines, titled
from dwarfstar_tui.store import NodeRow, State, reduce
from dwarfstar_tui.updates import Linked, LinkState, StatusSeen
from support.tui_cluster import NOW, history, home_lab, node, story

WIDTHS = st.integers(58, 220)


def shown(runs: Runs) -> str:
    return "".join(part for part, _ in runs)


def state() -> State:
    found = State()
    for update in history(home_lab()):
        found = reduce(found, update)
    return found


STATE = state()


@given(WIDTHS, st.sampled_from(STATE.rows), st.floats(0, 1e4), st.sampled_from([text.FANCY, text.ASCII]))
def test_each_row_and_the_heading_fill_the_width(width: int, row: NodeRow, later: float, glyphs: text.Glyphs) -> None:
    found = columns(width)
    assert cell_len(heading(found, glyphs)) == width
    assert width_of(row_runs(row, found, Moment(NOW + later, glyphs=glyphs))) == width
    assert width_of(second_runs(row, width, Moment(NOW + later, glyphs=glyphs))) == width


@given(st.text(min_size=1, max_size=60), WIDTHS)
def test_no_name_moves_a_column(name: str, width: int) -> None:
    row = NodeRow(node("x", "cpu", 8, 2, 6).model_copy(update={"name": name}), (), NOW)
    runs = row_runs(row, columns(width), Moment(NOW))
    assert width_of(runs) == width
    assert not any(char in shown(runs) for char in "\n\r\t\x1b")


def test_a_state_is_a_word_and_a_mark_of_its_own() -> None:
    row = NodeRow(node("x", "cpu", 8, 2, 6), (), NOW)
    seen = set()
    for name in ("joined", "late", "lost", "left", "drained"):
        view = row.view.model_copy(update={"state": name})
        runs = row_runs(NodeRow(view, (), NOW), columns(80), Moment(NOW))
        word = shown(runs)[:9].split()
        assert word[1] == {"joined": "ok"}.get(name, name)
        seen.add(word[0])
    assert len(seen) == 5


def test_ascii_rows_are_ascii() -> None:
    moment = Moment(NOW, glyphs=text.ASCII)
    for row in STATE.rows:
        assert shown(row_runs(row, columns(200), moment)).isascii()
        assert all(shown(line).isascii() for line in detail_lines(row, moment, 40))


def test_what_is_gone_is_dimmed_but_for_its_state() -> None:
    lost = next(row for row in STATE.rows if row.gone)
    roles = {role for _, role in row_runs(lost, columns(120), Moment(NOW)) if role != "plain"}
    assert roles <= {"gone", "lost"}


@pytest.mark.parametrize(
    ("used", "lent", "shares"),
    [(4.0, 6.0, (0.5, 0.0, 0.25)), (7.0, 6.0, (0.875, 0.0, 0.0)), (99.0, 99.0, (1.0, 0.0, 0.0))],
)
def test_the_memory_bar_never_leaves_the_memory(used: float, lent: float, shares: tuple[float, ...]) -> None:
    assert memory_shares(NodeRow(node("x", "cpu", 8, used, lent), (), NOW)) == shares


def test_the_bottleneck_is_marked_once() -> None:
    marks = [row for row in STATE.rows if "▲" in shown(row_runs(row, columns(120), Moment(NOW)))]
    assert [row.view.name for row in marks] == ["garage-box"]


@given(WIDTHS)
def test_the_plan_bar_fills_its_width(width: int) -> None:
    assert STATE.status is not None
    lines = bar_lines(STATE.status, STATE.rows, width, text.FANCY)
    assert [width_of(line) for line in lines] == [width] * 3
    assert len({width_of(line) for line in table_lines(STATE.status, STATE.rows, width, text.FANCY)}) == 1


@given(WIDTHS)
def test_each_pipeline_has_a_bar_under_its_number(width: int) -> None:
    lab = home_lab()
    other = tuple(one.model_copy(update={"pipeline": 1}) for one in lab.stages)
    both = lab.model_copy(update={"stages": (*other, *lab.stages)})
    lines = titled(both, lambda chain: bar_lines(chain, STATE.rows, width, text.FANCY))
    one = bar_lines(lab, STATE.rows, width, text.FANCY)
    assert lines == [(("pipeline 0", "heading"),), *one, (("pipeline 1", "heading"),), *one]
    assert titled(lab, lambda chain: bar_lines(chain, STATE.rows, width, text.FANCY)) == one


@given(st.integers(50, 220), st.sampled_from(list(LinkState)), st.booleans())
def test_the_header_fits(width: int, link: LinkState, frozen: bool) -> None:
    found = reduce(STATE, Linked(link, NOW, "detail"))
    assert width_of(status_line(found, Badges(frozen=frozen), NOW, width, text.FANCY)) <= max(width, 56)


def test_the_header_says_when_nothing_is_attached() -> None:
    line = shown(status_line(reduce(STATE, Linked(LinkState.NONE, NOW)), Badges(), NOW, 100, text.FANCY))
    assert "no engine" in line
    assert "tok/s" not in line


def test_the_places_of_the_tabs_are_where_they_are_drawn() -> None:
    runs, places = tab_line("chat", 100, text.FANCY)
    line = shown(runs)
    assert [line[begin:end].split()[1].lower() for begin, end, _ in places] == [name for _, _, name in places]


@given(WIDTHS)
def test_event_lines_fit_and_marks_differ_with_meaning(width: int) -> None:
    for event in story().events:
        assert width_of(event_line(event, width, UTC, text.FANCY)) == width
    assert role_of("node_lost") != role_of("node_late") != role_of("node_joined")


def test_a_loading_stage_is_said_to_load() -> None:
    view = home_lab()
    loading = view.model_copy(
        update={"stages": tuple(one.model_copy(update={"state": "loading"}) for one in view.stages)}
    )
    row = reduce(State(), StatusSeen(loading, NOW, 1.0)).rows[0]
    assert "loading" in shown(row_runs(row, columns(80), Moment(NOW)))
