"""What the terminal app costs, measured in a pseudo-terminal of this machine. A script plays the engine.

    python benchmarks/tui.py                 # every figure, beside its bar
    python benchmarks/tui.py --only chat
    python benchmarks/tui.py --only frozen   # with a real engine: do streams notice a terminal that stops reading?

The app runs as a process of its own, so that its processor time is its own. What it writes is read at once, counted and
thrown away. ``paint`` sends a key and takes the time until the app writes, many times.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import signal
import statistics
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import psutil

TOP = Path(__file__).resolve().parents[1]
SECONDS = 10.0
WARM_S = 4.0
KEYS = 200
KEY_GAP_S = 0.05
ANSWER_TOK_S = 100
SIZE = (50, 160)
FIRST_PAINT_S = 15.0  # it is measured up to here
FROZEN_S, FROZEN_ROUNDS, FROZEN_STREAMS = 30.0, 4, 4
STREAM_TIMEOUT_S = 60.0
READ = 1 << 16
WORDS = (
    "A",
    "**stage**",
    "holds",
    "some",
    "`layers`",
    "of the",
    "model,",
    "and passes",
    "hidden states",
    "to the next.",
)


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    value: float
    unit: str
    bar: float

    def line(self) -> str:
        verdict = "ok" if self.value <= self.bar else "OVER"
        return f"{self.name:44} {self.value:8.1f} {self.unit:8} bar {self.bar:g}  {verdict}"


# --- the process that is measured ---


def play(nodes: int) -> None:
    """The app with a script in the place of the session, at 4 Hz."""
    sys.path[:0] = [str(TOP / "tests"), str(TOP / "engine"), str(TOP)]
    from dwarfstar_tui.app import DwarfStarApp
    from dwarfstar_tui.mailbox import Mailbox
    from dwarfstar_tui.options import AppOptions
    from dwarfstar_tui.updates import AnswerPiece, Ask, Command, Linked, LinkState, StatusSeen
    from support.tui_cluster import large

    mailbox, over = Mailbox(), threading.Event()
    view = large(nodes)

    def talk(answer: int) -> None:
        at, said = time.monotonic(), 0
        while not over.wait(0.1):
            count = int((time.monotonic() - at) * ANSWER_TOK_S) - said
            text = "".join(
                WORDS[(said + index) % len(WORDS)] + ("\n\n" if (said + index) % 60 == 59 else " ")
                for index in range(count)
            )
            said += count
            now = time.monotonic()
            mailbox.put(AnswerPiece(answer, text, count, now, now))

    def submit(command: Command) -> None:
        if isinstance(command, Ask):
            threading.Thread(target=talk, args=(command.answer,), daemon=True).start()

    def live() -> None:
        """Figures that change as those of a real cluster do: a machine's with its heartbeats, one a second."""
        tick = 0
        mailbox.put(Linked(LinkState.UP, time.monotonic(), "bench:1"))

        def beat(index: int) -> int:
            return (tick + index) // 4

        while not over.wait(0.25):
            tick += 1
            machines = tuple(
                node.model_copy(
                    update={
                        "heartbeat_age_s": ((tick + index) % 4) / 4,
                        "used_gib": node.used_gib + (beat(index) % 5) / 10,
                        "load": ((beat(index) * 7 + index) % 100) / 100,
                    }
                )
                for index, node in enumerate(view.nodes)
            )
            stages = tuple(
                stage.model_copy(update={"rows_s": 18 + beat(index) % 7, "busy": (beat(index) % 10) / 10})
                for index, stage in enumerate(view.stages)
            )
            told = view.model_copy(update={"nodes": machines, "stages": stages})
            mailbox.put(StatusSeen(told, time.monotonic(), 2.0))

    options = AppOptions(home=Path("/nonexistent"), config=Path("/nonexistent"), theme="night")
    app = DwarfStarApp(options, mailbox, submit)
    threading.Thread(target=live, daemon=True).start()
    try:
        app.run()
    finally:
        over.set()


# --- the one that measures ---


