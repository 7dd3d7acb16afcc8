"""A stage's end of a move: it gives what its slots hold to the process that has its slice now, or takes it.

Theory. The ring that wrote the cells is over and this stage is in no other yet, so nothing runs and every slot is at
the end of a frame. Sequences go one after the other: cut to what all stages have answered for (what was guessed and not
accepted lies behind that), written, sent, taken. One that cannot be moved is left out; the others go on. What was taken
when the time is up, or the stream ends, is what the stage has.

Slots are touched in the thread in which a link looks at them and empties them, so a link that comes meanwhile sees a
sequence whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dwarfstar_engine.batch import carry
from dwarfstar_engine.errors import DwarfStarError, PeerError
from dwarfstar_engine.stage.worker import Backend
from dwarfstar_engine.wire import channel
from dwarfstar_engine.wire.carry import HOP_ENDED, CarryReceiver, CarrySender, Expected, Sequence, Written
from dwarfstar_engine.wire.handshake import BuildInfo
from dwarfstar_engine.wire.trust import NodeFiles

log = logging.getLogger("dwarfstar.stage")

LATE = "carry_deadline"  # code: the time was up before all was carried

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
    written: Written,
    backend: Backend,
    quiet: Quiet,
    build: BuildInfo,
    name: str,
    trust: NodeFiles,
) -> Outcome:
    """Carry what ``order`` names to ``to``; see ``node.stages`` for its fields."""
    outcome, sender = Outcome(), CarrySender(str(order["to"]))
    try:
        async with asyncio.timeout(float(order["within_s"])):
            link = await sender.open(channel.channel_credentials(trust), build, written, name)
            for slot, positions, size, _, replay_s in order["cargo"]:
                if order["always"] or carry.worth(size, link.bytes_s, link.round_trip_s, replay_s):
                    await _give_one(sender, outcome, backend, quiet, slot, positions)
    except TimeoutError:
        outcome.failed(PeerError("the time was up before all was carried", code=LATE))
    except DwarfStarError as error:
        outcome.failed(error)
    finally:
        await sender.close()
    return outcome


async def _give_one(
    sender: CarrySender, outcome: Outcome, backend: Backend, quiet: Quiet, slot: int, positions: int
) -> None:
    """Raises PeerError: the stream ended."""
    try:
        data, floor = await quiet(lambda: backend.give(slot, positions))
        await sender.send(Sequence(slot, positions, floor, data))
    except DwarfStarError as error:
        if error.code == HOP_ENDED:
            raise
        log.info("slot %d is not carried: %s", slot, error.message)
        outcome.failed(error)
        return
    outcome.sequences += 1
    outcome.bytes += len(data)


async def take(
    order: dict[str, Any], written: Written, backend: Backend, quiet: Quiet, receiver: CarryReceiver
) -> Outcome:
    """Take what ``order`` names from ``sender``."""
    outcome = Outcome()

    async def take_one(cells: Sequence) -> None:
        await quiet(lambda: backend.take(cells.slot, cells.positions, cells.floor, cells.data))

    slots = {slot: (positions, most) for slot, positions, _, most, _ in order["cargo"]}
    expected = Expected(written, str(order["sender"]), slots, take_one)
    receiver.expect(expected)
    try:
        async with asyncio.timeout(float(order["within_s"])):
            await expected.over.wait()
    except TimeoutError:
        outcome.failed(PeerError("the time was up before all had come", code=LATE))
    finally:
        receiver.forget()
    outcome.sequences, outcome.bytes = len(expected.taken), expected.bytes
    return outcome


def event(order: dict[str, Any], outcome: Outcome, began: float) -> dict[str, Any]:
    """What is said of it. began: by ``time.perf_counter``."""
    return {
        "epoch": int(order["epoch"]),
        "given": bool(order["to"]),
        "sequences": outcome.sequences,
        "bytes": outcome.bytes,
        "seconds": round(time.perf_counter() - began, 6),
        "code": outcome.code,
        "message": outcome.message,
    }
