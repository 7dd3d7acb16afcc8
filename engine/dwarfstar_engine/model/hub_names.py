"""What a person may call a model of a hub, and which of a repository's files that means. Pure.

``owner/name``, ``owner/name:Q4_K_M``, ``owner/name/file.gguf`` and the address of a file are :class:`Reference`; a
repository's files are :class:`Offer`, the parts of a split model together; :func:`choose` finds the one meant, or says
why that is not clear. Nothing a hub says is believed: a file's name becomes a name in the models folder only if it is
one (:func:`safe_name`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from dwarfstar_engine.errors import ModelError
from dwarfstar_engine.model.gguf import MAX_SHARDS, SHARD_NAME

HUB = "https://huggingface.co"  # addresses of files there are known whatever mirror is used
DOWNLOADS = ".pull"  # in the models folder: what is not complete yet, and the record of what was pulled
SUFFIX = ".gguf"
MAX_NAME = 200  # characters of a file's name; file systems take 255 bytes, and a suffix is added
MAX_TEXT = 2000  # characters of what a person gives; signed addresses are long
MAX_DEPTH = 32  # folders in an address
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COMPANIONS = ("mmproj", "imatrix")  # files beside a model that are none

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,95}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPE = r"I?Q\d(?:_(?:\d|K|XXS|XS|NL|S|M|L|XL|XXL))*|B?F16|FP16|F32|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4"
_LABEL = re.compile(rf"(?:^|[-._/])((?:UD-)?(?:{_TYPE}))(?=[-._/]|$)", re.IGNORECASE)
_UNSLOTH = "UD-"  # the same type, mixed by another recipe


@dataclass(frozen=True, slots=True)
class Reference:
    """What was asked for. url: of a file that lies on no hub, then the rest is empty."""

    repo: str = ""
    revision: str = ""
    file: str = ""
    quantisation: str = ""
    url: str = ""

    def __str__(self) -> str:
        if self.url:  # what is asked of a server may be a secret: signed addresses are
            return without_query(self.url) + ("?…" if "?" in self.url else "")
        if self.file:
            return f"{self.repo}/{self.file}"
        return f"{self.repo}:{self.quantisation}" if self.quantisation else self.repo


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file to be had. path: in its repository. sha256: in hex, or empty where nobody tells it.

    revision: the commit on a hub; elsewhere what the server calls the content (its ETag), or empty.
    """

    path: str
    size: int
    sha256: str
    url: str
    revision: str = ""

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True, slots=True)
class Offer:
    """A model to be had: its files, in the order of its parts."""

    files: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def quantisation(self) -> str:
        return label(self.files[0].path)


@dataclass(frozen=True, slots=True)
class Unclear:
    """A reference that does not name one model. offers: what it may mean."""

    reason: str
    offers: tuple[Offer, ...]


def reference(text: str, wanted: str | None = None, hub: str = HUB) -> Reference:
    """Read what a person gave. wanted: a file or a quantisation, given apart. hub: its address. Raises ModelError."""
    if len(text) > MAX_TEXT or not text.isprintable():
        raise ModelError("the name of the model is too long, or not text", code="bad_reference")
    found = _address(text, hub) if "://" in text else _short(text)
    if wanted is None:
        return found
    if found.url or found.file or found.quantisation:
        raise ModelError(f"{found} already names what to get: leave {wanted!r} out", code="bad_reference")
    if wanted.lower().endswith(SUFFIX):
        return Reference(found.repo, found.revision, file=wanted)
    return Reference(found.repo, found.revision, quantisation=wanted)


def without_query(url: str) -> str:
    """An address without what is asked there."""
    return url.partition("?")[0]


def is_reference(text: str) -> bool:
    """Whether a name can be that of a model on a hub, by its form."""
    try:
        return bool(_short(text))
    except ModelError:
        return False


def label(path: str) -> str:
    """The quantisation that a file's name, or its folder's, tells; empty if none does."""
    found = _LABEL.findall(path.removesuffix(SUFFIX))
    return str(found[-1]).upper() if found else ""


def safe_name(name: str) -> bool:
    """Whether a name from outside may become the name of a file in the models folder."""
    return (
        name.endswith(SUFFIX)
        and len(SUFFIX) < len(name) <= MAX_NAME
        and name.isprintable()
        and name.isascii()
        and not name.startswith((".", "-"))
        and not set(name) & set('/\\:*?"<>|')
    )


