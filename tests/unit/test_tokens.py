"""Join tokens: who gets in, for how long, how often; and what strangers at the enrolment port can cost."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import SettingsError, TrustError
from dwarfstar_engine.node import tokens
from dwarfstar_engine.node.tokens import Book, TokenStore, add, admit, revoke
from dwarfstar_engine.wire import enrol, trust
from dwarfstar_engine.wire.enrol import CallLimit, WrongSecrets
from dwarfstar_engine.wire.private_files import locked
from dwarfstar_engine.wire.trust import Authority, NodeFiles

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SECRET = bytes(range(20))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return trust.create_authority(NOW)


def book(hours: float = 24.0, uses: int | None = None, secret: bytes = SECRET) -> Book:
    return add(Book(), trust.secret_hash(secret), NOW, hours, uses)


def refusal(held: Book, secret: bytes, node_id: str, now: datetime) -> str:
    with pytest.raises(TrustError) as refused:
        admit(held, secret, node_id, now)
    assert "dwarfstar token" in refused.value.message
    return refused.value.code


def test_a_token_lets_in_until_it_ends() -> None:
    held = book(hours=2)
    last = NOW + timedelta(hours=2)
    assert admit(held, SECRET, "k-a", last - timedelta(seconds=1)) == held
    assert refusal(held, SECRET, "k-a", last) == "token_expired"


def test_an_unknown_secret_is_refused() -> None:
    assert refusal(book(), bytes(20), "k-a", NOW) == "token_unknown"
    assert refusal(Book(), SECRET, "k-a", NOW) == "token_unknown"


@given(st.integers(1, 4), st.lists(st.sampled_from(["k-a", "k-b", "k-c", "k-d", "k-e", "k-f"]), max_size=12))
def test_a_counted_token_lets_in_so_many_machines_each_as_often_as_it_asks(uses: int, asking: list[str]) -> None:
    held, let_in = book(uses=uses), set[str]()
    for node_id in asking:
        if node_id in let_in or len(let_in) < uses:
            held = admit(held, SECRET, node_id, NOW)
            let_in.add(node_id)
        else:
            assert refusal(held, SECRET, node_id, NOW) == "token_used"
    assert set(held.tokens[0].nodes) == let_in


def test_one_token_does_not_use_up_another() -> None:
    held = add(book(uses=1), trust.secret_hash(b"b" * 20), NOW, 1, 1)
    held = admit(held, SECRET, "k-a", NOW)
    assert admit(held, b"b" * 20, "k-b", NOW).tokens[0] == held.tokens[0]
    assert refusal(held, SECRET, "k-b", NOW) == "token_used"


def test_an_id_that_names_no_key_is_refused() -> None:
    for taken in ("coordinator", "local-1", "own-1234"):
        with pytest.raises(TrustError) as refused:
            admit(book(), SECRET, taken, NOW)
        assert refused.value.code == "token_id"


def test_a_revoked_token_lets_nobody_in_and_says_so() -> None:
    held = add(book(uses=2), trust.secret_hash(b"b" * 20), NOW, 1, None)
    held = admit(held, SECRET, "k-a", NOW)
    held = revoke(held, held.tokens[0].id.upper(), NOW)
    assert refusal(held, SECRET, "k-b", NOW) == refusal(held, SECRET, "k-a", NOW) == "token_revoked"
    assert admit(held, b"b" * 20, "k-b", NOW) == held
    assert revoke(held, held.tokens[0].id, NOW + timedelta(hours=1)) == held, "the first time stays"
    with pytest.raises(TrustError, match="dwarfstar token list"):
        revoke(held, "ffffffff", NOW)


def test_what_a_token_is_good_for() -> None:
    held = book(hours=1, uses=1)
    assert held.tokens[0].state(NOW) == "valid"
    assert admit(held, SECRET, "k-a", NOW).tokens[0].state(NOW) == "used"
    assert held.tokens[0].state(NOW + timedelta(hours=1)) == "ended"
    assert revoke(held, held.tokens[0].id, NOW).tokens[0].state(NOW + timedelta(hours=1)) == "revoked"
    assert SECRET.hex()[:8] not in held.tokens[0].id and held.tokens[0].hash.startswith(held.tokens[0].id)


def test_a_removed_machine_needs_a_token_made_later() -> None:
    assert refusal_of_removed(NOW) == refusal_of_removed(NOW + timedelta(seconds=1)) == "token_removed"
    admit(book(), SECRET, "k-a", NOW, removed=NOW - timedelta(seconds=1))


def refusal_of_removed(removed: datetime) -> str:
    with pytest.raises(TrustError) as refused:
        admit(book(), SECRET, "k-a", NOW, removed)
    return refused.value.code


def test_revoked_tokens_make_room_and_a_book_of_an_older_release_is_read() -> None:
    held = Book()
    for number in range(tokens.MAX_TOKENS):
        held = add(held, trust.secret_hash(bytes([number])), NOW, 1, None)
    held = revoke(held, held.tokens[5].id, NOW)
    later = add(held, trust.secret_hash(b"x"), NOW, 1, None)
    assert held.tokens[5] not in later.tokens and len(later.tokens) == tokens.MAX_TOKENS
    old = book().model_dump_json(exclude={"tokens": {"__all__": {"revoked"}}})
    assert "revoked" not in old and Book.model_validate_json(old) == book()


def test_wrong_secrets_cost_more_and_more_time_and_others_none() -> None:
    wrong, now, waits = WrongSecrets(), 0.0, list[float]()
    for _ in range(14):
        assert wrong.wait_s("b", now) == 0
        wrong.wrong("a", now)
        waits.append(wrong.wait_s("a", now))
        now += waits[-1]
        assert wrong.wait_s("a", now) == 0, "the wait is over when it is over"
    assert waits[: enrol.WRONG_FREE + 2] == [0, 0, 0, 0, 10, 20, 40]
    assert max(waits) == enrol.WRONG_LONGEST_S == waits[-1]
    wrong.right("a")
    wrong.wrong("a", now)
    assert wrong.wait_s("a", now) == 0


def test_wrong_secrets_of_long_ago_are_forgotten() -> None:
    wrong = WrongSecrets()
    for _ in range(enrol.WRONG_FREE):
        wrong.wrong("a", 0.0)
    wrong.wrong("a", enrol.WRONG_LONGEST_S + 1)
    assert wrong.wait_s("a", enrol.WRONG_LONGEST_S + 1) == 0


def test_many_sources_of_wrong_secrets_cost_bounded_memory() -> None:
    wrong = WrongSecrets()
    for source in range(3 * enrol.WRONG_SOURCES):
        for _ in range(enrol.WRONG_FREE):
            wrong.wrong(str(source), 0.0)
    assert len(wrong._wrong) == enrol.WRONG_SOURCES
    assert wrong.wait_s("0", 0.0) == 0 < wrong.wait_s(str(3 * enrol.WRONG_SOURCES - 1), 0.0)


def test_tokens_are_bounded_and_ended_ones_make_room() -> None:
    held = Book()
    for number in range(tokens.MAX_TOKENS):
        held = add(held, trust.secret_hash(bytes([number])), NOW, 1, None)
    with pytest.raises(TrustError, match="the most"):
        add(held, trust.secret_hash(b"x"), NOW, 1, None)
    later = add(held, trust.secret_hash(b"x"), NOW + timedelta(hours=2), 1, None)
    assert len(later.tokens) == tokens.MAX_TOKENS
    assert [token.hash for token in later.tokens] == [*(t.hash for t in held.tokens[1:]), trust.secret_hash(b"x")]
    assert len(add(later, trust.secret_hash(b"y"), NOW + tokens.KEPT * 2, 1, None).tokens) == 1


@pytest.mark.parametrize(
    ("hours", "uses"),
    [
        (0.0, None),
        (-1.0, None),
        (float("nan"), None),
        (tokens.MAX_HOURS + 1, None),
        (1.0, 0),
        (1.0, tokens.MAX_USES + 1),
    ],
)
def test_numbers_out_of_bounds_are_refused(hours: float, uses: int | None) -> None:
    with pytest.raises(SettingsError, match="--hours" if uses is None else "--uses"):
        add(Book(), "0" * 64, NOW, hours, uses)


def test_the_store_keeps_no_secret_and_is_private(authority: Authority, tmp_path: Path) -> None:
    token = TokenStore(tmp_path, lambda: NOW).issue(authority)
    path = tmp_path / tokens.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text("utf-8")
    assert token.secret.hex() not in text and token.format().rsplit(".", 1)[1] not in text
    TokenStore(tmp_path, lambda: NOW).admit(token.secret, "k-a", "laptop")


def test_the_engine_sees_tokens_made_and_withdrawn_while_it_runs(authority: Authority, tmp_path: Path) -> None:
    engine, command = (TokenStore(tmp_path, lambda: NOW) for _ in range(2))
    with pytest.raises(TrustError, match="not known"):
        engine.admit(SECRET, "k-a", "x")
    token = command.issue(authority)
    engine.admit(token.secret, "k-a", "x")
    (tmp_path / tokens.FILE).unlink()
    with pytest.raises(TrustError, match="not known"):
        engine.admit(token.secret, "k-a", "x")


def test_machines_that_join_at_once_do_not_share_a_use(authority: Authority, tmp_path: Path) -> None:
    token = TokenStore(tmp_path, lambda: NOW).issue(authority, uses=5)

    def join(number: int) -> bool:
        try:
            TokenStore(tmp_path, lambda: NOW).admit(token.secret, f"k-{number}", "x")
        except TrustError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(join, range(20))) == 5


@pytest.mark.parametrize("content", [b"", b"{}x", b'{"version": 2}', b'{"tokens": [{"hash": "short"}]}'])
def test_a_damaged_file_lets_nobody_in_and_its_path_is_not_told(
    authority: Authority, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = TokenStore(tmp_path, lambda: NOW)
    store.issue(authority)
    (tmp_path / tokens.FILE).write_bytes(content)
    with pytest.raises(TrustError) as refused:
        store.admit(SECRET, "k-a", "x")
    assert str(tmp_path) not in refused.value.message
    assert str(tmp_path) in caplog.text
    with pytest.raises(TrustError, match="damaged"):
        store.issue(authority)


def test_a_lock_is_held_by_one_and_freed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, 0.0), pytest.raises(TrustError) as refused, locked(path, 0.0):
        pass
    assert refused.value.code == "locked"
    with locked(path, 0.0):
        pass


def test_an_id_that_names_a_key_is_signed_for_that_key_only(authority: Authority, tmp_path: Path) -> None:
    own, other = NodeFiles(tmp_path / "own"), NodeFiles(tmp_path / "other")
    name = own.key_id()
    assert name == own.key_id() != other.key_id()
    certificate = trust.sign_request(authority, own.request(name), name, NOW)
    assert trust.certificate_node_id(certificate) == name
    with pytest.raises(TrustError, match="another key"):
        trust.sign_request(authority, other.request(name), name, NOW)


def test_calls_of_one_source_are_bounded_and_others_are_not_hindered() -> None:
    limit = CallLimit()
    assert all(limit.allows("a", 1.0) for _ in range(enrol.CALLS_PER_SOURCE))
    assert not limit.allows("a", 1.0)
    assert limit.allows("b", 1.0)
    assert limit.allows("a", 1.0 + enrol.WINDOW_S)


def test_many_sources_cost_bounded_memory() -> None:
    limit = CallLimit()
    allowed = [limit.allows(str(source), 1.0) for source in range(2 * enrol.MAX_SOURCES)]
    assert allowed == [True] * enrol.MAX_SOURCES + [False] * enrol.MAX_SOURCES
    assert len(limit.calls) <= enrol.MAX_SOURCES


def test_where_machines_join() -> None:
    assert enrol.join_port(8477) == 8478
    assert enrol.join_port(0) == 0 == enrol.join_port(65535)
