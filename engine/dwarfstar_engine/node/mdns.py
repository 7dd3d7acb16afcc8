"""Adverts of coordinators on the local network: multicast DNS, the only user of zeroconf.

Both sides follow the machine's interfaces: when one comes or goes (Wi-Fi, a cable), they begin anew on those that are
there. Loopback is left out, so that nothing is advertised which nobody else can reach; ``look`` is an argument, and
tests give loopback only. Trouble with multicast (forbidden, no route) is told once and tried again: it must stop
neither a coordinator nor a search, which has other ways.

The instance's name is unique without asking the network: it has the cluster's and the coordinator's ids, so a
coordinator that was killed and comes back replaces what others remember of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from dwarfstar_engine.cluster.candidates import MAX_HOSTS, SERVICE, Advert, Gone, Heard, Interface, Networks
from dwarfstar_engine.node.facts import interfaces

log = logging.getLogger("dwarfstar.discovery")
# It warns, with a traceback, of addresses that are gone: here that is the ordinary case, and the next look mends it.
logging.getLogger("zeroconf").setLevel(logging.ERROR)

LOOK_S = 2.0  # between looks at the interfaces: Wi-Fi needs seconds to come up anyway
RESOLVE_MS = 3000  # for the records of an advert that was heard of
RESOLVING = 16  # adverts looked up at one time; more are strangers making noise
MAX_TEXT = 64  # characters of a field

Look: TypeAlias = Callable[[], tuple[Interface, ...]]


class _OnNetwork:
    """Runs on whatever interfaces there are, anew when they change."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._trouble = ""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            here = await asyncio.to_thread(self._look)
            self._networks(here)
            if not here:
                await asyncio.sleep(LOOK_S)
                continue
            try:
                await self._on(here)
            except (OSError, RuntimeError, ZeroconfError, TimeoutError) as error:
                said = str(error) or type(error).__name__
                if said != self._trouble:
                    log.warning("multicast DNS does not work here (%s): trying on", said)
                    self._trouble = said
                await asyncio.sleep(LOOK_S)

    async def _on(self, here: tuple[Interface, ...]) -> None:
        hosts = [one.host for one in here]
        listened = [host for host in hosts if ":" not in host] or hosts  # each network once
        zeroconf = AsyncZeroconf(interfaces=listened)
        try:
            await self._begin(zeroconf, here)
            # The system has no event for it that all platforms share.
            while not self._stale() and await asyncio.to_thread(self._look) == here:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
        finally:
            await self._end()
            await zeroconf.async_close()

    def _networks(self, here: tuple[Interface, ...]) -> None:
        pass

    def _stale(self) -> bool:
        return False

    async def _begin(self, zeroconf: AsyncZeroconf, here: tuple[Interface, ...]) -> None:
        raise NotImplementedError

    async def _end(self) -> None:
        pass


class Advertiser(_OnNetwork):
    """Tells the network of a coordinator. advert: what is told now; without hosts, all addresses of this machine.

    seen: told of this machine's addresses, at first and when they change.
    """

    def __init__(
        self,
        advert: Callable[[], Advert],
        look: Look = interfaces,
        seen: Callable[[tuple[Interface, ...]], None] = lambda here: None,
    ) -> None:
        super().__init__(look)
        self._advert, self._told, self._seen = advert, advert(), seen

    def _networks(self, here: tuple[Interface, ...]) -> None:
        self._seen(here)

    async def _begin(self, zeroconf: AsyncZeroconf, here: tuple[Interface, ...]) -> None:
        self._told = advert = self._advert()
        hosts = advert.hosts or tuple(one.host for one in here)
        sent = await zeroconf.async_register_service(_record(advert, hosts[:MAX_HOSTS]), cooperating_responders=True)
        await sent
        log.info("advertised as %s at %s", advert.instance, ", ".join(hosts))

    def _stale(self) -> bool:
        return self._advert() != self._told


class Browser(_OnNetwork):
    """Hears adverts. hear: called in the event loop."""

    def __init__(self, hear: Callable[[Heard | Gone | Networks], None], look: Look = interfaces) -> None:
        super().__init__(look)
        self._hear = hear
        self._browser: AsyncServiceBrowser | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def _networks(self, here: tuple[Interface, ...]) -> None:
        self._hear(Networks(here))

    async def _begin(self, zeroconf: AsyncZeroconf, here: tuple[Interface, ...]) -> None:
        self._browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[self._changed])

    async def _end(self) -> None:
        if self._browser is not None:
            await self._browser.async_cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            self._hear(Gone(name))
            return
        info = AsyncServiceInfo(service_type, name)
        if info.load_from_cache(zeroconf):
            self._resolved(info)
        elif len(self._tasks) < RESOLVING:
            task = asyncio.create_task(self._resolve(zeroconf, info))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _resolve(self, zeroconf: Zeroconf, info: AsyncServiceInfo) -> None:
        with contextlib.suppress(ZeroconfError, OSError):  # it was closed meanwhile
            if await info.async_request(zeroconf, RESOLVE_MS):
                self._resolved(info)

    def _resolved(self, info: AsyncServiceInfo) -> None:
        if (advert := parse(info)) is not None:
            self._hear(Heard(advert))


def instance(cluster: str, node_id: str) -> str:
    """The name of a coordinator's advert."""
    mark = hashlib.sha256(node_id.encode()).hexdigest()[:8]
    return f"dwarfstar-{cluster[:24]}-{mark}.{SERVICE}"


def _record(advert: Advert, hosts: tuple[str, ...]) -> AsyncServiceInfo:
    label = advert.instance.removesuffix("." + SERVICE)
    return AsyncServiceInfo(
        SERVICE,
        advert.instance,
        port=advert.control_port,
        properties={
            "cluster": advert.cluster,
            "name": advert.name,
            "enrol": str(advert.enrol_port),
            "term": str(advert.term),
            "protocol": str(advert.protocol),
            "version": advert.version,
        },
        server=f"{label}.local.",
        parsed_addresses=list(hosts),
    )


def parse(info: AsyncServiceInfo) -> Advert | None:
    """An advert that was heard; None if it is not a sound one: anybody may have sent it."""
    hosts = tuple(info.parsed_addresses(IPVersion.All)[:MAX_HOSTS])
    try:
        fields: dict[str, Any] = {key: value or "" for key, value in info.decoded_properties.items()}
        advert = Advert(
            instance=info.name,
            cluster=str(fields["cluster"])[:MAX_TEXT],
            name=str(fields.get("name", ""))[:MAX_TEXT],
            hosts=hosts,
            enrol_port=int(fields["enrol"]),
            control_port=info.port or 0,
            term=int(fields.get("term", 0)),
            protocol=int(fields["protocol"]),
            version=str(fields.get("version", ""))[:MAX_TEXT],
        )
    except (KeyError, ValueError):
        return None
    ports = (advert.enrol_port, advert.control_port)
    sound = all(0 < port < 65536 for port in ports) and 0 <= advert.term < 1 << 64 and 0 <= advert.protocol < 1 << 32
    return advert if sound and hosts else None
