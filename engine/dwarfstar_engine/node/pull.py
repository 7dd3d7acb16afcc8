"""Downloads of model files: resumable, verified, and in the models folder only when they are whole.

Theory. What is on its way lies in ``.pull/KEY`` of the models folder, where KEY is made of the files' hashes: so the
same content is found again by whoever pulls it next, and other content under the same name never goes on from it.
Each file grows as ``NAME.part``, is hashed as it grows (after a stop, what is there is hashed first), and becomes
``NAME`` when its hash is the one the hub told. When all files of a model are there, their directories are read once
more, and they move to the models folder: the other parts first, the one that names the model last.

Invariants. No name appears in the models folder before its model is complete and verified, and none there is replaced.
A download that stops, for whatever reason but a wrong hash, leaves what goes on later. Two pulls of one model exclude
each other. Retries are bounded: only tries that bring the file further than it ever was are free.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from dwarfstar_engine.errors import HubError, ModelFileError, TrustError
from dwarfstar_engine.model.gguf import GgufModel, read_head, read_model
from dwarfstar_engine.model.hub_names import DOWNLOADS, HubFile, Offer, Reference, without_query
from dwarfstar_engine.node.pulled import Pulled, note_pulled, read_record
from dwarfstar_engine.wire.private_files import locked

SPAN_BYTES = 8 << 30  # of one request: content networks refuse to send more than some tens of GiB in one answer
MAX_TRIES = 6  # in a row that bring nothing new
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between them, doubling
HASH_CHUNK = 4 << 20
ROOM_LEFT_BYTES = 256 << 20  # a disk that is full to the last byte stops other programs, too
PART = ".part"


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes on their way. start: which byte of the file is the first; 0 if the server knows no ranges.

    total: the file's size, or None if it was not told. tag: the server's name for the content (ETag), or empty.
    """

    start: int
    total: int | None
    chunks: Iterator[bytes]
    tag: str = ""


class Source(Protocol):
    """Where bytes come from (``node.hub.Hub``)."""

    def read(self, file: HubFile, start: int, stop: int) -> AbstractContextManager[Body]: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """doing: ``checking`` what is there, ``pulling``, or ``waiting`` to try again. done, total: bytes of the model."""

    doing: str
    file: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Tools:
    """What a download does besides reading: tell how far it is, wait before it tries again, look at the disk."""

    tell: Callable[[Progress], None]
    sleep: Callable[[float], None] = time.sleep
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


def read_offer(source: Source, offer: Offer, tools: Tools) -> GgufModel:
    """The directory at the head of a model that is not here yet. Raises ModelFileError, HubError."""
    first = offer.files[0]
    return read_head(_Remote(source, first, tools), first.name, first.size)


def pull(source: Source, offer: Offer, folder: Path, wanted: Reference, tools: Tools) -> Path:
    """Have a model in ``folder``. Returns its first file. Raises HubError, ModelFileError."""
    work = folder / DOWNLOADS / _key(offer)
    with _disk(folder):
        work.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(work.with_suffix(".lock"), 0.0):
            try:
                if not _already(offer, folder, tools):
                    _fetch_all(source, offer, folder, work, tools)
            finally:
                with contextlib.suppress(OSError):  # what came stays; who waits for the lock finds that it is over
                    work.rmdir()
                    work.with_suffix(".lock").unlink()
    except TrustError as error:
        if error.code != "locked":
            raise HubError(error.message, code="disk") from error
        raise HubError(f"another pull of {offer.files[0].name} is running", code="pull_running") from error
    with contextlib.suppress(TrustError):  # the model is there; only its name on the hub is forgotten
        note_pulled(folder, _pulled(offer, wanted))
    return folder / offer.files[0].name


def unfinished(offer: Offer, folder: Path) -> int:
    """Bytes of a model that are here already, and count when it is pulled again."""
    return sum(_there(folder / DOWNLOADS / _key(offer), file) for file in offer.files)


