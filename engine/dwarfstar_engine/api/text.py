"""From token bytes to text, one token at a time, with stop strings.

Theory. A token may hold a part of a UTF-8 character and a stop string may lie across tokens, so text leaves here only
when nothing that follows can change it. Two things are kept back: the bytes of an unfinished character (by the
incremental decoder; bytes that can never be UTF-8 become U+FFFD, as in Python's ``errors="replace"``), and the longest
end of the text that may yet become a stop string.

Invariants. The pieces handed out, joined, equal ``text[:cut]``, where ``text`` is the decoded whole and ``cut`` the
least ``text.find(stop)`` of all stops found, however the bytes were split. What was handed out is never taken back.
Of two overlapping stops the one that *begins* first wins, so a match waits while an earlier beginning is undecided.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class TextAssembler:
    """Decodes one answer. ``stops`` are non-empty strings, none of which appears in the text handed out.

    decoded: characters decoded so far, those kept back or cut away included.
    emitted: characters handed out so far.
    stopped: a stop string was found; feed nothing more.
    """

    __slots__ = ("_decoder", "_firsts", "_held", "_longest", "_stops", "decoded", "emitted", "stopped")

    def __init__(self, stops: Sequence[str] = ()) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._decoder = _utf8_decoder("replace")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.decoded = 0
        self.emitted = 0
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Take the bytes of one token; return the text that is now final, often empty."""
        assert not self.stopped
        text = self._decoder.decode(data)
        self.decoded += len(text)
        if not self._stops:
            self.emitted += len(text)
            return text
        return self._settle(text, more_may_follow=True)

    def finish(self) -> str:
        """The answer is over: return what was kept back. May set ``stopped``. Does nothing after a stop."""
        if self.stopped:
            return ""
        text = self._decoder.decode(b"", final=True)
        self.decoded += len(text)
        return self._settle(text, more_may_follow=False)

    def _settle(self, text: str, *, more_may_follow: bool) -> str:
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        end = min(found, default=len(text))
        undecided = self._undecided(text, end) if more_may_follow else end
        self.stopped = bool(found) and undecided == end
        self._held = "" if self.stopped else text[undecided:]
        self.emitted += undecided
        return text[:undecided]

    def _undecided(self, text: str, end: int) -> int:
        """The first index before ``end`` from which the text may grow into a stop string; ``end`` if none."""
        for at in range(max(0, len(text) - self._longest + 1), end):
            if text[at] in self._firsts:
                rest = text[at:]
                if any(stop.startswith(rest) for stop in self._stops):
                    return at
        return end
