"""gRPC credentials and options, in one place: every channel and server of DwarfStar is made from these.

Theory. All connections are mutual TLS inside one cluster: both ends show a certificate signed by the cluster's CA and
accept no other. Callers expect the name SERVER_NAME, which every node certificate has, so addresses do not matter. The
one exception is enrolment, served on a port of its own without a client certificate (:mod:`.enrol`).

Bounds. Control messages are at most MAX_CONTROL_BYTES, frames at most MAX_FRAME_BYTES; gRPC refuses larger ones before
they are allocated.
"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.wire.frames import MAX_FRAME_BYTES
from dwarfstar_engine.wire.trust import SERVER_NAME, NodeFiles, NodeIdentity, check_node_id

MAX_CONTROL_BYTES = 1 << 20  # the largest control message is a status of a thousand nodes
MAX_ENROLMENT_BYTES = 64 << 10  # certificates and signing requests have under 1500 bytes
ENROLMENT_IDLE_MS = 10_000
ENROLMENT_AGE_MS = 60_000
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


SERVER_OPTIONS = server_options(MAX_FRAME_BYTES)
CONTROL_SERVER_OPTIONS = server_options(MAX_CONTROL_BYTES)
ENROLMENT_SERVER_OPTIONS = (  # anybody may connect: messages are small and no connection stays
    *server_options(MAX_ENROLMENT_BYTES),
    ("grpc.max_connection_idle_ms", ENROLMENT_IDLE_MS),
    ("grpc.max_connection_age_ms", ENROLMENT_AGE_MS),
    ("grpc.server_handshake_timeout_ms", ENROLMENT_IDLE_MS),
)


def server_credentials(trust: NodeFiles | NodeIdentity) -> grpc.ServerCredentials:
    """Mutual TLS: callers must hold a certificate of the cluster. Raises TrustError if ours cannot be read."""
    identity = _identity(trust)
    return grpc.ssl_server_credentials(
        [(identity.key_pem, identity.certificate_pem)], identity.ca_pem, require_client_auth=True
    )


def enrolment_credentials(trust: NodeFiles | NodeIdentity) -> grpc.ServerCredentials:
    """TLS with our certificate only: for the enrolment port, whose callers have none yet. Raises TrustError."""
    identity = _identity(trust)
    return grpc.ssl_server_credentials([(identity.key_pem, identity.certificate_pem)])


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
