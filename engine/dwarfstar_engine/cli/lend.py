"""``dwarfstar node``: this machine as a node of somebody's cluster.

It joins once, with a token. What comes of that stands in ``HOME/member``: the node's key, which names it, its
certificate, and the coordinator's address; from then on ``dwarfstar node`` needs neither. That folder is not
``HOME/trust``, which holds the CA of the cluster that this machine may itself coordinate: it can do both. To leave a
cluster, remove the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tomllib
from datetime import timedelta
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.errors import DwarfStarError, SettingsError, TrustError
from dwarfstar_engine.node.admission import Admission
from dwarfstar_engine.node.daemon import NodeDaemon, NodeOptions
from dwarfstar_engine.node.facts import default_threads, is_loopback, measure, outward_host, reached_host, shown_host
from dwarfstar_engine.node.tokens import TokenStore
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.enrol import join as join_cluster
from dwarfstar_engine.wire.enrol import join_port, split_address
from dwarfstar_engine.wire.private_files import locked, read_public, replace_file
from dwarfstar_engine.wire.trust import (
    JoinToken,
    NodeFiles,
    certificate_node_id,
    check_fingerprint,
    check_identity,
    load_or_create_authority,
    renewal_due,
    secret_hash,
    utc_now,
)

log = logging.getLogger("dwarfstar.node")

MAX_MEMBERSHIP_BYTES = 4096


class Membership(BaseModel):
    """``member/node.toml``. join: the address this machine joined at; coordinator: the one it attaches to; token: the
    hash of the secret it joined with last."""

    model_config = ConfigDict(frozen=True)

    join: str = Field(max_length=300)
    coordinator: str = Field(max_length=300)
    token: str = Field(default="", max_length=64)


async def lend(
    settings: Settings,
    join: str | None,
    token: str | None,
    attach: str | None,
    cpus: tuple[int, ...],
    *,
    watch_parent: bool,
) -> None:
    """Be a node until SIGINT or SIGTERM. ``attach``: a coordinator that has put a certificate into HOME/trust itself.

    Raises SettingsError, TrustError, PeerError (nobody there to join), VersionMismatch.
    """
    files = NodeFiles(settings.home / ("trust" if attach else "member"))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(files.folder / "node.lock", 0.0))
        except TrustError as error:
            if error.code != "locked":
                raise
            raise DwarfStarError(
                f"a node runs from {settings.home} already: stop that one, or give another --home",
                code="already_running",
            ) from None
        address = attach or await _member(files, settings, join, token)
        if not files.exists():
            raise TrustError(f"{files.folder} holds no certificate: join with the line that `dwarfstar token` prints.")
        identity = files.load()
        check_identity(identity, utc_now())
        options = NodeOptions(
            name=settings.name or socket.gethostname(),
            listen=_listen(settings, address),
            models=settings.models_dir,
            trust=files,
            facts=measure(settings.effective_vram),
            threads=settings.threads or default_threads(1),
            cpus=cpus,
            gpu_layers=settings.gpu_layers,
            split_mode=settings.split_mode,
        )
        await _until_stopped(NodeDaemon(certificate_node_id(identity.certificate_pem), options), address, watch_parent)


async def _until_stopped(daemon: NodeDaemon, address: str, watch_parent: bool) -> None:
    work = asyncio.create_task(daemon.run(address), name="node")
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            with contextlib.suppress(NotImplementedError):  # Windows: the default handlers end the process
                loop.add_signal_handler(getattr(signal, name), work.cancel)
    if watch_parent:
        loop.add_reader(sys.stdin.fileno(), _on_parent, work)
    with contextlib.suppress(asyncio.CancelledError):
        await work


def _on_parent(work: asyncio.Task[None]) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        work.cancel()


# --- membership ------------------------------------------------------------------------------------------------------


async def _member(files: NodeFiles, settings: Settings, join: str | None, token_text: str | None) -> str:
    """The coordinator's address; joins first if that is asked for and not done yet. Raises as ``lend`` does."""
    known = _read_membership(files)
    if token_text is None:
        if known is None:
            raise SettingsError(
                "this machine is in no cluster yet: run `dwarfstar token` on the coordinator's machine, "
                "and here the line it prints"
            )
        if join is not None and join not in (known.join, known.coordinator):
            raise SettingsError(
                f"this machine joined at {known.join}: to move to {join} give a join token of there with --token, "
                "or leave --join out"
            )
        return known.coordinator
    if join is None:
        raise SettingsError("--token needs the coordinator's address as well: --join HOST:PORT")
    token = JoinToken.parse(token_text)
    if files.exists():
        identity = files.load()
        try:
            check_fingerprint(token, identity.ca_pem)
        except TrustError:
            where = f" (its coordinator is {known.coordinator})" if known else ""
            raise TrustError(
                f"This machine is in another cluster already{where}: to leave that, remove {files.folder}; "
                "or use another --home.",
                code="other_cluster",
            ) from None
        same = known is not None and (known.join, known.token) == (join, secret_hash(token.secret))
        if known is not None and same and not renewal_due(identity.certificate_pem, utc_now()):
            return known.coordinator  # the same line again, from the shell's history
    split_address(join)
    coordinator = await join_cluster(
        join, token, files.key_id(), settings.name or socket.gethostname(), files, utc_now()
    )
    membership = Membership(join=join, coordinator=coordinator, token=secret_hash(token.secret))
    replace_file(files.folder / "node.toml", tomli_w.dumps(membership.model_dump()).encode())
    log.info("joined the cluster at %s; from now on `dwarfstar node` is enough", join)
    return coordinator


