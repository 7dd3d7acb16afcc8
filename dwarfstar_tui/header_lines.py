"""The two lines at the top of every screen: what runs, how fast, what is wrong; and where one is. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len

from dwarfstar_tui import text
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.store import State, alerts
from dwarfstar_tui.text import Glyphs, fit
from dwarfstar_tui.updates import LinkState

SCREENS = (("cluster", "Cluster"), ("plan", "Plan"), ("chat", "Chat"), ("events", "Events"), ("models", "Models"))
LINK_ROLES = {
    LinkState.UP: "ok", LinkState.DOWN: "lost", LinkState.CONNECTING: "late", LinkState.STARTING: "late",
    LinkState.NONE: "muted",
}  # fmt: skip
SPARK = 12


@dataclass(frozen=True, slots=True)
class Badges:
    """What the person has set that changes what is seen."""

    frozen: bool = False
    readonly: bool = False
    slow: bool = False


def width_of(runs: Runs) -> int:
    return sum(cell_len(part) for part, _ in runs)


def status_line(state: State, badges: Badges, now: float, width: int, glyphs: Glyphs) -> Runs:
    """Left: the program and its model; right: speed, alerts, link. What does not fit goes, the model's name last."""
    left: list[tuple[str, str]] = [(" DwarfStar ", "brand"), (" ", "plain")]
    right = _right(state, badges, now, width, glyphs)
    room = width - width_of(tuple(left)) - width_of(right) - 1
    left.append((fit(_model(state, glyphs, room - 1), max(0, room - 1), ellipsis=glyphs.ellipsis) + " ", "name"))
    return (*left, *right, (" ", "plain"))


def _model(state: State, glyphs: Glyphs, room: int) -> str:
    status = state.status
    if state.link.state is LinkState.NONE or status is None:
        return "" if state.link.state is LinkState.UP else "no engine"
    if status.model is None:
        return status.state
    name = text.clean(status.model.name)
    layers = f"{name} {glyphs.dot} {status.model.layers} layers"
    return layers if cell_len(layers) <= room else name


def _right(state: State, badges: Badges, now: float, width: int, glyphs: Glyphs) -> Runs:
    runs: list[tuple[str, str]] = []
    for word, on in (("FROZEN", badges.frozen), ("READ-ONLY", badges.readonly), ("1 Hz", badges.slow)):
        if on and (width >= 80 or word == "FROZEN"):
            runs += [(f" {word} ", "badge"), ("  ", "plain")]
    status = state.status
    if status is not None and state.link.state is not LinkState.NONE:
        if width >= 100:
            runs += [(text.sparkline(state.rates, SPARK, glyphs.sparks), "spark"), (" ", "plain")]
        runs += [(text.figure(status.throughput.tok_s), "name"), (" tok/s  ", "muted")]
        if width >= 110:
            queued = f", {status.throughput.queued} queued" if status.throughput.queued else ""
            runs.append((f"{status.throughput.active} active{queued}  ", "muted"))
    found = alerts(state, now)
    if found:
        role = "error" if found[0].severity == "error" else "warning"
        words = f" alert{'s' * (len(found) > 1)}" if width >= 80 else ""
        runs.append((f"{glyphs.alert} {len(found)}{words}  ", role))
    runs += _link(state, width, glyphs)
    return tuple(runs)


def _link(state: State, width: int, glyphs: Glyphs) -> Runs:
    link = state.link
    glyph = {LinkState.UP: glyphs.ok, LinkState.DOWN: glyphs.lost}.get(link.state, glyphs.late)
    word = {LinkState.UP: "attached", LinkState.NONE: "not attached"}.get(link.state, link.state.value)
    if link.state is LinkState.UP and state.status is not None and state.status.state != "serving":
        glyph, word = glyphs.late, state.status.state
        return ((f"{glyph} {word}", "late"),)
    if link.state is LinkState.UP and width >= 90 and link.round_trip_ms:
        word += f" {link.round_trip_ms:.0f} ms"
    return ((f"{glyph} {word}", LINK_ROLES[link.state]),)


def tab_line(active: str, width: int, glyphs: Glyphs) -> tuple[Runs, tuple[tuple[int, int, str], ...]]:
    """The screens, the one that is shown reversed; and (begin, end, name) of each for the mouse."""
    runs: list[tuple[str, str]] = [(" ", "plain")]
    places, at = [], 1
    for index, (name, title) in enumerate(SCREENS, 1):
        if name == active:
            runs.append((f" {index} {title} ", "tab"))
        else:
            runs += [(f" {index}", "key"), (f" {title} ", "muted")]
        size = len(title) + 4
        places.append((at, at + size, name))
        runs.append((" ", "plain"))
        at += size + 1
    if at + 22 <= width:
        hint = f"? help  {':'} commands "
        runs += [(" " * (width - at - len(hint)), "plain"), ("?", "key"), (" help  ", "muted"), (":", "key"),
                 (" commands ", "muted")]  # fmt: skip
    return tuple(runs), tuple(places)
