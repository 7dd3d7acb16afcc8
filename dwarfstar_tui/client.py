"""The session's way to the engine: its control plane over gRPC, its API over HTTP, and the files of this machine.

The only module of the app that knows the engine's transports and command line. Calls that are made often share one
channel; rare ones are those of the command line, in a thread. Everything raises DwarfStarError.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import psutil

from dwarfstar_engine.cli import chat, lend, remote, running
from dwarfstar_engine.cli.background import Background
from dwarfstar_engine.errors import DwarfStarError, SettingsError
from dwarfstar_engine.node.facts import interfaces
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import (
    CommitView,
    EventsView,
    LoadRequest,
    LoadView,
    OverrideView,
    PlanRequest,
    ProposalView,
    StatusView,
)
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import ControlStub
from dwarfstar_engine.wire.trust import NodeFiles
from dwarfstar_tui import model_work
from dwarfstar_tui.chat_files import ChatFiles
from dwarfstar_tui.model_files import find_models
from dwarfstar_tui.session import Delta, Starting
from dwarfstar_tui.updates import ChatsRead, ModelsFound, ModelsJudged, NetInterface, Surroundings, TokenMade

STATUS_TIMEOUT_S = 3.0
MAX_LINE_CHARS = 1 << 20  # of the answer's stream


@dataclass(frozen=True, slots=True)
class Address:
    """How to reach one engine. verify: what the API's certificate is checked with."""

    running: running.Running
    trust: Path
    key: str | None = field(default=None, repr=False)
    verify: ssl.SSLContext | bool = True


