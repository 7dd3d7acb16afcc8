"""Keys and HTTPS on a whole engine that is bound to all addresses: who gets in, from when to when, and who learns what.

All traffic is on loopback: the engine is bound to 0.0.0.0 and asked at 127.0.0.1.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import httpx2
import openai
import pytest

from dwarfstar_engine.cli import running
from support.certificates import self_signed
from support.engine_process import EngineProcess, command, until

pytestmark = pytest.mark.process

LONG = 60_000  # tokens: more than an engine makes while this test goes on, also when it guesses well
TOY = ("toy:4:2", "--local-nodes", "1", "--host", "0.0.0.0", "--context", "65536")


def new_key(home: Path, name: str, *more: str) -> str:
    done = command("key", "add", name, *more, "--home", str(home))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"ds-[A-Za-z0-9_-]{43}\n", done.stdout) and done.stdout.strip() not in done.stderr
    return done.stdout.strip()


def revoke(home: Path, name: str) -> None:
    assert command("key", "revoke", name, "--home", str(home)).returncode == 0


def local_url(engine: EngineProcess) -> str:
    """Where the engine is reached over loopback, once it serves."""
    until(lambda: "ready. Try it" in engine.output or engine.ended, "the engine serves")
    assert not engine.ended, engine.output
    url = urlsplit(engine.url)
    return f"{url.scheme}://127.0.0.1:{url.port}"


def say(client: openai.OpenAI, **more: Any) -> str:
    answer = client.completions.create(model="any", prompt="One", max_tokens=4, temperature=0, **more)
    return str(answer.choices[0].text)


def refused(client: openai.OpenAI, **more: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as error:
        say(client, **more)
    assert error.value.code == "invalid_api_key" and error.value.response.headers["www-authenticate"] == "Bearer"


def traces(engine: EngineProcess) -> Iterator[str]:
    """All that an engine has said and kept: its output, each file of its home, its status, its processes' lines."""
    yield engine.output
    for file in engine.home.rglob("*"):
        if file.is_file():
            yield file.read_text("utf-8", "replace")
    yield command("status", "--json", "--home", str(engine.home)).stdout
    for process in engine.processes():
        yield " ".join(process.cmdline())


def test_off_loopback_an_engine_without_keys_does_not_start(tmp_path: Path) -> None:
    home = tmp_path / "h"
    for _ in ("no key was made", "the only one was withdrawn"):
        done = command("--serve", *TOY, "--home", str(home), "--port", "0", "--control-port", "0")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"`dwarfstar key add NAME --home {home}`" in done.stderr.splitlines()[-1]
        assert running.find(home) is None
        new_key(home, "laptop")
        revoke(home, "laptop")


