"""What waits for the app is bounded, and nothing that matters is lost."""

from __future__ import annotations

from dwarfstar_engine.views import EventsView, EventView
from dwarfstar_tui.mailbox import EVENTS_MAX, NEWS_MAX, Mailbox
from dwarfstar_tui.updates import AnswerOver, AnswerPiece, Happened, Notice, PullSeen, StatusSeen
from support.tui_cluster import NOW, home_lab


def batch(first: int, count: int = 8) -> Happened:
    events = tuple(
        EventView(number=number, time_s=0, kind="plan_made", node="", cause="", details={})
        for number in range(first, first + count)
    )
    return Happened(EventsView(events=events), NOW)


def test_only_the_last_status_is_kept() -> None:
    box = Mailbox()
    for second in range(1000):
        box.put(StatusSeen(home_lab(), NOW + second, 1.0))
    assert [update.at for update in box.take() if isinstance(update, StatusSeen)] == [NOW + 999]
    assert box.take() == []


def test_a_flood_of_events_keeps_the_newest_and_counts_the_rest() -> None:
    box = Mailbox()
    total = 3 * EVENTS_MAX
    for first in range(1, total, 8):
        box.put(batch(first))
    told = [update.batch for update in box.take() if isinstance(update, Happened)]
    kept = [event.number for one in told for event in one.events]
    assert kept == list(range(total - EVENTS_MAX + 1, total + 1))
    assert sum(one.missed for one in told) + len(kept) == total


def test_it_wakes_once_until_it_is_emptied_and_only_for_news() -> None:
    woken: list[int] = []
    box = Mailbox(lambda: woken.append(1))
    box.put(StatusSeen(home_lab(), NOW, 1.0))
    box.put(batch(1))
    assert woken == []
    box.put(Notice("a"))
    box.put(Notice("b"))
    assert woken == [1]
    assert [update.text for update in box.take() if isinstance(update, Notice)] == ["a", "b"]
    box.put(Notice("c"))
    assert woken == [1, 1]


def test_of_an_answer_no_piece_is_lost_however_many_wait() -> None:
    box, count = Mailbox(), 2 * NEWS_MAX
    box.put(Notice("before"))
    for index in range(count):
        box.put(AnswerPiece(1, f"{index} ", 1, index, index + 0.5))
    box.put(AnswerPiece(2, "another", 1, count, count))
    box.put(AnswerOver(1, count, "stop"))
    before, first, other, over = box.take()
    assert isinstance(before, Notice) and isinstance(over, AnswerOver)
    assert first == AnswerPiece(1, "".join(f"{index} " for index in range(count)), count, 0, count - 0.5)
    assert other == AnswerPiece(2, "another", 1, count, count)


def test_of_a_download_the_latest_is_told_and_its_end_stays() -> None:
    box = Mailbox()
    for line in ("1 %", "2 %"):
        box.put(PullSeen("a/b", line))
    box.put(PullSeen("a/b", "pulled", over=True))
    box.put(PullSeen("a/b", "again"))
    assert box.take() == [PullSeen("a/b", "pulled", over=True), PullSeen("a/b", "again")]
