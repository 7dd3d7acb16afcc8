"""The text assembler against its definition: decode the whole, cut at the first stop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dwarfstar_engine.api.text import TextAssembler

# Few letters, so that stops, their beginnings and their overlaps are met all the time.
ALPHABET = "ab€"
texts = st.text(ALPHABET, max_size=30)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)
cut_lists = st.lists(st.integers(0, 120), max_size=40)
broken = st.binary(max_size=20) | st.lists(
    st.sampled_from([b"a", b"\xc3", b"\xa9", b"\xe2\x82", b"\xff", b"\xf0\x9f"])
).map(b"".join)


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """``data`` in pieces, some of them empty."""
    at = sorted(min(cut, len(data)) for cut in cuts)
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


def assemble(pieces: Sequence[bytes], stops: Sequence[str]) -> tuple[list[str], TextAssembler]:
    """What each piece brought, the end's last, and the assembler afterwards."""
    assembler, out = TextAssembler(stops), []
    for piece in pieces:
        out.append(assembler.feed(piece))
        if assembler.stopped:
            break
    out.append(assembler.finish())
    return out, assembler


def reference(text: str, stops: Sequence[str]) -> str:
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


@given(st.text("abé€😀"), cut_lists)
def test_any_split_gives_the_text(text: str, cuts: list[int]) -> None:
    out, assembler = assemble(split(text.encode(), cuts), ())
    assert "".join(out) == text
    assert not assembler.stopped
    assert assembler.emitted == assembler.decoded == len(text)


@given(broken, cut_lists)
def test_bytes_that_are_no_text_become_replacement_characters(data: bytes, cuts: list[int]) -> None:
    out, _ = assemble(split(data, cuts), ())
    assert "".join(out) == data.decode("utf-8", "replace")


@given(texts, stop_lists, cut_lists)
@example("abab€", ["b€", "ababb"], [1, 2, 3, 4])  # the second begins earlier but never completes
@example("ababb", ["ba", "ababb"], [1, 2, 3, 4])  # the second begins earlier and completes later
@example("aab", ["ab"], [1, 2])
@example("ab€", ["b", "aba"], [1, 2])  # a stop lies within the beginning of another that never completes
def test_stops_cut_where_find_says(text: str, stops: list[str], cuts: list[int]) -> None:
    out, assembler = assemble(split(text.encode(), cuts), stops)
    wanted = reference(text, stops)
    assert "".join(out) == wanted
    assert assembler.stopped == (wanted != text)
    assert assembler.emitted == len(wanted)


@given(broken, stop_lists | st.just(["\ufffd"]), cut_lists)
def test_stops_work_in_broken_text(data: bytes, stops: list[str], cuts: list[int]) -> None:
    out, _ = assemble(split(data, cuts), stops)
    assert "".join(out) == reference(data.decode("utf-8", "replace"), stops)


@given(texts, stop_lists, cut_lists)
def test_what_was_handed_out_is_never_taken_back(text: str, stops: list[str], cuts: list[int]) -> None:
    """After any piece the text so far is a beginning of the answer, had the model ended or gone on."""
    pieces = split(text.encode(), cuts)
    assembler, so_far = TextAssembler(stops), ""
    for count, piece in enumerate(pieces, 1):
        so_far += assembler.feed(piece)
        seen = b"".join(pieces[:count]).decode("utf-8", "ignore")
        assert reference(seen, stops).startswith(so_far)
        assert reference(text, stops).startswith(so_far)
        if assembler.stopped:
            break


@given(texts, stop_lists)
def test_nothing_is_held_without_reason(text: str, stops: list[str]) -> None:
    """What is held back after whole characters is the beginning of a stop."""
    assembler = TextAssembler(stops)
    so_far = ""
    for character in text:
        so_far += assembler.feed(character.encode())
        if assembler.stopped:
            return
    held = text[len(so_far) :]
    assert not held or any(stop.startswith(held) for stop in stops)


def test_text_goes_out_at_once() -> None:
    assembler = TextAssembler(["\n\n"])
    assert [assembler.feed(piece) for piece in (b"Hi", b"\n", b"there", b" \n", b"\nno")] == [
        "Hi",
        "",
        "\nthere",
        " ",
        "",
    ]
    assert assembler.stopped


def test_an_empty_stop_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        TextAssembler([""])
