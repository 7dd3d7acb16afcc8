"""A planner for the app on a stage: the engine's own, over the machines of the scripted home lab."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.plan.advisor import advise
from dwarfstar_engine.plan.cluster import Cluster, Device, Kind, Link, Measured, Node
from dwarfstar_engine.plan.cost import cluster_costs
from dwarfstar_engine.plan.forecast import Objective, Planned, Strategy, Wishes
from dwarfstar_engine.plan.predict import plan_of, predict
from dwarfstar_engine.plan.propose import Wanted, propose
from dwarfstar_engine.plan.shown import delta_views, plan_view
from dwarfstar_engine.plan.topology import ModelShape
from dwarfstar_engine.views import CommitView, PlanRequest, ProposalView, StatusView
from dwarfstar_tui.updates import JudgeModels, ModelsJudged, Propose, Proposed
from support.tui_cluster import FITS, Stage, home_lab

GIB = 1 << 30
SHAPE = ModelShape(layers=80, weights_gib=34.2, head_gib=0.5, kv_gib=1.25, compute_gib_per_node=0.3)
JOB = SHAPE.job()
WIRE_BYTES = {"f32": 4.0, "f16": 2.0, "q8": 1.0625}
BANDWIDTH = {"tower": 936.0, "garage-box": 360.0, "mini-pc": 51.0, "laptop": 100.0}
Stages = tuple[tuple[str, int, int], ...]


def cluster(view: StatusView) -> Cluster:
    nodes = tuple(
        Node(
            one.name,
            (
                Device(
                    Kind.CPU if "Ryzen" in one.device else Kind.GPU,
                    int(one.memory_gib * GIB),
                    BANDWIDTH.get(one.name, 100.0),
                    int(one.effective_vram_gib * GIB),
                ),
            ),
            measured=tuple(
                Measured(stage.layers, stage.ms_per_token, last=stage.layers[1] == JOB.layers)
                for stage in view.stages
                if stage.node == one.name
            ),
        )
        for one in view.nodes
    )
    return Cluster(nodes, Link(1.0, 0.15))


@dataclass
class Planner:
    """stages: that serve, by default those of the status."""

    view: StatusView = field(default_factory=home_lab)
    epoch: int = 3
    owner: bool = False
    undo: bool = False
    answered: int = 0  # commands that it has looked at

    def __post_init__(self) -> None:
        self.stages: Stages = tuple((stage.node, *stage.layers) for stage in self.view.stages)

    def present(self) -> Planned:
        costs = cluster_costs(cluster(self.view), JOB)
        plan = plan_of(costs, self.stages)
        return Planned(plan, predict(costs, plan.stages), Strategy.FASTEST, Objective.SINGLE)

    def proposal(self, request: PlanRequest) -> ProposalView:
        """As an engine answers."""
        there, now = cluster(self.view), self.present()
        model = self.view.model.name if self.view.model is not None else ""
        told = ProposalView(
            epoch=self.epoch,
            legal_cuts=JOB.legal,
            present=plan_view(model, JOB, now, advise(there, JOB, now)),
            proposed=None,
            owner=self.owner,
            undo=self.undo,
        )
        wanted = Wanted(
            Strategy(request.strategy or "fastest"),
            Objective(request.objective or "single"),
            request.cuts,
            request.order,
            Wishes(request.pins, frozenset(request.excluded)),
        )
        job = replace(SHAPE.job(request.context), wire_bytes=WIRE_BYTES.get(request.wire or "", JOB.wire_bytes))
        try:
            found = propose(there, job, wanted, now.nodes)
        except DwarfStarError as error:
            return told.model_copy(update={"error": error.message, "code": error.code})
        advice = None if request.cuts is not None else advise(there, job, found.planned)
        return told.model_copy(
            update={
                "proposed": plan_view(model, job, found.planned, advice),
                "delta": delta_views(cluster_costs(there, job), now.plan, found.planned.plan),
                "clamped": found.clamped,
            }
        )

    def committed(self, request: PlanRequest) -> CommitView:
        """Carry it out; what serves is another plan then."""
        told = self.proposal(request)
        assert told.present is not None and told.proposed is not None
        self.stages = tuple((stage.node, *stage.layers) for stage in told.proposed.stages)
        self.epoch, self.owner, self.undo = self.epoch + 1, True, True
        return CommitView(epoch=self.epoch, loaded_first=True, before=told.present, after=told.proposed)

    def answer(self, stage: Stage) -> bool:
        """Answer what was asked since the last time; whether anything was. A commit is left to the test."""
        new, self.answered = stage.asked[self.answered :], len(stage.asked)
        for command in new:
            if isinstance(command, Propose):
                stage.tell(Proposed(command.number, self.proposal(command.request)))
            elif isinstance(command, JudgeModels):
                stage.tell(ModelsJudged(FITS))
        return bool(new)
