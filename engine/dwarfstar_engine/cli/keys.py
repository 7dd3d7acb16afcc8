"""``dwarfstar key``: who may use the HTTP API. It works on the file of keys, whether an engine runs or not."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from dwarfstar_engine.api.keybook import ApiKey, KeyStore, key_folder, lifetime
from dwarfstar_engine.settings import load_settings
from dwarfstar_engine.wire.trust import utc_now

keys_app = typer.Typer(
    help="API keys: who may use the HTTP API.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Home = Annotated[Path | None, typer.Option(help="Folder of identity, certificates and logs.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Who uses it: a person, a program, a machine.")]


def _store(home: Path | None) -> KeyStore:
    return KeyStore(key_folder(load_settings({"home": home}, os.environ).home), utc_now)


@keys_app.command()
def add(
    name: Name,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long it works, as in 12h, 30d, 8w; default: until revoked.")
    ] = None,
    home: Home = None,
) -> None:
    """Make a key and print it: this once, as only its hash is kept."""
    key = _store(home).issue(name, None if expires is None else lifetime(expires))
    print(f"dwarfstar: this is the key of {name}; it cannot be shown again:", file=sys.stderr)
    print(key)


@keys_app.command(name="list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: Home = None,
) -> None:
    """The keys there are."""
    keys, now = _store(home).read().keys, utc_now()
    if as_json:
        print(json.dumps([_facts(key, now) for key in keys], indent=2))
        return
    if not keys:
        print("no API keys: `dwarfstar key add NAME` makes one")
        return
    width = max(4, *(len(key.name) for key in keys))
    print(f"{'name':{width}}  {'ends in':8}{'made':12}{'works until':18}last used")
    for key in keys:
        until = "revoked" if key.expires is None else f"{key.expires.astimezone(UTC):%Y-%m-%d %H:%M}"
        used = "never" if key.used is None else key.used.isoformat()
        over = "  (ended)" if key.ended(now) else ""
        print(f"{key.name:{width}}  {key.last:8}{key.created.astimezone(UTC):%Y-%m-%d}  {until:18}{used}{over}")


@keys_app.command()
def revoke(name: Name, home: Home = None) -> None:
    """Withdraw a key: a running engine refuses it within a second."""
    _store(home).revoke(name)
    print(f"dwarfstar: {name} is withdrawn")


def _facts(key: ApiKey, now: datetime) -> dict[str, str | bool | None]:
    return {
        "name": key.name,
        "last_four": key.last,
        "created": key.created.isoformat(),
        "expires": key.expires.isoformat() if key.expires else None,
        "expired": key.ended(now),
        "last_used": key.used.isoformat() if key.used else None,
    }
