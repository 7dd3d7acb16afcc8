"""The engine that runs from a home folder: one at a time, found by a small file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from dwarfstar_engine.errors import DwarfStarError, SettingsError

MAX_BYTES = 4096


class Running(BaseModel):
    """Where a running engine can be reached. ``started``: the process's start time, so that a reused pid is seen.

    join: where other machines join the cluster. certificate: file of the HTTP API's certificate, if it is HTTPS.
    discovery: machines that join find it without being told where. trust: folder, in the home, of the certificate that
    it is asked with.
    """

    model_config = ConfigDict(frozen=True)

    pid: int
    started: float
    control: str
    api_url: str
    join: str = ""
    certificate: str = ""
    discovery: bool = False
    trust: str = "trust"


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
            f"no engine is running from {home}: start one with `dwarfstar --serve MODEL` or `dwarfstar --serve --demo`",
            code="not_running",
        )
    return running


def gone(engine: Running) -> bool:
    """Whether the engine's process has ended."""
    try:
        process = psutil.Process(engine.pid)
        same = abs(process.create_time() - engine.started) < 1.0
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


@contextlib.contextmanager
def claim(home: Path) -> Iterator[None]:
    """Hold ``home`` for this process: two engines would overwrite each other's certificates and logs.

    The lock is the kernel's, so it ends with the process however that dies. Raises DwarfStarError if an engine has it,
    SettingsError if the folder cannot be used.
    """
    try:
        _file(home).parent.mkdir(parents=True, exist_ok=True)
        lock = (_file(home).parent / "engine.lock").open("wb")
    except OSError as error:
        raise SettingsError(f"the home folder {home} cannot be used ({error.strerror}): give another --home") from None
    with lock:
        try:
            _lock(lock.fileno())
        except OSError:
            other = find(home)
            who = f"process {other.pid}, {other.api_url}" if other else "it is just starting or ending"
            raise DwarfStarError(
                f"an engine is running from {home} already ({who}): "
                f"stop it with `dwarfstar stop --home {home}`, or give another --home",
                code="already_running",
            ) from None
        yield


def _lock(descriptor: int) -> None:
    """Lock a file without waiting. Raises OSError if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: the engine file alone must do
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def announce(
    home: Path,
    control: str,
    api_url: str,
    join: str,
    certificate: str = "",
    discovery: bool = False,
    trust: str = "trust",
) -> None:
    """Write the file for this process, whole or not at all."""
    path = _file(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    running = Running(
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        control=control,
        api_url=api_url,
        join=join,
        certificate=certificate,
        discovery=discovery,
        trust=trust,
    )
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(running.model_dump()), "utf-8")
    draft.replace(path)


def withdraw(home: Path) -> None:
    """Remove the file if it is this process's."""
    running = find(home)
    if running is not None and running.pid == os.getpid():
        _file(home).unlink(missing_ok=True)
