"""Renewal: when it is tried, with a clock that only moves when somebody waits; and that servers take new files."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import PeerError
from dwarfstar_engine.node import renewal
from dwarfstar_engine.wire import trust
from dwarfstar_engine.wire.trust import Authority, NodeFiles

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
AUTHORITY = trust.create_authority(NOW)


def _held() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return trust.issue_local(AUTHORITY, NodeFiles(Path(folder)), "n1", NOW).certificate_pem


HELD = _held()


class Clock:
    """Moves when it is waited on; ends the wait for good at ``until``."""

    def __init__(self, until: timedelta) -> None:
        self.now, self._end = NOW, NOW + until
        self.waits: list[float] = []

    def __call__(self) -> datetime:
        return self.now

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0, "it must not spin"
        self.waits.append(seconds)
        self.now += timedelta(seconds=seconds)
        if self.now >= self._end:
            raise asyncio.CancelledError


@pytest.fixture(scope="module")
def authority() -> Authority:
    return trust.create_authority(NOW)


async def keep(files: NodeFiles, renew: renewal.Renew, clock: Clock) -> None:
    with pytest.raises(asyncio.CancelledError):
        await renewal.keep_renewed(files, renew, clock, lambda: 0.5, clock.sleep)


async def test_a_certificate_is_renewed_at_two_thirds_of_each_of_its_lives(
    authority: Authority, tmp_path: Path
) -> None:
    files, life = NodeFiles(tmp_path), timedelta(days=3)
    trust.issue_local(authority, files, "n1", NOW, life)
    clock, at = Clock(timedelta(days=9)), []

    async def renew(which: NodeFiles) -> None:
        at.append(clock.now - NOW)
        trust.issue_local(authority, which, "n1", clock.now, life)

    await keep(files, renew, clock)
    assert [round(when / timedelta(days=1), 2) for when in at] == [2, 4, 6, 8]
    trust.check_identity(files.load(), clock.now)


async def test_failures_are_repeated_later_and_later_and_in_time(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, life = NodeFiles(tmp_path), timedelta(days=3)
    trust.issue_local(authority, files, "n1", NOW, life)
    clock, tries = Clock(timedelta(days=3)), []

    async def renew(which: NodeFiles) -> None:
        tries.append(clock.now)
        if clock.now < NOW + timedelta(days=2, hours=12):
            raise PeerError("nobody is there")
        trust.issue_local(authority, which, "n1", clock.now, life)

    await keep(files, renew, clock)
    gaps = [(b - a).total_seconds() for a, b in itertools.pairwise(tries)]
    assert gaps[:3] == [45, 90, 180] and max(gaps) <= renewal.LONGEST_RETRY_S
    assert len(tries) < 30 and caplog.text.count("nobody is there") == len(tries) - 1
    trust.check_identity(files.load(), clock.now)


async def test_files_that_cannot_be_read_are_looked_at_again(authority: Authority, tmp_path: Path) -> None:
    files, clock = NodeFiles(tmp_path), Clock(timedelta(hours=3))

    async def renew(which: NodeFiles) -> None:
        raise AssertionError("there is nothing to renew")

    await keep(files, renew, clock)
    assert clock.waits == [renewal.LONGEST_RETRY_S] * 3


@given(st.integers(-400, 400), st.integers(1, 10_000), st.floats(0, 1))
def test_pauses_have_bounds_whatever_the_clock_says(days: int, failures: int, jitter: float) -> None:
    now = NOW + timedelta(days=days)
    pause = renewal.retry_s(HELD, now, failures, jitter)
    assert renewal.SHORTEST_RETRY_S / 2 <= pause <= renewal.LONGEST_RETRY_S
    assert renewal.SHORTEST_RETRY_S <= renewal.look_s(HELD, now) <= renewal.LOOK_S


async def test_the_holder_of_the_ca_renews_what_is_its_own(authority: Authority, tmp_path: Path) -> None:
    files, clock = NodeFiles(tmp_path / "trust"), Clock(timedelta(days=1))
    before = trust.issue_local(authority, files, "coordinator", NOW, timedelta(hours=3))
    await keep(files, renewal.by_authority(authority, timedelta(hours=3), clock), clock)
    after = files.load()
    assert after.certificate_pem != before.certificate_pem and after.key_pem == before.key_pem
    trust.check_identity(after, clock.now)
    assert renewal.own_files(tmp_path) == [files]