def _key(offer: Offer) -> str:
    digest = hashlib.sha256()
    for file in offer.files:
        # Without a hash, address, size and the server's tag are all there is to tell content apart.
        content = file.sha256 or f"{without_query(file.url)} {file.revision}"
        digest.update(f"{file.name}\n{file.size}\n{content}\n".encode())
    return digest.hexdigest()[:16]


def _pulled(offer: Offer, wanted: Reference) -> Pulled:
    first = offer.files[0]
    return Pulled(
        file=first.name,
        repo=wanted.repo,
        path=first.path if wanted.repo else "",
        quantisation=offer.quantisation,
        revision=first.revision,
        sha256=tuple(file.sha256 for file in offer.files),
    )


def _already(offer: Offer, folder: Path, tools: Tools) -> bool:
    """Whether the model is in the folder. Raises HubError if something else has one of its names."""
    there = [file for file in offer.files if (folder / file.name).exists()]
    if not there:
        return False
    known = {entry.file: entry.sha256 for entry in read_record(folder).models}
    recorded = known.get(offer.files[0].name) == tuple(file.sha256 for file in offer.files)
    for file in there:
        path = folder / file.name
        same = path.is_file() and path.stat().st_size == file.size
        if same and file.sha256 and not recorded:
            same = _hashed(path, file, offer.size, tools) == file.sha256
        if not same:
            raise HubError(f"{path} is there and holds something else: move it away first", code="name_taken")
    return len(there) == len(offer.files)


def _fetch_all(source: Source, offer: Offer, folder: Path, work: Path, tools: Tools) -> None:
    _check_room(offer, folder, work, tools)
    with _disk(work):
        work.mkdir(exist_ok=True)
    before = 0
    for file in offer.files:
        if not (folder / file.name).exists() and not (work / file.name).exists():
            _Fetch(source, file, work, tools, before, offer.size).run()
        before += file.size
    with _disk(folder):
        for file in offer.files:  # a move that was cut short, of a split model
            if not (work / file.name).exists():
                os.replace(folder / file.name, work / file.name)  # noqa: PTH105
        try:
            read_model(work / offer.files[0].name)  # of all parts; where no hash is told it is the only check
        except ModelFileError:
            shutil.rmtree(work, ignore_errors=True)  # damaged at its source: nothing could go on from it
            raise
        for file in reversed(offer.files):
            os.replace(work / file.name, folder / file.name)  # noqa: PTH105
        _sync(folder)


def _check_room(offer: Offer, folder: Path, work: Path, tools: Tools) -> None:
    """Raise HubError unless what is still to come fits on the disk."""
    here = sum(file.size for file in offer.files if (folder / file.name).exists())
    missing = offer.size - here - sum(_there(work, file) for file in offer.files)
    with _disk(folder):
        free = tools.free_bytes(folder)
    short = missing + ROOM_LEFT_BYTES - free
    if missing > 0 and short > 0:
        raise HubError(
            f"{folder} has {_gib(free)} free, and {_gib(missing)} are still to come: make room for {_gib(short)} more, "
            "or give another folder with --models",
            code="disk_full",
        )


def _there(work: Path, file: HubFile) -> int:
    for path in (work / file.name, work / (file.name + PART)):
        with contextlib.suppress(OSError):
            return min(path.stat().st_size, file.size)
    return 0


