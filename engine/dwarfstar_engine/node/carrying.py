"""Cells of streams go from stages that are left to the processes that have their slices now, before a ring is closed.

Theory. The old ring is over and the new one's stages are loaded. Where a slice moved whole, both of its processes are
told, and what the new one took it tells of when it joins the ring, like any other stage that kept something
(``batch.restore``). So nothing depends on what is answered here but how long the ring waits for it; and nothing goes
wrong if it is not answered: then the time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dwarfstar_engine.batch.carry import Cargo, chosen, replay_s, within_s
from dwarfstar_engine.errors import PeerError
from dwarfstar_engine.node.beside import LOADED
from dwarfstar_engine.node.epoch import Epoch, Stage
from dwarfstar_engine.node.members import Member
from dwarfstar_engine.node.news import News
from dwarfstar_engine.node.streams import Stream
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb

MARGIN_S = 1.0  # after their time is up nodes say so: how long that may take


def handovers(served: Epoch, ring: Epoch, members: Mapping[str, Member]) -> list[tuple[Stage, Stage]]:
    """Stages of the ring that served, and those of the next one that are other processes with the same slice, where
    both are there."""
    found = []
    for new in ring.stages:
        old = next((one for one in served.stages if one.plan.layers == new.plan.layers), None)
        if old is None or old.event is None or new.event is None:
            continue
        if (old.member.id, old.event.pid) == (new.member.id, new.event.pid):
            continue  # it keeps its cells
        member = members.get(old.member.id)
        held = member.held.get(old.plan.layers) if member is not None else None
        if held is not None and held.pid == old.event.pid and held.state in LOADED:
            found.append((old, new))
    return found


def cargo(streams: Iterable[Stream], new: Stage, cells: int) -> list[Cargo]:
    """What of the streams is at a stage that is left. cells: of its KV cache."""
    profile = new.profile
    costs = [(cost.rows, cost.ms) for cost in profile.prompt]
    return [
        Cargo(
            stream.slot,
            stream.through,
            stream.through * new.plan.kv_bytes // max(1, cells),
            replay_s(len(stream.request.prompt), stream.through, costs, profile.step_ms),
        )
        for stream in streams
        if stream.slot >= 0 and stream.through > 0
    ]


@dataclass(slots=True)
class _Move:
    old: Stage
    new: Stage
    sequences: int
    told: pb.Carried | None = None  # by who takes, or by who gives, that it will not


class Carrying:
    """See the module. All calls come from the event loop."""

    def __init__(self, news: News) -> None:
        self._news = news
        self._epoch = 0
        self._moves: dict[Layers, _Move] = {}
        self._changed = asyncio.Event()

    def heard(self, member: Member, told: pb.Carried) -> None:
        """A node says what came of a move."""
        move = self._moves.get((told.layers.begin, told.layers.end))
        if move is None or told.epoch != self._epoch or move.told is not None:
            return
        if told.given:
            if member.id == move.old.member.id and told.code and not told.sequences:
                move.told = told  # the other one waits for nothing
        elif member.id == move.new.member.id:
            move.told = told
        self._changed.set()

    async def run(
        self,
        pairs: Iterable[tuple[Stage, Stage]],
        streams: Iterable[Stream],
        ring: Epoch,
        keep: int,
        cells: int,
        settings: Settings,
    ) -> None:
        """Have the streams' cells carried; returns when it is over. keep: the epoch that wrote them. cells: of a KV
        cache."""
        self._epoch, waiting, longest_s = ring.number, list(streams), 0.0
        always = settings.carry == "on"
        self._moves = {}
        for old, new in pairs:
            goods = chosen(cargo(waiting, new, cells), always=always)
            if not goods:
                continue
            time_s = within_s(goods, settings.rescue_s)
            order = _order(ring, keep, old, new, goods, time_s, always)
            self._moves[new.plan.layers] = _Move(old, new, len(goods))
            longest_s = max(longest_s, time_s)
            with contextlib.suppress(PeerError):  # it takes no messages: it is lost, or will be
                new.member.send(pb.CoordinatorMessage(carry=order))
                order.to_hop = new.address
                old.member.send(pb.CoordinatorMessage(carry=order))
        if self._moves:
            await self._wait(longest_s + MARGIN_S)
        for layers, move in self._moves.items():
            told = move.told or pb.Carried(code="silent", message="nothing was heard of it in time")
            nodes = (move.old.member.name, move.new.member.name)
            self._news.carried(ring, layers, nodes, move.sequences, told)
        self._moves = {}

    async def _wait(self, at_most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                while any(move.told is None for move in self._moves.values()):
                    self._changed.clear()
                    await self._changed.wait()


def _order(
    ring: Epoch, keep: int, old: Stage, new: Stage, goods: Iterable[Cargo], time_s: float, always: bool
) -> pb.Carry:
    begin, end = new.plan.layers
    return pb.Carry(
        term=ring.term,
        epoch=ring.number,
        keep=keep,
        layers=pb.Slice(begin=begin, end=end),
        sender=old.member.id,
        cargo=[
            pb.Cargo(
                slot=one.slot,
                positions=one.positions,
                bytes=one.bytes,
                most_bytes=one.most_bytes(end - begin),
                replay_s=one.replay_s,
            )
            for one in goods
        ],
        within_s=time_s,
        always=always,
    )
