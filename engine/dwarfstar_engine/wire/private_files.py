"""Small files that must be whole, and keys that nobody else may read.

Invariants. A file appears complete or not at all. ``create_private`` never replaces: of two creators the first wins,
and both read its file afterwards. Private files have mode 0600 in folders of mode 0700; a private file that others may
read is refused, as ssh does. Where there are no such modes (Windows), the user's profile folder protects them.
``locked`` keeps two processes of one machine from changing the same file at once; the system frees the lock of a
process that dies.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dwarfstar_engine.errors import TrustError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
LOCK_POLL_S = 0.02  # between attempts to get a lock that another process holds for a moment


def create_private(path: Path, data: bytes) -> None:
    """Create ``path`` with mode 0600 unless it exists. Raises TrustError."""
    with _trouble(path, "written"):
        temporary = _temporary(path, data)  # mkstemp's mode is 0600
        try:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            os.unlink(temporary)  # noqa: PTH108


def replace_file(path: Path, data: bytes) -> None:
    """Write ``path``, replacing it in one step. Raises TrustError."""
    with _trouble(path, "written"):
        temporary = _temporary(path, data)
        try:
            os.replace(temporary, path)  # noqa: PTH105
        except OSError:
            os.unlink(temporary)  # noqa: PTH108
            raise


def read_private(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a file that nobody else may read. Raises TrustError."""
    with _trouble(path, "read"), path.open("rb") as file:
        if os.name == "posix" and os.fstat(file.fileno()).st_mode & _OTHERS:
            raise TrustError(
                f"{path} may be read by other users: run chmod 600 on it, and replace what it holds if they could."
            )
        return _bounded(path, file.read(limit + 1), limit)


def read_public(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a file. Raises TrustError."""
    with _trouble(path, "read"), path.open("rb") as file:
        return _bounded(path, file.read(limit + 1), limit)


@contextlib.contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock file ``path``, which stays. Raises TrustError (code "locked") if another holds it for ``wait_s``.

    It blocks while it waits: call it from a thread where an event loop runs.
    """
    with _trouble(path, "locked"):
        _make_folder(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        give_up = time.monotonic() + wait_s
        while not _try_lock(handle):
            if time.monotonic() >= give_up:
                raise TrustError(f"{path} is held by another process: let that one end first.", code="locked")
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(handle)  # which frees the lock


def _try_lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and stat.S_IMODE(folder.stat().st_mode) & _OTHERS:
        folder.chmod(0o700)


def _bounded(path: Path, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise TrustError(f"{path} is larger than {limit} bytes: it is not a file of DwarfStar's.")
    return data


def _temporary(path: Path, data: bytes) -> str:
    _make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)
    return name


@contextlib.contextmanager
def _trouble(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrustError(f"{path} cannot be {verb} ({error.strerror}): check its folder and who owns it.") from None
