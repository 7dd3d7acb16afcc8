"""One epoch: its stages, the nodes that run them, and what these are told. No IO, no decisions."""

from __future__ import annotations

from dataclasses import dataclass

from dwarfstar_engine.batch.chunks import ChunkCosts
from dwarfstar_engine.batch.costs import RingCosts, StageCost
from dwarfstar_engine.batch.scheduler import Limits
from dwarfstar_engine.native import WireType
from dwarfstar_engine.node.dispatcher import StageTimes
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.node.needs import most_rows
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.plan.proportional import StagePlan
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import StageView
from dwarfstar_engine.wire.frames import MAX_ROUNDS
from dwarfstar_engine.wire.generated import control_pb2 as pb

ANSWERED = (pb.STAGE_STATE_READY, pb.STAGE_STATE_LOADING)  # last said by a stage that then fell silent


@dataclass(slots=True)
class Stage:
    """A stage of the epoch and the node that runs it."""

    plan: StagePlan
    member: Member

    @property
    def address(self) -> str:
        """Where frames for it go: it is ready, and has said where it listens."""
        assert self.member.stage is not None
        host = f"[{self.member.host}]" if ":" in self.member.host else self.member.host
        return f"{host}:{self.member.stage.port}"

    def reached(self, state: pb.StageState.ValueType) -> bool:
        return self.member.stage is not None and self.member.stage.state == state


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

    def has(self, member: Member) -> bool:
        return any(stage.member is member for stage in self.stages)

    # --- what stages are told ---

    def assign(self, index: int, settings: Settings, source: Source, context: int, ends: frozenset[int]) -> pb.Assign:
        """What a node is to load."""
        layers = self.stages[index].plan.layers
        return pb.Assign(
            term=self.term,
            epoch=self.number,
            model=pb.ModelRef(
                name=source.name, fingerprint=source.fingerprint, path_hint=source.path, layers=source.layers
            ),
            layer_begin=layers[0],
            layer_end=layers[1],
            first=index == 0,
            last=index == len(self.stages) - 1,
            options=pb.StageOptions(
                context=context,
                slots=settings.slots,
                batch=most_rows(settings),
                wire_type=0 if settings.wire == "auto" else WireType[settings.wire.upper()],
                flash_attention=settings.flash_attention,
                kv_type=settings.kv,
                exact=settings.batching == "exact",
                ends=sorted(ends),
            ),
        )

    def link(self, index: int) -> pb.Link:
        """Whom a stage sends to, and from whom it takes frames: from the one before it; the first one from the
        coordinator and the last stage."""
        stages = self.stages
        following = stages[index + 1 : index + 2]
        return pb.Link(
            term=self.term,
            epoch=self.number,
            next_hop=following[0].address if following else "",
            feed_hop="" if following or not index else stages[0].address,
            senders=[stages[index - 1].member.id] if index else [self.leader, stages[-1].member.id],
        )

    # --- what they measured ---

    def limits(self, settings: Settings, context: int, *, drafts: bool) -> Limits:
        """Bounds of the scheduler."""
        members = [stage.member for stage in self.stages]
        prompts = tuple(tuple((cost.rows, cost.ms) for cost in member.profile.prompt) for member in members)
        return Limits(
            slots=settings.slots,
            context=context,
            stages=len(members),
            chunk=settings.chunk,
            costs=ChunkCosts(prompts),
            queued=settings.queue,
            cache=settings.prefix_cache != "off",
            exact=settings.prefix_cache == "exact",
            windowed=any(member.profile.window for member in members),
            rounds=MAX_ROUNDS if members[-1].link.feeds else 0,
            drafts=drafts,
        )

    def costs(self) -> RingCosts:
        members = [stage.member for stage in self.stages]
        stages = tuple(
            StageCost(m.profile.step_ms, m.profile.together_ms if m.profile.batched else 0.0) for m in members
        )
        return RingCosts(stages, tuple(member.link.round_trip_ms for member in members))

    # --- what people see ---

    def loading(self) -> str:
        """How far the stages are."""
        parts = []
        for stage in self.stages:
            event, done = stage.member.stage, any(map(stage.reached, (pb.STAGE_STATE_READY, pb.STAGE_STATE_LINKED)))
            parts.append(f"{stage.member.name} {100 if done else round(100 * event.share) if event else 0} %")
        return ", ".join(parts)

    def views(self, times: list[StageTimes] | None, tok_s: float) -> tuple[StageView, ...]:
        """times: of each stage, once it serves."""
        last = len(self.stages) - 1
        return tuple(
            _view(stage, times[index] if times else None, tok_s, index == last)
            for index, stage in enumerate(self.stages)
        )


def _view(stage: Stage, times: StageTimes | None, tok_s: float, last: bool) -> StageView:
    member, plan = stage.member, stage.plan
    wire = WireType(member.link.wire_type).name.lower() if member.link.wire_type else ""
    return StageView(
        node=member.name,
        layers=plan.layers,
        weights_gib=round(plan.weights_bytes / GIB, 4),
        kv_gib=round(plan.kv_bytes / GIB, 4),
        ms_per_token=round(times.compute_ms, 3) if times else 0.0,
        tok_s=round(tok_s, 2),
        busy=round(member.busy, 3),
        wait=round(max(0.0, 1.0 - member.busy), 3),
        wire="ids" if last else wire,
        link_ms=round(member.link.round_trip_ms, 3),
        link_mb_s=round(member.link.mb_s, 1),
        pid=member.stage.pid if member.stage else 0,
        state="ready" if times else "loading",
    )
