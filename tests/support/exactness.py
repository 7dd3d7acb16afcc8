"""Is a chain of slices bit for bit the whole model? Asked of one GGUF file, in a process that may abort.

Theory. The whole model is loaded from its file by llama.cpp's own loader; slices are loaded as stages load them.
Both run the same prompt in one batch, then the whole model's greedy tokens one by one, with the same thread count and
batch shapes, so every multiplication happens in the same order and the logits must be **equal**, not close.
A chain is asked for each legal cut alone (two stages) and for all of them together.

A GGML assert aborts the process: :class:`Worker` runs the sweeps in a child, one family after the other, notices an
abort or a missed deadline, and starts a new child for the next family.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dwarfstar_engine.errors import IllegalCutError
from dwarfstar_engine.model import arch
from dwarfstar_engine.model.arch import ArchRules
from dwarfstar_engine.model.gguf import GgufModel, read_model
from dwarfstar_engine.model.slice import slice_file, token_embedding
from dwarfstar_engine.stage.llama import Embedder, LlamaOptions, LlamaSlice
from dwarfstar_engine.stage.whole import WholeModel
from support import tiny_models

Logits = NDArray[np.float32]  # steps × vocabulary

PROMPT_TOKENS = 12  # more than the tiny models' window
GREEDY_STEPS = 6
BATCH = 16
CELLS = 256
SLOT = 1
DEADLINE_S = 60.0  # a sweep takes about 0.1 s; a hung one must not hang the run
STDERR_TAIL = 2000  # characters: the assert and its place


def compare(path: Path, *, ignore_rules: bool = False) -> dict[str, float]:
    """Cuts ("3", or "1 2 3" for a chain of four) → largest absolute difference of a logit; 0.0 is exact.

    ignore_rules: slice without the architecture's rules, to see that the sweep would notice.
    """
    model = read_model(path)
    rules, cuts = arch.rules(model), arch.legal_cuts(model)
    if ignore_rules:
        rules = ArchRules()
    tokens, expected = _whole(path)
    assert np.isfinite(expected).all()
    chains: list[tuple[int, ...]] = [(cut,) for cut in cuts]
    if len(cuts) > 1:
        chains.append(cuts)
    differences = {}
    for chain in chains:
        bounds = (0, *chain, model.n_layers)
        if not all(_loadable(model, a, b) for a, b in pairwise(bounds)):
            continue
        with _Chain(model, rules, bounds) as slices:
            actual = _drive(slices.feed, tokens)
        differences[" ".join(map(str, chain))] = float(np.abs(actual - expected).max())
    return differences


def _loadable(model: GgufModel, a: int, b: int) -> bool:
    try:
        arch.check_slice(model, a, b)
    except IllegalCutError:
        return False
    return True


def _drive(feed: Callable[[list[int]], Logits], tokens: Sequence[int]) -> Logits:
    """Logits after the prompt and after each further token; feed takes tokens and gives the last one's logits."""
    rows = [feed(list(tokens[:PROMPT_TOKENS]))]
    rows += [feed([token]) for token in tokens[PROMPT_TOKENS:]]
    return np.stack(rows)


def _whole(path: Path) -> tuple[list[int], Logits]:
    """The prompt and the greedy tokens after it, and the logits of the unsplit model."""
    model = WholeModel(path, context=CELLS, batch=BATCH)
    try:
        tokens = [3 + (37 * i * i + 11 * i) % (model.vocab_size - 3) for i in range(PROMPT_TOKENS)]
        rows = [model.logits(model.feed(tokens))]
        for _ in range(GREEDY_STEPS):
            tokens.append(int(rows[-1].argmax()))
            rows.append(model.logits(model.feed(tokens[-1:])))
    finally:
        model.close()
    return tokens, np.stack(rows)


