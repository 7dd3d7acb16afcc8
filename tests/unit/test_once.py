"""Whoever asks, and however often: lines in the log and memory are bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine import once as once_module
from dwarfstar_engine.once import Once


def test_a_source_is_named_once_an_hour() -> None:
    once = Once()
    assert [once.worth("a", now) for now in (0.0, 1.0, once_module.TOLD_S - 1, once_module.TOLD_S)] == [
        True,
        False,
        False,
        True,
    ]


@given(st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 5)), max_size=300))
def test_lines_and_memory_are_bounded_whoever_asks(asking: list[tuple[int, float]]) -> None:
    once, now, lines = Once(), 0.0, list[float]()
    for who, pause in asking:
        now += pause
        if once.worth(str(who), now):
            lines.append(now)
    assert all(
        sum(at <= line < at + once_module.LINES_S / 2 for line in lines) <= 2 * once_module.LINES for at in lines
    )
    assert len(once._told) <= once_module.TOLD


def test_ten_thousand_sources_get_few_lines_and_little_memory() -> None:
    once = Once()
    assert sum(once.worth(str(who), 1.0) for who in range(10_000)) == once_module.LINES
    for minute in range(100):
        for who in range(100):
            once.worth(f"{minute} {who}", once_module.LINES_S * (minute + 2))
    assert len(once._told) == once_module.TOLD


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 30)), max_size=60))
def test_no_source_has_two_lines_within_its_time(calls: list[tuple[str, float]]) -> None:
    told, now, last = Once(told_s=60.0), 60.0, dict[str, float]()
    for source, wait in calls:
        now += wait
        if told.worth(source, now):
            assert now - last.get(source, 0.0) >= 60.0
            last[source] = now
