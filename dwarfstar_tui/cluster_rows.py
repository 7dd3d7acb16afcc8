"""The table of machines as runs of text with a role each: which columns fit a width, and what is in them. Pure.

A role is a word such as ``ok`` or ``muted``; the widget knows the theme's colour for it. Each column has a fixed width,
but the name takes what is left, so figures stand under each other and never move. Columns that do not fit are left out
from the least important on; the details pane has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dwarfstar_engine.views import StageView
from dwarfstar_tui import text
from dwarfstar_tui.store import NodeRow
from dwarfstar_tui.text import Glyphs, fit

Run = tuple[str, str]  # text, role
Runs = tuple[Run, ...]

MIN_NAME, MAX_NAME = 10, 28
HOT_C, WARM_C = 85.0, 75.0
FULL, FILLING = 0.95, 0.85  # share of memory in use
STATE_ROLES = {"ok": "ok", "late": "late", "lost": "lost", "left": "gone", "removed": "gone", "drained": "drained"}


@dataclass(frozen=True, slots=True)
class Moment:
    """What a row depends on beside the machine. live: the engine is heard; selected, marked: by the person."""

    now: float
    live: bool = True
    glyphs: Glyphs = text.FANCY


@dataclass(frozen=True, slots=True)
class Column:
    """need: columns the table must have for it to be there; 0: always."""

    key: str
    title: str
    width: int
    need: int
    right: bool = True


COLUMNS = (
    Column("state", "state", 9, 0, right=False),
    Column("name", "machine", 0, 0, right=False),
    Column("beat", "beat", 5, 0),
    Column("memory", "memory", 10, 0, right=False),
    Column("gib", "GiB", 11, 76),
    Column("layers", "layers", 7, 0),
    Column("ms", "ms/tok", 6, 0),
    Column("rate", "tok/s", 6, 66),
    Column("busy", "busy", 5, 106),
    Column("wait", "wait", 5, 112),
    Column("load", "load", 5, 120),
    Column("temp", "°C", 4, 126),
    Column("power", "W", 5, 132),
    Column("link", "link ms", 7, 142),
    Column("spark", "last minute", 16, 100, right=False),
)
WIDER_MEMORY = ((150, 24), (112, 18), (84, 14), (76, 12))  # (width of the table, width of the bar)


def columns(width: int) -> tuple[Column, ...]:
    """The columns of a table ``width`` cells wide; together, with a space after each but the last, they fill it."""
    bar = next((cells for need, cells in WIDER_MEMORY if width >= need), 8)
    shown = [column for column in COLUMNS if width >= column.need]
    sized = [_with_width(column, bar) if column.key == "memory" else column for column in shown]
    taken = sum(column.width + len(gap(column)) for column in sized) - len(gap(sized[0]))
    name = max(MIN_NAME, min(MAX_NAME, width - taken))
    sized = [_with_width(column, name) if column.key == "name" else column for column in sized]
    spare = width - sum(column.width + len(gap(column)) for column in sized) + len(gap(sized[0]))
    if spare > 0:  # the bar takes what the name does not need
        sized = [_with_width(column, column.width + spare) if column.key == "memory" else column for column in sized]
    return tuple(sized)


def gap(column: Column) -> str:
    """Before a column that is not the first: texts stand apart from the figures before them."""
    return " " if column.right else "  "


def _with_width(column: Column, width: int) -> Column:
    return Column(column.key, column.title, width, column.need, column.right)


def heading(shown: tuple[Column, ...], glyphs: Glyphs = text.FANCY) -> str:
    titles = (text.spelled(column.title, ascii_only=glyphs is text.ASCII) or "C" for column in shown)
    cells = (
        ("" if column is shown[0] else gap(column))
        + fit(title, column.width, right=column.right, ellipsis=glyphs.ellipsis)
        for column, title in zip(shown, titles, strict=True)
    )
    return "".join(cells)


def row_runs(row: NodeRow, shown: tuple[Column, ...], moment: Moment) -> Runs:
    """The row's cells, a space between two. What is lost or gone is all dimmed but its state."""
    state = row.state(moment.now, live=moment.live)
    faded = row.gone or state in ("lost", "left", "removed") or not moment.live
    runs: list[Run] = []
    for column in shown:
        if runs:
            runs.append((gap(column), "plain"))
        cell = _CELLS[column.key](row, column, moment, state)
        runs += [(part, "gone" if faded and column.key != "state" else role) for part, role in cell]
    return tuple(runs)


