"""The version handshake: two processes work together only if they would compute and say the same.

Three things must be equal. *protocol*: the control messages and what is expected after each. *abi*: the layout of
frames and activation codecs. *llama_build*: the llama.cpp release, because slices of one model are exact only if every
slice is computed by the same code. DwarfStar's own version may differ; it is told for people.

The llama.cpp release is known by llama-cpp-python's version, which pins one llama.cpp commit. Not by the library's
size or hash: those differ between CPU, CUDA and Metal builds of the same code, which may well share a model. A package
built by hand from another llama.cpp commit is not seen.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

import dwarfstar_engine
from dwarfstar_engine.errors import VersionMismatch
from dwarfstar_engine.wire.frames import FRAME_VERSION

PROTOCOL_VERSION = 1
MAX_SHOWN = 64  # characters of a peer's text that go into a message


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """What a process is. protocol, abi: whole numbers; llama_build, version: text, compared and shown as they are."""

    protocol: int
    llama_build: str
    version: str
    abi: int


@functools.cache
def local_build() -> BuildInfo:
    """This process's build; without llama-cpp-python (a client only) ``llama_build`` is "none"."""
    try:
        llama = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    except importlib.metadata.PackageNotFoundError:
        llama = "none"
    return BuildInfo(PROTOCOL_VERSION, llama, dwarfstar_engine.__version__, FRAME_VERSION)


def check_peer(ours: BuildInfo, theirs: BuildInfo) -> None:
    """Raise VersionMismatch, naming both sides and the remedy, if the two may not work together."""
    if ours.protocol != theirs.protocol or ours.abi != theirs.abi:
        raise VersionMismatch(
            f"This DwarfStar {_shown(ours.version)} speaks protocol {ours.protocol}.{ours.abi} and its peer's "
            f"{_shown(theirs.version)} speaks {theirs.protocol}.{theirs.abi}: install one release on both machines."
        )
    if ours.llama_build != theirs.llama_build:
        raise VersionMismatch(
            f"This machine computes with {_shown(ours.llama_build)} and its peer with {_shown(theirs.llama_build)}, "
            "whose results may differ: install the same llama-cpp-python on both."
        )


def _shown(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_SHOWN])
