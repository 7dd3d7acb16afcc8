"""A program in a pseudo-terminal, and its screen as text: what a person sees, and keys as they press them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import psutil
import pyte

from support.engine_process import DEADLINE_S, until

READ = 1 << 16
POLL_S = 0.1  # between two looks at whether it is over
STUCK_S = 1.0  # no room for so long: what is written meanwhile waits, rather than being on its way
KEYS = {"enter": "\r", "esc": "\x1b", "left": "\x1b[D", "right": "\x1b[C", "tab": "\t"}
# A terminal tells its session when it goes, if it is the session's own. Then the program takes this one's place.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
# Queries and modes of newer terminals, which pyte takes for text or for older sequences.
UNKNOWN = re.compile(rb"\x1b\[[<>=][0-9;]*[a-zA-Z]|\x1b\[\?[0-9;]*\$p|\x1b[P_^\]].*?(?:\x1b\\|\x07)", re.DOTALL)


class Terminal:
    """A context manager: on leaving it the program is gone. Read by a thread, so that the program waits only while the
    terminal is frozen, as when a person holds a window, or a line hangs: what is written then stays where it is."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], size: tuple[int, int]) -> None:
        self._arguments = list(arguments)
        self._environment = {**environment, "TERM": "xterm-256color", "COLORTERM": "truecolor", "LC_ALL": "C.UTF-8"}
        self._size = size
        self._screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self._screen)
        self._lock, self._over, self._reads = threading.Lock(), threading.Event(), threading.Event()
        self._reads.set()
        self._master = self._slave = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = threading.Thread(target=self._read, name="terminal", daemon=True)

    def __enter__(self) -> Self:
        self._master, self._slave = pty.openpty()
        columns, lines = self._size
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *self._arguments],
            stdin=self._slave, stdout=self._slave, stderr=self._slave, env=self._environment, start_new_session=True,
        )  # fmt: skip
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait(DEADLINE_S)
        self._over.set()
        self._reads.set()
        self._reader.join(DEADLINE_S)
        os.close(self._slave)
        if self._master >= 0:
            os.close(self._master)

    def _read(self) -> None:
        held = b""
        while not self._over.is_set():
            if not self._reads.wait(POLL_S) or not select.select([self._master], [], [], POLL_S)[0]:
                continue
            try:
                data = held + os.read(self._master, READ)
            except OSError:
                return  # the program has closed it
            whole, held = _whole(UNKNOWN.sub(b"", data))
            with self._lock:
                self._stream.feed(whole)

    @property
    def text(self) -> str:
        with self._lock:
            return "\n".join(line.rstrip() for line in self._screen.display)

    def press(self, *keys: str) -> None:
        """Keys by name, anything else as it is."""
        for key in keys:
            os.write(self._master, KEYS.get(key, key).encode())

    def sees(self, pattern: str) -> None:
        """Wait until a pattern is on the screen."""
        try:
            until(lambda: bool(re.search(pattern, self.text)), f"{pattern!r} is shown")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None

    def freeze(self) -> None:
        """Read no more, and wait until the program cannot write any more."""
        self._reads.clear()
        free_at = time.monotonic()

        def stuck() -> bool:
            nonlocal free_at
            now = time.monotonic()
            if select.select([], [self._slave], [], 0)[1]:
                free_at = now
            return now - free_at > STUCK_S

        until(stuck, "the program cannot write")

    def thaw(self) -> None:
        self._reads.set()

    def resize(self, columns: int, lines: int) -> None:
        """As when a window is dragged."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def rss_bytes(self) -> int:
        """Memory of the program."""
        assert self._process is not None
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        """The window is gone: the program can neither read nor write any more, and is told."""
        self._over.set()
        self._reads.set()
        self._reader.join(DEADLINE_S)
        os.close(self._master)
        self._master = -1

    def hang_up(self) -> None:
        """As when somebody ends the session, and the terminal is still there."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def end(self) -> int:
        """The exit status, once the program has ended."""
        assert self._process is not None
        return self._process.wait(DEADLINE_S)


def _whole(data: bytes) -> tuple[bytes, bytes]:
    """What can be fed, and the beginning of a sequence whose end has not come yet."""
    at = data.rfind(b"\x1b")
    if at < 0 or re.match(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[()][0-9A-B]|[^\[\]P_^()])", data[at:], re.DOTALL):
        return data, b""
    return data[:at], data[at:]
