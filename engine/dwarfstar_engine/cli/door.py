"""The door of an engine's HTTP API: what it is bound to decides who may come in and what they are told.

On loopback everybody on this machine may. Elsewhere a key is needed, and there is no switch for that; without a key to
give out the engine does not start. TLS is up to the user: without it, keys and texts can be read on the way, and that
is said.
"""

from __future__ import annotations

import shlex
import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dwarfstar_engine.api.keybook import KeyStore, key_folder
from dwarfstar_engine.api.keys import Gate, LiveKeys
from dwarfstar_engine.api.tls import server_tls
from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.node.facts import is_loopback, reached_host, shown_host
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.trust import utc_now


@dataclass(frozen=True, slots=True)
class Door:
    """url: where clients reach the API. public: bound elsewhere than loopback. tls: what it encrypts with, or None.

    certificate: the file of its certificate; empty: no TLS. curl: the options with which curl gets in. notes: what to
    tell the user, a line each.
    """

    url: str
    public: bool
    gate: Gate
    tls: ssl.SSLContext | None
    certificate: str
    curl: str
    notes: tuple[str, ...]


def open_door(settings: Settings, bound: tuple[Any, ...], now: datetime) -> Door:
    """The door for a socket bound to ``bound``, its own name for itself: (host, port, …).

    Raises SettingsError (no key yet, bad TLS files), TrustError (the file of keys cannot be read).
    """
    host, port = str(bound[0]), int(bound[1])
    public = not is_loopback(host)
    store = KeyStore(key_folder(settings.home), utc_now)
    keys = LiveKeys(store)
    home = home_option(settings.home)
    if public and not keys().usable(now):
        raise SettingsError(
            f"other machines can reach {shown_host(host)}:{port}, so a key is needed, and there is none: make one with "
            f"`dwarfstar key add NAME{home}` and start again",
            code="no_api_key",
        )
    tls = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = server_tls(settings.tls_cert, settings.tls_key, now)
    url = f"{'https' if tls else 'http'}://{shown_host(reached_host(host))}:{port}"
    notes = list(tls.notes) if tls else []
    if public and tls is None:
        notes.append(
            f"HTTP is in plain text on {shown_host(host)}:{port}: keys and texts can be read on the way; "
            "--tls-cert and --tls-key make it HTTPS"
        )
    certificate = str(tls.certificate) if tls else ""
    curl = f"--cacert {shlex.quote(certificate)} " if certificate else ""
    curl += '-H "Authorization: Bearer $DWARFSTAR_API_KEY" ' if public else ""
    gate = Gate(keys, required=public, clock=utc_now, note=store.note_used)
    return Door(url, public, gate, tls.context if tls else None, certificate, curl, tuple(notes))


def home_option(home: Path) -> str:
    """What to add to a command so that it finds ``home``."""
    return "" if home == Settings().home else f" --home {shlex.quote(str(home))}"
