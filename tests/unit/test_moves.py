"""What goes on beside an epoch, with a pipeline and nodes that are played."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import pytest

from dwarfstar_engine.errors import PeerError, PlanError
from dwarfstar_engine.node.beside import MAX_HELD, NO_ROOM, RELEASED
from dwarfstar_engine.node.epoch import Epoch, Stage
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.moves import AGAIN_S, REPLAN_EVERY_S, REPLAN_IDLE_S, REST_S, Moves, find
from dwarfstar_engine.plan.proportional import Need, Plan, StagePlan
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb

DEADLINE_S = 10.0
LAYER_BYTES = 10


def stage_of(node: str, a: int, b: int) -> StagePlan:
    return StagePlan(node, (a, b), (b - a) * LAYER_BYTES, 0)


def plan_of(*stages: tuple[str, int, int]) -> Plan:
    return Plan(tuple(stage_of(*stage) for stage in stages))


class Played:
    """A pipeline of eight layers. best: its plans, by the nodes left out. idle: for so long."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.term, self.epoch = 1, 1
        self.members: dict[str, Member] = {}
        self.planned: Plan | None = None
        self.gone_at = -1e9
        self.ring = Epoch(1, 1, "coordinator")
        self.serving = True
        self.idle = 0.0
        self.best: dict[frozenset[str], Plan] = {}
        self.elsewhere: Plan | None = None  # with whole slices
        self.switches: list[Plan] = []
        self.stirred = 0
        self.dispensable = False
        self.handed_over: list[str] = []
        self.moves = Moves(self)

    def add(self, name: str, lends: int = 1000, instance: str = "1") -> Member:
        member = Member(name, name, "127.0.0.1", pb.Device(effective_vram_bytes=lends), instance)
        self.members[name] = member
        self.moves.came(member)
        return member

    def serve(self, plan: Plan) -> None:
        self.planned, self.serving, self.epoch = plan, True, self.epoch + 1
        self.ring = Epoch(
            1, self.epoch, "coordinator", tuple(Stage(one, self.members[one.node]) for one in plan.stages)
        )
        for one in plan.stages:
            self.say(self.members[one.node], *one.layers, pb.STAGE_STATE_LINKED)
        self.moves.served(-1e9)

    def say(self, member: Member, a: int, b: int, state: pb.StageState.ValueType, code: str = "") -> None:
        event = pb.StageEvent(state=state, layers=pb.Slice(begin=a, end=b), code=code, detail="told")
        self.moves.beside.heard(member, event)

    def idle_s(self, now: float) -> float:
        return self.idle

    def whole(self, without: Collection[str]) -> Plan | None:
        return self.elsewhere

    def plan(self, without: Collection[str] = ()) -> Plan:
        drained = {member.id for member in self.members.values() if member.drained}
        try:
            return self.best[frozenset(without) | drained]
        except KeyError:
            raise PlanError("it does not fit", code="full") from None

    def need(self) -> Need:
        return Need(cells=0, reserve_bytes=0)

    def stage_plan(self, node: str, layers: tuple[int, int]) -> StagePlan:
        return stage_of(node, *layers)

    def assignment(self, plan: StagePlan, *, standby: bool) -> pb.Assign:
        return pb.Assign(epoch=self.epoch, layer_begin=plan.layers[0], layer_end=plan.layers[1], standby=standby)

    def switch(self, plan: Plan, why: str) -> None:
        self.switches.append(plan)
        self.serving = False
        self.moves.stop()

    def stir(self) -> None:
        self.stirred += 1

    def hand_over(self, why: str) -> None:
        self.handed_over.append(why)
        self.serving = False
        self.ring = Epoch(1, self.epoch, "coordinator")


def sent(member: Member) -> list[pb.CoordinatorMessage]:
    """What a node was told since the last look."""
    found = []
    while not member.outbox.empty():
        found.append(member.outbox.get_nowait())
    return found


def assigned(member: Member) -> list[tuple[int, int]]:
    told = [message.assign for message in sent(member) if message.HasField("assign")]
    assert all(assign.standby for assign in told)
    return [(assign.layer_begin, assign.layer_end) for assign in told]


