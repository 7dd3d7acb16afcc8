"""Assembles and runs an engine: coordinator, its node or local nodes, HTTP, until asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import grpc.aio

from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.api.server import http_server
from dwarfstar_engine.cli import running, telling
from dwarfstar_engine.cli.door import Door, open_door
from dwarfstar_engine.cluster.candidates import MAX_HOSTS, Advert, Interface
from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.node import renewal
from dwarfstar_engine.node.admission import Admission
from dwarfstar_engine.node.control import ControlService
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.daemon import NodeDaemon, NodeOptions
from dwarfstar_engine.node.discovery import cluster_id
from dwarfstar_engine.node.drafter import Drafter, DraftOptions
from dwarfstar_engine.node.facts import (
    GIB,
    cores,
    default_threads,
    interfaces,
    is_any,
    is_loopback,
    measure,
    reached_host,
)
from dwarfstar_engine.node.gossip import Peer
from dwarfstar_engine.node.local import LocalNode
from dwarfstar_engine.node.mdns import Advertiser, instance
from dwarfstar_engine.node.needs import kv_cells, reserve_bytes
from dwarfstar_engine.node.source import DEFAULT_CONTEXT, Source, find_model, open_source
from dwarfstar_engine.node.vocab import ProcessVocab, ToyVocab, Vocab
from dwarfstar_engine.plan.proportional import Capacity, Need, with_cuts
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.stage.fingerprint import fingerprint
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire import door as ports
from dwarfstar_engine.wire.enrol import Enrolment, join_port, serve_enrolment
from dwarfstar_engine.wire.generated.control_pb2_grpc import add_ControlServicer_to_server
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.trust import (
    OWNER,
    Authority,
    NodeFiles,
    certificate_node_id,
    issue_local,
    load_or_create_authority,
    utc_now,
)
from dwarfstar_engine.wire.trust import fingerprint as authority_fingerprint

log = logging.getLogger("dwarfstar")

DEMO_NODES = 3
DEMO_SHARE = 0.5  # of the whole model's memory that each demo node lends: one is not enough, three are


@dataclass(frozen=True, slots=True)
class Start:
    """What to run. local_nodes 0: this process is the one node. pin: one core for each local node."""

    model: str
    local_nodes: int = 0
    demo: bool = False
    pin: bool = False


async def serve(start: Start, settings: Settings, out: TextIO = sys.stderr) -> None:
    """Run an engine until SIGINT, SIGTERM or ``dwarfstar stop``. Raises DwarfStarError if it cannot start."""
    with running.claim(settings.home):
        await _serve(start, settings, _sayer(out))


async def _serve(start: Start, settings: Settings, say: Callable[[str], None]) -> None:
    started = time.monotonic()
    source = open_source(start.model, settings.models_dir, settings.kv)
    _check_cuts(source, settings.cuts)
    local = start.local_nodes or (DEMO_NODES if start.demo else 0)
    settings = settings.model_copy(
        update={
            "wait_nodes": max(settings.wait_nodes, local, len(settings.cuts) + 1 if settings.cuts else 0),
            "control_host": _control_host(settings, local),
        }
    )
    found = settings.discovery and not is_loopback(settings.control_host)
    lent_gib = _lent_gib(start, settings, source)
    for line in telling.opening(source, settings, local, lent_gib):
        say(line)
    listener = _bind(settings.host, settings.port, "")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        door = open_door(settings, listener.getsockname(), utc_now())
        for line in door.notes:
            say(line)
        stopping = asyncio.Event()
        _on_signals(stopping.set)
        pinned = _pin(start.pin, local)
        authority = load_or_create_authority(settings.home / "trust", utc_now())
        lifetime = timedelta(hours=settings.certificate_hours)
        admission = Admission(authority, settings.home / "trust", utc_now, lifetime)
        trust = NodeFiles(settings.home / "trust")
        issue_local(authority, trust, OWNER, utc_now(), lifetime)
        vocab = await _open_vocab(source)
        coordinator = Coordinator(settings, source, vocab, trust, OWNER)
        stack.push_async_callback(lambda: coordinator.vocab.close())
        coordinator.fallbacks = tuple(open_source(name, settings.models_dir, settings.kv) for name in settings.fallback)
        coordinator.open_vocab = _open_vocab
        coordinator.drafter = await _open_drafter(coordinator, vocab, settings)
        if coordinator.drafter is not None:
            stack.push_async_callback(coordinator.drafter.close)
        control = await _control(coordinator, admission, settings, trust, stopping.set)
        stack.push_async_callback(control.stop, 0.5)
        joining, join = await _joining(admission, trust, settings, coordinator.address)
        stack.push_async_callback(joining.stop, 0.5)
        stack.callback(running.withdraw, settings.home)
        coordinator.api_url = door.url
        # On this machine by loopback, where it listens there: the outward address may change.
        own = f"127.0.0.1:{_port(coordinator.address)}" if is_any(settings.control_host) else coordinator.address
        running.announce(settings.home, own, door.url, join, door.certificate, found)
        nodes = _local_nodes(local, pinned, settings, lent_gib, coordinator.address, admission)
        for node in nodes:
            stack.push_async_callback(node.stop)
            await node.start()
        tasks = [asyncio.create_task(coordinator.run(), name="coordinator")]
        if not local:
            _issue_own(settings, admission)
            tasks.append(asyncio.create_task(_own_node(settings, own), name="node"))
        advertiser = _advertiser(coordinator, authority, settings, _port(join))
        if found:
            tasks.append(asyncio.create_task(advertiser.run(), name="adverts"))
        renew = renewal.by_authority(authority, lifetime, utc_now)
        for files in renewal.own_files(settings.home):
            renewing = renewal.keep_renewed(files, renew, utc_now, random.random)
            tasks.append(asyncio.create_task(renewing, name="renewal"))
        stack.push_async_callback(_cancel, tasks)
        http = asyncio.create_task(_http(coordinator, listener, settings, door, stopping), name="http")
        teller = asyncio.create_task(telling.tell(coordinator, say, started, settings.home, door.curl))
        stack.push_async_callback(_cancel, [teller])
        stopped = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([stopped, http, *tasks], return_when=asyncio.FIRST_COMPLETED)
        await _cancel([teller])
        say("stopping")
        stopping.set()
        await http
        for task in done:
            task.result()


def _control_host(settings: Settings, local: int) -> str:
    """Where other nodes reach this machine: everywhere, if it is to be found. All of it is mutual TLS."""
    if "control_host" in settings.model_fields_set or local or not settings.discovery:
        return settings.control_host
    return "0.0.0.0"  # noqa: S104


def _advertiser(coordinator: Coordinator, authority: Authority, settings: Settings, enrol_port: int) -> Advertiser:
    """What tells the network, and the members for one another, where this coordinator is."""
    build, everywhere = local_build(), is_any(settings.control_host)
    name = settings.name or socket.gethostname()
    cluster = cluster_id(authority_fingerprint(authority.certificate_pem))
    port = _port(coordinator.address)

    def advert() -> Advert:
        return Advert(
            instance=instance(cluster, OWNER),
            cluster=cluster,
            name=name,
            hosts=() if everywhere else (settings.control_host.strip("[]"),),
            enrol_port=enrol_port,
            control_port=port,
            term=coordinator.term,
            protocol=build.protocol,
            version=build.version,
        )

    def seen(here: tuple[Interface, ...]) -> None:
        hosts = tuple(one.host for one in here) if everywhere else advert().hosts
        own = Peer(id=OWNER, name=name, hosts=hosts[:MAX_HOSTS], control_port=port, coordinator=True)
        if own != coordinator.gossip.own:
            coordinator.gossip.changed(own)

    seen(interfaces())
    return Advertiser(advert, seen=seen)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _check_cuts(source: Source, cuts: Sequence[int]) -> None:
    """Raises IllegalCutError now rather than when the nodes are there."""
    boundless = [Capacity(str(index), sys.maxsize) for index in range(len(cuts) + 1)]
    with_cuts(source.costs, source.cuts, Need(cells=0, reserve_bytes=0), boundless, cuts)


def _lent_gib(start: Start, settings: Settings, source: Source) -> float | None:
    """What each local node lends: what was asked for; in the demo, too little for the whole model; else its share."""
    if settings.effective_vram is not None:
        return settings.effective_vram
    if not start.demo:
        return measure(None).usable_bytes / start.local_nodes / GIB if start.local_nodes else None
    context = min(settings.context or DEFAULT_CONTEXT, source.train_context)
    kv = kv_cells(settings, context) * sum(source.costs.kv_bytes_per_token)
    whole = sum(source.costs.layer_bytes) + source.costs.head_bytes + kv
    return (whole * DEMO_SHARE + reserve_bytes(source, settings)) / GIB


def _sayer(out: TextIO) -> Callable[[str], None]:
    def say(text: str) -> None:
        # A command to copy stands alone on its line.
        print(text if text.startswith("curl ") else f"dwarfstar: {text}", file=out, flush=True)

    return say


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int, prefix: str) -> socket.socket:
    """A listening socket. Raises SettingsError naming the option, ``--{prefix}host`` or ``--{prefix}port``."""
    option = f"--{prefix}host"
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and is_any(host) and socket.has_dualstack_ipv6()  # as the address says
        return socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=both)
    except OSError as error:
        code, problem = "bad_host", (error.strerror or str(error)).split(" (", 1)[0]
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            option, code = f"--{prefix}port", "port_taken"
            problem = "another program has it" if error.errno == errno.EADDRINUSE else "permission denied"
        raise SettingsError(
            f"cannot listen on {_shown_host(host)}:{port} ({problem}): choose another with {option}", code=code
        ) from None


def _on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            with contextlib.suppress(NotImplementedError):  # Windows: the default handlers end the process
                loop.add_signal_handler(getattr(signal, name), stop)


async def _open_drafter(coordinator: Coordinator, vocab: Vocab, settings: Settings) -> Drafter | None:
    """The draft model, if one is asked for. Raises ModelError if it does not suit the model served."""
    if settings.draft_model is None or settings.speculation == "off":
        return None
    path = find_model(settings.draft_model, settings.models_dir)
    options = DraftOptions(coordinator.context, settings.slots, threads=settings.threads or 1)
    ours = fingerprint(vocab.piece(token) for token in range(vocab.size))
    drafter = Drafter(path, coordinator.source.name, ours, options)
    await drafter.start()
    return drafter


async def _open_vocab(source: Source) -> Vocab:
    if source.toy:
        return ToyVocab()
    vocab = ProcessVocab(Path(source.path))
    await vocab.start()
    return vocab


async def _control(
    coordinator: Coordinator,
    admission: Admission,
    settings: Settings,
    trust: NodeFiles,
    on_stop: Callable[[], None],
) -> grpc.aio.Server:
    """The control and data plane's server. Raises SettingsError if its port is taken."""
    # gRPC would say why it cannot listen in a log line of its own; a plain socket tells us.
    _bind(settings.control_host, settings.control_port, "control-").close()
    watch = ports.Watch()
    door = ports.Door(admission.refusal, watch.called)
    server = grpc.aio.server(options=channel.SERVER_OPTIONS, interceptors=(door,))
    server.add_generic_rpc_handlers((coordinator.receiver.handler(),))
    add_ControlServicer_to_server(ControlService(coordinator, admission, on_stop), server)
    host = _shown_host(settings.control_host)
    try:
        credentials = channel.server_credentials(trust, watch.handshake)
        port = server.add_secure_port(f"{host}:{settings.control_port}", credentials)
    except RuntimeError:
        raise SettingsError(
            f"cannot listen on {host}:{settings.control_port}: choose another with --control-port", code="port_taken"
        ) from None
    watch.watch(port)
    await server.start()
    coordinator.address = f"{_shown_host(reached_host(settings.control_host))}:{port}"
    return server


