"""The model hub: what a repository holds, and ranges of a file's bytes. The one module that knows its library.

The library says where the hub is (``HF_ENDPOINT``), which token to show it (``HF_TOKEN``, or the one it keeps) and what
a repository holds. Files are read here by plain range requests: the library's own downloads begin anew in another
process, and a model of 40 GB must not. A token goes to the hub only, never along a redirect to another host, and into
no message. Each wait has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import httpx2

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is: what runs here is nobody's business

from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import dwarfstar_engine
from dwarfstar_engine.errors import HubError
from dwarfstar_engine.model.hub_names import HubFile, Reference, checked_sha256
from dwarfstar_engine.node.pull import Body

API_TIMEOUT_S = 20.0  # for a repository's list of files; they may be thousands
CONNECT_TIMEOUT_S = 15.0
# The wait between two pieces of a file is the library's setting, HF_HUB_DOWNLOAD_TIMEOUT.
READ_TIMEOUT = httpx2.Timeout(float(constants.HF_HUB_DOWNLOAD_TIMEOUT), connect=CONNECT_TIMEOUT_S)
MAX_FILES = 20_000  # of a repository; those of models have some hundreds
MAX_SIZE = 1 << 44  # bytes of a file, 16 TiB: more is no model but a mistake
MAX_TAG = 200  # characters of an ETag
MAX_RETRY_AFTER_S = 300.0  # a hub that is busy for longer is told to the user

_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)")


def endpoint() -> str:
    """The hub's address."""
    return str(constants.ENDPOINT)


class Hub:
    """Raises HubError everywhere; ``passing`` is set where trying again may help."""

    def files(self, wanted: Reference) -> tuple[HubFile, ...]:
        """All files of a repository, at the commit that its revision is now; or the one file at an address."""
        if wanted.url:
            return (self._elsewhere(wanted.url),)
        with _told(wanted.repo):
            try:
                return _listed(wanted)
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, or none of its kind
                raise HubError(
                    f"what {endpoint()} says of {wanted.repo} cannot be used: is that a model hub?", code="hub_damaged"
                ) from error

    @contextlib.contextmanager
    def read(self, file: HubFile, start: int, stop: int) -> Iterator[Body]:
        """Bytes start … stop-1 of a file, as they arrive. They may end early: ask for the rest."""
        headers = {
            "User-Agent": f"dwarfstar/{dwarfstar_engine.__version__}",
            "Accept-Encoding": "identity",
            "Range": f"bytes={start}-{stop - 1}",
        }
        if file.url.startswith(endpoint() + "/") and (token := get_token()):
            headers["Authorization"] = f"Bearer {token}"
        with _told(file.name), get_session().stream("GET", file.url, headers=headers, timeout=READ_TIMEOUT) as response:
            _check(response, file.name)
            yield _body(response, file, start)

    def _elsewhere(self, url: str) -> HubFile:
        """A file at an address. Its size is asked for with a byte, as signed addresses often allow GET only."""
        name = httpx2.URL(url).path
        file = HubFile(name, 1, "", url)
        with self.read(file, 0, 1) as body:
            if body.total is None:
                raise HubError(f"the server does not tell the size of {file.name}")
            return HubFile(name, _size(body.total), "", url, body.tag)


def _listed(wanted: Reference) -> tuple[HubFile, ...]:
    info = HfApi().model_info(wanted.repo, revision=wanted.revision or None, files_metadata=True, timeout=API_TIMEOUT_S)
    revision = info.sha or wanted.revision or constants.DEFAULT_REVISION
    return tuple(
        HubFile(
            path=file.rfilename,
            size=_size(file.size),
            sha256=checked_sha256(file.lfs.sha256 if file.lfs else None),
            url=hf_hub_url(wanted.repo, file.rfilename, revision=revision),
            revision=revision,
        )
        for file in (info.siblings or [])[:MAX_FILES]
    )