class _Fetch:
    """One file on its way. ``_done`` bytes are in its part and in ``_digest``; ``_best`` is the most it ever were."""

    def __init__(self, source: Source, file: HubFile, work: Path, tools: Tools, before: int, total: int) -> None:
        self._source, self._file, self._tools = source, file, tools
        self._whole, self._part = work / file.name, work / (file.name + PART)
        self._before, self._total = before, total
        self._done = self._best = 0
        self._digest = hashlib.sha256()

    def run(self) -> None:
        """Leave the whole file, verified, under its name in the work folder."""
        with _disk(self._part.parent):
            self._part.touch()
            with self._part.open("r+b") as out:
                self._take_up(out)
                self._receive(out)
                out.flush()
                os.fsync(out.fileno())
        found = self._digest.hexdigest()
        if self._file.sha256 and found != self._file.sha256:
            self._part.unlink()
            raise HubError(
                f"{self._file.name} is damaged: its SHA-256 is {found}, and the hub says {self._file.sha256}; what "
                "came is deleted, pull it again",
                code="hub_damaged",
            )
        with _disk(self._part.parent):
            os.replace(self._part, self._whole)  # noqa: PTH105

    def _take_up(self, out: IO[bytes]) -> None:
        """Hash what an earlier pull left."""
        while chunk := out.read(HASH_CHUNK):
            if self._done + len(chunk) > self._file.size:
                return self._restart(out)
            self._digest.update(chunk)
            self._done += len(chunk)
            self._tell("checking")
        self._best = self._done

    def _restart(self, out: IO[bytes]) -> None:
        out.seek(0)
        out.truncate()
        self._done, self._digest = 0, hashlib.sha256()

    def _receive(self, out: IO[bytes]) -> None:
        tries = 0
        while self._done < self._file.size:
            trouble = None
            try:
                self._request(out)
            except HubError as error:
                if not error.passing:
                    raise
                trouble = error
            tries = 0 if self._done > self._best else tries + 1
            self._best = max(self._best, self._done)
            if tries > MAX_TRIES:
                raise trouble or HubError(f"nothing more comes of {self._file.name}; try again later")
            if trouble is not None and self._done < self._file.size:
                self._tell("waiting")
                self._tools.sleep(_wait_s(tries, trouble))

    def _request(self, out: IO[bytes]) -> None:
        """Take what one request brings."""
        stop = min(self._file.size, self._done + SPAN_BYTES)
        with self._source.read(self._file, self._done, stop) as body:
            _check_total(body, self._file)
            if body.start != self._done:  # no ranges there
                self._restart(out)
            for chunk in body.chunks:
                piece = chunk[: self._file.size - self._done]
                out.write(piece)
                self._digest.update(piece)
                self._done += len(piece)
                self._tell("pulling")
                if self._done >= self._file.size:
                    return

    def _tell(self, doing: str) -> None:
        self._tools.tell(Progress(doing, self._file.name, self._before + self._done, self._total))


class _Remote:
    """The head of a file that is not here, read front to back."""

    def __init__(self, source: Source, file: HubFile, tools: Tools) -> None:
        self._source, self._file, self._tools = source, file, tools
        self._at = 0

    def read(self, size: int, /) -> bytes:
        for tries in range(1, MAX_TRIES + 1):
            try:
                data = self._some(size)
            except HubError as error:
                if not error.passing or tries == MAX_TRIES:
                    raise
                self._tools.sleep(_wait_s(tries, error))
            else:
                self._at += len(data)
                return data
        raise AssertionError("the last try returns or raises")

    def _some(self, size: int) -> bytes:
        stop = min(self._file.size, self._at + size)
        data = bytearray()
        with self._source.read(self._file, self._at, stop) as body:
            _check_total(body, self._file)
            skip = self._at - body.start  # without ranges, all of it comes
            for chunk in body.chunks:
                data += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(data) >= stop - self._at:
                    break
        if len(data) < stop - self._at:
            raise HubError(f"the connection broke while {self._file.name} was read", passing=True)
        return bytes(data[: stop - self._at])


def _check_total(body: Body, file: HubFile) -> None:
    if body.total is not None and body.total != file.size:
        raise HubError(
            f"{file.name} has {body.total} bytes, and {file.size} were said: it was replaced meanwhile; pull again",
            code="hub_damaged",
        )


def _wait_s(tries: int, trouble: HubError) -> float:
    if trouble.retry_after_s is not None:
        return trouble.retry_after_s
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** max(0, tries - 1))


def _hashed(path: Path, file: HubFile, total: int, tools: Tools) -> str:
    digest, done = hashlib.sha256(), 0
    with _disk(path), path.open("rb") as data:
        while chunk := data.read(HASH_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            tools.tell(Progress("checking", file.name, done, total))
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Have the new names on the disk, too."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """The system's errors about files as sentences."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HubError(
                f"the disk of {folder} is full: make room and pull again, which goes on where it stopped",
                code="disk_full",
            ) from error
        raise HubError(f"{folder} cannot be used: {error.strerror or error}", code="disk") from error


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
