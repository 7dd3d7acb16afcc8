"""Model files: whether they fit, by the planner, and getting one from a hub."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.model.hub_names import HubFile, Reference
from dwarfstar_engine.node.pull import Body
from dwarfstar_engine.settings import Settings
from dwarfstar_tui.model_work import fetch_from, judge
from support import gguf_bytes as g
from support.tui_cluster import home_lab, status

SMALL = g.gguf_bytes(g.llama_pairs(4), g.llama_tensors(4))
MAMBA = g.gguf_bytes(g.llama_pairs(4, architecture="mamba"), g.llama_tensors(4))


@dataclass
class Hub:
    """A repository in memory."""

    data: dict[str, bytes]
    read_files: list[str] = field(default_factory=list)

    def files(self, asked: Reference) -> list[HubFile]:
        return [
            HubFile(name, len(data), hashlib.sha256(data).hexdigest(), f"https://hub/{name}")
            for name, data in self.data.items()
        ]

    @contextlib.contextmanager
    def read(self, file: HubFile, start: int, stop: int) -> Iterator[Body]:
        self.read_files.append(file.name)
        data = self.data[file.name][start:stop]
        yield Body(start, None, (data[at : at + 300] for at in range(0, len(data), 300)))


def test_models_are_planned_for_the_machines_there_are(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(SMALL)
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    settings = Settings(home=tmp_path, models=tmp_path)
    fits = judge([str(model), str(tmp_path / "no.gguf")], home_lab(), settings).fits
    assert [fit.path for fit in fits] == [str(model), str(tmp_path / "no.gguf")]
    assert fits[0].stages == 1 and fits[0].single_tok_s > 0 and not fits[0].problem
    assert fits[1].problem and not fits[1].stages
    tiny = [node.model_copy(update={"effective_vram_gib": 1e-6}) for node in home_lab().nodes]
    (none,) = judge([str(model)], status(tiny, []), settings).fits
    assert none.problem
    assert judge([str(model)], status([], []), settings).fits == ()


def test_a_model_is_had_from_a_hub_and_its_progress_told(tmp_path: Path) -> None:
    told: list[str] = []
    hub = Hub({"m-Q8_0.gguf": SMALL})
    said = fetch_from(hub, Reference("owner/name"), tmp_path, told.append, lambda: False)
    assert said == "pulled m-Q8_0.gguf"
    assert (tmp_path / "m-Q8_0.gguf").read_bytes() == SMALL
    assert any("100%" in line for line in told)


def test_a_stopped_download_leaves_no_model(tmp_path: Path) -> None:
    with pytest.raises(DwarfStarError, match="stopped"):
        fetch_from(Hub({"m-Q8_0.gguf": SMALL}), Reference("owner/name"), tmp_path, lambda line: None, lambda: True)
    assert not list(tmp_path.glob("*.gguf"))


def test_of_several_one_must_be_named(tmp_path: Path) -> None:
    hub = Hub({"m-Q8_0.gguf": SMALL, "m-Q4_0.gguf": SMALL})
    with pytest.raises(DwarfStarError, match="give one of Q"):
        fetch_from(hub, Reference("owner/name"), tmp_path, lambda line: None, lambda: False)
    assert not hub.read_files


def test_what_cannot_be_served_is_not_pulled(tmp_path: Path) -> None:
    with pytest.raises(DwarfStarError, match="mamba"):
        fetch_from(Hub({"m-F32.gguf": MAMBA}), Reference("owner/name"), tmp_path, lambda line: None, lambda: False)
    assert not list(tmp_path.glob("*.gguf"))
