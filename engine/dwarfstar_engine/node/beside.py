"""Slices that are loaded beside those that serve: copies for the loss of a node, and what the next plan needs.

Every node's stages are known from their events (``Member.held``). Nothing here touches the epoch that serves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence

from dwarfstar_engine.errors import PeerError, StageError
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.wire.generated import control_pb2 as pb

NO_ROOM = "no_room"
RELEASED = "released"  # code of a stage's end that we have asked for, or that made place for one we asked for
CRASHED = "stage_crashed"  # code of a stage's end by its own doing: what it ran may be to blame
LOADED = (pb.STAGE_STATE_READY, pb.STAGE_STATE_LINKED, pb.STAGE_STATE_BROKEN)
MAX_HELD = 16  # slices of a node that are kept in mind; it holds room.MAX_STAGES, and tells of some that ended
OVER = (pb.STAGE_STATE_FAILED, pb.STAGE_STATE_EXITED)


def layers_of(event: pb.StageEvent | pb.Assign) -> Layers:
    if isinstance(event, pb.Assign):
        return event.layer_begin, event.layer_end
    return event.layers.begin, event.layers.end


def loaded(member: Member) -> set[Layers]:
    """The slices that a node could join a ring with at once."""
    return {layers for layers, event in member.held.items() if event.state in LOADED}


class Beside:
    """See the module."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self._members = members
        self._news = asyncio.Event()

    def heard(self, member: Member, event: pb.StageEvent) -> None:
        """A stage's event, of a ring or not."""
        layers = layers_of(event)
        before = member.held.get(layers)
        if event.code == RELEASED:
            if before is not None and before.state != pb.STAGE_STATE_LOADING:  # else it was asked for again since
                del member.held[layers]
        elif before is None and (event.state in OVER or len(member.held) >= MAX_HELD):
            pass  # nobody waits for it; or the node tells of slices that nobody gave it
        else:
            member.held[layers] = event
        self.stir()

    def stir(self) -> None:
        """A node came or went, or a stage has spoken."""
        self._news.set()

    async def wait(self, at_most_s: float) -> None:
        """Until there is news."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, at_most_s)):
                await self._news.wait()

    async def load(self, wanted: Sequence[tuple[Member, pb.Assign]], deadline_s: float) -> None:
        """Have slices loaded; returns when all are. Raises StageError, with the node's code, when one cannot be."""
        for member, assign in wanted:
            if layers_of(assign) not in loaded(member):
                layers = pb.Slice(begin=assign.layer_begin, end=assign.layer_end)
                loading = pb.StageEvent(state=pb.STAGE_STATE_LOADING, layers=layers, standby=True)
                member.held[layers_of(assign)] = loading
                try:
                    member.send(pb.CoordinatorMessage(assign=assign))
                except PeerError as error:
                    raise StageError(error.message, code=error.code) from None
        try:
            async with asyncio.timeout(deadline_s):
                while not all([_arrived(self._members, *one) for one in wanted]):  # noqa: C419 - each may raise
                    await self.wait(deadline_s)
        except TimeoutError:
            raise StageError(f"the layers were not loaded within {deadline_s:.0f} s") from None

    def release(self, member: Member, keep: Collection[Layers], term: int, epoch: int) -> None:
        """Have a node end the stages that are neither in the ring of ``epoch`` nor to be kept."""
        kept = [pb.Slice(begin=begin, end=end) for begin, end in sorted(keep)]
        with contextlib.suppress(PeerError):  # it does not read: it will be lost
            member.send(pb.CoordinatorMessage(release=pb.Release(term=term, epoch=epoch, rest=True, keep=kept)))
        for layers in [one for one in member.held if one not in keep]:
            del member.held[layers]


def _arrived(members: Mapping[str, Member], member: Member, assign: pb.Assign) -> bool:
    """Whether it is loaded. Raises StageError: it will not be."""
    if members.get(member.id) is not member:
        raise StageError(f"node {member.name} was lost")
    event = member.held.get(layers_of(assign))
    if event is not None and event.state in OVER:
        del member.held[layers_of(assign)]
        raise StageError(f"{member.name}: {event.detail}", code=event.code or None)
    return event is not None and event.state in LOADED
