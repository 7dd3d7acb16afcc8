"""The search for a coordinator in a played world, on a virtual clock."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwarfstar_engine.cluster import candidates as module
from dwarfstar_engine.cluster.candidates import (
    ATTEMPT_S,
    MAX_ADDRESSES,
    MAX_ADVERTS,
    PARALLEL,
    PATIENCE_S,
    RETELL_S,
    RETRY_S,
    STAGGER_S,
    Advert,
    Effect,
    Event,
    Failed,
    Failure,
    GiveUp,
    Goal,
    Gone,
    Heard,
    Interface,
    Known,
    Networks,
    Say,
    Search,
    Source,
    Try,
)

OURS, THEIRS = "aaaabbbbccccddddeeeeffff", "zzzzyyyyxxxxwwwwvvvvuuuu"
GOAL = Goal(OURS, joining=True, protocol=1, version="0.1.0")
ETH = Interface("eth0", "10.0.0.2", 24)
DOCKER = Interface("docker0", "172.17.0.1", 16, virtual=True)


def advert(*hosts: str, cluster: str = OURS, name: str = "head", protocol: int = 1, term: int = 1) -> Advert:
    return Advert(f"{cluster}-{name}", cluster, name, hosts, 8478, 8477, term, protocol, "0.2.0")


@dataclass
class World:
    """Addresses that answer: ``answers`` gives the seconds until one does, and whether it is right; others are dead."""

    search: Search
    answers: dict[str, tuple[float, bool]]
    now: float = 0.0
    begun: list[tuple[float, str]] = field(default_factory=list)
    said: list[tuple[float, str]] = field(default_factory=list)
    found: str = ""
    gave_up: GiveUp | None = None
    _open: set[str] = field(default_factory=set)
    _agenda: list[tuple[float, int, Event | str]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    def at(self, when: float, event: Event) -> None:
        heapq.heappush(self._agenda, (when, next(self._count), event))

    def run(self, until: float) -> None:
        """Play until then, or until the right address has answered or the search gives up."""
        while not self.found and self.gave_up is None:
            due = self._agenda[0][0] if self._agenda else float("inf")
            tick = max(self.now, self.search.next_at)
            when = min(due, tick)
            if when > until:
                return
            assert when >= self.now
            self.now = when
            if due <= tick:
                _, _, event = heapq.heappop(self._agenda)
                if isinstance(event, str):
                    self.found = event
                    return
                if isinstance(event, Failed):
                    self._open.discard(event.address)
            else:
                event = module.Tick()
            self._run(self.search.handle(event, self.now))
            assert self.search.next_at > self.now or due <= tick or self.gave_up, "time goes on"

    def _run(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case Try(address):
                    assert address not in self._open, "one attempt at an address at a time"
                    self._open.add(address)
                    assert len(self._open) <= PARALLEL
                    self.begun.append((self.now, address))
                    after, right = self.answers.get(address, (ATTEMPT_S, False))
                    end = self.now + min(after, ATTEMPT_S)
                    if right and after < ATTEMPT_S:
                        heapq.heappush(self._agenda, (end, next(self._count), address))
                    else:
                        self.at(end, Failed(address, Failure.UNREACHED, "no answer"))
                case Say(text):
                    self.said.append((self.now, text))
                case GiveUp():
                    self.gave_up = effect


def world(answers: dict[str, tuple[float, bool]] | None = None, goal: Goal = GOAL) -> World:
    it = World(Search(goal, 0.0), answers or {})
    it.at(0.0, Networks((ETH, DOCKER)))
    return it


hosts = st.integers(1, 250).map(lambda n: f"10.0.{n % 3}.{n}")


@settings(max_examples=80)
@given(
    dead=st.lists(hosts, unique=True, max_size=12),
    delay=st.floats(0.0, 3.0),
    up_at=st.floats(0.0, 60.0),
    typed=st.lists(hosts, unique=True, max_size=4),
)
def test_the_right_address_is_found_soon_after_it_is_up_whatever_else_is_dead(
    dead: list[str], delay: float, up_at: float, typed: list[str]
) -> None:
    right = "10.9.9.9:8478"
    it = world()
    for host in typed:
        it.at(0.0, Known(f"{host}:8478", Source.TYPED))
    it.at(0.0, Heard(advert(*dead, "10.9.9.9")))
    it.run(up_at)
    it.answers[right] = (delay, True)
    count = len({*dead, *typed}) + 1
    rounds = -(-count // PARALLEL) + 1
    it.run(up_at + (rounds + 1) * (ATTEMPT_S + RETRY_S[-1]) + count * STAGGER_S)
    assert it.found == right


@settings(max_examples=50)
@given(dead=st.lists(hosts, unique=True, min_size=1, max_size=30), refused_s=st.floats(0.01, 5.0))
def test_no_address_starves_and_attempts_keep_their_distance(dead: list[str], refused_s: float) -> None:
    it = world({f"{host}:8478": (refused_s, False) for host in dead})
    for host in dead:
        it.at(0.0, Known(f"{host}:8478", Source.GOSSIP))
    it.run(120.0)
    counts = {address: sum(one == address for _, one in it.begun) for address in {a for _, a in it.begun}}
    assert len(counts) == len(dead) and max(counts.values()) - min(counts.values()) <= 1
    if refused_s >= STAGGER_S * PARALLEL:
        first = [when for when, _ in it.begun[:PARALLEL]]
        assert all(b - a >= STAGGER_S - 1e-9 for a, b in itertools.pairwise(first))


def test_a_failure_lets_the_next_attempt_begin_at_once() -> None:
    it = world({"10.0.0.3:8478": (0.01, False), "10.0.0.4:8478": (0.01, True)})
    it.at(0.0, Heard(advert("10.0.0.3", "10.0.0.4")))
    it.run(10.0)
    assert it.found and it.now == pytest.approx(0.02)


def test_what_was_typed_is_tried_first_then_memory_then_the_nearest_and_this_machine_last() -> None:
    it = world()
    it.at(0.0, Known("10.7.7.7:8478", Source.GOSSIP))
    it.at(0.0, Heard(advert("172.17.0.1", "172.17.0.9", "192.168.9.9", "10.0.0.7")))
    it.at(0.0, Known("10.0.0.9:8478", Source.LAST))
    it.at(0.0, Known("server:8478", Source.TYPED))
    it.search.handle(Networks((ETH, DOCKER)), 0.0)
    it.search._next_start = 0.01  # all are known before the first attempt
    it.run(ATTEMPT_S * 2)
    order = list(dict.fromkeys(address.partition(":")[0] for _, address in it.begun))
    assert order == [
        "server", "10.0.0.9", "10.0.0.7", "192.168.9.9", "172.17.0.9", "172.17.0.1", "10.7.7.7",
    ]  # fmt: skip


def test_a_member_looks_at_the_control_port() -> None:
    it = world(goal=Goal(OURS, joining=False, protocol=1, version="0.1.0"))
    it.at(0.0, Heard(advert("10.0.0.3")))
    it.run(1.0)
    assert it.begun == [(0.0, "10.0.0.3:8477")]


def test_a_coordinator_heard_again_is_tried_at_once() -> None:
    it = world({"10.0.0.3:8478": (0.01, False)})
    it.at(0.0, Heard(advert("10.0.0.3")))
    it.run(30.0)
    last = it.begun[-1][0]
    it.at(last + 0.02, Gone(advert().instance))
    it.at(last + 0.03, Heard(advert("10.0.0.3")))
    it.run(last + 0.05)
    assert it.begun[-1][0] == pytest.approx(last + 0.03)


def test_a_flood_of_adverts_is_bounded_and_displaces_nothing_but_adverts() -> None:
    it = world()
    it.at(0.0, Known("10.0.0.9:8478", Source.LAST))
    for number in range(400):
        it.at(0.001 * number, Heard(advert(f"10.1.{number // 250}.{number % 250 + 1}", name=f"n{number}")))
        it.at(0.001 * number, Heard(advert("10.2.2.2", cluster=THEIRS, name=f"f{number}")))
    it.run(60.0)
    assert len(it.search._candidates) <= MAX_ADDRESSES and len(it.search._adverts) <= MAX_ADVERTS
    assert sum(address == "10.0.0.9:8478" for _, address in it.begun) >= 2


def test_a_full_table_gives_a_failed_address_up_for_a_new_one() -> None:
    it = world()
    for number in range(MAX_ADVERTS - 1):
        it.at(0.0, Heard(advert(f"10.1.1.{number + 1}", f"10.1.2.{number + 1}", name=f"n{number}")))
    it.answers["10.0.0.77:8478"] = (0.1, True)
    it.at(20.0, Heard(advert("10.0.0.77", name="right")))
    it.run(60.0)
    assert it.found == "10.0.0.77:8478" and it.now < 25.0


def test_trouble_is_told_once_then_rarely_and_nothing_before_it_is_due() -> None:
    it = world()
    it.run(2 * RETELL_S + 3 * PATIENCE_S + 60.0)
    times = [when for when, _ in it.said]
    assert len(times) == 3 and times[0] == PATIENCE_S
    assert all(b - a >= RETELL_S for a, b in itertools.pairwise(times))


def test_other_trouble_is_told_soon() -> None:
    it = world()
    it.at(20.0, Heard(advert("10.5.5.5", cluster=THEIRS)))
    it.run(40.0)
    assert [when for when, _ in it.said] == [5.0, 35.0] and "only of others" in it.said[1][1]


def test_the_search_ends_when_its_time_is_over() -> None:
    it = world(goal=Goal(OURS, joining=True, protocol=1, version="0.1.0", timeout_s=3.0))
    it.run(60.0)
    assert it.gave_up is not None and it.now == 3.0 and "for 3 s" in it.gave_up.text


SENTENCES = [
    (
        (),
        "no_coordinator",
        "listened for _dwarfstar._tcp.local. on eth0 (10.0.0.2/24), docker0 (172.17.0.1/16) for 6 s;",
    ),
    ((Networks(()),), "no_network", "no network but loopback"),
    ((Known("10.0.0.3:8478", Source.TYPED),), "no_coordinator", "and tried 10.0.0.3:8478: no answer; start"),
    ((Heard(advert("10.9.9.9", cluster=THEIRS)),), "other_cluster", "only of others (head, cluster zzzzyyyyxxxx)"),
    ((Heard(advert("10.0.0.3")),), "not_reached", "(10.0.0.3: no answer): let TCP ports 8477 and 8478 through"),
    (
        (Heard(advert("10.9.9.9", "172.17.0.1")),),
        "other_subnet",
        "than this machine, which has eth0 (10.0.0.2/24); put",
    ),
    (
        (Heard(advert("10.0.0.3", protocol=2)),),
        "version_mismatch",
        "head runs DwarfStar 0.2.0 with protocol 2, and this machine 0.1.0 with protocol 1: install one release",
    ),
]


@pytest.mark.parametrize(("events", "code", "part"), SENTENCES, ids=[code for _, code, _ in SENTENCES])
def test_each_kind_of_trouble_has_its_sentence(events: tuple[Event, ...], code: str, part: str) -> None:
    it = world()
    for event in events:
        it.at(0.0, event)
    it.run(PATIENCE_S + 1.0)
    found, text = it.search.explain(6.0)
    assert found == code and part in text, text
    assert "\n" not in text and not text.endswith(".")
    assert len(it.said) == 1


def test_a_wrong_certificate_at_a_typed_address_is_said() -> None:
    search = Search(GOAL, 0.0)
    assert search.handle(Known("10.0.0.3:8478", Source.TYPED), 0.0) == (Try("10.0.0.3:8478"),)
    search.handle(Failed("10.0.0.3:8478", Failure.FOREIGN, "not of this cluster"), 0.1)
    code, text = search.explain(1.0)
    assert code == "other_cluster" and "10.0.0.3:8478 is not of the cluster aaaabbbbcccc:" in text


def test_words_of_strangers_are_made_fit_for_a_terminal() -> None:
    search = Search(GOAL, 0.0)
    search.handle(Heard(advert("10.0.0.3", cluster=THEIRS, name="\x1b[31mevil\n")), 0.0)
    assert "?[31mevil?" in search.explain(1.0)[1]


def test_an_answer_that_was_not_asked_for_changes_nothing() -> None:
    search = Search(GOAL, 0.0)
    assert search.handle(Failed("10.0.0.3:8478", Failure.UNREACHED, "x"), 0.1) == ()
    assert search.next_at == PATIENCE_S


@pytest.mark.parametrize("address", ["10.0.0.3:1", "[fd00::1]:8477", "server.local:80"])
def test_addresses_are_taken_apart_and_put_together(address: str) -> None:
    assert module.join(*module.split(address)) == address