def test_keys_off_loopback(tmp_path: Path) -> None:
    home = tmp_path / "h"
    key = new_key(home, "laptop")
    with EngineProcess(home, *TOY, "--verbose") as engine:
        url = local_url(engine)
        assert "HTTP is in plain text on 0.0.0.0" in engine.output
        assert '-H "Authorization: Bearer $DWARFSTAR_API_KEY"' in engine.output
        with openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60.0) as client:
            said = say(client)
            wrong = "ds-" + key[:2:-1]
            refused(client.with_options(api_key=wrong))
            refused(client, extra_headers={"Authorization": openai.omit})
            for path in ("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                method = "GET" if path == "/v1/models" else "POST"
                assert httpx.request(method, url + path, timeout=60.0).status_code == 401
            assert httpx.get(url + "/health", timeout=60.0).json() == {"status": "ok"}

            # A key made while the engine runs works; a key withdrawn while it runs does not, nor does its stream break.
            second = new_key(home, "phone", "--expires", "30d")
            until(lambda: httpx.get(url + "/v1/models", headers={"Authorization": f"Bearer {second}"}).is_success, "in")
            stream = client.completions.create(
                model="any", prompt="One", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
            )
            next(stream)
            revoke(home, "laptop")
            models = {"Authorization": f"Bearer {key}"}
            until(lambda: httpx.get(url + "/v1/models", headers=models).status_code == 401, "out")
            assert engine.status().throughput.active == 1
            stream.close()
            engine.wait_idle()
            refused(client)
            assert say(client.with_options(api_key=second)) == said

        chat = ("chat", "hi", "--max-tokens", "4", "--temperature", "0", "--home", str(home))
        assert command(*chat, OPENAI_API_KEY="").returncode == 1
        for given in ("DWARFSTAR_API_KEY", "OPENAI_API_KEY"):
            assert command(*chat, **{given: second}).returncode == 0
        assert command(*chat, "--api-key", second).returncode == 0
        assert "--api-key" in command(*chat, DWARFSTAR_API_KEY=key).stderr
        assert command("status", "--home", str(home)).stdout.startswith("serving")

        until(lambda: facts(home)["last_used"], "the day of use is kept")
        assert facts(home)["name"] == "phone" and facts(home)["last_four"] == second[-4:]
        assert second[-4:] in command("key", "list", "--home", str(home)).stdout
        for text in traces(engine):
            assert not any(secret in text for secret in (key, second, wrong))
        assert engine.output.count("refused a request of 127.0.0.1") <= 2  # one a minute
        assert "refused a request of 127.0.0.1" in engine.output and "Traceback" not in engine.output


def facts(home: Path) -> dict[str, str]:
    (only,) = json.loads(command("key", "list", "--json", "--home", str(home)).stdout)
    assert isinstance(only, dict)
    return only


def test_https_off_loopback(tmp_path: Path) -> None:
    home = tmp_path / "h"
    key, files = new_key(home, "laptop"), self_signed(tmp_path)
    tls = ("--tls-cert", str(files.certificate), "--tls-key", str(files.key))
    with EngineProcess(home, *TOY, *tls) as engine:
        url = local_url(engine)
        assert url.startswith("https://") and "plain text" not in engine.output
        trusting = ssl.create_default_context(cafile=files.certificate)
        with (
            httpx2.Client(verify=trusting) as http,
            openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60.0, http_client=http) as client,
        ):
            said = say(client)
            refused(client.with_options(api_key="wrong"))
            with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
                httpx.get(url + "/health")
            with pytest.raises(httpx.TransportError):
                httpx.get(url.replace("https:", "http:") + "/health")
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as mute:
                mute.sendall(b"\x16\x03\x01")
                assert say(client) == said
        chat = command("chat", "hi", "--max-tokens", "4", "--home", str(home), DWARFSTAR_API_KEY=key)
        assert chat.returncode == 0, chat.stderr
        secret = files.key.read_text().splitlines()[1]
        assert not any(key in text or secret in text for text in traces(engine))
        assert "Traceback" not in engine.output


def test_on_loopback_no_key_is_needed_but_a_wrong_one_is_said(tmp_path: Path) -> None:
    home = tmp_path / "h"
    with EngineProcess(home, "toy:4", "--local-nodes", "1") as engine:
        url = local_url(engine)
        with openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0, timeout=60.0) as client:
            said = say(client)
            key = new_key(home, "laptop")
            until(lambda: httpx.get(url + "/v1/models", headers={"Authorization": "Bearer x"}).is_error, "noticed")
            refused(client)
            assert say(client.with_options(api_key=key)) == said
        assert httpx.get(url + "/v1/models").is_success and "epoch" in httpx.get(url + "/health").json()


def test_bad_tls_files_are_a_sentence(tmp_path: Path) -> None:
    one, other = self_signed(tmp_path), self_signed(tmp_path, "other")
    for given, words in (
        (("--tls-cert", str(one.certificate)), "--tls-key"),
        (("--tls-cert", str(one.certificate), "--tls-key", str(other.key)), "is not the key of"),
        (("--tls-cert", str(tmp_path / "none"), "--tls-key", str(other.key)), "cannot be read"),
    ):
        done = command("--serve", "toy:4", *given, "--home", str(tmp_path / "h"), "--port", "0", "--control-port", "0")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("add", "a b"), "name"),
        (("add", "a", "--expires", "soon"), "--expires"),
        (("revoke", "nobody"), "key list"),
    ],
)
def test_mistakes_at_the_command_are_a_sentence(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    done = command("key", *words, "--home", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert done.stderr.startswith("dwarfstar: ") and told in done.stderr
