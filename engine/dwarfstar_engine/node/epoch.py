"""One epoch: its stages, the nodes that run them, and what these are told. No IO, no decisions."""

from __future__ import annotations

from dataclasses import dataclass, field

from dwarfstar_engine.batch.chunks import ChunkCosts
from dwarfstar_engine.batch.costs import RingCosts, StageCost
from dwarfstar_engine.batch.restore import NO_CELLS, Cells, Kept, kept
from dwarfstar_engine.batch.scheduler import Limits
from dwarfstar_engine.native import WireType
from dwarfstar_engine.node.dispatcher import StageTimes
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.node.needs import most_rows, need
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.plan.proportional import StagePlan
from dwarfstar_engine.plan.standby import Layers, whole_bytes
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import StageView
from dwarfstar_engine.wire.frames import MAX_ROUNDS
from dwarfstar_engine.wire.generated import control_pb2 as pb

MIB = 1 << 20
ANSWERED = (pb.STAGE_STATE_READY, pb.STAGE_STATE_LOADING)  # last said by a stage that then fell silent


@dataclass(slots=True)
class Stage:
    """A stage of the epoch and the node that runs it."""

    plan: StagePlan
    member: Member
    event: pb.StageEvent | None = None  # its last one in this epoch
    link: pb.LinkProfile = field(default_factory=pb.LinkProfile)  # to the next stage
    profile: pb.StageProfile = field(default_factory=pb.StageProfile)
    report: pb.StageReport = field(default_factory=pb.StageReport)  # its live figures
    read_bytes: int = 0  # from disks, when it was loaded
    cells: dict[int, Cells] = field(default_factory=dict)  # by slot: what it kept when it joined the ring

    def heard(self, event: pb.StageEvent) -> None:
        self.event = event
        self.read_bytes = event.read_bytes or self.read_bytes
        if event.state == pb.STAGE_STATE_LINKED:
            self.cells = {one.slot: Cells(one.held, one.floor, one.recorded) for one in event.slots}
        if event.HasField("profile"):
            self.profile = event.profile
        if event.HasField("link"):
            self.link = event.link

    @property
    def address(self) -> str:
        """Where frames for it go: it is ready, and has said where it listens."""
        assert self.event is not None
        host = f"[{self.member.host}]" if ":" in self.member.host else self.member.host
        return f"{host}:{self.event.port}"

    def expected_profile(self) -> pb.StageProfile | None:
        """What its rows will take, by what the node's last stage was measured to; None if there was none."""
        if not self.member.profiled:
            return None
        share = (self.plan.layers[1] - self.plan.layers[0]) / self.member.profiled
        measured = self.member.profile
        return pb.StageProfile(
            prompt=[pb.RowCost(rows=cost.rows, ms=cost.ms * share) for cost in measured.prompt],
            step_ms=measured.step_ms * share,
            head_ms=measured.head_ms * share,
            together_ms=measured.together_ms * share,
            batched=measured.batched,
            window=measured.window,
        )

    def reached(self, state: pb.StageState.ValueType) -> bool:
        return self.event is not None and self.event.state == state


