"""What a person may call a model of a hub, and which of its files that is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import ModelError
from dwarfstar_engine.model.hub_names import (
    HUB,
    HubFile,
    Offer,
    Reference,
    Unclear,
    choose,
    is_reference,
    label,
    offers,
    reference,
    safe_name,
)

MIRROR = "http://10.0.0.5:8090/mirror"


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        ("o/n", None, Reference("o/n")),
        ("o/n:Q4_K_M", None, Reference("o/n", quantisation="Q4_K_M")),
        ("o/n", "q4_k_m", Reference("o/n", quantisation="q4_k_m")),
        ("o/n", "x-Q4_0.gguf", Reference("o/n", file="x-Q4_0.gguf")),
        ("o/n/x.gguf", None, Reference("o/n", file="x.gguf")),
        ("o/n/sub/x.gguf", None, Reference("o/n", file="sub/x.gguf")),
        (f"{HUB}/o/n", None, Reference("o/n")),
        (f"{HUB}/o/n/", "Q8_0", Reference("o/n", quantisation="Q8_0")),
        (f"{HUB}/o/n/tree/main", None, Reference("o/n", "main")),
        (f"{HUB}/o/n/blob/main/x%20y.gguf?download=true", None, Reference("o/n", "main", "x y.gguf")),
        (f"{HUB}/o/n/resolve/abc/sub/x.gguf", None, Reference("o/n", "abc", "sub/x.gguf")),
        (f"{MIRROR}/o/n/resolve/main/x.gguf", None, Reference("o/n", "main", "x.gguf")),
        ("https://x.org/d/m.gguf?key=1", None, Reference(url="https://x.org/d/m.gguf?key=1")),
        ("http://127.0.0.1:8000/m.gguf", None, Reference(url="http://127.0.0.1:8000/m.gguf")),
    ],
)
def test_names(given: str, wanted: str | None, expected: Reference) -> None:
    assert reference(given, wanted, MIRROR) == expected


@pytest.mark.parametrize(
    "given",
    [
        "", "name", "o/", "/n", "o/n:", "o/n/x.bin", "o/n/x.gguf:Q4_0", "../n", "o/..", "o n/m", "o/n\n", "x" * 3000,
        "http://x.org/m.gguf", "ftp://x.org/m.gguf", "https:///m.gguf", "https://u:p@x.org/m.gguf", "https://x.org/m",
        "https://x.org/.gguf", "https://[x/m.gguf", f"{HUB}/o", f"{HUB}/o/n/settings", f"{HUB}/o/n/blob/main/x.bin",
    ],
)  # fmt: skip
def test_what_is_no_name(given: str) -> None:
    with pytest.raises(ModelError) as refused:
        reference(given)
    assert refused.value.code == "bad_reference" and "u:p" not in refused.value.message


def test_a_name_and_another_do_not_go_together() -> None:
    with pytest.raises(ModelError, match="already names"):
        reference("o/n:Q4_0", "Q8_0")


def test_what_is_asked_of_a_server_is_not_said() -> None:
    said = str(reference("https://x.org/m.gguf?signature=secret"))
    assert said.startswith("https://x.org/m.gguf") and "secret" not in said


def test_the_form_of_a_name() -> None:
    assert all(map(is_reference, ("o/n", "o/n:Q4_0", "o/n/x.gguf")))
    assert not any(map(is_reference, ("model", "model.gguf", "/a/b.gguf", "a/b/c", "~/models/x.gguf", "./x.gguf")))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("smollm2.q8_0.gguf", "Q8_0"),
        ("UD-Q4_K_XL/Big-UD-Q4_K_XL-00001-of-00003.gguf", "UD-Q4_K_XL"),
        ("Q3_K_S/part.gguf", "Q3_K_S"),
        ("m-IQ2_XXS.gguf", "IQ2_XXS"),
        ("m.BF16.gguf", "BF16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("qwen_Q5_0.gguf", "Q5_0"),
        ("Qwen2-7B.gguf", ""),
    ],
)
def test_the_quantisation_in_a_name(path: str, expected: str) -> None:
    assert label(path) == expected


def file(path: str, size: int = 1) -> HubFile:
    return HubFile(path, size, "", "")


def split(stem: str, count: int) -> list[HubFile]:
    return [file(f"{stem}-{no:05}-of-{count:05}.gguf", no) for no in range(1, count + 1)]


def test_models_among_a_repositorys_files() -> None:
    files = [
        file("README.md"), file("m-Q8_0.gguf", 90), file("m-Q2_K.gguf", 20), file("mmproj-m-F16.gguf"), file("..gguf"),
        *reversed(split("Q6_K/m-Q6_K", 3)), *split("m-Q4_0", 3)[:2],
    ]  # fmt: skip
    found = offers(files)
    assert [offer.quantisation for offer in found] == ["Q6_K", "Q2_K", "Q8_0"]
    assert found[0].size == 6 and [part.size for part in found[0].files] == [1, 2, 3]
    assert all(len(offer.files) == 1 for offer in found[1:])


THERE = offers([file("m-Q8_0.gguf", 3), file("m-Q4_K_M.gguf"), file("m-UD-Q4_K_XL.gguf", 2), *split("m-Q6_K", 2)])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Reference("o/n", quantisation="q8_0"), "m-Q8_0.gguf"),
        (Reference("o/n", quantisation="Q4_K_XL"), "m-UD-Q4_K_XL.gguf"),
        (Reference("o/n", quantisation="Q6_K"), "m-Q6_K-00001-of-00002.gguf"),
        (Reference("o/n", file="m-Q6_K-00002-of-00002.gguf"), "m-Q6_K-00001-of-00002.gguf"),
        (Reference("o/n", file="m-Q8_0.gguf"), "m-Q8_0.gguf"),
    ],
)
def test_the_one_that_is_meant(wanted: Reference, expected: str) -> None:
    found = choose(wanted, THERE)
    assert isinstance(found, Offer) and found.files[0].name == expected


def test_only_what_is_clear_is_chosen() -> None:
    assert choose(Reference("o/n"), THERE[:1]) == THERE[0]
    for wanted in (Reference("o/n"), Reference("o/n", quantisation="Q2_K"), Reference("o/n", file="x.gguf")):
        unclear = choose(wanted, THERE)
        assert isinstance(unclear, Unclear) and unclear.offers == THERE
    two = offers([file("a-Q8_0.gguf"), file("b-Q8_0.gguf"), file("c-Q4_0.gguf")])
    unclear = choose(Reference("o/n", quantisation="Q8_0"), two)
    assert isinstance(unclear, Unclear) and [o.files[0].name for o in unclear.offers] == ["a-Q8_0.gguf", "b-Q8_0.gguf"]
    nothing = choose(Reference("o/n"), ())
    assert isinstance(nothing, Unclear) and not nothing.offers and "no complete GGUF model" in nothing.reason


@given(st.text(max_size=40).map(lambda text: text + ".gguf"))
def test_a_safe_name_stays_in_its_folder(name: str) -> None:
    if safe_name(name):
        assert "/" not in name and "\\" not in name and not name.startswith(".") and name.isprintable()


def test_names_that_are_no_names_of_files() -> None:
    assert safe_name("a.gguf")
    for name in (".gguf", "a.bin", "../a.gguf", "-a.gguf", "a\x1b.gguf", "c:a.gguf", "a\\b.gguf", "é" * 120 + ".gguf"):
        assert not safe_name(name), name


@given(st.lists(st.text(max_size=60).map(lambda text: f"{text}.gguf"), max_size=8))
def test_whatever_a_hub_lists(paths: list[str]) -> None:
    for offer in offers(file(path) for path in paths):
        assert all(safe_name(part.name) for part in offer.files)
