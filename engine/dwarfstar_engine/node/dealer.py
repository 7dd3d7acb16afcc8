"""Which node is in which pipeline, while nodes come and go (``plan.shares`` decides). No IO; time is an argument.

Theory. Before the first plan all nodes are the first pipeline's, which waits for as many as it was told to. When these
are here they are dealt out. A node that comes later, or comes back, goes where it was, or where it is needed. One that
lost nodes and waited for them for ``rejoin_s`` in vain is mended with nodes that others do not need. When nodes came or
went and nobody is served, it is looked at whether a better division is possible.

While a smaller model is served all nodes are the first pipeline's: models do not mix behind one endpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dwarfstar_engine.cluster.membership import MAX_NODES
from dwarfstar_engine.errors import PlanError
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.node.surveyor import Survey, Surveyor
from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.plan.forecast import Objective
from dwarfstar_engine.plan.shares import SPARE, Wanted, deal, from_text, mend, place, to_text
from dwarfstar_engine.settings import MAX_PIPELINES, Settings

LOOK_S = 2.0  # between two looks: each asks the planner


class Share(Mapping[str, Member]):
    """The nodes of a pipeline that are here, by id: a view that changes as they come, go and are dealt anew."""

    def __init__(self, members: Mapping[str, Member], dealt: Mapping[str, int], number: int) -> None:
        self._members, self._dealt, self._number = members, dealt, number

    def __getitem__(self, node: str) -> Member:
        if self._dealt.get(node, 0) != self._number:
            raise KeyError(node)
        return self._members[node]

    def __iter__(self) -> Iterator[str]:
        return (node for node in self._members if self._dealt.get(node, 0) == self._number)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, slots=True)
class Seen:
    """A pipeline, as it is seen from here. gone_at: when it lost a node last. idle: nobody asks it anything."""

    serves: bool
    gone_at: float
    idle: bool


class Host(Protocol):
    """The coordinator, as it is seen from here."""

    settings: Settings
    members: dict[str, Member]

    @property
    def main(self) -> Source: ...
    @property
    def context(self) -> int: ...


def wanted_of(settings: Settings) -> Wanted:
    """As it is set."""
    if settings.pipelines == "auto":
        return Wanted(auto=True)
    return Wanted(settings.replicas or settings.pipelines, copies=settings.replicas > 0)


class Dealer:
    """See the module. count: of pipelines, which only grows. dealt: by node id, also of nodes that are gone."""

    def __init__(self, host: Host, surveyor: Surveyor) -> None:
        self._host, self._surveyor = host, surveyor
        self.wanted = wanted_of(host.settings)
        self.count = self.wanted.count
        self.dealt: dict[str, int] = {}
        self._begun = not self.wanted.several  # nodes were dealt out
        self._stirred = False  # nodes came or went since it was looked at
        self._looked_at = -math.inf

    def share(self, number: int) -> Share:
        return Share(self._host.members, self.dealt, number)

    def expected(self, number: int) -> int:
        """Nodes that a pipeline's plan is to wait for."""
        if not self.wanted.several or not self._begun:
            return self._host.settings.wait_nodes
        return max(1, sum(one == number for one in self.dealt.values()))

    def joined(self, member: Member, *, on_main: bool) -> dict[str, int]:
        """A node is here: who changes the pipeline, with it."""
        if not self.wanted.several:
            self.dealt.pop(member.id, None)
            return {member.id: 0}
        self._stirred = True
        if not on_main:
            return self._move({member.id: 0})
        if not self._begun:
            if len(self._here()) < self._host.settings.wait_nodes:
                return self._move({member.id: 0})
            self._begun = True
            return self.anew()
        if self.dealt.get(member.id, SPARE) != SPARE:
            return {member.id: self.dealt[member.id]}
        survey = self._survey()
        shares = [[name for name in share if survey.ids[name] != member.id] for share in self._shares(survey)]
        number = place(survey.cluster, survey.job, self.wanted, shares, survey.names[member.id])
        return self._move({member.id: number})

    def gone(self) -> None:
        """A node is not."""
        self._stirred = self.wanted.several

    def anew(self, wanted: Wanted | None = None) -> dict[str, int]:
        """Deal all out, as wanted from now on: who changes the pipeline. Raises PlanError: nobody is here."""
        self.wanted = wanted or self.wanted
        return self._move(self._dealt_out(self._survey()))

    @property
    def taken(self) -> bool:
        """Whether the owner has taken something else than the engine was given."""
        return self.wanted != wanted_of(self._host.settings)

    @property
    def text(self) -> str:
        """What the cluster is to keep of that."""
        return to_text(self.wanted, wanted_of(self._host.settings), self._host.main.fingerprint)

    def restore(self, text: object) -> None:
        """As the cluster has kept it; before nodes join."""
        given = wanted_of(self._host.settings)
        wanted = from_text(text, given, self._host.main.fingerprint) or given
        if wanted != self.wanted:
            self.wanted, self._begun = wanted, not wanted.several
            self.count = max(self.count, wanted.count)

    def take(self, kind: Kind | None) -> dict[str, int]:
        """Deal out as one of the advisor's alternatives has it, or as it was given: who changes the pipeline. Raises
        PlanError: there is no such alternative, and nothing has changed."""
        if kind is None:
            return self.anew(wanted_of(self._host.settings))
        wanted, survey = taken(kind, len(self._here())), self._survey()
        shares = deal(survey.cluster, survey.job, wanted, Objective(self._host.settings.objective))
        alone = len(shares) == 1 and len(shares[0]) == len(survey.ids)
        if alone and (kind in (Kind.REPLICAS, Kind.PIPELINES) or (kind is Kind.SINGLE and len(survey.ids) > 1)):
            why = "the model does not fit the nodes so" if len(survey.ids) > 1 else "there is one node only"
            raise PlanError(f"that cannot be taken ({kind}): {why}", code="not_possible")
        return self.anew(wanted)

    def look(self, now: float, seen: Sequence[Seen], *, on_main: bool) -> dict[str, int]:
        """Nodes that are to change their pipeline, mostly none. now: monotonic, s. on_main: no smaller model is
        served in the place of the one that is wanted."""
        if not on_main:
            return self._move({member.id: 0 for member in self._here()}) if self.wanted.several else {}
        if not self._stirred or not self._begun or now - self._looked_at < LOOK_S or not self._here():
            return {}
        self._looked_at = now
        rejoin_s = self._host.settings.rejoin_s
        if moves := self.mended(now, seen):
            return moves
        survey = self._survey()
        if all(one.idle for one in seen) and all(now - one.gone_at > rejoin_s for one in seen):
            self._stirred = False
            fresh = self._dealt_out(survey)
            if self._is_better(fresh, seen):
                return self._move(fresh)
        return {}

    def mended(self, now: float, seen: Sequence[Seen]) -> dict[str, int]:
        """Nodes for pipelines that have waited for theirs in vain: who changes the pipeline."""
        rejoin_s = self._host.settings.rejoin_s
        broken = {number for number, one in enumerate(seen) if not one.serves and now - one.gone_at >= rejoin_s}
        if not broken or not self.wanted.several or not self._begun or not self._here():
            return {}
        survey = self._survey()
        moves = mend(survey.cluster, survey.job, self._shares(survey), self._spare(survey), broken)
        return self._move({survey.ids[name]: number for name, number in moves.items()})

    def _is_better(self, fresh: Mapping[str, int], seen: Sequence[Seen]) -> bool:
        """More pipelines; or others, if that is the advisor's business."""
        numbers = {number for number in fresh.values() if number != SPARE}
        return len(numbers) > sum(one.serves for one in seen) or (self.wanted.auto and len(numbers) < len(seen))

    def _here(self) -> list[Member]:
        nodes = sorted(self._host.members.values(), key=lambda one: (one.name, one.id))
        return [member for member in nodes if not member.drained]

    def _survey(self) -> Survey:
        here, host = self._here(), self._host
        if not here:
            raise PlanError("no node has joined yet: start one with `dwarfstar node`", code="no_nodes")
        return self._surveyor.survey(here, host.main, host.settings, host.context)

    def _shares(self, survey: Survey) -> list[list[str]]:
        return [
            [name for name, node in survey.ids.items() if self.dealt.get(node, 0) == number]
            for number in range(self.count)
        ]

    def _spare(self, survey: Survey) -> list[str]:
        return [name for name, node in survey.ids.items() if self.dealt.get(node, 0) == SPARE]

    def _dealt_out(self, survey: Survey) -> dict[str, int]:
        """All of them: each share gets the number of the pipeline that has most of its nodes already."""
        shares = deal(survey.cluster, survey.job, self.wanted, Objective(self._host.settings.objective))
        found = dict.fromkeys(survey.ids.values(), SPARE)
        free = list(range(max(self.count, len(shares))))
        for share in sorted(shares, key=len, reverse=True):
            nodes = [survey.ids[name] for name in share]
            number = max(free, key=lambda one: (sum(self.dealt.get(node) == one for node in nodes), -one))
            free.remove(number)
            found.update(dict.fromkeys(nodes, number))
        return found

    def _move(self, moves: dict[str, int]) -> dict[str, int]:
        """Note them; those that are changes, or of nodes that were nowhere."""
        changed = {node: number for node, number in moves.items() if self.dealt.get(node) != number}
        for node, number in changed.items():
            self.dealt.pop(node, None)
            self.dealt[node] = number
        for node in [one for one in self.dealt if one not in self._host.members][: max(0, len(self.dealt) - MAX_NODES)]:
            del self.dealt[node]
        self.count = max(self.count, 1 + max(self.dealt.values(), default=0))
        return changed


def taken(kind: Kind, nodes: int) -> Wanted:
    """What is wanted when an owner takes one of the advisor's alternatives."""
    if kind is Kind.REPLICAS:
        return Wanted(min(nodes, MAX_PIPELINES), copies=True)
    return Wanted(auto=True, kind=kind) if kind is not Kind.SPLIT else Wanted()
