"""What an engine's HTTP API is bound to decides who may come in; and with which key `dwarfstar chat` goes there."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dwarfstar_engine.api.errors import KeyRefused
from dwarfstar_engine.api.keybook import KeyStore, key_folder
from dwarfstar_engine.cli import chat, running
from dwarfstar_engine.cli.chat import target
from dwarfstar_engine.cli.door import Door, open_door
from dwarfstar_engine.errors import DwarfStarError, SettingsError, TrustError
from dwarfstar_engine.settings import Settings
from support.certificates import self_signed

NOW = datetime.now(UTC)
LOOPBACK = [("127.0.0.1", 80), ("127.8.9.1", 80), ("::1", 80, 0, 0)]
ELSEWHERE = [("0.0.0.0", 80), ("::", 80, 0, 0), ("192.0.2.7", 80), ("fe80::1%eth0", 80, 0, 2), ("::ffff:127.0.0.1", 80)]


def make_key(home: Path) -> str:
    return KeyStore(key_folder(home), lambda: NOW).issue("laptop")


def lets_in(door: Door, *headers: str) -> bool:
    try:
        door.gate.check(headers)
    except KeyRefused:
        return False
    return True


@pytest.mark.parametrize("bound", LOOPBACK)
def test_loopback_is_open(tmp_path: Path, bound: tuple[str, int]) -> None:
    door = open_door(Settings(home=tmp_path), bound, NOW)
    assert (door.public, door.notes, door.curl) == (False, (), "")
    assert lets_in(door) and door.url.startswith("http://")


@pytest.mark.parametrize("bound", ELSEWHERE)
async def test_elsewhere_there_must_be_a_key(tmp_path: Path, bound: tuple[str, int]) -> None:
    with pytest.raises(SettingsError) as refused:
        open_door(Settings(home=tmp_path), bound, NOW)
    assert f"`dwarfstar key add NAME --home {tmp_path}`" in refused.value.message
    key = make_key(tmp_path)
    door = open_door(Settings(home=tmp_path), bound, NOW)
    assert door.public and not lets_in(door) and lets_in(door, f"Bearer {key}")
    assert len(door.notes) == 1 and "plain text" in door.notes[0]
    assert "$DWARFSTAR_API_KEY" in door.curl and key not in repr(door)


def test_keys_that_have_all_ended_are_none(tmp_path: Path) -> None:
    KeyStore(key_folder(tmp_path), lambda: NOW).issue("laptop", timedelta(hours=1))
    open_door(Settings(home=tmp_path), ELSEWHERE[0], NOW)
    with pytest.raises(SettingsError, match="key add"):
        open_door(Settings(home=tmp_path), ELSEWHERE[0], NOW + timedelta(hours=1))


def test_a_damaged_file_opens_no_door(tmp_path: Path) -> None:
    make_key(tmp_path)
    KeyStore(key_folder(tmp_path), lambda: NOW).path.write_bytes(b"{")
    for bound in (LOOPBACK[0], ELSEWHERE[0]):
        with pytest.raises(TrustError, match="damaged"):
            open_door(Settings(home=tmp_path), bound, NOW)


def test_https_is_shown_and_nothing_is_in_plain_text(tmp_path: Path) -> None:
    make_key(tmp_path)
    files = self_signed(tmp_path)
    settings = Settings(home=tmp_path, tls_cert=files.certificate, tls_key=files.key)
    door = open_door(settings, ELSEWHERE[2], NOW)
    assert (door.url, door.notes, door.certificate) == ("https://192.0.2.7:80", (), str(files.certificate))
    assert str(files.certificate) in door.curl and door.tls is not None
    with pytest.raises(SettingsError, match="--tls-key"):
        open_door(settings.model_copy(update={"tls_key": files.certificate}), LOOPBACK[0], NOW)


# --- dwarfstar chat ---


@pytest.mark.parametrize(
    ("key", "environment", "here", "there"),
    [
        (None, {}, None, None),
        (" ", {"DWARFSTAR_API_KEY": ""}, None, None),
        ("a", {"DWARFSTAR_API_KEY": "b", "OPENAI_API_KEY": "ds-c"}, "a", "a"),
        (None, {"DWARFSTAR_API_KEY": "b\n", "OPENAI_API_KEY": "ds-c"}, "b", "b"),
        (None, {"OPENAI_API_KEY": "ds-c"}, "ds-c", "ds-c"),
        (None, {"OPENAI_API_KEY": "sk-c"}, None, "sk-c"),  # OpenAI's own is of no use to an engine of ours
    ],
)
def test_which_key_chat_sends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str | None,
    environment: Mapping[str, str],
    here: str | None,
    there: str | None,
) -> None:
    engine = running.Running(pid=1, started=0.0, control="c", api_url="http://127.0.0.1:1/")
    monkeypatch.setattr(running, "require", lambda home: engine)
    own = target(None, key, tmp_path, environment)
    assert (own.api_url, own.key, own.verify) == ("http://127.0.0.1:1", here, True)
    assert target("http://x/", key, tmp_path, environment) == chat.Target("http://x", there)


def test_a_key_is_not_shown(tmp_path: Path) -> None:
    assert "hunter2" not in repr(target("http://x", "hunter2", tmp_path, {}))
    for bad in ("hunter2\r\nx: y", "hunterä"):
        with pytest.raises(DwarfStarError) as refused:
            target("http://x", bad, tmp_path, {})
        assert "hunter" not in refused.value.message
