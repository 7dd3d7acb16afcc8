"""gRPC credentials and options, in one place: every channel and server of DwarfStar is made from these.

Theory. All connections are mutual TLS inside one cluster: both ends show a certificate signed by the cluster's CA and
accept no other. Callers expect the name SERVER_NAME, which every node certificate has, so addresses do not matter. The
one exception is enrolment, served on a port of its own without a client certificate (:mod:`.enrol`).

Certificates change while processes run: a server looks at its files at each handshake, a channel is made with what is
there. Connections that are open go on with what they began with.

Outsiders cost what a TLS handshake costs, for HANDSHAKE_MS at most, and on as many connections as a server takes.
gRPC counts all connections together, not those of one source.

Bounds. Control messages are at most MAX_CONTROL_BYTES, frames at most MAX_FRAME_BYTES; gRPC refuses larger ones before
they are allocated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.wire.frames import MAX_FRAME_BYTES
from dwarfstar_engine.wire.trust import SERVER_NAME, NodeFiles, NodeIdentity, check_node_id

log = logging.getLogger("dwarfstar.channel")

CODE = "dwarfstar-code"  # trailing metadata of a call that was refused: the error's code
MAX_CONTROL_BYTES = 1 << 20  # the largest control message is a status of a thousand nodes
MAX_ENROLMENT_BYTES = 64 << 10  # certificates and signing requests have under 1500 bytes
ENROLMENT_IDLE_MS = 10_000
ENROLMENT_AGE_MS = 60_000
ENROLMENT_CONNECTIONS = 256  # machines that join do so within a second
ENROLMENT_STREAMS = 4  # calls on one connection; joining makes one
HANDSHAKE_MS = 5000  # until a connection has shown its certificate; a slow machine needs some 50
CONNECTIONS = 2048  # twice as many as a cluster has nodes; each open file of ours costs little, a stranger's too
STREAMS = 32  # calls at one time on one connection; ours have a connection for each purpose
KEEPALIVE_MS = 2000  # a cut cable is noticed within KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS, even with nothing to send
KEEPALIVE_TIMEOUT_MS = 3000
MIN_PING_INTERVAL_MS = 1000  # servers close connections that ping more often than this

_COMMON: tuple[tuple[str, int | str], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # 0: any number; a stage may wait long for a frame
)


def _limits(size: int) -> tuple[tuple[str, int | str], ...]:
    return (("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size))


def server_options(max_message_bytes: int) -> tuple[tuple[str, int | str], ...]:
    """Options of a server whose messages are at most so large."""
    return (
        *_COMMON,
        *_limits(max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_allowed_incoming_connections", CONNECTIONS),
        ("grpc.max_concurrent_streams", STREAMS),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener that takes every other call
    )


def channel_options(max_message_bytes: int) -> tuple[tuple[str, int | str], ...]:
    """Options of a channel whose messages are at most so large."""
    return (
        *_COMMON,
        *_limits(max_message_bytes),
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.enable_http_proxy", 0),  # peers are on the local network; a proxy of the environment is not for them
        ("grpc.use_local_subchannel_pool", 1),  # a hop of its own: no other stream delays its frames
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
    )


_ENROLMENT: dict[str, int | str] = {
    "grpc.max_allowed_incoming_connections": ENROLMENT_CONNECTIONS,
    "grpc.max_concurrent_streams": ENROLMENT_STREAMS,
}
SERVER_OPTIONS = server_options(MAX_FRAME_BYTES)
CONTROL_SERVER_OPTIONS = server_options(MAX_CONTROL_BYTES)
ENROLMENT_SERVER_OPTIONS = (  # anybody may connect: messages are small and no connection stays
    *(option for option in server_options(MAX_ENROLMENT_BYTES) if option[0] not in _ENROLMENT),
    *_ENROLMENT.items(),
    ("grpc.max_connection_idle_ms", ENROLMENT_IDLE_MS),
    ("grpc.max_connection_age_ms", ENROLMENT_AGE_MS),
)


class _Reloading:
    """A server's certificate as its files have it. gRPC asks at each handshake, on a thread of its own.

    Files that cannot be used are told of once and leave what was served before.
    """

    def __init__(self, trust: NodeFiles | NodeIdentity, mutual: bool, on_handshake: Callable[[], None] | None) -> None:
        self._trust, self._mutual, self._on_handshake = trust, mutual, on_handshake
        self._stamp = self._look()
        self.first = self._configuration()

    def _look(self) -> tuple[int, ...]:
        return self._trust.stamp() if isinstance(self._trust, NodeFiles) else ()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        identity = _identity(self._trust)
        pair = [(identity.key_pem, identity.certificate_pem)]
        return grpc.ssl_server_certificate_configuration(pair, identity.ca_pem if self._mutual else None)

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """What to serve from now on; None: as before."""
        if self._on_handshake is not None:
            self._on_handshake()
        if (stamp := self._look()) == self._stamp:
            return None
        self._stamp = stamp
        try:
            return self._configuration()
        except TrustError as error:
            log.error("the certificate in use stays: %s", error.message)
            return None


def server_credentials(
    trust: NodeFiles | NodeIdentity, on_handshake: Callable[[], None] | None = None
) -> grpc.ServerCredentials:
    """Mutual TLS: callers must hold a certificate of the cluster. Raises TrustError if ours cannot be read.

    on_handshake: called when a connection begins, on a thread of gRPC's; it must be quick and raise nothing.
    """
    reloading = _Reloading(trust, True, on_handshake)
    return grpc.dynamic_ssl_server_credentials(reloading.first, reloading, True)  # type: ignore[arg-type]


def enrolment_credentials(
    trust: NodeFiles | NodeIdentity, on_handshake: Callable[[], None] | None = None
) -> grpc.ServerCredentials:
    """TLS with our certificate only: for the enrolment port, whose callers have none yet. Raises TrustError."""
    reloading = _Reloading(trust, False, on_handshake)
    return grpc.dynamic_ssl_server_credentials(reloading.first, reloading)  # type: ignore[arg-type]


def channel_credentials(trust: NodeFiles | NodeIdentity) -> grpc.ChannelCredentials:
    """Mutual TLS: the server must hold a certificate of the cluster. Raises TrustError if ours cannot be read."""
    identity = _identity(trust)
    return grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)


def _identity(trust: NodeFiles | NodeIdentity) -> NodeIdentity:
    return trust.load() if isinstance(trust, NodeFiles) else trust


def open_channel(
    address: str, credentials: grpc.ChannelCredentials, max_message_bytes: int = MAX_FRAME_BYTES
) -> grpc.aio.Channel:
    """A channel to ``address`` ("host:port"); it connects at the first call. Close it."""
    return grpc.aio.secure_channel(address, credentials, options=channel_options(max_message_bytes))


def peer_node_id(context: grpc.aio.ServicerContext[Any, Any] | grpc.ServicerContext) -> str:
    """The node id in the caller's verified certificate. Raises TrustError if there is none."""
    names: list[Any] = list(context.auth_context().get("x509_common_name") or ())
    if len(names) != 1:
        raise TrustError("The caller shows no node certificate: let it join this cluster first.")
    return check_node_id(names[0].decode("utf-8", "replace"))
