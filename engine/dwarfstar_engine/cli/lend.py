"""``dwarfstar node``: this machine as a node of somebody's cluster.

It joins once, with a token, at the coordinator it finds in the network or at an address given. What comes of that
stands in ``HOME/member``: the node's key, which names it, its certificate, and where the coordinator was; from then on
``dwarfstar node`` needs neither, and finds the coordinator again also when that has moved. That folder is not
``HOME/trust``, which holds the CA of the cluster that this machine may itself coordinate: it can do both. To leave a
cluster, remove the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import tomllib
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.cli.standby import standing_by
from dwarfstar_engine.errors import DwarfStarError, PeerError, SettingsError, TrustError
from dwarfstar_engine.node.admission import Admission
from dwarfstar_engine.node.bandwidth import known_gb_s
from dwarfstar_engine.node.daemon import NodeDaemon
from dwarfstar_engine.node.discovery import Finder, Fixed, find_joining
from dwarfstar_engine.node.facts import (
    default_threads,
    is_loopback,
    local_host,
    measure,
    outward_host,
    reached_host,
    shown_host,
)
from dwarfstar_engine.node.gossip import MAX_TEXT, Peer
from dwarfstar_engine.node.kept import Kept
from dwarfstar_engine.node.lead import Lead
from dwarfstar_engine.node.led import Led
from dwarfstar_engine.node.source import find_model
from dwarfstar_engine.node.stages import NodeOptions
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
TYPED_S = 10.0  # for several addresses given by hand: one of them answers within it, or they are wrong
RESOLVE_S = 10.0  # for the coordinator's name
AGAIN_S = 1.0  # before the search begins anew, when joining failed at what was found
ANY = "0.0.0.0"  # noqa: S104 - all addresses, in the place of none given
CONTROL_PORT: int = Settings.model_fields["control_port"].default


class Membership(BaseModel):
    """``member/node.toml``. join: the address this machine joined at; coordinator: the one it attaches to; token: the
    hash of the secret it joined with last."""

    model_config = ConfigDict(frozen=True)

    join: str = Field(max_length=300)
    coordinator: str = Field(max_length=300)
    token: str = Field(default="", max_length=64)


async def lend(
    settings: Settings,
    join: Sequence[str],
    token: str | None,
    attach: str | None,
    cpus: tuple[int, ...],
    *,
    watch_parent: bool,
    timeout_s: float | None = None,
    ram_gb_s: float = 0.0,
    cores: int = 0,
) -> None:
    """Be a node until SIGINT or SIGTERM. ``attach``: a coordinator that has put a certificate into HOME/trust itself.

    join: addresses given by hand; without any, the coordinator is looked for. timeout_s: how long, at most. ram_gb_s,
    cores: of this machine, where somebody has looked already.
    Raises SettingsError, TrustError, PeerError (nobody there to join), VersionMismatch, ModelError (its own file).
    """
    joins = tuple(join_address(one) for one in join)
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
        finder = Fixed(attach) if attach else await _member(files, settings, joins, token, timeout_s)
        if not files.exists():
            raise TrustError(f"{files.folder} holds no certificate: join with the line that `dwarfstar token` prints.")
        identity = files.load()
        check_identity(identity, utc_now())
        listen = _listen(settings, local=attach is not None)
        if (
            settings.can_lead and not listen and isinstance(finder, Finder)
        ):  # the same whoever leads, or stages would have to move
            listen = await local_host(finder.last, RESOLVE_S)
        options = NodeOptions(
            name=settings.name or socket.gethostname(),
            listen=listen,
            models=settings.models_dir,
            trust=files,
            facts=measure(
                settings.effective_vram, ram_gb_s or await asyncio.to_thread(known_gb_s, settings.home), cores
            ),
            threads=settings.threads or default_threads(1),
            cpus=cpus,
            gpu_layers=settings.gpu_layers,
            split_mode=settings.split_mode,
            file=find_model(settings.model, settings.models_dir) if settings.model else None,
        )
        daemon = NodeDaemon(certificate_node_id(identity.certificate_pem), options)
        await _until_stopped(daemon, _run(settings, files, options, finder, daemon), watch_parent, settings.drain_s)


async def _run(
    settings: Settings, files: NodeFiles, options: NodeOptions, finder: Fixed | Finder, daemon: NodeDaemon
) -> None:
    """Lend this machine. Local nodes belong to their engine; others follow whoever leads, and may lead themselves."""
    me = daemon.id
    if isinstance(finder, Fixed):
        await daemon.run(finder)
        return
    work = asyncio.current_task()
    assert work is not None
    async with contextlib.AsyncExitStack() as stack:
        others: list[asyncio.Task[None]] = []
        if settings.can_lead:
            standing = standing_by(settings, files, me, options.name, options.listen, finder, lambda: _stop(work))
            where, lead, others = await stack.enter_async_context(standing)
            daemon.control_port = lead.own_peer().control_port
        else:
            peer = Peer(id=me, name=options.name[:MAX_TEXT], hosts=())
            lead = Lead(me, files, Kept(files.folder / "lead"), lambda: peer, find=finder.coordinator)
            where = Led(lead, str, finder)
        tasks = [asyncio.create_task(daemon.run(where)), asyncio.create_task(lead.run())]
        try:
            done, _ = await asyncio.wait([*tasks, *others], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _stop(work: asyncio.Task[Any]) -> None:
    work.cancel()


async def _until_stopped(
    daemon: NodeDaemon, running_node: Coroutine[Any, Any, None], watch_parent: bool, drain_s: float
) -> None:
    """Run until a signal. SIGTERM lets the layers move away first, for ``drain_s`` at most; a second one does not."""
    work = asyncio.create_task(running_node, name="node")
    loop = asyncio.get_running_loop()
    leaving: list[asyncio.Task[None]] = []

    def terminate() -> None:
        if leaving or not drain_s:
            work.cancel()
        else:
            leaving.append(asyncio.create_task(daemon.leave(drain_s), name="leave"))
            leaving[0].add_done_callback(lambda _: work.cancel())

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            with contextlib.suppress(NotImplementedError):  # Windows: the default handlers end the process
                loop.add_signal_handler(getattr(signal, name), terminate if name == "SIGTERM" else work.cancel)
    if watch_parent:
        loop.add_reader(sys.stdin.fileno(), _on_parent, work)
    with contextlib.suppress(asyncio.CancelledError):
        await work


def _on_parent(work: asyncio.Task[None]) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        work.cancel()


# --- membership ------------------------------------------------------------------------------------------------------


def join_address(text: str) -> str:
    """ "host:port" of what a user gives as HOST or HOST:PORT. Raises TrustError."""
    try:
        bare = str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        if ":" not in text and text:
            return f"{text}:{join_port(CONTROL_PORT)}"
        split_address(text)
        return text
    return f"{shown_host(bare)}:{join_port(CONTROL_PORT)}"


async def _member(
    files: NodeFiles, settings: Settings, joins: tuple[str, ...], token_text: str | None, timeout_s: float | None
) -> Finder:
    """The way to the coordinator; joins first if that is asked for and not done yet. Raises as ``lend`` does."""
    known = _read_membership(files)
    finder = Finder(files, settings.discovery, timeout_s=timeout_s, last=known.coordinator if known else "")
    if token_text is None:
        if known is None:
            raise SettingsError(
                "this machine is in no cluster yet: run `dwarfstar token` on the coordinator's machine, "
                "and here the line it prints"
            )
        finder.typed = tuple(at for one in joins if one != known.join for at in _control_addresses(one))
        return finder
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
        same = (
            known is not None and known.token == secret_hash(token.secret) and all(one == known.join for one in joins)
        )
        if same and not renewal_due(identity.certificate_pem, utc_now()):
            return finder  # the same line again, from the shell's history
    if not joins and not settings.discovery:
        raise SettingsError(
            "discovery is turned off, so --token needs the coordinator's address as well: --join HOST:PORT"
        )
    join, coordinator = await _join(files, settings, joins, token, timeout_s)
    membership = Membership(join=join, coordinator=coordinator, token=secret_hash(token.secret))
    replace_file(files.folder / "node.toml", tomli_w.dumps(membership.model_dump()).encode())
    log.info("joined the cluster at %s; from now on `dwarfstar node` is enough", join)
    finder.first = finder.last = coordinator
    return finder


async def _join(
    files: NodeFiles, settings: Settings, joins: tuple[str, ...], token: JoinToken, timeout_s: float | None
) -> tuple[str, str]:
    """Join at one of the addresses, or where the cluster is found: (that address, the one to attach to).

    An address typed wrongly is said at once; a coordinator that is looked for may start later.
    """
    name = settings.name or socket.gethostname()
    while True:
        if len(joins) == 1 and timeout_s is None:
            address = joins[0]
        else:
            limit_s = timeout_s if timeout_s is not None or not joins else TYPED_S
            address = await find_joining(token, joins, settings.discovery and not joins, limit_s)
        try:
            return address, await join_cluster(address, token, files.key_id(), name, files, utc_now())
        except TrustError:
            raise
        except PeerError as error:
            if joins or timeout_s is not None:
                raise
            log.warning("%s Searching on.", error.message)
        await asyncio.sleep(AGAIN_S)


def _control_addresses(join: str) -> tuple[str, ...]:
    """Where the coordinator may be whose join address this is; or it is the control address itself."""
    host, port = split_address(join)
    return tuple(f"{shown_host(host)}:{number}" for number in (port - 1, port) if number)


def _read_membership(files: NodeFiles) -> Membership | None:
    path = files.folder / "node.toml"
    if not path.exists():
        return None
    try:
        return Membership.model_validate(tomllib.loads(read_public(path, MAX_MEMBERSHIP_BYTES).decode("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError):
        raise TrustError(f"{path} is damaged: remove it, and join again with a new token.") from None


def _listen(settings: Settings, *, local: bool) -> str:
    """Where the stages listen: what the user says, else "" for the address this machine has towards the coordinator."""
    if "control_host" not in settings.model_fields_set:
        return ""
    host = settings.control_host.strip("[]")
    if is_loopback(host) and not local:
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
    found = engine.discovery if engine is not None else _will_be_found(settings)
    folder = settings.home / "trust"
    authority = load_or_create_authority(folder, utc_now())
    token = TokenStore(folder, utc_now).issue(authority, hours, uses)
    machines = "any number of machines" if uses is None else "one machine" if uses == 1 else f"{uses} machines"
    notes = [f"run this on the machine that joins; it lets in {machines} within {hours:g} hours:"]
    if engine is None:
        notes.append("no engine runs from here yet: start it before the other machine joins")
    if found:
        notes.append(f"if it does not find this machine, which it says within seconds, add --join {address}")
        return f"dwarfstar node --token {token.format()}", notes
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


def _will_be_found(settings: Settings) -> bool:
    """Whether an engine started with these settings tells the network of itself."""
    return settings.discovery and not (
        "control_host" in settings.model_fields_set and is_loopback(settings.control_host)
    )


def _future_address(settings: Settings) -> str:
    """Where the engine will let machines join, once it runs with these settings. Raises SettingsError."""
    port = join_port(settings.control_port)
    if port == 0:
        raise SettingsError("the control port is chosen when the engine starts: start it, then make the token")
    return f"{shown_host(reached_host(ANY if _will_be_found(settings) else settings.control_host))}:{port}"
