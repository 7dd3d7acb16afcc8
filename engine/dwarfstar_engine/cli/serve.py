"""Assembles and runs an engine: coordinator, its node or local nodes, HTTP, until asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO

import grpc.aio

from dwarfstar_engine.api.keybook import KeyStore, key_folder
from dwarfstar_engine.cli import running, shared, telling
from dwarfstar_engine.cli.door import open_door
from dwarfstar_engine.cli.front import Front, forwarded_app, keys_of
from dwarfstar_engine.cli.sockets import bind, port_of
from dwarfstar_engine.cli.standby import control_server, serve_http
from dwarfstar_engine.cluster.candidates import MAX_HOSTS, Advert, Interface
from dwarfstar_engine.cluster.state import ClusterState, Scalar
from dwarfstar_engine.errors import ModelError, TrustError
from dwarfstar_engine.node import renewal
from dwarfstar_engine.node.admission import Admission
from dwarfstar_engine.node.bandwidth import known_gb_s
from dwarfstar_engine.node.chair import Chair
from dwarfstar_engine.node.control import ControlService
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.daemon import NodeDaemon
from dwarfstar_engine.node.discovery import Seek, cluster_id
from dwarfstar_engine.node.drafter import Drafter, DraftOptions
from dwarfstar_engine.node.facts import (
    GIB,
    Facts,
    cores,
    default_threads,
    interfaces,
    is_any,
    is_loopback,
    measure,
    reached_host,
    shown_host,
)
from dwarfstar_engine.node.gossip import Peer
from dwarfstar_engine.node.kept import Kept
from dwarfstar_engine.node.lead import REMOVED, Lead
from dwarfstar_engine.node.led import Led
from dwarfstar_engine.node.loader import Chosen
from dwarfstar_engine.node.local import LocalNode
from dwarfstar_engine.node.mdns import Advertiser, instance
from dwarfstar_engine.node.needs import kv_cells, reserve_bytes
from dwarfstar_engine.node.roster import RosterStore
from dwarfstar_engine.node.source import DEFAULT_CONTEXT, NO_MODEL, Source, find_model, open_source
from dwarfstar_engine.node.stages import NodeOptions
from dwarfstar_engine.node.tunnel import Tunnel
from dwarfstar_engine.node.vocab import Vocab, open_vocab
from dwarfstar_engine.plan.proportional import Capacity, Need, with_cuts
from dwarfstar_engine.settings import MAX_SLOTS, Settings
from dwarfstar_engine.stage.fingerprint import fingerprint
from dwarfstar_engine.views import StatusView
from dwarfstar_engine.wire.enrol import Enrolment, join_port, serve_enrolment
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
DEMO_SHARE = 0.5  # of the whole model's memory that each demo node lends at least: one is not enough, three are
DEMO_ROOM = 1.5  # and all together: what a slice needs cannot be divided as one likes


@dataclass(frozen=True, slots=True)
class Start:
    """What to run. model: empty: the one that was served last, if any. local_nodes 0: this process is the one node.
    pin: one core for each local node."""

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
    trust = NodeFiles(settings.home / "trust")
    local = start.local_nodes or (DEMO_NODES if start.demo else 0)
    base = settings.model_copy(
        update={
            "wait_nodes": max(settings.wait_nodes, local, len(settings.cuts) + 1 if settings.cuts else 0),
            "control_host": _control_host(settings, local),
        }
    )
    source, settings = await asyncio.to_thread(_first_model, start, base, Kept(trust.folder / "lead"), say)
    if source.loaded:
        _check_cuts(source, settings.cuts)
    found = settings.discovery and not is_loopback(settings.control_host)
    lent = _lent(start, settings, source)
    lent_gib = measure(lent).override_bytes / GIB if lent else None
    for line in telling.opening(source, settings, local, lent_gib):
        say(line)
    listener = bind(settings.host, settings.port, "")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        door = open_door(settings, listener.getsockname(), utc_now())
        for line in door.notes:
            say(line)
        stopping = asyncio.Event()
        _on_signals(stopping.set)
        ram_gb_s = await asyncio.to_thread(known_gb_s, settings.home)  # once, on all cores, before anything computes
        on = _deal_out(local, settings.threads, start.pin)
        authority = load_or_create_authority(settings.home / "trust", utc_now())
        lifetime = timedelta(hours=settings.certificate_hours)
        admission = Admission(authority, settings.home / "trust", utc_now, lifetime)
        issue_local(authority, trust, OWNER, utc_now(), lifetime)
        vocab = await open_vocab(source)
        coordinator = Coordinator(settings, source, vocab, trust, OWNER)
        coordinator.loader.base = base
        stack.push_async_callback(lambda: coordinator.vocab.close())
        coordinator.planner.fallbacks = tuple(
            open_source(name, settings.models_dir, settings.kv) for name in settings.fallback
        )
        coordinator.drafter = await _open_drafter(coordinator, vocab, settings)
        if coordinator.drafter is not None:
            stack.push_async_callback(coordinator.drafter.close)
        chair = _chair(coordinator, base)
        chair.service = ControlService(None, admission, stopping.set, chair)
        chair.lead = lead = Lead(
            OWNER,
            trust,
            Kept(trust.folder / "lead"),
            lambda: coordinator.gossip.own or Peer(id=OWNER, name=OWNER, hosts=()),
            chair,
            api_url=lambda: door.url,
        )
        host, wanted = shown_host(settings.control_host), settings.control_port
        # gRPC would say why it cannot listen in a log line of its own; a plain socket tells us.
        bind(settings.control_host, wanted, "control-").close()
        control, port = await control_server(chair, admission.refusal, trust, host, wanted)
        coordinator.address = chair.address = f"{shown_host(reached_host(settings.control_host))}:{port}"
        stack.push_async_callback(control.stop, 0.5)
        stack.push_async_callback(chair.close)
        joining, join = await _joining(admission, trust, settings, coordinator.address)
        stack.push_async_callback(joining.stop, 0.5)
        stack.callback(running.withdraw, settings.home)
        coordinator.api_url = chair.api_url = door.url
        # On this machine by loopback, where it listens there: the outward address may change.
        own = f"127.0.0.1:{port_of(coordinator.address)}" if is_any(settings.control_host) else coordinator.address
        running.announce(settings.home, own, door.url, join, door.certificate, found)
        nodes = _local_nodes(local, on, settings, lent, ram_gb_s, coordinator.address, admission)
        for node in nodes:
            stack.push_async_callback(node.stop)
            await node.start()
        advertiser = _advertiser(coordinator, authority, settings, port_of(join))
        tasks = [asyncio.create_task(lead.run(), name="lead")]
        if not local:
            _issue_own(settings, admission)
            facts = measure(settings.effective_vram, ram_gb_s)
            tasks.append(asyncio.create_task(_own_node(settings, facts, Led(lead, lambda: own)), name="node"))
        if found:
            tasks.append(asyncio.create_task(advertiser.run(), name="adverts"))
        renew = renewal.by_authority(authority, lifetime, utc_now)
        for files in renewal.own_files(settings.home):
            renewing = renewal.keep_renewed(files, renew, utc_now, random.random)
            tasks.append(asyncio.create_task(renewing, name="renewal"))
        stack.push_async_callback(_cancel, tasks)
        tunnel = Tunnel(trust)
        stack.push_async_callback(tunnel.close)
        front = Front(chair, tunnel, door.gate, settings, public=door.public)
        http = asyncio.create_task(serve_http(front, listener, door.tls, stopping), name="http")
        teller = asyncio.create_task(telling.tell(_Told(chair), say, started, settings.home, door.curl))
        stack.push_async_callback(_cancel, [teller])
        stopped = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([stopped, http, *tasks], return_when=asyncio.FIRST_COMPLETED)
        await _cancel([teller])
        say("stopping")
        stopping.set()
        await _cancel(tasks[:1])  # who leads no more tells its clients so, who would else be cut off
        await http
        for task in done:
            task.result()


def _first_model(start: Start, settings: Settings, kept: Kept, say: Callable[[str], None]) -> tuple[Source, Settings]:
    """What to serve: what was asked for, or what was served last, as it was. Raises ModelError: what was asked for
    cannot be served."""
    if start.model:
        return open_source(start.model, settings.models_dir, settings.kv), settings
    state = kept.state()
    try:
        source = shared.find_source(settings, state)
    except ModelError as error:
        say(f"{state.model}, which was served last, is not loaded: {error.message}")
        return NO_MODEL, settings
    return source, shared.as_loaded(settings, state) if source.loaded else settings


def _chair(coordinator: Coordinator, settings: Settings) -> Chair:
    """The engine's: it has its coordinator, model and vocabulary from the start, and its files say what is kept. If
    another node led since the start, what that one served counts."""
    store, roster = KeyStore(key_folder(settings.home), utc_now), RosterStore(settings.home / "trust", utc_now)
    read = False  # both, at the last look

    async def make(state: ClusterState) -> Coordinator:
        if state.wishes and state.version != chair.lead.boot_version:
            await _adopt(coordinator, settings, state)
        return shared.restore(coordinator, state)

    def describe(state: ClusterState, now: Coordinator) -> Mapping[str, Any]:
        nonlocal read
        read = False
        told: dict[str, Any] = shared.model_of(now, state)
        told["overrides"] = shared.with_lent(state.overrides, now)
        with contextlib.suppress(TrustError):  # a damaged file is told of where it is used; what was kept stays
            told["keys"] = keys = keys_of(store.read())
            told["revoked"] = (state.revoked | state.keys.keys()) - keys.keys()
            removed: Mapping[str, Mapping[str, Scalar]] = {
                node.id: {REMOVED: True} for node in roster.read().nodes if node.removed
            }
            told["overrides"] = shared.with_lent(removed, now)
            read = True
        return told

    def mark(now: Coordinator) -> object:
        with contextlib.suppress(TrustError):
            return (shared.mark(now), store.signature(), roster.stamp()) if read else None
        return None

    chair = Chair(make, describe, mark, forwarded_app(settings))
    return chair


async def _adopt(coordinator: Coordinator, own: Settings, state: ClusterState) -> None:
    """Serve what the cluster serves: another node led it meanwhile. Raises DwarfStarError: this machine cannot."""
    settings = shared.settings_of(own, state).model_copy(update={"wait_nodes": own.wait_nodes})
    now = coordinator.settings
    same = state.wishes.get("fingerprint") == coordinator.main.fingerprint
    if same and (settings.context, settings.slots) == (now.context, now.slots):
        return
    source = await asyncio.to_thread(shared.find_source, settings, state)
    vocab, old = await open_vocab(source), coordinator.vocab
    coordinator.loader.adopt(Chosen(settings, source, source, vocab))
    await old.close()


class _Told:
    """What the person who started the engine is told of: the coordinator here, or who leads elsewhere."""

    def __init__(self, chair: Chair) -> None:
        self._chair = chair

    def mark(self) -> object:
        coordinator = self._chair.coordinator
        if coordinator is None or not coordinator.serving:
            return None
        names = [(one.ring.number, [stage.member.name for stage in one.ring.stages]) for one in coordinator.pipelines]
        return coordinator.api_url, names  # of an epoch's number there is one ring, and none when it is taken down

    def status(self) -> StatusView:
        coordinator = self._chair.coordinator
        return self._chair.status() if coordinator is None else coordinator.status()

    def loading(self) -> str:
        coordinator = self._chair.coordinator
        return "" if coordinator is None else coordinator.loading()


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
    port = port_of(coordinator.address)

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


def _check_cuts(source: Source, cuts: Sequence[int]) -> None:
    """Raises IllegalCutError now rather than when the nodes are there."""
    boundless = [Capacity(str(index), sys.maxsize) for index in range(len(cuts) + 1)]
    with_cuts(source.costs, source.cuts, Need(cells=0, reserve_bytes=0), boundless, cuts)


def _lent(start: Start, settings: Settings, source: Source) -> str | None:
    """What each local node lends: what was asked for; in the demo, too little for the whole model; else its share."""
    if settings.effective_vram is not None:
        return settings.effective_vram
    if not start.demo:
        share = measure(None).usable_bytes / start.local_nodes if start.local_nodes else 0
        return _gib(share) if share else None
    context = min(settings.context or DEFAULT_CONTEXT, source.train_context)
    kv = kv_cells(settings, context) * sum(source.costs.kv_bytes_per_token)
    whole = sum(source.costs.layer_bytes) + source.costs.head_bytes + kv
    share = max(DEMO_SHARE, DEMO_ROOM / (start.local_nodes or DEMO_NODES))
    return _gib(whole * share + reserve_bytes(source, settings))


def _gib(size: float) -> str:
    return f"{size / GIB:.4f}"


def _sayer(out: TextIO) -> Callable[[str], None]:
    def say(text: str) -> None:
        # A command to copy stands alone on its line.
        print(text if text.startswith("curl ") else f"dwarfstar: {text}", file=out, flush=True)

    return say


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
    if not coordinator.main.loaded:
        return None
    path = find_model(settings.draft_model, settings.models_dir)
    # One for all pipelines. Where they have more slots than it, it reads a text again that it had to let go.
    sequences = min(settings.slots * coordinator.dealer.count, MAX_SLOTS)
    options = DraftOptions(coordinator.context, sequences, threads=settings.threads or 1)
    ours = fingerprint(vocab.piece(token) for token in range(vocab.size))
    drafter = Drafter(path, coordinator.source.name, ours, options)
    await drafter.start()
    return drafter


async def _joining(
    admission: Admission, trust: NodeFiles, settings: Settings, control: str
) -> tuple[grpc.aio.Server, str]:
    """The server that lets machines join, and its address. Raises SettingsError if its port is taken."""
    host, _, control_port = control.rpartition(":")
    service = Enrolment(admission.authority, admission.join, f":{control_port}", utc_now, admission.lifetime)
    wanted = join_port(settings.control_port)
    server, port = await serve_enrolment(service, shown_host(settings.control_host), wanted, trust)
    return server, f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Cores:
    """Of this machine: how many its nodes share, threads of each one's stage, and the cores each stage is pinned to, or
    none."""

    count: int
    threads: int
    pinned: Sequence[tuple[int, ...]] = ()


def dealt_out(free: Sequence[int], nodes: int, threads: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Cores for each local node's stage, one for each of its threads, and those for this process; empty: there are not
    enough.

    Where stages leave none it shares the last one's, which is idle when the engine has the most to do: a token just
    came.
    """
    if len(free) < nodes * threads:
        return [], ()
    stages = [tuple(free[index * threads : (index + 1) * threads]) for index in range(nodes)]
    return stages, tuple(free[nodes * threads :]) or stages[-1]


