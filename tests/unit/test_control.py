"""The control service on loopback: renewal, removal, copies of an identity, and who may order what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from dwarfstar_engine.cli import shared
from dwarfstar_engine.cluster.membership import COPIED, REMOVED
from dwarfstar_engine.cluster.state import ClusterState
from dwarfstar_engine.errors import PeerError, TrustError
from dwarfstar_engine.node import control as control_module
from dwarfstar_engine.node import journal as journal_module
from dwarfstar_engine.node import renewal
from dwarfstar_engine.node.admission import Admission
from dwarfstar_engine.node.control import ControlService
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.daemon import RETRY_S, UNFIT_S, NodeDaemon, pause_s
from dwarfstar_engine.node.facts import Facts
from dwarfstar_engine.node.source import open_source
from dwarfstar_engine.node.stages import NodeOptions
from dwarfstar_engine.node.vocab import ToyVocab
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import EventsView
from dwarfstar_engine.wire import channel, trust
from dwarfstar_engine.wire.door import Door
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.handshake import local_build
from dwarfstar_engine.wire.trust import OWNER, NodeFiles
from support import gguf_bytes as g

DEADLINE_S = 20.0
NOW = trust.utc_now()  # TLS looks at the real clock


@dataclass
class Cluster:
    """A coordinator that listens. clock: the CA's."""

    folder: Path
    admission: Admission
    coordinator: Coordinator
    address: str
    stops: list[None] = field(default_factory=list)

    def machine(self, name: str, lifetime: timedelta = trust.NODE_LIFETIME) -> NodeFiles:
        """A machine that has joined."""
        files = NodeFiles(self.folder / name)
        self.admission.join(self.admission.tokens.issue(self.admission.authority).secret, files.key_id(), name)
        trust.issue_local(self.admission.authority, files, files.key_id(), NOW, lifetime)
        return files

    def daemon(self, files: NodeFiles, name: str) -> NodeDaemon:
        facts = Facts("cpu", "x", 8, 4, 2)
        return NodeDaemon(files.key_id(), NodeOptions(name, "", self.folder / "models", files, facts, threads=1))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    folder = tmp_path / "trust"
    admission = Admission(trust.load_or_create_authority(folder, NOW), folder, trust.utc_now)
    own = NodeFiles(folder)
    trust.issue_local(admission.authority, own, OWNER, NOW)
    settings = Settings(home=tmp_path, heartbeat_s=0.1, late_s=0.5, lost_s=1.0)
    coordinator = Coordinator(settings, open_source("toy:8", tmp_path, settings.kv), ToyVocab(), own, "coordinator")
    server = grpc.aio.server(options=channel.SERVER_OPTIONS, interceptors=(Door(admission.refusal),))
    held = Cluster(tmp_path, admission, coordinator, "")
    service = ControlService(coordinator, admission, lambda: held.stops.append(None))
    control_pb2_grpc.add_ControlServicer_to_server(service, server)
    port = server.add_secure_port("127.0.0.1:0", channel.server_credentials(own))
    await server.start()
    held.address = f"127.0.0.1:{port}"
    ticking = asyncio.create_task(coordinator.nodes.run())
    yield held
    ticking.cancel()
    await server.stop(None)


@asynccontextmanager
async def calling(cluster: Cluster, files: NodeFiles) -> AsyncIterator[control_pb2_grpc.ControlAsyncStub]:
    async with channel.open_channel(cluster.address, channel.channel_credentials(files)) as opened:
        yield control_pb2_grpc.ControlStub(opened)


