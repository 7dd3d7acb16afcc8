"""Themes, preferences, the command line, and what the terminal can do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dwarfstar_engine.cli import app as app_module
from dwarfstar_engine.cli.app import can_draw, engine_arguments
from dwarfstar_engine.cli.main import starter
from dwarfstar_tui import preferences, themes
from dwarfstar_tui.model_files import find_models
from dwarfstar_tui.options import surface
from dwarfstar_tui.themes import ThemeError
from support.gguf_bytes import llama_pairs, llama_tensors, write


def test_our_themes_are_all_good() -> None:
    found, problems = themes.load_folder(themes.folder())
    assert problems == []
    assert {theme.name for theme in found} >= {
        themes.DEFAULT, themes.DEFAULT_LIGHT, "contrast", themes.ANSI_DARK, themes.ANSI_LIGHT,
    }  # fmt: skip
    assert all(theme.ansi == theme.name.startswith("ansi") for theme in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("primary = 3", "in quotes"),
        ('primary = "no"', "is no colour"),
        ('background = "#000"', "at least primary"),
        ('primary = "#fff"\nprimry = "#000"', "'primry' is not a key"),
        ('primary = "#fff"\n[variables]\nds-oops = "#000"', "ds-oops"),
        ('primary = "#fff"\n[variables]\nds-ok = "nope"', "is no colour"),
        ('primary = "#fff"\ndark = 1', "true or false"),
        ("primary = ", "not valid TOML"),
    ],
)
def test_a_bad_theme_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ThemeError, match=said) as raised:
        themes.load(file)
    assert "mine.toml" in str(raised.value)


def test_one_bad_theme_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text('primary = "#fff"')
    (tmp_path / "bad.toml").write_text("primary")
    found, problems = themes.load_folder(tmp_path)
    assert ([theme.name for theme in found], len(problems)) == (["good"], 1)


def test_preferences_are_read_and_mistakes_told(tmp_path: Path) -> None:
    file = tmp_path / "tui.toml"
    assert preferences.load(file) == preferences.Preferences()
    file.write_text(
        'theme = "day"\nascii = "yes"\nmouse = false\nfoo = 1\n[keys]\n"cluster.drain" = "D"\n"app.quit" = ""'
    )
    liked = preferences.load(file)
    assert (liked.theme, liked.ascii, liked.mouse, dict(liked.keys)) == ("day", None, False, {"cluster.drain": "D"})
    assert len(liked.problems) == 3
    known = preferences.with_known_keys(liked, frozenset({"app.quit"}))
    assert (dict(known.keys), len(known.problems)) == ({}, 4)
    file.write_text("theme = ")
    assert "not valid TOML" in preferences.load(file).problems[0]


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (["--demo", "--theme", "day", "--readonly"], ("--demo",)),
        (["m.gguf", "--home=/x", "--port", "0", "--attach=a:1"], ("m.gguf", "--port", "0")),
        (["--home", "/x", "--low-bandwidth", "--no-mouse", "--ascii"], ()),
    ],
)
def test_the_engine_gets_its_own_arguments(given: list[str], left: tuple[str, ...]) -> None:
    assert engine_arguments(given) == left


def test_the_apps_options_are_all_known_to_be_its_own() -> None:
    parameters = typer.main.get_command(starter).params
    own = {
        option
        for parameter in parameters
        if (getattr(parameter, "help", None) or "").startswith("App")
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert own == (app_module.FLAGS | app_module.VALUED) - {"--home"}


def test_a_thin_line_and_a_terminal_without_unicode_are_noticed() -> None:
    assert surface({"SSH_CONNECTION": "1 2 3 4"}, "utf-8").slow
    assert not surface({}, "UTF-8").slow
    assert surface({}, "utf-8").unicode
    assert not surface({}, "ANSI_X3.4-1968").unicode


def test_without_a_terminal_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def __init__(self, terminal: bool) -> None:
            self.terminal = terminal

        def isatty(self) -> bool:
            return self.terminal

    monkeypatch.setattr(sys, "stdin", Terminal(False))
    monkeypatch.setattr(sys, "stdout", Terminal(True))
    assert not can_draw({"TERM": "xterm"})
    monkeypatch.setattr(sys, "stdin", Terminal(True))
    assert can_draw({"TERM": "xterm"})
    assert not can_draw({"TERM": "dumb"})


def test_serving_imports_no_textual() -> None:
    """Also not by the way of what it imports: --serve must start where there is no terminal library."""
    program = (
        "import sys; sys.modules['textual'] = None; sys.argv = ['dwarfstar', '--serve', 'no-such-model.gguf'];"
        "from dwarfstar_engine.cli.main import run\n"
        "try: run()\n"
        "except SystemExit as end: code = end.code\n"
        "assert code == 2, code\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'dwarfstar_tui']\n"
        "assert sys.modules['textual'] is None"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_gguf_files_are_described_and_what_is_wrong_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nonsense")
    (tmp_path / "notes.txt").write_text("no model")
    write(tmp_path / "good.gguf", llama_pairs(), llama_tensors())
    broken, good = (file for file in find_models(tmp_path).files if not file.demo)
    assert (broken.name, broken.layers) == ("broken", 0)
    assert broken.problem
    assert (good.name, good.layers, good.architecture, good.quantisation) == ("good", 4, "llama", "Q8_0")
    assert find_models(tmp_path / "none").problem == ""