def checked_sha256(text: str | None) -> str:
    """A hash as a hub tells it, or nothing."""
    return text if text and _SHA256.fullmatch(text) else ""


def offers(files: Iterable[HubFile]) -> tuple[Offer, ...]:
    """The models among a repository's files. Split models of which a part is missing are left out."""
    found: list[Offer] = []
    parts: dict[tuple[str, str], dict[int, HubFile]] = {}
    for file in files:
        if not safe_name(file.name) or file.name.lower().startswith(COMPANIONS):
            continue
        if match := SHARD_NAME.match(file.path):
            parts.setdefault((match["stem"], match["count"]), {})[int(match["no"])] = file
        else:
            found.append(Offer((file,)))
    for (_, count), group in parts.items():
        if 1 <= int(count) <= MAX_SHARDS and sorted(group) == list(range(1, int(count) + 1)):
            found.append(Offer(tuple(group[no] for no in sorted(group))))
    return tuple(sorted(found, key=lambda offer: (offer.size, offer.files[0].path)))


def choose(wanted: Reference, there: Sequence[Offer]) -> Offer | Unclear:
    """The model that is meant."""
    if not there:
        return Unclear(f"{wanted.repo} holds no complete GGUF model", ())
    if wanted.file:
        named = [o for o in there if any(wanted.file in (file.path, file.name) for file in o.files)]
        what = f"there is no {wanted.file} in {wanted.repo}"
    elif wanted.quantisation:
        asked = wanted.quantisation.upper()
        named = [o for o in there if o.quantisation == asked]
        named = named or [o for o in there if o.quantisation.removeprefix(_UNSLOTH) == asked]
        what = f"there is no {asked} in {wanted.repo}"
    else:
        named, what = list(there), ""
    if len(named) == 1:
        return named[0]
    if not named:
        return Unclear(f"{what}: choose one of these {len(there)}", tuple(there))
    return Unclear(f"{wanted} may be any of {len(named)} models: choose one", tuple(named))


def _short(text: str) -> Reference:
    """``owner/name``, with ``:QUANTISATION`` or ``/FILE``."""
    head, _, quantisation = text.partition(":")
    owner, _, rest = head.partition("/")
    name, _, file = rest.partition("/")
    repo = f"{owner}/{name}"
    strange = ".." in repo or not _REPO.fullmatch(repo)
    if strange or (file and (quantisation or not file.endswith(SUFFIX))) or (":" in text and not quantisation):
        raise ModelError(
            f"{text!r} names no model of a hub: give owner/name, owner/name:Q4_K_M, owner/name/file.gguf, or the "
            "https address of a GGUF file",
            code="bad_reference",
        )
    return Reference(repo, file=file, quantisation=quantisation)


def _address(text: str, hub: str) -> Reference:
    """An address: of a file on the hub, or elsewhere. Raises ModelError."""
    for known in (hub, HUB):
        if text.startswith(known + "/"):
            return _on_hub(text, urlsplit(text).path.removeprefix(urlsplit(known).path))
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
    except ValueError:
        host = ""
        parts = urlsplit("")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in LOOPBACK):
        raise ModelError("the address of a model file must begin with https://", code="bad_reference")
    if not host or parts.username or parts.password:
        raise ModelError("the address needs a host, and may hold no user or password", code="bad_reference")
    if not safe_name(PurePosixPath(unquote(parts.path)).name):
        raise ModelError("the address names no GGUF file: it must end in NAME.gguf", code="bad_reference")
    return Reference(url=text)


def _on_hub(text: str, path: str) -> Reference:
    """``/owner/name``, or ``/owner/name/resolve/REVISION/FILE`` and its like, as a browser shows it."""
    owner, name, *rest = [*(unquote(part) for part in path.strip("/").split("/")), ""][:MAX_DEPTH]
    repo, rest = f"{owner}/{name}", [part for part in rest if part]
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise ModelError(f"{text!r} is no address of a model on the hub", code="bad_reference")
    if not rest or (rest[0] == "tree" and len(rest) == 2):
        return Reference(repo, rest[1] if rest else "")
    if len(rest) < 3 or rest[0] not in ("resolve", "blob", "raw") or not rest[-1].endswith(SUFFIX):
        raise ModelError(f"{text!r} is no address of a GGUF file on the hub", code="bad_reference")
    return Reference(repo, rest[1], file="/".join(rest[2:]))
