"""Certificates renewed under way, nodes removed, identities copied: whole processes, with the toy backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dwarfstar_engine.stage import toy
from dwarfstar_engine.wire import trust
from dwarfstar_engine.wire.trust import NodeFiles
from process.test_join import Started, refused, started, token_line
from support.engine_process import DEADLINE_S, EngineProcess, command, until

pytestmark = pytest.mark.process

LAYERS = 8
PROMPT = "trust"


def answers(engine: EngineProcess) -> None:
    engine.wait_serving()
    answer = engine.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 20, "temperature": 0})
    assert answer.json()["choices"][0]["text"] == bytes(toy.expected(PROMPT.encode(), 20, LAYERS)).decode()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    home = tmp_path / "head"
    settings = {"DWARFSTAR_NAME": "head", "DWARFSTAR_REJOIN_S": "0"}
    with EngineProcess(home, f"toy:{LAYERS}", "--effective-vram", "1", variables=settings) as running:
        until(lambda: (home / "run" / "engine.json").exists(), "the engine runs")
        yield running.wait_serving()


def attic(engine: EngineProcess, folder: Path) -> tuple[list[str], Path]:
    home = folder / "attic"
    return [*token_line(engine.home), "--home", str(home), "--effective-vram", "1"], home


def ended(node: Started) -> str:
    """What a node says when it ends by itself."""
    assert node.process.wait(DEADLINE_S) == 1
    (sentence,) = [line for line in node.output.splitlines() if line.startswith("dwarfstar: ")]
    assert "Traceback" not in node.output
    return sentence


def test_a_removed_node_ends_is_refused_and_comes_back_with_a_new_token_only(
    engine: EngineProcess, tmp_path: Path
) -> None:
    line, home = attic(engine, tmp_path)
    spare, _ = attic(engine, tmp_path)
    with started(tmp_path / "1.log", line, "attic") as node:
        until(lambda: engine.node("attic") is not None, "it is here")
        assert command("node", "remove", "nobody", "--home", str(engine.home)).returncode == 1
        said = command("node", "remove", "attic", "--home", str(engine.home))
        assert said.returncode == 0 and "it was told" in said.stdout, said.stderr
        assert "This machine was removed from the cluster" in ended(node)
        until(lambda: not node.family(), "its stage ends with it")
    answers(engine)
    assert engine.node("attic") is None
    assert "was removed from the cluster" in refused(home)
    assert "was removed from the cluster" in refused(home, *line[1:])
    assert "removed from the cluster after this join token was made" in refused(home, *spare[1:])
    fresh, _ = attic(engine, tmp_path)
    with started(tmp_path / "2.log", fresh, "attic"):
        until(lambda: engine.node("attic") is not None, "it is back")


def test_a_copied_home_is_refused_and_named_and_the_first_one_stays(engine: EngineProcess, tmp_path: Path) -> None:
    line, home = attic(engine, tmp_path)
    with started(tmp_path / "1.log", line, "attic") as first:
        until(lambda: engine.node("attic") is not None, "it is here")
        copy = tmp_path / "copy"
        shutil.copytree(home, copy)
        with started(tmp_path / "2.log", ["node", "--home", str(copy)], "attic") as second:
            sentence = ended(second)
        assert "Two machines show the identity of node attic" in sentence
        assert sentence.removeprefix("dwarfstar: ") in engine.status().warnings
        assert sentence.removeprefix("dwarfstar: ") in engine.output
        assert first.process.poll() is None and engine.node("attic") is not None
        for process in first.family():  # not politely: it comes back while nobody has told that it left
            process.kill()
        with started(tmp_path / "3.log", ["node", "--home", str(home)], "attic") as again:
            until(lambda: "attached to the coordinator" in again.output, "the true one is let in")
            assert again.process.poll() is None


def test_certificates_are_renewed_while_the_cluster_serves(tmp_path: Path) -> None:
    """Lives of nine seconds: after some of them nothing works that was not renewed."""
    home = tmp_path / "head"
    settings = {"DWARFSTAR_NAME": "head", "DWARFSTAR_CERTIFICATE_HOURS": str(9 / 3600)}
    with EngineProcess(home, f"toy:{LAYERS}", "--wait-nodes", "2", variables=settings) as engine:
        until(lambda: (home / "run" / "engine.json").exists(), "the engine runs")
        line, far = attic(engine, tmp_path)
        with started(tmp_path / "log", line, "attic"):
            answers(engine)
            files = [NodeFiles(home / "trust"), NodeFiles(home / "node" / "trust"), NodeFiles(far / "member")]
            firsts = [trust.load_certificate(held.load().certificate_pem) for held in files]
            last = max(first.not_valid_after_utc for first in firsts)

            def renewed() -> bool:
                return trust.utc_now() > last and all(
                    trust.load_certificate(held.load().certificate_pem).not_valid_before_utc > last - trust.CLOCK_SKEW
                    for held in files
                )

            until(renewed, "every certificate has been renewed, and the first ones have ended")
            before = engine.status()  # a new connection, to a server that began with another certificate
            engine.kill(next(stage.pid for stage in before.stages if stage.node == "head"))
            until(lambda: engine.status().epoch > before.epoch, "a new ring is made")
            answers(engine)
            assert engine.node("attic") is not None
    roster = json.loads((home / "trust" / "roster.json").read_text("utf-8"))
    assert [node["name"] for node in roster["nodes"]] == ["attic"]


def test_a_certificate_that_has_ended_says_what_to_do(tmp_path: Path) -> None:
    long_ago = trust.utc_now() - 2 * trust.NODE_LIFETIME
    authority = trust.load_or_create_authority(tmp_path / "ca", long_ago)
    files = NodeFiles(tmp_path / "attic" / "member")
    trust.issue_local(authority, files, files.key_id(), long_ago)
    (files.folder / "node.toml").write_text('join = "127.0.0.1:1"\ncoordinator = "127.0.0.1:2"\n')
    assert "join again with a new token" in refused(tmp_path / "attic")
