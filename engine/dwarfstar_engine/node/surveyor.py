"""What the planner is told of the cluster that runs: its nodes, what slices took on them, and its links.

Nodes are called by their names, as people read what the planner says; where a name is not one node's only, by id. What
was measured outlives a node's connection, as its machine stays what it is; it is forgotten when another model is
served. Machines are told apart by the address that their stages are reached at.

A node may run its layers from another file of the model (``files``): it is planned with that one's bytes, and what
was measured of it counts for as long as it runs that.

A node does not keep the pace that it was measured at: others use it, it grows hot, and a measurement lasts a moment
only. What a slice takes there in use (``ran``) counts for all its slices; for RAN_S after it was seen last.

Bounds. MAX_SLICES of a node, the newest; MAX_NODES nodes; MAX_LINKS links.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dwarfstar_engine.cluster.membership import MAX_NODES
from dwarfstar_engine.native import WireType
from dwarfstar_engine.node.facts import is_loopback
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.plan.capacity import parse_override
from dwarfstar_engine.plan.cluster import Cluster, Device, Kind, Link, Measured, Node, Override
from dwarfstar_engine.plan.forecast import F32_BYTES, Job
from dwarfstar_engine.plan.proportional import Plan
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb

MAX_SLICES = 8  # a few cuts that were tried; older ones say nothing about the machine as it is now
MAX_LINKS = 1024
NEWS = 0.03  # a pace that differs by less is the same: plans are not made anew for it
RAN_S = 600.0  # a pace counts for so long after it was seen last: a node that is slow now may be free later
TOGETHER = 4  # rows that a stage's profile has run as one
ELEMENT_BYTES = {
    WireType.F32.name: 4.0,
    WireType.F16.name: 2.0,
    WireType.Q8.name: 1.125,
}  # with scales and the largest values


@dataclass(frozen=True, slots=True)
class Survey:
    """ids: node ids by the names that cluster and plans use."""

    cluster: Cluster
    job: Job
    ids: Mapping[str, str]

    @property
    def names(self) -> dict[str, str]:
        """The other way round."""
        return {node: name for name, node in self.ids.items()}

    def with_ids(self, plan: Plan) -> Plan:
        stages = tuple(replace(stage, node=self.ids[stage.node]) for stage in plan.stages)
        return Plan(stages, tuple((self.ids.get(name, name), why) for name, why in plan.excluded))


class Surveyor:
    """See the module."""

    def __init__(self) -> None:
        self._fingerprint = ""
        self._slices: dict[tuple[str, str], dict[Layers, Measured]] = {}  # by node id and file, oldest first
        self._ran: dict[tuple[str, str], tuple[Measured, float]] = {}  # by node id and file; and when it was seen
        self._links: dict[tuple[str, str], Link] = {}

    def heard(self, source: Source, node: str, layers: Layers, profile: pb.StageProfile) -> None:
        """What a slice took on a node, measured there when it was loaded. source: the file it is of."""
        model, key = source.stands_for or source.fingerprint, (node, source.fingerprint)
        if model != self._fingerprint:
            self._fingerprint, self._slices, self._ran = model, {}, {}
        if profile.step_ms <= 0:
            return
        slices = self._slices.pop(key, {})
        slices.pop(layers, None)
        slices[layers] = Measured(
            layers,
            profile.step_ms,
            last=layers[1] == source.layers,
            head_ms=profile.head_ms,
            batches=((TOGETHER, profile.together_ms),) if profile.batched and profile.together_ms > 0 else (),
            prompt=tuple((cost.rows, cost.ms) for cost in profile.prompt if cost.ms > 0),
        )
        while len(slices) > MAX_SLICES:
            del slices[next(iter(slices))]
        self._slices[key] = slices
        while len(self._slices) > MAX_NODES:
            oldest = next(iter(self._slices))
            del self._slices[oldest]
            self._ran.pop(oldest, None)

    def ran(self, model: Source, file: Source, node: str, layers: Layers, ms: float, now_s: float) -> None:
        """What a slice of a file takes on a node for a row, in use; of nodes that were heard of. now_s: monotonic."""
        key = (node, file.fingerprint)
        if model.fingerprint != self._fingerprint or key not in self._slices:
            return
        known, _ = self._ran.get(key, (None, 0.0))
        if known is None or known.layers != layers or abs(ms / known.step_ms - 1) > NEWS:
            known = Measured(layers, ms, last=layers[1] == file.layers)
        self._ran[key] = known, now_s

    def forget(self, now_s: float) -> None:
        """Paces that were not seen for RAN_S."""
        self._ran = {key: one for key, one in self._ran.items() if now_s - one[1] <= RAN_S}

    def linked(self, source: Member, target: Member, link: pb.LinkProfile) -> None:
        """A hop between two nodes, measured when it was opened."""
        if source.host == target.host or link.mb_s <= 0:
            return
        pair = (source.host, target.host)
        self._links.pop(pair, None)
        self._links[pair] = Link(link.mb_s * 8 / 1000, link.round_trip_ms / 2)
        while len(self._links) > MAX_LINKS:
            del self._links[next(iter(self._links))]

    def survey(
        self,
        members: Sequence[Member],
        source: Source,
        settings: Settings,
        context: int,
        lent: Mapping[str, str] | None = None,
    ) -> Survey:
        """lent: overrides by node id that count instead of those that members have; empty: none."""
        measured = self._slices if source.fingerprint == self._fingerprint else {}
        times = Counter(member.name for member in members)
        names = {member.id: member.name if times[member.name] == 1 else member.id for member in members}
        files = {member.id: member.runs(source) for member in members}
        ran = {node: tuple(measured.get((node, file.fingerprint), {}).values()) for node, file in files.items()}
        paces = {node: self._ran.get((node, file.fingerprint), (None,))[0] for node, file in files.items()}
        nodes = tuple(
            _node(names[member.id], member, ran[member.id], paces[member.id], (lent or {}).get(member.id))
            for member in members
        )
        mixed = any(file is not source for file in files.values())
        links = list(self._links.values())
        slowest = min(links, key=lambda link: link.gbit_s) if links else Link()
        job = Job(
            source.costs,
            source.cuts,
            need(settings, source, context),
            context,
            kv_type=settings.kv,
            wire_bytes=ELEMENT_BYTES.get(settings.wire.upper(), F32_BYTES),
            by_node={names[node]: file.costs for node, file in files.items()} if mixed else {},
            file=(source.name, source.quantisation),
            files={names[node]: (file.name, file.quantisation) for node, file in files.items()} if mixed else {},
        )
        job = replace(job, depth=min(job.depth, context))
        head = next((member.host for member in members if is_loopback(member.host)), "")
        cluster = Cluster(nodes, slowest, dict(self._links), head)
        return Survey(cluster, job, {name: node for node, name in names.items()})


def _node(name: str, member: Member, measured: tuple[Measured, ...], ran: Measured | None, lent: str | None) -> Node:
    told = member.device
    usable = told.memory_usable_bytes
    device = Device(
        Kind.CPU if told.kind in ("", "cpu") else Kind.GPU,
        max(told.memory_total_bytes, usable, told.effective_vram_bytes),
        told.bandwidth_gb_s,
        usable or told.effective_vram_bytes,
    )
    threads = told.threads or told.cores or 1
    return Node(name, (device,), _override(member, lent), measured, member.host, told.cores, threads, ran)


def _override(member: Member, lent: str | None) -> Override | None:
    """lent None: as it is now."""
    live = member.lent if lent is None else lent
    if live:
        return parse_override(live)
    set_there = member.device.effective_vram_bytes
    return Override(lend_bytes=set_there) if set_there else None