async def until(look: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not look():  # noqa: ASYNC110 - looks at what another part of the program does
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


TWO = plan_of(("a", 0, 4), ("b", 4, 8))
THREE = plan_of(("a", 0, 3), ("b", 3, 6), ("c", 6, 8))


def grown(**settings: Any) -> Played:
    """Two nodes serve, and a third has come."""
    played = Played(**settings)
    for name in "abc":
        played.add(name)
    played.best[frozenset()] = THREE
    played.serve(TWO)
    return played


async def test_a_copy_of_each_stage_is_loaded_one_after_the_other() -> None:
    played = Played(standby=1, replan="off")
    a, b = played.add("a"), played.add("b")
    played.serve(TWO)
    played.moves.tick(0.0)
    await settle()
    played.moves.tick(0.5)  # still at it
    await settle()
    assert (assigned(a), assigned(b)) == ([], [(0, 4)])
    played.say(b, 0, 4, pb.STAGE_STATE_READY)
    await settle()
    assert (assigned(a), assigned(b)) == ([(4, 8)], [])
    assert [(one.node, one.layers, one.state) for one in played.moves.views()] == [
        ("a", (4, 8), "loading"),
        ("b", (0, 4), "ready"),
    ]
    played.say(a, 4, 8, pb.STAGE_STATE_READY)
    await settle()
    played.moves.tick(1.0)
    await settle()
    assert (assigned(a), assigned(b)) == ([], [])
    played.say(b, 0, 4, pb.STAGE_STATE_EXITED)  # it died: another one
    played.moves.tick(1.5)
    await settle()
    assert assigned(b) == [(0, 4)]


async def test_what_no_plan_needs_is_given_back() -> None:
    played = Played()
    a, b = played.add("a"), played.add("b")
    played.say(b, 0, 8, pb.STAGE_STATE_LINKED)  # of an older plan
    played.serve(TWO)
    played.moves.tick(0.0)
    (told,) = [message.release for message in sent(b)]
    assert told.rest and told.epoch == played.epoch and [(one.begin, one.end) for one in told.keep] == [(4, 8)]
    played.say(b, 0, 8, pb.STAGE_STATE_EXITED, RELEASED)
    assert set(b.held) == {(4, 8)}
    sent(a)
    played.moves.tick(0.5)
    assert not sent(a) and not sent(b), "it is told once"


async def test_a_better_plan_is_loaded_before_it_is_switched_to() -> None:
    played = grown()
    nodes = list(played.members.values())
    played.moves.tick(0.0)
    await settle()
    assert [assigned(node) for node in nodes] == [[(0, 3)], [(3, 6)], [(6, 8)]]
    played.say(nodes[0], 0, 3, pb.STAGE_STATE_READY)
    played.say(nodes[1], 3, 6, pb.STAGE_STATE_LOADING)
    played.say(nodes[2], 6, 8, pb.STAGE_STATE_READY)
    await settle()
    assert not played.switches
    played.say(nodes[1], 3, 6, pb.STAGE_STATE_READY)
    await until(lambda: played.switches)
    assert played.switches == [THREE]


async def test_nothing_is_loaded_while_streams_are_replayed() -> None:
    played = grown()
    played.moves.served(10.0)
    played.moves.tick(10.0 + REST_S / 2)
    await settle()
    assert not any(sent(node) for node in played.members.values())
    played.moves.tick(10.0 + REST_S)
    await settle()
    assert assigned(played.members["c"]) == [(6, 8)]
    played.moves.close()


async def test_streams_pause_for_a_better_plan_only_so_often() -> None:
    played = grown()
    for index, stage in enumerate(THREE.stages):
        played.say(list(played.members.values())[index], *stage.layers, pb.STAGE_STATE_READY)
    played.moves._switched_at = 100.0
    for idle, now, starts in (
        (0.0, 100.0 + REPLAN_EVERY_S - 1, False),
        (REPLAN_IDLE_S, 100.0 + REPLAN_EVERY_S - 1, True),
        (0.0, 100.0 + REPLAN_EVERY_S, True),
    ):
        played.idle = idle
        assert (played.moves._better(now) is not None) is starts


async def test_a_node_that_took_over_keeps_both_stages_for_as_long_as_the_lost_one_may_come_back() -> None:
    played = Played(rejoin_s=10.0)
    for name in "ab":
        played.add(name)
    played.serve(plan_of(("a", 0, 3), ("b", 3, 6), ("b", 6, 8)))
    played.best[frozenset()] = TWO
    played.gone_at, played.idle = 50.0, REPLAN_IDLE_S
    assert played.moves._better(55.0) is None
    assert played.moves._better(61.0) == TWO


async def test_streams_that_paused_for_a_lost_node_do_not_soon_pause_again_for_its_return() -> None:
    played = grown()
    played.gone_at = 100.0
    assert played.moves._better(100.0 + REPLAN_EVERY_S - 1) is None
    assert played.moves._better(100.0 + REPLAN_EVERY_S) is not None
    played.idle = REPLAN_IDLE_S
    assert played.moves._better(103.0) is not None


@pytest.mark.parametrize(("mode", "idle", "starts"), [("off", 60.0, 0), ("idle", 0.0, 0), ("idle", 60.0, 1)])
async def test_when_a_better_plan_is_looked_for_is_a_setting(mode: str, idle: float, starts: int) -> None:
    played = grown(replan=mode)
    played.idle = idle
    played.moves.tick(0.0)
    await settle()
    assert len(assigned(played.members["c"])) == starts
    played.moves.close()


@pytest.mark.parametrize("lost", [True, False])
async def test_what_cannot_be_loaded_leaves_the_epoch_as_it_is(lost: bool, caplog: pytest.LogCaptureFixture) -> None:
    played = grown()
    node = played.members["c"]
    played.moves.tick(0.0)
    await settle()
    if lost:
        del played.members["c"]
        played.moves.beside.stir()
    else:
        played.say(node, 6, 8, pb.STAGE_STATE_FAILED, "model_not_found")
    await until(lambda: played.moves._work is None)
    assert not played.switches and played.serving and "goes on" in caplog.text
    played.members["c"] = node
    assert played.moves._better(played.moves._failed_at + AGAIN_S - 1) is None
    assert played.moves._better(played.moves._failed_at + AGAIN_S) == THREE


async def test_a_plan_without_room_beside_the_present_one_waits_until_nobody_is_served() -> None:
    played = grown()
    played.members["b"].device.effective_vram_bytes = 5 * LAYER_BYTES  # [4, 8) and not [3, 6) as well
    played.moves.tick(0.0)
    await settle()
    assert not any(assigned(node) for node in played.members.values()) and not played.switches
    played.moves.tick(0.5)
    await settle()
    assert not played.switches
    played.idle = REPLAN_IDLE_S
    played.moves.tick(1.0)
    await settle()
    assert played.switches == [THREE]


async def test_copies_make_way_for_the_next_plan() -> None:
    played = grown(standby=1)
    b = played.members["b"]
    played.say(b, 0, 4, pb.STAGE_STATE_READY)
    b.device.effective_vram_bytes = 8 * LAYER_BYTES  # its own four and the copy; three more are asked for
    played.moves.tick(0.0)
    await settle()
    told = sent(b)
    assert [message.WhichOneof("message") for message in told] == ["release", "release", "assign"]
    assert [(one.begin, one.end) for one in told[0].release.keep] == [(0, 4), (4, 8)], "wanted as a copy"
    assert [(one.begin, one.end) for one in told[1].release.keep] == [(3, 6), (4, 8)]
    played.moves.close()


async def test_a_node_that_tells_of_slices_without_end_is_not_listened_to() -> None:
    played = Played()
    node = played.add("a")
    for layer in range(2 * MAX_HELD):
        played.say(node, layer, layer + 1, pb.STAGE_STATE_READY)
    assert len(node.held) == MAX_HELD
    for _ in range(3):
        played.moves.wish(node)
    assert len(played.moves._wishes) == 1
    await until(lambda: not played.moves._wishes)


# --- leaving ---


def draining() -> tuple[Played, Member, asyncio.Task[bool]]:
    played = Played()
    for name in "abc":
        played.add(name)
    played.serve(THREE)
    played.best = {frozenset("c"): TWO, frozenset(): THREE}
    node = played.members["c"]
    return played, node, asyncio.create_task(played.moves.drain(node))


async def test_a_drained_nodes_layers_are_loaded_elsewhere_first() -> None:
    played, node, task = draining()
    await settle()
    a, b = played.members["a"], played.members["b"]
    assert (assigned(a), assigned(b), assigned(node)) == ([(0, 4)], [(4, 8)], [])
    played.say(a, 0, 4, pb.STAGE_STATE_READY)
    played.moves.tick(0.0)
    assert not played.switches and not task.done()
    played.say(b, 4, 8, pb.STAGE_STATE_READY)
    await until(lambda: played.switches == [TWO])
    assert not any(message.HasField("drained") for message in sent(node)), "not before the next epoch serves"
    played.serve(TWO)
    assert await asyncio.wait_for(task, DEADLINE_S) is True
    told = sent(node)
    assert [message.WhichOneof("message") for message in told] == ["release", "drained"] and not told[0].release.keep
    assert node.drained and not told[1].drained.code
    assert played.moves._better(1e9) is None


async def test_streams_wait_where_there_is_no_room_to_load_first() -> None:
    played, _, task = draining()
    for name in "ab":
        played.members[name].device.effective_vram_bytes = 5 * LAYER_BYTES
    await until(lambda: played.switches == [TWO])
    assert not assigned(played.members["a"])
    played.serve(TWO)
    assert await asyncio.wait_for(task, DEADLINE_S) is False


@pytest.mark.parametrize("idle", [0.0, 60.0])
async def test_a_slice_moves_whole_while_streams_run(idle: float) -> None:
    played = Played()
    for name in "abc":
        played.add(name)
    played.serve(THREE)
    played.best = {frozenset("c"): TWO, frozenset(): THREE}
    slice_ = THREE.stages[2].layers
    played.elsewhere = Plan((*THREE.stages[:2], stage_of("b", *slice_)))
    played.idle = idle
    task = asyncio.create_task(played.moves.drain(played.members["c"]))
    await settle()
    asked = [assigned(played.members[name]) for name in "ab"]
    assert asked == ([[(0, 4)], [(4, 8)]] if idle else [[], [slice_]])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_pipeline_that_others_can_replace_ends_for_a_drain() -> None:
    played = Played()
    node = played.add("a")
    played.serve(plan_of(("a", 0, 8)))
    played.dispensable = True
    assert await played.moves.drain(node)
    assert played.handed_over == ["a is drained"] and node.drained
    assert [message.WhichOneof("message") for message in sent(node)] == ["release", "drained"]


async def test_a_node_that_is_needed_keeps_its_layers() -> None:
    played = Played()
    for name in "ab":
        played.add(name)
    played.serve(TWO)
    node = played.members["b"]
    with pytest.raises(PlanError, match="b cannot be drained, as the others cannot take its layers: it does not fit"):
        await played.moves.drain(node)
    assert not node.drained and not played.switches and not sent(node)
    played.moves.wish(node)
    await until(lambda: not node.outbox.empty())
    (told,) = sent(node)
    assert (told.drained.code, "cannot be drained" in told.drained.message) == ("full", True)


async def test_a_drain_without_a_plan_in_the_end_is_undone() -> None:
    played, node, task = draining()
    await settle()
    for name, a, b in (("a", 0, 4), ("b", 4, 8)):
        played.say(played.members[name], a, b, pb.STAGE_STATE_READY)
    await until(lambda: played.switches)
    played.moves.no_plan(PlanError("another node was lost"))
    with pytest.raises(PlanError, match="another node was lost"):
        await asyncio.wait_for(task, DEADLINE_S)
    assert not node.drained and played.stirred


async def test_a_drained_node_is_planned_for_when_it_was_started_again_or_its_owner_says_so() -> None:
    played = Played()
    played.add("a")
    node = played.add("b")
    await played.moves.drain(node)  # it has no layers: there is nothing to move
    assert node.drained
    assert played.add("b").drained, "the same process, over a new connection"
    assert not played.add("b", instance="2").drained
    node = played.members["b"]
    await played.moves.drain(node)
    played.moves.undo(node)
    assert not node.drained and played.stirred and not played.add("b", instance="2").drained


def test_a_node_is_called_by_name_or_id() -> None:
    played = Played()
    a, b = played.add("a"), played.add("b")
    b.name = "attic"
    assert find(played.members.values(), "attic") is b and find(played.members.values(), "b") is b
    a.name = "attic"
    with pytest.raises(PeerError, match=r"Several nodes.*a, b"):
        find(played.members.values(), "attic")
    with pytest.raises(PeerError, match=r"No node called 'x' is here; these are: attic, attic"):
        find(played.members.values(), "x")
    assert NO_ROOM == "no_room"