def second_runs(row: NodeRow, width: int, moment: Moment) -> Runs:
    """What stands under a row where there is room: what the machine is, and how it feels."""
    glyphs, view = moment.glyphs, row.view
    state = row.state(moment.now, live=moment.live)
    if row.cause and state != "ok":
        role = "error" if state == "lost" else "warning"
        return ((fit(f"{'':11}{text.clean(row.cause)}", width, ellipsis=glyphs.ellipsis), role),)
    facts = [text.clean(view.device), f"lends {text.gib(view.effective_vram_gib)} GiB"]
    if view.load is not None:
        facts.append(f"load {text.share(view.load)}")
    if view.temperature_c is not None:
        facts.append(f"{view.temperature_c:.0f} °C")
    if view.power_w is not None:
        facts.append(f"{view.power_w:.0f} W")
    if row.link_ms is not None:
        facts.append(f"{text.figure(row.link_ms, 2)} ms to the next")
    line = f"{'':11}{f' {glyphs.dot} '.join(facts)}"
    if glyphs is text.ASCII:
        line = text.spelled(line, ascii_only=True)
    return ((fit(line, width, ellipsis=glyphs.ellipsis), "gone" if row.gone else "muted"),)


Cell = Callable[[NodeRow, Column, Moment, str], Runs]


def _plain(value: str, column: Column, moment: Moment, role: str = "plain") -> Runs:
    return ((fit(value, column.width, right=column.right, ellipsis=moment.glyphs.ellipsis), role),)