@dataclass(frozen=True, slots=True)
class Epoch:
    """stages: in the order of the ring. leader: id in the certificate of the coordinator."""

    term: int
    number: int
    leader: str
    stages: tuple[Stage, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{s.member.name} [{s.plan.layers[0]}, {s.plan.layers[1]})" for s in self.stages)

    @property
    def nodes(self) -> set[str]:
        """Ids."""
        return {stage.member.id for stage in self.stages}

    def layers_of(self, member: Member) -> int:
        """How many layers of the model a member's stage has."""
        return next((s.plan.layers[1] - s.plan.layers[0] for s in self.stages if s.member is member), 0)

    def has(self, member: Member) -> bool:
        return any(stage.member is member for stage in self.stages)

    def stage(self, member: Member, layers: Layers) -> Stage | None:
        return next((one for one in self.stages if one.member is member and one.plan.layers == layers), None)

    def after(self, stage: Stage) -> Stage | None:
        """The next one; None behind the last."""
        index = self.stages.index(stage)
        return self.stages[index + 1] if index + 1 < len(self.stages) else None

    # --- what stages are told ---

    def assign(
        self, plan: StagePlan, settings: Settings, source: Source, context: int, ends: frozenset[int], standby: bool
    ) -> pb.Assign:
        """What a node is to load. source: the file that it runs. standby: it is to wait with it."""
        layers = plan.layers
        return pb.Assign(
            term=self.term,
            epoch=self.number,
            model=source.ref,
            layer_begin=layers[0],
            layer_end=layers[1],
            first=layers[0] == 0,
            last=layers[1] == source.layers,
            standby=standby,
            bytes=whole_bytes(plan, need(settings, source, context)),
            options=pb.StageOptions(
                context=context,
                slots=settings.slots,
                batch=most_rows(settings),
                wire_type=0 if settings.wire == "auto" else WireType[settings.wire.upper()],
                flash_attention=settings.flash_attention,
                kv_type=settings.kv,
                exact=settings.batching == "exact",
                record_bytes=settings.record_mib * MIB,
                ends=sorted(ends),
            ),
        )

    def link(self, index: int, keep: int = 0) -> pb.Link:
        """Whom a stage sends to, and from whom it takes frames: from the one before it; the first one from the
        coordinator and the last stage. keep: the epoch whose sequences go on; 0: none."""
        stages = self.stages
        following = stages[index + 1 : index + 2]
        return pb.Link(
            term=self.term,
            epoch=self.number,
            next_hop=following[0].address if following else "",
            feed_hop="" if following or not index else stages[0].address,
            senders=[stages[index - 1].member.id] if index else [self.leader, stages[-1].member.id],
            layers=pb.Slice(begin=stages[index].plan.layers[0], end=stages[index].plan.layers[1]),
            keep=keep,
        )

    def kept(self, slot: int, positions: int) -> Kept | None:
        """What the stages kept of a sequence of which ``positions`` rows were through all of them; None: not enough."""
        return kept(slot, positions, [stage.cells.get(slot, NO_CELLS) for stage in self.stages])

    # --- what they measured ---

    def limits(self, settings: Settings, context: int, *, drafts: bool) -> Limits:
        """Bounds of the scheduler."""
        prompts = tuple(tuple((cost.rows, cost.ms) for cost in stage.profile.prompt) for stage in self.stages)
        return Limits(
            slots=settings.slots,
            context=context,
            stages=len(self.stages),
            chunk=settings.chunk,
            costs=ChunkCosts(prompts),
            queued=settings.queue,
            cache=settings.prefix_cache != "off",
            exact=settings.prefix_cache == "exact",
            windowed=any(stage.profile.window for stage in self.stages),
            rounds=MAX_ROUNDS if self._feeds else 0,
            drafts=drafts,
        )

    @property
    def speed(self) -> float:
        """Tokens a second, about, with the ring full; 0.0: a stage was not measured."""
        steps_ms = [stage.profile.step_ms for stage in self.stages]
        return 1000 / max(steps_ms) if steps_ms and min(steps_ms) > 0 else 0.0

    @property
    def _feeds(self) -> bool:
        """The last stage reaches the first one."""
        return self.stages[-1].link.feeds

    def costs(self) -> RingCosts:
        profiles = [stage.profile for stage in self.stages]
        stages = tuple(StageCost(one.step_ms, one.together_ms if one.batched else 0.0) for one in profiles)
        return RingCosts(stages, tuple(stage.link.round_trip_ms for stage in self.stages), self._feeds)

    # --- what people see ---

    def loading(self) -> str:
        """How far the stages are."""
        parts = []
        for stage in self.stages:
            event, done = stage.event, any(map(stage.reached, (pb.STAGE_STATE_READY, pb.STAGE_STATE_LINKED)))
            parts.append(f"{stage.member.name} {100 if done else round(100 * event.share) if event else 0} %")
        return ", ".join(parts)

    def views(
        self, source: Source, times: list[StageTimes] | None, tok_s: float, pipeline: int = 0
    ) -> tuple[StageView, ...]:
        """source: the model. times: of each stage, once it serves."""
        last = len(self.stages) - 1
        return tuple(
            _view(stage, stage.member.runs(source), times[index] if times else None, tok_s, index == last, pipeline)
            for index, stage in enumerate(self.stages)
        )


def _view(stage: Stage, file: Source, times: StageTimes | None, tok_s: float, last: bool, pipeline: int) -> StageView:
    member, plan, report = stage.member, stage.plan, stage.report
    wire = WireType(stage.link.wire_type).name.lower() if stage.link.wire_type else ""
    return StageView(
        node=member.name,
        layers=plan.layers,
        weights_gib=round(plan.weights_bytes / GIB, 4),
        kv_gib=round(plan.kv_bytes / GIB, 4),
        ms_per_token=round(times.compute_ms if times and times.frames else report.compute_ms, 3),
        tok_s=round(tok_s, 2),
        busy=round(report.busy, 3),
        wait=round(max(0.0, 1.0 - report.busy), 3),
        wire="ids" if last else wire,
        link_ms=round(stage.link.round_trip_ms, 3),
        link_mb_s=round(stage.link.mb_s, 1),
        pid=stage.event.pid if stage.event else 0,
        state="ready" if times else "loading",
        pipeline=pipeline,
        rss_gib=round(report.rss_bytes / GIB, 4) if report.rss_bytes else None,
        rows_s=round(report.rows_s, 1) if report.rss_bytes else None,
        file=file.name,
        quantisation=file.quantisation,
    )
