"""Faults on real processes under a crowd of requests: is every answer whole and right, does nothing hang or leak?

Each request of a pool is first run undisturbed. Then ``STREAMS`` clients ask for them again and again, some leave in
the middle, while processes are killed and stopped and links cut (``faults``). Every request must end once: with the
undisturbed text; or, having been carried over MAX_RESCUES times, with an error that says so; or, where the engine
itself was stopped for longer than its lease, which ends its term, with an error that asks to send it again.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from dwarfstar_engine.bench import faults
from dwarfstar_engine.bench.faults import Fault, Kind, Strike
from dwarfstar_engine.bench.machines import Machine, signalled
from dwarfstar_engine.bench.soak import WORDS
from dwarfstar_engine.cluster import lease
from dwarfstar_engine.node.streams import MAX_RESCUES

STREAMS = 8
DEADLINE_S = 180.0  # of a request: the engine gives up a stream that waits for 60 s
SETTLE_S = 120.0  # after the last fault, until all nodes serve again
SAMPLE_S = 0.5
PATIENCE_S = 20.0  # before the next strike, whatever became of the last one
MEMORY_SHARE, MEMORY_BYTES = 0.05, 8 << 20  # growth that is no leak: of the first third, and absolute
FILES = 8  # open files likewise
KIND_CHARS = 80  # what begins like this, but for its figures, is told once
LOG_LINES = 60  # of all machines together for each fault: an epoch is told in some ten lines, and breaks twice or so
TEXT = "/v1/completions"
EARLY = "the pipeline broke during this request"  # of the error after MAX_RESCUES
LATE, LATE_S = "the pipeline was not back in", 60.0  # of the error after rescue_s
TIMINGS = lease.Timings()
SPENT_S = TIMINGS.lease_s - TIMINGS.renew_s  # a process that was stopped for so long may have lost its lease
OVER = ("send the request again", "longer than its lease", "the model is not being served")
REFUSED_S = 0.2  # until who was refused asks again
SLACK_S = 15.0  # a fault's effect may last so long


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the undisturbed answer."""

    body: dict[str, Any]
    text: str = ""
    finish: str = ""


