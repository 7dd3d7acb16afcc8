"""API keys in their book and in their file: who gets in, until when, and what damage and strangers cannot do."""

from __future__ import annotations

import hmac
import json
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dwarfstar_engine.api import keybook
from dwarfstar_engine.api.keybook import (
    ApiKey,
    Ended,
    KeyBook,
    KeyStore,
    Known,
    Unknown,
    add,
    format_key,
    judge,
    key_hash,
    lifetime,
    note_used,
    revoke,
)  # fmt: skip
from dwarfstar_engine.errors import SettingsError, TrustError
from support.api_keys import NOW, book

DAY = timedelta(days=1)
KEY = format_key(bytes(32))
DAMAGED = [b"", b"{}x", b"[]", b'{"version": 2}', b'{"keys": [{"name": "a"}]}', b"\xff\xfe", b"[" * 100_000]


def store(folder: Path, now: datetime = NOW) -> KeyStore:
    return KeyStore(folder / "keys", lambda: now)


def refusal(held: KeyBook, name: str, now: datetime = NOW) -> str:
    with pytest.raises(SettingsError) as refused:
        add(held, name, KEY, now, None)
    assert refused.value.exit_code == 2
    return refused.value.code


# --- the book ---


def test_a_key_says_whose_it_is_and_holds_all_its_bits() -> None:
    assert KEY == "ds-" + "A" * 43
    assert re.fullmatch(r"ds-[A-Za-z0-9_-]{43}", format_key(bytes(range(223, 255))))
    assert len({format_key(bytes([n]) + bytes(31)) for n in range(256)}) == 256


def test_a_key_is_known_until_it_ends() -> None:
    held = book("alpha", lasts=DAY)
    assert judge(held, "alpha", NOW + DAY - timedelta(seconds=1)) == Known(held.keys[0])
    assert judge(held, "alpha", NOW + DAY) == Ended(held.keys[0], NOW + DAY)
    assert judge(book("alpha"), "alpha", NOW + 10_000 * DAY) == Known(book("alpha").keys[0])


@given(st.text(max_size=64))
def test_any_other_text_is_unknown(text: str) -> None:
    assert isinstance(judge(book("alpha", "bravo"), text, NOW), Unknown) == (text not in ("alpha", "bravo"))


def test_all_keys_are_compared_in_constant_time_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    held, compared = book("alpha", "bravo", "charlie"), list[str]()
    honest = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append(other)
        return honest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for key in ("alpha", "charlie", "nobody"):
        compared.clear()
        judge(held, key, NOW)
        assert compared == [kept.hash for kept in held.keys]


def test_names_are_unique_until_a_key_has_ended() -> None:
    held = add(KeyBook(), "laptop", "ds-1111", NOW, DAY)
    assert refusal(held, "laptop") == "key_exists"
    again = add(held, "laptop", "ds-2222", NOW + DAY, None)
    assert [key.last for key in again.keys] == ["2222"]
    assert isinstance(judge(again, "ds-1111", NOW), Unknown)


@pytest.mark.parametrize("name", ["", " ", "-a", "a b", "a\n", "ä", "a" * 49, "a/b", "a;rm", "\x00"])
def test_a_name_that_is_none(name: str) -> None:
    assert refusal(KeyBook(), name) == "bad_key_name"


def test_keys_are_bounded_and_ended_ones_make_room() -> None:
    held = add(KeyBook(), "first", "ds-first", NOW, DAY)
    for number in range(keybook.MAX_KEYS - 1):
        held = add(held, f"k{number}", f"ds-k{number:04}", NOW, None)
    assert refusal(held, "more") == "too_many_keys"
    later = add(held, "more", KEY, NOW + DAY, None)
    assert len(later.keys) == keybook.MAX_KEYS and "first" not in {key.name for key in later.keys}


def test_the_longest_book_is_far_within_what_is_read_of_its_file() -> None:
    held = KeyBook()
    for number in range(keybook.MAX_KEYS):
        held = add(held, f"{number:048}", KEY, NOW.replace(microsecond=123456), 3000 * DAY)
        held = note_used(held, held.keys[-1].hash, NOW.date())
    assert len(held.model_dump_json(indent=1)) < keybook.MAX_FILE_BYTES / 2


def test_a_revoked_key_is_unknown_and_others_stay() -> None:
    held = revoke(book("alpha", "bravo"), "k0")
    assert isinstance(judge(held, "alpha", NOW), Unknown) and isinstance(judge(held, "bravo", NOW), Known)
    with pytest.raises(SettingsError) as refused:
        revoke(held, "k0")
    assert refused.value.code == "no_such_key" and "key list" in refused.value.message


def test_days_of_use_never_go_back_and_gone_keys_stay_gone() -> None:
    held = note_used(book("alpha"), key_hash("alpha"), date(2026, 11, 21))
    assert held.keys[0].used == date(2026, 11, 21)
    assert note_used(held, key_hash("alpha"), date(2026, 11, 20)) == held
    assert note_used(KeyBook(), key_hash("alpha"), date(2026, 11, 21)) == KeyBook()


