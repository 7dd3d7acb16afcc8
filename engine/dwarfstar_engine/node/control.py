"""The control service of a coordinator: nodes attach and renew their certificates, the command line asks and orders.

Every caller has shown a certificate of the cluster and is no removed node (``wire.door``). Orders are taken from the
CA's holder only, that is from the home folder of the engine: a machine that lends itself must not end the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, Protocol
from urllib.parse import unquote

import grpc
import grpc.aio
from pydantic import ValidationError

from dwarfstar_engine.errors import ClusterError, DwarfStarError, Overloaded, PeerError, PlanError, TrustError
from dwarfstar_engine.node.admission import Gatekeeper
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.gossip import sound_hosts
from dwarfstar_engine.node.members import END, Member
from dwarfstar_engine.node.moves import find
from dwarfstar_engine.node.roster import REMOVED
from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.views import CommitView, PlanRequest, StatusView
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import ControlServicer
from dwarfstar_engine.wire.handshake import BuildInfo, check_peer, local_build
from dwarfstar_engine.wire.trust import OWNER

log = logging.getLogger("dwarfstar.control")

HELLO_DEADLINE_S = 10.0
MAX_NAME = 64
NOT_LEADING = "not_leading"


class Duties(Protocol):
    """What a node that can lead does beside coordinating. me: its id."""

    @property
    def me(self) -> str: ...
    def serve_lead(
        self, requests: AsyncIterator[pb.LeadMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.LeadMessage]: ...
    async def answer(self, context: grpc.aio.ServicerContext[Any, Any]) -> None: ...
    def status(self) -> StatusView: ...
    async def kept(self) -> None:
        """What has just been changed is kept by the cluster."""


class ControlService(ControlServicer):
    """``on_stop`` is called when the command line asks the engine to end. coordinator: while this node leads. duties:
    what it does whether it leads or not; None: it is the only one that could."""

    def __init__(
        self,
        coordinator: Coordinator | None,
        admission: Gatekeeper,
        on_stop: Callable[[], None],
        duties: Duties | None = None,
    ) -> None:
        self.coordinator, self._admission, self._on_stop, self._duties = coordinator, admission, on_stop, duties

    @property
    def _coordinator(self) -> Coordinator:
        if self.coordinator is None:
            raise PeerError("this node does not lead now", code=NOT_LEADING)
        return self.coordinator

    async def Lead(
        self, request_iterator: AsyncIterator[pb.LeadMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.LeadMessage]:
        if self._duties is not None:
            with contextlib.suppress(PeerError):
                async for message in self._duties.serve_lead(request_iterator, context):
                    yield message

    async def Forward(  # type: ignore[override]  # it reads and writes by itself
        self, request_iterator: AsyncIterator[pb.ForwardPart], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        if self._duties is not None:
            await self._duties.answer(context)

    async def Attach(
        self, request_iterator: AsyncIterator[pb.NodeMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        try:
            member = await self._hello(request_iterator, context)
        except DwarfStarError as error:
            if error.code != NOT_LEADING and self.coordinator is not None:
                self.coordinator.nodes.refused(_peer(context), "", error.code, error.message)
            yield pb.CoordinatorMessage(refused=pb.Refused(code=error.code, message=error.message))
            return
        coordinator = self._coordinator
        reader = asyncio.create_task(self._read(coordinator, member, request_iterator))
        reader.add_done_callback(lambda task: _over(task, member))
        coordinator.nodes.attach(member)
        try:
            while (message := await member.outbox.get()) is not END:
                yield message
        finally:
            reader.cancel()
            coordinator.nodes.broken(member)

    async def _hello(
        self, messages: AsyncIterator[pb.NodeMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> Member:
        try:
            async with asyncio.timeout(HELLO_DEADLINE_S):
                first = await anext(aiter(messages))
        except (TimeoutError, StopAsyncIteration):
            raise PeerError("no hello came", code="bad_hello") from None
        if first.WhichOneof("message") != "hello":
            raise PeerError("the first message is not a hello", code="bad_hello")
        hello = first.hello
        check_peer(
            local_build(),
            BuildInfo(hello.build.protocol, hello.build.llama_build, hello.build.version, hello.build.abi),
        )
        if channel.peer_node_id(context) != hello.node_id:
            raise TrustError(f"the certificate is of {channel.peer_node_id(context)} and the hello of {hello.node_id}")
        if (refusal := self._admission.refusal(hello.node_id)) is not None:  # it was removed since it called
            raise TrustError(refusal, code=REMOVED)
        self._coordinator.nodes.readmitted(hello.node_id)
        host = hello.data_host or peer_host(context.peer())
        name, instance = hello.name[:MAX_NAME], hello.instance[:MAX_NAME]
        member = Member(hello.node_id, name, host, hello.device, instance, _peer(context))
        member.epoch_seen = hello.epoch_seen
        member.hosts, member.control_port = sound_hosts(hello.hosts), min(hello.control_port, 65535)
        return member

    async def _read(self, coordinator: Coordinator, member: Member, messages: AsyncIterator[pb.NodeMessage]) -> None:
        async for message in messages:
            coordinator.heard(member, message)

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StatusReply:
        if self.coordinator is None and self._duties is not None:
            return pb.StatusReply(json=self._duties.status().model_dump_json().encode())
        return pb.StatusReply(json=self._coordinator.status().model_dump_json().encode())

    async def Events(
        self, request: pb.EventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.EventsReply]:
        try:
            reading = self._coordinator.journal.read(request.since, follow=request.follow)
            async with contextlib.aclosing(reading) as batches:
                async for batch in batches:
                    yield pb.EventsReply(json=batch.model_dump_json().encode())
        except Overloaded as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)
        except PeerError as error:  # it does not lead
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)

    async def Stop(self, request: pb.StopRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StopReply:
        if self._duties is None or channel.peer_node_id(context) != self._duties.me:
            await _owner_only(context)
        asyncio.get_running_loop().call_soon(self._on_stop)
        return pb.StopReply()

    async def Renew(self, request: pb.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.RenewReply:
        node_id = channel.peer_node_id(context)
        try:
            certificate = await asyncio.to_thread(self._admission.renew, node_id, request.csr_pem)
        except TrustError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.message)
        log.info("renewed the certificate of %s", node_id)
        return pb.RenewReply(certificate_pem=certificate, ca_pem=self._admission.ca_pem)

    async def RemoveNode(
        self, request: pb.RemoveNodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RemoveNodeReply:
        await _owner_only(context)
        held = self.coordinator
        here = [(member.id, member.name) for member in held.members.values()] if held else []
        try:
            node_id, name = await asyncio.to_thread(self._admission.remove, request.node, here)
            attached = held is not None and held.nodes.removed(node_id, name)
        except (TrustError, ClusterError) as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
        return pb.RemoveNodeReply(node_id=node_id, name=name, attached=attached)

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.DrainReply:
        await _owner_only(context)
        prepared = True
        try:
            member = find(self._coordinator.members.values(), request.node)
            moves = self._coordinator.pipeline_of(member).moves
            if request.undo:
                moves.undo(member)
            else:
                prepared = await moves.drain(member)
        except DwarfStarError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
        return pb.DrainReply(node_id=member.id, name=member.name, loaded_first=prepared)

    async def Plan(self, request: pb.PlanRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.PlanReply:
        await _owner_only(context)
        try:
            asked = _asked(request)
            view = await self._coordinator.pipeline_at(asked.pipeline).steering.propose(asked)
        except DwarfStarError as error:
            await _refuse(context, error)
        return pb.PlanReply(json=view.model_dump_json().encode())

    async def Commit(self, request: pb.PlanRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.PlanReply:
        await _owner_only(context)

        async def commit() -> CommitView:
            asked = _asked(request)
            if asked.take is not None:
                return await self._coordinator.take(Kind(asked.take), request.base_epoch)
            if asked.auto and self._coordinator.dealer.taken:
                return await self._coordinator.take(None, request.base_epoch)
            return await self._coordinator.pipeline_at(asked.pipeline).steering.commit(asked, request.base_epoch)

        return await self._change(context, commit)

    async def Undo(self, request: pb.UndoRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.PlanReply:
        await _owner_only(context)

        async def undo() -> CommitView:
            return await self._coordinator.pipeline_in(request.base_epoch).steering.undo(request.base_epoch)

        return await self._change(context, undo)

    async def Override(
        self, request: pb.OverrideRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.OverrideReply:
        await _owner_only(context)
        try:
            member = find(self._coordinator.members.values(), request.node)
            steering = self._coordinator.pipeline_of(member).steering
            view = await steering.override(member.id, request.text, replan=request.replan)
        except (DwarfStarError, TimeoutError) as error:
            await _refuse(context, error)
        await self._keep()
        return pb.OverrideReply(json=view.model_dump_json().encode())

    async def _change(
        self, context: grpc.aio.ServicerContext[Any, Any], change: Callable[[], Awaitable[CommitView]]
    ) -> pb.PlanReply:
        try:
            view = await change()
        except (DwarfStarError, TimeoutError) as error:
            await _refuse(context, error)
        await self._keep()
        return pb.PlanReply(json=view.model_dump_json().encode())

    async def _keep(self) -> None:
        if self._duties is not None:
            await self._duties.kept()


def _asked(request: pb.PlanRequest) -> PlanRequest:
    """Raises PlanError: it is no request."""
    try:
        return PlanRequest.model_validate_json(request.json or b"{}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanError(f"the request's {where or 'JSON'} is not usable: {first['msg']}", code="bad_request") from None


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], error: DwarfStarError | TimeoutError) -> NoReturn:
    """End a call with the error's sentence, its code beside it."""
    code, message = "timeout", "layers were not loaded in time: look at the events"
    if isinstance(error, DwarfStarError):
        code, message = error.code, error.message
    context.set_trailing_metadata(((channel.CODE, code),))
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)


async def _owner_only(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    if channel.peer_node_id(context) != OWNER:
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, "Only the machine that the engine runs on may order that: do it there."
        )


def _over(reader: asyncio.Task[None], member: Member) -> None:
    """The node's side of the stream has ended: end ours."""
    if not reader.cancelled() and (error := reader.exception()) is not None:
        log.warning("the control stream of node %s failed: %s", member.name, error)
    member.dismiss()


def _peer(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Where a call comes from: "host:port"."""
    return unquote(context.peer()).partition(":")[2]


def peer_host(peer: str) -> str:
    """The IP address in gRPC's peer text, ``ipv4:1.2.3.4:55`` or ``ipv6:%5B::1%5D:55``."""
    text = unquote(peer).split(":", 1)[1].rsplit(":", 1)[0].strip("[]")
    return str(ipaddress.ip_address(text.split("%", 1)[0]))
