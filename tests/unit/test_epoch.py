"""An epoch in which a node runs two stages: each is told and heard apart."""

from __future__ import annotations

from pathlib import Path

from dwarfstar_engine.node.epoch import Epoch, Stage
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.source import open_source
from dwarfstar_engine.plan.proportional import StagePlan
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.trust import OWNER


def member(name: str, host: str) -> Member:
    return Member(name, name, host, pb.Device())


def test_two_stages_of_one_node_are_told_apart() -> None:
    a, b = member("a", "10.0.0.1"), member("b", "10.0.0.2")
    plans = [StagePlan("a", (0, 3), 1, 0), StagePlan("b", (3, 6), 1, 0), StagePlan("b", (6, 8), 1, 0)]
    epoch = Epoch(1, 7, OWNER, tuple(Stage(plan, node) for plan, node in zip(plans, (a, b, b), strict=True)))
    for index, stage in enumerate(epoch.stages):
        stage.heard(
            pb.StageEvent(
                epoch=7,
                state=pb.STAGE_STATE_READY,
                port=5000 + index,
                profile=pb.StageProfile(step_ms=index),
                link=pb.LinkProfile(round_trip_ms=10 * index),
            )
        )
    links = [epoch.link(index) for index in range(3)]
    assert [link.next_hop for link in links] == ["10.0.0.2:5001", "10.0.0.2:5002", ""]
    assert [link.feed_hop for link in links] == ["", "", "10.0.0.1:5000"]
    assert [list(link.senders) for link in links] == [[OWNER, "b"], ["a"], ["b"]]
    assert [(link.layers.begin, link.layers.end) for link in links] == [(0, 3), (3, 6), (6, 8)]
    assert [cost.step_ms for cost in epoch.costs().stages] == [0.0, 1.0, 2.0]
    assert epoch.stage(b, (6, 8)) is epoch.stages[2] and epoch.stage(a, (6, 8)) is None
    assert epoch.nodes == {"a", "b"} and epoch.has(b)


def test_an_assignment_says_what_the_slice_will_take() -> None:
    settings, source = Settings(slots=1), open_source("toy:8", Path())
    plan = StagePlan("a", (0, 3), 3 << 20, 100)
    told = Epoch(1, 7, OWNER).assign(plan, settings, source, 64, frozenset({2}), standby=True)
    assert (told.layer_begin, told.layer_end, told.first, told.last, told.standby) == (0, 3, True, False, True)
    assert told.bytes > plan.weights_bytes + plan.kv_bytes and list(told.options.ends) == [2]
    last = Epoch(1, 7, OWNER).assign(StagePlan("a", (3, 8), 1, 0), settings, source, 64, frozenset(), standby=False)
    assert (last.first, last.last, last.standby) == (False, True, False)
