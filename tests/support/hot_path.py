"""The native way of a frame through a stage against the general one, on real slices, in a child process.

Theory. Each stage of a SmolLM2 pipeline is loaded twice. Both workers are given the same frames; one runs them as a
stage does, the other is never offered the native way. What they send on must be the same bytes, but for the time
measured (and the checksum behind it). The output of the first goes to the next stage.

``python -m support.hot_path FOLDER`` answers the requests of :func:`answer`; see ``exactness.Worker``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from dwarfstar_engine.model import arch
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage.llama import Embedder, LlamaOptions, LlamaSlice
from dwarfstar_engine.stage.worker import LlamaBackend, Worker
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import FaultFrame, Halt, Op, Payload, ResultFrame, SetSampler, StepFrame, Want
from dwarfstar_engine.wire.sampler_spec import SamplerSpec
from support import real_models
from support.exactness import serve

BOUNDS = (0, 10, 20, 30)  # a first, a middle and a last stage
CONTEXT, SLOTS, BATCH = 256, 5, 64
PROMPT_TOKENS = 6
HEADER_BYTES, CRC_BYTES = 44, 4  # of a frame: wire/frames.py
ENDS = frozenset(range(0, 49152, 37))  # tokens behind which nothing goes on: some of those drawn are among them
PROMPT_TAIL = (260, 314, 28, 30)  # common tokens, for the penalty to push away
# slot → how it draws; each kind of chain that stage/sampler.py builds
SPECS = {
    0: SamplerSpec(seed=0, temperature=0.0),
    1: SamplerSpec(seed=11, temperature=1.5),
    2: SamplerSpec(seed=2**63 + 5, temperature=0.9, top_k=50, top_p=0.9, min_p=0.02, frequency_penalty=0.4),
    3: SamplerSpec(seed=7, temperature=0.0, repeat_penalty=1.8, repeat_last_n=64, prompt_tail=PROMPT_TAIL),
    4: SamplerSpec(seed=8, temperature=1.1, presence_penalty=1.2, logit_bias=((28, 4.0), (30, -100.0))),
}
LOGPROBS = SamplerSpec(seed=0, temperature=0.0, logprobs=3)


class _Native(LlamaBackend):
    """Counts the frames that went the native way."""

    taken = 0

    def run_frame(self, frame: bytes, wait_us: int) -> tuple[bytes, bytes] | None:
        out = super().run_frame(frame, wait_us)
        self.taken += out is not None
        return out


class _General(LlamaBackend):
    def run_frame(self, frame: bytes, wait_us: int) -> tuple[bytes, bytes] | None:
        return None


class Pair:
    """One stage, twice."""

    def __init__(self, a: int, b: int, wire: WireType, options: LlamaOptions) -> None:
        model = read_model(real_models.path_of(real_models.SMOLLM2))
        rules = arch.rules(model)
        file = slice_file(model, rules, a, b)
        embedder = Embedder(token_embedding(model, rules)) if file.first else None

        def worker(kind: type[LlamaBackend]) -> Worker:
            slice_ = LlamaSlice(file, rules, model.n_embd, options, embedder=embedder)
            return Worker(kind(slice_, embedder), options.slots, wire, ENDS if file.last else ())

        self.native = worker(_Native)
        self.general = worker(_General)
        self.feed = b""

    def run(self, data: bytes) -> bytes:
        """The native worker's answer, after the two were compared."""
        out, want = self.native.run(data), self.general.run(data)
        frames.decode(out)  # the checksum is right
        assert without_times(out) == without_times(want), (frames.decode(out), frames.decode(want))
        self.feed = self.native.take_feed()
        assert self.feed == self.general.take_feed()
        return out

    @property
    def taken(self) -> int:
        assert isinstance(self.native.backend, _Native)
        return self.native.backend.taken

    def close(self) -> None:
        self.native.close()
        self.general.close()


def without_times(data: bytes) -> bytes:
    """A frame's bytes with each stage's times set to zero, and without the checksum. Padding and all else stay."""
    frame = frames.decode(data)
    if isinstance(frame, FaultFrame):
        return data
    at = HEADER_BYTES + (11 * len(frame.positions) if isinstance(frame, StepFrame) else 0)
    end = at + 8 * len(frame.timings)
    assert data[at:end] == struct.pack(f"<{2 * len(frame.timings)}I", *(v for pair in frame.timings for v in pair))
    return data[:at] + bytes(end - at) + data[end:-CRC_BYTES]


@contextmanager
def pairs(
    wire: WireType, bounds: Sequence[int] = BOUNDS, *, context: int = CONTEXT, slots: int = SLOTS
) -> Iterator[list[Pair]]:
    with ExitStack() as opened:
        options = LlamaOptions(context=context, slots=slots, batch=BATCH)
        stages = []
        for a, b in pairwise(bounds):
            stages.append(Pair(a, b, wire, options))
            opened.callback(stages[-1].close)
        yield stages


