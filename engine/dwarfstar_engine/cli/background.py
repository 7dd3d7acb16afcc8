"""An engine in the background: a process group of its own, so that it survives the terminal it was started from.

What it says goes to a file in the home; the one before it is kept beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dwarfstar_engine.errors import SettingsError

MAX_LINE_BYTES = 4096  # of what is read of the log at one time; a line that is longer is shown in pieces
READ_BYTES = 64 << 10


def log_file(home: Path) -> Path:
    return home / "state" / "engine.log"


class Background:
    """An engine that was started. Its log is read here as it grows."""

    def __init__(self, home: Path, arguments: Sequence[str]) -> None:
        """Start ``dwarfstar --serve`` with ``arguments`` from ``home``. Raises SettingsError."""
        self._log = log_file(home)
        self._read = 0
        self._rest = b""
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            if self._log.exists():
                self._log.replace(self._log.with_suffix(".log.1"))
            with self._log.open("wb") as out:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "dwarfstar_engine.cli.main", "--serve", *arguments, "--home", str(home)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
        except OSError as error:
            raise SettingsError(
                f"the engine cannot be started from {home} ({error.strerror}): give another --home"
            ) from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        """Whether its process has ended."""
        return self._process.poll() is not None

    def lines(self) -> list[str]:
        """What it has said since the last call, whole lines."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            data = file.read(READ_BYTES)
        self._read += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode("utf-8", "replace").removeprefix("dwarfstar: ") for line in whole if line.strip()]
