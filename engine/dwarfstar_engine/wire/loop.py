"""How our processes run their event loop: on uvloop where there is one.

Every frame passes several steps of the loop, each with caches cold from llama.cpp: uvloop's steps are C and few, and
took a quarter off the time of a hop where it was measured. For the same reason what is done every so often is done at
the same moments (``until_beat``): a process that wakes up for one thing has the others at hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Coroutine
from typing import Any

FILES = 8192  # open at one time: all connections our ports take (``channel.CONNECTIONS``), HTTP's, and some to spare

_BEGAN = time.monotonic()  # of a process; those of a machine do not wake up at the same time


def until_beat(period_s: float) -> float:
    """Seconds until the next of this process's beats of a period, more than none. Longer ones fall on shorter ones."""
    return period_s - (time.monotonic() - _BEGAN) % period_s


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