@dataclass(slots=True)
class Tally:
    """What was seen. times: at which any client got something. struck: strikes, with their names. woken: when the
    engine's process, stopped for as long as a lease, went on."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    struck: list[tuple[float, str]] = field(default_factory=list)
    woken: list[float] = field(default_factory=list)
    faults: int = 0
    missed: int = 0  # faults that found no process
    samples: dict[str, list[float]] = field(default_factory=dict)
    ended: float = 0.0

    def problem(self, what: str) -> None:
        self.outcomes["WRONG"] += 1
        self.wrong.append(what)


def pool(rng: random.Random, count: int, longest: int) -> list[dict[str, Any]]:
    """``count`` requests of all kinds: greedy, seeded, with penalties, with logprobs; streaming and not."""
    bodies = []
    for number in range(count):
        text = f"{' '.join(rng.choices(WORDS, k=rng.choice([3, 12, 40])))} {number}:"
        kinds: tuple[dict[str, Any], ...] = (
            {"temperature": 0},
            {"temperature": 0.9, "seed": rng.randrange(1 << 40)},
            {"temperature": 0, "frequency_penalty": 0.6, "presence_penalty": 0.4},
            {"temperature": 0.8, "seed": rng.randrange(1 << 30), "repeat_penalty": 1.3, "logprobs": 2},
        )
        bodies.append(
            {
                "model": "any",
                "prompt": text,
                "max_tokens": rng.choice([longest // 4, longest // 2, longest]),
                "ignore_eos": True,
                "stream": rng.random() < 0.7,
                **kinds[number % len(kinds)],
            }
        )
    return bodies


async def undisturbed(client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]]) -> list[Asked]:
    """The answers as they should be."""
    asked = []
    for body in bodies:
        answer = (await client.post(TEXT, json={**body, "stream": False})).raise_for_status().json()
        choice = answer["choices"][0]
        asked.append(Asked(body, choice["text"], choice["finish_reason"]))
    return asked


class Client:
    """Asks for one thing after the other until ``stop`` is set."""

    def __init__(self, http: httpx.AsyncClient, asked: Sequence[Asked], rng: random.Random, tally: Tally) -> None:
        self._http, self._asked, self._rng, self._tally = http, asked, rng, tally

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            asked = self._rng.choice(self._asked)
            leave = self._rng.randint(1, 20) if asked.body["stream"] and self._rng.random() < 0.2 else 0
            began = time.monotonic()
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await (self._stream(asked, leave, began) if asked.body["stream"] else self._plain(asked, began))
            except TimeoutError:
                self._tally.problem(f"no end within {DEADLINE_S:.0f} s: {asked.body}")
            except (httpx.HTTPError, ValueError) as error:
                self._tally.problem(f"broken answer: {type(error).__name__} {error}")
                await asyncio.sleep(REFUSED_S)

    async def _plain(self, asked: Asked, began: float) -> None:
        answer = await self._http.post(TEXT, json=asked.body)
        self._tally.times.append(time.monotonic())
        said = answer.json()
        if answer.status_code != 200:
            self._refused(said["error"], began)
            await asyncio.sleep(REFUSED_S)
            return
        choice = said["choices"][0]
        if asked.body.get("logprobs") and len(choice["logprobs"]["tokens"]) != said["usage"]["completion_tokens"]:
            self._tally.problem("tokens without log probabilities")
        self._whole(asked, choice["text"], [choice["finish_reason"]])

    async def _stream(self, asked: Asked, leave: int, began: float) -> None:
        text, finishes, done, events = "", [], 0, 0
        async with self._http.stream("POST", TEXT, json=asked.body) as answer:
            if answer.status_code != 200:
                self._refused(json.loads(await answer.aread())["error"], began)
                await asyncio.sleep(REFUSED_S)
                return
            async for line in answer.aiter_lines():
                done += line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                self._tally.times.append(time.monotonic())
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self._prefix(asked, text)
                    self._refused(event["error"], began)
                    return
                for choice in event["choices"]:
                    text += choice["text"]
                    finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
                events += 1
                if leave and events >= leave:
                    self._prefix(asked, text)
                    self._tally.outcomes["left by the client"] += 1
                    return
        if done != 1:
            self._tally.problem(f"the stream ended {done} times")
        else:
            self._whole(asked, text, finishes)

    def _prefix(self, asked: Asked, text: str) -> None:
        if not asked.text.startswith(text):
            self._tally.problem(f"wanted {asked.text!r}, so far {text!r}: {asked.body}")

    def _whole(self, asked: Asked, text: str, finishes: list[str]) -> None:
        if (text, finishes) == (asked.text, [asked.finish]):
            self._tally.outcomes["whole"] += 1
        else:
            self._tally.problem(f"wanted {asked.text!r}, got {text!r} {finishes}: {asked.body}")

    def _silent_s(self) -> float:
        return time.monotonic() - (self._tally.times[-1] if self._tally.times else 0.0)

    def _refused(self, error: dict[str, Any], began: float) -> None:
        struck = len(self._tally.struck) - bisect.bisect(self._tally.struck, (began - SLACK_S, ""))
        if error["message"].startswith(EARLY) and struck > MAX_RESCUES:
            self._tally.outcomes["given up"] += 1
        elif error["message"].startswith(LATE) and self._silent_s() >= LATE_S:
            self._tally.outcomes["waited too long"] += 1
        elif any(words in error["message"] for words in OVER) and any(
            0 <= time.monotonic() - at <= SLACK_S for at in self._tally.woken
        ):
            self._tally.outcomes["ended with the engine's term"] += 1
        else:
            self._tally.problem(f"after {struck} strikes in {time.monotonic() - began:.1f} s: {error['message']}")


class Striker:
    """Carries faults out. A node is struck by one at a time."""

    def __init__(self, http: httpx.AsyncClient, machines: Sequence[Machine], tally: Tally) -> None:
        self._http, self._machines, self._tally = http, machines, tally
        self._struck = [asyncio.Lock() for _ in machines]
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, strikes: Sequence[Strike], limit_s: float) -> None:
        """All strikes, or those that begin within ``limit_s``; and until the last one's effect is taken back."""
        end = time.monotonic() + limit_s
        for strike in strikes:
            if time.monotonic() > end:
                break
            if strike.patient:
                await self._served()
            await asyncio.sleep(strike.pause_s)
            for fault in strike.faults:
                await self._struck[fault.node].acquire()
            self._tally.struck.append((time.monotonic(), strike.name))
            self._tally.faults += len(strike.faults)
            for fault in strike.faults:
                self._tasks.append(asyncio.create_task(self._one(fault)))
            self._tasks = [task for task in self._tasks if not task.done() or task.exception()]
        await asyncio.gather(*self._tasks)

    async def _served(self) -> None:
        """Until the model is served, or for PATIENCE_S."""
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(PATIENCE_S):
                while (await self._http.get("/health")).status_code != 200:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.1)

    async def _one(self, fault: Fault) -> None:
        try:
            self._tally.missed += not await self._carry_out(fault, self._machines[fault.node])
        finally:
            self._struck[fault.node].release()

    async def _carry_out(self, fault: Fault, machine: Machine) -> bool:
        """Whether there was something to strike."""
        match fault.kind:
            case Kind.KILL_STAGE | Kind.STOP_STAGE:
                stages = await asyncio.to_thread(machine.stages)
                if not stages:
                    return False
                if fault.kind is Kind.KILL_STAGE:
                    return signalled(stages[0], signal.SIGKILL)
                return await _hold(stages[0], fault.hold_s)
            case Kind.STOP_NODE | Kind.STOP_ENGINE:
                found = await _hold(await asyncio.to_thread(lambda: machine.pid), fault.hold_s)
                if fault.kind is Kind.STOP_ENGINE and fault.hold_s >= SPENT_S:
                    self._tally.woken.append(time.monotonic())
                return found
            case Kind.KILL_NODE | Kind.RESTART:
                number = signal.SIGKILL if fault.kind is Kind.KILL_NODE else signal.SIGTERM
                found = signalled(await asyncio.to_thread(lambda: machine.pid), number)
                await asyncio.to_thread(machine.wait)
                await asyncio.sleep(fault.hold_s / 2)
                await asyncio.to_thread(machine.start)
                return found
            case Kind.CUT:
                await asyncio.to_thread(machine.host.link, up=False)
                await asyncio.sleep(fault.hold_s)
                await asyncio.to_thread(machine.host.link, up=True)
            case Kind.DEAF:
                others = [one.host.address for one in self._machines if one is not machine]
                await asyncio.to_thread(machine.host.deaf, others, on=True)
                await asyncio.sleep(fault.hold_s)
                await asyncio.to_thread(machine.host.deaf, others, on=False)
        return True


