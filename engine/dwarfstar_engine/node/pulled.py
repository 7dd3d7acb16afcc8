"""What was pulled from a hub: which file in the models folder is which model of which repository.

One small JSON file in the folder of downloads. It is a help, no authority: a name counts only while its file is there,
and a damaged record is the same as none.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwarfstar_engine.errors import TrustError
from dwarfstar_engine.model.hub_names import DOWNLOADS, Reference
from dwarfstar_engine.wire.private_files import locked, read_public, replace_file

RECORD, LOCK = "pulled.json", "pulled.lock"
MAX_RECORD_BYTES = 1 << 20
MAX_KEPT = 1000  # models; the oldest is forgotten first
LOCK_WAIT_S = 5.0  # somebody else writes the record, which takes milliseconds


class Pulled(BaseModel):
    """A model that is complete. file: the first, in the models folder. sha256: of each of its files, or empty."""

    model_config = ConfigDict(frozen=True)

    file: str
    repo: str = ""
    path: str = ""
    quantisation: str = ""
    revision: str = ""
    sha256: tuple[str, ...] = ()


class Record(BaseModel):
    model_config = ConfigDict(frozen=True)

    models: tuple[Pulled, ...] = Field(default=(), max_length=MAX_KEPT)


def read_record(folder: Path) -> Record:
    """The record of a models folder."""
    try:
        return Record.model_validate_json(read_public(folder / DOWNLOADS / RECORD, MAX_RECORD_BYTES))
    except (TrustError, ValidationError):
        return Record()


def note_pulled(folder: Path, pulled: Pulled) -> None:
    """Add a model to the record, in the place of what had its file's name. Raises TrustError if it cannot be kept."""
    with locked(folder / DOWNLOADS / LOCK, LOCK_WAIT_S):
        others = (known for known in read_record(folder).models if known.file != pulled.file)
        record = Record(models=(*others, pulled)[-MAX_KEPT:])
        replace_file(folder / DOWNLOADS / RECORD, record.model_dump_json(indent=1).encode())


def find_pulled(folder: Path, wanted: Reference) -> tuple[Path, ...]:
    """The first files of the models there that a name of the hub means."""
    found = []
    for known in read_record(folder).models:
        if known.repo != wanted.repo or Path(known.file).name != known.file:
            continue
        same_type = not wanted.quantisation or known.quantisation == wanted.quantisation.upper()
        same_file = not wanted.file or wanted.file in (known.path, known.file)
        with contextlib.suppress(OSError):
            if same_type and same_file and (folder / known.file).is_file():
                found.append(folder / known.file)
    return tuple(found)
