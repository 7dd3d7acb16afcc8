"""Joining: how a node that has nothing but a token gets a certificate, from a server it cannot know yet.

Theory, the node's side. (1) Take whatever certificate the server shows as a provisional root and ask, over TLS, for the
cluster's CA: nothing secret is said. (2) Compare that CA with the fingerprint in the token; an impostor can repeat the
true CA but cannot show a certificate signed by it. (3) Open a new connection that trusts this CA only, and send the
secret there. So the secret never reaches anybody but a holder of a certificate of the cluster.

The server's side checks the secret and signs the node's key. Who may join under which id is decided by ``admit``.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from datetime import datetime
from typing import Any

import grpc
import grpc.aio

from dwarfstar_engine.errors import DwarfStarError, PeerError, TrustError
from dwarfstar_engine.wire.channel import MAX_CONTROL_BYTES, open_channel
from dwarfstar_engine.wire.generated import control_pb2, control_pb2_grpc
from dwarfstar_engine.wire.trust import (
    SECRET_BYTES,
    Authority,
    JoinToken,
    NodeFiles,
    check_fingerprint,
    check_node_id,
    sign_request,
)

STEP_DEADLINE_S = 10.0  # of each of the three steps
MAX_NAME = 64  # characters of a node's name, as in the settings


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port" or "[v6]:port". Raises TrustError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise TrustError(f"{address!r} is not an address: write host:port.", code="bad_address")
    return host.strip("[]"), int(port)


async def fetch_ca(address: str, token: JoinToken) -> bytes:
    """The CA certificate (PEM) of the cluster at ``address``, found to be the token's. Raises TrustError, PeerError."""
    try:
        leaf = await asyncio.to_thread(ssl.get_server_certificate, split_address(address), timeout=STEP_DEADLINE_S)
    except (OSError, ValueError) as error:
        raise PeerError(f"No coordinator answers at {address} ({error}): check the address and that it runs.") from None
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
    return split_address(address)[0] + given if given.startswith(":") else given


def _stub(channel: grpc.aio.Channel) -> control_pb2_grpc.EnrolmentAsyncStub:
    return control_pb2_grpc.EnrolmentStub(channel)


def _refused(address: str, error: grpc.aio.AioRpcError) -> DwarfStarError:
    if error.code() is grpc.StatusCode.PERMISSION_DENIED:
        return TrustError(str(error.details()))
    return PeerError(f"The coordinator at {address} did not answer as one ({error.details()}): check the address.")


class Enrolment(control_pb2_grpc.EnrolmentServicer):
    """The coordinator's side.

    admit(secret, node_id, name): raises TrustError to refuse. control_address: see JoinReply. clock: the time, in UTC.
    """

    def __init__(
        self,
        authority: Authority,
        admit: Callable[[bytes, str, str], None],
        control_address: str,
        clock: Callable[[], datetime],
    ) -> None:
        self._authority, self._admit, self._control_address, self._clock = authority, admit, control_address, clock

    async def GetCa(
        self, request: control_pb2.CaRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.CaReply:
        return control_pb2.CaReply(ca_pem=self._authority.certificate_pem)

    async def Join(
        self, request: control_pb2.JoinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.JoinReply:
        try:
            secret = _secret(request.token_secret)
            node_id = check_node_id(request.node_id)
            self._admit(secret, node_id, request.name[:MAX_NAME])
            certificate = sign_request(self._authority, request.csr_pem, node_id, self._clock())
        except TrustError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.message)
        return control_pb2.JoinReply(
            certificate_pem=certificate,
            ca_pem=self._authority.certificate_pem,
            control_address=self._control_address,
        )


def _secret(text: str) -> bytes:
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise TrustError("The join token is not one of this cluster: get a new one with `dwarfstar token`.")
    return secret