async def _joining(
    admission: Admission, trust: NodeFiles, settings: Settings, control: str
) -> tuple[grpc.aio.Server, str]:
    """The server that lets machines join, and its address. Raises SettingsError if its port is taken."""
    host, _, control_port = control.rpartition(":")
    service = Enrolment(admission.authority, admission.join, f":{control_port}", utc_now, admission.lifetime)
    wanted = join_port(settings.control_port)
    server, port = await serve_enrolment(service, _shown_host(settings.control_host), wanted, trust)
    return server, f"{host}:{port}"


def _pin(wanted: bool, nodes: int) -> tuple[int, ...]:
    """A core for each local node's stage, if there are enough; this process keeps to the others.

    Without others it shares the last stage's, which is idle when the engine has the most to do: a token just came.
    """
    free = cores()
    if not wanted or not nodes or len(free) < nodes or not hasattr(os, "sched_setaffinity"):
        return ()
    os.sched_setaffinity(0, set(free[nodes:] or free[nodes - 1 :]))
    return tuple(free[:nodes])


def _local_nodes(
    count: int, pinned: tuple[int, ...], settings: Settings, lent_gib: float | None, address: str, admission: Admission
) -> list[LocalNode]:
    """Node processes on this machine, each with a home, a certificate and a share of the cores of its own."""
    nodes = []
    for index in range(count):
        home = settings.home / "local" / f"node{index + 1}"
        files = NodeFiles(home / "trust")
        issue_local(admission.authority, files, f"local-{index + 1}", utc_now(), admission.lifetime)
        nodes.append(
            LocalNode(
                name=f"node{index + 1}",
                home=home,
                coordinator=address,
                threads=settings.threads or default_threads(count),
                effective_vram=lent_gib,
                cpus=pinned[index : index + 1],
                models=settings.models_dir,
            )
        )
    return nodes


