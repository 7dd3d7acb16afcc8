"""What is measured, one scenario each. The driver makes a scenario's peers take turns, run by run.

A scenario's ``run`` sends its requests to one peer and gives a value for each of its measures. All peers get the same
prompts within a run. Run 0 warms caches and is not counted; scenarios that take long go without it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dwarfstar_engine.bench import prompts as text
from dwarfstar_engine.bench.client import Answer, ApartError, Ask, Load, together_tok_s
from dwarfstar_engine.bench.peers import ALL_CORES, REFERENCE, RPC, SPLIT, SPLIT_OFF, UNSPLIT, HttpPeer, Peer
from dwarfstar_engine.bench.prompts import Prompts
from dwarfstar_engine.bench.stats import median, novelty, percentile
from dwarfstar_engine.views import StatusView

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT_TOKENS = 40
STREAMS = (1, 4, 8)
TRIES = 3  # of a shot
REST_S = 1.0  # our engine begins to read answers again when it was idle for half of it (node/dispatcher.REST_S)
REST_LOOK_S = 0.25
REST_LOAD = 0.1  # of one core; what is below it is no work for a request
REST_DEADLINE_S = 30.0
TTFT_LENGTHS = (64, 256, 700, 2000)
LONG_RUN_TOKENS = 700  # prompts from here on are measured without a warm-up
TOGETHER = 4
TOGETHER_TOKENS = 500
LONG_PROMPT = 2000
LONG_AFTER = 16  # blocks of each running stream before the long prompt comes
TURN_WORDS = 480  # about 600 tokens of the demo model
TURN_ANSWER = 64
READING_S = 2.0  # of somebody who reads that answer before the next question
SPECULATION_TOKENS = 192


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of the report. better: 1 more is better, -1 less, 0 neither (it explains others)."""

    key: str
    title: str
    unit: str
    better: int


@dataclass(slots=True)
class Lab:
    """What scenarios share. tokens: of a decode answer; status: of the engine that runs from a home.

    client_s, client_tokens: CPU time of the load client so far, and the tokens it took in. texts: (run, peer) → what
    one stream said.
    """

    prompts: Prompts
    tokens: int
    status: Callable[[Path], StatusView]
    client_s: float = 0.0
    client_tokens: int = 0
    texts: dict[tuple[int, str], str] = field(default_factory=dict)

    def load(self, peer: Peer, asks: Sequence[Ask]) -> Load:
        load = peer.load(asks)
        if load.client_s:
            self.client_s += load.client_s
            self.client_tokens += load.tokens
        return load


Shot = Callable[[Lab, Peer, int], Mapping[str, float]]  # one turn of one peer: measure's key → value


@dataclass(frozen=True, slots=True)
class Scenario:
    """prepare: makes a run's prompts, which every peer gets. peers: names of those that can take part."""

    name: str
    title: str
    measures: tuple[Measure, ...]
    peers: tuple[str, ...]
    prepare: Callable[[Lab, int], Shot]
    warm_up: bool = True


