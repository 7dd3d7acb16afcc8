"""Outsiders at every port while the cluster serves: refused, named once, and no request notices.

Each kind of outsider comes from a loopback address of its own, 127.0.0.x, which is what the log names it by. On systems
with one loopback address only, these tests are skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from dwarfstar_engine.cli import running
from dwarfstar_engine.stage import toy
from dwarfstar_engine.wire import channel, trust
from dwarfstar_engine.wire.door import GRACE_S, LATE_LOOK_S
from dwarfstar_engine.wire.enrol import WRONG_FREE
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import ControlStub, EnrolmentStub
from dwarfstar_engine.wire.trust import JoinToken, NodeFiles
from support.engine_process import DEADLINE_S, EngineProcess, command, until

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="one loopback address only"),
]

LAYERS = 8
CROWD = 1000
CALL_S = 10.0
RETURNS = 8  # of a stranger that was not named


class Traffic:
    """Requests one after the other, each answer compared. Ends with an assertion if one was wrong."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine, self._over = engine, threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic")
        self.answered, self.faults = 0, list[str]()

    def _run(self) -> None:
        for number in itertools.count():
            if self._over.is_set():
                return
            prompt = f"request {number}"
            try:
                answer = self._engine.post("/v1/completions", {"prompt": prompt, "max_tokens": 20, "temperature": 0})
                text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
            except Exception as error:  # anything at all is a fault
                text = repr(error)
            if text != bytes(toy.expected(prompt.encode(), 20, LAYERS)).decode():
                self.faults.append(text)
            self.answered += 1

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive() and self.faults == [] and self.answered > 0

    def goes_on(self) -> None:
        """Until two more requests were answered."""
        before = self.answered
        until(lambda: self.answered >= before + 2, "requests are answered")


@dataclass
class Ports:
    """Where the cluster listens."""

    control: str
    join: str
    stage: str

    def all(self) -> tuple[str, str, str]:
        return self.control, self.join, self.stage


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("outsiders") / "home"
    with EngineProcess(home, f"toy:{LAYERS}", "--local-nodes", "2") as running_engine:
        yield running_engine.wait_serving()


@pytest.fixture
def ports(engine: EngineProcess) -> Ports:
    found = running.require(engine.home)
    stage = psutil.Process(engine.stage(0).pid).net_connections("tcp")
    listening = [c.laddr for c in stage if c.status == psutil.CONN_LISTEN]
    return Ports(found.control, found.join, f"127.0.0.1:{listening[0].port}")


