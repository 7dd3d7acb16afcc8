"""A machine joins with a token and serves: on loopback with a home of its own, and over a network of two hosts.

The two hosts are network namespaces joined by a virtual cable: each has its own addresses, loopback and ports, and what
one of them listens on at 127.0.0.1 the other cannot reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from dwarfstar_engine.wire import channel, trust
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.generated.control_pb2_grpc import ControlStub
from dwarfstar_engine.wire.ring import DATA_SERVICE, RING_METHOD
from dwarfstar_engine.wire.trust import NodeFiles
from support.engine_process import DEADLINE_S, PROGRAM, TAG, EngineProcess, command, environment, until

pytestmark = pytest.mark.process

TOY = "toy:8"
CALL_S = 10.0
V4_IN_V6 = "::ffff:"  # how a v4 address looks on a socket for both
HEAD, LENT = "10.213.7.1", "10.213.7.2"


@dataclass
class Started:
    """A process of ours and its output; ``tag`` marks it and all its children."""

    process: subprocess.Popen[bytes]
    log: Path
    tag: str

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def family(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._ours(process)]

    def _ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(TAG) == self.tag and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False

    def kill(self) -> None:
        """End all of it at once, as a power cut would."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(DEADLINE_S)


@contextlib.contextmanager
def started(
    log: Path, arguments: Sequence[str], name: str, prefix: Sequence[str] = (), **variables: str
) -> Iterator[Started]:
    """``dwarfstar`` with ``arguments`` as a machine called ``name``; on leaving, none of its processes is left."""
    tag = uuid.uuid4().hex
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*prefix, *PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment(DWARFSTAR_NAME=name, **{TAG: tag}, **variables),
            start_new_session=True,
        )
    it = Started(process, log, tag)
    try:
        yield it
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEADLINE_S / 4)
        it.kill()


def token_line(home: Path, *more: str) -> list[str]:
    """The arguments of the command that ``dwarfstar token`` prints, ``node --join …``."""
    made = command("token", "--home", str(home), *more)
    assert made.returncode == 0, made.stderr
    words = made.stdout.split()
    assert words[:3] == ["dwarfstar", "node", "--join"] and words[4] == "--token" and len(words) == 6
    return words[1:]


