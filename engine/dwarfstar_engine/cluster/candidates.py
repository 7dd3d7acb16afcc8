"""The search for a coordinator: which addresses are tried, when, in which order, and what is said meanwhile.

Theory. Addresses come from what a user typed, from what this machine remembers, from peers that members told of, and
from adverts on the network. Nothing of that is proof: an address counts only once the right certificate answered on it,
which the driver finds out (``node/discovery.py``). So a wrong address costs an attempt and nothing more; 172.17.0.1,
which every machine with Docker has, reaches oneself or nobody. Attempts begin ``STAGGER_S`` apart, without waiting for
each other ("happy eyeballs", RFC 8305), and are repeated with growing pauses, for the machine may come up later.

What an advert says orders and explains; it never decides, since anybody on the network may send one.

Invariants. ``handle(event, now) -> effects`` and nothing else; ``now`` is monotonic, in seconds. At most PARALLEL
attempts are under way, never two at one address. Every address is tried again and again: those that failed less often
go first, so none starves. Adverts displace other adverts only, never what was typed or is remembered.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

SERVICE = "_dwarfstar._tcp.local."
STAGGER_S = 0.15  # between attempts: RFC 8305 has 0.1 to 2 s; a machine in the next room answers in 0.01
PARALLEL = 4  # attempts at one time: each is a TLS handshake, and dead addresses hold theirs for ATTEMPT_S
ATTEMPT_S = 4.0  # deadline of one attempt, for the driver: a busy small board takes a second for a handshake
RETRY_S = (0.5, 1.0, 2.0, 3.0)  # pauses before an address is tried again, by its failures; the last one repeats
MAX_ADDRESSES = 64  # a coordinator with eight networks, and eight remembered ones
MAX_ADVERTS = 64  # coordinators heard at one time; home networks have one or two
MAX_HOSTS = 16  # of one advert
PATIENCE_S = 5.0  # without success before the trouble is told: a start within it is the ordinary case
CHANGED_S = 30.0  # another trouble is told this long after the last at the earliest
RETELL_S = 600.0  # the same trouble is told this often
CONTROL_PORT = 8477  # the default; machines join at the next one
SHOWN = 3  # addresses, interfaces or clusters named in a sentence
SHOWN_ID = 12  # characters of a cluster's id in a sentence


class Source(IntEnum):
    """Where an address is from, the most trusted first."""

    TYPED = 0
    LAST = 1
    ADVERT = 2
    GOSSIP = 3


class Failure(IntEnum):
    """Why an address does not count."""

    UNREACHED = 0  # nobody answers: no route, refused, or silence
    FOREIGN = 1  # somebody answers who has no certificate of our cluster


@dataclass(frozen=True, slots=True)
class Interface:
    """One address of this machine. virtual: of a bridge of containers or virtual machines, the same on many hosts."""

    name: str
    host: str
    prefix: int
    virtual: bool = False

    @property
    def shown(self) -> str:
        return f"{self.name} ({self.host}/{self.prefix})"


@dataclass(frozen=True, slots=True)
class Advert:
    """What a coordinator says of itself. cluster: beginning of its CA's fingerprint, base32, as in a join token."""

    instance: str
    cluster: str
    name: str
    hosts: tuple[str, ...]
    enrol_port: int
    control_port: int
    term: int
    protocol: int
    version: str


@dataclass(frozen=True, slots=True)
class Goal:
    """What is looked for. joining: the port where machines join, else the control port. browsing: adverts are heard."""

    cluster: str
    joining: bool
    protocol: int
    version: str
    browsing: bool = True
    timeout_s: float | None = None


# --- events ---


@dataclass(frozen=True, slots=True)
class Known:
    """An address ("host:port") from elsewhere than an advert."""

    address: str
    source: Source


@dataclass(frozen=True, slots=True)
class Heard:
    advert: Advert


@dataclass(frozen=True, slots=True)
class Gone:
    """An advert was withdrawn. Its addresses stay: a coordinator that starts again may have them."""

    instance: str