class _Chain:
    """Slices one after the other, as one model with one sequence."""

    def __init__(self, model: GgufModel, rules: ArchRules, bounds: Sequence[int]) -> None:
        options = LlamaOptions(
            context=CELLS, slots=2, batch=BATCH
        )  # two: cells go from a context of one sequence to one of more
        self._embedder = Embedder(token_embedding(model, rules))
        self._position = 0
        self._slices: list[LlamaSlice] = []
        try:
            for a, b in pairwise(bounds):
                self._slices.append(LlamaSlice(slice_file(model, rules, a, b), rules, model.n_embd, options))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Chain:
        return self

    def __exit__(self, *_: object) -> None:
        for slice_ in self._slices:
            slice_.close()

    def feed(self, tokens: list[int]) -> Logits:
        n = len(tokens)
        rows, prompt = self._embedder.rows(np.array(tokens, np.int32)), n > 1
        wants = np.zeros(n, np.uint8)
        wants[-1] = 1
        position, self._position = self._position, self._position + n
        for slice_ in self._slices[:-1]:
            hidden = slice_.step(rows, position, SLOT, wants, prompt=prompt)
            assert hidden is not None
            rows = hidden
        last = self._slices[-1]
        last.step(rows, position, SLOT, wants, prompt=prompt)
        view = (ctypes.c_float * last.vocab_size).from_address(last.logits(n - 1, prompt=prompt))
        return np.ctypeslib.as_array(view).copy()


class Worker:
    """A child process that answers one kind of question, started again when one of them kills it.

    module: what it runs, with ``folder`` as its argument; it calls :func:`serve`.
    """

    def __init__(self, folder: Path, module: str = "support.exactness", deadline_s: float = DEADLINE_S) -> None:
        self._folder, self._module, self._deadline_s = folder, module, deadline_s
        self._child: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._pump: threading.Thread | None = None

    def sweep(self, family: str, *, ignore_rules: bool = False) -> dict[str, float]:
        """:func:`compare` on the family's tiny model. Raises RuntimeError if it fails, aborts or takes too long."""
        differences: dict[str, float] = self.ask(family=family, ignore_rules=ignore_rules)["differences"]
        return differences

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request, wait for its answer. Raises RuntimeError if it fails, aborts or takes too long."""
        child = self._running()
        assert child.stdin is not None
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        try:
            line = self._answers.get(timeout=self._deadline_s)
            answer: dict[str, Any] = json.loads(line) if line else {"error": "the process died"}
        except queue.Empty:
            line, answer = "", {"error": f"no answer within {self._deadline_s} s"}
        if not line:
            self.close()
        if "error" in answer:
            tail = (self._folder / "stderr").read_text(errors="replace")[-STDERR_TAIL:]
            raise RuntimeError(f"{request}: {answer['error']}\n{tail}")
        return answer

    def close(self) -> None:
        if self._child is not None:
            assert self._child.stdin is not None and self._pump is not None
            self._child.kill()
            self._child.wait()
            self._child.stdin.close()
            self._pump.join()
            self._child = None

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GGML_NO_BACKTRACE": "1"}
            with (self._folder / "stderr").open("w") as errors:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", self._module, str(self._folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                )
            self._answers = queue.Queue()
            self._pump = threading.Thread(target=_pump, args=(self._child.stdout, self._answers), daemon=True)
            self._pump.start()
        return self._child


def _pump(lines: IO[str], answers: queue.Queue[str]) -> None:
    with lines:
        for line in lines:
            answers.put(line)
    answers.put("")  # the end: the child died


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A child's loop: one JSON object a line in, one out."""
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # reported to the test, which fails
            traceback.print_exc()
            reply = {"error": repr(error)}
        print(json.dumps(reply), flush=True)


def main(folder: Path) -> None:
    """Sweep the families asked for."""
    path = folder / "tiny.gguf"

    def sweep(request: dict[str, Any]) -> dict[str, Any]:
        tiny_models.make_tiny(request["family"], path)
        return {"differences": compare(path, ignore_rules=request["ignore_rules"])}

    serve(sweep)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
