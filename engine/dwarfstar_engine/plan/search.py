"""Which nodes, in which order, with which cuts: exact for few nodes, by good orders and local search for many.

Theory. Fix an order of nodes, any of which may be skipped: then the best cuts follow by dynamic programming over
(last node used, layers covered), exactly, with a matrix minimum for each node. The order matters through links, the
head, unequal layers and room only. So:

- *Few nodes* (``EXACT_WORK``): dynamic programming over (set of nodes used, last of them, layers covered) visits all
  orders at once. Nodes that are alike are used in one order only. The hop that closes the ring depends on the first
  node, which is carried along where links differ.
- *Many nodes*: several natural orders, then moves of single nodes in the best one, as long as ``MOVE_STEPS`` last.

Two measures: ``SUM`` adds stages and hops, for one stream; ``MAX`` takes the slowest of stages and links, for many.
A limit on each part makes a second search possible: of plans nearly as fast for many, the best for one stream.
All is deterministic; work is bounded by counts, not by a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice, permutations, product

import numpy as np
import numpy.typing as npt

from dwarfstar_engine.plan.cluster import Link
from dwarfstar_engine.plan.cost import Costs, busy_ms, link_hop_ms, row_bytes
from dwarfstar_engine.plan.forecast import Wishes
from dwarfstar_engine.plan.proportional import Flags, Ints, loadable, slice_bytes

EXACT_WORK = 100_000_000  # elements of matrices passed by the exact search, a fifth of a second: eight nodes with links
# of their own and 100 layers, or nine different ones with 128
STEP_WORK = 10_000  # of each (set, node) pair, beside its elements
MOVE_STEPS = 6000  # nodes passed by the ordered search while moves are tried
ORDER_WORK = 100_000_000  # elements of matrices passed for the orders tried first, some tenths of a second
LEAST_ORDERS = 2
MAX_LAST = 8  # kinds of node tried as the last stage, behind all others
STARTS = 4  # of the orders' plans, the best are moved on from
MAX_MOVED = 24  # nodes of a plan that moves are tried with; with more, order matters little for any one
Floats = npt.NDArray[np.float64]
Picks = tuple[tuple[int, int, int], ...]  # (node, first block, end)


class Measure(Enum):
    SUM = "sum"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Found:
    """value: what is minimised, ms. picks: stages in order, by index of node and of bound."""

    value: float
    picks: Picks


class Problem:
    """A search's figures for ``batch`` streams a lane. limit_ms: no stage or link may take longer.

    hop[i, j]: what a stage on j adds when it follows one on i; closing[i, j]: from last i to first j.
    """

    def __init__(
        self,
        costs: Costs,
        names: Sequence[str],
        wishes: Wishes,
        measure: Measure,
        batch: int = 1,
        limit_ms: float = np.inf,
    ) -> None:
        self.names, self.measure, self._limit_ms = list(names), measure, limit_ms
        self.costs, self.batch = costs, batch
        self.bounds = costs.job.bounds
        self.size = len(self.bounds)
        self.pins = {name: pin for name, pin in wishes.pins.items() if name in names}
        self._loadable: dict[str, Flags] = {}
        self._classes: dict[tuple[object, ...], int] = {}
        self.class_of = [self._class(name) for name in self.names]
        self._bytes: dict[int, Ints] = {}
        self._matrices: dict[int, Floats] = {}
        self.uniform = self._alike()
        n = 1 if self.uniform else len(self.names)
        usual = self.costs.cluster.link
        self.hop, self.closing = np.full((n, n), self._hop(usual)), np.full((n, n), self._closing(usual))
        for i, j in () if self.uniform else self._unusual():
            link = self.costs.link(self.names[i], self.names[j])
            self.hop[i, j], self.closing[i, j] = self._hop(link), self._closing(link)

    @property
    def firsts(self) -> int:
        """First nodes to tell apart: where links differ the hop that closes the ring depends on it, if hops add up."""
        return 1 if self.uniform or self.measure is Measure.MAX else len(self.names)

    def _class(self, name: str) -> int:
        """Nodes of one class cost and hold the same."""
        there = self.costs.nodes[name]
        rates = (there.upto_ms[-1], there.head_ms, there.fixed_ms, there.batches, there.prompt, there.usable_bytes)
        key = (*rates, id(there.costs), self.pins.get(name))
        return self._classes.setdefault(key, len(self._classes))

    def _alike(self) -> bool:
        """Whether all links are the same."""
        nodes = [self.costs.nodes[name].node for name in self.names]
        machines = {node.machine for node in nodes}
        paired = any(a in machines and b in machines for a, b in self.costs.cluster.pairs)
        return not paired and len(machines) == len(nodes)

    def _unusual(self) -> Iterator[tuple[int, int]]:
        """Pairs of nodes that the cluster's own link does not join: those with a link of theirs, and of one machine."""
        by_machine: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            by_machine.setdefault(self.costs.nodes[name].node.machine, []).append(i)
        for a, b in self.costs.cluster.pairs:
            for i, j in product(by_machine.get(a, ()), by_machine.get(b, ())):
                yield from ((i, j), (j, i))
        for several in by_machine.values():
            yield from permutations(several, 2)

    def _hop(self, link: Link) -> float:
        taken = busy_ms(link, self.batch * row_bytes(self.costs.job))
        if self.measure is Measure.MAX:
            return taken
        return link_hop_ms(link, self.batch * row_bytes(self.costs.job)) if taken <= self._limit_ms else np.inf

    def _closing(self, link: Link) -> float:
        return 0.0 if self.measure is Measure.MAX else link_hop_ms(link, 0)

    def matrix(self, index: int) -> Floats:
        """Stage ms from bound i to bound j on a node; infinite where it cannot be."""
        kind = self.class_of[index]
        if kind not in self._matrices:
            self._matrices[kind] = self._matrix(self.names[index])
        return self._matrices[kind]

    def _matrix(self, name: str) -> Floats:
        there, need = self.costs.nodes[name], self.costs.job.need
        upto = np.array(there.upto_ms)[list(self.bounds)]
        ms: Floats = upto[None, :] - upto[:, None] + there.fixed_ms
        ms[:, -1] += there.head_ms
        ms *= there.batch_factor(self.batch)
        if id(there.costs) not in self._bytes:
            self._bytes[id(there.costs)] = slice_bytes(there.costs, need, self.bounds)
        pinned = name if name in self.pins else ""
        if pinned not in self._loadable:
            self._loadable[pinned] = loadable(need, self.bounds, self.pins, pinned)
        fits = self._bytes[id(there.costs)] <= there.usable_bytes
        return np.where(self._loadable[pinned] & fits & (ms <= self._limit_ms), ms, np.inf)

    def slices(self, found: Found) -> list[tuple[str, int, int]]:
        """The stages as (node, first layer, end)."""
        return [(self.names[i], self.bounds[a], self.bounds[b]) for i, a, b in found.picks]

    def join(self, before: Floats, more: Floats | float, into: Floats | None = None) -> Floats:
        """What parts make together."""
        found: Floats = (np.add if self.measure is Measure.SUM else np.maximum)(before, more, out=into)
        return found


