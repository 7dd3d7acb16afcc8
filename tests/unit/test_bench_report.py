"""The report's forms: table, Markdown, JSON, charts."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from dwarfstar_engine.bench import plot, report, suite
from dwarfstar_engine.bench.peers import ALL_CORES, REFERENCE, RPC, SPLIT, SPLIT_OFF, UNSPLIT
from dwarfstar_engine.bench.report import Report, Row
from dwarfstar_engine.bench.scenarios import Measure, scenarios
from dwarfstar_engine.errors import SettingsError

SVG = "{http://www.w3.org/2000/svg}"


def _row(key: str, unit: str, **values: list[float]) -> Row:
    names = {"split": SPLIT, "off": SPLIT_OFF, "unsplit": UNSPLIT, "cores": ALL_CORES, "rpc": RPC, "whole": REFERENCE}
    return Row(Measure(key, key, unit, 1), {names[name]: runs for name, runs in values.items()})


REPORT = Report(
    {"machine": "a chip", "runs": "three " * 30},
    [
        _row("decode.1", "tok/s", unsplit=[100, 200, 50], rpc=[50, 100, 25], off=[90, 100, 50]),
        _row("decode.8", "tok/s", unsplit=[300.0, 300, 300], cores=[400, 400, 400], rpc=[250] * 3, split=[600] * 3),
        _row("decode.8.limit", "", split=[0.8, 0.9, 0.7]),
        _row("ttft.64", "ms", unsplit=[100], split=[50]),
        _row("ttft.2000", "ms", unsplit=[4000], split=[3000]),
        _row("speculation.repetitive", "tok/s", split=[300, 300], off=[100, 150]),
    ],
)


def test_ratios_are_medians_of_the_runs_ratios() -> None:
    row = REPORT.rows[0]
    assert row.against(UNSPLIT) == pytest.approx(0.9), "0.9, 0.5 and 1.0; the ratio of the medians is 0.9 only by luck"
    assert report.cells(row) == ["100", "–", "50.0", "90.0", "0.90", "1.80"]


def test_the_reference_stands_in_for_an_unsplit_server() -> None:
    assert report.cells(_row("decode.1", "tok/s", whole=[100], split=[50]))[0::4] == ["100", "0.50"]


def test_a_table_has_80_columns_and_every_measure() -> None:
    lines = report.table(REPORT).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(row.measure.title) for line in lines) for row in REPORT.rows)
    assert lines[-1] == "speculation on repetitive text: 300.0 ÷ 125.0 = 2.50"


def test_titles_of_all_measures_fit_the_table() -> None:
    names = [report.name(m) for scenario in scenarios((), 4096, True) for m in scenario.measures]
    assert len(names) == len(set(names))
    assert [name for name in names if len(name) >= report.TITLE_COLUMNS] == []


def test_markdown_has_a_line_for_each_measure_with_all_its_cells() -> None:
    lines = report.markdown(REPORT).splitlines()
    body = [line for line in lines if line.startswith("|")]
    assert len(body) == 2 + len(REPORT.rows) and {line.count("|") for line in body} == {8}


def test_json_comes_back_as_the_same_report() -> None:
    again = report.from_json(json.dumps(REPORT.as_json()))
    assert again.as_json() == REPORT.as_json() and report.table(again) == report.table(REPORT)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "facts": {}, "measures": [{"values": {}}]}'])
def test_a_file_that_is_no_report_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(SettingsError, match="run the benchmark again"):
        report.from_json(text)


def test_figures_have_three_digits() -> None:
    assert [report.figure(value) for value in (None, 0.0, 1.234, 12.34, 123.4, 18559.0)] == [
        "–", "0.00", "1.23", "12.3", "123", "18559",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "top"), [(0.05, 0.1), (0.9, 1), (1, 1), (1.1, 1.5), (7, 8), (99, 100), (258, 300), (18.5, 20), (601, 800)]
)
def test_an_axis_ends_at_a_round_number(value: float, top: float) -> None:
    assert plot.nice_ceiling(value) == pytest.approx(top)


def test_the_picture_has_a_line_for_each_peer_and_higher_values_higher_up() -> None:
    root = ET.fromstring(plot.svg(REPORT))
    lines = root.findall(f"{SVG}polyline")
    assert len(lines) == 3 + 2, "decode: unsplit, rpc, ours; TTFT: unsplit, ours"
    decode = [[float(n) for n in point.split(",")] for point in lines[2].attrib["points"].split()]
    assert decode[1][0] > decode[0][0] and decode[1][1] < decode[0][1], "600 tok/s of 8 streams against 90 of one"
    for x, y in decode:
        assert 0 <= x <= plot.WIDTH and 0 <= y <= plot.HEIGHT


def test_a_report_without_curves_makes_an_empty_picture() -> None:
    assert ET.fromstring(plot.svg(Report({}, []))).findall(f"{SVG}polyline") == []


def test_texts_are_compared_run_by_run_with_the_unsplit_model() -> None:
    texts = {(1, SPLIT): "a", (1, UNSPLIT): "a", (2, SPLIT): "b", (2, UNSPLIT): "c", (1, RPC): "z"}
    assert suite.same_texts(texts) == "equal to the unsplit model's in 1 of 2 runs"
    assert suite.same_texts({(1, SPLIT): "a"}) == ""
