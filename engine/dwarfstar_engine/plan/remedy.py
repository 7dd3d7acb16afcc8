"""What would make a model fit, or fit with room to spare: proposed, never done. Pure.

Tried are a quantised KV cache, then smaller contexts, each by planning with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.model.costs import KV_BLOCK_BYTES, ModelCosts
from dwarfstar_engine.plan.cluster import Cluster
from dwarfstar_engine.plan.cost import cluster_costs
from dwarfstar_engine.plan.forecast import Forecast, Job, Objective, Wishes
from dwarfstar_engine.plan.planner import fastest
from dwarfstar_engine.plan.proportional import GIB, TOO_LARGE

LEAST_CONTEXT = 512  # smaller ones serve nobody
JUST_FITS = 0.03  # of what a node may use, left free: less is told


class DoesNotFitError(PlanError):
    """No plan as asked; ``options`` say what would make one possible."""

    def __init__(self, error: PlanError, options: Sequence[str]) -> None:
        message = error.message
        if options:
            message += "; it would fit " + ", or ".join(options)
        super().__init__(message, code=error.code, retry_after_s=error.retry_after_s)
        self.options = tuple(options)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A job that takes less, and the words for it."""

    job: Job
    words: str


def with_kv_type(job: Job, kv_type: str) -> Job:
    """The same with another type of KV cache."""
    now, then = KV_BLOCK_BYTES[job.kv_type], KV_BLOCK_BYTES[kv_type]

    def smaller(costs: ModelCosts) -> ModelCosts:
        return replace(costs, kv_bytes_per_token=tuple(kv * then // now for kv in costs.kv_bytes_per_token))

    by_node = {name: smaller(costs) for name, costs in job.by_node.items()}
    return replace(job, costs=smaller(job.costs), by_node=by_node, kv_type=kv_type)


def with_context(job: Job, context: int) -> Job:
    """The same with room for fewer tokens a request."""
    need = replace(job.need, cells=job.need.cells * context // job.context)
    return replace(job, need=need, context=context, depth=min(job.depth, context))


def smaller(job: Job) -> Iterator[tuple[Remedy, ...]]:
    """Ways to take less, each from the least change on."""
    kinds = [kind for kind in KV_BLOCK_BYTES if KV_BLOCK_BYTES[kind] < KV_BLOCK_BYTES[job.kv_type]]
    yield tuple(Remedy(with_kv_type(job, kind), f"with --kv {kind}") for kind in kinds)
    contexts, context = [], job.context // 2
    while context >= LEAST_CONTEXT:
        contexts.append(context)
        context //= 2
    yield tuple(Remedy(with_context(job, size), f"with --context {size}") for size in contexts)


def explained(cluster: Cluster, job: Job, wishes: Wishes, error: PlanError) -> PlanError:
    """The error with what would help; as it is if it is about something else than room."""
    if error.code != TOO_LARGE or not any(job.costs.kv_bytes_per_token):
        return error
    nodes = tuple(node for node in cluster.nodes if node.name not in wishes.excluded)
    there = replace(cluster, nodes=nodes)
    options = []
    for way in smaller(job):
        for remedy in way:
            if fastest(cluster_costs(there, remedy.job), Objective.SINGLE, wishes) is not None:
                options.append(remedy.words)
                break
    return DoesNotFitError(error, options)


def tight(job: Job, forecast: Forecast) -> tuple[str, ...]:
    """What to say of a plan that only just fits."""
    least = min(forecast.stages, key=lambda stage: stage.headroom_bytes)
    used = least.weights_bytes + least.kv_bytes + least.compute_bytes
    if least.headroom_bytes >= JUST_FITS * (used + least.headroom_bytes):
        return ()
    said = f"it only just fits: {least.headroom_bytes / GIB:.2f} GiB are left on {least.node}"
    if job.kv_type != "f16" or not least.kv_bytes:
        return (said,)
    freed = least.kv_bytes * (1 - KV_BLOCK_BYTES["q8_0"] / KV_BLOCK_BYTES["f16"])
    return (f"{said}; --kv q8_0 would free {freed / GIB:.2f} GiB there",)