def best(problem: Problem, *, polish: bool = True) -> Found | None:
    """The best plan found; None if none was, and for few nodes then there is none. polish: all orders, and moves."""
    if not problem.names:
        return None
    if is_exact(problem):
        return _exact(problem)
    n, size = len(problem.names), problem.size
    most = max(LEAST_ORDERS, ORDER_WORK // (n * size * (size if problem.uniform else n))) if polish else LEAST_ORDERS
    orders = islice(_orders(problem), most)
    found = {one.picks: one for order in orders if (one := in_order(problem, order)) is not None}
    starts = sorted(found.values(), key=lambda one: one.value)[:STARTS]
    if not polish:
        return starts[0] if starts else None
    moved = (_moved(problem, start, MOVE_STEPS // len(starts)) for start in starts)
    return min(moved, key=lambda one: one.value, default=None)


# --- an order given ---


def in_order(problem: Problem, order: Sequence[int]) -> Found | None:
    """The best plan whose stages are some of ``order``, in it."""
    size, n = problem.size, len(order)
    reach = np.full((n, size), np.inf)  # [t, b]: order[t] is the last stage, up to bound b
    starts, befores = np.zeros((n, size), np.int64), np.zeros((n, size), np.int64)
    run, run_of = np.full(size, np.inf), np.full(size, -1, np.int64)  # the least of those before, whichever it is
    ends, scratch = np.arange(size), np.empty((size, size))
    for t, node in enumerate(order):
        if problem.uniform:
            entry, of = problem.join(run, problem.hop[0, 0]), run_of.copy()
        elif t:
            through = problem.join(reach[:t], problem.hop[list(order[:t]), node][:, None])
            of = through.argmin(axis=0)
            entry = through[of, ends]
        else:
            entry, of = run.copy(), run_of.copy()
        entry[0], of[0] = 0.0, -1
        whole = problem.join(entry[:, None], problem.matrix(node), scratch)
        starts[t] = whole.argmin(axis=0)
        reach[t] = whole[starts[t], ends]
        befores[t] = of[starts[t]]
        if problem.uniform:
            better = reach[t] < run
            run, run_of = np.where(better, reach[t], run), np.where(better, t, run_of)
    return _read_back(problem, order, reach, starts, befores)


def _read_back(
    problem: Problem,
    order: Sequence[int],
    reach: Floats,
    starts: Ints,
    befores: Ints,
) -> Found | None:
    """The stages that lead to the least value at the end, closing hop included."""

    def chain(t: int) -> Picks:
        end, found = problem.size - 1, list[tuple[int, int, int]]()
        while t >= 0:
            start = int(starts[t, end])
            found.append((order[t], start, end))
            t, end = int(befores[t, end]), start
        return tuple(reversed(found))

    last = reach[:, -1]
    if not np.isfinite(last).any():
        return None
    if problem.uniform:
        single = np.array([befores[t, -1] < 0 for t in range(len(order))])
        value = problem.join(last, np.where(single, 0.0, problem.closing[0, 0]))
        t = int(value.argmin())
        return Found(float(value[t]), chain(t))
    best_found: Found | None = None
    for t in map(int, np.flatnonzero(np.isfinite(last))):
        picks = chain(t)
        closing = problem.closing[picks[-1][0], picks[0][0]] if len(picks) > 1 else 0.0
        total = float(problem.join(last[t : t + 1], closing)[0])
        if best_found is None or total < best_found.value:
            best_found = Found(total, picks)
    return best_found


# --- all orders at once ---


def is_exact(problem: Problem) -> bool:
    """Whether all orders are searched."""
    return exact_work(problem) <= EXACT_WORK


def exact_work(problem: Problem) -> int:
    """What the exact search would pass: its (set, node) pairs, times what each takes."""
    n, sets = len(problem.names), 1
    counts = Counter(problem.class_of).values() if problem.uniform else [1] * n
    for count in counts:
        sets *= count + 1
        if sets > EXACT_WORK:
            break
    return sets * n // 2 * (STEP_WORK + problem.firsts * problem.size**2)


def _exact(problem: Problem) -> Found | None:
    """Over sets of nodes. reach[set][f, i, b]: stages on the set's nodes, first f, last i, up to bound b.

    Where the first does not matter (``Problem.firsts``) f is 0.
    """
    n, size = len(problem.names), problem.size
    matrices = [problem.matrix(i) for i in range(n)]
    reach: dict[int, Floats] = {}
    came: dict[tuple[int, int], tuple[Ints, Ints]] = {}
    alone = np.full((problem.firsts, n, size), np.inf)
    for i in range(n):
        if _canonical(problem, 1 << i):
            single = alone.copy()
            single[i if problem.firsts > 1 else 0, i] = matrices[i][0]
            reach[1 << i] = single
    level = list(reach)
    while level:  # sets of one size; all that lead to a set are in the level before its own
        following: dict[int, Floats] = {}
        for mask, i in product(level, range(n)):
            grown = mask | 1 << i
            if grown == mask or not _canonical(problem, grown):
                continue
            hop = problem.hop[0, 0] if problem.uniform else problem.hop[:, i][None, :, None]
            through = problem.join(reach[mask], hop)
            of = through.argmin(axis=1)
            entry = np.take_along_axis(through, of[:, None, :], axis=1)[:, 0, :]
            whole = problem.join(entry[:, :, None], matrices[i][None])
            start = whole.argmin(axis=1)
            came[grown, i] = (of, start)
            table = following.setdefault(grown, alone.copy())
            table[:, i] = np.take_along_axis(whole, start[:, None, :], axis=1)[:, 0, :]
        reach |= following
        level = list(following)
    return _read_exact(problem, reach, came)


def _canonical(problem: Problem, mask: int) -> bool:
    """Whether of nodes that are alike only the first so many are in the set. Where links differ none are alike."""
    if not problem.uniform:
        return True
    seen: set[int] = set()  # classes of which a node is left out
    for i, kind in enumerate(problem.class_of):
        if not mask >> i & 1:
            seen.add(kind)
        elif kind in seen:
            return False
    return True


def _read_exact(
    problem: Problem,
    reach: dict[int, Floats],
    came: dict[tuple[int, int], tuple[Ints, Ints]],
) -> Found | None:
    least, at = np.inf, (0, 0, 0)
    for mask, table in reach.items():
        several = mask & (mask - 1)
        closing = problem.closing.T if several and problem.measure is Measure.SUM else 0.0  # [first, last]
        value = problem.join(table[:, :, -1], closing)
        first, last = divmod(int(value.argmin()), value.shape[1])
        if value[first, last] < least:
            least, at = float(value[first, last]), (mask, first, last)
    if not np.isfinite(least):
        return None
    mask, first, i = at
    end, picks = problem.size - 1, []
    while (mask, i) in came:
        of, start = came[mask, i]
        begin = int(start[first, end])
        picks.append((i, begin, end))
        mask, i, end = mask & ~(1 << i), int(of[first, begin]), begin
    return Found(least, (*reversed([*picks, (i, 0, end)]),))


# --- orders for many nodes ---


def _orders(problem: Problem) -> Iterator[list[int]]:
    """Orders worth a search: fast nodes last (they take the head) or first, large ones last or first, each kind of node
    last, near ones together; and pinned nodes wherever they are needed."""
    everybody = range(len(problem.names))
    costs = [problem.costs.nodes[name] for name in problem.names]
    pace = [(one.upto_ms[-1] + one.fixed_ms) * one.batch_factor(problem.batch) for one in costs]
    room = [one.usable_bytes for one in costs]
    for key in (
        lambda i: (-pace[i], i),
        lambda i: (room[i], i),
        lambda i: (pace[i], i),
        lambda i: (-room[i], i),
    ):
        yield _with_pins(problem, sorted(everybody, key=key))
    for last in list({problem.class_of[i]: i for i in everybody}.values())[:MAX_LAST]:
        yield _with_pins(problem, [*sorted((i for i in everybody if i != last), key=lambda i: (-room[i], i)), last])
    if not problem.uniform:
        fastest = sorted(everybody, key=lambda i: (pace[i], i))
        for start in fastest[:4]:
            chain = _near(problem, start, pace)
            yield _with_pins(problem, chain)
            yield _with_pins(problem, chain[::-1])


def _near(problem: Problem, start: int, pace: Sequence[float]) -> list[int]:
    """From ``start`` always to the node that is nearest by link, the faster of equals."""
    order, left = [start], set(range(len(problem.names))) - {start}
    while left:
        at = order[-1]
        order.append(min(left, key=lambda i: (problem.hop[at, i], pace[i], i)))
        left.remove(order[-1])
    return order


def _with_pins(problem: Problem, order: list[int]) -> list[int]:
    """Pinned nodes before and behind every other: their layers are nobody else's, so each is used once."""
    pinned = sorted((pin, problem.names.index(name)) for name, pin in problem.pins.items())
    if not pinned:
        return order
    names = [i for _, i in pinned]
    free = [i for i in order if i not in names]
    return [*names, *(i for one in free for i in (one, *names))]


def _moved(problem: Problem, found: Found, budget: int) -> Found:
    """Single nodes moved, left out, exchanged for one that is not used, or added, as long as that is better."""
    improved = True
    while improved and budget > 0:
        improved = False
        used = [i for i, _, _ in found.picks]
        if len(used) > MAX_MOVED:
            break
        for order in _moves(used, _spares(problem, used)):
            budget -= len(order)
            if budget < 0:
                break
            other = in_order(problem, order)
            if other is not None and other.value < found.value * (1 - 1e-9):
                found, improved = other, True
                break
    return found


def _spares(problem: Problem, used: Sequence[int]) -> list[int]:
    """Nodes that are not used: where links are alike one of each class, else all, bounded."""
    rest = [i for i in range(len(problem.names)) if i not in used]
    if problem.uniform:
        return list({problem.class_of[i]: i for i in reversed(rest)}.values())[:MAX_MOVED]
    return rest[:MAX_MOVED]


def _moves(used: Sequence[int], spares: Sequence[int]) -> Iterable[list[int]]:
    """Orders near ``used``. As any node of an order may be skipped, adding one also tries exchanging it."""
    for i, node in enumerate(used):
        rest = [*used[:i], *used[i + 1 :]]
        for at in range(len(rest) + 1):
            if at != i:
                yield [*rest[:at], node, *rest[at:]]
    for spare in spares:
        for at in range(len(used) + 1):
            yield [*used[:at], spare, *used[at:]]
    for i in range(len(used)):
        for j in range(i + 2, len(used) + 1):
            yield [*used[:i], *reversed(used[i:j]), *used[j:]]
            yield [*used[:i], used[j - 1], *used[i + 1 : j - 1], used[i], *used[j:]]
