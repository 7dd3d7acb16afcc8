"""The checkers bite: machines with a rule taken out are caught within a few schedules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from dwarfstar_engine.cluster import lease, membership
from dwarfstar_engine.cluster.ids import InstanceId
from dwarfstar_engine.cluster.leadership import Leadership
from dwarfstar_engine.cluster.lease import LeaseRequest, Persist, Reason
from dwarfstar_engine.cluster.membership import Membership
from sim.checks import Violation
from sim.schedule import run

MOST = 3000  # schedules until it must have been caught


class GrantsAnyTerm(Leadership):
    def _verdict(self, r: LeaseRequest) -> Reason:
        return Reason.NONE if self._leader in (None, r.leader) else super()._verdict(r)


class GrantsATermTwice(Leadership):
    def _verdict(self, r: LeaseRequest) -> Reason:
        reason = super()._verdict(r)
        return Reason.NONE if reason is Reason.TAKEN and not self.removed else reason


class NeverStepsDown(Leadership):
    def _step_down(self, cause: str, out: list[lease.Effect]) -> None:
        pass


class NeverExpires(Leadership):
    def _expire(self, t: float, out: list[lease.Effect]) -> None:
        pass


class AnswersBeforeItWrites(Leadership):
    def handle(self, event: lease.Event, now: float) -> list[lease.Effect]:
        return sorted(super().handle(event, now), key=lambda effect: isinstance(effect, Persist))


class ForgetsItsVote(Leadership):
    def __init__(self, *arguments: Any, vote: object, **options: Any) -> None:
        super().__init__(*arguments, **options)


class ObeysTheRemoved(Leadership):
    def _remove(self, node: object, out: list[lease.Effect]) -> None:
        pass


class PromisesNothing(Leadership):
    """Says Serve again without Unserve when a higher term comes."""

    def _unserve(self, cause: str, out: list[lease.Effect]) -> None:
        self._leader = self._due = None


class HearsAnyInstance(Membership):
    def _speaker(self, known: Any, instance: InstanceId) -> Any:
        return known.link


class LetsCopiesIn(Membership):
    def _challenge(self, known: Any, link: Any) -> list[membership.Effect]:
        return self._replace(known, link, link.since)


class NeverLosesNodes(Membership):
    def _tick(self, t: float) -> list[membership.Effect]:
        return []


def caught(**machines: Callable[..., Any]) -> str:
    for seed in range(MOST):
        try:
            run(seed, **machines)
        except Violation as violation:
            return str(violation)
    return ""


LEADERSHIPS = [
    (GrantsAnyTerm, r"in term|went back"),
    (GrantsATermTwice, r"in term"),
    (PromisesNothing, r"serves"),
    (NeverStepsDown, r"not healed"),
    (NeverExpires, r"not healed"),
    (AnswersBeforeItWrites, r"in term|went back|came twice"),
    (ForgetsItsVote, r"in term|went back|came twice"),
    (ObeysTheRemoved, r"not healed|removed"),
]
MEMBERSHIPS = [
    (HearsAnyInstance, r"joined, and has not heard"),
    (LetsCopiesIn, r"a copy of"),
    (NeverLosesNodes, r"joined, and has not heard"),
]


@pytest.mark.parametrize(("mutant", "says"), LEADERSHIPS)
def test_a_leadership_without_a_rule_is_caught(mutant: type[Leadership], says: str) -> None:
    assert re.search(says, caught(leadership=mutant))


@pytest.mark.parametrize(("mutant", "says"), MEMBERSHIPS)
def test_a_membership_without_a_rule_is_caught(mutant: type[Membership], says: str) -> None:
    assert re.search(says, caught(members=mutant))
