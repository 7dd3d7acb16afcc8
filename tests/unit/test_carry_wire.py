"""Cells between two toy stages over loopback with mutual TLS: what goes wrong leaves the one that takes as it was."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
import pytest

from dwarfstar_engine import native
from dwarfstar_engine.errors import PeerError
from dwarfstar_engine.stage import carry, toy
from dwarfstar_engine.stage.worker import ToyBackend
from dwarfstar_engine.wire import carry as wire_carry
from dwarfstar_engine.wire import channel, trust
from dwarfstar_engine.wire.carry import PIECE_BYTES, CarryReceiver, CarrySender, Sequence, Written
from dwarfstar_engine.wire.generated import data_pb2
from dwarfstar_engine.wire.handshake import BuildInfo, local_build
from dwarfstar_engine.wire.trust import NodeFiles

LAYERS, SLICE = 6, (2, 5)
WRITTEN = Written(3, 7, "the file", SLICE, "f16", 256)
PROMPT = [ord(c) for c in "a text of some tokens"]
MOST, WITHIN_S = 1 << 20, 20.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NodeFiles]:
    authority = trust.create_authority(trust.utc_now())
    found = {}
    for name in ("n1", "n2", "n3"):
        found[name] = NodeFiles(tmp_path_factory.mktemp(name))
        trust.issue_local(authority, found[name], name, trust.utc_now())
    return found


async def at_once(work: Callable[[], Any]) -> Any:
    return work()


def backend(tokens: list[int], slots: int = 2, layers: tuple[int, int] = SLICE) -> ToyBackend:
    """A slice whose slots hold these tokens, each another number of them."""
    ahead, made = toy.ToySlice(0, layers[0]), ToyBackend(*layers, LAYERS)
    for slot in range(slots if tokens else 0):
        for position, token in enumerate(tokens[slot:]):
            row = ahead.step(toy.to_row(toy.embed(token))[None, :], position, slot)
            made.step(row, position, slot, wants=None)  # type: ignore[arg-type]
    return made


def rest(of: ToyBackend, slot: int, position: int) -> list[float]:
    """What comes of the next row."""
    out = of.step(toy.to_row(99)[None, :], position, slot, wants=None)  # type: ignore[arg-type]
    assert out is not None
    return [float(value) for value in out[0]]


@dataclass
class End:
    receiver: CarryReceiver
    address: str
    backend: ToyBackend

    def order(self, *slots: int, **more: Any) -> dict[str, Any]:
        return {"parts": [self.part(SLICE, "n1", *slots)], "within_s": WITHIN_S, "always": True, **more}

    def part(self, layers: tuple[int, int], sender: str, *slots: int) -> dict[str, Any]:
        cargo = [(slot, len(PROMPT) - slot, 1, MOST, 1e6) for slot in slots]
        return {"layers": layers, "to": self.address, "sender": sender, "cargo": cargo}

    def take(self, order: dict[str, Any], written: Written = WRITTEN) -> asyncio.Task[carry.Outcome]:
        return asyncio.create_task(carry.take(order, written, self.backend, at_once, self.receiver))


@asynccontextmanager
async def receiving(files: NodeFiles) -> AsyncIterator[End]:
    server = grpc.aio.server(options=channel.SERVER_OPTIONS)
    receiver = CarryReceiver(local_build(), "the stage")
    server.add_generic_rpc_handlers((receiver.handler(),))
    port = server.add_secure_port("127.0.0.1:0", channel.server_credentials(files))
    await server.start()
    try:
        yield End(receiver, f"127.0.0.1:{port}", backend([]))
    finally:
        await server.stop(None)


def give(
    order: dict[str, Any],
    source: ToyBackend,
    files: NodeFiles,
    written: Written = WRITTEN,
    build: BuildInfo | None = None,
) -> Any:
    return carry.give(order, order["parts"][0], written, source, at_once, build or local_build(), "n1", files)


async def test_the_one_that_takes_goes_on_as_the_one_that_gave(nodes: dict[str, NodeFiles]) -> None:
    source = backend(PROMPT)
    async with receiving(nodes["n2"]) as end:
        order = end.order(1, 0)
        taking = end.take(order)
        given = await give(order, source, nodes["n1"])
        taken = await taking
    size = 8 * 3 * (2 * len(PROMPT) - 1)
    assert given == taken == carry.Outcome(2, size)
    for slot in (0, 1):
        assert end.backend.held(slot) == (len(PROMPT) - slot, 0)
        assert rest(end.backend, slot, len(PROMPT) - slot) == rest(source, slot, len(PROMPT) - slot)


async def test_what_lies_behind_is_forgotten_and_what_is_not_there_is_left_out(nodes: dict[str, NodeFiles]) -> None:
    source, guessed = backend(PROMPT), backend([*PROMPT, 1, 2, 3])
    async with receiving(nodes["n2"]) as end:
        order = end.order(0)
        order["parts"][0]["cargo"].append((1, len(PROMPT) + 3, 1, MOST, 1e6))  # it has two less
        taking = end.take(order)
        given = await give(order, guessed, nodes["n1"])
        taken = await taking
    assert (given.sequences, given.code, taken.sequences) == (1, "bad_frame", 1)
    assert end.backend.held(0) == (len(PROMPT), 0) == guessed.held(0) and end.backend.held(1) == (0, 0)
    assert rest(end.backend, 0, len(PROMPT)) == rest(source, 0, len(PROMPT))


async def test_nobody_is_heard_but_the_node_that_was_named(nodes: dict[str, NodeFiles]) -> None:
    async with receiving(nodes["n2"]) as end:
        taking = end.take(end.order(0))
        stranger = await give(end.order(0), backend(PROMPT), nodes["n3"])
        assert (stranger.sequences, stranger.code) == (0, "not_a_sender")
        assert end.backend.held(0) == (0, 0) and not taking.done()
        assert (await give(end.order(0), backend(PROMPT), nodes["n1"])).sequences == 1
        assert (await taking).sequences == 1


async def test_nothing_is_taken_that_nobody_was_told_of(
    nodes: dict[str, NodeFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_carry, "EXPECTED_WAIT_S", 0.05)
    async with receiving(nodes["n2"]) as end:
        assert (await give(end.order(0), backend(PROMPT), nodes["n1"])).code == "not_a_sender"
        other = await give(end.order(0), backend(PROMPT), nodes["n1"], build=replace(local_build(), llama_build="b1"))
        assert other.code == "version_mismatch"


@pytest.mark.parametrize(
    "differs",
    [{"term": 2}, {"epoch": 6}, {"fingerprint": "another"}, {"kv_type": "q8_0"}, {"context": 255}],
)
async def test_cells_of_something_else_are_refused(nodes: dict[str, NodeFiles], differs: dict[str, Any]) -> None:
    async with receiving(nodes["n2"]) as end:
        taking = end.take(end.order(0))
        given = await give(end.order(0), backend(PROMPT), nodes["n1"], replace(WRITTEN, **differs))
        assert (given.sequences, given.code) == (0, "cells_differ")
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        assert end.backend.held(0) == (0, 0)


async def test_a_link_that_is_too_slow_for_it_carries_nothing(nodes: dict[str, NodeFiles]) -> None:
    async with receiving(nodes["n2"]) as end:
        order = end.order(0, 1, always=False)
        order["parts"][0]["cargo"] = [(0, len(PROMPT), 1 << 60, MOST, 60.0), (1, len(PROMPT) - 1, 1, MOST, 60.0)]
        taking = end.take(order)
        given = await give(order, backend(PROMPT), nodes["n1"])
        assert (given.sequences, given.code) == (1, "") and (await taking).sequences == 1
        assert end.backend.held(0) == (0, 0) and end.backend.held(1) == (len(PROMPT) - 1, 0)


# --- layers of several stages ----------------------------------------------------------------------------------------

FRONT, BACK = (0, 3), (3, LAYERS)  # of two stages; SLICE has layers of both
PARTS = ((2, 3), (3, 5))


def two_givers(end: End, *slots: int, **more: Any) -> dict[str, Any]:
    parts = [end.part(PARTS[0], "n1", *slots), end.part(PARTS[1], "n3", *slots)]
    return {"parts": parts, "within_s": WITHIN_S, "always": True, **more}


def give_part(order: dict[str, Any], index: int, nodes: dict[str, NodeFiles], tokens: list[int]) -> Any:
    source, name = (backend(tokens, layers=FRONT), "n1") if not index else (backend(tokens, layers=BACK), "n3")
    return carry.give(order, order["parts"][index], WRITTEN, source, at_once, local_build(), name, nodes[name])


async def test_layers_of_two_stages_are_joined(nodes: dict[str, NodeFiles]) -> None:
    source = backend(PROMPT)
    async with receiving(nodes["n2"]) as end:
        order = two_givers(end, 1, 0)
        taking = end.take(order)
        gave = await asyncio.gather(*(give_part(order, index, nodes, PROMPT) for index in (1, 0)))
        taken = await taking
    size = 8 * (2 * len(PROMPT) - 1)
    assert gave == [carry.Outcome(2, 2 * size), carry.Outcome(2, size)] and taken == carry.Outcome(2, 3 * size)
    for slot in (0, 1):
        assert end.backend.held(slot) == (len(PROMPT) - slot, 0)
        assert rest(end.backend, slot, len(PROMPT) - slot) == rest(source, slot, len(PROMPT) - slot)


async def test_a_sequence_of_which_a_part_is_left_out_is_not_taken_and_the_next_one_is(
    nodes: dict[str, NodeFiles],
) -> None:
    async with receiving(nodes["n2"]) as end:
        order = two_givers(end, 1, 0)
        taking = end.take(order)
        short = order | {"parts": [order["parts"][0], {**order["parts"][1], "cargo": order["parts"][1]["cargo"][1:]}]}
        first, second = await asyncio.gather(*(give_part(short, index, nodes, PROMPT) for index in (0, 1)))
        taken = await taking
    assert (first.sequences, first.code) == (1, carry.INCOMPLETE)
    assert (second.sequences, second.code, taken.sequences) == (1, "", 1)
    assert end.backend.held(0) == (len(PROMPT), 0) and end.backend.held(1) == (0, 0)


async def test_nothing_is_taken_of_one_giver_alone_and_it_does_not_wait_for_the_end(
    nodes: dict[str, NodeFiles],
) -> None:
    async with receiving(nodes["n2"]) as end:
        order = two_givers(end, 0, 1)
        taking = end.take(order)
        giving = asyncio.create_task(give_part(order, 0, nodes, PROMPT))
        nothing = order | {"parts": [order["parts"][0], {**order["parts"][1], "cargo": []}]}
        assert (await give_part(nothing, 1, nodes, PROMPT)).sequences == 0
        gave, taken = await giving, await taking
    assert (gave.sequences, gave.code, taken.sequences, taken.code) == (0, carry.INCOMPLETE, 0, "")
    assert [end.backend.held(slot) for slot in (0, 1)] == [(0, 0), (0, 0)]


async def test_a_part_that_waits_for_others_is_refused_when_the_time_is_up(nodes: dict[str, NodeFiles]) -> None:
    async with receiving(nodes["n2"]) as end:
        order = two_givers(end, 0)
        taking = end.take(order | {"within_s": 0.5})
        gave = await give_part(order, 0, nodes, PROMPT)
        assert gave.sequences == 0 and gave.code in (carry.INCOMPLETE, "not_a_sender")
        assert ((await taking).sequences, (await taking).code) == (0, carry.LATE)
        assert end.backend.held(0) == (0, 0)


async def test_a_giver_of_other_layers_than_it_was_named_for_is_refused(nodes: dict[str, NodeFiles]) -> None:
    async with receiving(nodes["n2"]) as end:
        order = two_givers(end, 0)
        taking = end.take(order)
        swapped = order | {"parts": order["parts"][::-1]}
        source = backend(PROMPT, layers=BACK)
        gave = await carry.give(
            swapped, swapped["parts"][0], WRITTEN, source, at_once, local_build(), "n1", nodes["n1"]
        )
        assert (gave.sequences, gave.code) == (0, "cells_differ")
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)


# --- senders that are not ours ---------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(end: End, files: NodeFiles) -> AsyncIterator[CarrySender]:
    sender = CarrySender(end.address)
    try:
        await sender.open(channel.channel_credentials(files), local_build(), WRITTEN, "n1")
        yield sender
    finally:
        await sender.close()


def cells(slot: int = 0, positions: int = 4) -> Sequence:
    return Sequence(slot, positions, 0, bytearray(8 * 3 * positions))


async def refusal(sender: CarrySender, of: Sequence) -> str:
    with pytest.raises(PeerError) as caught:
        await sender.send(of)
    return caught.value.code


async def test_damaged_cells_are_not_set_and_others_are(
    nodes: dict[str, NodeFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiving(nodes["n2"]) as end:
        order = end.order()
        order["parts"][0]["cargo"] = [(0, 4, 1, MOST, 1.0), (1, 4, 1, MOST, 1.0)]
        taking = end.take(order)
        async with opened(end, nodes["n1"]) as sender:
            with monkeypatch.context() as patched:
                sums = itertools.count()  # another one at each end
                patched.setattr(native, "crc32c", lambda _: next(sums))
                assert await refusal(sender, cells(0)) == "damaged"
            await sender.send(cells(1))
        assert (await taking).sequences == 1
        assert end.backend.held(0) == (0, 0) and end.backend.held(1) == (4, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        cells(2),
        cells(0, 5),
        Sequence(0, 4, 5, bytearray(96)),
        Sequence(0, 4, 0, bytearray(MOST + 1)),
        Sequence(0, 4, 0, bytearray()),
    ],
)
async def test_what_is_not_expected_ends_the_stream(nodes: dict[str, NodeFiles], wrong: Sequence) -> None:
    async with receiving(nodes["n2"]) as end:
        order = end.order()
        order["parts"][0]["cargo"] = [(0, 4, 1, MOST, 1.0)]
        taking = end.take(order)
        async with opened(end, nodes["n1"]) as sender:
            assert await refusal(sender, wrong) in ("bad_frame", "hop_failed")
            assert (await taking).sequences == 0
        assert end.backend.held(0) == (0, 0)


async def test_cells_that_the_backend_refuses_are_left_out(nodes: dict[str, NodeFiles]) -> None:
    async with receiving(nodes["n2"]) as end:
        order = end.order()
        order["parts"][0]["cargo"] = [(0, 4, 1, MOST, 1.0)]
        taking = end.take(order)
        async with opened(end, nodes["n1"]) as sender:
            assert await refusal(sender, Sequence(0, 4, 0, bytearray(8))) == "bad_frame"
        assert (await taking).sequences == 0 and end.backend.held(0) == (0, 0)


async def test_a_stream_cut_off_in_the_middle_leaves_what_had_come(nodes: dict[str, NodeFiles]) -> None:
    async with receiving(nodes["n2"]) as end:
        order = end.order(0, 1)
        order["parts"][0]["cargo"] = [(0, 4, 1, 4 * PIECE_BYTES, 1.0), (1, 4, 1, 4 * PIECE_BYTES, 1.0)]
        taking = end.take(order)
        async with opened(end, nodes["n1"]) as sender:
            await sender.send(cells(1))
            head = data_pb2.CarryHead(slot=0, positions=4, bytes=3 * PIECE_BYTES)
            await sender._call.write(head.SerializeToString())
            await sender._call.write(bytes(PIECE_BYTES))
            twice = CarrySender(end.address)
            with pytest.raises(PeerError, match="already"):
                await twice.open(channel.channel_credentials(nodes["n1"]), local_build(), WRITTEN, "n1")
            await twice.close()
            assert not taking.done()
        assert (await taking).sequences == 1
        assert end.backend.held(0) == (0, 0) and end.backend.held(1) == (4, 0)


async def test_the_time_is_up_at_both_ends(nodes: dict[str, NodeFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving(nodes["n2"]) as end:
        late = await end.take(end.order(0, within_s=0.01))
        assert (late.sequences, late.code) == (0, carry.LATE)
        taking = end.take(end.order(0))
        given = await give(end.order(0, within_s=0.0), backend(PROMPT), nodes["n1"])
        assert (given.sequences, given.code) == (0, carry.LATE)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        monkeypatch.setattr(wire_carry, "EXPECTED_WAIT_S", 0.05)
        after = await give(end.order(0), backend(PROMPT), nodes["n1"])
        assert after.code == "not_a_sender", "it waits for no cells any more"