def _issue_own(settings: Settings, admission: Admission) -> None:
    """A certificate for this process as the coordinator's node."""
    files = NodeFiles(settings.home / "node" / "trust")
    node_id = certificate_node_id(files.load().certificate_pem) if files.exists() else f"own-{secrets.token_hex(4)}"
    issue_local(admission.authority, files, node_id, utc_now(), admission.lifetime)


async def _own_node(settings: Settings, address: str) -> None:
    """This process as the coordinator's node."""
    files = NodeFiles(settings.home / "node" / "trust")
    options = NodeOptions(
        name=settings.name or socket.gethostname(),
        listen=settings.control_host,
        models=settings.models_dir,
        trust=files,
        facts=measure(settings.effective_vram),
        threads=settings.threads or default_threads(1),
        gpu_layers=settings.gpu_layers,
        split_mode=settings.split_mode,
    )
    await NodeDaemon(certificate_node_id(files.load().certificate_pem), options).run(address)


async def _http(
    coordinator: Coordinator, listener: socket.socket, settings: Settings, door: Door, stopping: asyncio.Event
) -> None:
    app = create_app(
        coordinator,
        gate=door.gate,
        health_details=not door.public,
        max_body_bytes=settings.max_body_mib << 20,
        request_timeout_s=settings.request_timeout_s,
    )
    server = http_server(app, door.tls)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server._serve([listener]))
    await stopping.wait()
    server.should_exit = True
    await serving


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
