"""Figures and names as text of an exact width. Pure.

Widths are in terminal cells, not characters: a name may hold wide or combining ones, and a column that is one cell off
makes a table unreadable. What comes from other machines is cleaned of control characters here, before it is drawn.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

UNKNOWN = "–"
SPARKS = "▁▂▃▄▅▆▇█"
ASCII_SPARKS = "_.-=+*#@"
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400
GIB = 1 << 30
LEAST_GIB = 0.005  # is shown as 0.01


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What stands for states and parts of bars. Each has one cell, and no two of a bar are alike without colour."""

    ok: str = "●"
    late: str = "◐"
    lost: str = "○"
    left: str = "◌"
    drained: str = "◇"
    used: str = "█"
    planned: str = "▓"
    compute: str = "▒"
    lent: str = "░"
    rest: str = "·"
    sparks: str = SPARKS
    bottleneck: str = "▲"
    alert: str = "▲"
    bar: str = "│"
    held: str = "┃"
    less: str = "◂"
    more: str = "▸"
    pin: str = "◆"
    arrow: str = "→"
    about: str = "≈"
    cursor: str = "▌"
    mark: str = "✓"
    unknown: str = UNKNOWN
    ellipsis: str = "…"
    dash: str = "–"
    dot: str = "·"


FANCY = Glyphs()
ASCII = Glyphs(
    ok="*", late="~", lost="x", left="-", drained="o", used="#", planned="=", compute="+", lent="-", rest=".",
    sparks=ASCII_SPARKS, bottleneck="^", alert="!", bar="|", held="I", less="<", more=">", pin="P", arrow="->",
    about="~", cursor=">", mark="x", unknown="-", ellipsis="~", dash="-", dot="|",
)  # fmt: skip
_SPELLED = str.maketrans({"–": "-", "—": "-", "…": "...", "·": "|", "→": "->", "×": "x", "’": "'", "°": "", "≥": ">="})


def spelled(text: str, *, ascii_only: bool) -> str:
    """``text``, in ASCII where that is asked for."""
    return text.translate(_SPELLED).encode("ascii", "replace").decode() if ascii_only else text


def clean(text: str) -> str:
    """Without control characters: what a machine calls itself must not move the cursor."""
    return "".join(" " if char in "\t\n\r" else char for char in text if char in "\t\n\r" or _printable(char))


def _printable(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn")


def fit(text: str, width: int, *, right: bool = False, ellipsis: str = "…") -> str:
    """``text`` in exactly ``width`` cells; what is too long ends in an ellipsis."""
    if width <= 0:
        return ""
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + ellipsis
    padding = " " * (width - length)
    return padding + text if right else text + padding


def wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` cells, broken at spaces where there are any."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if cell_len(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            while cell_len(word) > width > 0:
                head = set_cell_size(word, width).rstrip()
                lines.append(head)
                word = word[len(head) :]
            line = word
        lines.append(line)
    return lines


def age(seconds: float) -> str:
    """How long ago, in at most four cells."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if seconds < 2 * MINUTE_S:
        return f"{seconds:.0f}s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / MINUTE_S:.0f}m"
    if seconds < 2 * DAY_S:
        return f"{seconds / HOUR_S:.0f}h"
    return f"{min(999, seconds / DAY_S):.0f}d"


def figure(value: float | None, digits: int = 1, unknown: str = UNKNOWN) -> str:
    """A number, with fewer digits when it is large; unknown ones as a dash."""
    if value is None:
        return unknown
    if abs(value) >= 100:
        digits = 0
    elif abs(value) >= 10:
        digits = min(digits, 1)
    return f"{value:.{digits}f}"


def share(value: float | None, unknown: str = UNKNOWN) -> str:
    return unknown if value is None else f"{min(9.99, max(0.0, value)):.0%}"


def gib(value: float | None, unknown: str = UNKNOWN) -> str:
    """GiB with one digit, two below ten; what would be nothing then is said to be less than the least."""
    return "<0.01" if value is not None and 0 < value < LEAST_GIB else figure(value, 2, unknown)


def size(size_bytes: int) -> str:
    """Of a file, GiB."""
    return gib(size_bytes / GIB)


def override(given: str) -> str:
    """What an owner has set, with no more digits than say something: 18, 50%, -2."""
    try:
        return f"{float(given):.3g}"
    except ValueError:
        return clean(given)


def layers(begin: int, end: int, dash: str = "–") -> str:
    """A half open range as people count it: the first and the last layer."""
    return f"{begin}{dash}{end - 1}"


def sparkline(values: Sequence[float], width: int, sparks: str = SPARKS) -> str:
    """The last ``width`` values, each one cell high in proportion to the largest shown; nothing is a space."""
    shown = values[-width:] if width > 0 else ()
    top = max(shown, default=0.0)
    if top <= 0:
        return " " * max(0, width - len(shown)) + sparks[0] * len(shown)
    steps = len(sparks) - 1
    return " " * (width - len(shown)) + "".join(sparks[round(max(0.0, value) / top * steps)] for value in shown)


def parts(amounts: Sequence[float], width: int) -> list[int]:
    """Whole cells for amounts that follow each other from 0; their sum is ``width`` scaled by their sum, at most it.

    ``amounts`` are shares of the whole bar. Boundaries are rounded rather than parts, so a bar never wobbles.
    """
    cells, done, total = [], 0, 0.0
    for amount in amounts:
        total = min(1.0, total + max(0.0, amount))
        edge = round(total * width)
        cells.append(edge - done)
        done = edge
    return cells


def matches(wanted: str, *texts: str) -> bool:
    """Whether every word is in one of the texts, whatever its case."""
    whole = " ".join(texts).casefold()
    return all(word in whole for word in wanted.casefold().split())
