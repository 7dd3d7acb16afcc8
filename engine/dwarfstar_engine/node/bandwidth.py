"""How fast this machine reads its memory: measured once, and kept in the node's folder.

A measurement takes all cores for ``PROBE_S``. Several nodes of one machine would disturb each other, so whoever starts
them measures once and passes the figure on. What was kept counts for the machine it was measured on only: a home folder
may be on a disk that is moved, or in an image.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from pathlib import Path

import psutil

from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.native import memory_bandwidth_gb_s
from dwarfstar_engine.wire.private_files import read_private, replace_file

log = logging.getLogger("dwarfstar.facts")

PROBE_BYTES = 64 << 20  # larger than the caches of most machines; written once, read for PROBE_S
PROBE_S = 0.15
MAX_FILE_BYTES = 1024  # a name and a figure
FILE = "bandwidth.json"


def machine() -> str:
    """Words that another machine, or this one rebuilt, would not have."""
    memory_gib = round(psutil.virtual_memory().total / (1 << 30))
    return f"{platform.node()} {platform.machine()} {os.cpu_count()} cores {memory_gib} GiB"


def known_gb_s(folder: Path) -> float:
    """As it was kept in ``folder``, else measured, and kept; 0.0: it cannot be. Blocks: call it in a thread."""
    path, here = folder / FILE, machine()
    if (kept := _kept(path, here)) is not None:
        return kept
    try:
        gb_s = round(memory_bandwidth_gb_s(size_bytes=PROBE_BYTES, seconds=PROBE_S), 2)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"machine": here, "gb_s": gb_s}).encode())
    except (DwarfStarError, OSError) as error:
        log.warning("the memory's bandwidth is not known: %s", error)
        return 0.0
    return gb_s


def _kept(path: Path, here: str) -> float | None:
    if not path.exists():
        return None
    try:
        told = json.loads(read_private(path, MAX_FILE_BYTES))
        gb_s = float(told["gb_s"])
        return gb_s if told["machine"] == here and math.isfinite(gb_s) and gb_s > 0 else None
    except (DwarfStarError, ValueError, KeyError, TypeError):
        return None  # it is measured again
