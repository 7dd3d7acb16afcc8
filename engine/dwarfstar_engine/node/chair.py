"""The coordinator's place in a node that can lead: taken when it leads, empty otherwise.

Theory. ``begin`` and ``end`` are called between two events of leadership and wait for nothing; what takes longer, a
vocabulary or a ring that is taken down, goes on in a task. The chair is empty until the coordinator is ready, and at
once when leading ends; nodes that come meanwhile are told so and come again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from dwarfstar_engine.cluster.leadership import TICK_S
from dwarfstar_engine.cluster.state import ClusterState
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.node import kept_plan, tunnel
from dwarfstar_engine.node.control import ControlService
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.lead import Lead
from dwarfstar_engine.views import CoordinatorView, StatusView, ThroughputView
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.trust import OWNER

log = logging.getLogger("dwarfstar.lead")

KEEP_S = 3.0  # a few ticks of leadership and a file
AWAIT_S = 3.0  # for the nodes of the plan before: they come as soon as their leases have changed hands

Make = Callable[[ClusterState], Awaitable[Coordinator]]
Describe = Callable[[ClusterState, Coordinator], Mapping[str, Any]]
Mark = Callable[[Coordinator], object]


class Chair:
    """See the module. It is also what a control service does beside coordinating (``control.Duties``).

    make: a coordinator as the state says; may raise DwarfStarError. describe: what is to be kept, given that. mark: as
    ``lead.Chair``'s. app: the HTTP API for requests that other nodes forward. lead, service: set before anything
    begins.
    """

    lead: Lead
    service: ControlService

    def __init__(self, make: Make, describe: Describe, mark: Mark, app: Callable[[Coordinator], tunnel.App]) -> None:
        self._make, self._describe, self._mark, self._app = make, describe, mark, app
        self._coordinator: Coordinator | None = None
        self._forwarded: tuple[Coordinator, tunnel.App] | None = None
        self._task: asyncio.Task[None] | None = None
        self.address = self.api_url = ""  # for the status

    @property
    def coordinator(self) -> Coordinator | None:
        """The one that leads at this moment."""
        return self._coordinator if self.lead.leading() is not None else None

    # --- lead.Chair ---

    def begin(self, term: int, state: ClusterState, last: str) -> None:
        if self._coordinator is not None:
            self._coordinator.begin(term)
            return
        self._task = asyncio.create_task(self._sit(term, state, last, self._task), name="coordinator")

    def end(self, cause: str) -> None:
        coordinator, self._coordinator, self.service.coordinator = self._coordinator, None, None
        self._forwarded = None
        if coordinator is not None:
            coordinator.retire(cause)
        if self._task is not None:
            self._task.cancel()

    def mark(self) -> object:
        coordinator = self._coordinator
        return None if coordinator is None else self._mark(coordinator)

    def wanted(self, state: ClusterState) -> Mapping[str, Any]:
        coordinator = self._coordinator
        return {} if coordinator is None else self._describe(state, coordinator)

    async def _sit(self, term: int, state: ClusterState, last: str, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        try:
            coordinator = await self._make(state)
        except DwarfStarError as error:
            log.error("this node cannot lead: %s", error.message)
            self.lead.resign()
            return
        coordinator.begin(term, self._kept(coordinator, state, last))
        coordinator.address, coordinator.api_url = self.address, self.api_url
        coordinator.gossip.changed(self.lead.own_peer().model_copy(update={"coordinator": True}))
        self._coordinator = self.service.coordinator = coordinator
        try:
            await coordinator.run()
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("the coordinator has failed")
            self.lead.resign()

    def _kept(self, coordinator: Coordinator, state: ClusterState, last: str) -> kept_plan.KeptPlan | None:
        """What nodes hold of the model, if it is the same one. An engine that has just started knows the past only."""
        if state.version == self.lead.boot_version or state.wishes.get("fingerprint") != coordinator.source.fingerprint:
            return None
        gone = set() if last == self.lead.me else {last}
        if last == OWNER != self.lead.me:
            text = state.wishes.get("plan")
            held = kept_plan.from_text(text, (), 0.0)
            gone |= {node for node in held.nodes if node.startswith("own-")} if held else set()
        return kept_plan.from_text(state.wishes.get("plan"), gone, time.monotonic() + AWAIT_S)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- control.Duties ---

    @property
    def me(self) -> str:
        return self.lead.me

    def serve_lead(
        self, requests: AsyncIterator[pb.LeadMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.LeadMessage]:
        return self.lead.links.serve(requests, context)

    async def answer(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        coordinator = self.coordinator
        if coordinator is not None and (self._forwarded is None or self._forwarded[0] is not coordinator):
            self._forwarded = coordinator, self._app(coordinator)
        app = self._forwarded[1] if coordinator is not None and self._forwarded is not None else None
        await tunnel.answer(app, context)

    async def kept(self) -> None:
        """Have what was changed kept; returns when it is, or after KEEP_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KEEP_S):
                while True:
                    state = self.lead.state
                    wanted = await asyncio.to_thread(self.wanted, state)
                    if all(getattr(state, name) == value for name, value in wanted.items()):
                        return
                    self.lead.keep_soon()
                    await asyncio.sleep(TICK_S)

    def status(self) -> StatusView:
        leader = self.lead.leader
        reason = (
            f"{self.lead.name_of(leader)} leads" if leader else "nobody leads now: a node takes over within seconds"
        )
        url, address = self.lead.leader_url(), self.lead.leader_address()
        if leader:
            reason += f" at {address}" if address else ""
            reason += f": its API is {url}" if url else ""
        return StatusView(
            coordinator=CoordinatorView(
                address=address, term=self.lead.vote.term, api_url=self.api_url, leader=leader, leads=False
            ),
            model=None,
            epoch=0,
            state="following" if leader else "unavailable",
            reason=reason,
            nodes=(),
            stages=(),
            throughput=ThroughputView(tok_s=0.0, active=0, queued=0),
        )


class RingDoor(grpc.GenericRpcHandler):
    """The ring's hops to this node, for the coordinator that leads now."""

    def __init__(self, chair: Chair) -> None:
        self._chair = chair

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        coordinator = self._chair.coordinator
        return None if coordinator is None else coordinator.receiver.handler().service(handler_call_details)
