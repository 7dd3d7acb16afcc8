"""What is computed again after a loss: as little as what was kept allows, in an order that no frame overtakes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.batch.restore import (
    NO_CELLS,
    RESENT_ROWS,
    RESENT_STEPS,
    Cells,
    Kept,
    Part,
    Restore,
    Run,
    kept,
    missing,
)

ROWS = 100
WHOLE = Cells(ROWS, 0, ROWS)
AHEAD = Cells(ROWS + 30, 0, ROWS + 30)
UNRECORDED = Cells(ROWS, 0, 0)
CELLS = st.builds(Cells, st.integers(0, 150), st.integers(0, 150), st.integers(0, 150))


def test_what_is_held_is_not_computed_again() -> None:
    assert missing(ROWS, [WHOLE, AHEAD, WHOLE]) == ()
    assert missing(ROWS, [NO_CELLS, AHEAD, WHOLE]) == ((0, 1),)
    assert missing(ROWS, [WHOLE, NO_CELLS, AHEAD, NO_CELLS]) == ((1, 2), (3, 4))
    assert missing(ROWS, [WHOLE, NO_CELLS, NO_CELLS, WHOLE]) == ((1, 3),)


def test_inputs_that_are_not_known_are_computed_from_those_that_are() -> None:
    assert missing(ROWS, [WHOLE, UNRECORDED, NO_CELLS]) == ((1, 3),)
    assert missing(ROWS, [UNRECORDED, UNRECORDED, NO_CELLS]) == ((0, 3),)
    assert missing(ROWS, [UNRECORDED, WHOLE, NO_CELLS]) == ((2, 3),)
    short = Cells(ROWS, 0, ROWS - 1)
    assert missing(ROWS, [WHOLE, short, NO_CELLS, WHOLE]) == ((1, 3),)


def test_a_slot_that_cannot_be_cut_is_computed_again() -> None:
    assert missing(ROWS, [WHOLE, Cells(ROWS + 1, ROWS + 1, ROWS + 1)]) == ((1, 2),)
    assert missing(ROWS, [WHOLE, Cells(ROWS + 1, ROWS, ROWS + 1)]) == ()
    assert missing(ROWS, [WHOLE, Cells(ROWS, ROWS + 9)]) == (), "it is where it is to be"


def test_nothing_is_kept_of_a_sequence_that_goes_through_all_stages_again() -> None:
    assert kept(3, ROWS, [NO_CELLS, UNRECORDED, WHOLE]) == Kept(3, ROWS, ((0, 1),))
    assert kept(3, ROWS, [NO_CELLS, NO_CELLS]) is None
    assert kept(3, ROWS, [Cells(ROWS, 7, 0), Cells(ROWS, 90, 0)]) == Kept(3, ROWS, (), 90)


@given(st.integers(1, 150), st.lists(CELLS, min_size=1, max_size=8))
def test_every_stage_ends_with_its_rows_and_runs_have_inputs(rows: int, stages: list[Cells]) -> None:
    runs = missing(rows, stages)
    again = {stage for begin, end in runs for stage in range(begin, end)}
    assert all(cells.reach(rows) or stage in again for stage, cells in enumerate(stages))
    assert all(begin == 0 or stages[begin - 1].recorded >= rows for begin, _ in runs)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(runs))
    for begin, end in runs:  # and none is longer than it must be
        assert not stages[end - 1].reach(rows)
        for stage in range(begin, end - 1):
            assert not stages[stage].reach(rows) or stages[stage].recorded < rows


def waves(restore: Restore) -> list[list[Part]]:
    found: list[list[Part]] = []
    while not restore.over:
        found.append([])
        while (part := restore.next) is not None:
            restore.sent()
            found[-1].append(part)
        for _ in found[-1]:
            assert restore.next is None, "steps would overtake what is on its way"
            restore.answered()
    return found


def test_a_link_that_broke_asks_for_one_frame_without_rows() -> None:
    assert waves(Restore((), 40, 60, 16)) == [[Part(False, first=True)]]


def test_rows_come_as_they_came() -> None:
    prompt, steps = waves(Restore(((0, 2),), 200, 213, 64))
    assert [(part.start, part.rows) for part in prompt] == [(0, 80), (80, 120)]
    assert [(part.start, part.rows) for part in steps] == [(200, 8), (208, 5)]
    assert all(part.prompt and part.stages == 2 for part in prompt) and not any(part.prompt for part in steps)
    assert [part.first for part in [*prompt, *steps]] == [True, *[False] * 3]


def test_records_are_asked_for_in_bounded_pieces() -> None:
    rows, end = RESENT_ROWS + 5, RESENT_ROWS + 5 + RESENT_STEPS + 9
    prompt, steps = waves(Restore(((1, 2), (3, 5)), rows, end, 64))
    assert [part.resends for part in prompt] == [
        ((0, RESENT_ROWS, 0, 2), (0, RESENT_ROWS, 2, 5)),
        ((RESENT_ROWS, rows, 0, 2), (RESENT_ROWS, rows, 2, 5)),
    ]
    middle = rows + RESENT_STEPS
    assert [part.resends for part in steps] == [
        ((rows, middle, 0, 2), (rows, middle, 2, 5)),
        ((middle, end, 0, 2), (middle, end, 2, 5)),
    ]
    assert not any(part.rows for part in [*prompt, *steps])


@given(st.lists(st.sampled_from([(0, 1), (2, 4), (5, 6)]), unique=True), st.integers(1, 600), st.integers(0, 99))
def test_all_rows_come_once(runs: list[Run], prompt: int, answer: int) -> None:
    parts = [part for wave in waves(Restore(sorted(runs), prompt, prompt + answer, 64)) for part in wave]
    sent = [at for part in parts for at in range(part.start, part.start + part.rows)]
    assert sent == (list(range(prompt + answer)) if (0, 1) in runs else [])
    for begin, end in runs:
        asked = [resend for part in parts for resend in part.resends if resend[2:] == (begin - 1, end)]
        rows = [at for first, last, *_ in asked for at in range(first, last)]
        assert rows == (list(range(prompt + answer)) if begin else [])
    assert sum(part.first for part in parts) == 1 and parts[0].first
