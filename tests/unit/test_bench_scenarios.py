"""Scenarios against peers made up here: who takes part, what is sent, what comes out."""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from dwarfstar_engine.bench import scenarios, stats
from dwarfstar_engine.bench.client import Answer, ApartError, Ask, Load
from dwarfstar_engine.bench.peers import ALL_CORES, REFERENCE, RPC, SPLIT, SPLIT_OFF, UNSPLIT
from dwarfstar_engine.bench.prompts import Prompts, chat, prose
from dwarfstar_engine.bench.scenarios import Lab
from dwarfstar_engine.views import StatusView

TOKEN_S = 0.01
CONTEXT = 4096


def _words(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) % 40_000 for word in text.split()]


@dataclass
class Fake:
    """Answers at TOKEN_S ÷ speed a token, the first after a token's time for each 100 of the prompt."""

    name: str
    speed: float = 1.0
    head_pid: int = 0
    asked: list[Ask] = field(default_factory=list)

    def load(self, asks: Sequence[Ask]) -> Load:
        self.asked += asks
        return Load(tuple(self._answer(ask) for ask in asks), 0.001 * len(asks))

    def _answer(self, ask: Ask) -> Answer:
        step = TOKEN_S / self.speed
        begin = step * len(ask.body.get("prompt", range(100))) / 100 if not ask.body.get("cache_prompt") else step / 10
        times = [begin + step * index for index in range(ask.body["max_tokens"])]
        return Answer(0.0, tuple(times), times[-1], len(times), f"{self.name} said")


def _lab() -> Lab:
    def status(home: Path) -> StatusView:
        raise AssertionError("these peers have no stages")

    return Lab(Prompts(_words), 24, status)


def _everybody() -> list[Fake]:
    return [
        Fake(SPLIT, 2.0), Fake(SPLIT_OFF), Fake(UNSPLIT), Fake(ALL_CORES, 4.0), Fake(RPC), Fake(REFERENCE),
    ]  # fmt: skip


@pytest.mark.parametrize("has_speculation", [False, True])
def test_every_measure_of_every_scenario_gets_a_value_of_each_run(
    has_speculation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "READING_S", 0.0)
    lab, peers = _lab(), _everybody()
    found = list(scenarios.scenarios((), CONTEXT, has_speculation))
    for scenario in found:
        values = scenarios.measure(scenario, peers, 3, lab, lambda text: None)
        needs_stages = {m.key for m in scenario.measures if m.key.endswith(".limit")}
        assert set(values) == {m.key for m in scenario.measures} - needs_stages
        for by_peer in values.values():
            assert set(by_peer) <= set(scenario.peers) and all(len(runs) == 3 for runs in by_peer.values())
    assert ("speculation" in {scenario.name for scenario in found}) is has_speculation
    assert lab.client_tokens > 0


def test_speeds_come_out_as_they_are() -> None:
    (one, *_) = scenarios.scenarios(("decode",), CONTEXT, False)
    values = scenarios.measure(one, _everybody(), 2, _lab(), lambda text: None)["decode.1"]
    assert values[UNSPLIT] == pytest.approx([100.0, 100.0]) and values[SPLIT] == pytest.approx([200.0, 200.0])
    assert SPLIT_OFF not in values


@pytest.mark.parametrize("failures", [scenarios.TRIES - 1, scenarios.TRIES])
def test_streams_that_pass_each_other_by_are_run_again(failures: int) -> None:
    class Late(Fake):
        def load(self, asks: Sequence[Ask]) -> Load:
            late = len(self.asked) // len(asks) < failures
            done = super().load(asks)
            behind = [replace(answer, times=(99.0, 99.5), ended=99.5) for answer in done.answers[1:]]
            return replace(done, answers=(done.answers[0], *behind)) if late else done

    (_, four, _) = scenarios.scenarios(("decode",), CONTEXT, False)
    said: list[str] = []
    if failures < scenarios.TRIES:
        values = scenarios.measure(four, [Late(SPLIT)], 1, _lab(), said.append)["decode.4"]
        assert values[SPLIT] == pytest.approx([400.0])
    else:
        with pytest.raises(ApartError):
            scenarios.measure(four, [Late(SPLIT)], 1, _lab(), said.append)
    assert sum("once more" in line for line in said) == scenarios.TRIES - 1


def test_one_stream_is_measured_without_drafts_where_the_engine_can_draft() -> None:
    (one, four, _) = scenarios.scenarios(("decode",), CONTEXT, True)
    assert SPLIT_OFF in one.peers and SPLIT not in one.peers
    assert SPLIT in four.peers and SPLIT_OFF not in four.peers


