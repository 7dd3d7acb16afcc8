"""A coordinator's control service of which every call fails the test: tests answer those they expect."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class UnexpectedControl(control_pb2_grpc.ControlServicer):
    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        raise AssertionError("nobody should ask for the status")

    async def Attach(
        self, request_iterator: AsyncIterator[pb.NodeMessage], context: Context
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        raise AssertionError("nobody should attach")
        yield

    async def Events(self, request: pb.EventsRequest, context: Context) -> AsyncIterator[pb.EventsReply]:
        raise AssertionError("nobody should ask for events")
        yield

    async def Stop(self, request: pb.StopRequest, context: Context) -> pb.StopReply:
        raise AssertionError("nobody should end the engine")

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewReply:
        raise AssertionError("nobody should renew a certificate")

    async def Plan(self, request: pb.PlanRequest, context: Context) -> pb.PlanReply:
        raise AssertionError("nobody should ask for the plan")

    async def Commit(self, request: pb.PlanRequest, context: Context) -> pb.PlanReply:
        raise AssertionError("nobody should commit a plan")

    async def Undo(self, request: pb.UndoRequest, context: Context) -> pb.PlanReply:
        raise AssertionError("nobody should undo a plan")

    async def Override(self, request: pb.OverrideRequest, context: Context) -> pb.OverrideReply:
        raise AssertionError("nobody should override what a node lends")

    async def Name(self, request: pb.NameRequest, context: Context) -> pb.NameReply:
        raise AssertionError("nobody should rename a node")

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelReply:
        raise AssertionError("nobody should load a model")

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.LoadModelReply:
        raise AssertionError("nobody should unload the model")

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        raise AssertionError("nobody should drain a node")

    async def RemoveNode(self, request: pb.RemoveNodeRequest, context: Context) -> pb.RemoveNodeReply:
        raise AssertionError("nobody should remove a node")

    async def Lead(
        self, request_iterator: AsyncIterator[pb.LeadMessage], context: Context
    ) -> AsyncIterator[pb.LeadMessage]:
        raise AssertionError("nobody should be elected")
        yield

    async def Forward(
        self, request_iterator: AsyncIterator[pb.ForwardPart], context: Context
    ) -> AsyncIterator[pb.ForwardPart]:
        raise AssertionError("nothing should be forwarded")
        yield
