"""Leadership, the kept state and forwarded requests on loopback, with real certificates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from dwarfstar_engine.api.keybook import KeyBook, add, format_key
from dwarfstar_engine.api.keys import Gate
from dwarfstar_engine.cli.front import Front
from dwarfstar_engine.cluster.lease import Timings
from dwarfstar_engine.cluster.state import ClusterState, encode
from dwarfstar_engine.errors import Unavailable
from dwarfstar_engine.node import lead as lead_module
from dwarfstar_engine.node import led as led_module
from dwarfstar_engine.node import tunnel
from dwarfstar_engine.node.control import ControlService
from dwarfstar_engine.node.gossip import Peer
from dwarfstar_engine.node.kept import Kept
from dwarfstar_engine.node.lead import Lead, removed_ids
from dwarfstar_engine.node.led import Led
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import CoordinatorView, StatusView, ThroughputView
from dwarfstar_engine.wire import channel, trust
from dwarfstar_engine.wire.door import Door
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import add_ControlServicer_to_server
from dwarfstar_engine.wire.trust import NodeFiles

DEADLINE_S = 20.0
NOW = trust.utc_now()
QUICK = Timings(lease_s=0.8, renew_s=0.1, step_s=0.05, campaign_s=0.3, grace_s=0.2)


async def until(look: Callable[[], Any]) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        while not (found := look()):  # noqa: ASYNC110 - looks at what another part of the program does
            await asyncio.sleep(0.01)
    return found


@dataclass
class Machine:
    """A node that can lead, with a played coordinator; ``app`` answers what is forwarded to it."""

    id: str
    files: NodeFiles
    removed: set[str] = field(default_factory=set)
    begun: list[int] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    wishes: dict[str, Any] = field(default_factory=dict)
    marked: object = None
    looks: int = 0
    app: Any = None
    port: int = 0
    lead: Lead = field(init=False)
    server: Any = None
    running: asyncio.Task[None] | None = None

    # --- lead.Chair ---

    def begin(self, term: int, state: ClusterState, last: str) -> None:
        self.begun.append(term)

    def end(self, cause: str) -> None:
        self.ended.append(cause)

    def mark(self) -> object:
        return self.marked

    def wanted(self, state: ClusterState) -> Mapping[str, Any]:
        self.looks += 1
        return self.wishes

    # --- control.Duties ---

    @property
    def me(self) -> str:
        return self.id

    def serve_lead(self, requests: Any, context: Any) -> AsyncIterator[pb.LeadMessage]:
        return self.lead.links.serve(requests, context)

    async def answer(self, context: Any) -> None:
        await tunnel.answer(self.app, context)

    def status(self) -> StatusView:
        view = CoordinatorView(address="", term=0, api_url="", leads=False)
        idle = ThroughputView(tok_s=0.0, active=0, queued=0)
        return StatusView(
            coordinator=view, model=None, epoch=0, state="following", reason="", nodes=(), stages=(), throughput=idle
        )

    # --- its life ---

    async def start(self, *peers: Machine, can_lead: bool = True) -> None:
        kept = Kept(self.files.folder / "lead")
        if peers:
            kept.keep_peers(tuple(peer.own() for peer in peers))
        if can_lead:
            self.server = grpc.aio.server(
                options=channel.SERVER_OPTIONS,
                interceptors=(Door(lambda node: "Out." if node in self.removed else None),),
            )
            add_ControlServicer_to_server(ControlService(None, None, lambda: None, self), self.server)  # type: ignore[arg-type]
            self.port = self.server.add_secure_port(f"127.0.0.1:{self.port}", channel.server_credentials(self.files))
            await self.server.start()
        self.lead = Lead(self.id, self.files, kept, self.own, self if can_lead else None, timings=QUICK)
        self.running = asyncio.create_task(self.lead.run())

    def own(self) -> Peer:
        return Peer(id=self.id, name=self.id, hosts=("127.0.0.1",), control_port=self.port)

    async def stop(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        if self.server is not None:
            await self.server.stop(None)


Make = Callable[[str], Machine]


@pytest.fixture
async def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    for module, name, value in (
        (lead_module, "TICK_S", 0.02),
        (led_module, "TICK_S", 0.02),
        (lead_module, "START_S", 0.1),
        (lead_module, "STATE_S", 0.05),
    ):
        monkeypatch.setattr(module, name, value)
    authority = trust.create_authority(NOW)
    made: list[Machine] = []

    def make(node: str) -> Machine:
        files = NodeFiles(tmp_path / node)
        trust.issue_local(authority, files, node, NOW)
        made.append(Machine(node, files))
        return made[-1]

    yield make
    for machine in made:
        await machine.stop()


async def test_a_leader_is_followed_replaced_and_follows_when_it_returns(machines: Make) -> None:
    first, second, plain = machines("alpha"), machines("beta"), machines("gamma")
    first.wishes = {"model": "toy:8", "overrides": {"k-x": {"removed": True}}}
    await first.start()
    assert await until(first.lead.leading) == 1 and first.begun == [1]
    await second.start(first)
    await plain.start(first, can_lead=False)
    followed = Led(plain.lead, lambda: "")
    assert await asyncio.wait_for(followed.coordinator(), DEADLINE_S) == f"127.0.0.1:{first.port}"
    term = plain.lead.serving()
    assert term is not None and term[1] == "alpha" and followed.obeys(term[0]) and not followed.obeys(term[0] + 1)
    for other in (second, plain):
        await until(partial(_follows, other, first))
        assert removed_ids(Kept(other.files.folder / "lead").state()) == {"k-x"}
    over = asyncio.create_task(followed.over())
    await until(lambda: second.id in plain.lead.links.open_to())  # gossip: it was told of the first only
    await first.stop()
    await asyncio.wait_for(over, DEADLINE_S)
    assert not followed.obeys(term[0])
    await until(second.lead.leading)
    assert second.begun[-1] > term[0]
    await until(lambda: (now := plain.lead.serving()) is not None and now[1] == "beta")
    vote = Kept(plain.files.folder / "lead").vote()
    assert (vote.term, vote.leader) == plain.lead.serving(), "on disk before it is obeyed"
    begun = len(first.begun)
    await first.start(second)
    await until(lambda: first.lead.leader == "beta" and first.lead.leader_address() == f"127.0.0.1:{second.port}")
    assert len(first.begun) == begun and second.lead.leading() is not None and first.lead.state.model == "toy:8"


async def test_a_removed_node_is_neither_called_nor_heard(machines: Make) -> None:
    first, second = machines("alpha"), machines("beta")
    await first.start()
    await second.start(first)
    await until(lambda: second.lead.leader == "alpha")
    first.wishes = {"overrides": {"beta": {"removed": True}}}
    await until(lambda: "beta" not in first.lead._peers and "beta" in first.lead.removed)
    await until(lambda: second.lead.leader != "alpha")
    first.wishes = {"overrides": {}}  # its owner has let it in again
    await until(lambda: (led := second.lead.serving()) is not None and led == first.lead.serving())


async def test_what_is_kept_already_is_described_again_only_when_it_may_have_changed(
    machines: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, marks = machines("alpha"), 0

    def mark() -> object:
        nonlocal marks
        marks += 1
        return leader.marked

    monkeypatch.setattr(leader, "mark", mark)
    leader.marked, leader.wishes = "one", {"model": "toy:8"}
    await leader.start()
    await until(lambda: leader.lead.state.model == "toy:8" and marks > 5)
    assert leader.looks == 2, "one that found it changed, and one that found it kept"
    leader.marked, leader.wishes = "two", {"model": "toy:6"}
    await until(lambda: leader.lead.state.model == "toy:6")
    leader.marked, seen = None, leader.looks  # it is not known whether it has changed
    await until(lambda: leader.looks > seen + 3)


async def test_another_state_is_compared_with_what_is_wanted_again(machines: Make) -> None:
    leader = machines("alpha")
    leader.marked, leader.wishes = "one", {"model": "toy:8"}
    await leader.start()
    await until(lambda: leader.looks == 2)
    leader.lead._put(encode(ClusterState().changed(9, "beta", model="toy:6")))
    await until(lambda: leader.lead.state.version.term == 9 and leader.lead.state.model == "toy:8")


def _follows(node: Machine, leader: Machine) -> bool:
    return node.lead.state.model == "toy:8" and node.lead.serving() == leader.lead.serving()


# --- requests that are forwarded -------------------------------------------------------------------------------------


async def speaking(machines: Make, app: Any) -> tuple[Machine, tunnel.Tunnel, str]:
    leader, other = machines("alpha"), machines("beta")
    leader.app = app
    await leader.start()
    return leader, tunnel.Tunnel(other.files), f"127.0.0.1:{leader.port}"


def through(lines: tunnel.Tunnel, address: str) -> httpx.AsyncClient:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await lines.forward(address, scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://dwarfstar")


async def test_a_request_is_forwarded_whole_but_its_key(machines: Make) -> None:
    heard: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.update(scope)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x-of", b"alpha")]})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"!"})

    _, lines, address = await speaking(machines, app)
    body = bytes(range(256)) * 1024  # of four pieces
    async with through(lines, address) as client:
        answer = await client.post(
            "/v1/x?a=1", content=body, headers={"authorization": "Bearer ds-k", "x-priority": "1"}
        )
    assert answer.status_code == 201 and answer.headers["x-of"] == "alpha" and answer.content == body + b"!"
    names = dict(heard["headers"])
    assert names[b"x-priority"] == b"1" and b"authorization" not in names
    assert (heard["method"], heard["path"], heard["query_string"]) == ("POST", "/v1/x", b"a=1")
    await lines.close()


async def _never() -> dict[str, Any]:
    await asyncio.get_running_loop().create_future()
    return {}


async def nowhere(message: Any) -> None:
    raise AssertionError("nothing was answered")


SCOPE = {"method": "GET", "path": "/", "query_string": b"", "headers": []}


def once() -> Callable[[], Awaitable[dict[str, Any]]]:
    parts = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else await _never()

    return receive


async def test_a_leader_that_is_lost_ends_what_it_has_begun_and_refuses_the_rest(machines: Make) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        await _never()

    leader, lines, address = await speaking(machines, app)
    got: asyncio.Queue[Any] = asyncio.Queue()
    forwarding = asyncio.create_task(lines.forward(address, dict(SCOPE), once(), got.put))
    assert (await asyncio.wait_for(got.get(), DEADLINE_S))["status"] == 200
    half = await asyncio.wait_for(got.get(), DEADLINE_S)
    assert half["body"] == b"half" and half["more_body"]
    await leader.stop()
    await asyncio.wait_for(forwarding, DEADLINE_S)
    assert got.empty(), "its end is not pretended"
    with pytest.raises(Unavailable) as refused:
        await asyncio.wait_for(lines.forward(address, dict(SCOPE), once(), got.put), DEADLINE_S)
    assert refused.value.code == "no_leader" and refused.value.retry_after_s
    await lines.close()


async def test_a_client_that_leaves_is_told_to_the_application(machines: Make) -> None:
    told = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if (await receive())["type"] == "http.disconnect":
            told.set()

    _, lines, address = await speaking(machines, app)
    left = asyncio.Event()
    parts = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            left.set()

    await asyncio.wait_for(lines.forward(address, dict(SCOPE), receive, send), DEADLINE_S)
    await asyncio.wait_for(told.wait(), DEADLINE_S)
    await lines.close()


async def test_a_node_that_does_not_lead_answers_nothing_itself(machines: Make) -> None:
    _, lines, address = await speaking(machines, None)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(lines.forward(address, dict(SCOPE), once(), nowhere), DEADLINE_S)
    await lines.close()


class NoLeader:
    """In the place of a chair while nobody leads."""

    coordinator = None

    class lead:
        @staticmethod
        def leader_address() -> str:
            return ""


async def test_the_key_is_checked_where_the_request_comes_in(tmp_path: Path) -> None:
    key = format_key(bytes(32))
    book = add(KeyBook(), "laptop", key, NOW, None)
    gate = Gate(lambda: book, required=True, clock=trust.utc_now)
    chair: Any = NoLeader()
    front: Any = Front(chair, tunnel.Tunnel(NodeFiles(tmp_path)), gate, Settings(home=tmp_path), public=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://dwarfstar") as client:
        assert (await client.get("/v1/models")).status_code == 401
        answer = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "no_leader"
        assert (await client.get("/health")).status_code == 503
