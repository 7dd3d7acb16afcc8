"""Opening the terminal app: whether there is a terminal for it, and with what. Textual is imported here and nowhere
else in the engine, and only when the app is really opened.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from dwarfstar_engine.cli import running
from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.settings import Settings

FLAGS = frozenset(
    {"--readonly", "--low-bandwidth", "--no-low-bandwidth", "--ascii", "--no-ascii", "--mouse", "--no-mouse"}
)
VALUED = frozenset({"--attach", "--theme", "--home"})
DUMB = frozenset({"", "dumb", "unknown"})


@dataclass(frozen=True, slots=True)
class Look:
    """What the command line says of the app. None: nothing."""

    attach: str | None = None
    readonly: bool = False
    low_bandwidth: bool | None = None
    ascii: bool | None = None
    mouse: bool | None = None
    theme: str | None = None


def can_draw(environment: Mapping[str, str]) -> bool:
    """Whether input and output are a terminal that can draw."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return sys.platform == "win32" or environment.get("TERM", "") not in DUMB


def engine_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """Those of the command line that an engine takes: all but the app's own, and the home, which is said apart."""
    kept, skip = [], False
    for argument in arguments:
        name = argument.partition("=")[0]
        if skip or argument in FLAGS:
            skip = False
        elif name in VALUED:
            skip = "=" not in argument
        else:
            kept.append(argument)
    return tuple(kept)


def config_folder(settings: Settings) -> Path:
    """Where ``config.toml`` is looked for, too."""
    if "home" in settings.model_fields_set:
        return settings.home
    return Path(platformdirs.user_config_dir("dwarfstar"))


def open_app(settings: Settings, look: Look, arguments: Sequence[str], *, wants_engine: bool) -> None:
    """Run the app to its end. wants_engine: start one with ``arguments`` if none runs. Raises SettingsError."""
    if look.attach is not None and ":" not in look.attach:
        raise SettingsError("--attach takes HOST:PORT, the control address that `dwarfstar status --json` gives there")
    _over_ssh(os.environ, look.low_bandwidth)
    try:
        from dwarfstar_tui import main
        from dwarfstar_tui.options import AppOptions
    except ModuleNotFoundError as error:
        raise SettingsError(f"the terminal app is not installed here ({error.name}): use --serve") from None
    here = look.attach is not None or running.find(settings.home) is not None
    options = AppOptions(
        home=settings.home,
        config=config_folder(settings),
        attach=look.attach,
        readonly=look.readonly,
        low_bandwidth=look.low_bandwidth,
        ascii=look.ascii,
        mouse=look.mouse,
        theme=look.theme,
        start=engine_arguments(arguments) if wants_engine and not here else None,
        note="an engine runs already: this is it, with the model it was started with" if wants_engine and here else "",
    )
    status = main.run(options, settings)
    if running.find(settings.home) is not None:
        print("dwarfstar: the engine runs on; `dwarfstar` opens this app again, `dwarfstar stop` ends it")
    if status:
        raise SystemExit(status)


def _over_ssh(environment: os._Environ[str], wanted: bool | None) -> None:
    """Textual reads these when it is imported: no animations over a thin line."""
    if wanted or (wanted is None and (environment.get("SSH_CONNECTION") or environment.get("SSH_TTY"))):
        environment.setdefault("TEXTUAL_ANIMATIONS", "none")
        environment.setdefault("TEXTUAL_FPS", "15")
        environment.setdefault("TEXTUAL_SMOOTH_SCROLL", "0")
