"""The clusters in tests/topologies get the answers that their [expect] tables ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.plan.advisor import Kind, advise
from dwarfstar_engine.plan.cost import cluster_costs
from dwarfstar_engine.plan.forecast import Objective, Planned, Strategy, Wishes
from dwarfstar_engine.plan.planner import plan_cluster
from dwarfstar_engine.plan.topology import Topology, read_topology

FOLDER = Path(__file__).parent.parent / "topologies"
FILES = sorted(FOLDER.glob("*.toml"))


def read(name: str) -> Topology:
    return read_topology((FOLDER / f"{name}.toml").read_bytes(), name)


def planned(
    topology: Topology, strategy: Strategy = Strategy.FASTEST, objective: Objective = Objective.SINGLE
) -> Planned:
    assert topology.model is not None
    return plan_cluster(topology.cluster, topology.model.job(), strategy, objective)


def counts(plan: Planned) -> dict[str, int]:
    return dict(zip(plan.nodes, plan.counts, strict=True))


def expected(name: str, key: str) -> dict[str, Any]:
    found = read(name).expect[key]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_none_is_overfilled_by_either_strategy(file: Path) -> None:
    topology = read(file.stem)
    for strategy in Strategy:
        for objective in Objective:
            assert planned(topology, strategy, objective).forecast.fits


def test_effective_vram_shares_out_the_home_lab() -> None:
    plan = planned(read("homelab-3"), Strategy.PROPORTIONAL)
    assert counts(plan) == expected("homelab-3", "proportional")["layers"]


@pytest.mark.parametrize("name", ["homelab-3", "fits-one"])
def test_a_model_that_one_node_holds_stays_there(name: str) -> None:
    plan = planned(read(name))
    assert list(plan.nodes) == expected(name, "best")["single_stream_nodes"]
    assert len(plan.plan.excluded) == len(read(name).cluster.nodes) - 1


def test_lopsided_nodes_are_balanced_and_not_overfilled() -> None:
    topology, asked = read("lopsided"), expected("lopsided", "throughput")
    found = counts(planned(topology, objective=Objective.THROUGHPUT))
    assert all(abs(found[node] - want) <= asked["tolerance_layers"] for node, want in asked["layers"].items())
    refused = expected("lopsided", "refused")["layers"]["m1"]
    assert topology.model is not None
    job = topology.model.job()
    with pytest.raises(PlanError, match="on m1, which has") as no:
        plan_cluster(topology.cluster, job, wishes=Wishes({"m1": (0, refused)}))
    assert no.value.code == "model_too_large_for_remaining_capacity"
    costs = cluster_costs(topology.cluster, job)
    assert costs.stage_bytes("m1", 0, refused) > costs.nodes["m1"].usable_bytes


def test_the_spare_layer_goes_where_it_fits() -> None:
    for strategy in Strategy:
        for objective in Objective:
            found = counts(planned(read("rounding"), strategy, objective))
            limit = expected("rounding", "proportional")["max_layers"]
            assert all(found.get(node, 0) <= most for node, most in limit.items())


def test_two_short_pipelines_rather_than_a_long_one() -> None:
    topology, asked = read("replicas"), expected("replicas", "throughput")
    assert topology.model is not None
    plan = planned(topology, objective=Objective.THROUGHPUT)
    advice = advise(topology.cluster, topology.model.job(), plan)
    assert advice.take.kind is Kind.PIPELINES and len(advice.take.rings) == asked["pipelines"]
    for ring in advice.take.rings:
        assert [b - a for a, b in (stage.layers for stage in ring)] == asked["each"]
    assert len(set(advice.take.nodes)) == 6


def test_a_mixture_on_two_sites() -> None:
    """Our own: experts make it large and quick; the ring stays on the near site as far as that holds it."""
    plan = planned(read("two-sites"))
    assert set(plan.nodes) == set(expected("two-sites", "best")["single_stream_nodes"])
    assert plan.forecast.single_tok_s > expected("two-sites", "best")["more_than_tok_s"]