class Terminal:
    """A pseudo-terminal with the app in it. A thread reads what is written."""

    def __init__(self, *arguments: str) -> None:
        self.began = time.monotonic()
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "LANG": "C.UTF-8"}
            environment.pop("NO_COLOR", None)
            os.execve(sys.executable, [sys.executable, *arguments], environment)  # noqa: S606 - no shell is wanted
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        self.bytes = 0
        self.first_at = 0.0
        self.last_at = 0.0
        self._tail = b""
        self._ended, self._reads = threading.Event(), threading.Event()
        self._reads.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._ended.is_set():
            if not self._reads.wait(0.1):
                continue
            ready, _, _ = select.select([self._fd], [], [], 0.1)
            if not ready:
                continue
            try:
                data = os.read(self._fd, READ)
            except OSError:
                return
            now = time.monotonic()
            self.bytes += len(data)
            self.last_at = now
            self._tail = (self._tail + data)[-READ:]
            if not self.first_at and b"DwarfStar" in self._tail:
                self.first_at = now

    def freeze(self) -> None:
        """Read no more."""
        self._reads.clear()

    def thaw(self) -> None:
        self._reads.set()

    def rss_mib(self) -> float:
        return float(psutil.Process(self.pid).memory_info().rss) / (1 << 20)

    def key(self, key: bytes) -> None:
        os.write(self._fd, key)

    def cpu_s(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        self.thaw()
        os.kill(self.pid, signal.SIGHUP)
        os.waitpid(self.pid, 0)
        self._ended.set()
        self._reader.join()
        os.close(self._fd)


def _script(nodes: int) -> Terminal:
    """The app with so many machines, which a script plays."""
    return Terminal(str(Path(__file__).resolve()), "--play", str(nodes))


def _over(terminal: Terminal, seconds: float = SECONDS) -> tuple[float, float]:
    """(percent of one core, bytes a second)."""
    cpu, written, at = terminal.cpu_s(), terminal.bytes, time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - at
    return (terminal.cpu_s() - cpu) / took * 100, (terminal.bytes - written) / took


def live() -> Iterator[Figure]:
    """Sixty-four machines at 4 Hz."""
    terminal = _script(64)
    time.sleep(WARM_S)
    percent, _ = _over(terminal)
    terminal.close()
    yield Figure("64 machines at 4 Hz, of one core", percent, "%", 10)


def thin() -> Iterator[Figure]:
    """Bytes with eight machines."""
    terminal = _script(8)
    time.sleep(WARM_S)
    percent, rate = _over(terminal)
    terminal.close()
    yield Figure("8 machines at 4 Hz, to the terminal", rate / 1024, "KiB/s", 20)
    yield Figure("8 machines at 4 Hz, of one core", percent, "%", 10)


def chat() -> Iterator[Figure]:
    """An answer at 100 tokens a second."""
    terminal = _script(8)
    time.sleep(WARM_S)
    terminal.key(b"3")
    time.sleep(1.0)
    terminal.key(b"go")
    time.sleep(0.3)
    terminal.key(b"\r")
    time.sleep(1.0)
    percent, _ = _over(terminal)
    terminal.close()
    yield Figure(f"chat at {ANSWER_TOK_S} tok/s, of one core", percent, "%", 40)


def paint() -> Iterator[Figure]:
    """From a key to what it changes on the screen, with sixty-four machines. A paint of the 4 Hz may come between and
    be taken for it: the median tells less than the slowest, which are what is asked for."""
    terminal = _script(64)
    time.sleep(WARM_S)
    taken = []
    for index in range(KEYS):
        quiet = time.monotonic()
        while time.monotonic() - terminal.last_at < KEY_GAP_S and time.monotonic() - quiet < 1.0:
            time.sleep(0.002)
        before, at = terminal.bytes, time.monotonic()
        terminal.key(b"\x1b[B" if index % 60 < 30 else b"\x1b[A")
        while terminal.bytes == before and time.monotonic() - at < 2.0:
            time.sleep(0.0005)
        taken.append((time.monotonic() - at) * 1000)
    terminal.close()
    taken.sort()
    yield Figure("key to paint with 64 machines, median", statistics.median(taken), "ms", 50)
    yield Figure("key to paint with 64 machines, p99", taken[int(len(taken) * 0.99) - 1], "ms", 50)


def first() -> Iterator[Figure]:
    """From the start of the process to the header on the screen."""
    taken = []
    for _ in range(5):
        terminal = _script(8)
        while not terminal.first_at and time.monotonic() - terminal.began < FIRST_PAINT_S:
            time.sleep(0.005)
        taken.append(terminal.first_at - terminal.began)
        time.sleep(1.0)
        terminal.close()
    yield Figure("first paint, median of 5 starts", statistics.median(taken), "s", 1)


class Streams:
    """So many answers that are read at once, each followed by another. A context manager."""

    def __init__(self, url: str, count: int) -> None:
        self._url, self._over = url + "/v1/completions", threading.Event()
        self._seen = [0] * count
        self._threads = [threading.Thread(target=self._run, args=(index,), daemon=True) for index in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(STREAM_TIMEOUT_S)

    def _run(self, index: int) -> None:
        with httpx.Client(timeout=STREAM_TIMEOUT_S) as client:
            while not self._over.is_set():
                prompt = f"{index + 2} ships sailed"
                body = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
                with client.stream("POST", self._url, json=body) as answer:
                    for block in answer.raise_for_status().iter_raw():
                        self._seen[index] += block.count(b"data: ")
                        if self._over.is_set():
                            break

    def tok_s(self, seconds: float) -> float:
        """Of all, from now on for so long."""
        before, at = sum(self._seen), time.monotonic()
        time.sleep(seconds)
        return (sum(self._seen) - before) / (time.monotonic() - at)


def frozen() -> Iterator[Figure]:
    """Streams of a real engine while the app's terminal reads and while it does not, in turns: machines drift."""
    sys.path[:0] = [str(TOP / "tests")]
    from support.engine_process import PROGRAM, EngineProcess

    options = ("--local-nodes", "3", "--threads", "1", "--slots", str(FROZEN_STREAMS), "--context", "2048")
    with tempfile.TemporaryDirectory() as folder, EngineProcess(Path(folder) / "home", "demo", *options) as engine:
        engine.wait_serving()
        terminal = Terminal(*PROGRAM[1:], "--home", str(engine.home))
        with Streams(engine.url, FROZEN_STREAMS) as streams:
            time.sleep(WARM_S)
            read, held, grown, cpu = [streams.tok_s(FROZEN_S)], [], [], []
            for _ in range(FROZEN_ROUNDS):
                rss, used = terminal.rss_mib(), terminal.cpu_s()
                terminal.freeze()
                held.append(streams.tok_s(FROZEN_S))
                grown.append(terminal.rss_mib() - rss)
                cpu.append((terminal.cpu_s() - used) / FROZEN_S * 100)
                terminal.thaw()
                read.append(streams.tok_s(FROZEN_S))
                print(f"  read {read[-2]:.1f}, frozen {held[-1]:.1f}, read {read[-1]:.1f} tok/s", flush=True)
        before = terminal.bytes
        time.sleep(WARM_S)
        assert terminal.bytes > before, "the app draws again"
        terminal.close()
    ratios = [one / ((a + b) / 2) for one, a, b in zip(held, read[:-1], read[1:], strict=True)]
    drift = [abs(one / ((a + b) / 2) - 1) for one, a, b in zip(read[1:-1], read[:-2], read[2:], strict=True)]
    print(f"  readings differ from those beside them by {statistics.median(drift):.0%} while nothing is frozen")
    slower = (1 - statistics.median(ratios)) * 100
    yield Figure(f"{FROZEN_STREAMS} streams slower while frozen for {FROZEN_S:.0f} s", slower, "%", 5)
    yield Figure("memory that the app grows by meanwhile, most", max(grown), "MiB", 24)
    yield Figure("what it takes of one core meanwhile", statistics.median(cpu), "%", 5)


MEASURES: dict[str, Callable[[], Iterator[Figure]]] = {
    "live": live, "thin": thin, "chat": chat, "paint": paint, "first": first, "frozen": frozen,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some of: " + ",".join(MEASURES))
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--play", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.play is not None:
        play(given.play)
        return
    figures = []
    for name in given.only.split(",") if given.only else MEASURES:
        for figure in MEASURES[name]():
            print(figure.line(), flush=True)
            figures.append({"name": figure.name, "value": figure.value, "unit": figure.unit, "bar": figure.bar})
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
