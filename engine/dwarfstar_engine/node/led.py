"""A node daemon's coordinator is whom its lease is with, and only as long as that runs (``node.lead``)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from dwarfstar_engine.cluster.leadership import TICK_S
from dwarfstar_engine.node.discovery import Seek
from dwarfstar_engine.node.lead import Lead
from dwarfstar_engine.wire.generated import control_pb2 as pb


class Led:
    """See ``discovery.Seek``. own: where this node's own coordinator is, when it leads itself; book: what remembers
    where coordinators were."""

    def __init__(self, lead: Lead, own: Callable[[], str], book: Seek | None = None) -> None:
        self._lead, self._own, self._book = lead, own, book
        self._given: tuple[int, str] | None = None

    async def coordinator(self) -> str:
        while True:
            if self._lead.trouble is not None:
                raise self._lead.trouble
            self._given = now = self._lead.serving()
            if now is not None:
                address = self._own() if now[1] == self._lead.me else self._lead.leader_address()
                if address:
                    return address
            await self._moment()

    async def over(self) -> None:
        while self._lead.serving() == self._given:
            await self._moment()

    async def _moment(self) -> None:
        """Until something changes, or a lease may have run out."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S):
                await self._lead.changed()

    def obeys(self, term: int) -> bool:
        now = self._lead.serving()
        return now is not None and now == self._given and now[0] == term

    async def attached(self, address: str) -> None:
        if self._book is not None:
            await self._book.attached(address)

    async def told(self, peers: pb.Peers) -> None:
        if self._book is not None:
            await self._book.told(peers)