def test_whether_anybody_can_come_in() -> None:
    assert not KeyBook().usable(NOW)
    assert book("alpha", lasts=DAY).usable(NOW) and not book("alpha", lasts=DAY).usable(NOW + DAY)


@pytest.mark.parametrize(("text", "hours"), [("12h", 12), ("30d", 720), ("8w", 1344), ("3660d", 87840)])
def test_lifetimes(text: str, hours: int) -> None:
    assert lifetime(text) == timedelta(hours=hours)


@given(st.text(max_size=12) | st.from_regex(r"[0-9]+[hdw]"))
def test_any_lifetime_is_bounded_or_refused_in_a_short_sentence(text: str) -> None:
    try:
        assert timedelta() < lifetime(text) <= keybook.MAX_LIFETIME
    except SettingsError as refused:
        assert "--expires" in refused.message and len(refused.message) < 300


# --- the file ---


def test_the_file_holds_no_key_and_is_private(tmp_path: Path) -> None:
    held = store(tmp_path)
    key = held.issue("laptop", DAY)
    assert stat.S_IMODE(held.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(held.folder.stat().st_mode) == 0o700
    assert key not in held.path.read_text() and key[3:40] not in held.path.read_text()
    kept = held.read().keys[0]
    assert (kept.name, kept.last, kept.expires) == ("laptop", key[-4:], NOW + DAY)
    assert isinstance(judge(held.read(), key, NOW), Known)


def test_keys_differ(tmp_path: Path) -> None:
    held = store(tmp_path)
    assert len({held.issue(f"k{number}") for number in range(20)}) == 20


def test_no_file_is_no_keys_and_reading_makes_none(tmp_path: Path) -> None:
    assert store(tmp_path).read() == KeyBook()
    assert list(tmp_path.iterdir()) == []


def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store(tmp_path).issue(f"k{number}"), range(24)))
    assert {key.name for key in store(tmp_path).read().keys} == {f"k{number}" for number in range(24)}


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_one_sentence_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    held = store(tmp_path)
    held.issue("laptop")
    held.path.write_bytes(content)
    for change in (held.read, lambda: held.issue("other"), lambda: held.revoke("laptop")):
        with pytest.raises(TrustError) as refused:
            change()
        assert str(held.path) in refused.value.message and "\n" not in refused.value.message
        assert "damaged" in refused.value.message
    assert held.path.read_bytes() == content


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
    lambda value: json.dumps({"version": 1, "keys": value}).encode()
))  # fmt: skip
def test_any_file_is_a_book_or_damaged(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    held = KeyStore(tmp_path_factory.getbasetemp() / "fuzzed", lambda: NOW)
    held.folder.mkdir(mode=0o700, exist_ok=True)
    held.path.touch(mode=0o600)
    held.path.write_bytes(content)
    try:
        assert len(held.read().keys) <= keybook.MAX_KEYS
    except TrustError as refused:
        assert "damaged" in refused.message


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "a\n"}, {"name": "../a"}, {"hash": "0" * 63}, {"hash": "G" * 64}, {"last": "12345"},
        {"created": "2026-11-21T12:00:00"}, {"expires": "tomorrow"}, {"used": "yesterday"}, {"key": "ds-secret"},
    ],
)  # fmt: skip
def test_an_entry_that_is_none(entry: dict[str, str]) -> None:
    good = {"name": "a", "hash": "0" * 64, "last": "1234", "created": "2026-11-21T12:00:00Z"}
    ApiKey.model_validate_json(json.dumps(good))
    with pytest.raises(ValidationError):
        ApiKey.model_validate_json(json.dumps(good | entry))


def test_two_keys_of_one_name_are_damage(tmp_path: Path) -> None:
    held = store(tmp_path)
    held.issue("a")
    raw = json.loads(held.path.read_text())
    held.path.write_text(json.dumps(raw | {"keys": raw["keys"] * 2}))
    with pytest.raises(TrustError, match="damaged"):
        held.read()


def test_files_that_are_too_large_open_to_others_or_no_files(tmp_path: Path) -> None:
    held = store(tmp_path)
    held.issue("laptop")
    held.path.chmod(0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        held.read()
    held.path.chmod(0o600)
    held.path.write_bytes(b" " * (keybook.MAX_FILE_BYTES + 1))
    with pytest.raises(TrustError, match="larger than"):
        held.read()
    held.path.unlink()
    held.path.mkdir()
    with pytest.raises(TrustError, match="cannot be read"):
        held.read()


def test_times_of_other_zones_are_understood(tmp_path: Path) -> None:
    held = store(tmp_path)
    key = held.issue("a", DAY)
    raw = json.loads(held.path.read_text())
    raw["keys"][0]["expires"] = "2026-11-21T13:30:00+01:00"
    held.path.write_text(json.dumps(raw))
    assert isinstance(judge(held.read(), key, datetime(2026, 11, 21, 12, 29, tzinfo=UTC)), Known)
    assert isinstance(judge(held.read(), key, datetime(2026, 11, 21, 12, 30, tzinfo=UTC)), Ended)