def _size(size: int | None) -> int:
    if size is None or not 0 <= size <= MAX_SIZE:
        raise HubError("the hub tells no usable size for one of the files", code="hub_damaged")
    return size


def _body(response: httpx2.Response, file: HubFile, start: int) -> Body:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HubError(f"the server sends {file.name} compressed, which was not asked for", code="hub_damaged")
    tag = response.headers.get("ETag", "")[:MAX_TAG]
    if response.status_code != httpx2.codes.PARTIAL_CONTENT:
        length = response.headers.get("Content-Length", "")
        return Body(0, int(length) if length.isascii() and length.isdigit() else None, response.iter_raw(), tag)
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        raise HubError(f"the server sends another part of {file.name} than was asked for", code="hub_damaged")
    return Body(start, None if found[3] == "*" else int(found[3]), response.iter_raw(), tag)


def _check(response: httpx2.Response, what: str) -> None:
    """Raise for an answer that holds no file."""
    status = response.status_code
    if status in (httpx2.codes.OK, httpx2.codes.PARTIAL_CONTENT):
        return
    if status in (401, 403):
        raise _refused(what, gated=response.headers.get("X-Error-Code") == "GatedRepo")
    if status in (404, 410):
        raise HubError(f"{what} is not there (any more): pull again without naming the file", code="hub_not_found")
    if status == httpx2.codes.RANGE_NOT_SATISFIABLE:
        raise HubError(f"{what} is shorter than was said: it was replaced meanwhile; pull again", code="hub_damaged")
    raise _busy(status, response.headers.get("Retry-After"))


def _busy(status: int, retry_after: str | None) -> HubError:
    text = retry_after or ""
    wait = min(float(text), MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else None
    passing = status >= 500 or status in (408, 429)
    later = "; try again later" if passing else ""
    return HubError(
        f"the hub answers with HTTP status {status}{later}", code="hub_busy", retry_after_s=wait, passing=passing
    )


def _refused(what: str, *, gated: bool) -> HubError:
    if gated:
        return HubError(
            f"{what} is gated: accept its terms at {endpoint()} and set HF_TOKEN to a token of that account",
            code="hub_gated",
        )
    return HubError(
        f"the hub does not give {what} to everybody: set HF_TOKEN to a token that may read it", code="hub_refused"
    )


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """The errors of the library and of its HTTP client as sentences. Their own texts may quote headers, so none is."""
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{what} is gated: accept its terms at {endpoint()}/{what} and set HF_TOKEN to a token of that account",
            code="hub_gated",
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{what} has no such revision", code="hub_not_found") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"there is no repository {what} on {endpoint()}, or it is private: then set HF_TOKEN", code="hub_not_found"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set: unset it to reach the hub", code="hub_offline") from error
    except (HfHubHTTPError, httpx2.HTTPStatusError) as error:
        status = error.response.status_code
        if status in (401, 403):
            raise _refused(what, gated=False) from error
        if status == httpx2.codes.NOT_FOUND:
            raise HubError(f"{endpoint()} knows no {what}", code="hub_not_found") from error
        raise _busy(status, error.response.headers.get("Retry-After")) from error
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
        passing = isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol)
        raise HubError(_reason(error, what), code="hub_unreachable", passing=passing) from error


def _reason(error: Exception, what: str) -> str:
    match error:
        case httpx2.ConnectTimeout():
            return f"no connection within {CONNECT_TIMEOUT_S:.0f} s to what has {what}"
        case httpx2.TimeoutException():
            return f"nothing came for too long while {what} was read"
        case httpx2.ConnectError():  # what the system says: no such host, refused, a certificate
            return f"no connection to what has {what}: {error}"
        case httpx2.RemoteProtocolError() | httpx2.ReadError():
            return f"the connection broke while {what} was read"
        case httpx2.TooManyRedirects():
            return f"{what} is redirected without end"
        case _:
            return f"what has {what} gave no answer that can be used ({type(error).__name__})"
