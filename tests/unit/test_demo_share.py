"""What the demo's nodes lend: however many there are, the model fits, and from two on none can hold it alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwarfstar_engine.cli.serve import Start, _lent
from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.node.needs import need
from dwarfstar_engine.node.source import DEMO, Source, open_source
from dwarfstar_engine.plan.proportional import Capacity, proportional
from dwarfstar_engine.settings import Settings


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(DEMO, Path())


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("slots", "context"), [(1, 512), (8, 1024), (8, 8192)])
def test_the_demo_fits_its_nodes(source: Source, tmp_path: Path, nodes: int, slots: int, context: int) -> None:
    settings = Settings(home=tmp_path, slots=slots, context=context)
    wanted = need(settings, source, context)
    lent = _lent(Start(DEMO, local_nodes=nodes, demo=True), settings, source)
    assert lent is not None
    share = [Capacity(str(index), int(float(lent) * 2**30)) for index in range(nodes)]
    assert len(proportional(source.costs, source.cuts, wanted, share).stages) >= min(nodes, 2)
    if nodes > 1:
        with pytest.raises(PlanError):
            proportional(source.costs, source.cuts, wanted, share[:1])
