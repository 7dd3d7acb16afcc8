"""What a machine can lend: its device, its memory, the effective VRAM derived from them; and where it is reached."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from dwarfstar_engine.cluster.candidates import Interface
from dwarfstar_engine.errors import PeerError, SettingsError
from dwarfstar_engine.node.nvidia import Gpus, Nvidia
from dwarfstar_engine.plan.capacity import overridden, parse_override
from dwarfstar_engine.wire.enrol import split_address

log = logging.getLogger("dwarfstar.facts")

GIB = 1 << 30
RAM_SHARE = 0.8  # of the RAM available at start: the rest keeps the system usable
VRAM_SHARE = 0.92  # of free VRAM: the driver and the desktop take some later
CGROUPS = (  # (folder, limit, in use, its reclaimable part): what a container may take; the kernel's totals hide it
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
MAX_INTERFACES = 32  # addresses of this machine that are told to others and listened on; each is a socket
VIRTUAL = ("docker", "br-", "veth", "virbr", "lxc", "lxd", "cni", "flannel", "podman", "vmnet", "vboxnet")
_DOCUMENTATION = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))  # RFC 5737, 3849: belong to nobody


@dataclass(frozen=True, slots=True)
class Facts:
    """kind: "cpu" or "cuda". usable_bytes: what would be lent. override_bytes: what its owner set instead, or 0, and
    override the words for it. bandwidth_gb_s: 0: not known. cores: that all nodes of this machine share."""

    kind: str
    device: str
    memory_bytes: int
    usable_bytes: int
    override_bytes: int
    override: str = ""
    bandwidth_gb_s: float = 0.0
    cores: int = 0


def _gpu() -> Gpus | None:
    """The NVIDIA GPUs together, if llama.cpp was built for them; else None."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not any(any((Path(folder) / "lib").glob("*ggml-cuda*")) for folder in folders):
        return None
    gpus = Nvidia().read()
    if gpus is None:
        log.warning(
            "llama.cpp is built for NVIDIA GPUs and none can be looked at, so this machine's RAM is lent: check the "
            "driver, and install the extra `nvidia`"
        )
    return gpus


def measure(override: str | None, ram_gb_s: float = 0.0, cores: int = 0) -> Facts:
    """Look at this machine. override: what its owner set. ram_gb_s: measured bandwidth, where its RAM is lent; 0: not
    known. cores: of this machine, where this process may use fewer; 0: those it may. Raises SettingsError."""
    gpu = _gpu()
    if gpu is not None:
        kind, device, gb_s = "cuda", gpu.name, gpu.bandwidth_gb_s or 0.0
        total, usable = gpu.total_bytes, int(gpu.free_bytes * VRAM_SHARE)
    else:
        kind, device, gb_s = "cpu", platform.processor() or platform.machine(), ram_gb_s
        total, available = memory()
        usable = int(available * RAM_SHARE)
    lent = lent_bytes(override or "", total, usable)
    return Facts(kind, device, total, usable, lent, override or "", gb_s, cores or default_threads(1))


def lent_bytes(override: str, total_bytes: int, usable_bytes: int) -> int:
    """What an owner's words (18, 50% or -2) come to on a machine; empty: 0. Raises SettingsError: they are none, or
    leave nothing."""
    if not override:
        return 0
    said = parse_override(override)
    lent = overridden(said, usable_bytes, max(total_bytes, usable_bytes))
    if lent <= 0:
        raise SettingsError(
            f"{override} leaves nothing to lend of {usable_bytes / GIB:.2f} GiB: give another effective VRAM"
        )
    return lent


def memory() -> tuple[int, int]:
    """(total, available) bytes of RAM to this process: the machine's, or its container's where that is less."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for folder, limit_file, use_file, cache_key in CGROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such cgroup, or "max": no limit
            limit, use = (int(Path(folder, file).read_text("ascii")) for file in (limit_file, use_file))
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text("ascii").splitlines())
            if limit < total:
                total, available = limit, min(available, max(0, limit - use + int(statistics[cache_key])))
    return total, available


def cores() -> list[int]:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def default_threads(sharing: int) -> int:
    """Threads of a stage when ``sharing`` nodes run on this machine: physical cores, shared out."""
    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(physical, len(cores())) // max(1, sharing))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_any(host: str) -> bool:
    """Whether ``host`` means every address of this machine; to others it says nothing."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return host == ""


def interfaces() -> tuple[Interface, ...]:
    """The addresses other machines may reach this one at: of interfaces that are up, but loopback and link-local v6."""
    up = {name for name, card in psutil.net_if_stats().items() if card.isup}
    found = []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        for one in addresses:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or name not in up:
                continue
            address = ipaddress.ip_address(one.address.split("%", 1)[0])
            if address.is_loopback or address.is_unspecified or (address.version == 6 and address.is_link_local):
                continue
            mask = int(ipaddress.ip_address(one.netmask)) if one.netmask else -1
            bits = mask.bit_count() if one.netmask else address.max_prefixlen
            found.append(Interface(name, str(address), bits, name.startswith(VIRTUAL)))
    found.sort(key=lambda one: one.virtual)
    return tuple(found[:MAX_INTERFACES])


def outward_host() -> str | None:
    """The address this machine shows the network its default route leads to, or None. Nothing is sent."""
    for destination, family in _DOCUMENTATION:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((destination, 9))  # of a datagram socket: looks up the route, no more
            host = str(probe.getsockname()[0])
            if not is_loopback(host) and not is_any(host):
                return host
    # No default route: a network of its own, such as a cable between two machines.
    return next((one.host for one in sorted(interfaces(), key=lambda one: (one.virtual, ":" in one.host))), None)


def reached_host(listened_on: str) -> str:
    """The address others reach ``listened_on`` at: itself, or if it means all addresses, the outward one."""
    return (outward_host() or "127.0.0.1") if is_any(listened_on) else listened_on


async def local_host(address: str, deadline_s: float) -> str:
    """The address this machine has towards "host:port", found by connecting to it. Raises PeerError."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(deadline_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        # asyncio puts its own words in the place of the system's, but not of the resolver's
        of_resolver = isinstance(error, socket.gaierror)
        why = error.strerror if of_resolver else os.strerror(error.errno) if error.errno else "no answer"
        raise PeerError(f"the coordinator at {address} is not reached ({why})") from None
    found = str(writer.get_extra_info("sockname")[0])
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return found


def shown_host(host: str) -> str:
    """``host`` as it stands before a port: v6 addresses in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
