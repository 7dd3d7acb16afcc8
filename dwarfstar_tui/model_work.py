"""What is done with model files: whether they fit the machines there are, and getting more. Blocks: use a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from dwarfstar_engine.cli.plan import file_job, running_cluster
from dwarfstar_engine.cli.pull_text import Pace
from dwarfstar_engine.errors import DwarfStarError, HubError, ModelError
from dwarfstar_engine.model.arch import legal_cuts
from dwarfstar_engine.model.hub_names import HubFile, Reference, Unclear, choose, offers, reference
from dwarfstar_engine.node.pull import Progress, Source, Tools, pull, read_offer
from dwarfstar_engine.plan.cluster import Cluster
from dwarfstar_engine.plan.forecast import Objective, Strategy
from dwarfstar_engine.plan.planner import NO_WISHES, plan_cluster
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import StatusView
from dwarfstar_tui.updates import Fit, ModelsJudged

JUDGED_MAX = 64  # files; each directory is read once more
OFFERED_MAX = 8  # types of a repository that are named where several are there
STOPPED = "stopped"


def judge(paths: Sequence[str], status: StatusView, settings: Settings) -> ModelsJudged:
    """Plan each file for the machines of a status, as if it were served alone."""
    try:
        there = running_cluster(status)
    except DwarfStarError:
        return ModelsJudged(())
    # What was measured is of the model that is served: another has other layers.
    cluster = replace(there, nodes=tuple(replace(node, measured=()) for node in there.nodes))
    return ModelsJudged(tuple(_fit(path, cluster, settings) for path in paths[:JUDGED_MAX]))


def _fit(path: str, cluster: Cluster, settings: Settings) -> Fit:
    try:
        _, job = file_job(path, settings, None, {})
        planned = plan_cluster(cluster, job, Strategy.FASTEST, Objective.SINGLE, NO_WISHES)
    except DwarfStarError as error:
        return Fit(path, problem=error.message)
    return Fit(path, len(planned.plan.stages), planned.forecast.single_tok_s)


class Shop(Source, Protocol):
    """A model hub (``node.hub.Hub``)."""

    def files(self, asked: Reference) -> Iterable[HubFile]: ...


def fetch(wanted: str, settings: Settings, tell: Callable[[str], None], stopped: Callable[[], bool]) -> str:
    """Have the model that ``wanted`` names, "OWNER/NAME" with a type or a file behind a space or a colon; what to say
    of it. Raises DwarfStarError, also when it was stopped: what came is kept."""
    from dwarfstar_engine.node.hub import Hub, endpoint  # its library takes a second to import

    repo, _, kind = wanted.strip().partition(" ")
    return fetch_from(Hub(), reference(repo, kind.strip() or None, endpoint()), settings.models_dir, tell, stopped)


def fetch_from(
    hub: Shop, asked: Reference, folder: Path, tell: Callable[[str], None], stopped: Callable[[], bool]
) -> str:
    """The same, from a hub."""
    pace = Pace()

    def show(progress: Progress) -> None:
        if stopped():
            raise HubError("stopped; what came is kept, and getting it again goes on there", code=STOPPED)
        tell(pace.line(progress, time.monotonic()))

    tools = Tools(tell=show)
    offer = choose(asked, offers(hub.files(asked)))
    if isinstance(offer, Unclear):
        there = [one.quantisation or one.files[0].name for one in offer.offers[:OFFERED_MAX]]
        which = f"; give one of {', '.join(there)} behind a space" if there else ""
        raise ModelError(offer.reason + which, code="model_unclear")
    legal_cuts(read_offer(hub, offer, tools))  # before anything large is pulled: can it be served at all?
    return f"pulled {pull(hub, offer, folder, asked, tools).name}"