def dial(address: str, source: str) -> socket.socket:
    """A connection from a loopback address."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), CALL_S, source_address=(source, 0))


@contextlib.contextmanager
def through(address: str, source: str) -> Iterator[str]:
    """An address that leads to another one from ``source``: gRPC's channels cannot choose where they come from."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = [listener]

    def copy(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = dial(address, source)
                far.settimeout(None)
                open_sockets.extend((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for one in open_sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def raw_call(link: grpc.Channel, method: str, data: bytes) -> bytes:
    """Call a method with bytes, whatever they are."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = link.unary_unary(method)
    return call(data, timeout=CALL_S)


def said_of(engine: EngineProcess, source: str) -> list[str]:
    return [line for line in engine.output.splitlines() if re.search(rf" {source}(:| join:)", line)]


def named_once(engine: EngineProcess, source: str, port_kinds: int = 1) -> None:
    """A line for each of our two ports where it was, and no more."""
    until(lambda: len(said_of(engine, source)) >= port_kinds, f"{source} is named", DEADLINE_S + GRACE_S)
    assert len(said_of(engine, source)) == port_kinds, said_of(engine, source)


def closed(connection: socket.socket) -> bool:
    """Whether the other side ends the connection within its bounds."""
    connection.settimeout(DEADLINE_S)
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


GARBAGE: dict[str, bytes] = {
    "127.0.0.21": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "127.0.0.22": os.urandom(4096),
    "127.0.0.23": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",  # gRPC in plain
    "127.0.0.24": b"\x16\x03\x01\xff\xff" + b"\0" * 70_000,  # a TLS record that is too long
}


def test_bytes_that_are_no_tls(engine: EngineProcess, ports: Ports) -> None:
    with Traffic(engine) as traffic:
        for source, data in GARBAGE.items():
            for address in ports.all():
                for _ in range(5):
                    with dial(address, source) as connection:
                        with contextlib.suppress(OSError):  # it may be closed while we send
                            connection.sendall(data)
                        assert closed(connection)
        for source in GARBAGE:
            named_once(engine, source, port_kinds=2)
        traffic.goes_on()


def test_a_thousand_idle_connections_at_each_port(engine: EngineProcess, ports: Ports) -> None:
    source = "127.0.0.31"
    with Traffic(engine) as traffic:
        for address in ports.all():
            with contextlib.ExitStack() as stack:
                crowd = [stack.enter_context(dial(address, source)) for _ in range(CROWD)]
                traffic.goes_on()
                assert command("status", "--home", str(engine.home)).returncode == 0, "members get in meanwhile"
                assert all(closed(connection) for connection in crowd)
        named_once(engine, source, port_kinds=2)
    assert engine.status().state == "serving"


def _ended(authority: trust.Authority, folder: Path) -> grpc.ChannelCredentials:
    files = NodeFiles(folder)
    csr = files.request("local-1")
    long_ago = trust.utc_now() - 2 * trust.NODE_LIFETIME
    certificate = trust.sign_request(authority, csr, "local-1", long_ago)
    return grpc.ssl_channel_credentials(authority.certificate_pem, (folder / "node.key").read_bytes(), certificate)


def come_until_named(engine: EngineProcess, address: str, source: str, credentials: grpc.ChannelCredentials) -> None:
    """Looking who comes has a bound: on a busy machine one that was there for a moment is named when it returns."""
    for _ in range(RETURNS):
        with contextlib.suppress(AssertionError):
            until(lambda: said_of(engine, source), f"{source} is named", GRACE_S + LATE_LOOK_S)
            return
        with (
            through(address, source) as way,
            grpc.secure_channel(way, credentials) as link,
            contextlib.suppress(grpc.RpcError),
        ):
            ControlStub(link).Status(pb.StatusRequest(), timeout=CALL_S)


def test_certificates_that_do_not_count(engine: EngineProcess, ports: Ports, tmp_path: Path) -> None:
    authority = trust.load_or_create_authority(engine.home / "trust", trust.utc_now())
    other = trust.create_authority(trust.utc_now())
    foreign = trust.issue_local(other, NodeFiles(tmp_path / "foreign"), "coordinator", trust.utc_now())
    shown: dict[str, grpc.ChannelCredentials] = {
        "127.0.0.41": grpc.ssl_channel_credentials(authority.certificate_pem),
        "127.0.0.42": grpc.ssl_channel_credentials(authority.certificate_pem, foreign.key_pem, foreign.certificate_pem),
        "127.0.0.43": _ended(authority, tmp_path / "ended"),
    }
    calls: list[Callable[[grpc.Channel], Any]] = [
        lambda link: ControlStub(link).Status(pb.StatusRequest(), timeout=CALL_S),
        lambda link: ControlStub(link).Stop(pb.StopRequest(), timeout=CALL_S),
        lambda link: ControlStub(link).Renew(pb.RenewRequest(), timeout=CALL_S),
        lambda link: raw_call(link, "/dwarfstar.v1.Data/Ring", b"x"),
    ]
    options = channel.channel_options(channel.MAX_CONTROL_BYTES)
    with Traffic(engine) as traffic:
        for source, credentials in shown.items():
            for address in (ports.control, ports.stage):
                with through(address, source) as way, grpc.secure_channel(way, credentials, options) as link:
                    for call in calls:
                        with pytest.raises(grpc.RpcError) as refused:
                            call(link)
                        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        for source, credentials in shown.items():
            come_until_named(engine, ports.control, source, credentials)
            named_once(engine, source)
        traffic.goes_on()


def _join_request(token: JoinToken, folder: Path) -> pb.JoinRequest:
    files = NodeFiles(folder)
    node_id = files.key_id()
    return pb.JoinRequest(
        token_secret=token.secret.hex(), csr_pem=files.request(node_id), node_id=node_id, name="outsider"
    )


def test_joins_that_do_not_count(engine: EngineProcess, ports: Ports, tmp_path: Path) -> None:
    """Wrong, ended, used, revoked tokens, a replay, rubbish and too much: each from a source of its own."""

    def token(*more: str) -> JoinToken:
        made = command("token", "--home", str(engine.home), *more)
        return JoinToken.parse(made.stdout.split()[-1])

    authority = trust.load_or_create_authority(engine.home / "trust", trust.utc_now())
    trusted = grpc.ssl_channel_credentials(authority.certificate_pem)
    options = channel.channel_options(channel.MAX_CONTROL_BYTES)
    once, ended, revoked = token("--uses", "1"), token("--hours", "0.0000001"), token()
    token_id = trust.secret_hash(revoked.secret)[:8]
    listed = command("token", "list", "--home", str(engine.home))
    assert token_id in listed.stdout and revoked.format()[-20:] not in listed.stdout
    assert command("token", "revoke", token_id, "--home", str(engine.home)).returncode == 0
    wrong = JoinToken(once.fingerprint, bytes(20))
    first = _join_request(once, tmp_path / "a")

    def join(source: str, *requests: pb.JoinRequest) -> list[str]:
        said = []
        with through(ports.join, source) as way, grpc.secure_channel(way, trusted, options) as link:
            for request in requests:
                try:
                    EnrolmentStub(link).Join(request, timeout=CALL_S)
                    said.append("joined")
                except grpc.RpcError as error:
                    said.append(str(error.details() if isinstance(error, grpc.Call) else error))
        return said

    with Traffic(engine) as traffic:
        assert join("127.0.0.50", first) == ["joined"]
        tried = {
            "127.0.0.51": (_join_request(once, tmp_path / "b"), "has let in one machine"),
            "127.0.0.52": (_join_request(ended, tmp_path / "c"), "ended at"),
            "127.0.0.53": (_join_request(revoked, tmp_path / "d"), "was revoked"),
            "127.0.0.54": (first, "answered already"),
            "127.0.0.55": (_join_request(wrong, tmp_path / "e"), "is not known here"),
        }
        for source, (request, why) in tried.items():
            said = join(source, *[request] * (WRONG_FREE + 3))
            assert all(why in text for text in said[:WRONG_FREE]), said
            assert all("Too many wrong join tokens" in text for text in said[WRONG_FREE:]), said
            named_once(engine, source)
        with through(ports.join, "127.0.0.56") as way, grpc.secure_channel(way, trusted, options) as link:
            for data, code in (
                (b"\xff" * 100, grpc.StatusCode.INVALID_ARGUMENT),
                (b"\0" * (channel.MAX_ENROLMENT_BYTES + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                for _ in range(5):
                    with pytest.raises(grpc.RpcError) as refused:
                        raw_call(link, "/dwarfstar.v1.Enrolment/Join", data)
                    assert refused.value.code() is code
        named_once(engine, "127.0.0.56")
        traffic.goes_on()
    assert "Traceback" not in engine.output and wrong.secret.hex() not in engine.output


def test_many_sources_get_few_lines(engine: EngineProcess, ports: Ports) -> None:
    """Last: it uses up the lines of its minute."""
    before = len(engine.output.splitlines())
    with Traffic(engine), contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(dial(ports.control, f"127.0.1.{number}")) for number in range(1, 201)]
        assert all(closed(connection) for connection in crowd)
        until(lambda: "refused connections from 127.0.1." in engine.output, "some are named", DEADLINE_S)
        with dial(ports.control, "127.0.1.1") as last:
            assert closed(last)
    assert len(engine.output.splitlines()) - before <= 25
