"""``dwarfstar node``: this machine as a node of somebody's cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

from dwarfstar_engine.errors import SettingsError, TrustError
from dwarfstar_engine.node.daemon import NodeDaemon, NodeOptions
from dwarfstar_engine.node.facts import default_threads, measure
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.trust import NodeFiles, certificate_node_id, check_identity, utc_now


async def lend(
    settings: Settings,
    join: str | None,
    token: str | None,
    attach: str | None,
    cpus: tuple[int, ...],
    *,
    watch_parent: bool,
) -> None:
    """Be a node until SIGINT or SIGTERM. ``attach``: a coordinator whose certificate this home has already.

    Raises SettingsError, TrustError, VersionMismatch.
    """
    address = attach or join
    if not address:
        raise SettingsError("give the coordinator's address: dwarfstar node --join HOST:PORT --token TOKEN")
    files = NodeFiles(settings.home / "trust")
    if token is not None:
        raise SettingsError("joining with a token is not there yet")
    if not files.exists():
        raise TrustError(f"{settings.home} holds no certificate of that cluster: give its join token with --token")
    identity = files.load()
    check_identity(identity, utc_now())
    options = NodeOptions(
        name=settings.name or socket.gethostname(),
        listen=settings.control_host,
        models=settings.models_dir,
        trust=files,
        facts=measure(settings.effective_vram),
        threads=settings.threads or default_threads(1),
        cpus=cpus,
        gpu_layers=settings.gpu_layers,
        split_mode=settings.split_mode,
    )
    work = asyncio.create_task(NodeDaemon(certificate_node_id(identity.certificate_pem), options).run(address))
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, work.cancel)
    if watch_parent:
        loop.add_reader(sys.stdin.fileno(), _on_parent, work)
    with contextlib.suppress(asyncio.CancelledError):
        await work


def _on_parent(work: asyncio.Task[None]) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        work.cancel()


def new_join_token(home: Path) -> str:
    raise SettingsError("joining with a token is not there yet")