def ask(prompt: list[int], count: int, **more: Any) -> Ask:
    """A greedy completion of exactly ``count`` tokens."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, **_STREAM, **more}
    return Ask(COMPLETIONS, body)


_STREAM: dict[str, Any] = {"model": "bench", "stream": True, "stream_options": {"include_usage": True}}
_SERVERS = (UNSPLIT, RPC, SPLIT)


# --- decode ----------------------------------------------------------------------------------------------------------


def decode(streams: int, speculation: bool) -> Scenario:
    """Greedy decode of so many streams. With one, drafting ahead is off: the path of a token is what is measured."""
    key = f"decode.{streams}"
    title = f"{streams} stream{'s' * (streams > 1)}"
    measures = [Measure(key, f"decode, {title}", "tok/s", 1)]
    if streams > 1:
        measures.append(Measure(f"{key}.limit", f"{title} ÷ slowest stage's limit", "", 1))
    if streams == max(STREAMS):
        measures.append(Measure(f"{key}.head_us", f"head CPU a token, {title}", "µs", -1))

    def prepare(lab: Lab, run: int) -> Shot:
        prompts = [lab.prompts.unique(PROMPT_TOKENS) for _ in range(streams)]

        def shot(lab: Lab, peer: Peer, run: int) -> dict[str, float]:
            before = head_cpu_s(peer)
            load = lab.load(peer, [ask(prompt, lab.tokens) for prompt in prompts])
            used_s = head_cpu_s(peer) - before
            if streams == 1:
                lab.texts[(run, peer.name)] = load.answers[0].text
                return {key: load.answers[0].tok_s}
            values = {key: together_tok_s(load.answers)}
            if slowest_ms := slowest_stage_ms(lab, peer):
                values[f"{key}.limit"] = values[key] * slowest_ms / 1000
            if streams == max(STREAMS) and peer.name in (SPLIT, RPC):  # in the others the head computes, too
                values[f"{key}.head_us"] = used_s / load.tokens * 1e6
            return values

        return shot

    ours = SPLIT_OFF if streams == 1 and speculation else SPLIT
    names = (UNSPLIT, ALL_CORES, RPC, ours) if streams > 1 else (REFERENCE, UNSPLIT, ALL_CORES, RPC, ours)
    return Scenario("decode", title, tuple(measures), names, prepare)


def head_cpu_s(peer: Peer) -> float:
    """CPU time of the process that serves HTTP, without its children."""
    if not peer.head_pid:
        return 0.0
    if sys.platform == "linux":  # that process's own clock (clock_getcpuclockid); its times elsewhere count in 10 ms
        return time.clock_gettime((~peer.head_pid << 3) | 2)
    times = psutil.Process(peer.head_pid).cpu_times()
    return float(times.user + times.system)


def slowest_stage_ms(lab: Lab, peer: Peer) -> float:
    """Compute time a token of our slowest stage, as it measures itself; 0 for others' peers."""
    if not isinstance(peer, HttpPeer) or peer.home is None:
        return 0.0
    return max(stage.ms_per_token for stage in lab.status(peer.home).stages)


# --- time to first token ---------------------------------------------------------------------------------------------


def first_token(length: int) -> Scenario:
    """TTFT of one cold prompt, nothing else running."""
    key = f"ttft.{length}"

    def prepare(lab: Lab, run: int) -> Shot:
        prompt = lab.prompts.unique(length)
        return lambda lab, peer, run: {key: 1000 * lab.load(peer, [ask(prompt, 2)]).answers[0].ttft_s}

    names = (REFERENCE, UNSPLIT, RPC, SPLIT)
    measure = Measure(key, f"TTFT, {length} tokens, cold", "ms", -1)
    return Scenario("ttft", f"TTFT of {length} tokens", (measure,), names, prepare, length < LONG_RUN_TOKENS)


def first_tokens_together() -> Scenario:
    """The median TTFT of prompts that arrive at the same time."""
    key = f"ttft.{TOGETHER}x{TOGETHER_TOKENS}"

    def prepare(lab: Lab, run: int) -> Shot:
        prompts = [lab.prompts.unique(TOGETHER_TOKENS) for _ in range(TOGETHER)]

        def shot(lab: Lab, peer: Peer, run: int) -> dict[str, float]:
            answers = lab.load(peer, [ask(prompt, 2) for prompt in prompts]).answers
            return {key: 1000 * median([answer.ttft_s for answer in answers])}

        return shot

    measure = Measure(key, f"TTFT, {TOGETHER} × {TOGETHER_TOKENS} tokens at once", "ms", -1)
    return Scenario(
        "ttft", "TTFT of four prompts at once", (measure,), (UNSPLIT, ALL_CORES, RPC, SPLIT), prepare, False
    )


# --- inter-token latency ---------------------------------------------------------------------------------------------


def gaps_ms(answers: Sequence[Answer], begin: float, end: float) -> list[float]:
    """Gaps between tokens, ms, of all streams: those that lie in or reach into the time from begin to end."""
    return [
        1000 * (after - before)
        for answer in answers
        for before, after in itertools.pairwise(answer.times)
        if after > begin and before < end
    ]


