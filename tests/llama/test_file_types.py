"""Our names of file types are those of the llama.cpp in use."""

from __future__ import annotations

import pytest
from llama_cpp import llama_cpp

from dwarfstar_engine.model.ggml_types import FILE_TYPES

pytestmark = pytest.mark.llama


def test_file_types_are_those_of_the_pinned_llama_cpp() -> None:
    theirs = {
        value: name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
        for name, value in vars(llama_cpp).items()
        if name.startswith("LLAMA_FTYPE_") and not name.endswith("GUESSED")
    }
    assert theirs == FILE_TYPES
