"""Assembles the app: session, mailbox, preferences, terminal; and runs it to its end."""

from __future__ import annotations

import os
import sys

from dwarfstar_engine.settings import Settings
from dwarfstar_tui import preferences, text
from dwarfstar_tui.app import DwarfStarApp
from dwarfstar_tui.client import HomePlace
from dwarfstar_tui.leaving import Leaving
from dwarfstar_tui.mailbox import Mailbox
from dwarfstar_tui.options import AppOptions, surface
from dwarfstar_tui.session import Session


def run(options: AppOptions, settings: Settings) -> int:
    """Run the app until it is closed. Returns the exit status; the engine runs on."""
    terminal = surface(os.environ, getattr(sys.stdout, "encoding", None) or "ascii")
    liked = preferences.load(options.config / "tui.toml")
    slow = _first(options.low_bandwidth, liked.low_bandwidth, terminal.slow)
    plain = _first(options.ascii, liked.ascii, not terminal.unicode)
    mailbox = Mailbox()
    session = Session(HomePlace(settings, os.environ, options.attach), mailbox, low_bandwidth=slow)
    app = DwarfStarApp(
        options, mailbox, session.submit, liked=liked, slow=slow, glyphs=text.ASCII if plain else text.FANCY
    )
    session.start()
    try:
        with Leaving(lambda: app.post_message(DwarfStarApp.Leave())):
            app.run(mouse=_first(options.mouse, liked.mouse, True))
    finally:
        session.close()
    return app.return_code or 0


def _first(*given: bool | None) -> bool:
    return next((flag for flag in given if flag is not None), False)