def latency() -> Scenario:
    """Gaps between tokens of running streams: undisturbed, and from a long prompt's arrival to its first token.

    A server that computes the prompt in one go has one gap then, and its p99 is that gap.
    """

    def prepare(lab: Lab, run: int) -> Shot:
        quiet = [lab.prompts.unique(PROMPT_TOKENS) for _ in range(TOGETHER)]
        busy = [lab.prompts.unique(PROMPT_TOKENS) for _ in range(TOGETHER)]
        long_prompt = lab.prompts.unique(LONG_PROMPT)

        def shot(lab: Lab, peer: Peer, run: int) -> dict[str, float]:
            alone = lab.load(peer, [ask(prompt, lab.tokens) for prompt in quiet]).answers
            all_run = max(answer.times[0] for answer in alone), min(answer.ended for answer in alone)
            calm = gaps_ms(alone, *all_run)
            long_ask = Ask(COMPLETIONS, ask(long_prompt, 2).body, LONG_AFTER)
            answers = lab.load(peer, [*(ask(prompt, 2 * lab.tokens) for prompt in busy), long_ask]).answers
            stormy = gaps_ms(answers[:-1], answers[-1].sent, answers[-1].times[0])
            return {
                "itl.calm": percentile(calm, 0.99),
                "itl.busy": percentile(stormy, 0.99),
                "itl.busy.max": max(stormy),
                "itl.long": 1000 * answers[-1].ttft_s,
            }

        return shot

    measures = (
        Measure("itl.calm", f"ITL p99, {TOGETHER} streams", "ms", -1),
        Measure("itl.busy", f"ITL p99, {LONG_PROMPT} tokens arrive", "ms", -1),
        Measure("itl.busy.max", "longest ITL then", "ms", -1),
        Measure("itl.long", "TTFT of that prompt", "ms", -1),
    )
    return Scenario("itl", "gaps between tokens", measures, _SERVERS, prepare, False)


# --- second turn -----------------------------------------------------------------------------------------------------


def second_turn() -> Scenario:
    """What a chat gains from its first turn: TTFT of the second, against that of the same messages never seen."""

    def prepare(lab: Lab, run: int) -> Shot:
        def shot(lab: Lab, peer: Peer, run: int) -> dict[str, float]:
            def turn(messages: list[dict[str, Any]], count: int, cached: bool) -> Answer:
                body = {"messages": messages, "max_tokens": count, "temperature": 0, "cache_prompt": cached}
                return lab.load(peer, [Ask(CHAT, {**body, "ignore_eos": True, **_STREAM})]).answers[0]

            def second(name: str, pause_s: float) -> tuple[float, list[dict[str, Any]]]:
                first = text.chat(f"{run} {name}", TURN_WORDS, run)
                answer = turn(first, TURN_ANSWER, True)
                follow = [{"role": "assistant", "content": answer.text}, {"role": "user", "content": text.QUESTION}]
                time.sleep(pause_s)
                return turn([*first, *follow], 2, True).ttft_s, follow

            at_once_s, follow = second("warm", 0.0)
            later_s, _ = second("later", READING_S)
            cold_s = turn([*text.chat(f"{run} cold", TURN_WORDS, run), *follow], 2, False).ttft_s
            return {
                "turn.cold": 1000 * cold_s,
                "turn.warm": 1000 * at_once_s,
                "turn.ratio": at_once_s / cold_s,
                "turn.later": 1000 * later_s,
                "turn.later.ratio": later_s / cold_s,
            }

        return shot

    measures = (
        Measure("turn.cold", "TTFT of a second turn, cold", "ms", -1),
        Measure("turn.warm", "TTFT of a second turn, at once", "ms", -1),
        Measure("turn.ratio", "second turn, at once ÷ cold", "", -1),
        Measure("turn.later", f"TTFT of it, asked {READING_S:.0f} s later", "ms", -1),
        Measure("turn.later.ratio", f"second turn, {READING_S:.0f} s later ÷ cold", "", -1),
    )
    return Scenario("turn", "second turn of a chat", measures, _SERVERS, prepare, False)


# --- speculation -----------------------------------------------------------------------------------------------------