class Ring:
    """Frames through the pairs, one after the other."""

    def __init__(self, stages: Sequence[Pair]) -> None:
        self._stages, self._number = stages, 0
        self.sent = 0

    def send(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        ops: tuple[Op, ...] = (),
        last: int = 1,
        *,
        prompt: bool = False,
        guessed: int = 0,
        rounds: int = 0,
    ) -> frames.Frame:
        """Rows into the ring; the ``last`` of them want a token, the ``guessed`` last ones if they are right."""
        n = len(tokens)
        wants = np.zeros(n, np.uint8)
        wants[n - last :] = Want.DRAWN
        wants[n - guessed :] = Want.CHECKED
        self._number += 1
        self.sent += 1
        frame = StepFrame(
            epoch=3,
            number=self._number,
            ops=ops,
            slots=np.array(slots, np.uint16),
            positions=np.array(positions, np.int32),
            tokens=np.array(tokens, np.int32),
            wants=wants,
            prompt=prompt,
            rounds=rounds,
        )
        return self._go(frames.encode(frame))

    def go_on(self) -> ResultFrame | None:
        """The next round of what goes by itself, or None."""
        if not (data := self._stages[-1].feed):
            return None
        self.sent += 1
        result = self._go(data)
        assert isinstance(result, ResultFrame), result
        return result

    def _go(self, data: bytes) -> frames.Frame:
        for stage in self._stages:
            data = stage.run(data)
        return frames.decode(data)

    def feed(
        self, slot: int, tokens: Sequence[int], position: int, ops: tuple[Op, ...] = (), last: int = 1
    ) -> list[int]:
        """Rows of one slot, with operations a prompt's; the tokens drawn behind the ``last`` ones."""
        n = len(tokens)
        result = self.send(tokens, range(position, position + n), [slot] * n, ops, last, prompt=bool(ops))
        assert isinstance(result, ResultFrame) and [row.slot for row in result.rows] == [slot] * last, result
        return [row.token for row in result.rows]


def prompt(slot: int) -> list[int]:
    return [1000 + 37 * slot + 11 * i for i in range(PROMPT_TOKENS)]


def _decode(request: dict[str, Any]) -> dict[str, Any]:
    """Every kind of sampler in a slot of its own; prompts, then ``steps`` rows each, one a frame, slots in turn."""
    texts: dict[int, list[int]] = {}
    with pairs(WireType(request["wire"])) as stages:
        ring = Ring(stages)
        for slot, spec in SPECS.items():
            texts[slot] = ring.feed(slot, prompt(slot), 0, (SetSampler(slot, spec.encode()),))
        general = ring.sent
        for step in range(request["steps"]):
            for slot, text in texts.items():
                text += ring.feed(slot, text[-1:], PROMPT_TOKENS + step)
        # Several rows of one slot, tokens wanted behind some of them and none.
        at = PROMPT_TOKENS + request["steps"]
        for slot, last in ((0, 3), (1, SLOTS), (2, 0), (3, 1)):
            texts[slot] += ring.feed(slot, [*prompt(slot + 1), 9], at, last=last)
        taken = [stage.taken for stage in stages]
    return {"texts": texts, "taken": taken, "native": ring.sent - general}


def _together(request: dict[str, Any]) -> dict[str, Any]:
    """Rows of several slots in one frame, and guesses of one."""
    drawn = []
    with pairs(WireType(request["wire"])) as stages:
        ring = Ring(stages)
        for slot in SPECS:
            ring.feed(slot, prompt(slot), 0, (SetSampler(slot, SPECS[slot].encode()),))
        general, at = ring.sent, PROMPT_TOKENS
        for slots in ([0, 3, 4], [4, 1, 2], [0, 0, 1], [3, 1, 3]):
            positions = [at + slots[:i].count(slot) for i, slot in enumerate(slots)]
            out = ring.send([5, 6, 7], positions, slots, last=3)
            assert isinstance(out, ResultFrame), out
            drawn.append([row.slot for row in out.rows])
        text = ring.feed(0, [5], at)
        for _ in range(6):  # the text, to be guessed afterwards
            text += ring.feed(0, text[-1:], at + len(text))
        for guess, count in ((text[0:3], 4), ([text[0], text[1] + 1, text[2]], 2), ([text[0] + 1], 1)):
            n = len(guess)
            out = ring.send([5, *guess], range(at, at + 1 + n), [0] * (1 + n), last=1 + n, guessed=n)
            assert isinstance(out, ResultFrame) and [row.token for row in out.rows] == text[:count], out
        taken = [stage.taken for stage in stages]
    return {"slots": drawn, "taken": taken, "native": ring.sent - general}


def _going(request: dict[str, Any]) -> dict[str, Any]:
    """Steps that go round by themselves, beside the same ones sent one by one; a slot is halted on the way."""
    with pairs(WireType(request["wire"])) as stages:
        ring, texts, rounds = Ring(stages), {}, []
        for slot in SPECS:
            texts[slot] = ring.feed(slot, prompt(slot), 0, (SetSampler(slot, SPECS[slot].encode()),))
        general = ring.sent
        slots = list(SPECS)
        result: frames.Frame | None = ring.send(
            [texts[slot][-1] for slot in slots],
            [PROMPT_TOKENS] * len(slots),
            slots,
            last=len(slots),
            rounds=request["rounds"],
        )
        while isinstance(result, ResultFrame):
            rounds.append((result.rounds, len(result.rows)))
            for row in result.rows:
                texts[row.slot].append(row.token)
            going = stages[-1].feed
            if len(rounds) == 3:
                ring.send((), (), (), (Halt(2),), last=0)
                general += 1
                stages[-1].feed = going
            result = ring.go_on()
        taken = [stage.taken for stage in stages]
    return {"texts": texts, "rounds": rounds, "taken": taken, "native": ring.sent - general}


