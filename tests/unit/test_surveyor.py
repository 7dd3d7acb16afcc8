"""What the planner is told of the running cluster; and how a machine comes to know its own figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.node import bandwidth
from dwarfstar_engine.node.facts import lent_bytes
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.node.source import Source, open_source
from dwarfstar_engine.node.surveyor import MAX_SLICES, NEWS, RAN_S, Survey, Surveyor
from dwarfstar_engine.plan.capacity import usable_bytes
from dwarfstar_engine.plan.cluster import Kind, Link, Measured
from dwarfstar_engine.plan.proportional import Plan, StagePlan
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb


def member(node: str, name: str, host: str = "10.0.0.1", **device: object) -> Member:
    told = pb.Device(kind="cpu", memory_total_bytes=8 * GIB, memory_usable_bytes=4 * GIB, **device)  # type: ignore[arg-type]
    return Member(node, name, host, told)


def profile(step_ms: float = 2.0, together_ms: float = 5.0) -> pb.StageProfile:
    prompt = [pb.RowCost(rows=64, ms=30.0)]
    return pb.StageProfile(prompt=prompt, step_ms=step_ms, together_ms=together_ms, batched=together_ms > 0)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source("toy:12", tmp_path)


def survey(surveyor: Surveyor, source: Source, *members: Member, lent: dict[str, str] | None = None) -> Survey:
    return surveyor.survey(members, source, Settings(), 128, lent)


def test_nodes_are_called_by_name_where_that_is_one_nodes_only(source: Source) -> None:
    found = survey(Surveyor(), source, member("1", "tower"), member("2", "box"), member("3", "box"))
    assert [node.name for node in found.cluster.nodes] == ["tower", "2", "3"]
    assert found.ids == {"tower": "1", "2": "2", "3": "3"} and found.names["1"] == "tower"
    stage = StagePlan("tower", (0, 12), 1, 1)
    plan = found.with_ids(Plan((stage,), (("2", "why"),)))
    assert plan.stages[0].node == "1" and plan.excluded == (("2", "why"),)
    assert (found.job.context, found.job.depth, found.job.legal) == (128, 128, source.cuts)


def test_devices_and_overrides(source: Source) -> None:
    plain, gpu = member("1", "a", bandwidth_gb_s=51.2), member("2", "b", effective_vram_bytes=GIB)
    gpu.device.kind = "cuda"
    found = survey(Surveyor(), source, plain, gpu).cluster.nodes
    assert (found[0].devices[0].bandwidth_gb_s, found[0].devices[0].kind) == (51.2, Kind.CPU)
    assert found[1].devices[0].kind is Kind.GPU
    assert [usable_bytes(node) for node in found] == [4 * GIB, GIB] == [plain.usable_bytes, gpu.usable_bytes]
    plain.lent = "50%"
    assert plain.usable_bytes == usable_bytes(survey(Surveyor(), source, plain).cluster.nodes[0]) == 2 * GIB
    tried = survey(Surveyor(), source, plain, gpu, lent={"1": "", "2": "-1"}).cluster.nodes
    assert [usable_bytes(node) for node in tried] == [4 * GIB, 3 * GIB]
    assert (plain.override, gpu.override) == ("50%", "1")


def test_a_node_with_another_file_is_planned_with_its_bytes(source: Source) -> None:
    costs = replace(source.costs, layer_bytes=tuple(2 * size for size in source.costs.layer_bytes))
    file = replace(source, name="big", quantisation="Q8_0", fingerprint="b", costs=costs, stands_for=source.fingerprint)
    plain, other, surveyor = member("1", "a"), member("2", "b"), Surveyor()
    assert not survey(surveyor, source, plain, other).job.by_node
    other.file = file
    surveyor.heard(source, "1", (0, 4), profile(2.0))
    surveyor.heard(source, "2", (0, 4), profile(2.0))  # before its owner gave it the other file
    surveyor.heard(file, "2", (4, 8), profile(4.0))
    found = survey(surveyor, source, plain, other)
    assert found.job.by_node == {"a": source.costs, "b": costs} and found.job.costs == source.costs
    assert [found.job.file_on(name) for name in ("a", "b", "b:1", "c")] == [
        (source.name, ""), ("big", "Q8_0"), ("big", "Q8_0"), (source.name, "")
    ]  # fmt: skip
    assert [[one.layers for one in node.measured] for node in found.cluster.nodes] == [[(0, 4)], [(4, 8)]]
    assert other.runs(open_source("toy:6", Path())) != file, "it stands for one model only"


def test_nodes_of_one_machine_share_its_cores(source: Source) -> None:
    there = [member("1", "a", "127.0.0.1", cores=2, threads=1), member("2", "b", "127.0.0.1", cores=2, threads=1)]
    found = survey(Surveyor(), source, *there, member("3", "c", "10.0.0.3", cores=16)).cluster
    assert [(node.machine, node.cores, node.threads) for node in found.nodes] == [
        ("127.0.0.1", 2, 1),
        ("127.0.0.1", 2, 1),
        ("10.0.0.3", 16, 16),
    ]
    assert found.head == "127.0.0.1"  # the coordinator is on it
    assert survey(Surveyor(), source, member("3", "c", "10.0.0.3")).cluster.head == ""


def test_what_slices_took_is_kept_by_slice_and_model(source: Source, tmp_path: Path) -> None:
    surveyor, node = Surveyor(), member("1", "a")
    surveyor.heard(source, "1", (0, 4), profile(3.0))
    surveyor.heard(source, "1", (4, 12), profile(9.0, 0.0))
    surveyor.heard(source, "1", (0, 4), profile(2.0))
    surveyor.heard(source, "1", (0, 3), pb.StageProfile())  # nothing was measured
    later, first = survey(surveyor, source, node).cluster.nodes[0].measured
    assert (later.layers, later.last, later.batches) == ((4, 12), True, ())
    assert (first.layers, first.step_ms, first.last) == ((0, 4), 2.0, False)
    assert first.batches == ((4, 5.0),) and first.prompt == ((64, 30.0),)
    for end in range(1, 12):
        surveyor.heard(source, "1", (0, end), profile())
    kept = survey(surveyor, source, node).cluster.nodes[0].measured
    assert len(kept) == MAX_SLICES and kept[-1].layers == (0, 11)
    other = open_source("toy:6", tmp_path)
    assert survey(surveyor, other, node).cluster.nodes[0].measured == ()
    surveyor.heard(other, "1", (0, 6), profile())
    assert survey(surveyor, source, node).cluster.nodes[0].measured == ()


def test_what_a_slice_takes_in_use_is_told_of_nodes_that_were_measured(source: Source, tmp_path: Path) -> None:
    surveyor, node = Surveyor(), member("1", "a")

    def told() -> Measured | None:
        return survey(surveyor, source, node).cluster.nodes[0].ran

    surveyor.ran(source, source, "1", (0, 6), 3.0, 5.0)
    assert told() is None, "nothing is known of it"
    surveyor.heard(source, "1", (0, 6), profile())
    surveyor.ran(source, source, "1", (0, 6), 3.0, 5.0)
    first = told()
    assert first == Measured((0, 6), 3.0)
    surveyor.ran(source, source, "1", (0, 6), 3.0 * (1 + NEWS / 2), 5.0)
    assert told() is first, "plans are not made anew for noise"
    surveyor.ran(source, source, "1", (0, 6), 3.0 * (1 + 2 * NEWS), 5.0)
    assert told() == Measured((0, 6), 3.0 * (1 + 2 * NEWS))
    surveyor.ran(source, source, "1", (6, 12), 3.0, 5.0)
    assert told() == Measured((6, 12), 3.0, last=True)
    surveyor.forget(5.0 + RAN_S)
    assert told() is not None
    surveyor.forget(5.1 + RAN_S)
    assert told() is None, "it may be free again"
    surveyor.ran(source, source, "1", (6, 12), 3.0, 5.0)
    other = open_source("toy:8", tmp_path)
    surveyor.heard(other, "1", (0, 6), profile())
    assert survey(surveyor, other, node).cluster.nodes[0].ran is None, "of another model"
    surveyor.ran(source, source, "1", (0, 6), 3.0, 5.0)
    assert told() is None


def test_links_between_machines_are_those_that_were_measured(source: Source) -> None:
    surveyor = Surveyor()
    a, b, c = member("1", "a"), member("2", "b", "10.0.0.2"), member("3", "c", "10.0.0.2")
    surveyor.linked(a, b, pb.LinkProfile(round_trip_ms=0.8, mb_s=100.0))
    surveyor.linked(b, c, pb.LinkProfile(round_trip_ms=0.1, mb_s=5000.0))
    cluster = survey(surveyor, source, a, b, c).cluster
    assert cluster.between(cluster.nodes[0], cluster.nodes[2]) == Link(0.8, 0.4) == cluster.link
    assert cluster.between(cluster.nodes[1], cluster.nodes[2]).gbit_s > 10, "one machine"


def test_bandwidth_is_measured_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []

    def measure(**bounds: float) -> float:
        assert bounds["seconds"] <= 0.3
        measured.append(20.0 + len(measured))
        return measured[-1]

    monkeypatch.setattr(bandwidth, "memory_bandwidth_gb_s", measure)
    folder = tmp_path / "home"
    assert [bandwidth.known_gb_s(folder) for _ in range(3)] == [20.0] * 3
    monkeypatch.setattr(bandwidth, "machine", lambda: "another")
    assert bandwidth.known_gb_s(folder) == 21.0
    for damage in (b"{", b"[]", b'{"machine":"another","gb_s":"fast"}', b'{"machine":"another","gb_s":-1}'):
        (folder / bandwidth.FILE).write_bytes(damage)
        bandwidth.known_gb_s(folder)
    assert len(measured) == 6

    def short(**bounds: float) -> float:
        raise OSError("no memory")

    monkeypatch.setattr(bandwidth, "memory_bandwidth_gb_s", short)
    assert bandwidth.known_gb_s(tmp_path / "other") == 0.0


def test_what_an_owner_says_comes_to_bytes() -> None:
    for said, lent in (("", 0), ("3", 3 * GIB), ("50%", 2 * GIB), ("-1", 3 * GIB), ("100", 8 * GIB)):
        assert lent_bytes(said, 8 * GIB, 4 * GIB) == lent
    with pytest.raises(SettingsError, match="leaves nothing"):
        lent_bytes("-5", 8 * GIB, 4 * GIB)
