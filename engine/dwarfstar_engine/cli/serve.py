"""Assembles and runs an engine: coordinator, its node or local nodes, HTTP, until asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import grpc.aio
import uvicorn

from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.cli import running
from dwarfstar_engine.errors import DwarfStarError, SettingsError
from dwarfstar_engine.node.control import ControlService
from dwarfstar_engine.node.coordinator import Coordinator, reserve_bytes
from dwarfstar_engine.node.daemon import NodeDaemon, NodeOptions
from dwarfstar_engine.node.facts import GIB, cores, default_threads, measure
from dwarfstar_engine.node.local import LocalNode
from dwarfstar_engine.node.source import DEFAULT_CONTEXT, Source, open_source
from dwarfstar_engine.node.vocab import ProcessVocab, ToyVocab, Vocab
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated.control_pb2_grpc import add_ControlServicer_to_server
from dwarfstar_engine.wire.trust import Authority, NodeFiles, issue_local, load_or_create_authority, utc_now

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
    if (other := running.find(settings.home)) is not None:
        raise DwarfStarError(
            f"an engine is running from {settings.home} already (process {other.pid}, {other.api_url}): "
            "stop it with `dwarfstar stop`, or give another --home",
            code="already_running",
        )
    say = _sayer(out)
    source = open_source(start.model, settings.models_dir)
    say(f"model {source.name}: {source.architecture}, {source.layers} layers")
    local = start.local_nodes or (DEMO_NODES if start.demo else 0)
    settings = settings.model_copy(update={"wait_nodes": max(settings.wait_nodes, local)})
    listener = _bind(settings.host, settings.port, "port")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        stopping = asyncio.Event()
        _on_signals(stopping.set)
        authority = load_or_create_authority(settings.home / "trust", utc_now())
        trust = NodeFiles(settings.home / "trust")
        issue_local(authority, trust, "coordinator", utc_now())
        vocab = await _open_vocab(source)
        stack.push_async_callback(vocab.close)
        coordinator = Coordinator(settings, source, vocab, trust, "coordinator")
        control = await _control(coordinator, settings, trust, stopping.set)
        stack.push_async_callback(control.stop, 0.5)
        nodes = _local_nodes(local, start, settings, source, coordinator.address, authority)
        for node in nodes:
            stack.push_async_callback(node.stop)
            await node.start()
        tasks = [asyncio.create_task(coordinator.run(), name="coordinator")]
        if not local:
            tasks.append(asyncio.create_task(_own_node(settings, authority, coordinator.address), name="node"))
        stack.push_async_callback(_cancel, tasks)
        host, port = listener.getsockname()[:2]
        coordinator.api_url = f"http://{_shown_host(host)}:{port}"
        http = asyncio.create_task(_http(coordinator, listener, settings, stopping), name="http")
        running.announce(settings.home, coordinator.address, coordinator.api_url)
        stack.callback(running.withdraw, settings.home)
        teller = asyncio.create_task(_tell(coordinator, say))
        stack.push_async_callback(_cancel, [teller])
        stopped = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([stopped, http, *tasks], return_when=asyncio.FIRST_COMPLETED)
        stopping.set()
        say("stopping")
        await http
        for task in done:
            task.result()


def _sayer(out: TextIO) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(f"dwarfstar: {text}", file=out, flush=True)

    return say


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int, setting: str) -> socket.socket:
    """A listening socket. Raises SettingsError naming the setting."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another with --{setting}", code="port_taken"
        ) from None


def _on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            with contextlib.suppress(NotImplementedError):  # Windows: the default handlers end the process
                loop.add_signal_handler(getattr(signal, name), stop)


async def _open_vocab(source: Source) -> Vocab:
    if source.toy:
        return ToyVocab()
    vocab = ProcessVocab(Path(source.path))
    await vocab.start()
    return vocab


async def _control(
    coordinator: Coordinator, settings: Settings, trust: NodeFiles, on_stop: Callable[[], None]
) -> grpc.aio.Server:
    """The control and data plane's server. Raises SettingsError if its port is taken."""
    server = grpc.aio.server(options=channel.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((coordinator.receiver.handler(),))
    add_ControlServicer_to_server(ControlService(coordinator, on_stop), server)
    host = _shown_host(settings.control_host)
    try:
        port = server.add_secure_port(f"{host}:{settings.control_port}", channel.server_credentials(trust))
    except RuntimeError:
        raise SettingsError(
            f"cannot listen on {host}:{settings.control_port}: choose another with --control-port", code="port_taken"
        ) from None
    await server.start()
    coordinator.address = f"{host}:{port}"
    return server


def _local_nodes(
    count: int, start: Start, settings: Settings, source: Source, address: str, authority: Authority
) -> list[LocalNode]:
    """Node processes on this machine, each with a home, a certificate and a share of the cores of its own."""
    free = cores()
    pinned = start.pin and len(free) >= count
    lent = settings.effective_vram
    if start.demo and lent is None:
        context = min(settings.context or DEFAULT_CONTEXT, source.train_context)
        kv = context * settings.slots * sum(source.costs.kv_bytes_per_token)
        whole = sum(source.costs.layer_bytes) + source.costs.head_bytes + kv
        lent = (whole * DEMO_SHARE + reserve_bytes(source, settings)) / GIB
    nodes = []
    for index in range(count):
        home = settings.home / "local" / f"node{index + 1}"
        issue_local(authority, NodeFiles(home / "trust"), f"local-{index + 1}", utc_now())
        nodes.append(
            LocalNode(
                name=f"node{index + 1}",
                home=home,
                coordinator=address,
                threads=settings.threads or default_threads(count),
                effective_vram=lent,
                cpus=(free[index],) if pinned else (),
                models=settings.models_dir,
            )
        )
    return nodes


async def _own_node(settings: Settings, authority: Authority, address: str) -> None:
    """This process as the coordinator's node."""
    files = NodeFiles(settings.home / "node" / "trust")
    node_id = "own-" + secrets.token_hex(4)
    issue_local(authority, files, node_id, utc_now())
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
    await NodeDaemon(node_id, options).run(address)


async def _http(coordinator: Coordinator, listener: socket.socket, settings: Settings, stopping: asyncio.Event) -> None:
    app = create_app(coordinator, max_body_bytes=settings.max_body_mib << 20)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=1, server_header=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server._serve([listener]))
    await stopping.wait()
    server.should_exit = True
    await serving


async def _tell(coordinator: Coordinator, say: Callable[[str], None]) -> None:
    """Say what a person without a screen wants to know: what is awaited, where each stage is, what to try."""
    told, invited = "", False
    while True:
        status = coordinator.status()
        line = status.reason
        if status.state == "serving":
            stages = ", ".join(f"{s.node} layers {s.layers[0]}–{s.layers[1] - 1}" for s in status.stages)
            line = f"serving {status.model.name if status.model else ''} on {status.coordinator.api_url}: {stages}"
        elif (loads := coordinator.loading()) and status.stages:
            line = f"loading: {loads}"
        if line and line != told:
            say(line)
            told = line
        if status.state == "serving" and not invited:
            invited = True
            say("try it, from another terminal:")
            say(
                f"""  curl {status.coordinator.api_url}/v1/chat/completions -H 'Content-Type: application/json' """
                """-d '{"messages": [{"role": "user", "content": "Hello!"}]}'"""
            )
        await asyncio.sleep(0.25)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
