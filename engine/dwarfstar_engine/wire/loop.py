"""How our processes run their event loop: on uvloop where there is one.

Every frame passes several steps of the loop, each with caches cold from llama.cpp: uvloop's steps are C and few, and
took a quarter off the time of a hop where it was measured.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any


def run(work: Coroutine[Any, Any, None]) -> None:
    """``asyncio.run``, on uvloop except on Windows, which it does not support."""
    if sys.platform == "win32":
        asyncio.run(work)
    else:
        import uvloop

        uvloop.run(work)
