"""The gate before the API: who passes on loopback and elsewhere, what is logged, and that a changed file is noticed."""

from __future__ import annotations

import asyncio
import logging
import os
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.api import keys as keys_module
from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.api.errors import KeyRefused
from dwarfstar_engine.api.keybook import KeyBook, KeyStore, key_hash
from dwarfstar_engine.api.keys import NO_KEY, UNKNOWN_KEY, Gate, LiveKeys, credentials, is_foreign
from dwarfstar_engine.errors import TrustError
from support.api_keys import NOW, book, gate
from support.fake_engine import FakeEngine, http_client

DAY = timedelta(days=1)
SECRET = "ds-this-is-a-secret"


def passes(held: Gate, *headers: str) -> bool:
    try:
        held.check(headers)
    except KeyRefused as refused:
        assert (refused.http_status, refused.code) == (401, "invalid_api_key")
        assert refused.message in (NO_KEY, UNKNOWN_KEY)  # and so nothing of what was given
        return False
    return True


class Clock:
    """A monotonic clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- who passes ---


@pytest.mark.parametrize(
    ("headers", "required", "open_with_keys"),
    [
        ((), False, True),
        (("",), False, True),
        (("Bearer ",), False, True),
        (("Basic right",), False, True),
        (("right",), False, True),
        (("Bearer wrong",), False, False),
        (("Bearer right wrong",), False, False),
        (("Bearer wrong", "Bearer right"), False, False),
        (("Bearer right", "Bearer right"), False, False),
        (("Bearer right" + " " * keys_module.MAX_AUTHORIZATION,), False, False),
        (("Bearer right",), True, True),
        (("bearer   right ",), True, True),
    ],
)
def test_who_passes(headers: tuple[str, ...], required: bool, open_with_keys: bool) -> None:
    assert passes(gate("right"), *headers) == required
    assert passes(gate("right", required=False), *headers) == open_with_keys
    assert passes(gate(required=False), *headers)  # loopback, and no key was ever made
    assert not passes(gate(), *headers)  # elsewhere, and all keys are withdrawn


@pytest.mark.parametrize(
    ("origin", "foreign"),
    [
        (None, False),
        ("http://127.0.0.1:8080", False),
        ("http://localhost:3000", False),
        ("https://[::1]:3000", False),
        ("https://chat.example", True),
        ("http://127.0.0.1.evil.example", True),
        ("http://localhost@evil.example", True),
        ("null", True),
        ("", True),
        ("http://[", True),
    ],
)
def test_pages_of_this_machine_may_ask_and_others_not(origin: str | None, foreign: bool) -> None:
    assert is_foreign(origin, "127.0.0.1:8080") == foreign
    assert not is_foreign("https://chat.example", "chat.example")  # a proxy on this machine, with pages of its own


async def test_a_page_from_elsewhere_is_refused_on_loopback() -> None:
    """A browser would send it without asking: no key stands in the way there."""
    for required, status in ((False, 403), (True, 401)):
        async with http_client(FakeEngine(), gate=gate("right", required=required)) as client:
            answer = await client.get("/v1/models", headers={"Origin": "https://evil.example"})
            assert answer.status_code == status
            if not required:
                assert answer.json()["error"]["code"] == "foreign_origin"


def test_an_ended_key_passes_nowhere_and_is_told_so() -> None:
    for required in (True, False):
        ended = gate("right", required=required, now=NOW + DAY, lasts=DAY)
        with pytest.raises(KeyRefused, match="ended at 2026-11-22 12:00 UTC"):
            ended.check(["Bearer right"])


@given(st.lists(st.text(st.characters(max_codepoint=255), max_size=1200), max_size=3))
def test_any_header_passes_rightly_or_is_refused(headers: list[str]) -> None:
    right = len(headers) == 1 and headers[0].lower().startswith("bearer ") and headers[0][7:].strip() == "right"
    assert passes(gate("right"), *headers) == right


@given(st.text(st.characters(max_codepoint=255), max_size=1100))
def test_any_key_that_is_not_ours_is_refused(key: str) -> None:
    if key.strip() != "right":
        assert not passes(gate("right"), f"Bearer {key}")


def test_long_headers_are_not_looked_at() -> None:
    with pytest.raises(KeyRefused):
        credentials(["Bearer " + "a" * keys_module.MAX_AUTHORIZATION])
    assert credentials(["Bearer " + "a" * (keys_module.MAX_AUTHORIZATION - 7)]) is not None


# --- over HTTP ---


async def test_every_endpoint_but_health_needs_a_key() -> None:
    app = create_app(FakeEngine())
    routes = [(method, route.path) for route in _leaves(app.routes) for method in route.methods or ()]
    assert len(routes) >= 7 and ("GET", "/health") in routes
    async with http_client(FakeEngine([b"x"]), gate=gate(SECRET)) as client:
        for method, path in routes:
            url = path.replace("{name:path}", "fake/model")
            answer = await client.request(method, url)
            assert (answer.status_code == 401) == (path != "/health"), path
            right = await client.request(method, url, headers={"authorization": f"Bearer {SECRET}"})
            assert right.status_code in (200, 400), path


def _leaves(routes: Any) -> list[APIRoute]:
    found = []
    for route in routes:
        if isinstance(route, APIRoute):
            found.append(route)
        else:
            found += _leaves(getattr(getattr(route, "original_router", None) or route, "routes", ()))
    return found


async def test_a_refusal_has_openais_shape() -> None:
    async with http_client(FakeEngine(), gate=gate(SECRET)) as client:
        answer = await client.get("/v1/models", headers={"authorization": "Bearer ds-wrong"})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert error.pop("message").startswith("the API key is not one this server knows")
    assert error == {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}


@pytest.mark.parametrize("well", [True, False])
async def test_health_tells_strangers_nothing_else(well: bool) -> None:
    class Talkative(FakeEngine):
        def health(self) -> dict[str, Any]:
            return {"status": "ok" if well else "unavailable", "reason": "node garage is lost"}

    async with http_client(Talkative(), health_details=False) as client:
        answer = await client.get("/health")
    assert (answer.status_code, answer.json()) == (
        (200, {"status": "ok"}) if well else (503, {"status": "unavailable"})
    )
    async with http_client(Talkative()) as client:
        assert "garage" in (await client.get("/health")).text


async def test_no_key_is_logged_and_a_source_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeEngine):
        async def text_tokens(self, text: str) -> list[int]:
            raise ValueError("broken")

    caplog.set_level(logging.DEBUG)
    async with http_client(Broken(), gate=gate(SECRET)) as client:
        for _ in range(5):
            await client.get("/v1/models", headers={"authorization": "Bearer ds-mistyped"})
        for body in (b'{"prompt": "a"}', b"{", b"[]"):
            answer = await client.post("/v1/completions", content=body, headers={"authorization": f"Bearer {SECRET}"})
            assert SECRET not in answer.text
    assert [record.levelname for record in caplog.records if record.name == "dwarfstar.keys"] == ["WARNING"]
    assert "127.0.0.1" in caplog.text
    assert SECRET not in caplog.text and "mistyped" not in caplog.text


async def test_the_day_of_use_is_noted_once_and_trouble_with_it_is_none(caplog: pytest.LogCaptureFixture) -> None:
    noted: list[tuple[str, date]] = []

    def note(hashed: str, day: date) -> None:
        noted.append((hashed, day))
        raise TrustError("the disk is full")

    held, today = book("right"), NOW
    watched = Gate(lambda: held, required=True, clock=lambda: today, note=note)
    for _ in range(3):
        watched.check(["Bearer right"])
    today = NOW + DAY
    watched.check(["Bearer right"])
    while watched._noting:
        await asyncio.wait(watched._noting, timeout=10)
    assert noted == [(key_hash("right"), NOW.date()), (key_hash("right"), (NOW + DAY).date())]


# --- a changed file ---


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys", lambda: NOW)


def test_a_change_is_seen_within_a_second_and_not_looked_for_before(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = Clock(), list[Path]()
    live = LiveKeys(store, clock)
    honest = os.stat

    def counting(path: Any, *more: Any, **other: Any) -> os.stat_result:
        if path == store.path:
            looks.append(path)
        return honest(path, *more, **other)

    store.issue("laptop")
    monkeypatch.setattr(os, "stat", counting)
    clock.now += keys_module.LOOK_S * 0.9
    assert all(live() == KeyBook() for _ in range(100)) and looks == []
    clock.now += keys_module.LOOK_S * 0.2
    assert [key.name for key in live().keys] == ["laptop"]
    looks.clear()
    clock.now += keys_module.LOOK_S
    for _ in range(100):
        live()
    assert len(looks) == 1  # it has not changed, so it is not read


def test_a_key_made_withdrawn_and_the_file_removed(store: KeyStore) -> None:
    clock = Clock()
    held = Gate(LiveKeys(store, clock), required=True, clock=lambda: NOW, monotonic=clock)
    key = store.issue("laptop")
    other = store.issue("phone")
    clock.now += keys_module.LOOK_S
    assert passes(held, f"Bearer {key}") and passes(held, f"Bearer {other}")
    store.revoke("laptop")
    clock.now += keys_module.LOOK_S
    assert not passes(held, f"Bearer {key}") and passes(held, f"Bearer {other}")
    store.path.unlink()
    clock.now += keys_module.LOOK_S
    assert not passes(held, f"Bearer {other}")


def test_while_the_file_is_damaged_the_keys_known_before_count(
    store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock, key = Clock(), store.issue("laptop")
    held = Gate(LiveKeys(store, clock), required=True, clock=lambda: NOW, monotonic=clock)
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-20])
    for _ in range(5):
        clock.now += keys_module.LOOK_S
        assert passes(held, f"Bearer {key}") and not passes(held, "Bearer other")
    assert caplog.text.count("Until then") == 1
    store.path.write_bytes(b'{"keys": []}')
    clock.now += keys_module.LOOK_S
    assert not passes(held, f"Bearer {key}")


def test_a_file_that_is_damaged_at_the_start_is_said(store: KeyStore) -> None:
    store.issue("laptop")
    store.path.write_bytes(b"")
    with pytest.raises(TrustError, match="damaged"):
        LiveKeys(store)
