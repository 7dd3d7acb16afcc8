"""``dwarfstar bench``: one stream, unsplit against split, in one run, alternating.

The unsplit model runs on llama.cpp's own loader in one process on one core; the split one is a whole DwarfStar
(coordinator, node daemons, stages, HTTP) with each stage pinned to a core of its own. Both generate greedily from the
same prompts. Machines drift: medians of the runs and their ratio are what is meant to be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.node.child import Child
from dwarfstar_engine.node.source import find_model

WHOLE = "dwarfstar_engine.stage.whole"
START_DEADLINE_S = 120.0
READ_S = 120.0  # for the first token of a long prompt
MAX_LINE_BYTES = 1 << 16  # an event of one token has a few hundred
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and a storm.",
    "List the planets of the solar system with one fact about each.",
    "Describe how bread is made, step by step, for a child.",
    "What should a traveller see in a small harbour town?",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One answer. tok_s: of decode, from the first token to the last. ttft_s: to the first token."""

    tok_s: float
    ttft_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome; ratios are split ÷ unsplit of the medians. stage_ms: compute per token of each stage."""

    model: str
    stages: int
    cuts: list[int]
    unsplit: list[Run]
    split: list[Run]
    same_text: bool
    stage_ms: list[float]

    @property
    def unsplit_tok_s(self) -> float:
        return statistics.median(run.tok_s for run in self.unsplit)

    @property
    def split_tok_s(self) -> float:
        return statistics.median(run.tok_s for run in self.split)

    @property
    def ratio(self) -> float:
        return self.split_tok_s / self.unsplit_tok_s

    def as_json(self) -> dict[str, Any]:
        medians = {"unsplit_tok_s": self.unsplit_tok_s, "split_tok_s": self.split_tok_s, "ratio": self.ratio}
        return {**asdict(self), "median": medians}


class Unsplit:
    """The reference process."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._child = Child(WHOLE, self._events.put_nowait, lambda status: self._events.put_nowait({"event": "gone"}))

    async def start(self, path: Path, cpus: Sequence[int]) -> None:
        await self._child.start()
        self._child.send(path=str(path), cpus=list(cpus), context=4096, threads=1)
        await self._next("ready")

    async def _next(self, wanted: str) -> dict[str, Any]:
        event = await asyncio.wait_for(self._events.get(), START_DEADLINE_S)
        if event["event"] != wanted:
            raise DwarfStarError("the unsplit model failed: " + " ".join(self._child.last_words[-2:]))
        return event

    async def generate(self, prompt: list[int], count: int) -> tuple[list[int], Run]:
        self._child.send(prompt=prompt, count=count)
        event = await self._next("generated")
        times = event["times"]
        return event["tokens"], Run((count - 1) / (times[-1] - times[0]), times[0], count)

    async def stop(self) -> None:
        await self._child.stop()


@contextlib.asynccontextmanager
async def cluster(path: Path, nodes: int, cuts: Sequence[int], home: Path) -> AsyncIterator[str]:
    """A DwarfStar of its own on this machine, headless; gives its API's URL."""
    arguments = ["--serve", str(path), "--home", str(home), "--port", "0", "--control-port", "0"]
    arguments += ["--local-nodes", str(nodes), "--threads", "1", "--pin"]
    if cuts:
        arguments += ["--cuts", ",".join(map(str, cuts))]
    log = (home / "bench.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "dwarfstar_engine.cli.main",
        *arguments,
        stdout=log,
        stderr=log,
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        yield await _until_serving(home, process)
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 15.0)
        log.close()


async def _until_serving(home: Path, process: asyncio.subprocess.Process) -> str:
    deadline = time.monotonic() + START_DEADLINE_S
    async with httpx.AsyncClient(timeout=5.0) as client:
        while time.monotonic() < deadline and process.returncode is None:
            with contextlib.suppress(OSError, ValueError, httpx.HTTPError):
                url = str(json.loads((home / "run" / "engine.json").read_text())["api_url"])
                if (await client.get(f"{url}/health")).status_code == 200:
                    return url
            await asyncio.sleep(0.1)
    raise DwarfStarError(
        "the split model did not come up: " + (home / "bench.log").read_text("utf-8", "replace")[-2000:]
    )


