"""What `dwarfstar models` and `dwarfstar pull` print fits the terminal and steers it nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwarfstar_engine.cli.pull_text import GIB, Pace, count, duration, models_text, offers_text
from dwarfstar_engine.model.hub_names import HubFile, Offer
from dwarfstar_engine.node.pull import Progress
from dwarfstar_engine.views import ModelFilesView, ModelFileView

FOLDER = Path("/models")


def model(name: str, **more: object) -> ModelFileView:
    facts: dict[str, object] = {
        "path": str(FOLDER / f"{name}.gguf"), "files": 1, "size_gib": 1234.56, "architecture": "a-very-long-arch",
        "layers": 512, "parameters": 999_999_999_999, "quantisation": "MXFP4_MOE", "context": 1048576,
        "supported": True, "reason": "",
    }  # fmt: skip
    return ModelFileView.model_validate({"name": name, **facts, **more})


REASON = "models of architecture mamba cannot be split by layers: its recurrent layers are not supported; " * 2


@pytest.mark.parametrize("width", [80, 81, 100, 160, 200])
def test_it_fits(width: int) -> None:
    names = ["m", "Meta-Llama-3.1-70B-Instruct-abliterated-" + "x" * 180 + "-Q4_K_M", "evil\x1b[31m\n"]
    view = ModelFilesView(models=tuple(model(name, supported=False, reason=REASON) for name in names), left_out=7)
    lines = models_text(view, FOLDER, width).split("\n")
    assert max(map(len, lines[:4])) <= width
    assert len({line.index("1234.56") for line in lines[1:4]}) == 1  # columns stand under each other
    assert not any("\x1b" in line for line in lines)
    assert lines[2].split()[0].endswith("Q4_K_M") and any("7 more files" in line for line in lines)


def test_a_narrow_terminal_gets_eighty_columns() -> None:
    view = ModelFilesView(models=(model("m"),))
    assert models_text(view, FOLDER, 20) == models_text(view, FOLDER, 80)


def test_an_empty_folder_says_what_to_do() -> None:
    for view in (ModelFilesView(models=()), ModelFilesView(models=(model("demo", path="/elsewhere/demo.gguf"),))):
        text = models_text(view, FOLDER, 80)
        assert f"no GGUF files in {FOLDER}" in text and "dwarfstar pull" in text
    assert "dwarfstar pull" not in models_text(ModelFilesView(models=(model("m"),)), FOLDER, 80)


def test_downloads_that_are_not_complete_are_told() -> None:
    text = models_text(ModelFilesView(models=(model("m"),), unfinished_gib=3.25), FOLDER, 160)
    assert "3.25 GiB of pulls that are not complete lie in /models/.pull" in text


def test_what_is_broken_has_no_figures() -> None:
    broken = model("m", architecture="", layers=0, context=0, supported=False, broken=True, reason="it is damaged")
    text = models_text(ModelFilesView(models=(broken,)), FOLDER, 80)
    assert text.split("\n")[1].split() == ["m", "–", "–", "–", "–", "1234.56", "–", "!"]
    assert "! m: it is damaged" in text


def test_numbers_of_parameters() -> None:
    for n, said in ((1187, "1187"), (134_515_008, "135M"), (999_700_000, "1B"), (8_030_261_312, "8.03B")):
        assert count(n) == said


def test_durations() -> None:
    for seconds, said in ((0.2, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (7265, "2 h 1 min"), (1e7, "days")):
        assert duration(seconds) == said


def test_a_repositorys_models() -> None:
    files = tuple(HubFile(f"Q6_K/m-Q6_K-{no:05}-of-00002.gguf", 3 << 30, "", "") for no in (1, 2))
    text = offers_text([Offer(files), Offer((HubFile("plain\x1b.gguf", 1 << 30, "", ""),))])
    assert "Q6_K" in text and "6.00" in text and "1 more parts" in text and "\x1b" not in text


def progress(done: int, doing: str = "pulling") -> Progress:
    return Progress(doing, "m.gguf", done * GIB, 10 * GIB)


def test_pace() -> None:
    pace = Pace()
    assert pace.line(progress(1, "checking"), 0.0) == "checking  10%  1.00 of 10.00 GiB"
    assert "left" not in pace.line(progress(2), 1.0)  # one sample is no rate
    assert pace.line(progress(4), 11.0) == "pulling  40%  4.00 of 10.00 GiB  214.7 MB/s  30 s left"
    assert "  357.9 MB/s" in pace.line(progress(6), 13.0)
    for now in (14.0, 30.0, 50.0):
        said = pace.line(progress(6), now)
    assert said.endswith("stalled")
    assert "left" not in pace.line(progress(1), 51.0)  # it began anew
