"""The engine that runs from a home folder: one at a time, found by a small file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from dwarfstar_engine.errors import DwarfStarError

MAX_BYTES = 4096


class Running(BaseModel):
    """Where a running engine can be reached. ``started``: the process's start time, so that a reused pid is seen."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: float
    control: str
    api_url: str


def _file(home: Path) -> Path:
    return home / "run" / "engine.json"


def find(home: Path) -> Running | None:
    """The engine running from ``home``, or None."""
    try:
        path = _file(home)
        if path.stat().st_size > MAX_BYTES:
            return None
        running = Running.model_validate_json(path.read_bytes())
        alive = abs(psutil.Process(running.pid).create_time() - running.started) < 1.0
    except (OSError, ValidationError, psutil.Error):
        return None
    return running if alive else None


def require(home: Path) -> Running:
    """The engine running from ``home``. Raises DwarfStarError saying how to start one."""
    running = find(home)
    if running is None:
        raise DwarfStarError(
            f"no engine is running from {home}: start one with `dwarfstar --serve MODEL` or `dwarfstar --demo`",
            code="not_running",
        )
    return running


def announce(home: Path, control: str, api_url: str) -> None:
    """Write the file for this process, whole or not at all."""
    path = _file(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    running = Running(pid=os.getpid(), started=psutil.Process().create_time(), control=control, api_url=api_url)
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(running.model_dump()), "utf-8")
    draft.replace(path)


def withdraw(home: Path) -> None:
    """Remove the file if it is this process's."""
    running = find(home)
    if running is not None and running.pid == os.getpid():
        _file(home).unlink(missing_ok=True)