def speculation() -> Scenario:
    """One stream with drafts and without, on text that repeats itself and on text that does not."""

    def prepare(lab: Lab, run: int) -> Shot:
        copying = [*lab.prompts.unique(2), *lab.prompts.of_text(text.REPETITIVE)]
        writing = [*lab.prompts.unique(2), *lab.prompts.of_text(text.ORDINARY)]

        def shot(lab: Lab, peer: Peer, run: int) -> dict[str, float]:
            # Sampling keeps a small model from the loops that greedy text ends in.
            free = {"temperature": 0.8, "seed": run}
            repeats = lab.load(peer, [ask(copying, SPECULATION_TOKENS)]).answers[0]
            story = lab.load(peer, [ask(writing, SPECULATION_TOKENS, **free)]).answers[0]
            return {
                "speculation.repetitive": repeats.tok_s,
                "speculation.repetitive.novelty": novelty(repeats.text),
                "speculation.ordinary": story.tok_s,
                "speculation.ordinary.novelty": novelty(story.text),
            }

        return shot

    measures = (
        Measure("speculation.repetitive", "repetitive text, 1 stream", "tok/s", 1),
        Measure("speculation.repetitive.novelty", "repetitive text, zipped ÷ plain", "", 0),
        Measure("speculation.ordinary", "ordinary text, 1 stream", "tok/s", 1),
        Measure("speculation.ordinary.novelty", "ordinary text, zipped ÷ plain", "", 0),
    )
    return Scenario("speculation", "repetitive and ordinary text", measures, (UNSPLIT, RPC, SPLIT_OFF, SPLIT), prepare)


# --- all -------------------------------------------------------------------------------------------------------------

NAMES = ("decode", "ttft", "itl", "turn", "speculation")


def scenarios(only: Sequence[str], context: int, has_speculation: bool) -> Iterator[Scenario]:
    """Those wanted; all if ``only`` is empty. Prompts that the context cannot hold are left out."""
    every = [
        *(decode(streams, has_speculation) for streams in STREAMS),
        *(first_token(length) for length in TTFT_LENGTHS if length + 2 <= context),
        first_tokens_together(),
        *([latency()] if context >= LONG_PROMPT + 2 else []),
        second_turn(),
        *([speculation()] if has_speculation else []),
    ]
    yield from (scenario for scenario in every if not only or scenario.name in only)


def rest(pids: Sequence[int], deadline_s: float = REST_DEADLINE_S) -> bool:
    """Wait until processes and what they started do nothing any more; whether they came to that."""
    until = time.monotonic() + deadline_s
    time.sleep(REST_S)
    before = _cpu_s(pids)
    while time.monotonic() < until:
        time.sleep(REST_LOOK_S)
        now = _cpu_s(pids)
        if now - before < REST_LOAD * REST_LOOK_S:
            return True
        before = now
    return False


def _cpu_s(pids: Sequence[int]) -> float:
    total = 0.0
    for pid in pids:
        own = psutil.Process(pid)
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _one(shot: Shot, lab: Lab, peer: Peer, run: int, say: Callable[[str], None]) -> Mapping[str, float]:
    """A shot, again if its streams passed each other by: an hour of other figures is not to be lost for that."""
    for _ in range(TRIES - 1):
        try:
            return shot(lab, peer, run)
        except ApartError:
            say(f"{peer.name}: some streams ended before others began; once more")
    return shot(lab, peer, run)


def measure(
    scenario: Scenario, peers: Sequence[Peer], runs: int, lab: Lab, say: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Run a scenario: measure's key → peer's name → a value for each run. Raises DwarfStarError."""
    taking_part = [peer for peer in peers if peer.name in scenario.peers]
    values: dict[str, dict[str, list[float]]] = {m.key: {} for m in scenario.measures}
    for run in range(0 if scenario.warm_up else 1, runs + 1):
        say(f"{scenario.title}: run {run} of {runs}, {len(taking_part)} peers")
        shot = scenario.prepare(lab, run)
        turn = run % len(taking_part)  # who comes first changes, so nobody always follows the same peer
        for peer in [*taking_part[turn:], *taking_part[:turn]]:
            for key, value in _one(shot, lab, peer, run, say).items():
                if run:
                    values[key].setdefault(peer.name, []).append(value)
            if isinstance(peer, HttpPeer) and peer.lingers and not rest(peer.lingers):
                say(f"{peer.name} is still at work after {REST_DEADLINE_S:.0f} s: what follows is slowed by it")
    return {key: by_peer for key, by_peer in values.items() if by_peer}
