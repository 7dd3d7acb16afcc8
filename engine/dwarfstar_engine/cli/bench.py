"""``dwarfstar bench``: runs the benchmark and puts its outcome where it was asked for.

What is measured, and how, is in the package ``bench``.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from dwarfstar_engine.bench import plot, report, suite
from dwarfstar_engine.bench.report import Report
from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Output:
    """Files to write besides what is printed."""

    json_file: Path | None = None
    svg_file: Path | None = None


def measure(plan: suite.Plan, output: Output) -> None:
    """Run the benchmark, and print its table. Raises DwarfStarError."""
    _writable(output)
    # A signal must unwind: peers, network namespaces and the folder of the bench are ended on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    found = suite.bench(plan, lambda home: remote.status(running.require(home), home), _say)
    _write(found, output)
    print(report.table(found))


def show(file: Path, output: Output, *, markdown: bool) -> None:
    """Print a finished report again. Raises SettingsError."""
    try:
        found = report.from_json(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{file} cannot be read ({error.strerror}): give a file that --json wrote") from None
    _write(found, output)
    print(report.markdown(found) if markdown else report.table(found))


def _writable(output: Output) -> None:
    """Raises SettingsError now rather than when the work is done."""
    for file in (output.json_file, output.svg_file):
        if file is not None and not file.parent.is_dir():
            raise SettingsError(f"there is no folder {file.parent}: make it, or name another file")


def _write(found: Report, output: Output) -> None:
    try:
        if output.json_file is not None:
            output.json_file.write_text(json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
        if output.svg_file is not None:
            output.svg_file.write_text(plot.svg(found), "utf-8")
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be written ({error.strerror}): name another file") from None


def _say(text: str) -> None:
    print(f"dwarfstar: {text}", file=sys.stderr, flush=True)