def refused(home: Path, *arguments: str) -> str:
    """What ``dwarfstar node`` says when it does not start: one sentence."""
    said = command("node", *arguments, "--home", str(home))
    assert said.returncode in (1, 2)
    lines = [line for line in said.stderr.splitlines() if line.startswith("dwarfstar: ")]
    assert len(lines) == 1 and "Traceback" not in said.stderr, said.stderr
    return lines[0]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine that waits for one node besides its own, before its first plan; so each test has a new one."""
    home = tmp_path / "head"
    with EngineProcess(
        home, TOY, "--wait-nodes", "2", "--effective-vram", "1", variables={"DWARFSTAR_NAME": "head"}
    ) as running:
        until(lambda: (home / "run" / "engine.json").exists(), "the engine runs")
        yield running


def test_a_machine_joins_once_and_serves(engine: EngineProcess, tmp_path: Path) -> None:
    line, home = token_line(engine.home), tmp_path / "lent"
    arguments = [*line, "--home", str(home), "--effective-vram", "1"]
    with started(tmp_path / "1.log", arguments, "lent") as node:
        engine.wait_serving()
        stages = {stage.node: stage for stage in engine.status().stages}
        assert set(stages) == {"head", "lent"}
        assert stages["lent"].pid in [process.pid for process in node.family()]
        joined = engine.node("lent")
        assert joined is not None and joined.effective_vram_gib == 1.0
        answer = engine.post("/v1/completions", {"prompt": "abc", "max_tokens": 4, "temperature": 0})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        assert refused(home) == f"dwarfstar: a node runs from {home} already: stop that one, or give another --home"
    assert engine.node("lent") is None or engine.status().state != "serving"
    with started(
        tmp_path / "2.log", ["node", "--home", str(home), "--effective-vram", "1"], "lent"
    ):  # neither address nor token
        until(lambda: (n := engine.node("lent")) is not None and n.id == joined.id, "the node is back under its id")
        engine.wait_serving()
        until(
            lambda: engine.post("/v1/completions", {"prompt": "abc", "max_tokens": 4}).status_code == 200, "it serves"
        )
    with started(tmp_path / "3.log", arguments, "lent"):  # the first line again, from the shell's history
        until(lambda: engine.node("lent") is not None, "the node is back")
    for log in ("2.log", "3.log"):
        assert "joined the cluster" not in (tmp_path / log).read_text("utf-8")


def test_a_stage_does_not_outlive_a_node_that_is_killed(engine: EngineProcess, tmp_path: Path) -> None:
    line = token_line(engine.home)
    with started(
        tmp_path / "log", [*line, "--home", str(tmp_path / "lent"), "--effective-vram", "1"], "mortal"
    ) as node:
        until(lambda: len(node.family()) == 2, "the node has a stage")
        node.process.send_signal(signal.SIGKILL)
        until(lambda: not node.family(), "the stage ends")


def test_what_does_not_let_a_machine_in_is_said_in_one_sentence(engine: EngineProcess, tmp_path: Path) -> None:
    _, _, address, _, token = token_line(engine.home)
    home = tmp_path / "lent"
    join = ("--join", address)
    assert "in no cluster yet" in refused(home)
    assert "--join HOST:PORT" in refused(home, "--token", token)
    assert "not a join token" in refused(home, *join, "--token", token[:-1])
    assert "not known here" in refused(home, *join, "--token", token[:-9] + "a" * 9)
    foreign = trust.new_token(trust.create_authority(trust.utc_now())).format()
    assert "is not the one the join token is for" in refused(home, *join, "--token", foreign)
    assert "write host:port" in refused(home, "--join", "nowhere:x", "--token", token)
    assert "No coordinator answers" in refused(home, "--join", "nowhere.invalid", "--token", token)
    several = refused(home, "--join", "127.0.0.1:1", "--join", "127.0.0.1:2", "--token", token, "--timeout", "0.5")
    assert "127.0.0.1:1: Connection refused, 127.0.0.1:2: Connection refused" in several
    assert "No coordinator answers" in refused(home, "--join", "127.0.0.1:1", "--token", token)
    control = json.loads((engine.home / "run" / "engine.json").read_text("utf-8"))["control"]
    assert "does not let machines join" in refused(home, "--join", control, "--token", token)
    assert "cannot listen on 192.0.2.7" in refused(home, *join, "--token", token, "--listen", "192.0.2.7")


def test_a_token_for_one_machine_lets_in_one(engine: EngineProcess, tmp_path: Path) -> None:
    line = token_line(engine.home, "--uses", "1", "--hours", "0.5")
    with started(tmp_path / "log", [*line, "--home", str(tmp_path / "a")], "only"):
        until(lambda: engine.node("only") is not None, "the first machine is in")
    assert "has let in one machine" in refused(tmp_path / "b", *line[1:])


def test_a_token_that_has_ended_is_refused_with_the_time(engine: EngineProcess, tmp_path: Path) -> None:
    line = token_line(engine.home, "--hours", "0.0000001")
    assert "This join token ended at" in refused(tmp_path / "a", *line[1:])


def test_a_member_of_another_cluster_is_told_how_to_leave(engine: EngineProcess, tmp_path: Path) -> None:
    other = tmp_path / "other"
    elsewhere = trust.load_or_create_authority(other / "trust", trust.utc_now())
    trust.issue_local(elsewhere, NodeFiles(tmp_path / "lent" / "member"), "n1", trust.utc_now())
    said = refused(tmp_path / "lent", *token_line(engine.home)[1:])
    assert "in another cluster already" in said and str(tmp_path / "lent" / "member") in said


def test_a_token_can_be_made_before_the_engine_runs(tmp_path: Path) -> None:
    made = command("token", "--home", str(tmp_path), "--control-host", "192.0.2.7", "--control-port", "9000")
    assert made.returncode == 0 and made.stdout.startswith("dwarfstar node --join 192.0.2.7:9001 --token ds1.")
    assert "no engine runs" in made.stderr and "--control-host" not in made.stderr
    local = command("token", "--home", str(tmp_path))
    assert local.stdout.startswith("dwarfstar node --join 127.0.0.1:8478 ") and "--control-host" in local.stderr
    assert len(json.loads((tmp_path / "trust" / "tokens.json").read_text("utf-8"))["tokens"]) == 2
    for bad in (("--hours", "0"), ("--uses", "0"), ("--control-port", "0")):
        said = command("token", "--home", str(tmp_path), *bad)
        assert said.returncode == 2 and len(said.stderr.splitlines()) == 1, said.stderr


# --- strangers -------------------------------------------------------------------------------------------------------


def _attach(link: grpc.Channel) -> Any:
    hello = pb.NodeMessage(hello=pb.NodeHello(node_id="stranger", name="stranger"))
    return next(ControlStub(link).Attach(iter([hello]), timeout=CALL_S))


def _ring(link: grpc.Channel) -> Any:
    call: Any = link.stream_stream(f"/{DATA_SERVICE}/{RING_METHOD}")
    return next(call(iter([b"hello"]), timeout=CALL_S))


def _strangers(authority_pem: bytes, folder: Path) -> dict[str, grpc.ChannelCredentials | None]:
    """What somebody without a certificate of the cluster can show; the CA's own certificate is public."""
    foreign = NodeFiles(folder / "foreign")
    other = trust.create_authority(trust.utc_now())
    identity = trust.issue_local(other, foreign, "coordinator", trust.utc_now())
    return {
        "plain": None,
        "no certificate": grpc.ssl_channel_credentials(authority_pem),
        "another cluster's": grpc.ssl_channel_credentials(authority_pem, identity.key_pem, identity.certificate_pem),
    }


