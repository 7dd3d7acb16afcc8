"""Two machines hold one model in two quantisations: what they answer together is what those layers give unsplit.

The node's machine has not the engine's file: a mount of its own hides the folder it lies in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dwarfstar_engine.cli.running import find
from process.conftest import BLOCK, TOKENS
from process.prompts import PROMPTS
from process.reference import Answer, answers
from process.test_exactness import LOGPROB_TOLERANCE, check_all
from process.test_join import started, token_line
from support import gguf_bytes as g
from support.engine_process import EngineProcess, command, until
from support.quantised import quantised, spliced

pytestmark = pytest.mark.process

CUT = 18
Q8_0 = 7  # of llama_ftype
ASKED = PROMPTS[:8]
OPTIONS = ("--mixed", "--wait-nodes", "2", "--cuts", str(CUT), "--threads", "1")


@dataclass(frozen=True)
class Files:
    """served: the engine's, alone in its folder. named: the node's."""

    served: Path
    named: Path
    reference: list[Answer]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Files:
    folder = tmp_path_factory.mktemp("files")
    (folder / "engine").mkdir()
    served = folder / "engine" / "small.Q4_1.gguf"
    shutil.copyfile(demo_model, served)
    named = quantised(served, folder / "small.Q8_0.gguf", Q8_0)
    both = spliced(served, named, CUT, folder / "both.gguf")
    return Files(served, named, answers(both, ASKED, TOKENS, BLOCK))


def without(folder: Path) -> list[str]:
    """The beginning of a command line whose process does not see ``folder``."""
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]
    if shutil.which("unshare") is None or os.geteuid() != 0 or subprocess.run([*hide, "true"], check=False).returncode:
        pytest.skip("mounts of its own need root")
    return hide


@pytest.fixture
def engine(files: Files, tmp_path: Path) -> Iterator[EngineProcess]:
    variables = {"DWARFSTAR_NAME": "head"}
    with EngineProcess(tmp_path / "home", str(files.served), *OPTIONS, variables=variables) as running:
        until(lambda: find(running.home), "the engine takes nodes")
        until(lambda: running.node("head"), "its own node is there")
        yield running


def test_the_texts_are_those_of_the_layers_of_both_files(engine: EngineProcess, files: Files, tmp_path: Path) -> None:
    hide = without(files.served.parent)
    arguments = [*token_line(engine.home), "--home", str(tmp_path / "lent"), "--model", str(files.named)]
    with started(tmp_path / "log", [*arguments, "--threads", "1"], "lent", hide):
        engine.wait_serving()
        told = {stage.node: (stage.layers, stage.file, stage.quantisation) for stage in engine.status().stages}
        assert told == {"head": ((0, CUT), "small.Q4_1", "Q4_1"), "lent": ((CUT, 30), "small.Q8_0", "Q8_0")}
        check_all(engine, files.reference)
        planned = json.loads(command("plan", "--json", "--home", str(engine.home)).stdout)["present"]["stages"]
        assert [stage["quantisation"] for stage in planned] == ["Q4_1", "Q8_0"]
        own = engine.status().stages[1].weights_gib
        assert planned[1]["memory_gib"]["weights"] == own > 12 / 18 * engine.status().stages[0].weights_gib
        for words in ("plan", "status"):
            shown = command(words, "--home", str(engine.home)).stdout
            assert f"small.Q8_0 (Q8_0): lent {CUT}–29" in shown, shown


def test_both_files_alone_would_answer_otherwise(files: Files) -> None:
    """Else the test above would show nothing."""
    for path in (files.served, files.named):
        alone = answers(path, ASKED[:2], TOKENS, BLOCK)
        for one, other in zip(alone, files.reference, strict=False):
            assert one.logprobs != pytest.approx(other.logprobs, abs=LOGPROB_TOLERANCE)


def test_another_model_is_refused_with_the_difference(engine: EngineProcess, files: Files, tmp_path: Path) -> None:
    hide = without(files.served.parent)
    other = g.write(tmp_path / "other.gguf", g.llama_pairs(4), g.llama_tensors(4))
    arguments = [*token_line(engine.home), "--home", str(tmp_path / "lent"), "--model", str(other)]
    told = (
        "lent cannot run layers from other.gguf in the place of small.Q4_1.gguf: "
        "llama.block_count is 30 in small.Q4_1.gguf and 4 in other.gguf"
    )
    with started(tmp_path / "log", arguments, "lent", hide) as node:
        until(lambda: told in engine.status().warnings, "the owner is told")
        until(lambda: told in node.output, "the node is told")
        assert engine.node("lent") is None and engine.status().state != "serving"
