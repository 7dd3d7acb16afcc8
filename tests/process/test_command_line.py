"""What a person types at ``dwarfstar``: each mistake is one clear sentence and an exit status, never a traceback."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from dwarfstar_engine.node.facts import cores
from dwarfstar_engine.views import ProposalView, StatusView
from support.engine_process import EngineProcess, command, until

pytestmark = pytest.mark.process


def sentence(home: Path, *arguments: str, status: int = 2, **variables: str) -> str:
    """The one sentence on stderr with which ``dwarfstar`` refuses ``arguments``."""
    free = () if "--port" in arguments else ("--port", "0")
    done = command(*arguments, *free, "--control-port", "0", "--home", str(home), **variables)
    return said(done, status)


def said(done: subprocess.CompletedProcess[str], status: int) -> str:
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dwarfstar: ")
    return last.removeprefix("dwarfstar: ")


# --- the model ---


def test_no_such_model(tmp_path: Path) -> None:
    assert "no model 'nothing'" in sentence(tmp_path / "h", "--serve", "nothing")
    assert "is a folder" in sentence(tmp_path / "h", "--serve", str(tmp_path))


def test_files_that_are_no_models(tmp_path: Path, demo_model: Path) -> None:
    file = tmp_path / "bad.gguf"
    with demo_model.open("rb") as whole:
        head = whole.read(3 << 20)
    for content, expected in (
        (b"", "truncated"),
        (b"this is a letter, not a model\n" * 100, "not a GGUF file"),
        (head[:20], "truncated"),
        (head[: 1 << 20], "truncated"),
        (head, "truncated"),  # all metadata, few of the weights
    ):
        file.write_bytes(content)
        told = sentence(tmp_path / "h", "--serve", str(file))
        assert expected in told and str(file) in told


def test_a_family_that_cannot_be_sliced(tmp_path: Path) -> None:
    file = tiny(tmp_path, "llama")
    data = file.read_bytes()
    file.write_bytes(data.replace(b"llama", b"mamba"))  # same length, so the file stays whole
    told = sentence(tmp_path / "h", "--serve", str(file))
    assert "mamba" in told


def tiny(folder: Path, family: str) -> Path:
    """A tiny model, made in a child because wrong metadata aborts."""
    file = folder / f"{family}.gguf"
    done = subprocess.run(
        [sys.executable, "-m", "support.tiny_models", family, str(file)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return file


# --- options ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--serve", "--demo", "toy:4"), ("--demo brings its own model",)),
        (("--serve", "toy:4", "--wire", "x"), ("--wire", "f32", "'x'")),
        (("--serve", "toy:4", "--split-mode", "x"), ("--split-mode", "'x'")),
        (("--serve", "toy:4", "--context", "3"), ("--context", "16", "3")),
        (("--serve", "toy:4", "--slots", "0"), ("--slots",)),
        (("--serve", "toy:4", "--cuts", "a,b"), ("--cuts", "'a,b'")),
        (("--serve", "demo", "--cuts", "99"), ("99", "28", "29")),
        (("--serve", "demo", "--cuts", "20,10"), ("rise",)),
        (
            (
                "--serve",
                "toy:0",
            ),
            ("toy:0",),
        ),
        (("--serve", "toy:4", "--port", "70000"), ("--port", "70000")),
        (("--serve", "toy:4", "--host", "no.such.host.invalid"), ("--host",)),
        (("--serve", "toy:4", "--effective-vram", "-1x"), ("--effective-vram",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_value_that_is_not_usable(tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    told = sentence(tmp_path / "h", *arguments)
    assert all(word in told for word in words), told


def test_a_cut_inside_a_sliding_window_pattern(tmp_path: Path) -> None:
    told = sentence(tmp_path / "h", "--serve", str(tiny(tmp_path, "gemma2")), "--cuts", "1")
    assert "1 is not a legal cut" in told and "2" in told


@pytest.mark.parametrize("arguments", [("--serve", "toy:4", "--nonsense"), ("--serve", "toy:4", "--threads", "many")])
def test_an_option_that_is_not_one(arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and arguments[-2 if "many" in arguments else -1] in done.stderr
    assert "Traceback" not in done.stderr and "start" not in done.stderr


def test_settings_name_their_source(tmp_path: Path) -> None:
    home = tmp_path / "h"
    assert "environment variable DWARFSTAR_SLOTS" in sentence(home, "--serve", "toy:4", DWARFSTAR_SLOTS="many")
    home.mkdir()
    config = home / "config.toml"
    for text, words in (
        ("prot = 1\n", ("prot in",)),
        ("slots = 0\n", ("slots in",)),
        ("slots = \n", ("not valid TOML",)),
    ):
        config.write_text(text)
        told = sentence(home, "--serve", "toy:4")
        assert str(config) in told and all(word in told for word in words)


@pytest.mark.parametrize("option", ["--port", "--control-port"])
def test_a_port_that_is_taken(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        free = "--control-port" if option == "--port" else "--port"
        done = command("--serve", "toy:4", "--home", str(tmp_path / "h"), option, port, free, "0")
    told = said(done, 2)
    assert port in told and told.endswith(f"choose another with {option}")


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "another --home" in sentence(tmp_path / "file", "--serve", "toy:4")


@pytest.mark.parametrize("words", [("status",), ("status", "--json"), ("stop",), ("chat", "hi")])
def test_nothing_runs(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert "no engine is running" in said(command(*words, "--home", str(tmp_path)), 1)


# --- engines that cannot serve ---


def test_a_model_too_large_for_its_nodes(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "h", "demo", "--local-nodes", "2", "--effective-vram", "0.05") as engine:
        code = "model_too_large_for_remaining_capacity"
        until(lambda: engine.health()[1].get("code") == code, "the engine says that the model does not fit")
        assert engine.health()[0] == 503
        answer = engine.post("/v1/completions", {"prompt": "a"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == code
        status = engine.status()
        assert status.state == "unavailable" and "GiB" in status.reason
        until(lambda: status.reason in engine.output, "it says so to whoever started it")


def test_a_model_that_llama_cpp_refuses(tmp_path: Path) -> None:
    file = tiny(tmp_path, "llama")
    key = b"llama.attention.head_count" + (4).to_bytes(4, "little")  # its type: 32-bit unsigned
    data = file.read_bytes()
    at = data.index(key) + len(key)
    file.write_bytes(data[:at] + (7).to_bytes(4, "little") + data[at + 4 :])  # 7 heads do not divide the width
    with EngineProcess(tmp_path / "h", str(file), "--local-nodes", "2") as engine:
        told = until(lambda: re.search("not serving yet: .*llama.cpp could not load.*", engine.output), "it says why")
        assert told is not None
        until(lambda: engine.status().epoch >= 2, "it tries again")
        status, health = engine.health()
        assert status == 503 and health["reason"]
        assert engine.post("/v1/completions", {"prompt": "a"}).status_code == 503
        engine._process.terminate()  # type: ignore[union-attr]
        assert engine.end() == 0


# --- a whole session ---


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path_factory.mktemp("session") / "home", "--demo", "--chunk", "256") as engine:
        yield engine.wait_serving()


def test_the_demo_splits_and_says_how(session: EngineProcess) -> None:
    until(lambda: "Try it" in session.output, "it says what to try")
    status = session.status()
    need = sum(stage.weights_gib + stage.kv_gib for stage in status.stages)
    assert len(status.stages) == 3
    assert all(node.effective_vram_gib < need for node in status.nodes)
    for stage, node in zip(status.stages, status.nodes, strict=True):
        assert stage.weights_gib + stage.kv_gib < node.effective_vram_gib
    for word in ("must be split", "nodes have joined", "loading", "node1 layers 0–"):
        assert word in session.output


def test_the_curl_line_works_as_printed(session: EngineProcess) -> None:
    line = until(lambda: re.search(r"^curl .*$", session.output, re.MULTILINE), "it prints a curl line")
    assert line is not None
    done = subprocess.run(
        [*shlex.split(line[0]), "--silent", "--max-time", "60"], capture_output=True, text=True, timeout=90, check=True
    )
    assert '"chat.completion"' in done.stdout and '"content"' in done.stdout


def test_status(session: EngineProcess) -> None:
    home = ("--home", str(session.home))
    view = StatusView.model_validate_json(command("status", "--json", *home).stdout)
    assert view.state == "serving" and len(view.stages) == 3
    table = command("status", *home).stdout
    assert all(node.name in table for node in view.nodes) and view.coordinator.api_url in table
    assert command(*home).stdout.splitlines()[0] == table.splitlines()[0]


def test_chat(session: EngineProcess) -> None:
    options = ("--home", str(session.home), "--temperature", "0", "--max-tokens", "12")
    asked = [{"role": "user", "content": "My name is Ada."}]

    def answer() -> str:
        body = {"messages": asked, "temperature": 0, "max_tokens": 12}
        return str(session.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"])

    first = answer()
    once = command("chat", "My name is Ada.", *options)
    assert (once.returncode, once.stdout) == (0, first + "\n")
    asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "What is my name?"}]
    lines = command("chat", *options, stdin="My name is Ada.\n\nWhat is my name?\n")
    assert (lines.returncode, lines.stdout) == (0, f"{first}\n{answer()}\n")  # the second knows the first


def test_a_second_engine_in_the_same_home(session: EngineProcess) -> None:
    told = said(command("--serve", "toy:4", "--home", str(session.home), "--port", "0", "--control-port", "0"), 1)
    assert "already" in told and str(session.pid) in told
    assert session.health()[0] == 200


def test_nothing_written_holds_a_secret(session: EngineProcess) -> None:
    keys = [path.read_text() for path in session.home.rglob("*.key")]
    assert len(keys) >= 4
    secrets = [line for key in keys for line in key.splitlines() if not line.startswith("-----")]
    logs = [path for path in session.home.rglob("*") if path.is_file() and path.suffix in (".log", ".json", ".out")]
    assert any(path.name == "node.log" for path in logs)
    for text in [session.output, *(path.read_text("utf-8", "replace") for path in logs)]:
        assert "PRIVATE KEY" not in text
        assert not any(secret in text for secret in secrets)
    for key in session.home.rglob("*.key"):
        assert key.stat().st_mode & 0o077 == 0


def test_stop_leaves_nothing(session: EngineProcess) -> None:
    done = command("stop", "--home", str(session.home))
    assert done.returncode == 0, done.stderr
    assert session.processes() == []  # it is stopped when it says so
    assert session.end() == 0
    assert "WARNING" not in session.output and "Traceback" not in session.output
    for log in session.home.rglob("node.log"):
        assert "Traceback" not in log.read_text()


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "h", "toy:4", "--local-nodes", "2") as engine:
        engine.wait_serving()
        engine.kill(engine.pid, signal.SIGINT)
        assert engine.end() == 0
        engine.wait_gone()
        assert "WARNING" not in engine.output and "Traceback" not in engine.output


def test_ctrl_c_tells_those_it_serves(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "h", "toy:4", "--local-nodes", "2") as engine:
        engine.wait_serving()
        body = {"prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", engine.url + "/v1/completions", json=body, timeout=60.0) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine.kill(engine.pid, signal.SIGINT)
            *_, last = (line for line in lines if line)  # it is not cut off: that would raise
        assert '"error"' in last and "stopping" in last and "send it again" in last
        assert engine.end() == 0
        assert "ERROR" not in engine.output and "Traceback" not in engine.output


@pytest.mark.skipif(sys.platform != "linux" or len(cores()) < 2, reason="two stages cannot have a core each")
def test_pinned_stages_have_cores_of_their_own(tmp_path: Path) -> None:
    pinned = ("--local-nodes", "2", "--threads", "1", "--pin")
    with EngineProcess(tmp_path / "h", "--demo", *pinned) as engine:
        status = engine.wait_serving().status()
        first, second = (set(psutil.Process(stage.pid).cpu_affinity()) for stage in status.stages)
        assert len(first) == len(second) == 1 and first != second
        told = command("plan", "--json", "--home", str(engine.home))
        promised = ProposalView.model_validate_json(told.stdout).present
        assert promised is not None and promised.predicted.aggregate_tok_s > 1.2 * promised.predicted.single_tok_s


def test_an_old_log_does_not_grow(tmp_path: Path) -> None:
    home = tmp_path / "h"
    log = home / "local" / "node1" / "node.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"old\n" * 1_000_000)
    with EngineProcess(home, "toy:4", "--local-nodes", "1") as engine:
        engine.wait_serving()
        assert log.stat().st_size < 1 << 20
        assert log.with_suffix(".log.1").stat().st_size <= 1 << 20