def _open(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    options = channel.channel_options(channel.MAX_CONTROL_BYTES)
    return (
        grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
    )


def _listening(pid: int) -> str:
    """The one address a process listens on."""
    sockets = [c for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert len(sockets) == 1
    return f"{sockets[0].laddr.ip.removeprefix(V4_IN_V6)}:{sockets[0].laddr.port}"


def test_strangers_reach_neither_the_control_plane_nor_a_stage(engine: EngineProcess, tmp_path: Path) -> None:
    home = tmp_path / "lent"
    arguments = [*token_line(engine.home), "--home", str(home), "--effective-vram", "1"]
    with started(tmp_path / "log", arguments, "lent"):
        engine.wait_serving()
        stage = until(lambda: [s.pid for s in engine.status().stages if s.node == "lent" and s.pid], "lent has a stage")
        control = json.loads((engine.home / "run" / "engine.json").read_text("utf-8"))["control"]
        held = NodeFiles(home / "member").load()
        for address, ask in ((control, _attach), (_listening(stage[0]), _ring)):
            for what, credentials in _strangers(held.ca_pem, tmp_path).items():
                with _open(address, credentials) as link, pytest.raises(grpc.RpcError) as error:
                    ask(link)
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE, f"{what} at {address}"
            with _open(address, channel.channel_credentials(held)) as link:
                assert ask(link), "a member gets an answer: it is the certificate that was missing"
        assert engine.health()[0] == 200


# --- two hosts -------------------------------------------------------------------------------------------------------


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=DEADLINE_S)


@pytest.fixture
def hosts() -> Iterator[tuple[list[str], list[str]]]:
    """Two hosts, HEAD and LENT, with a cable between them: the words that run a command on each."""
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    mark = uuid.uuid4().hex[:6]
    names = [f"ds-{mark}-a", f"ds-{mark}-b"]
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
            stack.callback(_ip, "netns", "delete", name)
        _ip("link", "add", f"v{mark}a", "netns", names[0], "type", "veth", "peer", f"v{mark}b", "netns", names[1])
        for name, end, address in zip(names, "ab", (HEAD, LENT), strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", f"v{mark}{end}")
            _ip("-n", name, "link", "set", f"v{mark}{end}", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield tuple(["ip", "netns", "exec", name] for name in names)  # type: ignore[misc]


def _on(prefix: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``dwarfstar`` on a host to its end."""
    return subprocess.run(
        [*prefix, *PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment(),
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_two_hosts_serve_together_also_after_the_coordinator_was_gone(
    hosts: tuple[list[str], list[str]], tmp_path: Path, demo_model: Path
) -> None:
    head, lent = hosts
    home, far = str(tmp_path / "head"), str(tmp_path / "lent")
    serve = ["--serve", str(demo_model), "--home", home, "--control-host", HEAD, "--port", "8080", "--context", "512"]
    serve += ["--wait-nodes", "2", "--slots", "1", "--effective-vram", "1"]

    def serving() -> dict[str, Any]:
        said = _on(head, "status", "--home", home, "--json")
        status: dict[str, Any] = json.loads(said.stdout) if said.returncode == 0 else {}
        return status if status.get("state") == "serving" and len(status["stages"]) == 2 else {}

    def ask() -> str:
        said = _on(head, "chat", "Hello!", "--max-tokens", "8", "--temperature", "0", "--home", home)
        assert said.returncode == 0, said.stderr
        return said.stdout

    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(started(tmp_path / "head.log", serve, "head", head))
        until(lambda: (tmp_path / "head" / "run" / "engine.json").exists(), "the engine runs")
        made = _on(head, "token", "--home", home)
        line = made.stdout.split()[1:]
        assert line[:3] == ["node", "--join", f"{HEAD}:8478"] and "only this machine" not in made.stderr
        node = stack.enter_context(
            started(tmp_path / "lent.log", [*line, "--home", far, "--effective-vram", "1"], "lent", lent)
        )
        before = until(serving, "both hosts serve")
        assert sorted(stage["node"] for stage in before["stages"]) == ["head", "lent"]
        assert {n["name"]: n["address"] for n in before["nodes"]} == {"head": HEAD, "lent": LENT}
        answer = ask()
        assert answer.strip()
        pid = next(stage["pid"] for stage in before["stages"] if stage["node"] == "lent")
        assert pid in [process.pid for process in node.family()]

        engine.kill()
        until(lambda: "is not reached" in node.output or "was lost" in node.output, "the node sees it")
        assert pid in [process.pid for process in node.family()], "the weights wait for the coordinator"
        stack.enter_context(started(tmp_path / "head.log", serve, "head", head))
        after = until(serving, "both hosts serve again")
        assert next(stage["pid"] for stage in after["stages"] if stage["node"] == "lent") == pid
        assert ask() == answer