class RemoteEngine:
    """An attached engine: :class:`dwarfstar_tui.session.Engine`."""

    def __init__(self, address: Address, home: Path) -> None:
        self._address, self._home = address, home
        options = channel.channel_options(channel.MAX_CONTROL_BYTES)
        credentials = channel.channel_credentials(NodeFiles(address.trust))
        self._channel = grpc.aio.secure_channel(address.running.control, credentials, options=options)
        self._stub: Any = ControlStub(self._channel)
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(chat.CONNECT_S, read=chat.READ_S), verify=address.verify)
        self._api_url = address.running.api_url

    @property
    def label(self) -> str:
        return self._address.running.control

    async def status(self) -> StatusView:
        try:
            reply = await self._stub.Status(pb.StatusRequest(), timeout=STATUS_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._said(error) from None
        view = StatusView.model_validate_json(reply.json)
        self._api_url = self._api_url or view.coordinator.api_url
        return view

    async def events(self, since: int) -> AsyncIterator[EventsView]:
        try:
            async for reply in self._stub.Events(pb.EventsRequest(since=since, follow=True)):
                yield EventsView.model_validate_json(reply.json)
        except grpc.RpcError as error:
            raise self._said(error) from None

    def _said(self, error: grpc.RpcError) -> DwarfStarError:
        if self._address.running.pid and running.gone(self._address.running):
            return DwarfStarError("the engine has ended", code="not_running")
        return remote.said(error, self._address.running)

    async def drain(self, node: str, undo: bool) -> str:
        return await asyncio.to_thread(remote.drain, self._address.running, self._home, node, undo=undo)

    async def remove(self, node: str) -> str:
        found = await asyncio.to_thread(remote.remove_node, self._address.running, self._home, node)
        return f"removed {found[1]}: " + ("it was told, and ends" if found[2] else "it will be refused")

    async def rename(self, node: str, name: str) -> str:
        return await asyncio.to_thread(remote.rename, self._address.running, self._home, node, name)

    async def load(self, request: LoadRequest) -> LoadView:
        return await asyncio.to_thread(remote.load, self._address.running, self._home, request)

    async def unload(self) -> LoadView:
        return await asyncio.to_thread(remote.unload, self._address.running, self._home)

    async def stop(self) -> None:
        await asyncio.to_thread(remote.stop, self._address.running, self._home)

    async def propose(self, request: PlanRequest) -> ProposalView:
        asked = pb.PlanRequest(json=request.model_dump_json().encode())
        return ProposalView.model_validate_json(await self._json("Plan", asked, remote.PLAN_S))

    async def commit(self, request: PlanRequest, base_epoch: int) -> CommitView:
        asked = pb.PlanRequest(json=request.model_dump_json().encode(), base_epoch=base_epoch)
        return CommitView.model_validate_json(await self._json("Commit", asked, remote.DRAIN_S))

    async def undo(self) -> CommitView:
        return CommitView.model_validate_json(await self._json("Undo", pb.UndoRequest(), remote.DRAIN_S))

    async def override(self, node: str, text: str, replan: bool) -> OverrideView:
        asked = pb.OverrideRequest(node=node, text=text, replan=replan)
        return OverrideView.model_validate_json(await self._json("Override", asked, remote.DRAIN_S))

    async def _json(self, call: str, request: Any, timeout_s: float) -> bytes:
        try:
            return bytes((await getattr(self._stub, call)(request, timeout=timeout_s)).json)
        except grpc.RpcError as error:
            raise self._said(error) from None

    async def chat(self, messages: Sequence[tuple[str, str]], options: dict[str, float | int]) -> AsyncIterator[Delta]:
        body = {
            "model": "default",
            "messages": [{"role": role, "content": text} for role, text in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        headers = {"Authorization": f"Bearer {self._address.key}"} if self._address.key else {}
        url = f"{self._api_url.rstrip('/')}/v1/chat/completions"
        reading = Reading()
        try:
            async with self._http.stream("POST", url, json=body, headers=headers) as answer:
                if answer.status_code != httpx.codes.OK:
                    await answer.aread()
                    raise chat.refusal(answer)
                async for line in answer.aiter_lines():
                    for delta in reading.line(line):
                        yield delta
        except httpx.HTTPError as error:
            raise DwarfStarError(
                f"the engine at {self._api_url} does not answer: {error or type(error).__name__}", code="not_reachable"
            ) from None
        yield reading.over()

    async def close(self) -> None:
        await self._http.aclose()
        await self._channel.close()


class Reading:
    """Reads an answer's events, line by line. Raises DwarfStarError with the server's own sentence."""

    def __init__(self) -> None:
        self._finish, self._usage = "", (0, 0)

    def line(self, line: str) -> list[Delta]:
        data = line.removeprefix("data: ")
        if not line.startswith("data: ") or data == "[DONE]":
            return []
        if len(data) > MAX_LINE_CHARS:
            raise DwarfStarError("the engine's answer has a line that is too long to be one of ours")
        event = json.loads(data)
        if "error" in event:
            raise DwarfStarError(event["error"]["message"], code=event["error"].get("code") or "error")
        if usage := event.get("usage"):
            self._usage = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        deltas = []
        for choice in event["choices"]:
            self._finish = choice.get("finish_reason") or self._finish
            if text := choice["delta"].get("content"):
                deltas.append(Delta(text))
        return deltas

    def over(self) -> Delta:
        if not self._finish:
            raise DwarfStarError("the answer broke off: the engine closed the connection")
        return Delta("", self._finish, *self._usage)


class HomePlace:
    """This machine and one home on it: :class:`dwarfstar_tui.session.Place`.

    attach: another engine's control address, "host:port", reached with this home's certificate; else the home's own.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str], attach: str | None = None) -> None:
        self._settings, self._environment, self._attach = settings, environment, attach
        self._chats = ChatFiles(settings.home / "chats")

    async def find(self) -> RemoteEngine | None:
        address = await asyncio.to_thread(self._address)
        return None if address is None else RemoteEngine(address, self._settings.home)

    def _address(self) -> Address | None:
        home = self._settings.home
        if self._attach is not None:
            return self._attached(self._attach)
        found = running.find(home)
        if found is None:
            return None
        whom = chat.target(None, None, home, self._environment)
        return Address(found, home / found.trust, whom.key, whom.verify)

    def _attached(self, control: str) -> Address:
        home = self._settings.home
        trust = next((name for name in ("trust", "node/trust") if NodeFiles(home / name).exists()), None)
        if trust is None:
            raise SettingsError(
                f"{home} holds no certificate of a cluster, so {control} lets nobody in from here: "
                "join with `dwarfstar node --token` first, or give the --home of the engine"
            )
        engine = running.Running(pid=0, started=0.0, control=control, api_url="", trust=trust)
        return Address(engine, home / trust, self._environment.get("DWARFSTAR_API_KEY"))

    async def start(self, arguments: Sequence[str]) -> Starting:
        return await asyncio.to_thread(Background, self._settings.home, arguments)

    async def models(self) -> ModelsFound:
        return await asyncio.to_thread(find_models, self._settings.models_dir)

    async def judge(self, paths: Sequence[str], status: StatusView) -> ModelsJudged:
        return await asyncio.to_thread(model_work.judge, paths, status, self._settings)

    async def pull(self, wanted: str, tell: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        return await asyncio.to_thread(model_work.fetch, wanted, self._settings, tell, stopped)

    async def surroundings(self) -> Surroundings:
        return await asyncio.to_thread(self._surroundings)

    def _surroundings(self) -> Surroundings:
        engine = running.find(self._settings.home)
        try:
            found = interfaces()
        except (OSError, psutil.Error):
            found = ()
        return Surroundings(
            interfaces=tuple(NetInterface(one.name, one.host, one.virtual) for one in found),
            control=engine.control if engine else "",
            join=engine.join if engine else "",
            discovery=engine.discovery if engine else self._settings.discovery,
            home=str(self._settings.home),
        )

    async def token(self, hours: float) -> TokenMade:
        line, notes = await asyncio.to_thread(lend.new_join_token, self._settings, hours, None)
        engine = running.find(self._settings.home)
        return TokenMade(line, line.split()[-1], engine.join if engine else "", tuple(notes[1:]))

    async def read_chats(self) -> ChatsRead:
        return await asyncio.to_thread(self._chats.read)

    async def keep_chat(self, chat_id: str, text: str) -> None:
        await asyncio.to_thread(self._chats.keep, chat_id, text)
