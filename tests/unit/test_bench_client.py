"""The load client: what it reads from recorded blocks, and what it does on a real socket."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.bench import client
from dwarfstar_engine.bench.client import Answer, Ask
from dwarfstar_engine.errors import DwarfStarError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _event(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _text(text: str, finish: str | None = None) -> bytes:
    return _event({"choices": [{"text": text, "finish_reason": finish}]})


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _usage(tokens: int) -> bytes:
    return _event({"choices": [], "usage": {"completion_tokens": tokens}})


def _wire() -> h11.Connection:
    wire = h11.Connection(h11.CLIENT)
    client.request(wire, "127.0.0.1", Ask("/v1/completions", {"prompt": [1]}))
    return wire


def _answer(times: Sequence[float], tokens: int, ended: float | None = None) -> Answer:
    return Answer(0.0, tuple(times), times[-1] if ended is None else ended, tokens, "x" * len(times))


EVENTS = (_text("Hel"), _text("lo"), _text("", "length"), _usage(3), b"data: [DONE]\n\n")
WHOLE = HEAD + b"".join(map(_chunk, EVENTS)) + b"0\r\n\r\n"


def test_each_event_gets_the_time_of_the_block_that_ended_it() -> None:
    blocks = [(1.0, HEAD), *((2.0 + index, _chunk(event)) for index, event in enumerate(EVENTS)), (9.0, b"0\r\n\r\n")]
    answer = client.read(_wire(), 0.5, [*blocks, (9.5, b"")])
    assert answer == Answer(sent=0.5, times=(2.0, 3.0), ended=4.0, tokens=3, text="Hello")
    assert (answer.ttft_s, answer.tok_s, answer.gaps_s) == (1.5, 1.0, [1.0])


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=12))
def test_blocks_may_be_cut_anywhere(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(WHOLE)]
    blocks = [(float(end), WHOLE[start:end]) for start, end in itertools.pairwise(places) if end > start]
    answer = client.read(_wire(), 0.0, [*blocks, (float(len(WHOLE) + 1), b"")])
    assert (answer.text, answer.tokens, len(answer.times)) == ("Hello", 3, 2)
    assert answer.times[0] >= WHOLE.index(b"Hel"), "no event is older than its last byte"


def test_a_chat_answer_is_read_as_well() -> None:
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": None}}]},
        {"choices": [{"delta": {"content": "A"}}]},
    ]
    body = b"".join(_chunk(_event(event)) for event in events) + _chunk(_usage(1)) + b"0\r\n\r\n"
    answer = client.read(_wire(), 0.0, [(1.0, HEAD + body), (2.0, b"")])
    assert answer.text == "A" and len(answer.times) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b'HTTP/1.1 503 No\r\ncontent-length: 8\r\n\r\n{"a": 1}', 'answered 503: {"a": 1}'),
        (HEAD + _chunk(_event({"error": {"message": "a stage died"}})) + b"0\r\n\r\n", "a stage died"),
        (HEAD + _chunk(_text("x")), "cut short"),
        (HEAD + _chunk(_text("x")) + b"0\r\n\r\n", "without a count"),
    ],
)
def test_an_answer_that_failed_is_an_error_with_its_reason(said: bytes, words: str) -> None:
    with pytest.raises(DwarfStarError, match=words.replace("{", r"\{")):
        client.read(_wire(), 0.0, [(1.0, said), (2.0, b"")])


def test_streams_are_counted_while_all_of_them_run() -> None:
    slow = _answer([0.0, 1.0, 2.0, 3.0, 4.0], 5)
    late = _answer([2.0, 2.5, 3.0], 3)
    # From 2 to 3: one token of the first, two of the second.
    assert client.together_tok_s([slow, late]) == pytest.approx(3.0)


def test_an_event_of_several_tokens_counts_as_several() -> None:
    assert client.together_tok_s([_answer([0.0, 1.0, 2.0], 9)]) == pytest.approx(4.0)


def test_streams_that_never_ran_together_are_refused() -> None:
    with pytest.raises(DwarfStarError, match="same time"):
        client.together_tok_s([_answer([0.0, 1.0], 2), _answer([1.0, 2.0], 2)])


@pytest.fixture
def server() -> Iterator[tuple[int, list[bytes]]]:
    """Answers three requests: to each first HEAD and one event, then the rest."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            asked = b""
            while b'"prompt"' not in asked:
                asked += connection.recv(1 << 16)
            seen.append(asked)
            connection.sendall(HEAD + _chunk(EVENTS[0]))
            connection.sendall(b"".join(map(_chunk, EVENTS[1:])) + b"0\r\n\r\n")

    def accept() -> None:
        threads = []
        for _ in range(3):
            threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    thread = threading.Thread(target=accept)
    thread.start()
    yield listener.getsockname()[1], seen
    thread.join()
    listener.close()


def test_requests_go_together_and_a_later_one_waits_for_blocks_of_the_others(server: tuple[int, list[bytes]]) -> None:
    port, seen = server
    asks = [Ask("/v1/completions", {"prompt": [index]}, after_blocks=index // 2) for index in range(3)]
    load = client.load("127.0.0.1", port, asks)
    assert [answer.text for answer in load.answers] == ["Hello"] * 3 and load.tokens == 9
    assert b'"prompt": [2]' in seen[2], "the later one was sent last"
    first, second, later = load.answers
    assert later.sent >= max(first.times[0], second.times[0])


def test_nobody_there_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(DwarfStarError, match="does not answer"):
        client.load("127.0.0.1", port, [Ask("/", {})])