def _deal_out(nodes: int, threads: int | None, pin: bool) -> Cores:
    """Before this process has other threads: they keep to what it keeps to now."""
    count, each = default_threads(1), threads or default_threads(max(1, nodes))
    if not pin or not nodes or not hasattr(os, "sched_setaffinity"):
        return Cores(count, each)
    stages, own = dealt_out(cores(), nodes, each)
    if own:
        os.sched_setaffinity(0, own)
    return Cores(count, each, stages)


def _local_nodes(
    count: int,
    on: Cores,
    settings: Settings,
    lent: str | None,
    ram_gb_s: float,
    address: str,
    admission: Admission,
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
                threads=on.threads,
                effective_vram=lent,
                ram_gb_s=ram_gb_s,
                cores=on.count,
                cpus=on.pinned[index] if on.pinned else (),
                models=settings.models_dir,
            )
        )
    return nodes


def _issue_own(settings: Settings, admission: Admission) -> None:
    """A certificate for this process as the coordinator's node."""
    files = NodeFiles(settings.home / "node" / "trust")
    node_id = certificate_node_id(files.load().certificate_pem) if files.exists() else f"own-{secrets.token_hex(4)}"
    issue_local(admission.authority, files, node_id, utc_now(), admission.lifetime)


async def _own_node(settings: Settings, facts: Facts, where: Seek) -> None:
    """This process as a node of whoever leads."""
    files = NodeFiles(settings.home / "node" / "trust")
    options = NodeOptions(
        name=settings.name or socket.gethostname(),
        listen=settings.control_host,
        models=settings.models_dir,
        trust=files,
        facts=facts,
        threads=settings.threads or default_threads(1),
        gpu_layers=settings.gpu_layers,
        split_mode=settings.split_mode,
    )
    await NodeDaemon(certificate_node_id(files.load().certificate_pem), options).run(where)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
