"""Joining: how a node that has nothing but a token gets a certificate, from a server it cannot know yet.

Theory, the node's side. (1) Take whatever certificate the server shows as a provisional root and ask, over TLS, for the
cluster's CA: nothing secret is said. (2) Compare that CA with the fingerprint in the token; an impostor can repeat the
true CA but cannot show a certificate signed by it. (3) Open a new connection that trusts this CA only, and send the
secret there. So the secret never reaches anybody but a holder of a certificate of the cluster.

The server's side checks the secret and signs the node's key. Who may join under which id is decided by ``admit``.

A signing request is answered once: its signature is random, so that a machine that asks again sends another one, and
the same one again is a replay. (Whoever replays it gains nothing: the certificate is for a key they do not hold.)

Bounds. Everybody on the network may call this port. What is bounded is what strangers can cost: the calls of one source
and the number of sources in a window, the lines they can write into the log, the size of a message, the calls at one
time, and the number and life of connections. A secret has 160 random bits, so nobody guesses it; a source that shows
wrong ones is kept waiting all the same, longer each time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import grpc
import grpc.aio

from dwarfstar_engine.errors import DwarfStarError, PeerError, SettingsError, TrustError
from dwarfstar_engine.once import Once
from dwarfstar_engine.wire.channel import (
    ENROLMENT_SERVER_OPTIONS,
    MAX_CONTROL_BYTES,
    enrolment_credentials,
    open_channel,
)
from dwarfstar_engine.wire.door import Door, Watch, source_of
from dwarfstar_engine.wire.generated import control_pb2, control_pb2_grpc
from dwarfstar_engine.wire.trust import (
    NODE_LIFETIME,
    SECRET_BYTES,
    Authority,
    JoinToken,
    NodeFiles,
    NodeIdentity,
    check_fingerprint,
    check_node_id,
    sign_request,
)

log = logging.getLogger("dwarfstar.enrolment")

STEP_DEADLINE_S = 10.0  # of each of the three steps
MAX_NAME = 64  # characters of a node's name, as in the settings
WINDOW_S = 60.0
CALLS_PER_SOURCE = 60  # in a window; joining takes two calls, so a rack of machines behind one address still gets in
MAX_SOURCES = 1024  # in a window; further ones are refused until it is over
CONCURRENT_CALLS = 32
WRONG_FREE = 5  # wrong secrets of a source that cost it no time: tokens get pasted wrongly, or are old
WRONG_FIRST_S = 10.0  # what the next one costs; each after it twice as much
WRONG_LONGEST_S = 900.0
WRONG_SOURCES = 1024  # remembered; the least recent is forgotten first
REPLAYS = 4096  # signing requests that are remembered, by their hash
WRONG = ("token_", "not_trusted")  # what codes of refusals begin with that count as a wrong secret


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port" or "[v6]:port". Raises TrustError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise TrustError(f"{address!r} is not an address: write host:port.", code="bad_address")
    return host.strip("[]"), int(port)


def join_port(control_port: int) -> int:
    """The port where machines join: the control port and one; 0, a free one, where there is no such port."""
    return control_port + 1 if 0 < control_port < 65535 else 0


async def fetch_ca(address: str, token: JoinToken) -> bytes:
    """The CA certificate (PEM) of the cluster at ``address``, found to be the token's. Raises TrustError, PeerError."""
    try:
        leaf = await asyncio.to_thread(ssl.get_server_certificate, split_address(address), timeout=STEP_DEADLINE_S)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PeerError(f"No coordinator answers at {address} ({why}): check the address and that it runs.") from None
    async with open_channel(address, grpc.ssl_channel_credentials(leaf.encode()), MAX_CONTROL_BYTES) as provisional:
        stub = _stub(provisional)
        try:
            reply = await stub.GetCa(control_pb2.CaRequest(), timeout=STEP_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise _refused(address, error) from None
    check_fingerprint(token, reply.ca_pem)
    return reply.ca_pem


async def join(address: str, token: JoinToken, node_id: str, name: str, files: NodeFiles, now: datetime) -> str:
    """Join the cluster at ``address``: afterwards ``files`` hold a certificate. Returns the address to Attach to.

    Raises TrustError (a wrong token, a wrong cluster), PeerError (nobody there).
    """
    ca_pem = await fetch_ca(address, token)
    csr = files.request(node_id)
    async with open_channel(address, grpc.ssl_channel_credentials(ca_pem), MAX_CONTROL_BYTES) as verified:
        request = control_pb2.JoinRequest(token_secret=token.secret.hex(), csr_pem=csr, node_id=node_id, name=name)
        try:
            reply = await _stub(verified).Join(request, timeout=STEP_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise _refused(address, error) from None
    files.store(reply.certificate_pem, ca_pem, now)
    given = reply.control_address
    return address.rpartition(":")[0] + given if given.startswith(":") else given


def _stub(channel: grpc.aio.Channel) -> control_pb2_grpc.EnrolmentAsyncStub:
    return control_pb2_grpc.EnrolmentStub(channel)


def _refused(address: str, error: grpc.aio.AioRpcError) -> DwarfStarError:
    if error.code() is grpc.StatusCode.PERMISSION_DENIED:
        return TrustError(str(error.details()))
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return PeerError(str(error.details()))
    return PeerError(
        f"What listens at {address} does not let machines join ({error.details()}): "
        "check the address, port included, against the line that `dwarfstar token` prints."
    )


@dataclass(slots=True)
class CallLimit:
    """How often each source has called in the window that is running. Pure: ``now`` is a monotonic time, in s."""

    begin: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)

    def allows(self, source: str, now: float) -> bool:
        """Count a call of ``source``; whether it may go on."""
        self._turn(now)
        if source not in self.calls and len(self.calls) >= MAX_SOURCES:
            return False
        self.calls[source] = self.calls.get(source, 0) + 1
        return self.calls[source] <= CALLS_PER_SOURCE

    def _turn(self, now: float) -> None:
        if now - self.begin >= WINDOW_S:
            self.begin, self.calls = now, {}


@dataclass(slots=True)
class WrongSecrets:
    """Which sources have shown wrong secrets, and how long they must wait. Pure: ``now`` is a monotonic time, in s."""

    _wrong: OrderedDict[str, tuple[int, float]] = field(
        default_factory=OrderedDict
    )  # how many, and the last one's time

    def wait_s(self, source: str, now: float) -> float:
        """Seconds until ``source`` may try again; 0.0: it may."""
        count, last = self._wrong.get(source, (0, now))
        if count < WRONG_FREE:
            return 0.0
        pause = min(WRONG_FIRST_S * 2.0 ** min(count - WRONG_FREE, 16), WRONG_LONGEST_S)
        return max(0.0, last + pause - now)

    def wrong(self, source: str, now: float) -> None:
        """It has shown a wrong one. What was more than WRONG_LONGEST_S ago does not count."""
        count, last = self._wrong.pop(source, (0, now))
        self._wrong[source] = (1 if now - last > WRONG_LONGEST_S else count + 1, now)
        if len(self._wrong) > WRONG_SOURCES:
            self._wrong.popitem(last=False)

    def right(self, source: str) -> None:
        self._wrong.pop(source, None)


class Enrolment(control_pb2_grpc.EnrolmentServicer):
    """The coordinator's side.

    admit(secret, node_id, name): raises TrustError to refuse; called in a thread of its own, as it reads files.
    control_address: see JoinReply. clock: the time, in UTC. lifetime: of the certificates.
    """

    def __init__(
        self,
        authority: Authority,
        admit: Callable[[bytes, str, str], None],
        control_address: str,
        clock: Callable[[], datetime],
        lifetime: timedelta = NODE_LIFETIME,
    ) -> None:
        self._lifetime = lifetime
        self._wrong, self._once = WrongSecrets(), Once()
        self._answered: OrderedDict[bytes, None] = OrderedDict()
        self._authority, self._admit, self._control_address, self._clock = authority, admit, control_address, clock
        self._limit = CallLimit(time.monotonic())

    async def GetCa(
        self, request: control_pb2.CaRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.CaReply:
        await self._count(context)
        return control_pb2.CaReply(ca_pem=self._authority.certificate_pem)

    async def Join(
        self, request: control_pb2.JoinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.JoinReply:
        source = await self._count(context)
        if (wait_s := self._wrong.wait_s(source, time.monotonic())) > 0:
            self._tell(source, "too many wrong join tokens")
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"Too many wrong join tokens came from this address: wait {math.ceil(wait_s)} s, then try again.",
            )
        name = _printable(request.name[:MAX_NAME])
        try:
            secret = _secret(request.token_secret)
            node_id = check_node_id(request.node_id)
            self._check_fresh(request.csr_pem)
            await asyncio.to_thread(self._admit, secret, node_id, name)
            certificate = sign_request(self._authority, request.csr_pem, node_id, self._clock(), self._lifetime)
        except TrustError as error:
            if error.code.startswith(WRONG):
                self._wrong.wrong(source, time.monotonic())
            self._tell(source, error.message)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.message)
        self._wrong.right(source)
        self._remember(request.csr_pem)
        log.info("signed a certificate for %s (%s) at %s", name, node_id, source)
        return control_pb2.JoinReply(
            certificate_pem=certificate,
            ca_pem=self._authority.certificate_pem,
            control_address=self._control_address,
        )

    def _check_fresh(self, csr_pem: bytes) -> None:
        if hashlib.sha256(csr_pem).digest() in self._answered:
            raise TrustError("This request to join was answered already: let the machine make a new one.")

    def _remember(self, csr_pem: bytes) -> None:
        self._answered[hashlib.sha256(csr_pem).digest()] = None
        if len(self._answered) > REPLAYS:
            self._answered.popitem(last=False)

    async def _count(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        source = source_of(context.peer())
        if not self._limit.allows(source, time.monotonic()):
            self._tell(source, "too many calls")
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"Too many machines try to join at once: wait {WINDOW_S:.0f} s, then try again.",
            )
        return source

    def _tell(self, source: str, reason: str) -> None:
        if self._once.worth(source, time.monotonic()):
            log.warning("refused to let a machine at %s join: %s", source, reason)


async def serve_enrolment(
    enrolment: Enrolment, host: str, port: int, trust: NodeFiles | NodeIdentity
) -> tuple[grpc.aio.Server, int]:
    """Serve on ``host`` (a v6 address in brackets); port 0 takes a free one. The server, started, and its port.

    Raises SettingsError if the port is taken, TrustError if our certificate cannot be read.
    """
    watch = Watch("it did not ask to join")
    server = grpc.aio.server(
        options=ENROLMENT_SERVER_OPTIONS,
        maximum_concurrent_rpcs=CONCURRENT_CALLS,
        interceptors=(Door(None, watch.called),),
    )
    control_pb2_grpc.add_EnrolmentServicer_to_server(enrolment, server)
    try:
        bound = server.add_secure_port(f"{host}:{port}", enrolment_credentials(trust, watch.handshake))
    except RuntimeError:
        raise SettingsError(
            f"cannot listen on {host}:{port}, where machines join (the control port and one): "
            "choose another with --control-port",
            code="port_taken",
        ) from None
    watch.watch(bound)
    await server.start()
    return server, bound


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _secret(text: str) -> bytes:
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise TrustError("The join token is not one of this cluster: get a new one with `dwarfstar token`.")
    return secret