def split_run(url: str, prompt: list[int], count: int) -> tuple[str, Run]:
    """One greedy answer over HTTP. Lines are only noted while they come: the client shares the stages' cores."""
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    lines, times = [], []
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=READ_S)
    with contextlib.closing(connection):
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while line := answer.readline(MAX_LINE_BYTES):
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - started)
                lines.append(line)
            elif answer.status != 200:
                raise DwarfStarError(line.decode("utf-8", "replace"))
    events = [json.loads(line[6:]) for line in lines]
    for event in events:
        if "error" in event:
            raise DwarfStarError(event["error"]["message"])
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    # Chunks and tokens differ where a character spans tokens; the span of time is the same.
    return text, Run((count - 1) / (times[-1] - times[0]), times[0], count)


async def bench(model: str, models: Path, *, nodes: int, cuts: Sequence[int], runs: int, tokens: int) -> Report:
    """Measure. ``runs`` pairs after one warm-up, ``tokens`` each. Raises DwarfStarError."""
    path = find_model(model, models)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    unsplit = Unsplit()
    with tempfile.TemporaryDirectory(prefix="dwarfstar-bench-") as folder:
        async with cluster(path, nodes, cuts, Path(folder)) as url, httpx.AsyncClient(timeout=120.0) as client:
            await unsplit.start(path, cores[:1])
            try:
                whole_runs, split_runs, same = [], [], True
                for index in range(runs + 1):
                    text = PROMPTS[index % len(PROMPTS)]
                    prompt = list((await client.post(f"{url}/tokenize", json={"content": text})).json()["tokens"])
                    ids, whole = await unsplit.generate(prompt, tokens)
                    answer, split = await asyncio.to_thread(split_run, url, prompt, tokens)
                    pieces = await client.post(f"{url}/detokenize", json={"tokens": ids})
                    same = same and pieces.json()["content"] == answer
                    if index:  # the first pair warms caches
                        whole_runs.append(whole)
                        split_runs.append(split)
                view = await asyncio.to_thread(remote.status, running.require(Path(folder)), Path(folder))
            finally:
                await unsplit.stop()
    cut_at = [stage.layers[1] for stage in view.stages[:-1]]
    return Report(path.stem, nodes, cut_at, whole_runs, split_runs, same, [stage.ms_per_token for stage in view.stages])


def table(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.model}: one stream, greedy, {len(report.split)} runs of {report.split[0].tokens} tokens, medians",
        "",
        f"{'':34}{'tok/s':>9}{'TTFT ms':>10}",
    ]
    for name, runs in (("unsplit, llama.cpp, 1 core", report.unsplit), (_split_name(report), report.split)):
        ttft = statistics.median(run.ttft_s for run in runs) * 1000
        lines.append(f"{name:34}{statistics.median(run.tok_s for run in runs):9.1f}{ttft:10.0f}")
    lines += [
        "",
        f"split ÷ unsplit: {report.ratio:.3f}",
        _where(report),
        "texts: " + ("equal" if report.same_text else "DIFFERENT"),
    ]
    return "\n".join(lines)


def _where(report: Report) -> str:
    """Where the time of a token of the split goes."""
    token_ms, compute = 1000 / report.split_tok_s, sum(report.stage_ms)
    stages = " + ".join(f"{ms:.2f}" for ms in report.stage_ms)
    return f"a token of the split: {token_ms:.2f} ms = compute {stages}, hops and the rest {token_ms - compute:.2f}"


def _split_name(report: Report) -> str:
    cuts = f", cut at {','.join(map(str, report.cuts))}" if report.cuts else ""
    return f"{report.stages} stages × 1 core{cuts}"