@dataclass(frozen=True, slots=True)
class Networks:
    """The addresses of this machine now."""

    interfaces: tuple[Interface, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt is over, without success. why: of the system or of the peer, for people."""

    address: str
    failure: Failure
    why: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: to be sent at ``Search.next_at``."""


Event: TypeAlias = Known | Heard | Gone | Networks | Failed | Tick


# --- effects ---


@dataclass(frozen=True, slots=True)
class Try:
    """Connect to this address and look at the certificate; answer with ``Failed``, or end the search."""

    address: str


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the user. One sentence."""

    text: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The time is over: end the search with this error."""

    code: str
    text: str


Effect: TypeAlias = Try | Say | GiveUp


@dataclass(slots=True)
class _Candidate:
    host: str
    port: int
    source: Source
    order: int
    term: int = 0
    due: float = 0.0
    failures: int = 0
    failure: Failure | None = None
    why: str = ""
    trying: bool = False


@dataclass(slots=True)
class Search:
    """The state of one search, begun at ``began``."""

    goal: Goal
    began: float
    interfaces: tuple[Interface, ...] = ()
    _candidates: dict[str, _Candidate] = field(default_factory=dict)
    _adverts: dict[str, Advert] = field(default_factory=dict)
    _count: int = 0
    _next_start: float = 0.0
    _look_at: float = 0.0  # when it is next considered whether to say something
    _told: str = ""
    _told_at: float = 0.0

    def __post_init__(self) -> None:
        self._next_start, self._look_at = self.began, self.began + PATIENCE_S

    def handle(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Take in what happened; what is to be done now."""
        match event:
            case Known(address, source):
                host, port = split(address)
                self._add(host, port, source, now)
            case Heard(advert):
                self._heard(advert, now)
            case Gone(instance):
                self._adverts.pop(instance, None)
            case Networks(interfaces):
                self.interfaces = interfaces
            case Failed(address, failure, why):
                self._failed(address, failure, why, now)
            case Tick():
                pass
        return (*self._start(now), *self._tell(now))

    @property
    def next_at(self) -> float:
        """When ``Tick`` is to come next."""
        waits = [self._look_at]
        if self.goal.timeout_s is not None:
            waits.append(self.began + self.goal.timeout_s)
        idle = [one.due for one in self._candidates.values() if not one.trying]
        if idle and self._trying < PARALLEL:
            waits.append(max(min(idle), self._next_start))
        return min(waits)

    # --- addresses ---

    @property
    def _trying(self) -> int:
        return sum(one.trying for one in self._candidates.values())

    def _heard(self, advert: Advert, now: float) -> None:
        if advert.instance not in self._adverts and len(self._adverts) >= MAX_ADVERTS:
            return
        before = self._adverts.get(advert.instance)
        self._adverts[advert.instance] = advert
        if advert.cluster != self.goal.cluster:
            return
        port = self._port(advert)
        fresh = advert.hosts if before is None else [host for host in advert.hosts if host not in before.hosts]
        for host in advert.hosts[:MAX_HOSTS]:
            candidate = self._add(host, port, Source.ADVERT, now)
            if candidate is not None:
                candidate.term = advert.term
                if host in fresh and not candidate.trying:
                    candidate.due = min(candidate.due, now)  # it has just come up: no use in waiting

    def _port(self, advert: Advert) -> int:
        return advert.enrol_port if self.goal.joining else advert.control_port

    def _add(self, host: str, port: int, source: Source, now: float) -> _Candidate | None:
        address = join(host, port)
        if (held := self._candidates.get(address)) is not None:
            held.source = min(held.source, source)
            return held
        if len(self._candidates) >= MAX_ADDRESSES:
            loser = max(
                (one for one in self._candidates.values() if one.source is Source.ADVERT and not one.trying),
                key=lambda one: (one.failures, one.order),
                default=None,
            )
            if loser is None or (source is Source.ADVERT and not loser.failures):
                return None
            del self._candidates[join(loser.host, loser.port)]
        self._count += 1
        added = _Candidate(host, port, source, self._count, due=now)
        self._candidates[address] = added
        return added

    def _failed(self, address: str, failure: Failure, why: str, now: float) -> None:
        candidate = self._candidates.get(address)
        if candidate is None or not candidate.trying:
            return
        candidate.trying = False
        candidate.failure, candidate.why = failure, why
        candidate.due = now + RETRY_S[min(candidate.failures, len(RETRY_S) - 1)]
        candidate.failures += 1
        self._next_start = min(self._next_start, now)  # a failure makes room at once, as RFC 8305 has it

    def _rank(self, candidate: _Candidate) -> tuple[int, ...]:
        """What is tried first: what failed least, was meant most, is nearest."""
        near = nearness(candidate.host, self.interfaces)
        v6 = ":" in candidate.host
        return (candidate.failures, candidate.source, near, -candidate.term, v6, candidate.order)

    def _start(self, now: float) -> Iterator[Effect]:
        due = sorted((one for one in self._candidates.values() if not one.trying and one.due <= now), key=self._rank)
        room = PARALLEL - self._trying
        if due and room > 0 and now >= self._next_start:
            first = due[0]
            first.trying = True
            self._next_start = now + STAGGER_S
            yield Try(join(first.host, first.port))

    # --- what is said ---

    def _tell(self, now: float) -> Iterator[Effect]:
        if self.goal.timeout_s is not None and now >= self.began + self.goal.timeout_s:
            yield GiveUp(*self.explain(now))
            return
        if now < self._look_at:
            return
        self._look_at = now + CHANGED_S
        _, text = self.explain(self.began)  # without the seconds, which always differ
        if text != self._told or now >= self._told_at + RETELL_S:
            self._told, self._told_at = text, now
            yield Say(self.explain(now)[1])

    def explain(self, now: float) -> tuple[str, str]:
        """(code, one sentence): why there is no coordinator yet, and what to do."""
        ours = [advert for advert in self._adverts.values() if advert.cluster == self.goal.cluster]
        others = [advert for advert in self._adverts.values() if advert.cluster != self.goal.cluster]
        short = self.goal.cluster[:SHOWN_ID]
        different = next((advert for advert in ours if advert.protocol != self.goal.protocol), None)
        if different is not None and all(advert.protocol != self.goal.protocol for advert in ours):
            return "version_mismatch", (
                f"the coordinator {printable(different.name)} runs DwarfStar {printable(different.version)} with "
                f"protocol {different.protocol}, and this machine {self.goal.version} with protocol "
                f"{self.goal.protocol}: install one release on both"
            )
        if ours:
            return self._unreached(ours)
        typed = [one for one in self._candidates.values() if one.source is Source.TYPED]
        if (foreign := next((one for one in typed if one.failure is Failure.FOREIGN), None)) is not None:
            return "other_cluster", (
                f"what answers at {join(foreign.host, foreign.port)} is not of the cluster {short}: check the address, "
                "or get a join token of that cluster with `dwarfstar token` there"
            )
        if others:
            named = _some(f"{printable(a.name)}, cluster {printable(a.cluster[:SHOWN_ID])}" for a in others)
            return "other_cluster", (
                f"no coordinator of the cluster {short} was found, only of others ({named}): start the right one in "
                f"this network, give its address with --join HOST, or get a token of the one you mean"
            )
        return self._nothing(short, now)

    def _unreached(self, ours: list[Advert]) -> tuple[str, str]:
        advert = max(ours, key=lambda one: one.term)
        port = self._port(advert)
        held = [self._candidates.get(join(host, port)) for host in advert.hosts]
        tried = [one for one in held if one is not None and one.failure is not None]
        near = any(nearness(host, self.interfaces) == 0 for host in advert.hosts)
        where = _some(f"{one.host}: {one.why}" for one in tried) if tried else _some(advert.hosts)
        begin = f"the coordinator {printable(advert.name)} was heard, but cannot be reached ({where})"
        if near:
            ports = " and ".join(map(str, sorted({advert.enrol_port, advert.control_port})))
            return "not_reached", f"{begin}: let TCP ports {ports} through the firewall there"
        here = _some(one.shown for one in self.interfaces if not one.virtual)
        return "other_subnet", (
            f"{begin}: it is in another subnet than this machine, which has {here or 'no address'}; put both in one, "
            "or give an address that leads there with --join HOST"
        )

    def _nothing(self, short: str, now: float) -> tuple[str, str]:
        failed = [one for one in self._candidates.values() if one.failure is not None]
        tried = f"tried {_some(f'{join(one.host, one.port)}: {one.why}' for one in failed)}" if failed else ""
        begin = f"no coordinator of the cluster {short} was found"
        if not self.goal.browsing:
            return "no_coordinator", (
                f"{begin}{f' ({tried})' if tried else ''}: check that it runs and its address, and let TCP ports "
                f"{CONTROL_PORT} and {CONTROL_PORT + 1} through the firewall there"
            )
        if not self.interfaces:
            also = f" ({tried})" if tried else ""
            return "no_network", f"{begin}{also}: this machine has no network but loopback, so connect it to one"
        seconds = f" for {now - self.began:.0f} s" if now > self.began else ""
        on = _some(one.shown for one in self.interfaces)
        return "no_coordinator", (
            f"{begin}: listened for {SERVICE} on {on}{seconds}{f', and {tried}' if tried else ''}; "
            "start `dwarfstar --serve` in the same network and let UDP port 5353 through, or give its address with "
            "--join HOST"
        )


# --- small parts ---


def nearness(host: str, interfaces: Iterable[Interface]) -> int:
    """0: in a network of this machine; 1: behind a router; 2: in a network of containers; 3: this machine itself."""
    try:
        address = ipaddress.ip_address(host.split("%", 1)[0])
    except ValueError:
        return 1  # a name
    found = 1
    for interface in interfaces:
        if ipaddress.ip_address(interface.host) == address:
            return 3
        if address in ipaddress.ip_network(f"{interface.host}/{interface.prefix}", strict=False):
            found = 2 if interface.virtual and found != 0 else 0
    return found


def join(host: str, port: int) -> str:
    """ "host:port", a v6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(address: str) -> tuple[str, int]:
    """Of an address made by ``join``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def printable(text: str) -> str:
    """Words of a stranger, fit for a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text[:64])


def _some(texts: Iterable[str]) -> str:
    """The first few, and that there are more."""
    every = list(texts)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more
