"""Adverts over multicast on loopback: nothing leaves this machine."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from zeroconf.asyncio import AsyncServiceInfo

from dwarfstar_engine.cluster.candidates import SERVICE, Advert, Gone, Heard, Interface, Networks
from dwarfstar_engine.node import mdns
from dwarfstar_engine.node.discovery import cluster_id, find_joining
from dwarfstar_engine.node.facts import interfaces
from dwarfstar_engine.node.mdns import Advertiser, Browser, instance, parse
from dwarfstar_engine.wire import trust
from dwarfstar_engine.wire.enrol import Enrolment, serve_enrolment
from dwarfstar_engine.wire.trust import NodeFiles

DEADLINE_S = 20.0
LOOPBACK = (Interface("lo", "127.0.0.1", 8),)


def here() -> tuple[Interface, ...]:
    return LOOPBACK


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "LOOK_S", 0.05)


def advert(**changes: str | int | tuple[str, ...]) -> Advert:
    """One nobody else has: tests run side by side on one loopback."""
    cluster = secrets.token_hex(12)
    plain = Advert(instance(cluster, "coordinator"), cluster, "head", ("127.0.0.1",), 8478, 8477, 3, 1, "0.1.0")
    return replace(plain, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def running(it: Advertiser | Browser) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(it.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Ear:
    """What was heard of one advert."""

    def __init__(self, name: str) -> None:
        self._name, self._changed = name, asyncio.Event()
        self.heard: list[Advert | None] = []
        self.networks: list[Networks] = []

    def __call__(self, event: Heard | Gone | Networks) -> None:
        match event:
            case Heard(one) if one.instance == self._name:
                self.heard.append(one)
            case Gone(name) if name == self._name:
                self.heard.append(None)
            case Networks():
                self.networks.append(event)
        self._changed.set()

    async def until(self, look: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not look():
                self._changed.clear()
                await self._changed.wait()


async def test_an_advert_is_heard_as_it_was_sent_and_withdrawn_at_the_end() -> None:
    sent = advert(name="Jürgens Pi (süß)")
    ear = Ear(sent.instance)
    async with running(Browser(ear, here)):
        async with running(Advertiser(lambda: sent, here)):
            await ear.until(lambda: sent in ear.heard)
        await ear.until(lambda: ear.heard[-1] is None)
    assert ear.networks == [Networks(LOOPBACK)]


async def test_a_change_is_told() -> None:
    now = [advert()]
    ear = Ear(now[0].instance)
    async with running(Browser(ear, here)), running(Advertiser(lambda: now[0], here)):
        await ear.until(lambda: now[0] in ear.heard)
        now[0] = replace(now[0], term=4, control_port=9000)
        await ear.until(lambda: now[0] in ear.heard)


async def test_interfaces_that_come_are_used() -> None:
    there: list[tuple[Interface, ...]] = [()]
    sent = advert(hosts=())
    ear = Ear(sent.instance)
    async with running(Browser(ear, lambda: there[0])), running(Advertiser(lambda: sent, lambda: there[0])):
        await ear.until(lambda: ear.networks == [Networks(())] * len(ear.networks) and len(ear.networks) >= 2)
        there[0] = LOOPBACK
        await ear.until(lambda: any(one is not None and one.hosts == ("127.0.0.1",) for one in ear.heard))
        there[0] = (*LOOPBACK, Interface("lo", "127.0.0.2", 8))
        await ear.until(
            lambda: any(one is not None and set(one.hosts) == {"127.0.0.1", "127.0.0.2"} for one in ear.heard)
        )


async def test_trouble_with_multicast_is_told_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = asyncio.Semaphore(0)

    def forbidden(**options: object) -> None:
        tries.release()
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(mdns, "AsyncZeroconf", forbidden)
    async with running(Advertiser(advert, here)) as task, asyncio.timeout(DEADLINE_S):
        for _ in range(3):
            await tries.acquire()
        assert not task.done()
    assert [record.message for record in caplog.records if "multicast DNS" in record.message] == [
        "multicast DNS does not work here (Operation not permitted): trying on"
    ]


async def test_a_machine_with_a_token_finds_its_cluster_and_no_other(tmp_path: Path) -> None:
    """The whole way: two clusters are advertised; what ours says of a wrong address does no harm."""
    now = trust.utc_now()
    async with contextlib.AsyncExitStack() as stack:
        tokens, ports = [], []
        for name in ("ours", "theirs"):
            authority = trust.create_authority(now)
            files = NodeFiles(tmp_path / name)
            trust.issue_local(authority, files, "coordinator", now)
            service = Enrolment(authority, lambda secret, node_id, name: None, ":1", trust.utc_now)
            server, port = await serve_enrolment(service, "127.0.0.1", 0, files)
            stack.push_async_callback(server.stop, None)
            tokens.append(trust.new_token(authority))
            ports.append(port)
        for token, port in zip(tokens, ports, strict=True):
            cluster = cluster_id(token.fingerprint)
            sent = advert(
                cluster=cluster, instance=instance(cluster, "c"), enrol_port=port, hosts=("127.0.0.3", "127.0.0.1")
            )
            await stack.enter_async_context(running(Advertiser(lambda sent=sent: sent, here)))  # type: ignore[misc]
        found = await find_joining(tokens[0], (), True, DEADLINE_S, here)
        assert found == f"127.0.0.1:{ports[0]}"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cluster": "x"},
        {"cluster": "x", "enrol": "y", "protocol": "1"},
        {"cluster": "x", "enrol": "99999", "protocol": "1"},
        {"cluster": "x", "enrol": "1", "protocol": ""},
        {"cluster": "x", "enrol": "1", "protocol": "1", "term": "-1"},
        {"cluster": "x", "enrol": "1", "protocol": "9" * 5000},
    ],
)
def test_adverts_that_are_not_sound_are_not_heard(fields: dict[str, str]) -> None:
    good: dict[str, str] = {"cluster": "x", "enrol": "1", "protocol": "1"}

    def info(properties: dict[str, str]) -> AsyncServiceInfo:
        short = {key: value[:200] for key, value in properties.items()}
        return AsyncServiceInfo(SERVICE, f"a.{SERVICE}", port=5, properties=short, parsed_addresses=["10.0.0.1"])

    assert parse(info(good)) is not None
    assert parse(info(fields)) is None


def test_loopback_and_what_is_down_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def card(family: socket.AddressFamily, address: str, mask: str) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=address, netmask=mask)

    v4, v6 = socket.AF_INET, socket.AF_INET6
    cards = {
        "lo": [card(v4, "127.0.0.1", "255.0.0.0"), card(v6, "::1", "ffff::")],
        "docker0": [card(v4, "172.17.0.1", "255.255.0.0")],
        "wlan0": [
            card(v4, "192.168.1.5", "255.255.255.0"),
            card(v6, "fe80::1%wlan0", "ffff:ffff:ffff:ffff::"),
            card(v6, "fd00::5", "ffff:ffff:ffff:ffff::"),
        ],
        "eth9": [card(v4, "10.0.0.1", "255.0.0.0")],
    }
    stats = {name: SimpleNamespace(isup=name != "eth9") for name in cards}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: stats)
    assert interfaces() == (
        Interface("wlan0", "192.168.1.5", 24),
        Interface("wlan0", "fd00::5", 64),
        Interface("docker0", "172.17.0.1", 16, virtual=True),
    )
