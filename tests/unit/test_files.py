"""Which file of the model a node runs: what it tells of its files, what is made of that, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.errors import DwarfStarError, ModelError, PeerError
from dwarfstar_engine.model.costs import model_costs
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.node import files as module
from dwarfstar_engine.node.files import choose, find_file, offer, read_base, read_offer
from dwarfstar_engine.node.source import Source, open_source
from dwarfstar_engine.wire.generated import control_pb2 as pb
from support import gguf_bytes as g

SMALL, LARGE = g.TENSOR_Q8_0, g.TENSOR_F16


def write(
    path: Path, kind: int = SMALL, *more: g.Pair, layers: int = 4, architecture: str = "llama", norms: int = 0
) -> Path:
    """A model whose matrices are of ``kind``. norms: which weights it is made of."""
    path.parent.mkdir(exist_ok=True)
    drop = {pair.key for pair in more}
    pairs = [pair for pair in g.llama_pairs(layers, architecture=architecture) if pair.key not in drop]
    tensors = [
        g.Tensor(one.name, one.shape, one.kind, bytes([norms]) * one.nbytes)
        if one.name.endswith("norm.weight")
        else g.Tensor(one.name, one.shape, kind if len(one.shape) == 2 else one.kind)
        for one in g.llama_tensors(layers)
    ]
    return g.write(path, [*pairs, *more], tensors)


@pytest.fixture
def served(tmp_path: Path) -> Source:
    """The engine's file, which lies on another machine."""
    source = open_source(str(write(tmp_path / "engine" / "m.Q8_0.gguf")), tmp_path)
    return source


def look(source: Source) -> pb.Look:
    ref = source.ref
    ref.path_hint = "/on/another/machine"
    return pb.Look(model=ref, architecture=source.architecture)


def chosen(source: Source, told: pb.Offer) -> Source:
    """As the coordinator does, after a way over the wire."""
    there = pb.Offer.FromString(told.SerializeToString())
    return choose(source, read_base(read_model(source.path)), read_offer(there), "box")


def test_the_very_file_comes_first(served: Source, tmp_path: Path) -> None:
    models, own = tmp_path / "models", Path(served.path)
    named = write(models / "other.gguf", LARGE)
    assert not offer(look(served), models, named).same
    (models / own.name).write_bytes(own.read_bytes())
    assert offer(look(served), models, named) == pb.Offer(same=True)
    assert find_file(look(served).model, models, named, "box") == models / own.name
    elsewhere = tmp_path / "renamed.gguf"
    (models / own.name).rename(elsewhere)
    assert offer(look(served), models, elsewhere).same, "where its owner says"
    assert find_file(look(served).model, models, elsewhere, "box") == elsewhere
    assert offer(pb.Look(model=pb.ModelRef(name="toy:8")), models, None).same


def test_another_quantisation_stands_in_the_place_of_the_served_file(served: Source, tmp_path: Path) -> None:
    path = write(tmp_path / "models" / "m.F16.gguf", LARGE, g.Pair("general.file_type", g.U32, 1))
    found = chosen(served, offer(look(served), tmp_path / "nowhere", path))
    own = model_costs(read_model(path))
    assert found.costs == own and found.costs.total > served.costs.total
    assert (found.name, found.path, found.quantisation) == ("m.F16", str(path), "F16")
    assert (found.stands_for, found.cuts, found.layers) == (served.fingerprint, served.cuts, served.layers)
    assert find_file(found.ref, tmp_path / "nowhere", path, "box") == path, "what it is assigned then is there"


