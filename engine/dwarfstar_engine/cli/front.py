"""HTTP of a node that can lead: it answers when it leads, and has the leader answer otherwise.

Whether it leads is asked for each request, at the moment it comes. An API key is checked where the request comes in;
between nodes it does not travel (``node.tunnel``). Nobody leads: 503 with Retry-After, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.api.errors import error_response
from dwarfstar_engine.api.keybook import ApiKey, KeyBook
from dwarfstar_engine.api.keys import Gate
from dwarfstar_engine.cluster.state import ClusterState
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.node.chair import Chair
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.tunnel import App, Receive, Scope, Send, Tunnel, gone
from dwarfstar_engine.settings import Settings

OPEN = "/health"  # needs no key


def forwarded_app(settings: Settings) -> Callable[[Coordinator], App]:
    """The API for what other nodes forward: their gates have let it in."""

    def make(coordinator: Coordinator) -> App:
        app: Any = create_app(
            coordinator,
            health_details=False,
            max_body_bytes=settings.max_body_mib << 20,
            request_timeout_s=settings.request_timeout_s,
        )
        return app  # type: ignore[no-any-return]

    return make


class Front:
    """An ASGI application. public: /health says no more than whether it is well."""

    def __init__(self, chair: Chair, tunnel: Tunnel, gate: Gate, settings: Settings, *, public: bool) -> None:
        self._chair, self._tunnel, self._gate, self._settings, self._public = chair, tunnel, gate, settings, public
        self._app: tuple[Coordinator, Any] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        coordinator = self._chair.coordinator
        if coordinator is None:
            await self._elsewhere(scope, receive, send)
            return
        if self._app is None or self._app[0] is not coordinator:
            self._app = coordinator, self._make(coordinator)
        await self._app[1](scope, receive, send)

    def _make(self, coordinator: Coordinator) -> Any:
        settings = self._settings
        return create_app(
            coordinator,
            gate=self._gate,
            health_details=not self._public,
            max_body_bytes=settings.max_body_mib << 20,
            request_timeout_s=settings.request_timeout_s,
        )

    async def _elsewhere(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] != OPEN:
                self._gate.admit(Request(scope))
            address = self._chair.lead.leader_address()
            if not address:
                raise gone()
            await self._tunnel.forward(address, scope, receive, send)
        except DwarfStarError as error:
            await error_response(error)(scope, receive, send)


# --- API keys in the cluster's state: the hash names a key, and the record holds no more than the key file does ---


def keys_of(book: KeyBook) -> dict[str, str]:
    """A book as the state keeps it."""
    return {key.hash: key.model_dump_json(exclude={"used"}) for key in book.keys}


class StateKeys:
    """The book of the state that ``state`` gives now. Records that cannot be read let nobody in."""

    def __init__(self, state: Callable[[], ClusterState]) -> None:
        self._state = state
        self._read: tuple[object, KeyBook] = (None, KeyBook())

    def __call__(self) -> KeyBook:
        keys = self._state().keys
        if self._read[0] is not keys:
            try:
                book = KeyBook(keys=tuple(ApiKey.model_validate_json(record) for record in keys.values()))
            except ValueError:
                book = KeyBook()
            self._read = keys, book
        return self._read[1]
