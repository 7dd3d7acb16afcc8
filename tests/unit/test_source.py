"""Finding the model that an argument means, and describing it without reading a weight."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dwarfstar_engine.errors import ModelError, ModelFileError, UnsupportedModelError
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.node import source
from dwarfstar_engine.node.source import DEFAULT_CONTEXT, find_model, fingerprint, open_source
from support import gguf_bytes as g


def write(path: Path, *, layers: int = 4, architecture: str = "llama", name: str = "x") -> Path:
    pairs = [pair for pair in g.llama_pairs(layers, architecture=architecture) if pair.key != "general.name"]
    return g.write(path, [*pairs, g.Pair("general.name", g.STR, name)], g.llama_tensors(layers))


def test_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "models").mkdir()
    path = write(folder / "m.gguf")
    for argument in (str(path), "m", "m.gguf"):
        assert find_model(argument, folder) == path.resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/models/m.gguf", tmp_path / "elsewhere") == path.resolve()
    monkeypatch.chdir(folder)
    assert find_model("m.gguf", tmp_path / "elsewhere") == path.resolve()


def test_a_name_that_is_not_there_tells_what_is(tmp_path: Path) -> None:
    write(tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"no model 'm': .*there are: other") as missing:
        find_model("m", tmp_path)
    assert missing.value.code == "model_not_found" and missing.value.exit_code == 2
    with pytest.raises(ModelError, match="there are no GGUF files in"):
        find_model("m", tmp_path / "nowhere")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for i in range(source.LISTED + 5):
        (tmp_path / f"m{i:02}.gguf").write_bytes(b"")
    with pytest.raises(ModelError) as missing:
        find_model("x", tmp_path)
    assert missing.value.message.count("m") < 2 * source.LISTED and "m24" not in missing.value.message


def test_a_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        find_model(str(tmp_path), tmp_path)


def test_the_demo_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install") as missing:
        open_source("demo", tmp_path)
    assert missing.value.code == "model_not_found"


def test_the_demo(tmp_path: Path) -> None:
    if importlib.util.find_spec(source.DEMO_PACKAGE) is None:
        pytest.skip("the demo model is not installed")
    found = open_source("demo", tmp_path)
    assert (found.name, found.architecture, found.layers) == ("SmolLM2-135M-Instruct.Q4_1", "llama", 30)
    assert found.cuts == tuple(range(1, 30)) and not found.toy
    assert found.train_context == 8192


def test_what_is_known_of_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", layers=6)
    found = open_source(str(path), tmp_path)
    assert (found.name, found.path, found.layers, found.train_context) == ("m", str(path.resolve()), 6, 128)
    assert found.cuts == (1, 2, 3, 4, 5)


def test_files_that_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello, this is not a model")
    with pytest.raises(ModelFileError, match=r"text\.gguf"):
        open_source("text", tmp_path)
    whole = write(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) - 100])
    with pytest.raises(ModelFileError, match=r"cut\.gguf"):
        open_source("cut", tmp_path)
    write(tmp_path / "mamba.gguf", architecture="mamba")
    with pytest.raises(UnsupportedModelError, match="mamba"):
        open_source("mamba", tmp_path)


def test_the_fingerprint_is_of_the_file_and_not_of_its_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    same = [write(tmp_path / "a.gguf"), write(tmp_path / "elsewhere" / "b.gguf")]
    prints = {fingerprint(read_model(path)) for path in same}
    assert len(prints) == 1
    for other in (write(tmp_path / "c.gguf", name="y"), write(tmp_path / "d.gguf", layers=5)):
        prints.add(fingerprint(read_model(other)))
    longer = tmp_path / "e.gguf"
    longer.write_bytes(same[0].read_bytes() + bytes(32))  # the same directory, another size
    prints.add(fingerprint(read_model(longer)))
    assert len(prints) == 4


def test_the_fingerprint_covers_every_shard(tmp_path: Path) -> None:
    tensors = g.llama_tensors(4)
    prints = []
    for name, half in (("one", len(tensors) // 2), ("two", len(tensors) // 2 + 1)):
        (folder := tmp_path / name).mkdir()
        shards = g.write_split(folder, g.llama_pairs(4), [[], tensors[:half], tensors[half:]])
        assert {fingerprint(read_model(path)) for path in shards} == {fingerprint(read_model(shards[0]))}
        prints.append(fingerprint(read_model(shards[0])))
    assert prints[0] != prints[1]


def test_a_toy_model(tmp_path: Path) -> None:
    found = open_source("toy:7:3", tmp_path)
    assert found.toy and found.path == "" and found.layers == 7 and found.cuts == (1, 2, 3, 4, 5, 6)
    assert found.train_context == DEFAULT_CONTEXT
    with pytest.raises(ModelError, match="toy:LAYERS"):
        open_source("toy:x", tmp_path)
