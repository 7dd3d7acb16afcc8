"""How our processes run their event loop: on uvloop where there is one.

Every frame passes several steps of the loop, each with caches cold from llama.cpp: uvloop's steps are C and few, and
took a quarter off the time of a hop where it was measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from typing import Any

FILES = 8192  # open at one time: all connections our ports take (``channel.CONNECTIONS``), HTTP's, and some to spare


def _allow_files() -> None:
    """Raise the soft limit of open files: on many systems it is so low that idle connections of a stranger reach it.

    Processes that we start inherit it.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(work: Coroutine[Any, Any, None]) -> None:
    """``asyncio.run``, on uvloop except on Windows, which it does not support."""
    _allow_files()
    if sys.platform == "win32":
        asyncio.run(work)
    else:
        import uvloop

        uvloop.run(work)
