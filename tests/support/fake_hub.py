"""A model hub on this machine, for tests: its API, its redirects to another host, ranges, and its bad days.

Two servers: the hub, which knows repositories and tokens, and where the files lie, which is another origin. What is
asked of them is kept. Whatever a test sets counts from the next request on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass(frozen=True)
class Asked:
    """A request: of the hub or, if ``content``, of where the files lie."""

    path: str
    range: str | None
    authorization: str | None
    content: bool


@dataclass
class FakeHub:
    """Set its fields as a test needs. files: path in the repository → bytes.

    sizes, hashes: what it says, where that is not the truth. cuts: bytes after which the next answers with a file's
    content break off. status: of the next answers with content; then as ever. token: without it, 401.
    """

    repo: str = "owner/name"
    files: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, str | None] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    api: list[tuple[int, bytes]] = field(default_factory=list)  # the next answers of the API
    ranges: bool = True
    redirects: bool = True
    token: str | None = None
    gated: bool = False
    hold: threading.Event | None = None  # after a cut: wait for it instead of breaking the connection
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    content_url: str = ""

    def content_requests(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.content and asked.path.endswith(path)]

    def info(self) -> dict[str, Any]:
        return {
            "id": self.repo,
            "sha": COMMIT,
            "siblings": [self._sibling(path, data) for path, data in self.files.items()],
        }

    def _sibling(self, path: str, data: bytes) -> dict[str, Any]:
        sha256 = self.hashes.get(path, hashlib.sha256(data).hexdigest())
        size = self.sizes.get(path, len(data))
        lfs = {"lfs": {"size": size, "sha256": sha256, "pointerSize": 130}} if sha256 else {}
        return {"rfilename": path, "size": size, "blobId": "0" * 40, **lfs}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    content = False

    def log_message(self, *args: Any, **more: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        headers = self.headers
        self.hub.asked.append(Asked(path, headers.get("Range"), headers.get("Authorization"), self.content))
        if self.content:
            self._content(path.removeprefix("/blob/"))
        elif path.startswith("/api/"):
            self._api(path)
        else:
            self._resolve(path)

    def _allowed(self) -> bool:
        if self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        code = {"X-Error-Code": "GatedRepo"} if self.hub.gated else {"X-Error-Code": "RepoNotFound"}
        self._answer(401, b"{}", code)
        return False

    def _api(self, path: str) -> None:
        if self.hub.api and path.startswith("/api/models/"):
            return self._answer(*self.hub.api.pop(0))
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        if match is None or match[1] != self.hub.repo:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif match[2] not in (None, "main", COMMIT):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif self._allowed():
            self._answer(200, json.dumps(self.hub.info()).encode(), {"Content-Type": "application/json"})
        return None

    def _resolve(self, path: str) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None or match[1] != self.hub.repo or match[3] not in self.hub.files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif not self._allowed():
            pass
        elif self.hub.redirects:
            self._answer(302, b"", {"Location": f"{self.hub.content_url}/blob/{match[3]}?signature=secret"})
        else:
            self._content(match[3])

    def _content(self, path: str) -> None:
        hub, data = self.hub, self.hub.files.get(path)
        if data is None:
            return self._answer(404, b"")
        if hub.statuses and (status := hub.statuses.pop(0)) != 200:
            return self._answer(status, b"no")
        start, stop, status, headers = 0, len(data), 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and hub.ranges:
            start, stop, status = int(asked[1]), min(int(asked[2]) + 1, len(data)), 206
            if start >= len(data):
                return self._answer(416, b"")
            total = hub.sizes.get(path, len(data))
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{total}"}
        body = data[start:stop]
        cut = hub.cuts.pop(0) if hub.cuts and len(body) > hub.cuts[0] else None
        self._answer(status, body, {"ETag": f'"{len(data)}"', **headers}, cut)
        return None

    def _answer(
        self, status: int, body: bytes, headers: Mapping[str, str] = MappingProxyType({}), cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            if self.hub.hold is not None:
                self.hub.hold.wait(60)
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def fake_hub(**fields: Any) -> Iterator[FakeHub]:
    """A hub that answers until the end of the block."""
    hub = FakeHub(**fields)
    servers = []
    for content in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "content": content})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
    hub.url, hub.content_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        if hub.hold is not None:
            hub.hold.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
