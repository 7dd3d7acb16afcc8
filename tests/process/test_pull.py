"""``dwarfstar pull`` and ``models`` as people run them, against a hub on this machine that has bad days."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from dwarfstar_engine.model.hub_names import DOWNLOADS
from dwarfstar_engine.node.pull import PART
from support import gguf_bytes as g
from support.engine_process import DEADLINE_S, PROGRAM, command, environment, until
from support.fake_hub import FakeHub, fake_hub

pytestmark = pytest.mark.process

HEAD = 1 << 20  # what is read of a file to know its directory
LARGE = g.gguf_bytes(g.llama_pairs(6), [*g.llama_tensors(6), g.Tensor("big", (1 << 20,))])
SMALL = g.gguf_bytes(g.llama_pairs(4), g.llama_tensors(4))
MAMBA = g.gguf_bytes(g.llama_pairs(4, architecture="mamba"), [*g.llama_tensors(4), g.Tensor("big", (1 << 20,))])
FILES = {"tiny-Q8_0.gguf": LARGE, "tiny-Q4_0.gguf": SMALL, "mamba-F32.gguf": MAMBA, "README.md": b"# tiny"}


def variables(hub: FakeHub, home: Path, **more: str) -> dict[str, str]:
    """Where the hub is; no token of whoever runs the tests is shown to it, and no proxy asked."""
    none = {
        "HF_TOKEN": "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HUB_OFFLINE": "",
        "NO_PROXY": "127.0.0.1",
        "AI_AGENT": "x",
    }
    return {**none, "AI_AGENT": "x", "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), **more}


def run(hub: FakeHub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return command(*arguments, "--home", str(home), **variables(hub, home, **more))


def refused(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The sentence at the end."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "secret" not in done.stderr + done.stdout
    return done.stderr.splitlines()[-1].removeprefix("dwarfstar: ")


def there(home: Path) -> list[str]:
    folder = home / "models"
    return sorted(path.name for path in folder.glob("*.gguf")) if folder.is_dir() else []


def begun(home: Path) -> Path | None:
    """The part of a pull of which something came."""
    parts = (home / "models" / DOWNLOADS).rglob(f"*{PART}")
    return next((part for part in parts if part.stat().st_size), None)


def test_from_choosing_to_serving(tmp_path: Path) -> None:
    with fake_hub(files=FILES, token="secret-token") as hub:
        assert "HF_TOKEN" in refused(run(hub, tmp_path, "pull", "owner/name"))
        token = {"HF_TOKEN": "secret-token"}
        unclear = run(hub, tmp_path, "pull", "owner/name", **token)
        assert "choose one, as in `dwarfstar pull owner/name Q4_0`" in refused(unclear, 2)
        listed = unclear.stdout.splitlines()
        assert [line.split()[0] for line in listed] == ["type", "Q4_0", "F32", "Q8_0"]  # the smallest first
        assert not any(asked.content for asked in hub.asked)
        assert all(asked.path.startswith("/api/models/") for asked in hub.asked)  # it is told nothing else

        done = run(hub, tmp_path, "pull", "owner/name:Q8_0", **token)
        assert done.returncode == 0, done.stderr
        path = tmp_path / "models" / "tiny-Q8_0.gguf"
        assert done.stdout.strip() == str(path) and path.read_bytes() == LARGE
        assert "llama, 6 layers, Q8_0" in done.stderr and "can be split at 5 layers" in done.stderr
        assert "pulling 100%" in done.stderr and "\r" not in done.stderr and "secret" not in done.stderr
        assert f"dwarfstar --serve tiny-Q8_0 --models {tmp_path / 'models'}" in done.stderr
        assert all((asked.authorization is None) == asked.content for asked in hub.asked if "resolve" in asked.path)
        assert not any(asked.authorization for asked in hub.asked if asked.content)  # another host gets no token

        view = json.loads(run(hub, tmp_path, "models", "--json").stdout)
        assert view["models"][0]["name"] == "tiny-Q8_0" and view["models"][0]["supported"]
        table = run(hub, tmp_path, "models", COLUMNS="80").stdout
        assert "it is there already" in run(hub, tmp_path, "pull", "owner/name:Q8_0", **token).stderr
        assert "tiny-Q8_0" in table and max(map(len, table.splitlines())) <= 80


def test_a_cut_connection_goes_on_by_itself(tmp_path: Path) -> None:
    with fake_hub(files={"tiny-Q8_0.gguf": LARGE}, redirects=False) as hub:
        hub.cuts = [HEAD + 500_000, 900_000]  # more than its directory takes
        done = run(hub, tmp_path, "pull", "owner/name")
        assert done.returncode == 0, done.stderr
        starts = [int(str(asked.range)[6:].split("-")[0]) for asked in hub.asked if "resolve" in asked.path]
        assert starts[:2] == [0, 0] and len(starts) == 4 and 0 < starts[2] < starts[3]
        assert (tmp_path / "models" / "tiny-Q8_0.gguf").read_bytes() == LARGE


def test_a_server_that_falls_silent_is_left_and_asked_again(tmp_path: Path) -> None:
    with fake_hub(files={"tiny-Q8_0.gguf": LARGE}) as hub:
        hub.cuts, hub.hold = [HEAD + 1_000_000], threading.Event()
        done = run(hub, tmp_path, "pull", "owner/name", HF_HUB_DOWNLOAD_TIMEOUT="1")
        assert done.returncode == 0 and "waiting" in done.stderr, done.stderr
        assert not hub.hold.is_set() and there(tmp_path) == ["tiny-Q8_0.gguf"]


def test_ctrl_c_keeps_what_came_and_says_how_to_go_on(tmp_path: Path) -> None:
    with fake_hub(files={"tiny-Q8_0.gguf": LARGE}) as hub:
        hub.cuts, hub.hold = [HEAD + 1_000_000], threading.Event()
        process = subprocess.Popen(
            [*PROGRAM, "pull", "owner/name", "--home", str(tmp_path)],
            env=environment(**variables(hub, tmp_path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            part = until(lambda: begun(tmp_path), "a part that grows")
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 130 and "Traceback" not in told
        assert f"dwarfstar pull owner/name --models {tmp_path / 'models'}" in told.splitlines()[-1]
        assert there(tmp_path) == []
        had = part.stat().st_size if part else 0
        assert had
        hub.hold.set()
        hub.asked.clear()
        done = run(hub, tmp_path, "pull", "owner/name")
        assert done.returncode == 0 and there(tmp_path) == ["tiny-Q8_0.gguf"]
        last = hub.content_requests("tiny-Q8_0.gguf")[-1]
        assert last.range == f"bytes={had}-{len(LARGE) - 1}"
        assert "are here already: going on" in done.stderr


def test_a_wrong_hash_and_a_full_disk(tmp_path: Path) -> None:
    with fake_hub(files={"tiny-Q8_0.gguf": LARGE}) as hub:
        hub.hashes = {"tiny-Q8_0.gguf": "0" * 64}
        assert "is damaged: its SHA-256 is" in refused(run(hub, tmp_path, "pull", "owner/name"))
        hub.hashes = {}
        hub.sizes = {"tiny-Q8_0.gguf": 1 << 43}  # no disk has so much room
        told = refused(run(hub, tmp_path, "pull", "owner/name"))
        assert "8192.00 GiB are still to come: make room for" in told and there(tmp_path) == []


def test_a_hub_that_has_no_such_thing(tmp_path: Path) -> None:
    with fake_hub(files=FILES) as hub:
        assert "there is no repository owner/nothing" in refused(run(hub, tmp_path, "pull", "owner/nothing"))
        assert "no such revision" in refused(run(hub, tmp_path, "pull", f"{hub.url}/owner/name/blob/x/tiny-Q8_0.gguf"))
        assert "there is no x.gguf" in refused(run(hub, tmp_path, "pull", "owner/name/x.gguf"), 2)
        assert "names no model of a hub" in refused(run(hub, tmp_path, "pull", "name"), 2)
        hub.statuses = [404]
        assert "is not there (any more)" in refused(run(hub, tmp_path, "pull", "owner/name:Q8_0"))


def test_a_hub_that_wants_a_token(tmp_path: Path) -> None:
    with fake_hub(files=FILES, token="secret-token", gated=True) as hub:
        for token in ("", "secret", "secret\nbad"):
            told = refused(run(hub, tmp_path, "pull", "owner/name:Q8_0", HF_TOKEN=token))
            assert f"gated: accept its terms at {hub.url}/owner/name and set HF_TOKEN" in told
        assert not any(asked.content for asked in hub.asked)


def test_a_hub_in_trouble(tmp_path: Path) -> None:
    with fake_hub(files={"tiny-Q4_0.gguf": SMALL}) as hub:
        for status, said in (
            (500, "HTTP status 500; try again later"),
            (418, "HTTP status 418"),
            (403, "set HF_TOKEN"),
        ):
            hub.api = [(status, b"no")]
            assert said in refused(run(hub, tmp_path, "pull", "owner/name"))
        for answer in (b"<html>", b"[]", b'{"siblings": [{}]}', b'{"siblings": [{"rfilename": "m.gguf", "size": -1}]}'):
            hub.api = [(200, answer)]
            told = refused(run(hub, tmp_path, "pull", "owner/name"))
            assert "cannot be used" in told or "no usable size" in told
        hub.statuses = [503]  # which passes
        assert run(hub, tmp_path, "pull", "owner/name").returncode == 0
    assert "no connection" in refused(run(hub, tmp_path, "pull", "owner/name:Q8_0"))
    assert "HF_HUB_OFFLINE" in refused(run(hub, tmp_path, "pull", "owner/name:Q8_0", HF_HUB_OFFLINE="1"))


def test_what_cannot_be_split_is_refused_before_it_is_pulled(tmp_path: Path) -> None:
    files = {"mamba-F32.gguf": MAMBA, "html-Q8_0.gguf": b"<html>" * 500_000}
    with fake_hub(files=files) as hub:
        told = refused(run(hub, tmp_path, "pull", "owner/name", "F32"), 2)
        assert "mamba" in told and "--force" in told
        assert "not a GGUF file" in refused(run(hub, tmp_path, "pull", "owner/name", "Q8_0", "--force"), 2)
        assert {asked.range for asked in hub.asked if asked.content} == {f"bytes=0-{HEAD - 1}"}
        assert not (tmp_path / "models").exists()
        forced = run(hub, tmp_path, "pull", "owner/name", "F32", "--force")
        assert forced.returncode == 0 and "cannot be served" in forced.stderr
        assert there(tmp_path) == ["mamba-F32.gguf"]
        assert "! mamba-F32: models of architecture mamba" in run(hub, tmp_path, "models").stdout


def test_a_split_model_and_one_at_an_address(tmp_path: Path) -> None:
    (made := tmp_path / "made").mkdir()
    tensors = g.llama_tensors(4)
    paths = g.write_split(made, g.llama_pairs(4), [[], tensors[:4], tensors[4:]])
    files = {f"Q8_0/{path.name}": path.read_bytes() for path in paths}
    with fake_hub(files={**files, "alone.gguf": SMALL}) as hub:
        done = run(hub, tmp_path, "pull", "owner/name:Q8_0")
        assert done.returncode == 0 and "in 3 files" in done.stderr, done.stderr
        assert there(tmp_path) == [path.name for path in paths]
        done = run(hub, tmp_path, "pull", f"{hub.content_url}/blob/alone.gguf?signature=secret", HF_TOKEN="secret")
        assert done.returncode == 0 and "no hash is told" in done.stderr and "secret" not in done.stderr
        assert not any(asked.authorization for asked in hub.asked if asked.content)
        assert (tmp_path / "models" / "alone.gguf").read_bytes() == SMALL
        names = [model["name"] for model in json.loads(run(hub, tmp_path, "models", "--json").stdout)["models"]]
        assert names[:2] == ["alone", "m"]


def test_serving_what_is_not_there_says_how_to_pull_it(tmp_path: Path) -> None:
    with fake_hub(files=FILES) as hub:
        done = run(hub, tmp_path, "--serve", "owner/name:Q8_0", "--port", "0", "--control-port", "0")
        told = refused(done, 2)
        assert f"`dwarfstar pull owner/name:Q8_0 --models {tmp_path / 'models'}` gets it" in told
        assert hub.asked == []