def _logprobs(request: dict[str, Any]) -> dict[str, Any]:
    """A slot that wants log-probabilities takes the general way, also for guesses; others only in a frame with it."""
    taken, rows = [], []
    with pairs(WireType(request["wire"])) as stages:
        ring, last = Ring(stages), stages[-1]
        plain = ring.feed(0, prompt(0), 0, (SetSampler(0, SPECS[0].encode()),))
        ring.feed(1, prompt(0), 0, (SetSampler(1, LOGPROBS.encode()),))
        for slots in ([0], [1], [0, 1]):
            before = last.taken
            out = ring.send(plain[-1:] * len(slots), [PROMPT_TOKENS] * len(slots), slots, last=len(slots))
            assert isinstance(out, ResultFrame)
            rows += out.rows
            taken.append(last.taken - before)
        before, text = last.taken, [rows[0].token]
        for step in range(3):
            text += ring.feed(0, text[-1:], PROMPT_TOKENS + 1 + step)
        taken.append(last.taken - before)
        out = ring.send(text[:4], range(PROMPT_TOKENS + 1, PROMPT_TOKENS + 5), [1] * 4, last=4, guessed=3)
        assert isinstance(out, ResultFrame)
        guessed = [row.token for row in out.rows][:3] == text[1:] and len(out.rows) == 4
        taken.append(last.taken - before - 3)
    shown = [[row.slot, row.token, row.logprob, list(row.top)] for row in rows]
    return {"taken": taken, "rows": shown, "guessed": guessed}


def _full(request: dict[str, Any]) -> dict[str, Any]:
    """A sequence longer than its cells: both ways tell of the same fault."""
    with pairs(WireType.F32, (0, 2), slots=1) as stages:
        ring = Ring(stages)
        for start in range(0, CONTEXT, BATCH):
            full = ring.send([9] * BATCH, range(start, start + BATCH), [0] * BATCH, last=0, prompt=True)
            assert isinstance(full, StepFrame), full
        over = [ring.send([9], [CONTEXT], [0], prompt=prompt) for prompt in (True, False)]
        again = [ring.send([9], [position], [0]) for position in (CONTEXT - 1, 0, 1)]
    assert all(isinstance(frame, StepFrame) for frame in again), again
    faults = [frame for frame in over if isinstance(frame, FaultFrame)]
    return {"faults": [[frame.code, frame.message] for frame in faults], "taken": stages[0].taken}


def _refused(request: dict[str, Any]) -> dict[str, Any]:
    """Frames the native way leaves alone because they are wrong: the faults."""
    out = {}
    with pairs(WireType.F32, (28, 30)) as stages:
        n_embd = stages[0].native.backend.width
        good = {
            "epoch": 3,
            "number": 1,
            "ops": (),
            "slots": np.zeros(1, np.uint16),
            "positions": np.zeros(1, np.int32),
            "tokens": np.zeros(1, np.int32),
            "wants": np.ones(1, np.uint8),
            "payload": Payload.F32,
            "data": np.ones((1, n_embd), np.float32),
            "cols": n_embd,
        }

        def many(n: int) -> dict[str, Any]:
            return {
                "slots": np.zeros(n, np.uint16),
                "positions": np.arange(n, dtype=np.int32),
                "tokens": np.zeros(n, np.int32),
                "wants": np.zeros(n, np.uint8),
                "data": np.ones((n, n_embd), np.float32),
            }

        wrong: dict[str, dict[str, Any]] = {
            "sampler": {},
            "slot": {"slots": np.full(1, SLOTS, np.uint16)},
            "width": {"data": np.ones((1, n_embd - 1), np.float32), "cols": n_embd - 1},
            "tokens": {"payload": Payload.NONE, "data": b"", "cols": 0},
            "gap": {"positions": np.full(1, 9, np.int32), "wants": np.zeros(1, np.uint8)},
            "wants": {**many(3), "wants": np.ones(3, np.uint8), "prompt": True},
            "rows": {**many(BATCH + 1), "prompt": True},
        }
        for name, change in wrong.items():
            frame = frames.decode(stages[0].run(frames.encode(StepFrame(**{**good, **change}))))
            out[name] = frame.message if isinstance(frame, FaultFrame) else ""
        taken = stages[0].taken
    return {"faults": out, "taken": taken}


CHECKS = {
    "decode": _decode,
    "together": _together,
    "going": _going,
    "logprobs": _logprobs,
    "full": _full,
    "refused": _refused,
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """``check``: one of CHECKS."""
    return CHECKS[request["check"]](request)


if __name__ == "__main__":
    serve(answer)