async def _hold(pid: int, hold_s: float) -> bool:
    if not signalled(pid, signal.SIGSTOP):
        return False
    await asyncio.sleep(hold_s)
    signalled(pid, signal.SIGCONT)
    return True


async def watch(machines: Sequence[Machine], tally: Tally) -> None:
    """Memory and open files of the engine's process and of the daemons, for as long as it runs."""
    while True:
        seen = await asyncio.to_thread(lambda: [_look(machine) for machine in machines])
        for what, figure in (("memory", 0), ("files", 1)):
            daemons = [look[figure] for look in seen[1:] if look is not None]
            if seen[0] is not None:
                tally.samples.setdefault(f"{what} of the engine", []).append(seen[0][figure])
            if daemons:
                tally.samples.setdefault(f"{what} of a daemon", []).append(sum(daemons) / len(daemons))
        await asyncio.sleep(SAMPLE_S)


def _look(machine: Machine) -> tuple[float, float] | None:
    try:
        process = psutil.Process(machine.pid)
        return process.memory_info().rss, process.num_fds()
    except psutil.Error:
        return None


async def run(
    machines: Sequence[Machine],
    url: str,
    strikes: Sequence[Strike],
    seed: int,
    *,
    requests: int,
    longest: int,
    limit_s: float,
) -> Tally:
    """The whole run against an engine that serves. ``machines``: the engine's first. requests: different ones. longest:
    tokens of an answer. limit_s: no strike begins later."""
    tally, rng = Tally(), random.Random(seed)
    # A connection each: a server that was stopped closes idle ones when it wakes, also under a request just sent.
    limits = httpx.Limits(max_connections=STREAMS + 1, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, limits=limits) as http:
        asked = await undisturbed(http, pool(rng, requests, longest))
        stop = asyncio.Event()
        clients = [Client(http, asked, random.Random(rng.random()), tally) for _ in range(STREAMS)]
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch(machines, tally))
            crowd = [group.create_task(client.run(stop)) for client in clients]
            await Striker(http, machines, tally).run(strikes, limit_s)
            tally.ended = time.monotonic()
            stop.set()
            await asyncio.wait(crowd)
            watcher.cancel()
        await asyncio.to_thread(settled, machines, tally)
    return tally


