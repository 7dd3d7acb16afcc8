"""Two builds work together only if they say and compute the same; the refusal names both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dwarfstar_engine.errors import VersionMismatch
from dwarfstar_engine.wire.frames import FRAME_VERSION
from dwarfstar_engine.wire.handshake import PROTOCOL_VERSION, BuildInfo, check_peer, local_build

OURS = BuildInfo(protocol=3, llama_build="llama-cpp-python 0.3.36", version="0.1.0", abi=5)


def test_equal_builds_and_other_releases_of_dwarfstar_agree() -> None:
    check_peer(OURS, replace(OURS))
    check_peer(OURS, replace(OURS, version="0.1.1"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"protocol": 4}, ("3.5", "4.5", "0.1.0")),
        ({"abi": 6}, ("3.5", "3.6", "0.1.0")),
        ({"llama_build": "llama-cpp-python 0.3.37"}, ("0.3.36", "0.3.37")),
    ],
)
def test_a_difference_that_matters_is_refused_naming_both(change: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(VersionMismatch) as refused:
        check_peer(OURS, replace(OURS, **change))
    assert refused.value.code == "version_mismatch"
    assert all(text in refused.value.message for text in named)


def test_a_peer_cannot_write_what_it_likes_into_our_messages() -> None:
    with pytest.raises(VersionMismatch) as refused:
        check_peer(OURS, replace(OURS, llama_build="\x1b[2J" + "x" * 10_000))
    assert "\x1b" not in refused.value.message and len(refused.value.message) < 400


def test_the_local_build_names_llama_cpp() -> None:
    build = local_build()
    assert build.llama_build.startswith("llama-cpp-python 0.")
    assert (build.protocol, build.abi) == (PROTOCOL_VERSION, FRAME_VERSION)
