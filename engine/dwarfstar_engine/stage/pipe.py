"""The pipe between a daemon and its children: one JSON object a line, commands in on stdin, events out on stdout.

A child that reads the end of its stdin has lost its parent and exits at once, whatever it is doing. Stray output of
libraries cannot corrupt the event stream: file descriptor 1 is pointed at stderr when the child starts.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from typing import Any

STAGE_NAME = "dwarf-stage"  # of a stage's process, once it is told what to load; 15 characters at most
MAX_LINE_BYTES = 64 << 20  # the vocabulary of a large model, base64, is about 8 MiB; a prompt at most the body limit


class ChildPipe:
    """The child's end. ``emit`` may be called from any thread."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._reader: asyncio.StreamReader | None = None

    def emit(self, event: str, **fields: Any) -> None:
        """Send one event. A parent that is gone is not an error here: stdin's end says so."""
        line = json.dumps({"event": event, **fields}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                view = memoryview(line)
                while view:
                    view = view[self._out.write(view) :]
            except BrokenPipeError:
                os._exit(0)

    async def command(self) -> dict[str, Any]:
        """The next command; ends the process when the parent is gone."""
        if self._reader is None:
            self._reader = asyncio.StreamReader(MAX_LINE_BYTES)
            protocol = asyncio.StreamReaderProtocol(self._reader)
            await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        line = await self._reader.readline()
        if not line:
            os._exit(0)
        command: dict[str, Any] = json.loads(line)
        return command