async def until(look: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not look():  # noqa: ASYNC110 - looks at what another part of the program does
            await asyncio.sleep(0.01)


async def denied(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    return str(refused.value.details())


class Attached:
    """A process of a node that is played: what it was told."""

    def __init__(self, stub: control_pb2_grpc.ControlAsyncStub, node_id: str, instance: str, name: str) -> None:
        build = local_build()
        self.hello = pb.NodeHello(
            node_id=node_id,
            name=name,
            instance=instance,
            build=pb.Build(
                protocol=build.protocol, llama_build=build.llama_build, version=build.version, abi=build.abi
            ),
        )
        self.call: Any = stub.Attach()

    async def first(self) -> pb.CoordinatorMessage:
        await self.call.write(pb.NodeMessage(hello=self.hello))
        message: pb.CoordinatorMessage = await asyncio.wait_for(self.call.read(), DEADLINE_S)
        return message

    async def beat(self, number: int) -> None:
        await self.call.write(pb.NodeMessage(heartbeat=pb.Heartbeat(number=number)))


async def test_a_node_renews_its_own_certificate_and_no_other(cluster: Cluster, tmp_path: Path) -> None:
    files = cluster.machine("attic", timedelta(hours=1))
    before = files.load()
    await renewal.from_coordinator(lambda: cluster.address, trust.utc_now)(files)
    after = files.load()
    certificate = trust.load_certificate(after.certificate_pem)
    assert certificate.not_valid_after_utc > NOW + timedelta(days=360) and after.key_pem == before.key_pem
    assert trust.certificate_node_id(after.certificate_pem) == files.key_id()
    async with calling(cluster, files) as stub:
        other = NodeFiles(tmp_path / "other")  # asks in another's name, with another key: it gets its own name
        reply = await stub.Renew(pb.RenewRequest(csr_pem=other.request(OWNER)), timeout=DEADLINE_S)
        assert trust.certificate_node_id(reply.certificate_pem) == files.key_id()
        assert "cannot be read" in await denied(stub.Renew(pb.RenewRequest(csr_pem=b"x"), timeout=DEADLINE_S))


async def test_a_certificate_that_has_ended_renews_nothing(cluster: Cluster) -> None:
    files = cluster.machine("attic", timedelta(hours=1))

    def later() -> Any:
        return NOW + timedelta(hours=2)

    with pytest.raises(TrustError, match="join again with a new token"):
        await renewal.from_coordinator(lambda: cluster.address, later)(files)


async def test_only_the_owner_orders(cluster: Cluster) -> None:
    async with calling(cluster, cluster.machine("attic")) as stub:
        assert "do it there" in await denied(stub.Stop(pb.StopRequest(), timeout=DEADLINE_S))
        assert "do it there" in await denied(stub.RemoveNode(pb.RemoveNodeRequest(node="x"), timeout=DEADLINE_S))
        assert not cluster.stops and (await stub.Status(pb.StatusRequest(), timeout=DEADLINE_S)).json
    async with calling(cluster, NodeFiles(cluster.folder / "trust")) as stub:
        await stub.Stop(pb.StopRequest(), timeout=DEADLINE_S)
        await until(lambda: cluster.stops)


async def test_only_the_owner_steers_and_a_refusal_has_its_code(cluster: Cluster) -> None:
    async with calling(cluster, cluster.machine("attic")) as stub:
        for call in (
            stub.Plan(pb.PlanRequest(), timeout=DEADLINE_S),
            stub.Commit(pb.PlanRequest(), timeout=DEADLINE_S),
            stub.Undo(pb.UndoRequest(), timeout=DEADLINE_S),
            stub.Override(pb.OverrideRequest(node="attic", text="1"), timeout=DEADLINE_S),
        ):
            assert "do it there" in await denied(call)
    async with calling(cluster, NodeFiles(cluster.folder / "trust")) as stub:
        for call, code in (
            (stub.Plan(pb.PlanRequest(), timeout=DEADLINE_S), "no_nodes"),
            (stub.Plan(pb.PlanRequest(json=b'{"strategy": "slowest"}'), timeout=DEADLINE_S), "bad_request"),
            (stub.Plan(pb.PlanRequest(json=b"{"), timeout=DEADLINE_S), "bad_request"),
            (stub.Commit(pb.PlanRequest(base_epoch=3), timeout=DEADLINE_S), "not_serving"),
            (stub.Undo(pb.UndoRequest(), timeout=DEADLINE_S), "not_serving"),
            (stub.Override(pb.OverrideRequest(node="attic", text="1"), timeout=DEADLINE_S), "no_such_node"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION and refused.value.details()
            assert dict(refused.value.trailing_metadata() or ())[channel.CODE] == code


async def test_a_node_that_comes_is_told_what_it_is_set_to_lend(cluster: Cluster) -> None:
    files = cluster.machine("attic")
    cluster.coordinator.steering.restore("", {files.key_id(): "0.25"})
    daemon = cluster.daemon(files, "attic")
    running = asyncio.create_task(daemon.run(cluster.address))
    await until(lambda: daemon._stages.lent_bytes)
    assert daemon._stages.lent_bytes == cluster.coordinator.members[files.key_id()].usable_bytes
    async with calling(cluster, NodeFiles(cluster.folder / "trust")) as stub:
        await stub.Override(pb.OverrideRequest(node="attic"), timeout=DEADLINE_S)
    await until(lambda: not daemon._stages.lent_bytes)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_removed_node_is_told_ends_and_is_refused_afterwards(cluster: Cluster) -> None:
    files = cluster.machine("attic")
    running = asyncio.create_task(cluster.daemon(files, "attic").run(cluster.address))
    await until(lambda: cluster.coordinator.members)
    async with calling(cluster, NodeFiles(cluster.folder / "trust")) as stub:
        reply = await stub.RemoveNode(pb.RemoveNodeRequest(node="attic"), timeout=DEADLINE_S)
        assert (reply.node_id, reply.name, reply.attached) == (files.key_id(), "attic", True)
        with pytest.raises(TrustError, match=r"removed from the cluster.*dwarfstar token"):
            await asyncio.wait_for(running, DEADLINE_S)
        assert not cluster.coordinator.members
        with pytest.raises(TrustError, match="removed from the cluster"):  # started again
            await asyncio.wait_for(cluster.daemon(files, "attic").run(cluster.address), DEADLINE_S)
        async with calling(cluster, files) as theirs:
            assert "removed" in await denied(theirs.Status(pb.StatusRequest(), timeout=DEADLINE_S))
            assert "removed" in await denied(theirs.Renew(pb.RenewRequest(), timeout=DEADLINE_S))
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.RemoveNode(pb.RemoveNodeRequest(node="cellar"), timeout=DEADLINE_S)
        assert "No node is called 'cellar'" in str(unknown.value.details())


async def test_a_copied_identity_is_refused_and_named_on_both_sides(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    files = cluster.machine("attic")
    first = asyncio.create_task(cluster.daemon(files, "attic").run(cluster.address))
    await until(lambda: cluster.coordinator.members)
    held = cluster.coordinator.members[files.key_id()]
    with pytest.raises(TrustError) as refused:
        await asyncio.wait_for(cluster.daemon(files, "attic").run(cluster.address), DEADLINE_S)
    assert refused.value.code == COPIED and held.peer in refused.value.message
    assert refused.value.message.count("at 127.0.0.1:") == 2  # both, and they differ in their ports
    assert cluster.coordinator.members[files.key_id()] is held and not first.done()
    (warning,) = cluster.coordinator.status().warnings
    assert held.peer in warning and warning in caplog.text and warning in refused.value.message
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_node_started_again_takes_the_place_of_its_silent_self(
    cluster: Cluster,
) -> None:
    files = cluster.machine("attic")
    async with calling(cluster, files) as one, calling(cluster, files) as two, calling(cluster, files) as three:
        old = Attached(one, files.key_id(), "old", "attic")
        assert (await old.first()).HasField("welcome")
        new = Attached(two, files.key_id(), "new", "attic")  # the old one says no more, and its stream stays open
        assert (await new.first()).HasField("welcome")
        again = Attached(three, files.key_id(), "new", "attic")  # the same process, over a new connection
        assert (await again.first()).HasField("welcome")
        assert cluster.coordinator.members[files.key_id()].instance == "new"


async def test_members_read_what_happened_and_what_happens(cluster: Cluster) -> None:
    files = cluster.machine("attic")
    async with calling(cluster, files) as stub, asyncio.timeout(DEADLINE_S):
        call: Any = stub.Events(pb.EventsRequest(follow=True))
        node = Attached(stub, files.key_id(), "one", "attic")
        assert (await node.first()).welcome.heartbeat_ms == 100
        (joined,) = EventsView.model_validate_json((await call.read()).json).events
        assert (joined.number, joined.kind, joined.node) == (1, "node_joined", "attic")
        node.call.cancel()
        assert (
            EventsView.model_validate_json((await call.read()).json).events[0].number == 2
            and cluster.coordinator.status().last_event >= 2
        )
        call.cancel()
        assert [reply async for reply in stub.Events(pb.EventsRequest(since=cluster.coordinator.journal.last))] == []


async def test_a_request_for_events_that_is_none_is_refused(cluster: Cluster) -> None:
    credentials = channel.channel_credentials(cluster.machine("attic"))
    async with channel.open_channel(cluster.address, credentials) as opened:
        ask: Any = opened.unary_stream("/dwarfstar.v1.Control/Events")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(b"\xff\xff").read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_readers_of_events_are_bounded(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_READERS", 0)
    async with calling(cluster, cluster.machine("attic")) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await cast(Any, stub.Events(pb.EventsRequest())).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_node_that_is_removed_while_it_says_hello_does_not_come_in(cluster: Cluster) -> None:
    files = cluster.machine("attic")
    async with calling(cluster, files) as stub:
        node = Attached(stub, files.key_id(), "one", "attic")
        await node.call.wait_for_connection()
        await asyncio.to_thread(cluster.admission.remove, "attic")
        try:
            assert (await node.first()).refused.code == REMOVED
        except grpc.aio.AioRpcError:  # the door was slower to look than the owner to remove it
            assert await node.call.code() is grpc.StatusCode.PERMISSION_DENIED  # the error itself may be the write's


async def test_a_coordinator_that_is_away_is_no_refusal(cluster: Cluster) -> None:
    with pytest.raises(PeerError, match="is not reached"):
        await renewal.from_coordinator(lambda: "127.0.0.1:1", trust.utc_now)(cluster.machine("attic"))


async def test_connections_that_end_leave_no_task_behind(cluster: Cluster) -> None:
    """gRPC reads what a node says in a task of its own, which must not wait for the next word for ever."""
    files = cluster.machine("mine")
    running = asyncio.create_task(cluster.daemon(files, "mine").run(cluster.address))
    members = cluster.coordinator.members
    tasks: list[int] = []
    for _ in range(3):
        await until(lambda: members)
        (member,) = members.values()
        await until(member.outbox.empty)
        tasks.append(len([task for task in asyncio.all_tasks() if "request_iterator" in repr(task.get_coro())]))
        member.dismiss()
        await until(lambda held=member: members.get(held.id) is not held)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert tasks == [1, 1, 1]


# --- files of one model in several quantisations ---------------------------------------------------------------------


def model_file(path: Path, kind: int, layers: int = 4) -> Path:
    tensors = [
        g.Tensor(one.name, one.shape, kind if len(one.shape) == 2 else one.kind) for one in g.llama_tensors(layers)
    ]
    return g.write(path, g.llama_pairs(layers), tensors)


@asynccontextmanager
async def of_two_files(cluster: Cluster, settings: Settings, named: Path) -> AsyncIterator[NodeDaemon]:
    """A coordinator that serves a file which no other machine has; and a node whose owner has named another."""
    coordinator = cluster.coordinator
    path = model_file(cluster.folder / "served.Q8_0.gguf", g.TENSOR_Q8_0)
    source = open_source(str(path), cluster.folder)
    coordinator.settings, coordinator.source, coordinator.main = settings, source, source
    if settings.mixed:
        await coordinator.files._base_of(source)
    path.unlink()
    facts = Facts("cpu", "x", 8 << 30, 4 << 30, 0)
    files = cluster.machine("attic")
    options = NodeOptions("attic", "", cluster.folder / "models", files, facts, threads=1, file=named)
    daemon = NodeDaemon(files.key_id(), options)
    running = asyncio.create_task(daemon.run(cluster.address))
    yield daemon
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def mixed(cluster: Cluster) -> Settings:
    return cluster.coordinator.settings.model_copy(update={"mixed": True})


async def test_a_node_with_another_quantisation_comes_in_where_that_is_permitted(
    cluster: Cluster, mixed: Settings
) -> None:
    named = model_file(cluster.folder / "named.F16.gguf", g.TENSOR_F16)
    coordinator = cluster.coordinator
    async with of_two_files(cluster, mixed, named) as daemon:
        await until(lambda: coordinator.members)
        file = coordinator.members[daemon.id].file
        assert file is not None and (file.name, file.stands_for) == ("named.F16", coordinator.main.fingerprint)
        plan = coordinator.plan()
        assert sum(stage.weights_bytes for stage in plan.stages) == file.costs.total > coordinator.main.costs.total
        told = pb.ModelRef(
            name="named.F16", fingerprint=file.fingerprint, path_hint=str(named), layers=coordinator.main.layers
        )
        assert coordinator.pipelines[0].assignment(plan.stages[0], standby=False).model == told
        (view,) = coordinator.steering.survey_present()[0].job.files.values()
        assert view == ("named.F16", file.quantisation)


async def test_a_node_with_another_model_is_refused_with_the_difference(cluster: Cluster, mixed: Settings) -> None:
    named = model_file(cluster.folder / "other.gguf", g.TENSOR_F16, layers=5)
    coordinator = cluster.coordinator
    told = (
        "attic cannot run layers from other.gguf in the place of served.Q8_0.gguf: "
        "llama.block_count is 4 in served.Q8_0.gguf and 5 in other.gguf"
    )
    async with of_two_files(cluster, mixed, named) as daemon:
        await until(lambda: coordinator.status().warnings)
        assert coordinator.status().warnings == (told,) and not coordinator.members
        events = [event for event in coordinator.journal._log.since(0)[0] if event.kind == "node_refused"]
        assert events and told in events[0].cause
        await until(lambda: told in daemon._told[0])
    assert pause_s(1, "model_differs") == UNFIT_S > pause_s(99, "") > pause_s(0, "no_such_code") == RETRY_S[0]


async def test_without_permission_nothing_is_asked(cluster: Cluster) -> None:
    named = model_file(cluster.folder / "named.F16.gguf", g.TENSOR_F16)
    coordinator = cluster.coordinator
    assert coordinator.files.look is None and not coordinator.settings.mixed
    async with of_two_files(cluster, coordinator.settings, named) as daemon:
        await until(lambda: coordinator.members)
        assert coordinator.members[daemon.id].file is None
        model = coordinator.pipelines[0].assignment(coordinator.plan().stages[0], standby=False).model
        assert model.fingerprint == coordinator.main.fingerprint


async def test_a_node_that_does_not_answer_is_refused(
    cluster: Cluster, mixed: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "OFFER_DEADLINE_S", 0.05)
    cluster.coordinator.settings = mixed
    files = cluster.machine("attic")
    async with calling(cluster, files) as stub:
        node = Attached(stub, files.key_id(), "one", "attic")
        assert (await node.first()).look.model.name == "toy:8"
        await node.beat(1)  # is no answer
        refused: pb.CoordinatorMessage = await node.call.read()
        assert refused.refused.code == "bad_offer" and "does not say which files" in refused.refused.message
    async with calling(cluster, files) as stub:
        node = Attached(stub, files.key_id(), "two", "attic")
        monkeypatch.setattr(control_module, "OFFER_DEADLINE_S", DEADLINE_S)
        assert (await node.first()).HasField("look")
        await node.call.write(pb.NodeMessage(offer=pb.Offer(same=True)))
        assert (await node.call.read()).HasField("welcome")
        assert cluster.coordinator.members[files.key_id()].file is None


async def test_a_node_is_called_as_its_owner_says_also_when_it_comes_back(cluster: Cluster) -> None:
    files, other = cluster.machine("localhost"), cluster.machine("attic")
    nodes, me = cluster.coordinator.nodes, files.key_id()
    tasks = [asyncio.create_task(cluster.daemon(one, one.folder.name).run(cluster.address)) for one in (files, other)]
    await until(lambda: len(nodes.members) == 2)
    async with calling(cluster, NodeFiles(cluster.folder / "trust")) as stub:
        told = await stub.Name(pb.NameRequest(node="localhost", name=" tower "), timeout=DEADLINE_S)
        assert (told.node_id, told.before, told.name) == (me, "localhost", "tower")
        for node, name, code in (("tower", "attic", "bad_setting"), ("tower", "a\nb", "bad_setting"),
                                 ("tower", "x" * 65, "bad_setting"), ("localhost", "x", "no_such_node")):  # fmt: skip
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Name(pb.NameRequest(node=node, name=name), timeout=DEADLINE_S)
            assert dict(refused.value.trailing_metadata() or ())[channel.CODE] == code
        assert {one.name for one in cluster.coordinator.status().nodes} == {"tower", "attic"}
        nodes.members[me].dismiss()
        log = cluster.coordinator.journal._log
        await until(lambda: ("node_rejoined", "tower") in [(one.kind, one.node) for one in log.since(0)[0]])
        kept = shared.with_lent({me: {"effective_vram": "1"}, "x": {"removed": True}}, cluster.coordinator)
        assert kept == {me: {"name": "tower"}, "x": {"removed": True}}
        await stub.Name(pb.NameRequest(node=me), timeout=DEADLINE_S)
    assert nodes.members[me].name == "localhost" and not nodes.names
    shared.restore(cluster.coordinator, ClusterState(overrides=kept))
    assert nodes.names == {me: "tower"}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