def test_all_peers_get_the_same_prompts_and_no_run_repeats_one() -> None:
    (*_, ttft, _) = scenarios.scenarios(("ttft",), CONTEXT, False)
    peers = [Fake(SPLIT), Fake(UNSPLIT)]
    scenarios.measure(ttft, peers, 4, _lab(), lambda text: None)
    ours, theirs = ([ask.body["prompt"] for ask in peer.asked] for peer in peers)
    assert ours == theirs and len(ours) == 4
    assert {len(prompt) for prompt in ours} == {2000} and len({tuple(prompt[:2]) for prompt in ours}) == 4


def test_a_gap_counts_if_it_reaches_into_the_time_asked_for() -> None:
    answer = Answer(0.0, (0.0, 1.0, 4.0, 5.0, 6.0), 6.0, 5, "")
    assert scenarios.gaps_ms([answer], 2.0, 5.0) == [3000.0, 1000.0]


def test_long_prompts_are_left_out_where_the_context_is_short() -> None:
    keys = {m.key for scenario in scenarios.scenarios((), 1024, False) for m in scenario.measures}
    assert "ttft.700" in keys and "ttft.2000" not in keys and "itl.busy" not in keys


def test_a_second_turn_is_compared_with_the_same_messages_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    (turn,) = scenarios.scenarios(("turn",), CONTEXT, False)
    peer = Fake(SPLIT)
    values = scenarios.measure(turn, [peer], 1, _lab(), lambda text: None)
    first, warm, other, later, cold = (ask.body for ask in peer.asked)
    assert pauses == [0.0, scenarios.READING_S]
    assert later["messages"][:2] == other["messages"] and later["messages"][0] != warm["messages"][0]
    assert warm["messages"][:2] == first["messages"] and warm["cache_prompt"] is True
    assert cold["messages"][1:] == warm["messages"][1:] and cold["messages"][0] != warm["messages"][0]
    assert cold["cache_prompt"] is False and values["turn.ratio"][SPLIT][0] < 1


def test_prompts_have_the_length_asked_for_and_share_at_most_a_token() -> None:
    prompts = Prompts(_words)
    made = [prompts.unique(length) for length in (2, 40, 2000, 5000) * 100]
    assert [len(prompt) for prompt in made[:4]] == [2, 40, 2000, 5000]
    assert len({tuple(prompt[:2]) for prompt in made}) == len(made)


def test_prose_and_chats_are_the_same_for_the_same_seed() -> None:
    assert prose(50, 3) == prose(50, 3) != prose(50, 4)
    assert chat("a", 30, 1)[1] == chat("b", 30, 1)[1]


def test_percentiles_ratios_and_novelty() -> None:
    assert stats.percentile([5, 1, 2, 3, 4], 0.99) == 5 and stats.percentile([1, 2, 3, 4], 0.5) == 2
    assert stats.percentile(list(range(1, 101)), 0.99) == 99
    assert stats.ratio([2, 9, 4], [1, 3, 4]) == 2, "the median of 2, 3 and 1, not a ratio of medians"
    assert stats.novelty("the same again. " * 40) < 0.2 < stats.novelty(prose(100, 1))


@pytest.mark.parametrize(("work_s", "rests"), [(1.0, True), (60.0, False)])
def test_the_next_peer_waits_until_an_engine_rests(work_s: float, rests: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process started counts, too."""
    monkeypatch.setattr(scenarios, "REST_S", 0.1)
    until = f"until = time.monotonic() + {work_s}"
    work = f"import time; print(1, flush=True); {until}\nwhile time.monotonic() < until: pass\ninput()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"1\n"  # it works
            began = time.monotonic()
            assert scenarios.rest((process.pid,), 6.0 if rests else 0.8) is rests
            assert time.monotonic() - began >= min(work_s, 0.8) - 0.1
        finally:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it counts in ticks")
def test_the_heads_processor_is_measured_finer_than_a_tick() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            time.sleep(0.3)
            found = scenarios.head_cpu_s(Fake(SPLIT, head_pid=process.pid))
            times = psutil.Process(process.pid).cpu_times()
            assert 0 < found <= times.user + times.system + 0.1
            assert round(found, 2) != found  # ticks are hundredths
        finally:
            process.kill()
    assert scenarios.head_cpu_s(Fake(SPLIT)) == 0.0