def test_of_what_is_found_the_nearest_in_size_is_taken(served: Source, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name, kind in (("a", g.TENSOR_F32), ("b", LARGE)):
        write(models / f"{name}.gguf", kind)
    write(models / "c.gguf", SMALL, layers=5)
    write(models / "d.gguf", architecture="qwen2")
    (models / "e.gguf").write_bytes(b"no model")
    told = offer(look(served), models, None)
    assert [Path(one.path).name for one in told.files] == ["a.gguf", "b.gguf", "c.gguf"], "of its architecture"
    assert chosen(served, told).name == "b"


def test_what_is_told_is_bounded(served: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OFFERED", 2)
    for index in range(4):
        write(tmp_path / "models" / f"{index}.gguf", LARGE)
    told = offer(look(served), tmp_path / "models", None)
    assert len(told.files) == 2
    with pytest.raises(PeerError) as error:
        read_offer(pb.Offer(files=[*told.files, told.files[0]]))
    assert error.value.code == "bad_offer"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"layers": 5}, "llama.block_count is 4 in m.Q8_0.gguf and 5 in other.gguf"),
        ({"architecture": "qwen2"}, "m.Q8_0.gguf is of architecture llama, other.gguf of qwen2"),
        ({"norms": 1}, "the norms of m.Q8_0.gguf and other.gguf, which quantising leaves as they are, differ"),
        ({"more": g.Pair("tokenizer.ggml.pre", g.STR, "x")}, "tokenizer.ggml.pre is missing in m.Q8_0.gguf and x in"),
        ({"architecture": "mamba"}, "recurrent"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_another_model_is_refused_with_the_difference(
    served: Source, tmp_path: Path, given: dict[str, Any], problem: str
) -> None:
    more = [given.pop("more")] if "more" in given else []
    path = write(tmp_path / "models" / "other.gguf", LARGE, *more, **given)
    with pytest.raises(ModelError) as error:
        chosen(served, offer(look(served), tmp_path / "models", path))
    assert error.value.code == "model_differs" and "\n" not in error.value.message
    assert error.value.message.startswith("box cannot run layers from other.gguf in the place of m.Q8_0.gguf: ")
    assert problem in error.value.message


def test_a_node_that_has_nothing_is_told_what_to_do(served: Source, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"box has no file of the model .* nor one of another quantisation") as error:
        chosen(served, offer(look(served), tmp_path / "models", None))
    assert error.value.code == "model_not_found" and "dwarfstar node --model FILE" in error.value.message
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"box cannot run layers from broken.gguf in the place of m.Q8_0.gguf: "):
        chosen(served, offer(look(served), tmp_path / "models", broken))


def test_without_permission_a_stage_is_refused_and_the_way_named(served: Source, tmp_path: Path) -> None:
    named = write(tmp_path / "models" / "m.F16.gguf", LARGE)
    with pytest.raises(DwarfStarError, match=r"is not the file the coordinator serves.*permitted by --mixed") as error:
        find_file(look(served).model, tmp_path / "models", named, "box")
    assert error.value.code == "model_differs"
    with pytest.raises(ModelError) as missing:
        find_file(look(served).model, tmp_path / "nowhere", None, "box")
    assert missing.value.code == "model_not_found" and "--mixed" not in missing.value.message


def good(source: Source, tmp_path: Path) -> pb.OtherFile:
    return offer(look(source), tmp_path, write(tmp_path / "models" / "m.F16.gguf", LARGE)).files[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "x" * 5000},
        {"quantisation": "\x1b[2J"},
        {"head_bytes": 1 << 60},
        {"layer_bytes": [1 << 60]},
        {"facts": {"k" * 1000: "v"}},
        {"facts": {str(index): "v" for index in range(1000)}},
        {"facts": {"k": "\n"}},
    ],
    ids=lambda one: next(iter(one)),
)
def test_what_is_out_of_bounds_is_not_believed(served: Source, tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = good(served, tmp_path)
    read_offer(pb.Offer(files=[file]))
    file.MergeFrom(pb.OtherFile(**wrong))
    with pytest.raises(PeerError) as error:
        read_offer(pb.Offer(files=[file]))
    assert error.value.code == "bad_offer"


def test_costs_of_other_layers_than_it_claims_are_not_believed(served: Source, tmp_path: Path) -> None:
    file = good(served, tmp_path)
    file.layer_bytes.append(1)
    with pytest.raises(PeerError, match="not of 4 layers"):
        chosen(served, pb.Offer(files=[file]))
