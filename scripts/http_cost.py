"""What HTTP costs the engine's process for each streamed token: ``python scripts/http_cost.py``.

An engine that only has a clock puts tokens into N streams at R tokens a second each, out of step, as a pipeline does.
The server is the real one, its client another process on loopback. CPU time of this process (user and system) is
counted while all streams run; so is that of the same clock with nobody listening, which is taken off. The two
alternate, and the medians are told. Slow streams show what a token costs with cold caches, fast ones (``--rate 300``)
with warm.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import uvloop

from dwarfstar_engine.api.app import create_app
from dwarfstar_engine.api.server import http_server
from dwarfstar_engine.errors import DwarfStarError
from dwarfstar_engine.serving import ModelInfo, Request, Sampling, Sink, Token

PIECES = (b" the", b" quick", b" brown", b" fox", b" jumps", b" over", b".", " café".encode())
WARM_UP = 5  # tokens of the last stream to begin that are not counted
CLIENT = r"""
import selectors, socket, sys
body = b'{"prompt": "a", "stream": true, "max_tokens": 1000000}'
with selectors.DefaultSelector() as reading:
    for _ in range(int(sys.argv[2])):
        stream = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        stream.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        reading.register(stream, selectors.EVENT_READ)
    while reading.get_map():
        for key, _ in reading.select():
            if not key.fileobj.recv(65536):
                reading.unregister(key.fileobj)
"""


class Clock:
    """An Engine. Every generation goes on until it is cancelled."""

    def __init__(self, streams: int, rate: float) -> None:
        self.streams, self.period_s = streams, 1 / rate
        self.begun = self.tokens = 0
        self.warm = asyncio.Event()  # all streams run

    async def settled(self) -> None:
        return None

    def model(self) -> ModelInfo:
        return ModelInfo("clock", 0, 1 << 20, len(PIECES), 1, frozenset())

    def health(self) -> Mapping[str, Any]:
        return {"status": "ok"}

    async def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return [0]

    async def text_tokens(self, text: str) -> list[int]:
        return [0]

    def token_bytes(self, token: int) -> bytes:
        return PIECES[token]

    def generate(self, request: Request, sink: Sink) -> Ticking:
        self.begun += 1
        if self.begun == self.streams:
            asyncio.get_running_loop().call_later(WARM_UP * self.period_s, self.warm.set)
        return Ticking(self, sink, self.begun / self.streams * self.period_s)


class Ticking:
    def __init__(self, clock: Clock, sink: Sink, phase_s: float) -> None:
        self._clock, self._sink = clock, sink
        self._loop = asyncio.get_running_loop()
        self._at = self._loop.time() + phase_s
        self._next = self._loop.call_at(self._at, self._tick)

    def _tick(self) -> None:
        self._clock.tokens += 1
        self._at += self._clock.period_s
        self._next = self._loop.call_at(self._at, self._tick)
        self._sink.put(Token(self._clock.tokens % len(PIECES)))

    def cancel(self) -> None:
        self._next.cancel()


class Nobody:
    def put(self, token: Token) -> None:
        pass

    def fail(self, error: DwarfStarError) -> None:
        raise error


async def cost_us(clock: Clock, seconds: float) -> float:
    """CPU time of this process for each token of ``clock``, once all its streams run."""
    await clock.warm.wait()
    before, tokens = time.process_time(), clock.tokens
    await asyncio.sleep(seconds)
    return (time.process_time() - before) * 1e6 / (clock.tokens - tokens)


async def unheard(clock: Clock, seconds: float) -> float:
    ticking = [clock.generate(Request((0,), Sampling()), Nobody()) for _ in range(clock.streams)]
    cost = await cost_us(clock, seconds)
    for generation in ticking:
        generation.cancel()
    return cost


async def served(clock: Clock, seconds: float) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = http_server(create_app(clock))
        serving = asyncio.create_task(server.serve([listener]))
        port = listener.getsockname()[1]
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, str(port), str(clock.streams))
        cost = await cost_us(clock, seconds)
        client.kill()
        await client.wait()
        server.should_exit = True
        await serving
    return cost


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rate", type=float, default=35.0, help="tokens a second of one stream")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    alone, http = [], []
    for _ in range(given.repeat):
        alone.append(await unheard(Clock(given.streams, given.rate), given.seconds))
        http.append(await served(Clock(given.streams, given.rate), given.seconds))
    base, whole = statistics.median(alone), statistics.median(http)
    print(f"{whole:.1f} µs of CPU a token, {base:.1f} µs of it the clock's: HTTP takes {whole - base:.1f} µs")


if __name__ == "__main__":
    uvloop.run(main())
