"""Machines find each other with no address typed: hosts are network namespaces, their network a switch in another one.

So nothing that is multicast here leaves the machine the tests run on. Every host has the address 172.17.0.1 besides its
own, as machines with Docker do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from process.test_join import Started, started
from support.engine_process import DEADLINE_S, PROGRAM, environment, until

pytestmark = pytest.mark.process

TOY = "toy:8"
SAME_ON_ALL = "172.17.0.1/16"
BAR_S = 5.0  # told beside what was measured; a busy test machine may take longer


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=DEADLINE_S)


@dataclass(frozen=True)
class Network:
    """A switch, and hosts on it. The switch is the device that macvlan cards share: not every kernel has bridges."""

    mark: str
    stack: contextlib.ExitStack

    @property
    def switch(self) -> str:
        return f"ds-{self.mark}-net"

    def host(self, name: str, address: str) -> list[str]:
        """A host with this address (with its prefix) on the switch: the words that run a command on it."""
        space, card = f"ds-{self.mark}-{name}", f"c{self.mark}{name}"
        _ip("netns", "add", space)
        self.stack.callback(_ip, "netns", "delete", space)
        _ip("-n", self.switch, "link", "add", "link", "trunk", "name", card, "type", "macvlan", "mode", "bridge")
        _ip("-n", self.switch, "link", "set", card, "netns", space)
        _ip("-n", space, "link", "set", card, "name", "eth0")
        _ip("-n", space, "link", "add", "docker0", "type", "veth", "peer", "container")
        for device in ("lo", "eth0", "docker0", "container"):
            _ip("-n", space, "link", "set", device, "up")
        _ip("-n", space, "address", "add", address, "dev", "eth0")
        _ip("-n", space, "address", "add", SAME_ON_ALL, "dev", "docker0")
        return ["ip", "netns", "exec", space]


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    with contextlib.ExitStack() as stack:
        network = Network(uuid.uuid4().hex[:6], stack)
        try:
            _ip("netns", "add", network.switch)
            stack.callback(_ip, "netns", "delete", network.switch)
            _ip("-n", network.switch, "link", "add", "trunk", "type", "veth", "peer", "stub")
            _ip("-n", network.switch, "link", "add", "link", "trunk", "name", "probe", "type", "macvlan")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
        for device in ("trunk", "stub"):
            _ip("-n", network.switch, "link", "set", device, "up")
        yield network


def _on(host: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``dwarfstar`` on a host to its end."""
    return subprocess.run(
        [*host, *PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment(DWARFSTAR_DISCOVERY="true"),
        stdin=subprocess.DEVNULL,
        check=False,
    )


def _token(host: Sequence[str], home: Path) -> list[str]:
    """The words of the command that joins: no address among them."""
    made = _on(host, "token", "--home", str(home))
    assert made.returncode == 0, made.stderr
    words = made.stdout.split()
    assert words[:3] == ["dwarfstar", "node", "--token"] and len(words) == 4
    return words[1:]


def _status(host: Sequence[str], home: Path) -> dict[str, Any]:
    said = _on(host, "status", "--home", str(home), "--json")
    return json.loads(said.stdout) if said.returncode == 0 else {}


def _serve(
    log: Path, host: Sequence[str], home: Path, *more: str, model: str = TOY
) -> contextlib.AbstractContextManager[Started]:
    arguments = ["--serve", model, "--home", str(home), "--wait-nodes", "2", "--effective-vram", "1", *more]
    return started(log, arguments, "head", host, DWARFSTAR_DISCOVERY="true")


def _lend(log: Path, host: Sequence[str], home: Path, *words: str) -> contextlib.AbstractContextManager[Started]:
    arguments = [*(words or ("node",)), "--home", str(home), "--effective-vram", "1"]
    return started(log, arguments, "lent", host, DWARFSTAR_DISCOVERY="true")


def _serving(head: Started) -> bool:
    return "serving on http" in head.output


@pytest.mark.parametrize("which", ["toy", "demo"])
def test_one_command_on_each_machine_and_no_address(
    network: Network, tmp_path: Path, which: str, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = network.host("a", "10.213.8.1/24"), network.host("b", "10.213.8.2/24")
    home, far = tmp_path / "head", tmp_path / "lent"
    line = _token(a, home)
    model = (str(demo_model), "--context", "512", "--slots", "1") if which == "demo" else (TOY,)
    began = time.monotonic()
    one = ("--threads", "1")  # both hosts are this one machine
    with (
        _serve(tmp_path / "head.log", a, home, *model[1:], *one, model=model[0]) as head,
        _lend(tmp_path / "lent.log", b, far, *line, *one) as node,
    ):
        until(lambda: _serving(head), "both hosts serve")
        took = time.monotonic() - began
        with capsys.disabled():
            print(f"\n{which}: serving {took:.1f} s after both commands were started (bar: {BAR_S:.0f} s)")
        status = _status(a, home)
        assert sorted(stage["node"] for stage in status["stages"]) == ["head", "lent"]
        assert "joined the cluster at 10.213.8.1:8478" in node.output
        answer = _on(a, "chat", "Hello!", "--max-tokens", "4", "--temperature", "0", "--home", str(home))
        assert answer.returncode == 0, answer.stderr
        book = far / "member" / "peers.json"
        until(book.exists, "the node remembers its coordinator")
        peers = until(lambda: json.loads(book.read_text("utf-8"))["peers"], "the node is told of its peers")
        assert [one["hosts"] for one in peers if one["coordinator"]] == [["10.213.8.1", "172.17.0.1"]]


def test_a_coordinator_that_comes_back_on_another_port_and_address_is_found(network: Network, tmp_path: Path) -> None:
    a, b = network.host("a", "10.213.8.1/24"), network.host("b", "10.213.8.2/24")
    home, far = tmp_path / "head", tmp_path / "lent"
    line = _token(a, home)
    with _lend(tmp_path / "lent.log", b, far, *line) as node:
        with _serve(tmp_path / "1.log", a, home) as head:
            until(lambda: _serving(head), "both hosts serve")
            pids = {process.pid for process in node.family()}
            head.kill()
        _ip("-n", f"ds-{network.mark}-a", "address", "delete", "10.213.8.1/24", "dev", "eth0")
        _ip("-n", f"ds-{network.mark}-a", "address", "add", "10.213.8.77/24", "dev", "eth0")
        with _serve(tmp_path / "2.log", a, home, "--control-port", "9001") as head:
            until(lambda: _serving(head), "they serve again")
            assert pids <= {process.pid for process in node.family()}, "the weights were kept"
        assert "attached to the coordinator at 10.213.8.77:9001" in node.output


def test_a_network_that_comes_late_and_an_address_that_changes_are_followed(network: Network, tmp_path: Path) -> None:
    """A node that starts before its Wi-Fi is up; then a coordinator that gets another address while it runs."""
    a, b = network.host("a", "10.213.8.1/24"), network.host("b", "10.213.8.2/24")
    home = tmp_path / "head"
    line = _token(a, home)
    _ip("-n", f"ds-{network.mark}-b", "link", "set", "eth0", "down")
    with (
        _serve(tmp_path / "head.log", a, home) as head,
        _lend(tmp_path / "lent.log", b, tmp_path / "lent", *line) as node,
    ):
        until(lambda: "was found: listened for" in node.output, "the node says what it listens for")
        assert "docker0" in node.output and "eth0" not in node.output
        _ip("-n", f"ds-{network.mark}-b", "link", "set", "eth0", "up")
        until(lambda: _serving(head), "both hosts serve")
        _ip("-n", f"ds-{network.mark}-a", "address", "delete", "10.213.8.1/24", "dev", "eth0")
        _ip("-n", f"ds-{network.mark}-a", "address", "add", "10.213.8.77/24", "dev", "eth0")
        until(lambda: "attached to the coordinator at 10.213.8.77:8477" in node.output, "the node is back")
        until(lambda: (s := _status(a, home)).get("epoch", 0) > 1 and s["state"] == "serving", "both hosts serve again")
        assert _on(a, "chat", "Hello!", "--max-tokens", "4", "--home", str(home)).returncode == 0


def test_a_foreign_cluster_on_the_network_is_left_alone_and_named(network: Network, tmp_path: Path) -> None:
    a, b, c = (network.host(name, f"10.213.8.{index}/24") for index, name in enumerate("abc", 1))
    line = _token(a, tmp_path / "head")
    with _serve(tmp_path / "c.log", c, tmp_path / "foreign"):
        until(lambda: (tmp_path / "foreign" / "run" / "engine.json").exists(), "the other cluster runs")
        said = _on(b, *line, "--home", str(tmp_path / "b"), "--timeout", "4")
        assert said.returncode == 1 and "only of others (head, cluster " in said.stderr, said.stderr
        with (
            _serve(tmp_path / "head.log", a, tmp_path / "head") as head,
            _lend(tmp_path / "lent.log", b, tmp_path / "lent", *line) as node,
        ):
            until(lambda: _serving(head), "the right ones serve")
            assert "joined the cluster at 10.213.8.1:8478" in node.output
        assert _status(c, tmp_path / "foreign")["nodes"][0]["name"] == "head"
        assert len(_status(c, tmp_path / "foreign")["nodes"]) == 1


def test_another_subnet_and_an_empty_network_are_said(network: Network, tmp_path: Path) -> None:
    a, b = network.host("a", "10.213.8.1/24"), network.host("b", "10.99.8.2/24")
    line = _token(a, tmp_path / "head")
    empty = _on(b, *line, "--home", str(tmp_path / "b"), "--timeout", "1")
    assert empty.returncode == 1 and "listened for _dwarfstar._tcp.local. on eth0 (10.99.8.2/24)" in empty.stderr
    with _serve(tmp_path / "head.log", a, tmp_path / "head"):
        until(lambda: (tmp_path / "head" / "run" / "engine.json").exists(), "the engine runs")
        said = _on(b, *line, "--home", str(tmp_path / "b"), "--timeout", "4")
        assert said.returncode == 1 and "another subnet than this machine, which has eth0 (10.99.8.2/24)" in said.stderr
