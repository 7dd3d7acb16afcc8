"""Drawing lines: what differs is drawn again, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.app import App, ComposeResult
from textual.geometry import Region

from dwarfstar_tui import themes
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.widgets.runs_view import ROLES, RunsView, differ_until, merged

RUNS = st.lists(st.tuples(st.text(alphabet="ab 機", max_size=4), st.sampled_from(sorted(ROLES))), max_size=6).map(tuple)


def cells(runs: Runs) -> list[tuple[str, str]]:
    return [(char, role) for text, role in runs for char in text for _ in range(cell_len(char))]


@given(RUNS, RUNS)
def test_behind_the_last_difference_lines_are_equal(before: Runs, now: Runs) -> None:
    end = differ_until(before, now)
    assert cells(before)[end:] == cells(now)[end:]
    assert differ_until(now, now) == 0


@given(RUNS)
def test_merging_changes_no_letter_and_no_colour_of_one(runs: Runs) -> None:
    styles = {role: Style(color=f"color({index})") for index, role in enumerate(ROLES)}
    segments = [Segment(text, styles[role]) for text, role in runs]
    after = merged(segments)
    assert "".join(part.text for part in after) == "".join(part.text for part in segments)
    seen = [(char, part.style) for part in segments for char in part.text if char != " "]
    assert [(char, part.style) for part in after for char in part.text if char != " "] == seen
    assert len(after) <= len(segments)


def test_a_reversed_space_is_no_gap() -> None:
    plain, tab = Style(color="red"), Style(color="red", reverse=True)
    assert merged([Segment("a", plain), Segment(" ", tab)]) == [Segment("a", plain), Segment(" ", tab)]


class Bare(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.view = RunsView()

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return themes.role_defaults(self.current_theme)

    def compose(self) -> ComposeResult:
        yield self.view


async def test_only_lines_that_differ_and_are_seen_are_drawn() -> None:
    app = Bare()
    async with app.run_test(size=(20, 10)) as pilot:
        lines: list[Runs] = [((f"line {index:3}", "plain"), ("!", "ok")) for index in range(100)]
        app.view.set_lines(lines)
        await pilot.pause()
        drawn: list[Region] = []
        refresh = app.view.refresh

        def note(*regions: Region, **_: object) -> RunsView:
            drawn.extend(regions)
            return refresh(*regions)

        app.view.refresh = note  # type: ignore[method-assign]
        app.view.set_lines(lines)
        assert drawn == []
        lines[3] = (("line  x3", "plain"), ("!", "ok"))
        lines[50] = (("unseen", "plain"),)
        app.view.set_lines(lines)
        assert drawn == [Region(0, 3, 8, 1)]