def settled(machines: Sequence[Machine], tally: Tally) -> None:
    """Until all nodes serve again and nothing is left of any request."""
    deadline, seen = time.monotonic() + SETTLE_S, ""
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            status = json.loads(machines[0].ask("status", "--json"))
            stages, busy = len(status["stages"]), status["throughput"]["active"] + status["throughput"]["queued"]
            seen = f"{status['state']} over {stages} stages, {busy} requests, {status['reason']}"
            joined = sum(node["state"] == "joined" for node in status["nodes"])
            tidy = all(machine.tidy() for machine in machines[1:])  # what a switch left is given back soon
            if status["state"] == "serving" and stages == joined >= len(machines) - 1 and not busy and tidy:
                break
        time.sleep(0.5)
    else:
        tally.problem(f"it did not settle: {seen}")
    for machine in machines[1:]:
        if not machine.tidy():
            tally.problem(f"{machine.name} has the processes {machine.family()}: not a daemon and a stage")


def check(machines: Sequence[Machine], tally: Tally) -> None:
    """After all commands were ended: nothing is left, nothing grew, and logs can be read."""
    for machine in machines:
        if left := machine.leftovers():
            tally.problem(f"{machine.name} left the processes {left}")
    for what, samples in tally.samples.items():
        memory = what.startswith("memory")
        first, last, grew = faults.grown(samples, MEMORY_SHARE if memory else 0.0, MEMORY_BYTES if memory else FILES)
        if grew:
            tally.problem(f"{what} grew from {first:.0f} to {last:.0f}")
    lines = log_lines(machines)
    if lines > LOG_LINES * (len(tally.struck) + 10):  # starting and ending are told as well
        tally.problem(f"{lines} lines of logs for {len(tally.struck)} strikes")


def log_lines(machines: Sequence[Machine]) -> int:
    """Of all machines."""
    return sum(machine.log.read_bytes().count(b"\n") for machine in machines if machine.log.exists())


def report(tally: Tally, seed: int, lines: int) -> str:
    """For people."""
    text = [
        f"seed {seed}: {tally.faults} faults in {len(tally.struck)} strikes, {tally.missed} found nothing to strike",
        "",
    ]
    text += [faults.table(faults.stalls(tally.struck, tally.times, tally.ended)), ""]
    pauses = ", ".join(f"{gap:.1f}" for gap in faults.silences(tally.times, tally.ended)[:5])
    text += [f"longest silences of all streams, whatever struck meanwhile: {pauses} s"]
    text += [f"requests: {', '.join(f'{count} {what}' for what, count in sorted(tally.outcomes.items()))}"]
    for what, samples in tally.samples.items():
        first, last, _ = faults.grown(samples, 0, 0)
        shown = (f"{value / 2**20:.1f} MiB" if what.startswith("memory") else f"{value:.0f}" for value in (first, last))
        text.append(f"{what}: {' in the first third, '.join(shown)} in the last")
    text.append(f"log lines: {lines}")
    text.append(f"wrong: {len(tally.wrong)}")
    kinds: dict[str, list[str]] = {}
    for problem in tally.wrong:
        kinds.setdefault(re.sub(r"\d+", "N", problem)[:KIND_CHARS], []).append(problem)
    text += [f"  {len(alike)} ×: {alike[0][:600]}" for alike in list(kinds.values())[:20]]
    return "\n".join(text)
