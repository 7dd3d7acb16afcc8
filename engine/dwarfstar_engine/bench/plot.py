"""Two small charts as one SVG: decode speed against streams, time to first token against prompt length.

Plain SVG text, no library: it opens in any browser and reads on light and dark ground.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from dwarfstar_engine.bench.peers import ALL_CORES, OURS, RPC, UNSPLIT
from dwarfstar_engine.bench.report import Report

WIDTH, HEIGHT = 840, 380
PANEL_W, PANEL_H = 330, 240
LEFTS, TOP = (62, 474), 76
LEGEND_STEP = 190  # more than the longest title takes
TICKS = 5
COLOURS = {UNSPLIT: "#7f8c8d", ALL_CORES: "#b8860b", RPC: "#2f7ebc", "DwarfStar": "#d1495b"}
TITLES = {
    UNSPLIT: "llama-server, 1 core",
    ALL_CORES: "llama-server, all cores",
    RPC: "llama-server, RPC",
    "DwarfStar": "DwarfStar, split",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """series: peer → points (x, y), by x."""

    title: str
    x_title: str
    series: dict[str, list[tuple[float, float]]]


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 × 10ⁿ that is not below ``value`` > 0."""
    step = 10.0 ** len(str(int(value))) / 10 if value >= 1 else 0.1
    return next(step * k for k in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * k >= value)


def panels(report: Report) -> list[Panel]:
    """What the report has of both charts; a chart without two points is left out."""
    found = []
    for pattern, title, x_title, factor in (
        (r"decode\.(\d+)", "decode, tok/s of all streams", "streams", 1.0),
        (r"ttft\.(\d+)", "time to first token, s", "prompt tokens", 0.001),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in report.rows:
            if match := re.fullmatch(pattern, row.measure.key):
                for peer in row.values:
                    shown = "DwarfStar" if peer in OURS else peer
                    value = row.median(peer)
                    if shown in COLOURS and value is not None:
                        series.setdefault(shown, []).append((float(match[1]), value * factor))
        series = {peer: sorted(series[peer]) for peer in COLOURS if len(series.get(peer, ())) > 1}
        if series:
            found.append(Panel(title, x_title, series))
    return found


def svg(report: Report) -> str:
    """The charts, side by side."""
    shown = panels(report)
    peers = [peer for peer in COLOURS if any(peer in panel.series for panel in shown)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for panel, left in zip(shown, LEFTS, strict=False):
        parts += _panel(panel, left)
    parts += _legend(peers)
    return "\n".join([*parts, "</svg>", ""])


def _legend(peers: Sequence[str]) -> list[str]:
    parts = []
    for index, peer in enumerate(peers):
        x = LEFTS[0] + index * LEGEND_STEP
        parts.append(f'<rect x="{x}" y="14" width="14" height="4" fill="{COLOURS[peer]}"/>')
        parts.append(f'<text x="{x + 20}" y="20">{escape(TITLES[peer])}</text>')
    return parts


def _panel(panel: Panel, left: int) -> list[str]:
    bottom = TOP + PANEL_H
    xs = sorted({x for points in panel.series.values() for x, _ in points})
    top_x = xs[-1]
    top_y = nice_ceiling(max(y for points in panel.series.values() for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + PANEL_W * x / top_x, 1), round(bottom - PANEL_H * y / top_y, 1)

    parts = [f'<text x="{left}" y="{TOP - 20}" font-size="14" font-weight="bold">{escape(panel.title)}</text>']
    for tick in range(TICKS + 1):
        y = top_y * tick / TICKS
        _, level = at(0, y)
        parts.append(f'<line x1="{left}" x2="{left + PANEL_W}" y1="{level}" y2="{level}" stroke="#d8dee4"/>')
        parts.append(f'<text x="{left - 8}" y="{level + 4}" text-anchor="end">{y:g}</text>')
    for x in xs:
        across, _ = at(x, 0)
        parts.append(f'<line x1="{across}" x2="{across}" y1="{bottom}" y2="{bottom + 5}" stroke="#57606a"/>')
        parts.append(f'<text x="{across}" y="{bottom + 20}" text-anchor="middle">{x:g}</text>')
    middle = left + PANEL_W / 2
    parts.append(f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle">{escape(panel.x_title)}</text>')
    for peer, points in panel.series.items():
        places = [at(x, y) for x, y in points]
        line = " ".join(f"{x},{y}" for x, y in places)
        width = 3 if peer == "DwarfStar" else 2
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[peer]}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="{width + 1}" fill="{COLOURS[peer]}"/>' for x, y in places]
    return parts
