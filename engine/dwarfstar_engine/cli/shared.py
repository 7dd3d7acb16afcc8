"""What an engine has the cluster keep, so that another node can go on in its place: model, settings, plan. Pure.

Of the settings those go that belong to the cluster, not to a machine. Nothing secret is among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dwarfstar_engine.cluster.state import ClusterState, Scalar
from dwarfstar_engine.errors import ClusterError, ModelError
from dwarfstar_engine.node import kept_plan
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.source import DEMO, NO_MODEL, Source, open_source
from dwarfstar_engine.settings import Settings

SHARED = (
    "context", "slots", "kv", "chunk", "prefix_cache", "speculation", "queue", "request_timeout_s", "flash_attention",
    "batching", "wire", "rejoin_s", "on_loss", "rescue_s", "carry", "replan", "frame_deadline_s", "strategy",
    "objective", "auto_balance", "pipelines", "replicas", "mixed",
)  # fmt: skip

LOADED_WITH = ("context", "slots")  # of those: what ``load`` may set

OWNER_PLAN, TAKEN = "owner_plan", "taken"  # of the state's wishes
LENT, NAME = "effective_vram", "name"  # of the state's overrides


def wishes_of(settings: Settings, source: Source) -> dict[str, Scalar]:
    """The state's wishes for this model, without a plan."""
    shared: dict[str, Scalar] = {name: getattr(settings, name) for name in SHARED}
    cuts = ",".join(map(str, settings.cuts))
    return {**shared, "cuts": cuts, "fingerprint": source.fingerprint, "path": source.path, "plan": ""}


def model_of(coordinator: Coordinator, before: ClusterState) -> dict[str, Any]:
    """The state's model and wishes. The path stays that of whoever loaded the model first."""
    if coordinator.loader.changing and before.wishes:
        return {"model": before.model, "wishes": before.wishes}
    settings, main = coordinator.loader.kept
    wishes = wishes_of(settings, main)
    if before.wishes.get("fingerprint") == main.fingerprint:
        wishes["path"] = before.wishes.get("path", main.path)
    return {"model": main.name, "wishes": with_plan(wishes, before.wishes, coordinator)}


def mark(coordinator: Coordinator) -> tuple[object, ...]:
    """All that ``model_of`` and ``with_lent`` are made of beside the state before. Quick to compare with an earlier one
    where nothing has changed: parts are the same objects then."""
    loader, steering, dealer = coordinator.loader, coordinator.steering, coordinator.dealer
    return (
        loader.changing,
        loader.kept,
        coordinator.planned,
        dealer.wanted,
        dealer.text,
        steering.owner_text,
        tuple(steering.lent.items()),
        tuple(coordinator.nodes.names.items()),
    )


def find_source(own: Settings, state: ClusterState) -> Source:
    """This machine's file of the model served: looked for as a stage looks for it (``NodeDaemon``); none, if none is.

    It reads files: call it in a thread. Raises ModelError: it is not here.
    """
    if not state.model:
        return NO_MODEL
    wanted, problem = state.wishes.get("fingerprint"), ""
    for name in (state.model, DEMO, str(state.wishes.get("path", ""))):
        try:
            source = open_source(name, own.models_dir, str(state.wishes.get("kv", "f16")))
        except ModelError as error:
            problem = problem or error.message
            continue
        if source.fingerprint == wanted:
            return source
    raise ModelError(problem or f"the file of {state.model} here is not the one that is served: copy that one here")


def with_plan(
    wishes: Mapping[str, Scalar], before: Mapping[str, Scalar], coordinator: Coordinator
) -> dict[str, Scalar]:
    """The wishes with the plan that the coordinator has made; with the one before while it has made none."""
    made = kept_plan.to_text(coordinator.planned)
    same = before.get("fingerprint") == wishes.get("fingerprint")
    plan = made or (before.get("plan", "") if same else "")
    if coordinator.dealer.wanted.several:
        plan = ""  # nodes are dealt out anew; one that is asked for the slice it has keeps it
    return {**wishes, "plan": plan, OWNER_PLAN: coordinator.steering.owner_text, TAKEN: coordinator.dealer.text}


def with_lent(
    overrides: Mapping[str, Mapping[str, Scalar]], coordinator: Coordinator
) -> dict[str, Mapping[str, Scalar]]:
    """The overrides with what the owner has set nodes to lend, and calls them."""
    told = {
        node: {key: one for key, one in said.items() if key not in (LENT, NAME)} for node, said in overrides.items()
    }
    for key, given in ((LENT, coordinator.steering.lent), (NAME, coordinator.nodes.names)):
        for node, text in given.items():
            told.setdefault(node, {})[key] = text
    return {node: said for node, said in told.items() if said}


def restore(coordinator: Coordinator, state: ClusterState) -> Coordinator:
    """With what its owner has decided."""
    lent = {node: said[LENT] for node, said in state.overrides.items() if LENT in said}
    names = {node: name for node, said in state.overrides.items() if isinstance(name := said.get(NAME), str) and name}
    coordinator.nodes.names = names
    coordinator.steering.restore(state.wishes.get(OWNER_PLAN), lent)
    coordinator.restore(state.wishes.get(TAKEN))
    return coordinator


def settings_of(own: Settings, state: ClusterState) -> Settings:
    """The settings with which a node leads in the engine's place. Raises ClusterError."""
    told: dict[str, Any] = {name: state.wishes[name] for name in SHARED if name in state.wishes}
    try:
        told["cuts"] = tuple(int(part) for part in str(state.wishes.get("cuts", "")).split(",") if part)
        return Settings(**{**own.model_dump(exclude_unset=True), **told, "wait_nodes": 1})
    except (ValidationError, ValueError):
        raise ClusterError(
            "the settings in the cluster's state are not of this version: run the same one on all machines"
        ) from None


def as_loaded(own: Settings, state: ClusterState) -> Settings:
    """An engine's own settings with what the model was loaded with; what its start names counts more."""
    kept = {
        name: state.wishes[name] for name in LOADED_WITH if name in state.wishes and name not in own.model_fields_set
    }
    try:
        return Settings(**{**own.model_dump(exclude_unset=True), **kept})
    except ValidationError:  # of another release
        return own
