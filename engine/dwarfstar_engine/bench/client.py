"""A load client that is light, because it shares the cores with what it measures.

One thread, plain sockets, one ``select``: while answers stream in, a block of bytes and the time it came is noted and
nothing else. HTTP (h11), server-sent events and JSON are read after the last byte. What the client itself cost is part
of its result.
"""

from __future__ import annotations

import gc
import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import h11

from dwarfstar_engine.errors import DwarfStarError

SILENCE_S = 120.0  # a peer that sends nothing for so long is stuck; a long prompt on a slow core takes less
BLOCK_BYTES = 1 << 16
EVENT_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. after_blocks: it is sent once every request without this has got so many blocks of its answer."""

    path: str
    body: dict[str, Any]
    after_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. times: when each event with text came; sent, times and ended are of one clock, seconds.

    tokens: as the server counts them. An event may hold several tokens (a character that spans them, speculation).
    """

    sent: float
    times: tuple[float, ...]
    ended: float
    tokens: int
    text: str

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent

    @property
    def tok_s(self) -> float:
        """Decode speed: the tokens after the first, over the time they took."""
        return (self.tokens - 1) / (self.ended - self.times[0])

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Load:
    """What came of requests sent together. client_s: CPU time the client took while they ran."""

    answers: tuple[Answer, ...]
    client_s: float

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)


class ApartError(DwarfStarError):
    """Some stream ended before another began: then there is no rate of them together."""


@dataclass(slots=True)
class _Stream:
    ask: Ask
    socket: socket.socket
    wire: h11.Connection
    request: bytes
    sent: float = 0.0
    blocks: list[tuple[float, bytes]] = field(default_factory=list)


def load(host: str, port: int, asks: Sequence[Ask]) -> Load:
    """Send all requests at once and take in their answers. Raises DwarfStarError if one fails."""
    streams: list[_Stream] = []
    try:
        for ask in asks:
            streams.append(_connect(host, port, ask))
        gc.disable()
        before = time.thread_time()
        _take_in(streams)
        client_s = time.thread_time() - before
    except OSError as error:
        raise DwarfStarError(
            f"the peer at {host}:{port} does not answer ({error}): its log is in the bench folder"
        ) from None
    finally:
        gc.enable()
        for stream in streams:
            stream.socket.close()
    return Load(tuple(read(stream.wire, stream.sent, stream.blocks) for stream in streams), client_s)


def _connect(host: str, port: int, ask: Ask) -> _Stream:
    connection = socket.create_connection((host, port), timeout=SILENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire = h11.Connection(h11.CLIENT)
    return _Stream(ask, connection, wire, request(wire, host, ask))


def request(wire: h11.Connection, host: str, ask: Ask) -> bytes:
    """The bytes of a request. The server closes the connection behind its answer: that is the end of it."""
    body = json.dumps(ask.body).encode()
    headers = [
        ("Host", host),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    head = wire.send(h11.Request(method="POST", target=ask.path, headers=headers))
    return (head or b"") + (wire.send(h11.Data(data=body)) or b"") + (wire.send(h11.EndOfMessage()) or b"")


def _take_in(streams: Sequence[_Stream]) -> None:
    first = [stream for stream in streams if not stream.ask.after_blocks]
    later = [stream for stream in streams if stream.ask.after_blocks]
    with selectors.DefaultSelector() as selector:

        def send(stream: _Stream) -> None:
            selector.register(stream.socket, selectors.EVENT_READ, stream)
            stream.sent = time.perf_counter()
            stream.socket.sendall(stream.request)

        for stream in first:
            send(stream)
        while selector.get_map():
            ready = selector.select(SILENCE_S)
            if not ready:
                raise TimeoutError(f"nothing came for {SILENCE_S:.0f} s")
            for key, _ in ready:
                block = key.data.socket.recv(BLOCK_BYTES)
                key.data.blocks.append((time.perf_counter(), block))
                if not block:
                    selector.unregister(key.fileobj)
            if later and min(len(stream.blocks) for stream in first) >= later[0].ask.after_blocks:
                send(later.pop(0))


def read(wire: h11.Connection, sent: float, blocks: Sequence[tuple[float, bytes]]) -> Answer:
    """An answer from its blocks; the last one is empty. ``wire`` has sent the request. Raises DwarfStarError."""
    status, pending, events = 0, b"", []
    for when, block in blocks:
        wire.receive_data(block)
        try:
            while (part := wire.next_event()) not in (h11.NEED_DATA, h11.PAUSED, h11.ConnectionClosed()):
                if isinstance(part, h11.Response):
                    status = part.status_code
                elif isinstance(part, h11.Data):
                    pending += bytes(part.data)
        except h11.RemoteProtocolError as error:
            raise DwarfStarError(f"the answer was cut short ({error}): see the log of the peer") from None
        if status == 200:
            *whole, pending = pending.split(EVENT_END)
            events += [(when, json.loads(event[6:])) for event in whole if event.startswith(b"data: {")]
    if status != 200:
        raise DwarfStarError(f"the peer answered {status}: {pending[:500].decode('utf-8', 'replace')}")
    return _answer(sent, events)


def _answer(sent: float, events: Sequence[tuple[float, dict[str, Any]]]) -> Answer:
    times, texts, ended, tokens = [], [], 0.0, 0
    for when, event in events:
        if "error" in event:
            raise DwarfStarError(f"the peer failed: {event['error'].get('message', event['error'])}")
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event.get("choices", ()):
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if text:
                times.append(when)
                texts.append(text)
            if text or choice.get("finish_reason"):
                ended = when
    if not times or not tokens:
        raise DwarfStarError("an answer came without text or without a count of tokens: see the log of the peer")
    return Answer(sent, tuple(times), ended, tokens, "".join(texts))


def together_tok_s(answers: Sequence[Answer]) -> float:
    """Tokens a second of all streams together, over the time in which every one of them runs.

    From the first token of the last to begin to the last token of the first to end: the tail, in which fewer run,
    would measure something else. Events are counted and scaled to tokens.
    """
    begin = max(answer.times[0] for answer in answers)
    end = min(answer.ended for answer in answers)
    if end <= begin:
        raise ApartError("the streams did not run at the same time: ask for more --tokens")
    count = 0.0
    for answer in answers:
        inside = sum(begin < when <= end for when in answer.times)
        count += inside * (answer.tokens - 1) / max(len(answer.times) - 1, 1)
    return count / (end - begin)
