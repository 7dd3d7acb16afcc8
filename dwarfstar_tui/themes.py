"""Themes from TOML: ours, and the person's own in the config folder. A bad file is told of and changes nothing.

Textual takes whatever it is given and fails when it draws. So a theme is checked whole before it is registered: its
keys, its colours, and that a colour system can be made of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from textual.color import Color, ColorParseError
from textual.theme import Theme

MAX_BYTES = 64 << 10
MAX_THEMES = 50
MUTED = 0.58  # of the way from the background to the text: still 4.5:1 in ours
DEFAULT, DEFAULT_LIGHT = "night", "day"
ANSI_DARK, ANSI_LIGHT = "ansi-dark", "ansi-light"
COLOURS = (
    "primary", "secondary", "warning", "error", "success", "accent", "foreground", "background", "surface", "panel",
    "boost",
)  # fmt: skip
KEYS = frozenset(field.name for field in fields(Theme)) - {"name"}

ROLE_VARIABLES = {  # for ours and others: a theme may set them in [variables]
    "ds-ok": "success",
    "ds-late": "warning",
    "ds-lost": "error",
    "ds-used": "primary",
    "ds-planned": "accent",
    "ds-lent": "secondary",
    "ds-spark": "accent",
    "ds-muted": "foreground",
    "ds-cursor": "panel",
}


def role_defaults(theme: Theme) -> dict[str, str]:
    """Our variables for a theme that does not set them: its own colours; muted is its text, paler."""
    made = theme.to_color_system().generate()
    found = {name: made[source] for name, source in ROLE_VARIABLES.items()}
    if not theme.ansi:
        background = Color.parse(made["background"])
        found["ds-muted"] = background.blend(Color.parse(made["foreground"]), MUTED).hex
    return found


class ThemeError(ValueError):
    """A theme file that cannot be used; says what is wrong with it."""


def folder() -> Path:
    """Ours: beside the package in an installed program, at the top of the sources otherwise."""
    here = Path(__file__).parent
    return next((path for path in (here / "themes", here.parent / "themes") if path.is_dir()), here)


def parse(name: str, given: Mapping[str, Any]) -> Theme:
    """A theme that can be drawn. Raises ThemeError."""
    unknown = sorted(set(given) - KEYS)
    if unknown:
        raise ThemeError(f"{unknown[0]!r} is not a key of a theme: there are {', '.join(sorted(KEYS))}")
    if "primary" not in given:
        raise ThemeError("a theme needs at least primary")
    for key in COLOURS:
        if key in given:
            _check_colour(key, given[key])
    variables = given.get("variables", {})
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise ThemeError("variables must be a table of texts")
    for key, value in variables.items():
        if key.startswith("ds-"):
            if key not in ROLE_VARIABLES:
                raise ThemeError(f"{key!r} is not a variable of ours: there are {', '.join(ROLE_VARIABLES)}")
            _check_colour(key, value)
    for key, kind in (("dark", bool), ("ansi", bool), ("luminosity_spread", float), ("text_alpha", float)):
        if key in given and not isinstance(given[key], kind):
            raise ThemeError(f"{key} must be {'true or false' if kind is bool else 'a number such as 0.5'}")
    theme = Theme(name=name, **given)
    try:
        theme.to_color_system().generate()
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ThemeError(f"no colours can be made of it: {error}") from None
    return theme


def _check_colour(key: str, value: object) -> None:
    try:
        if not isinstance(value, str):
            raise ThemeError(f"{key} must be a colour in quotes")
        Color.parse(value)
    except ColorParseError:
        raise ThemeError(f'{key} = {value!r} is no colour: write it as in "#4ebf71"') from None


def load(path: Path) -> Theme:
    """The theme of a file, named after it. Raises ThemeError naming the file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ThemeError("it is too large for a theme")
        return parse(path.stem, tomllib.loads(path.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ThemeError(f"the theme {path}: not valid TOML: {error}") from None
    except ThemeError as error:
        raise ThemeError(f"the theme {path}: {error}") from None
    except OSError as error:
        raise ThemeError(f"the theme {path} cannot be read: {error.strerror}") from None


def load_folder(path: Path) -> tuple[list[Theme], list[str]]:
    """Every theme of a folder, and what is wrong with the others."""
    themes, problems = [], []
    for file in sorted(path.glob("*.toml"))[:MAX_THEMES] if path.is_dir() else []:
        try:
            themes.append(load(file))
        except ThemeError as error:
            problems.append(str(error))
    return themes, problems


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    """What changes when a theme file is saved: to look at now and then."""
    found = {}
    for file in sorted(path.glob("*.toml"))[:MAX_THEMES] if path.is_dir() else []:
        try:
            stat = file.stat()
        except OSError:
            continue  # it has just gone
        found[file.name] = (stat.st_mtime_ns, stat.st_size)
    return found
