"""What must hold in every schedule, judged from outside: nothing here reads what the code under test believes.

The world tells what it saw: what a node began and ceased to serve, frames it ran, plans, requests and their ends.
"""

from __future__ import annotations

from sim.model import LAYERS, token_of


class Violation(AssertionError):
    """A schedule in which a promise was broken."""


class Checks:
    def __init__(self) -> None:
        self.term: dict[str, int] = {}  # of each node, the highest it served, over all its lives
        self.owner: dict[tuple[str, int], str] = {}  # whose a term was on a node
        self.serves: dict[str, tuple[int, str]] = {}
        self.leaders: dict[tuple[int, str], int] = {}  # epochs seen of (term, leader)
        self.requests: dict[int, str] = {}  # accepted ones: how they ended, or ""
        self.prompts: dict[int, int] = {}
        self.removed: dict[str, set[str]] = {}  # what each node was told of

    def serve(self, node: str, term: int, leader: str) -> None:
        if node in self.serves:
            raise Violation(f"{node} serves {self.serves[node]} and {(term, leader)}")
        self.serves[node] = term, leader
        self._obeys(node, term, leader)

    def _obeys(self, node: str, term: int, leader: str) -> None:
        if term < self.term.get(node, 0):
            raise Violation(f"{node} went back from term {self.term[node]} to {term}")
        self.term[node] = term
        if self.owner.setdefault((node, term), leader) != leader:
            raise Violation(f"{node} served {self.owner[node, term]} and {leader} in term {term}")

    def unserve(self, node: str, term: int, leader: str) -> None:
        if self.serves.pop(node, None) != (term, leader):
            raise Violation(f"{node} ceased to serve {(term, leader)}, which it did not")

    def crashed(self, node: str) -> None:
        self.serves.pop(node, None)

    def frame(self, node: str, term: int, leader: str) -> None:
        """It ran a frame."""
        if self.serves.get(node) != (term, leader):
            raise Violation(f"{node} ran a frame of {(term, leader)}, and serves {self.serves.get(node)}")

    def plan(self, leader: str, term: int, epoch: int, slices: list[tuple[str, int, int]]) -> None:
        if epoch <= self.leaders.get((term, leader), 0):
            raise Violation(f"epoch {epoch} of {(term, leader)} came twice")
        self.leaders[term, leader] = epoch
        covered = [layer for _, begin, end in slices for layer in range(begin, end)]
        if covered != list(range(LAYERS)) or len({node for node, _, _ in slices}) != len(slices):
            raise Violation(f"epoch {epoch} of {(term, leader)} covers {slices}")
        if bad := self.removed.get(leader, set()) & {node for node, _, _ in slices}:
            raise Violation(f"{leader} planned with {bad}, which were removed")

    def accepted(self, request: int, prompt: int) -> None:
        assert request not in self.requests
        self.requests[request], self.prompts[request] = "", prompt

    def ended(self, request: int, how: str, tokens: list[int] | None = None) -> None:
        if self.requests[request]:
            raise Violation(f"request {request} ended twice: {self.requests[request]}, {how}")
        self.requests[request] = how
        if tokens is not None:
            right = [token_of(self.prompts[request], position) for position in range(len(tokens))]
            if tokens != right:
                raise Violation(f"request {request} got {tokens}, and an undisturbed run gives {right}")

    def joined(self, leader: str, node: str, instance: str, genuine_silent_s: float, sure_s: float) -> None:
        """A coordinator let this connection in. genuine_silent_s: since it heard the real node on one that is open."""
        if instance.startswith("clone") and genuine_silent_s < sure_s:
            raise Violation(f"{leader} let a copy of {node} in, {genuine_silent_s:.2f} s after it heard the real one")

    def alive(self, leader: str, node: str, silent_ticks: int, most: int) -> None:
        """A coordinator says that the node is there."""
        if silent_ticks > most:
            raise Violation(f"{leader} calls {node} joined, and has not heard it for {silent_ticks} ticks")

    def finish(self) -> None:
        for request, how in self.requests.items():
            if not how:
                raise Violation(f"request {request} has not ended")
