"""The node daemon against a coordinator on loopback, with a stage that is played: nothing is loaded, nothing sleeps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from dwarfstar_engine.errors import PeerError, VersionMismatch
from dwarfstar_engine.node import daemon as daemon_module
from dwarfstar_engine.node import stages as stages_module
from dwarfstar_engine.node.daemon import NodeDaemon
from dwarfstar_engine.node.discovery import Standing
from dwarfstar_engine.node.facts import Facts, local_host
from dwarfstar_engine.node.room import MAX_STAGES
from dwarfstar_engine.node.stages import NodeOptions
from dwarfstar_engine.wire import channel, trust
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated import control_pb2_grpc
from dwarfstar_engine.wire.trust import Authority, NodeFiles
from support.control_base import UnexpectedControl

DEADLINE_S = 20.0
NOW = trust.utc_now()  # TLS looks at the real clock


class PlayedStage:
    """In the place of ``node.child.Child``. ``all``: every one ever started, in order."""

    all: list[PlayedStage]

    def __init__(self, module: str) -> None:
        self.on_event: Callable[[dict[str, Any]], None]
        self.on_exit: Callable[[int], None]
        self.alive, self.pid = False, 0
        self.commands: list[dict[str, Any]] = []
        self.last_words = ["the last word"]

    async def start(self) -> None:
        assert sum(stage.alive for stage in self.all) < MAX_STAGES
        self.alive, self.pid = True, 1000 + len(self.all)
        self.all.append(self)

    def send(self, **command: Any) -> None:
        self.commands.append(command)

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.alive = False

    def die(self, status: int) -> None:
        self.alive = False
        self.on_exit(status)

    def say(self, event: str, **fields: Any) -> None:
        self.on_event({"event": event, **fields})


class Coordinator(UnexpectedControl):
    """Records what nodes say; ``tell`` speaks to the one that is attached."""

    def __init__(self) -> None:
        self.hellos: list[pb.NodeHello] = []
        self.heard: list[pb.NodeMessage] = []
        self.answer = pb.CoordinatorMessage(welcome=pb.Welcome(term=1))
        self._out: asyncio.Queue[pb.CoordinatorMessage | None] = asyncio.Queue()

    async def Attach(
        self, request_iterator: AsyncIterator[pb.NodeMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        self._out = asyncio.Queue()
        self.hellos.append((await anext(aiter(request_iterator))).hello)
        yield self.answer
        if self.answer.HasField("refused"):
            return
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while (message := await self._out.get()) is not None:
                yield message
        finally:
            reader.cancel()

    async def _read(self, messages: AsyncIterator[pb.NodeMessage]) -> None:
        async for message in messages:
            self.heard.append(message)

    def tell(self, **what: Any) -> None:
        self._out.put_nowait(pb.CoordinatorMessage(**what))

    def hang_up(self) -> None:
        self._out.put_nowait(None)

    def events(self) -> list[pb.StageEvent]:
        return [message.stage_event for message in self.heard if message.HasField("stage_event")]

    def states(self, epoch: int) -> list[int]:
        return [event.state for event in self.events() if event.epoch == epoch]


async def until(look: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not look():  # noqa: ASYNC110 - looks at what another part of the program does
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(coordinator: Coordinator, files: NodeFiles, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(options=channel.CONTROL_SERVER_OPTIONS)
    control_pb2_grpc.add_ControlServicer_to_server(coordinator, server)
    bound = server.add_secure_port(f"127.0.0.1:{port}", channel.server_credentials(files))
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


@asynccontextmanager
async def running(node: NodeDaemon, address: str) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(node.run(address))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, PeerError):
            await task


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch) -> list[PlayedStage]:
    PlayedStage.all = []
    monkeypatch.setattr(stages_module, "Child", PlayedStage)
    monkeypatch.setattr(daemon_module, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(daemon_module, "RETRY_S", (0.01, 0.02))
    return PlayedStage.all


@pytest.fixture(scope="module")
def authority() -> Authority:
    return trust.create_authority(NOW)


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> NodeFiles:
    held = NodeFiles(tmp_path / "coordinator")
    trust.issue_local(authority, held, "coordinator", NOW)
    return held


@pytest.fixture
def node(authority: Authority, tmp_path: Path) -> NodeDaemon:
    held = NodeFiles(tmp_path / "node")
    trust.issue_local(authority, held, "n1", NOW)
    return NodeDaemon("n1", options(tmp_path, held))


def options(folder: Path, held: NodeFiles, listen: str = "") -> NodeOptions:
    return NodeOptions(
        name="one",
        listen=listen,
        models=folder / "models",
        trust=held,
        facts=Facts("cpu", "x", 8, 4, 2),
        threads=1,
        spare=False,
    )


def assignment(
    epoch: int, begin: int = 0, end: int = 4, model: str = "toy:8", standby: bool = False, need: int = 0
) -> pb.Assign:
    reference = pb.ModelRef(name=model, fingerprint="f", layers=8)
    return pb.Assign(
        term=1,
        epoch=epoch,
        model=reference,
        layer_begin=begin,
        layer_end=end,
        options=pb.StageOptions(context=64, slots=1),
        standby=standby,
        bytes=need,
    )


async def test_a_node_says_what_it_is_and_listens_where_the_coordinator_reaches_it(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        hello = coordinator.hellos[0]
        assert (hello.node_id, hello.name, hello.data_host) == ("n1", "one", "127.0.0.1")
        assert (hello.device.memory_usable_bytes, hello.device.effective_vram_bytes) == (4, 2)
        coordinator.tell(assign=assignment(1))
        await until(lambda: stages and len(stages[0].commands) == 2)
        assert stages[0].commands[0]["host"] == "127.0.0.1"


async def test_all_addresses_are_listened_on_and_none_is_told(
    authority: Authority, files: NodeFiles, tmp_path: Path
) -> None:
    held = NodeFiles(tmp_path / "node")
    trust.issue_local(authority, held, "n1", NOW)
    coordinator = Coordinator()
    node = NodeDaemon("n1", options(tmp_path, held, listen="::"))
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        assert coordinator.hellos[0].data_host == ""
        coordinator.tell(assign=assignment(1))
        await until(lambda: PlayedStage.all and PlayedStage.all[0].commands)
        assert PlayedStage.all[0].commands[0]["host"] == "[::]"


async def test_heartbeats_tell_of_the_stage(node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(3))
        await until(lambda: coordinator.states(3) == [pb.STAGE_STATE_LOADING])
        stages[0].say("listening", port=77)
        stages[0].say("ready")
        for _ in range(2):
            stages[0].say("stats", busy=0.5, frames=10, rss=123)
        await until(lambda: any(m.heartbeat.stages and m.heartbeat.stages[0].frames for m in coordinator.heard))
        beats = [message.heartbeat for message in coordinator.heard if message.HasField("heartbeat")]
        report = beats[-1].stages[0]
        assert (report.epoch, report.state, report.busy) == (3, pb.STAGE_STATE_READY, 0.5)
        assert (report.rss_bytes, report.frames) == (123, 20)
        assert [beat.number for beat in beats] == list(range(1, len(beats) + 1))
        assert beats[-1].memory_used_bytes > 0
        ready = [event for event in coordinator.events() if event.state == pb.STAGE_STATE_READY]
        assert [(event.port, event.pid) for event in ready] == [(77, stages[0].pid)]


async def test_a_lost_coordinator_is_sought_for_as_long_as_it_takes_and_finds_the_weights(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Coordinator(), Coordinator()
    async with contextlib.AsyncExitStack() as stack:
        async with serving(first, files) as port:
            await stack.enter_async_context(running(node, f"127.0.0.1:{port}"))
            await until(lambda: first.hellos)
            first.tell(assign=assignment(1))
            await until(lambda: first.states(1))
            stages[0].say("ready")
            await until(lambda: pb.STAGE_STATE_READY in first.states(1))
        tries = 10 * len(daemon_module.RETRY_S)
        attempts = _count(node)
        await until(lambda: attempts() > tries)
        stages[0].say("broken", epoch=1, message="the ring is gone")
        assert sum("is not reached" in record.message for record in caplog.records) == 1, "one line, not one a try"
        async with serving(second, files, port):
            await until(lambda: second.hellos)
            second.tell(assign=assignment(1))
            await until(lambda: second.states(1))
            assert second.states(1) == [pb.STAGE_STATE_READY], "the weights are there, and old news is not told"
            assert len(stages) == 1 and stages[0].alive


def _count(node: NodeDaemon) -> Callable[[], int]:
    """How often the daemon has tried to attach since."""
    tries = 0
    attach = node._attach

    async def counting(coordinator: str) -> None:
        nonlocal tries
        tries += 1
        await attach(coordinator)

    node._attach = counting  # type: ignore[method-assign]
    return lambda: tries


async def test_a_coordinator_that_hangs_up_is_attached_to_again(node: NodeDaemon, files: NodeFiles) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        for times in (1, 2, 3):
            await until(lambda times=times: len(coordinator.hellos) == times)  # type: ignore[misc]
            coordinator.hang_up()


async def test_a_coordinator_that_says_nothing_is_given_up_and_tried_again(
    node: NodeDaemon, files: NodeFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(Coordinator):
        async def Attach(
            self, request_iterator: AsyncIterator[pb.NodeMessage], context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[pb.CoordinatorMessage]:
            self.hellos.append((await anext(aiter(request_iterator))).hello)
            await asyncio.Event().wait()
            yield self.answer

    monkeypatch.setattr(daemon_module, "ANSWER_S", 0.2)
    coordinator = Silent()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: len(coordinator.hellos) >= 2)
    assert "does not answer" in caplog.text


async def test_another_release_ends_the_daemon_with_the_coordinators_words(node: NodeDaemon, files: NodeFiles) -> None:
    coordinator = Coordinator()
    coordinator.answer = pb.CoordinatorMessage(
        refused=pb.Refused(code="version_mismatch", message="install one release")
    )
    async with serving(coordinator, files) as port:
        with pytest.raises(VersionMismatch, match="install one release"):
            await asyncio.wait_for(node.run(f"127.0.0.1:{port}"), DEADLINE_S)


async def test_other_refusals_are_tried_again(
    node: NodeDaemon, files: NodeFiles, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = Coordinator()
    coordinator.answer = pb.CoordinatorMessage(refused=pb.Refused(code="too_many_nodes", message="it is full"))
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: len(coordinator.hellos) >= 3)
        coordinator.answer = pb.CoordinatorMessage(welcome=pb.Welcome(term=1))
        await until(lambda: coordinator.heard)
    assert "it is full" in caplog.text


async def test_a_coordinator_of_another_cluster_is_told_apart_and_gets_no_hello(
    node: NodeDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = NodeFiles(tmp_path / "foreign")
    trust.issue_local(trust.create_authority(NOW), foreign, "coordinator", NOW)
    coordinator = Coordinator()
    async with serving(coordinator, foreign) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: "is not of the cluster" in caplog.text)
    assert not coordinator.hellos


async def test_of_assignments_that_wait_only_the_newest_is_carried_out(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, gate = Coordinator(), asyncio.Event()

    async def slow_stop(self: PlayedStage) -> None:
        await gate.wait()
        self.alive = False

    monkeypatch.setattr(PlayedStage, "stop", slow_stop)
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        for epoch in (1, 2, 3, 4):
            coordinator.tell(assign=assignment(epoch, end=epoch))
            if epoch == 1:
                await until(lambda: coordinator.states(1))
        await until(lambda: node._stages.epoch_seen == 4)
        stages[0].say("ready")
        gate.set()
        await until(lambda: coordinator.states(4))
        assert [stage.commands[1]["layers"] for stage in stages if stage.commands] in (
            [[0, 1], [0, 4]],
            [[0, 1], [0, 2], [0, 4]],
        )
        assert not coordinator.states(3)


async def test_a_spare_process_waits_for_the_next_slice(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "SPARE_AFTER_S", 0.0)
    monkeypatch.setattr(node._stages, "_options", replace(node._stages._options, spare=True))
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1))
        await until(lambda: coordinator.states(1))
        stages[0].say("ready")
        await until(lambda: len(stages) == 2)
        assert stages[1].commands == []
        coordinator.tell(assign=assignment(1, begin=4, end=8))
        await until(lambda: stages[1].commands)
        assert stages[1].commands[1]["layers"] == [4, 8] and len(stages) == 2
        stages[1].say("ready")
        await until(lambda: len(stages) == 3)
        stages[2].alive = False  # it died unnoticed
        stages[1].die(-9)
        await until(lambda: coordinator.states(1)[-1] == pb.STAGE_STATE_EXITED)
        coordinator.tell(assign=assignment(1, begin=4, end=8))
        await until(lambda: len(stages) == 4 and stages[3].commands)
    assert not any(stage.alive for stage in stages), "it ends with the node"


@pytest.mark.parametrize("status, code", [(-9, ""), (-15, ""), (-6, "stage_crashed"), (1, "stage_crashed")])
async def test_a_stage_that_was_killed_has_not_crashed(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage], status: int, code: str
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1))
        await until(lambda: coordinator.states(1))
        stages[0].die(status)
        await until(lambda: coordinator.states(1)[-1] == pb.STAGE_STATE_EXITED)
        assert coordinator.events()[-1].code == code


async def test_the_same_slice_asked_for_while_it_loads_is_loaded_once(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1))
        await until(lambda: coordinator.states(1))
        coordinator.tell(assign=assignment(2))
        await until(lambda: coordinator.states(2))
        assert coordinator.states(2) == [pb.STAGE_STATE_LOADING]
        stages[0].say("ready")
        await until(lambda: coordinator.states(2)[-1] == pb.STAGE_STATE_READY)
        assert len(stages) == 1


async def test_a_stage_that_dies_while_it_loads_is_reported_and_the_next_assignment_starts_another(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1))
        await until(lambda: coordinator.states(1))
        stages[0].die(-9)
        await until(lambda: coordinator.states(1)[-1] == pb.STAGE_STATE_EXITED)
        assert coordinator.events()[-1].detail == "the stage process on one ended with signal 9: the last word"
        coordinator.tell(assign=assignment(2))
        await until(lambda: coordinator.states(2))
        assert len(stages) == 2


async def test_a_stage_that_could_not_load_is_replaced_when_it_is_asked_for_again(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1))
        await until(lambda: coordinator.states(1))
        stages[0].say("failed", code="stage_failed", message="no memory")
        await until(lambda: coordinator.states(1)[-1] == pb.STAGE_STATE_FAILED)
        coordinator.tell(assign=assignment(2))
        await until(lambda: len(stages) == 2)
        stages[1].say("ready")
        await until(lambda: pb.STAGE_STATE_READY in coordinator.states(2))


async def test_a_replaced_stage_is_not_heard(node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1))
        await until(lambda: coordinator.states(1))
        coordinator.tell(assign=assignment(2, begin=1))
        await until(lambda: coordinator.states(2))
        stages[0].say("ready")
        stages[0].die(0)
        stages[1].say("ready")
        await until(lambda: pb.STAGE_STATE_READY in coordinator.states(2))
        assert coordinator.states(2) == [pb.STAGE_STATE_LOADING, pb.STAGE_STATE_READY]
        assert coordinator.states(1) == [pb.STAGE_STATE_LOADING, pb.STAGE_STATE_EXITED]  # told: it was released


async def test_a_release_ends_the_stage_but_not_a_newer_one(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(5))
        coordinator.tell(release=pb.Release(term=1, epoch=4))
        coordinator.tell(assign=assignment(6))
        await until(lambda: coordinator.states(6))
        assert len(stages) == 1 and stages[0].alive
        coordinator.tell(release=pb.Release(term=1, epoch=6))
        await until(lambda: not stages[0].alive)


def layers(stage: PlayedStage) -> list[int]:
    return list(stage.commands[1]["layers"])


def alive(stages: list[PlayedStage]) -> list[list[int]]:
    return [layers(stage) for stage in stages if stage.alive]


async def test_a_standby_waits_and_answers_at_once_when_it_is_needed(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()  # the node lends two bytes
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1, 0, 4, need=1))
        coordinator.tell(assign=assignment(1, 4, 8, standby=True, need=1))
        await until(lambda: len(stages) == 2)
        for stage in stages:
            stage.say("listening", port=stage.pid)
            stage.say("ready")
        await until(lambda: coordinator.states(1).count(pb.STAGE_STATE_READY) == 2)
        assert [event.standby for event in coordinator.events()[-2:]] == [False, True]
        coordinator.tell(assign=assignment(2, 0, 4, need=1))
        coordinator.tell(assign=assignment(2, 4, 8, need=1))
        await until(lambda: len(coordinator.states(2)) == 2)
        assert coordinator.states(2) == [pb.STAGE_STATE_READY] * 2 and len(stages) == 2
        events = coordinator.events()[-2:]
        assert [(event.layers.begin, event.port, event.standby) for event in events] == [
            (0, stages[0].pid, False),
            (4, stages[1].pid, False),
        ]
        for begin, end in ((0, 4), (4, 8)):  # both are in the ring
            link = pb.Link(epoch=2, next_hop="127.0.0.1:1", layers=pb.Slice(begin=begin, end=end))
            coordinator.tell(link=link)
        await until(lambda: all(stage.commands[-1]["command"] == "link" for stage in stages))


async def test_a_standby_without_room_is_refused_and_makes_room_for_what_is_needed(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1, 0, 4, need=1))
        coordinator.tell(assign=assignment(1, 4, 8, standby=True, need=2))
        await until(lambda: pb.STAGE_STATE_FAILED in coordinator.states(1))
        refused = coordinator.events()[-1]
        assert (refused.code, refused.layers.begin, refused.standby) == ("no_room", 4, True)
        assert alive(stages) == [[0, 4]]
        coordinator.tell(assign=assignment(1, 4, 8, standby=True, need=1))
        await until(lambda: len(stages) == 2)
        coordinator.tell(assign=assignment(2, 0, 4, need=1))  # it is there
        coordinator.tell(assign=assignment(2, 2, 4, need=1))  # it is not: the standby goes for it
        await until(lambda: len(stages) == 3 and len(stages[2].commands) == 2)
        assert alive(stages) == [[0, 4], [2, 4]]


async def test_a_release_names_a_slice_or_keeps_what_it_names(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    node._stages._options = replace(node._stages._options, facts=Facts("cpu", "x", 8, 4, 9))
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1, 0, 2, need=1))
        for begin in (2, 4):
            coordinator.tell(assign=assignment(1, begin, begin + 2, standby=True, need=1))
        await until(lambda: len(stages) == 3)
        coordinator.tell(release=pb.Release(epoch=1, rest=True, keep=[pb.Slice(begin=4, end=6)]))
        await until(lambda: len(alive(stages)) == 2)
        assert alive(stages) == [[0, 2], [4, 6]]
        coordinator.tell(release=pb.Release(epoch=1, layers=pb.Slice(begin=4, end=6)))
        await until(lambda: len(alive(stages)) == 1)
        assert alive(stages) == [[0, 2]]
        coordinator.tell(release=pb.Release(epoch=2, rest=True))  # an epoch went on without this node
        await until(lambda: not alive(stages))


def carry_order(begin: int, end: int, *parts: tuple[int, int], to: str = "") -> pb.Carry:
    return pb.Carry(
        term=1,
        epoch=4,
        keep=3,
        layers=pb.Slice(begin=begin, end=end),
        within_s=2.5,
        parts=[
            pb.CarryPart(
                layers=pb.Slice(begin=a, end=b), to_hop=to, sender="n7", cargo=[pb.Cargo(slot=1, positions=9, bytes=8)]
            )
            for a, b in parts
        ],
    )


async def test_a_stage_is_told_of_all_its_parts_and_what_came_of_them_is_passed_on(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(3, 0, 4))
        await until(lambda: stages)
        stages[0].say("ready")
        coordinator.tell(carry=carry_order(0, 4, (0, 3), (3, 4), to="127.0.0.1:5"))
        await until(lambda: stages[0].commands[-1]["command"] == "carry")
        order = stages[0].commands[-1]
        cargo = [(1, 9, 8, 0, 0.0)]
        assert order["parts"] == [
            {"layers": (0, 3), "to": "127.0.0.1:5", "sender": "n7", "cargo": cargo},
            {"layers": (3, 4), "to": "127.0.0.1:5", "sender": "n7", "cargo": cargo},
        ]
        assert (order["term"], order["epoch"], order["keep"], order["within_s"]) == (1, 4, 3, 2.5)
        stages[0].say("carried", epoch=4, layers=[3, 4], given=True, sequences=1, bytes=7, seconds=0.5, code="")
        coordinator.tell(carry=carry_order(4, 8, (4, 5), (5, 8), to="127.0.0.1:5"))  # it has no such stage
        coordinator.tell(carry=carry_order(2, 8, (2, 4), (4, 8)))
        await until(lambda: len(said(coordinator)) == 4)
    first, *gone = said(coordinator)
    assert (first.epoch, first.given, first.sequences, first.bytes) == (4, True, 1, 7)
    assert (first.layers.begin, first.layers.end) == (3, 4)
    assert [(one.layers.begin, one.layers.end, one.given, one.code) for one in gone] == [
        (4, 5, True, "stage_gone"),
        (5, 8, True, "stage_gone"),
        (2, 8, False, "stage_gone"),
    ]


def said(coordinator: Coordinator) -> list[pb.Carried]:
    return [message.carried for message in coordinator.heard if message.HasField("carried")]


async def test_a_node_that_leaves_waits_for_its_layers_to_move(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.heard)
        await asyncio.wait_for(node.leave(DEADLINE_S), DEADLINE_S)  # it has none
        assert not any(message.HasField("leave_wish") for message in coordinator.heard)
        coordinator.tell(assign=assignment(1))
        await until(lambda: coordinator.states(1))
        leaving = asyncio.create_task(node.leave(DEADLINE_S))
        await until(lambda: any(message.HasField("leave_wish") for message in coordinator.heard))
        coordinator.tell(drained=pb.Drained(code="no_plan", message="the others are full"))
        coordinator.tell(drained=pb.Drained())
        await asyncio.wait_for(leaving, DEADLINE_S)
        await until(lambda: any(message.HasField("leave") for message in coordinator.heard))
        again = asyncio.create_task(node.leave(0.01))  # nobody answers
        await asyncio.wait_for(again, DEADLINE_S)


async def test_a_model_that_is_not_here_is_asked_for_by_name_and_place(node: NodeDaemon, files: NodeFiles) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port, running(node, f"127.0.0.1:{port}"):
        await until(lambda: coordinator.hellos)
        coordinator.tell(assign=assignment(1, model="absent"))
        await until(lambda: coordinator.states(1))
        event = coordinator.events()[0]
        assert (event.state, event.code) == (pb.STAGE_STATE_FAILED, "model_not_found")
        assert "absent" in event.detail and "models" in event.detail and "one" in event.detail


async def test_the_stage_ends_with_the_daemon(node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]) -> None:
    coordinator = Coordinator()
    async with serving(coordinator, files) as port:
        async with running(node, f"127.0.0.1:{port}"):
            await until(lambda: coordinator.hellos)
            coordinator.tell(assign=assignment(1))
            await until(lambda: coordinator.states(1))
        assert not stages[0].alive


async def test_nobody_there_is_said_in_the_systems_words() -> None:
    async with await asyncio.start_server(lambda _r, writer: writer.close(), "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await local_host(f"127.0.0.1:{port}", DEADLINE_S) == "127.0.0.1"
    with pytest.raises(PeerError, match=r"not reached \(Connection refused\)"):
        await local_host(f"127.0.0.1:{port}", DEADLINE_S)


def test_grpc_knows_every_option_that_is_set() -> None:
    """It ignores others silently: a wrong name once ended every idle connection after some seconds, for its pings."""
    library = Path(cygrpc.__file__).read_bytes()
    options = (*channel.SERVER_OPTIONS, *channel.ENROLMENT_SERVER_OPTIONS, *channel.channel_options(1))
    assert [key for key, _ in options if key.encode() + b"\0" not in library] == []
    assert channel.MIN_PING_INTERVAL_MS < channel.KEEPALIVE_MS


class Moving(Standing):
    """In the place of a search: one address after the other."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = list(addresses)
        self.welcomed: list[str] = []
        self.peers: list[pb.Peers] = []

    async def coordinator(self) -> str:
        return self._addresses.pop(0) if len(self._addresses) > 1 else self._addresses[0]

    async def attached(self, address: str) -> None:
        self.welcomed.append(address)

    async def told(self, peers: pb.Peers) -> None:
        self.peers.append(peers)


