"""The outcome of a benchmark, and its forms: a table for people, Markdown, JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dwarfstar_engine.bench.peers import ALL_CORES, OURS, REFERENCE, RPC, SPLIT, SPLIT_OFF, UNSPLIT
from dwarfstar_engine.bench.scenarios import Measure
from dwarfstar_engine.bench.stats import median, ratio
from dwarfstar_engine.errors import SettingsError

FORMAT = 1  # of the JSON file
COLUMNS = 80
TITLE_COLUMNS = 35
HEADS = ("unsplit", "all cores", "rpc", "split", "÷unspl", "÷rpc")
WIDTHS = (8, 10, 7, 7, 7, 6)  # 80 columns with the title


@dataclass(frozen=True, slots=True)
class Row:
    """One measure: a value for each peer and run."""

    measure: Measure
    values: Mapping[str, Sequence[float]]

    def median(self, peer: str) -> float | None:
        return median(self.values[peer]) if self.values.get(peer) else None

    def ours(self) -> Sequence[float]:
        return next((self.values[name] for name in OURS if self.values.get(name)), ())

    def against(self, peer: str) -> float | None:
        """Ours ÷ the peer's, by run."""
        return ratio(self.ours(), self.values[peer]) if self.values.get(peer) and self.ours() else None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything measured. facts: what was measured on what, for people; in order."""

    facts: Mapping[str, str]
    rows: Sequence[Row]

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(row.measure), "values": {k: list(v) for k, v in row.values.items()}} for row in self.rows]
        return {"format": FORMAT, "facts": dict(self.facts), "measures": rows}

    def row(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.measure.key == key), None)


def from_json(text: str) -> Report:
    """What ``as_json`` wrote. Raises SettingsError if it is something else."""
    try:
        held = json.loads(text)
        if held["format"] != FORMAT:
            raise SettingsError(f"the file has format {held['format']}, not {FORMAT}: run the benchmark again")
        rows = []
        for entry in held["measures"]:
            values = entry.pop("values")
            rows.append(Row(Measure(**entry), values))
        return Report(held["facts"], rows)
    except (ValueError, KeyError, TypeError):
        raise SettingsError("the file is no report of `dwarfstar bench`: run the benchmark again") from None


def figure(value: float | None) -> str:
    """Three digits, at most as many columns as a table's cell has."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cells(row: Row) -> list[str]:
    """The row's figures: unsplit, all cores, rpc, ours, ours ÷ unsplit, ours ÷ rpc."""
    whole = UNSPLIT if row.values.get(UNSPLIT) else REFERENCE
    values = [row.median(whole), row.median(ALL_CORES), row.median(RPC)]
    values.append(median(row.ours()) if row.ours() else None)
    ratios = [row.against(whole), row.against(RPC)] if row.measure.better and row.measure.unit else [None, None]
    return [figure(value) for value in [*values, *ratios]]


def name(measure: Measure) -> str:
    return f"{measure.title}, {measure.unit}" if measure.unit else measure.title


def table(report: Report) -> str:
    """For people, 80 columns."""
    lines = [
        line
        for key, value in report.facts.items()
        for line in textwrap.wrap(f"{key}: {value}", COLUMNS, subsequent_indent="  ")
    ]
    lines += ["", " " * TITLE_COLUMNS + _line(HEADS)]
    lines += [f"{name(row.measure)[: TITLE_COLUMNS - 1]:{TITLE_COLUMNS}}" + _line(cells(row)) for row in report.rows]
    if drafts := speculation(report):
        lines += ["", *drafts]
    return "\n".join(lines)


def _line(values: Sequence[str]) -> str:
    return "".join(f"{value:>{width}}" for value, width in zip(values, WIDTHS, strict=True))


def speculation(report: Report) -> list[str]:
    """What drafting ahead gains: ours with it ÷ ours without, by run."""
    lines = []
    for kind in ("repetitive", "ordinary"):
        row = report.row(f"speculation.{kind}")
        if row and row.values.get(SPLIT) and row.values.get(SPLIT_OFF):
            on, off = row.values[SPLIT], row.values[SPLIT_OFF]
            lines.append(f"speculation on {kind} text: {median(on):.1f} ÷ {median(off):.1f} = {ratio(on, off):.2f}")
    return lines


def markdown(report: Report) -> str:
    """The table for the README."""
    heads = ["", "unsplit", "unsplit, all cores", "RPC", "DwarfStar", "÷ unsplit", "÷ RPC"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join([name(row.measure), *cells(row)]) + " |" for row in report.rows]
    lines += ["", *(f"- {key}: {value}" for key, value in report.facts.items())]
    lines += [f"- {line}" for line in speculation(report)]
    return "\n".join(lines)
