"""Updates on their way from the session's thread to the app's: bounded, and never waited for.

Theory. A terminal that stops reading stops the app's loop, and the session must notice none of it. So the session only
puts; the app takes everything at once when it gets to it. Of statuses only the latest counts. Events are told again by
their numbers, so when there are too many the oldest go, and are counted as missed. Pieces of an answer that follow each
other are put together, so that none is lost however long the terminal stands still. Everything else is news that comes
one at a time, and its bound is out of reach unless the app has died.

The app is woken once for urgent news, and not again until it has taken it; for the rest it looks at its own pace.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from dwarfstar_engine.views import EventsView
from dwarfstar_tui.updates import AnswerPiece, Happened, PullSeen, StatusSeen, Update

EVENTS_MAX = 4000  # twice what the app keeps
NEWS_MAX = 4096  # a person's commands under way give a few dozen


class Mailbox:
    """See the module. All methods may be called from any thread. wake: called when there is something urgent."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._lock = threading.Lock()
        self._wake = wake
        self._status: StatusSeen | None = None
        self._events: deque[Happened] = deque()
        self._held, self._missed = 0, 0
        self._news: deque[Update] = deque(maxlen=NEWS_MAX)
        self._woken = False

    def on_urgent(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def put(self, update: Update) -> None:
        with self._lock:
            if isinstance(update, StatusSeen):
                self._status = update
                return
            if isinstance(update, Happened):
                self._hold(update)
                return
            joined = _joined(self._news[-1], update) if self._news else None
            if joined is None:
                self._news.append(update)
            else:
                self._news[-1] = joined
            wake, self._woken = not self._woken, True
        if wake:
            self._wake()

    def _hold(self, update: Happened) -> None:
        self._events.append(update)
        self._held += len(update.batch.events)
        while self._held > EVENTS_MAX:
            oldest = self._events.popleft().batch
            self._held -= len(oldest.events)
            self._missed += len(oldest.events) + oldest.missed

    def take(self) -> list[Update]:
        """All there is: news first, as a link that is lost comes before what was seen on the next one."""
        with self._lock:
            taken: list[Update] = list(self._news)
            if self._missed and self._events:
                first = self._events[0]
                taken.append(replace(first, batch=EventsView(events=(), missed=self._missed)))
            taken += self._events
            if self._status is not None:
                taken.append(self._status)
            self._news.clear()
            self._events.clear()
            self._status, self._held, self._missed, self._woken = None, 0, 0, False
            return taken


def _joined(last: Update, update: Update) -> Update | None:
    """Both as one, where that tells the same."""
    match last, update:
        case AnswerPiece(), AnswerPiece() if last.answer == update.answer:
            return replace(last, text=last.text + update.text, tokens=last.tokens + update.tokens, at=update.at)
        case PullSeen(wanted, over=False), PullSeen() if wanted == update.wanted:
            return update
    return None
