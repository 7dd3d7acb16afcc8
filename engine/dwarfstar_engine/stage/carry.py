"""A stage's end of a move: it gives what its slots hold to the processes that have its layers now, or takes it.

Theory. The ring that wrote the cells is over and this stage is in no other yet, so nothing runs and every slot is at
the end of a frame. Each process that takes gets the layers it has in common with this one, over a stream of its own.
Sequences go one after the other: cut to what all stages have answered for (what was guessed and not accepted lies
behind that), written, sent, taken. One that cannot be moved is left out; the others go on. What was taken when the time
is up, or the streams end, is what the stage has.

A stage whose layers come from several others takes a sequence when all of its parts are there, and only then answers
for them. Parts come in the same order on all streams: a stream that is past a sequence, or has ended, has left it out,
which the others are then told. So of each stream one part is in memory, and none waits for what cannot come.

Slots are touched in the thread in which a link looks at them and empties them, so a link that comes meanwhile sees a
sequence whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from dwarfstar_engine.batch import carry
from dwarfstar_engine.errors import DwarfStarError, PeerError
from dwarfstar_engine.plan.standby import Layers
from dwarfstar_engine.stage.worker import Backend
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.carry import HOP_ENDED, CarryReceiver, CarrySender, Expected, Sequence, Written
from dwarfstar_engine.wire.handshake import BuildInfo
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.stage")

LATE = "carry_deadline"  # code: the time was up before all was carried
INCOMPLETE = "cells_incomplete"  # code: other parts of a sequence do not come

Quiet = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs something in the thread of slots


@dataclass(slots=True)
class Outcome:
    """Sequences carried. code, message: why no more; empty: what was left out is quicker to compute again."""

    sequences: int = 0
    bytes: int = 0
    code: str = ""
    message: str = ""

    def failed(self, error: DwarfStarError) -> None:
        self.code, self.message = error.code, error.message


async def give(
    order: dict[str, Any],
    part: dict[str, Any],
    written: Written,
    backend: Backend,
    quiet: Quiet,
    build: BuildInfo,
    name: str,
    trust: NodeFiles,
) -> Outcome:
    """Carry what ``part`` of an order names to ``to``; see ``node.stages`` for their fields."""
    written, outcome, sender = _of(written, part), Outcome(), CarrySender(str(part["to"]))
    try:
        async with asyncio.timeout(float(order["within_s"])):
            link = await sender.open(channel.channel_credentials(trust), build, written, name)
            for slot, positions, size, _, replay_s in part["cargo"]:
                if order["always"] or carry.worth(size, link.bytes_s, link.round_trip_s, replay_s):
                    await _give_one(sender, outcome, backend, quiet, slot, positions, written.layers)
    except TimeoutError:
        outcome.failed(PeerError("the time was up before all was carried", code=LATE))
    except DwarfStarError as error:
        outcome.failed(error)
    finally:
        await sender.close()
    return outcome


async def _give_one(
    sender: CarrySender, outcome: Outcome, backend: Backend, quiet: Quiet, slot: int, positions: int, layers: Layers
) -> None:
    """Raises PeerError: the stream ended."""
    try:
        data, floor = await quiet(lambda: backend.give(slot, positions, layers))
        await sender.send(Sequence(slot, positions, floor, data))
    except DwarfStarError as error:
        if error.code == HOP_ENDED:
            raise
        log.info("layers %d–%d of slot %d are not carried: %s", layers[0], layers[1] - 1, slot, error.message)
        outcome.failed(error)
        return
    outcome.sequences += 1
    outcome.bytes += len(data)


async def take(
    order: dict[str, Any], written: Written, backend: Backend, quiet: Quiet, receiver: CarryReceiver
) -> Outcome:
    """Take the parts that ``order`` names from their senders."""
    outcome = Outcome()

    async def take_whole(slot: int, parts: Mapping[Layers, Sequence]) -> None:
        one = next(iter(parts.values()))
        floor, data = max(part.floor for part in parts.values()), {layers: part.data for layers, part in parts.items()}
        try:
            await quiet(lambda: backend.take(slot, one.positions, floor, data))
        except DwarfStarError as error:
            log.info("the cells of slot %d are not taken: %s", slot, error.message)
            outcome.failed(error)
            raise
        outcome.sequences += 1
        outcome.bytes += sum(map(len, data.values()))

    slots = dict.fromkeys(slot for part in order["parts"] for slot, *_ in part["cargo"])
    gathering = Gathering([_of(written, part).layers for part in order["parts"]], slots, take_whole)
    streams = [_expected(part, _of(written, part), gathering) for part in order["parts"]]
    receiver.expect(streams)
    try:
        async with asyncio.timeout(float(order["within_s"])):
            await asyncio.gather(*(_watch(stream, gathering) for stream in streams))
    except TimeoutError:
        outcome.failed(PeerError("the time was up before all had come", code=LATE))
    finally:
        receiver.forget()
        for stream in streams:
            gathering.ended(stream.written.layers)
    return outcome


def _of(written: Written, part: dict[str, Any]) -> Written:
    begin, end = part["layers"]
    return replace(written, layers=(begin, end))


def _expected(part: dict[str, Any], written: Written, gathering: Gathering) -> Expected:
    slots = {slot: (positions, most) for slot, positions, _, most, _ in part["cargo"]}
    return Expected(written, str(part["sender"]), slots, lambda cells: gathering.came(written.layers, cells))


async def _watch(stream: Expected, gathering: Gathering) -> None:
    await stream.over.wait()
    gathering.ended(stream.written.layers)


@dataclass(slots=True)
class _Whole:
    """A sequence. over: it was taken, or, with an error, will not be."""

    parts: dict[Layers, Sequence] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    error: DwarfStarError | None = None

    def lacks(self, layers: Layers) -> None:
        """They do not come any more, unless they have."""
        if layers not in self.parts and not self.over.is_set():
            text = f"cells of layers {layers[0]}–{layers[1] - 1} are missing"
            self.error = PeerError(text, code=INCOMPLETE)
            self.parts.clear()
            self.over.set()


class Gathering:
    """Sequences of ``slots``, in this order, of which each of ``parts`` comes on its own stream. take: a whole one."""

    def __init__(
        self,
        parts: Iterable[Layers],
        slots: Iterable[int],
        take: Callable[[int, Mapping[Layers, Sequence]], Awaitable[None]],
    ) -> None:
        self._parts = frozenset(parts)
        self._wholes = {slot: _Whole() for slot in slots}
        self._take = take

    async def came(self, layers: Layers, cells: Sequence) -> None:
        """A part is here; returns when its sequence is taken. Raises DwarfStarError: it is not."""
        whole = self._wholes[cells.slot]
        for slot in takewhile(lambda slot: slot != cells.slot, self._wholes):
            self._wholes[slot].lacks(layers)
        if not whole.over.is_set():
            whole.parts[layers] = cells
            if whole.parts.keys() == self._parts:
                await self._complete(cells.slot, whole)
            else:
                await whole.over.wait()
        if whole.error is not None:
            raise whole.error

    async def _complete(self, slot: int, whole: _Whole) -> None:
        whole.error = PeerError("the stream ended while the cells were taken", code=INCOMPLETE)
        try:
            await self._take(slot, whole.parts)
            whole.error = None
        except DwarfStarError as error:
            whole.error = error
        finally:
            whole.parts = {}
            whole.over.set()

    def ended(self, layers: Layers) -> None:
        """The stream of this part is over."""
        for whole in self._wholes.values():
            whole.lacks(layers)


def event(
    order: dict[str, Any], layers: Layers, outcome: Outcome, began: float, *, given: bool = False
) -> dict[str, Any]:
    """What is said of it. layers: that were to be given, or those of who takes. began: by ``time.perf_counter``."""
    return {
        "epoch": int(order["epoch"]),
        "layers": layers,
        "given": given,
        "sequences": outcome.sequences,
        "bytes": outcome.bytes,
        "seconds": round(time.perf_counter() - began, 6),
        "code": outcome.code,
        "message": outcome.message,
    }
