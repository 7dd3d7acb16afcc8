"""Small files that must be whole, and keys that nobody else may read.

Invariants. A file appears complete or not at all. ``create_private`` never replaces: of two creators the first wins,
and both read its file afterwards. Private files have mode 0600 in folders of mode 0700; a private file that others may
read is refused, as ssh does. Where there are no such modes (Windows), the user's profile folder protects them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dwarfstar_engine.errors import TrustError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


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
        os.replace(_temporary(path, data), path)  # noqa: PTH105


def read_private(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a file that nobody else may read. Raises TrustError."""
    with _trouble(path, "read"), path.open("rb") as file:
        if os.name == "posix" and os.fstat(file.fileno()).st_mode & _OTHERS:
            raise TrustError(f"{path} may be read by other users: run chmod 600 on it, or join again with a new key.")
        return _bounded(path, file.read(limit + 1), limit)


def read_public(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a file. Raises TrustError."""
    with _trouble(path, "read"), path.open("rb") as file:
        return _bounded(path, file.read(limit + 1), limit)


def _bounded(path: Path, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise TrustError(f"{path} is larger than {limit} bytes: it is not a file of DwarfStar's.")
    return data


def _temporary(path: Path, data: bytes) -> str:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and stat.S_IMODE(path.parent.stat().st_mode) & _OTHERS:
        path.parent.chmod(0o700)
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
        raise TrustError(f"{path} cannot be {verb} ({error.strerror}): check its folder, or join again.") from None
