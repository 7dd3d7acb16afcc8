"""How the app was started: frozen, made once at the entry point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AppOptions:
    """See ``dwarfstar --help``. start: arguments of an engine to start if none runs; None: attach, or let choose.
    note: what to say first.

    config: folder of tui.toml and themes. None of the flags: not given.
    """

    home: Path
    config: Path
    attach: str | None = None
    readonly: bool = False
    low_bandwidth: bool | None = None
    ascii: bool | None = None
    mouse: bool | None = None
    theme: str | None = None
    start: tuple[str, ...] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Surface:
    """What the terminal is like. slow: over a thin line."""

    slow: bool = False
    unicode: bool = True
    problems: tuple[str, ...] = field(default=())


def surface(environment: Mapping[str, str], encoding: str) -> Surface:
    """From the environment: SSH is taken for a thin line, and a terminal without UTF-8 gets ASCII."""
    slow = any(environment.get(name) for name in ("SSH_CONNECTION", "SSH_TTY"))
    return Surface(slow, encoding.lower().replace("-", "") in ("utf8", "utf16", "utf32"))