def _read_membership(files: NodeFiles) -> Membership | None:
    path = files.folder / "node.toml"
    if not path.exists():
        return None
    try:
        return Membership.model_validate(tomllib.loads(read_public(path, MAX_MEMBERSHIP_BYTES).decode("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError):
        raise TrustError(f"{path} is damaged: remove it, and join again with a new token.") from None


def _listen(settings: Settings, coordinator: str) -> str:
    """Where the stages listen: what the user says, else "" for the address this machine has towards the coordinator."""
    if "control_host" not in settings.model_fields_set:
        return ""
    host = settings.control_host.strip("[]")
    if is_loopback(host) and not is_loopback(split_address(coordinator)[0]):
        raise SettingsError(
            f"other machines cannot reach {host}: leave --listen out, or give an address that this machine has "
            "in the coordinator's network"
        )
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} ({error.strerror}): give --listen an address of this machine, or leave it out"
        ) from None
    return host


# --- tokens ----------------------------------------------------------------------------------------------------------


def new_join_token(settings: Settings, hours: float, uses: int | None) -> tuple[str, list[str]]:
    """Make a token. The command to run on the machine that joins, and what its user should know besides.

    Raises SettingsError, TrustError.
    """
    engine = running.find(settings.home)
    address = engine.join if engine is not None and engine.join else _future_address(settings)
    folder = settings.home / "trust"
    authority = load_or_create_authority(folder, utc_now())
    token = TokenStore(folder, utc_now).issue(authority, hours, uses)
    machines = "any number of machines" if uses is None else "one machine" if uses == 1 else f"{uses} machines"
    notes = [f"run this on the machine that joins; it lets in {machines} within {hours:g} hours:"]
    if engine is None:
        notes.append("no engine runs from here yet: start it before the other machine joins")
    if is_loopback(split_address(address)[0]):
        example = shown_host(outward_host() or "ADDRESS-OF-THIS-MACHINE")
        notes.append(
            f"only this machine can reach {address}: so that others can, start the engine with --control-host {example}"
            " and make the token again"
        )
    return f"dwarfstar node --join {address} --token {token.format()}", notes


def list_tokens(settings: Settings) -> list[dict[str, Any]]:
    """The join tokens of this home's cluster, oldest first, without their secrets. Raises TrustError."""
    now = utc_now()
    return [
        {
            "id": token.id,
            "state": token.state(now),
            "created": f"{token.created:%Y-%m-%dT%H:%M:%SZ}",
            "expires": f"{token.expires:%Y-%m-%dT%H:%M:%SZ}",
            "uses": token.uses,
            "used": None if token.uses is None else len(token.nodes),
        }
        for token in TokenStore(settings.home / "trust", utc_now).list()
    ]


def tokens_text(tokens: list[dict[str, Any]]) -> str:
    """The same for people."""
    if not tokens:
        return "no join tokens: `dwarfstar token` makes one"
    lines = [f"{'id':10}{'state':9}{'ends (UTC)':18}{'machines':>10}"]
    for token in tokens:
        machines = "any" if token["uses"] is None else f"{token['used']} of {token['uses']}"
        ends = token["expires"][:16].replace("T", " ")
        lines.append(f"{token['id']:10}{token['state']:9}{ends:18}{machines:>10}")
    return "\n".join(lines)


def revoke_token(settings: Settings, token_id: str) -> None:
    """Let nobody in with this token any more. Raises TrustError."""
    TokenStore(settings.home / "trust", utc_now).revoke(token_id)


def remove_node(settings: Settings, wanted: str) -> str:
    """Remove a node, called by name or id, from this home's cluster; what came of it. Raises DwarfStarError."""
    engine = running.find(settings.home)
    if engine is not None:
        node_id, name, attached = remote.remove_node(engine, settings.home, wanted)
    else:
        folder = settings.home / "trust"
        if not (folder / "authority.pem").exists():
            raise TrustError(f"no cluster is coordinated from {settings.home}: run this where its engine runs")
        lifetime = timedelta(hours=settings.certificate_hours)
        admission = Admission(load_or_create_authority(folder, utc_now()), folder, utc_now, lifetime)
        (node_id, name), attached = admission.remove(wanted), False
    ending = "it was told, and ends" if attached else "it is not here now, and will be refused"
    return f"removed {name} ({node_id}): {ending}"


def _future_address(settings: Settings) -> str:
    """Where the engine will let machines join, once it runs with these settings. Raises SettingsError."""
    port = join_port(settings.control_port)
    if port == 0:
        raise SettingsError("the control port is chosen when the engine starts: start it, then make the token")
    return f"{shown_host(reached_host(settings.control_host))}:{port}"
