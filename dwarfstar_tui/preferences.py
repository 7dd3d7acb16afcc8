"""``tui.toml`` in the config folder: what a person likes. Read once; what is wrong with it is told and left out. Pure,
but for ``load``.

    theme = "night"
    ascii = false
    low_bandwidth = false
    mouse = true

    [keys]
    "cluster.drain" = "D"        # ids as `?` shows them
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 10
KEY = re.compile(r"[A-Za-z0-9_+?:;/.\[\]{}<>!@#$%^&*=|~-]{1,32}")
FLAGS = ("ascii", "low_bandwidth", "mouse")


@dataclass(frozen=True, slots=True)
class Preferences:
    """None: not set. keys: binding id to key. problems: sentences for the person."""

    theme: str | None = None
    ascii: bool | None = None
    low_bandwidth: bool | None = None
    mouse: bool | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def load(path: Path) -> Preferences:
    """From a file; none is fine."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return Preferences(problems=(f"{path} is too large to be a config file",))
        return parse(tomllib.loads(path.read_text("utf-8")), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return Preferences()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return Preferences(problems=(f"{path} is not valid TOML: {error}",))
    except OSError as error:
        return Preferences(problems=(f"{path} cannot be read: {error.strerror}",))


def parse(given: Mapping[str, Any], where: str) -> Preferences:
    problems = []
    theme = given.get("theme")
    if theme is not None and not isinstance(theme, str):
        problems.append(f"theme in {where} must be a name in quotes")
        theme = None
    flags: dict[str, bool] = {}
    for name in FLAGS:
        value = given.get(name)
        if isinstance(value, bool):
            flags[name] = value
        elif value is not None:
            problems.append(f"{name} in {where} must be true or false")
    keys: dict[str, str] = {}
    table = given.get("keys", {})
    if not isinstance(table, dict):
        problems.append(f"keys in {where} must be a table")
        table = {}
    for name, key in table.items():
        if isinstance(key, str) and all(KEY.fullmatch(part) for part in key.split(",")):
            keys[name] = key
        else:
            problems.append(f'{key!r} in {where} is no key: write it as in "ctrl+d" or "f5"')
    known = {"theme", "keys", *FLAGS}
    problems += [f"{name} in {where} is not a setting of the app" for name in given if name not in known]
    return Preferences(theme, flags.get("ascii"), flags.get("low_bandwidth"), flags.get("mouse"), keys, tuple(problems))


def with_known_keys(preferences: Preferences, known: frozenset[str]) -> Preferences:
    """Without keys for ids that there are not, which Textual would ignore in silence."""
    unknown = sorted(set(preferences.keys) - known)
    problems = tuple(f"there is no action {name!r} to give a key to: `?` shows their ids" for name in unknown)
    kept = {name: key for name, key in preferences.keys.items() if name in known}
    return replace(preferences, keys=kept, problems=(*preferences.problems, *problems))
