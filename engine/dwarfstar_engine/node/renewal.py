"""Certificates are renewed before they end, by those that hold them.

Theory. A certificate is renewed at two thirds of its life (``trust.renewal_due``). A node asks the coordinator, over a
connection that its old certificate secures; the coordinator signs for its own processes itself. The files are replaced,
and each connection made from then on uses them: servers look at each handshake, channels are made with what is there.
When to try is decided by ``look_s`` and ``retry_s``, which are pure; ``keep_renewed`` runs them.

Bounds. Attempts that fail are repeated after a minute, then after twice as long each time up to an hour, and more often
when the end is near; jitter keeps a cluster's nodes from asking all at once. The clock is looked at every minute, as
machines sleep and clocks are set.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

import grpc.aio

from dwarfstar_engine.errors import DwarfStarError, PeerError, TrustError
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.trust import (
    Authority,
    NodeFiles,
    certificate_node_id,
    check_identity,
    issue_local,
    load_certificate,
    renew_at,
    renewal_due,
)

log = logging.getLogger("dwarfstar.renewal")

LOOK_S = 60.0
FIRST_RETRY_S = 60.0
LONGEST_RETRY_S = 3600.0
SHORTEST_RETRY_S = 1.0
TRIES_LEFT = 4  # a pause is at most this part of the time that is left
CALL_S = 10.0

Renew = Callable[[NodeFiles], Awaitable[None]]
"""Replaces the certificate in the files. Raises DwarfStarError; then it is tried again."""


def look_s(certificate_pem: bytes, now: datetime) -> float:
    """Seconds until a certificate needs to be looked at again; not at once, whatever the clock says."""
    return min(LOOK_S, max(SHORTEST_RETRY_S, (renew_at(certificate_pem) - now).total_seconds()))


def retry_s(certificate_pem: bytes, now: datetime, failures: int, jitter: float) -> float:
    """Seconds to wait after so many failures in a row (at least 1). jitter: random, 0 … 1."""
    left = (load_certificate(certificate_pem).not_valid_after_utc - now).total_seconds()
    pause = min(FIRST_RETRY_S * 2.0 ** min(failures - 1, 16), LONGEST_RETRY_S)
    if left > 0:  # afterwards only a person can help, and there is no hurry
        pause = max(SHORTEST_RETRY_S, min(pause, left / TRIES_LEFT))
    return pause * (0.5 + jitter / 2)


async def keep_renewed(
    files: NodeFiles,
    renew: Renew,
    clock: Callable[[], datetime],
    jitter: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Renew the certificate whenever it is due, until cancelled."""
    failures, held = 0, b""
    while True:
        now = clock()
        try:
            held = (await asyncio.to_thread(files.load)).certificate_pem
            if renewal_due(held, now):
                await renew(files)
            failures, pause = 0, look_s(held, now)
        except DwarfStarError as error:
            failures += 1
            pause = retry_s(held, now, failures, jitter()) if held else LONGEST_RETRY_S
            log.warning("the certificate in %s is not renewed yet: %s", files.folder, error.message)
        await sleep(pause)


def from_coordinator(where: Callable[[], str], clock: Callable[[], datetime]) -> Renew:
    """Ask the coordinator, which is at host:port ``where()`` now; empty: it is being looked for."""

    async def renew(files: NodeFiles) -> None:
        address = where()
        if not address:
            raise PeerError("the coordinator has not been found yet")
        held = await asyncio.to_thread(files.load)
        check_identity(held, clock())
        csr = await asyncio.to_thread(files.request, certificate_node_id(held.certificate_pem))
        async with channel.open_channel(address, channel.channel_credentials(held), channel.MAX_CONTROL_BYTES) as link:
            stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(link)
            try:
                reply = await stub.Renew(pb.RenewRequest(csr_pem=csr), timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                detail = str(error.details() or error.code())
                if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                    raise TrustError(detail) from None
                raise PeerError(f"the coordinator at {address} is not reached ({detail})") from None
        if reply.ca_pem != held.ca_pem or certificate_node_id(reply.certificate_pem) != certificate_node_id(
            held.certificate_pem
        ):
            raise TrustError(f"What the coordinator at {address} signed is for another node or cluster: join again.")
        await asyncio.to_thread(files.store, reply.certificate_pem, held.ca_pem, clock())
        log.info("renewed the certificate in %s", files.folder)

    return renew


def by_authority(authority: Authority, lifetime: timedelta, clock: Callable[[], datetime]) -> Renew:
    """Sign it with the CA, for processes of the CA's own machine."""

    async def renew(files: NodeFiles) -> None:
        node_id = certificate_node_id((await asyncio.to_thread(files.load)).certificate_pem)
        await asyncio.to_thread(issue_local, authority, files, node_id, clock(), lifetime)
        log.info("renewed the certificate in %s", files.folder)

    return renew


def own_files(home: Path) -> list[NodeFiles]:
    """Where the coordinator's own processes keep the certificates that its CA signed: its own, its nodes'."""
    folders = [home / "trust", home / "node" / "trust", *sorted((home / "local").glob("node*/trust"))]
    return [files for files in map(NodeFiles, folders) if files.exists()]