def _state(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    glyph = getattr(moment.glyphs, {"removed": "left"}.get(state, state), moment.glyphs.drained)
    return _plain(f"{glyph} {state}", column, moment, STATE_ROLES.get(state, "late"))


def _name(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    name = text.clean(row.view.name)
    if moment.glyphs is text.ASCII:
        name = text.spelled(name, ascii_only=True)
    return _plain(name, column, moment, "name")


def _beat(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    role = {"late": "late", "lost": "lost"}.get(state, "muted")
    return _plain(text.age(row.age_s(moment.now)), column, moment, role)


def memory_shares(row: NodeRow) -> tuple[float, float, float]:
    """Shares of the physical memory, one after the other: in use, planned beyond that, lent beyond both."""
    total = row.view.memory_gib
    if total <= 0:
        return 0.0, 0.0, 0.0
    used = min(total, max(0.0, row.view.used_gib))
    planned = min(total, max(used, row.planned_gib))
    lent = min(total, max(planned, row.view.effective_vram_gib))
    return used / total, (planned - used) / total, (lent - planned) / total


def _memory(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    shares = memory_shares(row)
    glyphs = moment.glyphs
    used, planned, lent = text.parts(shares, column.width)
    full = shares[0]
    role = "lost" if full >= FULL else "late" if full >= FILLING else "used"
    rest = column.width - used - planned - lent
    runs = (
        (glyphs.used * used, role),
        (glyphs.planned * planned, "planned"),
        (glyphs.lent * lent, "lent"),
        (glyphs.rest * rest, "rest"),
    )
    return tuple(run for run in runs if run[0])


def _gib(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    used = text.figure(row.view.used_gib, 1)
    return _plain(f"{used}/{text.figure(row.view.memory_gib, 1)}", column, moment)


def _layers(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    glyphs = moment.glyphs
    if not row.stages:
        if row.copy is not None:
            return _plain(f"({text.layers(*row.copy, glyphs.dash)})", column, moment, "muted")
        return _plain(glyphs.unknown, column, moment, "muted")
    if any(stage.state == "loading" for stage in row.stages):
        return _plain("loading", column, moment, "late")
    shown = text.layers(*row.stages[0].layers, glyphs.dash)
    more = f"+{len(row.stages) - 1}" if len(row.stages) > 1 else ""
    return _plain(shown + more, column, moment)


def _ms(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    value = text.figure(row.ms, 2, moment.glyphs.unknown)
    return _plain((moment.glyphs.bottleneck if row.bottleneck else "") + value, column, moment,
                  "slowest" if row.bottleneck else "plain")  # fmt: skip


def _figure(value: Callable[[NodeRow], float | None], digits: int = 1) -> Cell:
    def cell(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
        known = value(row)
        role = "muted" if not known else "plain"
        return _plain(text.figure(known, digits, moment.glyphs.unknown), column, moment, role)

    return cell


def _share(value: Callable[[NodeRow], float | None]) -> Cell:
    def cell(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
        known = value(row)
        return _plain(text.share(known, moment.glyphs.unknown), column, moment, "muted" if not known else "plain")

    return cell


def _temp(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    degrees = row.view.temperature_c
    role = "plain" if degrees is None or degrees < WARM_C else "late" if degrees < HOT_C else "lost"
    return _plain(text.figure(degrees, 0, moment.glyphs.unknown), column, moment, "muted" if degrees is None else role)


def _spark(row: NodeRow, column: Column, moment: Moment, state: str) -> Runs:
    if not row.stages:
        return _plain("", column, moment)
    return _plain(text.sparkline(row.rates, column.width, moment.glyphs.sparks), column, moment, "spark")


_CELLS: dict[str, Cell] = {
    "state": _state,
    "name": _name,
    "beat": _beat,
    "memory": _memory,
    "gib": _gib,
    "layers": _layers,
    "ms": _ms,
    "rate": _figure(lambda row: row.tok_s),
    "busy": _share(lambda row: row.busy),
    "wait": _share(lambda row: row.wait),
    "load": _share(lambda row: row.view.load),
    "temp": _temp,
    "power": _figure(lambda row: row.view.power_w, 0),
    "link": _figure(lambda row: row.link_ms, 2),
    "spark": _spark,
}


def detail_lines(row: NodeRow, moment: Moment, width: int) -> list[Runs]:
    """All that is known of one machine, for the details pane."""
    view, glyphs = row.view, moment.glyphs
    state = row.state(moment.now, live=moment.live)
    heading_role = STATE_ROLES.get(state, "late")
    glyph = getattr(glyphs, {"removed": "left"}.get(state, state), glyphs.drained)
    lines: list[Runs] = [
        ((fit(text.clean(view.name), width, ellipsis=glyphs.ellipsis), "name"),),
        ((f"{glyph} {state}", heading_role), (f"  last heard {text.age(row.age_s(moment.now))} ago", "muted")),
    ]
    if row.cause and state != "ok":
        lines += [((line, heading_role),) for line in text.wrapped(text.clean(row.cause), width)]
    facts = [
        ("device", text.clean(view.device)),
        ("address", view.address or glyphs.unknown),
        ("id", view.id),
        ("", ""),
        ("memory", f"{text.gib(view.used_gib)} used of {text.gib(view.memory_gib)} GiB"),
        ("lends", f"{text.gib(view.effective_vram_gib)} GiB"),
        ("planned", f"{text.gib(row.planned_gib)} GiB"),
        ("free", f"{text.gib(view.free_gib, glyphs.unknown)} GiB"),
        ("load", text.share(view.load, glyphs.unknown)),
        ("heat", f"{text.figure(view.temperature_c, 0, glyphs.unknown)} °C"),
        ("power", f"{text.figure(view.power_w, 0, glyphs.unknown)} W"),
    ]
    for stage in row.stages:
        facts += _stage_facts(stage, glyphs, bottleneck=row.bottleneck, several=row.several)
    if row.copy is not None:
        facts += [("", ""), ("copy of", f"layers {text.layers(*row.copy, glyphs.dash)}")]
    for name, value in facts:
        shown = text.spelled(value, ascii_only=True) if glyphs is text.ASCII else value
        lines.append(((fit(name, 9), "muted"), (fit(shown, width - 9, ellipsis=glyphs.ellipsis), "plain")))
    return lines


def _stage_facts(stage: StageView, glyphs: Glyphs, *, bottleneck: bool, several: bool) -> list[tuple[str, str]]:
    slowest = f"  {glyphs.bottleneck} bottleneck" if bottleneck else ""
    return [
        ("", ""),
        ("stage", f"layers {text.layers(*stage.layers, glyphs.dash)}, {stage.state}"),
        *([("pipeline", str(stage.pipeline))] if several else []),
        ("weights", f"{text.gib(stage.weights_gib)} GiB + {text.gib(stage.kv_gib)} GiB KV"),
        ("time", f"{text.figure(stage.ms_per_token, 2)} ms per token{slowest}"),
        ("busy", f"{text.share(stage.busy)}, waiting {text.share(stage.wait)}"),
        ("wire", f"{stage.wire}, {text.figure(stage.link_ms, 2)} ms, {text.figure(stage.link_mb_s, 0)} MB/s"),
        ("process", f"{stage.pid}, {text.gib(stage.rss_gib, glyphs.unknown)} GiB"),
    ]
