"""The control service of a coordinator: nodes attach, the command line asks for the status or the end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from dwarfstar_engine.errors import DwarfStarError, PeerError, TrustError
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.gossip import sound_hosts
from dwarfstar_engine.node.members import END, MAX_NODES, Member
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import ControlServicer
from dwarfstar_engine.wire.handshake import BuildInfo, check_peer, local_build

log = logging.getLogger("dwarfstar.control")

HELLO_DEADLINE_S = 10.0
MAX_NAME = 64


class ControlService(ControlServicer):
    """``on_stop`` is called when the command line asks the engine to end."""

    def __init__(self, coordinator: Coordinator, on_stop: Callable[[], None]) -> None:
        self._coordinator, self._on_stop = coordinator, on_stop

    async def Attach(
        self, request_iterator: AsyncIterator[pb.NodeMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        try:
            member = await self._welcome(request_iterator, context)
        except DwarfStarError as error:
            log.warning("refused a node at %s: %s", context.peer(), error.message)
            yield pb.CoordinatorMessage(refused=pb.Refused(code=error.code, message=error.message))
            return
        reader = asyncio.create_task(self._read(member, request_iterator))
        reader.add_done_callback(lambda task: _over(task, member))
        self._coordinator.attach(member)
        try:
            build = local_build()
            yield pb.CoordinatorMessage(
                welcome=pb.Welcome(
                    term=self._coordinator.term,
                    build=pb.Build(
                        protocol=build.protocol, llama_build=build.llama_build, version=build.version, abi=build.abi
                    ),
                )
            )
            while (message := await member.outbox.get()) is not END:
                yield message
        finally:
            reader.cancel()
            self._coordinator.detach(member)

    async def _welcome(
        self, messages: AsyncIterator[pb.NodeMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> Member:
        try:
            first = await asyncio.wait_for(anext(aiter(messages)), HELLO_DEADLINE_S)
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
        if len(self._coordinator.members) >= MAX_NODES:
            raise PeerError(f"{MAX_NODES} nodes have joined already", code="too_many_nodes")
        host = hello.data_host or peer_host(context.peer())
        member = Member(hello.node_id, hello.name[:MAX_NAME], host, hello.device, time.monotonic())
        member.hosts, member.control_port = sound_hosts(hello.hosts), min(hello.control_port, 65535)
        return member

    async def _read(self, member: Member, messages: AsyncIterator[pb.NodeMessage]) -> None:
        async for message in messages:
            self._coordinator.heard(member, message)

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StatusReply:
        return pb.StatusReply(json=self._coordinator.status().model_dump_json().encode())

    async def Stop(self, request: pb.StopRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StopReply:
        asyncio.get_running_loop().call_soon(self._on_stop)
        return pb.StopReply()


def _over(reader: asyncio.Task[None], member: Member) -> None:
    """The node's side of the stream has ended: end ours."""
    if not reader.cancelled() and (error := reader.exception()) is not None:
        log.warning("the control stream of node %s failed: %s", member.name, error)
    member.dismiss()


def peer_host(peer: str) -> str:
    """The IP address in gRPC's peer text, ``ipv4:1.2.3.4:55`` or ``ipv6:%5B::1%5D:55``."""
    text = unquote(peer).split(":", 1)[1].rsplit(":", 1)[0].strip("[]")
    return str(ipaddress.ip_address(text.split("%", 1)[0]))
