"""Cells of streams go from stages that are left to the processes that have their layers now, before a ring is closed.

Theory. The old ring is over and the new one's stages are loaded. A new stage's layers are those of one old stage or of
several; if the processes of all of them are there still, each is told what to give to whom, and the new one what to
take from whom. What that one took it tells of when it joins the ring, like any other stage that kept something
(``batch.restore``). So nothing depends on what is answered here but how long the ring waits for it; and nothing goes
wrong if it is not answered: then the time is up.

Invariant. A process is told once: an old stage of all that it gives, a new one of all that it takes. No process is
both, as one that stays has the layers that it had.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
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

KvBytes = Callable[[Stage, Layers], int]  # what a KV cache of these layers takes on a stage's node


@dataclass(frozen=True, slots=True)
class Handover:
    """A stage of the next ring, and which of its layers each stage of the last one has."""

    new: Stage
    parts: tuple[tuple[Stage, Layers], ...]


def handovers(served: Epoch, ring: Epoch, members: Mapping[str, Member]) -> list[Handover]:
    """Stages of the next ring that are other processes than those that had their layers in the ring that served, where
    all of these are there."""
    there = [old for old in served.stages if _there(old, members)]
    found = []
    for new in ring.stages:
        begin, end = new.plan.layers
        common = [(old, (max(begin, old.plan.layers[0]), min(end, old.plan.layers[1]))) for old in there]
        parts = tuple((old, part) for old, part in common if part[0] < part[1])
        if new.event is None or any(_process(old) == _process(new) for old, _ in parts):
            continue  # it keeps its cells
        if sum(part[1] - part[0] for _, part in parts) == end - begin:
            found.append(Handover(new, parts))
    return found


def _process(stage: Stage) -> tuple[str, int]:
    return (stage.member.id, 0 if stage.event is None else stage.event.pid)


def _there(old: Stage, members: Mapping[str, Member]) -> bool:
    """Whether the process that was in the ring is loaded still."""
    member = members.get(old.member.id)
    held = member.held.get(old.plan.layers) if member is not None else None
    return old.event is not None and held is not None and held.pid == old.event.pid and held.state in LOADED


def cargo(streams: Iterable[Stream], new: Stage, kv_bytes: int, cells: int) -> list[Cargo]:
    """What of the streams goes to a stage. kv_bytes: of the cache of what goes, which has so many cells."""
    profile = new.profile
    costs = [(cost.rows, cost.ms) for cost in profile.prompt]
    return [
        Cargo(
            stream.slot,
            stream.through,
            stream.through * kv_bytes // max(1, cells),
            replay_s(len(stream.request.prompt), stream.through, costs, profile.step_ms),
        )
        for stream in streams
        if stream.slot >= 0 and stream.through > 0
    ]


@dataclass(slots=True)
class _Move:
    handover: Handover
    sequences: int
    told: pb.Carried | None = None  # by who takes, or by one who gives, that it will not

    def hears(self, member: Member, told: pb.Carried) -> bool:
        """Whether it is over with this."""
        layers = (told.layers.begin, told.layers.end)
        if not told.given:
            new = self.handover.new
            return (member.id, layers) == (new.member.id, new.plan.layers)
        gives = any((member.id, layers) == (old.member.id, part) for old, part in self.handover.parts)
        return gives and bool(told.code) and not told.sequences  # who takes lacks these of every sequence


class Carrying:
    """See the module. All calls come from the event loop."""

    def __init__(self, news: News) -> None:
        self._news = news
        self._epoch = 0
        self._moves: list[_Move] = []
        self._changed = asyncio.Event()

    def heard(self, member: Member, told: pb.Carried) -> None:
        """A node says what came of a move."""
        if told.epoch == self._epoch:
            for move in self._moves:
                if move.told is None and move.hears(member, told):
                    move.told = told
        self._changed.set()

    async def run(
        self,
        found: Iterable[Handover],
        streams: Iterable[Stream],
        ring: Epoch,
        keep: int,
        cells: int,
        kv_bytes: KvBytes,
        settings: Settings,
    ) -> None:
        """Have the streams' cells carried; returns when it is over. keep: the epoch that wrote them. cells: of a KV
        cache."""
        self._epoch, waiting, self._moves = ring.number, list(streams), []
        orders, longest_s = _Orders(ring, keep, always=settings.carry == "on"), 0.0
        for handover in found:
            new, layers = handover.new, handover.new.plan.layers
            goods = chosen(cargo(waiting, new, kv_bytes(new, layers), cells), always=orders.always)
            if not goods:
                continue
            time_s = within_s(goods, settings.rescue_s)
            longest_s = max(longest_s, time_s)
            for old, part in handover.parts:
                what = {one.slot: one for one in cargo(waiting, new, kv_bytes(new, part), cells)}
                orders.add(old, new, part, [what[one.slot] for one in goods], time_s)
            self._moves.append(_Move(handover, len(goods)))
        orders.send()
        if self._moves:
            await self._wait(longest_s + MARGIN_S)
        for move in self._moves:
            told = move.told or pb.Carried(code="silent", message="nothing was heard of it in time")
            new, givers = move.handover.new, dict.fromkeys(old.member.name for old, _ in move.handover.parts)
            self._news.carried(ring, new.plan.layers, (", ".join(givers), new.member.name), move.sequences, told)
        self._moves = []

    async def _wait(self, at_most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                while any(move.told is None for move in self._moves):
                    self._changed.clear()
                    await self._changed.wait()


class _Orders:
    """What processes are told: each once."""

    def __init__(self, ring: Epoch, keep: int, *, always: bool) -> None:
        self._ring, self._keep, self.always = ring, keep, always
        self._orders: dict[tuple[str, int], tuple[Stage, pb.Carry]] = {}

    def add(self, old: Stage, new: Stage, layers: Layers, goods: Iterable[Cargo], time_s: float) -> None:
        """These layers of sequences are to go from one stage to the other."""
        begin, end = layers
        part = pb.CarryPart(
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
        )
        self._to(new, time_s).parts.append(part)
        part.to_hop = new.address
        self._to(old, time_s).parts.append(part)

    def _to(self, stage: Stage, time_s: float) -> pb.Carry:
        begin, end = stage.plan.layers
        empty = pb.Carry(
            term=self._ring.term,
            epoch=self._ring.number,
            keep=self._keep,
            layers=pb.Slice(begin=begin, end=end),
            always=self.always,
        )
        _, order = self._orders.setdefault(_process(stage), (stage, empty))
        order.within_s = max(order.within_s, time_s)
        return order

    def send(self) -> None:
        for stage, order in self._orders.values():
            with contextlib.suppress(PeerError):  # it takes no messages: it is lost, or will be
                stage.member.send(pb.CoordinatorMessage(carry=order))
