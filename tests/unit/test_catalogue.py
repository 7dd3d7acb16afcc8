"""The listing of model files: whatever lies in the folder, it has an end and says why something cannot be served."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dwarfstar_engine.model import catalogue as catalogue_module
from dwarfstar_engine.model.catalogue import catalogue
from dwarfstar_engine.views import ModelFilesView, ModelFileView
from support import gguf_bytes as g


def still() -> float:
    return 0.0


def listed(folder: Path) -> ModelFilesView:
    return catalogue([folder], None, still)


def only(folder: Path) -> ModelFileView:
    (found,) = listed(folder).models
    return found


def test_what_is_said_of_a_model(tmp_path: Path) -> None:
    tensors = g.llama_tensors(4)
    path = g.write(tmp_path / "m.gguf", g.llama_pairs(4), tensors)
    found = only(tmp_path)
    assert found == ModelFileView(
        name="m", path=str(path), files=1, size_gib=0.0, architecture="llama", layers=4, quantisation="Q8_0",
        context=128, parameters=32 * 6 + 32 + 3 + 4 * 32 + 32 * (5 + 6 + 7 + 8), supported=True, reason="",
    )  # fmt: skip


def test_the_size_is_that_of_the_weights(tmp_path: Path) -> None:
    tensors = [*g.llama_tensors(4), g.Tensor("output.weight", (1 << 12, 1 << 10))]
    g.write(tmp_path / "m.gguf", g.llama_pairs(4), tensors)
    assert only(tmp_path).size_gib == pytest.approx(16 / 1024, abs=1e-4)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(15, "Q4_K_M"), (0, "F32"), (1024 + 15, "Q8_0"), (4_000_000_000, "Q8_0")],  # 1024: only guessed
)
def test_the_quantisation_is_what_the_file_says_or_most_of_it(tmp_path: Path, stated: int, expected: str) -> None:
    pairs = [*g.llama_pairs(4), g.Pair("general.file_type", g.U32, stated)]
    g.write(tmp_path / "m.gguf", pairs, g.llama_tensors(4))
    assert only(tmp_path).quantisation == expected


def test_the_parts_of_a_split_model_are_one(tmp_path: Path) -> None:
    tensors = g.llama_tensors(4)
    first, *_ = g.write_split(tmp_path, g.llama_pairs(4), [[], tensors[:4], tensors[4:]])
    found = only(tmp_path)
    assert (found.name, found.path, found.files, found.layers) == ("m", str(first), 3, 4)
    assert found.supported and found.size_gib == only(tmp_path).size_gib
    first.unlink()
    found = only(tmp_path)
    assert found.broken and not found.supported and "part 1 of 3" in found.reason and found.files == 2


def test_what_cannot_be_served_says_why_and_ends_nothing(tmp_path: Path) -> None:
    whole = g.write(tmp_path / "z.gguf", g.llama_pairs(4), g.llama_tensors(4)).read_bytes()
    (tmp_path / "text.gguf").write_text("hello, this is not a model")
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "gone")
    (tmp_path / "other.bin").write_bytes(whole)
    (tmp_path / ".hidden.gguf").write_bytes(whole)
    g.write(tmp_path / "mamba.gguf", g.llama_pairs(4, architecture="mamba"), g.llama_tensors(4))
    found = {model.name: model for model in listed(tmp_path).models}
    assert list(found) == ["cut", "folder", "mamba", "nowhere", "text", "z"]
    assert [name for name, model in found.items() if model.supported] == ["z"]
    assert [name for name, model in found.items() if model.broken] == ["cut", "folder", "nowhere", "text"]
    assert "truncated" in found["cut"].reason and "not a GGUF file" in found["text"].reason
    assert found["mamba"].layers == 4 and "recurrent" in found["mamba"].reason
    assert not any(str(tmp_path) in model.reason for model in found.values())


def test_the_demo_is_the_last(tmp_path: Path) -> None:
    (folder := tmp_path / "models").mkdir()
    g.write(folder / "zebra.gguf", g.llama_pairs(4), g.llama_tensors(4))
    demo = g.write(tmp_path / "SomeModel.gguf", g.llama_pairs(6), g.llama_tensors(6))
    view = catalogue([folder, folder, tmp_path / "nowhere"], ("demo", demo), still)
    assert [(model.name, model.layers) for model in view.models] == [("zebra", 4), ("demo", 6)]
    assert view.left_out == 0


def test_it_has_an_end_in_time_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        (tmp_path / f"m{i}.gguf").write_bytes(b"")
    clock = count()
    view = catalogue([tmp_path], None, lambda: float(next(clock)), max_time_s=3.0)
    assert [model.name for model in view.models] == ["m0", "m1", "m2"] and view.left_out == 3
    monkeypatch.setattr(catalogue_module, "MAX_MODELS", 5)
    assert (len(listed(tmp_path).models), listed(tmp_path).left_out) == (5, 1)
    monkeypatch.setattr(catalogue_module, "MAX_FILES", 2)
    assert (len(listed(tmp_path).models), listed(tmp_path).left_out) == (2, 4)


def test_downloads_that_are_not_complete_are_counted(tmp_path: Path) -> None:
    (work := tmp_path / ".pull" / "0123").mkdir(parents=True)
    (work / "m.gguf.part").write_bytes(bytes(3 << 20))
    (work / "n.gguf").write_bytes(bytes(1 << 20))
    (tmp_path / ".pull" / "pulled.json").write_bytes(bytes(1 << 20))
    view = listed(tmp_path)
    assert view.models == () and view.unfinished_gib == pytest.approx(4 / 1024, abs=1e-4)


WHOLE = g.gguf_bytes(g.llama_pairs(4), g.llama_tensors(4))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4),
    end=st.integers(0, len(WHOLE)),
)
def test_no_file_ends_the_listing(tmp_path: Path, changes: list[tuple[int, int]], end: int) -> None:
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    (tmp_path / "a.gguf").write_bytes(data[:end])
    (tmp_path / "b.gguf").write_bytes(WHOLE)
    first, second = listed(tmp_path).models
    assert second.supported and first.supported != bool(first.reason)