async def test_a_node_whose_coordinator_has_moved_looks_for_it_anew(
    node: NodeDaemon, files: NodeFiles, stages: list[PlayedStage]
) -> None:
    old, new = Coordinator(), Coordinator()
    async with serving(old, files) as first, serving(new, files) as second:
        seek = Moving(f"127.0.0.1:{first}", f"127.0.0.1:{second}")
        task = asyncio.create_task(node.run(seek))
        await until(lambda: old.hellos)
        old.tell(assign=assignment(1))
        await until(lambda: stages and stages[0].commands)
        old.hang_up()
        await until(lambda: new.hellos)
        new.tell(peers=pb.Peers(peers=[pb.Peer(id="x", hosts=["10.0.0.1"])]))
        await until(lambda: seek.peers)
        assert seek.welcomed == [f"127.0.0.1:{first}", f"127.0.0.1:{second}"]
        assert stages[0].alive and len(stages) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_hop_on_the_coordinators_machine_is_reached_where_the_coordinator_is(node: NodeDaemon) -> None:
    node._stages._coordinator = "10.0.0.1:8477"
    assert node._stages._seen_from_here("127.0.0.1:5000") == "10.0.0.1:5000"
    assert node._stages._seen_from_here("10.0.0.9:5000") == "10.0.0.9:5000"
    assert node._stages._seen_from_here("") == ""
    node._stages._coordinator = "[fd00::1]:8477"
    assert node._stages._seen_from_here("[::1]:5000") == "[fd00::1]:5000"
