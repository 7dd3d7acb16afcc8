"""A node that can take the coordinator's place: its control server, its HTTP API, and what it has ready for that.

Reading the model's directory and starting the vocabulary's process takes a second or more, so both are ready before
they are needed: as soon as the cluster's state names a model. A node that lacks the file says so and takes no part in
elections; it votes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc.aio

from dwarfstar_engine.api.keys import Gate
from dwarfstar_engine.api.server import http_server
from dwarfstar_engine.api.tls import server_tls
from dwarfstar_engine.cli import running, shared
from dwarfstar_engine.cli.front import Front, StateKeys, forwarded_app
from dwarfstar_engine.cli.sockets import bind
from dwarfstar_engine.cluster.candidates import MAX_HOSTS
from dwarfstar_engine.cluster.state import ClusterState
from dwarfstar_engine.errors import ClusterError, DwarfStarError, SettingsError
from dwarfstar_engine.node.admission import Deputy
from dwarfstar_engine.node.chair import Chair, RingDoor
from dwarfstar_engine.node.control import ControlService
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.discovery import Seek
from dwarfstar_engine.node.facts import interfaces, is_any, is_loopback, reached_host, shown_host
from dwarfstar_engine.node.gossip import Peer
from dwarfstar_engine.node.kept import Kept
from dwarfstar_engine.node.lead import Lead
from dwarfstar_engine.node.led import Led
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.node.tunnel import Tunnel
from dwarfstar_engine.node.vocab import Vocab, open_vocab
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire import door as ports
from dwarfstar_engine.wire.generated.control_pb2_grpc import add_ControlServicer_to_server
from dwarfstar_engine.wire.trust import NodeFiles, utc_now

log = logging.getLogger("dwarfstar.lead")


@dataclass(slots=True)
class _Ready:
    """A model at hand. key: of the state it was made for."""

    key: tuple[object, ...]
    source: Source
    vocab: Vocab


class Understudy:
    """Keeps ready what leading takes, for the state that ``lead`` has. me: this node's id."""

    def __init__(self, settings: Settings, files: NodeFiles, me: str) -> None:
        self._settings, self._files, self._me = settings, files, me
        self._ready: _Ready | None = None
        self._made: Coordinator | None = None  # the last
        self._preparing = asyncio.Lock()

    async def keep_ready(self, lead: Lead) -> None:
        """Follow the state, until cancelled."""
        told = ""
        while True:
            signal = lead.signal()
            if lead.state.wishes:  # an engine has told them
                try:
                    await self._prepare(lead.state)
                    lead.able(True)
                    told = ""
                except DwarfStarError as error:
                    lead.able(False)
                    if error.message != told:
                        told = error.message
                        log.warning("this node cannot lead now: %s", told)
            await signal.wait()

    async def _prepare(self, state: ClusterState) -> _Ready:
        """Raises DwarfStarError: the model is not here."""
        key = (state.model, state.wishes.get("fingerprint"), state.wishes.get("kv"))
        async with self._preparing:
            if self._ready is not None and self._ready.key == key:
                return self._ready
            await self._drop()
            source = await asyncio.to_thread(shared.find_source, self._settings, state)
            self._ready = _Ready(key, source, await open_vocab(source))
            log.info("ready to lead with %s", source.name or "no model")
            return self._ready

    async def make(self, state: ClusterState) -> Coordinator:
        """A coordinator as the state says. Raises DwarfStarError."""
        if not state.wishes:
            raise ClusterError("no engine has told this node what to serve: start the engine first", code="no_state")
        ready = await self._prepare(state)
        settings = shared.settings_of(self._settings, state)
        await self._close_loaded()
        self._made = Coordinator(settings, ready.source, ready.vocab, self._files, self._me)
        return shared.restore(self._made, state)

    async def _close_loaded(self) -> None:
        """What a coordinator of before has loaded by itself."""
        made, self._made = self._made, None
        if made is not None and (self._ready is None or made.vocab is not self._ready.vocab):
            await made.vocab.close()

    async def _drop(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None:
            await ready.vocab.close()

    async def close(self) -> None:
        await self._close_loaded()
        await self._drop()


def _describe(state: ClusterState, coordinator: Coordinator) -> Mapping[str, Any]:
    """A stand-in changes the model, the plan and what nodes lend only."""
    return {
        **shared.model_of(coordinator, state),
        "overrides": shared.with_lent(state.overrides, coordinator),
    }


@contextlib.asynccontextmanager
async def standing_by(
    settings: Settings, files: NodeFiles, me: str, name: str, listen: str, book: Seek, on_stop: Callable[[], None]
) -> AsyncIterator[tuple[Seek, Lead, list[asyncio.Task[None]]]]:
    """Everything of a node that can lead. What its daemon follows, its leadership, to be run, and tasks that must not
    end. listen: address of its control server. book: how it finds others, and remembers them.

    Raises SettingsError (an address or port is not to be had), TrustError, ClusterError (what was kept is damaged).
    """
    async with contextlib.AsyncExitStack() as stack:
        listener = bind(settings.host, settings.port, "")
        stack.callback(listener.close)
        bound = listener.getsockname()
        public = not is_loopback(str(bound[0]))
        tls = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            tls = server_tls(settings.tls_cert, settings.tls_key, utc_now())
        url = f"{'https' if tls else 'http'}://{shown_host(reached_host(str(bound[0])))}:{bound[1]}"
        understudy = Understudy(settings, files, me)
        stack.push_async_callback(understudy.close)
        chair = Chair(understudy.make, _describe, shared.mark, forwarded_app(settings))
        stack.push_async_callback(chair.close)
        removed = Deputy(files.load().ca_pem, lambda node: node in chair.lead.removed)
        chair.service = ControlService(None, removed, on_stop, chair)
        port = 0

        def own() -> Peer:
            hosts = tuple(one.host for one in interfaces()) if is_any(listen) else (listen,)
            return Peer(id=me, name=name, hosts=hosts[:MAX_HOSTS], control_port=port)

        kept = Kept(files.folder / "lead")
        chair.lead = lead = Lead(me, files, kept, own, chair, find=book.coordinator, api_url=lambda: url)
        lead.able(False)  # until the model is at hand
        server, port = await control_server(chair, removed.refusal, files, shown_host(listen), 0)
        stack.push_async_callback(server.stop, 0.5)
        at = "127.0.0.1" if is_any(listen) else shown_host(listen)
        chair.address, chair.api_url = f"{at}:{port}", url
        if running.find(settings.home) is None:
            running.announce(settings.home, chair.address, url, "", trust=files.folder.name)
            stack.callback(running.withdraw, settings.home)
        tunnel = Tunnel(files)
        stack.push_async_callback(tunnel.close)
        gate = Gate(StateKeys(lambda: lead.state), required=public, clock=utc_now)
        front = Front(chair, tunnel, gate, settings, public=public)
        stopping = asyncio.Event()
        http = asyncio.create_task(serve_http(front, listener, tls.context if tls else None, stopping), name="http")
        ready = asyncio.create_task(understudy.keep_ready(lead), name="understudy")

        async def end() -> None:
            ready.cancel()
            stopping.set()
            await asyncio.gather(http, ready, return_exceptions=True)

        stack.push_async_callback(end)
        log.info("this node can lead; its API is %s", url)
        yield Led(lead, lambda: chair.address, book), lead, [http, ready]


async def serve_http(app: Any, listener: socket.socket, tls: Any, stopping: asyncio.Event) -> None:
    """Serve until ``stopping``."""
    server = http_server(app, tls)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server._serve([listener]))
    await stopping.wait()
    server.stop()
    await serving


async def control_server(
    chair: Chair, refusal: Callable[[str], str | None], files: NodeFiles, host: str, wanted: int
) -> tuple[grpc.aio.Server, int]:
    """The control and data plane's server, and its port. Raises SettingsError if the port is taken."""
    watch = ports.Watch()
    server = grpc.aio.server(options=channel.SERVER_OPTIONS, interceptors=(ports.Door(refusal, watch.called),))
    server.add_generic_rpc_handlers((RingDoor(chair),))
    add_ControlServicer_to_server(chair.service, server)
    try:
        port = server.add_secure_port(f"{host}:{wanted}", channel.server_credentials(files, watch.handshake))
    except RuntimeError:
        raise SettingsError(
            f"cannot listen on {host}:{wanted}: choose another with --control-port", code="port_taken"
        ) from None
    watch.watch(port)
    await server.start()
    return server, port
