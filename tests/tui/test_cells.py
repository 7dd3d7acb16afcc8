"""Widths, ages, bars: what columns are made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dwarfstar_tui import text

NAMES = st.text(max_size=30) | st.sampled_from(["機械-一号", "[red]box[/]", "naïve", "a\x1b[31mb", "🖥️ desk"])


@given(NAMES, st.integers(0, 40), st.booleans())
def test_what_is_fitted_has_exactly_the_width(name: str, width: int, right: bool) -> None:
    assert cell_len(text.fit(text.clean(name), width, right=right)) == width


@given(NAMES)
def test_a_cleaned_name_moves_no_cursor(name: str) -> None:
    assert all(ord(char) >= 32 and not 127 <= ord(char) < 160 for char in text.clean(name))


@given(st.text(alphabet="abc 機", max_size=200), st.integers(4, 30))
def test_wrapped_lines_fit_and_lose_nothing_but_spaces(words: str, width: int) -> None:
    lines = text.wrapped(words, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0.0s"), (0.44, "0.4s"), (9.96, "10s"), (119, "119s"), (120, "2m"), (7300, "2h"), (9e9, "999d")],
)
def test_ages_are_short(seconds: float, shown: str) -> None:
    assert text.age(seconds) == shown
    assert len(shown) <= 4


@given(st.lists(st.floats(0, 1), max_size=5), st.integers(0, 60))
def test_parts_of_a_bar_are_whole_and_within_it(shares: list[float], width: int) -> None:
    cells = text.parts(shares, width)
    assert all(count >= 0 for count in cells)
    assert sum(cells) == round(min(1.0, sum(shares)) * width) or sum(shares) > 1


@given(st.lists(st.floats(0, 1e4), max_size=90), st.integers(0, 60))
def test_a_sparkline_has_its_width_and_its_peak(values: list[float], width: int) -> None:
    line = text.sparkline(values, width)
    assert len(line) == width
    shown = values[-width:] if width else []
    if any(value > 0 for value in shown):
        assert text.SPARKS[-1] in line


def test_ascii_glyphs_are_ascii_and_differ() -> None:
    glyphs = [getattr(text.ASCII, name) for name in ("used", "planned", "lent", "rest")]
    assert len(set(glyphs)) == 4
    assert all(glyph.isascii() for glyph in glyphs)
    assert text.spelled("a → b … 71 °C", ascii_only=True).isascii()


@pytest.mark.parametrize(
    ("said", "shown"), [("5.6524", "5.65"), ("18", "18"), ("-2", "-2"), ("50%", "50%"), ("a\x1bb", "ab")]
)
def test_overrides_have_no_more_digits_than_say_something(said: str, shown: str) -> None:
    assert text.override(said) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0, "0.00"), (0.001, "<0.01"), (0.006, "0.01"), (31.94, "31.9")]
)
def test_gib_are_never_nothing_for_something(value: float | None, shown: str) -> None:
    assert text.gib(value) == shown


def test_a_file_has_its_size_in_gib() -> None:
    assert text.size(17 * (1 << 30)) == "17.0"
