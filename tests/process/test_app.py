"""The app in a terminal, with a real engine: attach, move a boundary, carry it out, chat, detach, come back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.engine_process import PROGRAM, EngineProcess, environment, until
from support.terminal import Terminal

pytestmark = pytest.mark.process

SIZE = (120, 40)
GROWN_BYTES = 24 << 20  # an allocator's caches; what is queued for a terminal that does not read is far less


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("app") / "home"
    options = ("--local-nodes", "3", "--threads", "1", "--slots", "2", "--context", "512")
    with EngineProcess(home, "demo", *options) as engine:
        yield engine.wait_serving()


def app(engine: EngineProcess, *more: str) -> Terminal:
    arguments = [*PROGRAM, "--home", str(engine.home), *more]
    return Terminal(arguments, environment(TEXTUAL_ANIMATIONS="none"), SIZE)


def cuts(engine: EngineProcess) -> list[int]:
    return [stage.layers[1] for stage in engine.status().stages[:-1]]


def test_a_boundary_is_moved_and_the_engine_outlives_the_app(engine: EngineProcess) -> None:
    before, epoch = cuts(engine), engine.status().epoch
    with app(engine) as here:
        here.sees(r"● ok +node3")
        here.press("2")
        here.sees(r"predicted \d")
        here.press("]", "left", "left")
        here.sees(rf"boundary 2 of 2 at layer {before[1] - 2}, was {before[1]}")
        here.sees(r"loads node3 .*: (about|under)")
        assert cuts(engine) == before
        here.press("enter")
        here.sees("Carry this plan out")
        here.press("y")
        here.sees(rf"epoch {epoch + 1} serves")
        assert cuts(engine) == [before[0], before[1] - 2]
        here.press("3")
        here.sees("enter sends it to")
        here.press("Say hello.", "enter")
        here.sees(r"first token after [\d.]+ s")
        here.sees("Say hello.")
        here.press("esc")  # out of the prompt: by itself, as esc and a key at once are alt and that key
        until(lambda: "⏎ send" not in here.text, "the prompt has no focus")
        here.press("2")
        here.sees(r"measured now|nothing is measured")
        here.press("q")
        assert here.end() == 0
    assert engine.health()[0] == 200
    with app(engine) as again:
        again.sees("node3")
        again.press("2")
        again.sees("its owner's plan")
        again.press("u")
        again.sees("Go back to the plan before")
        again.press("y")
        again.sees(rf"epoch {epoch + 2} serves")
        assert cuts(engine) == before
        again.press("4")
        again.sees("owner plan")
        again.press("g")  # the first event: where loads came late, there are more than the screen holds
        again.sees("node joined")
        again.press("2")
        again.press("U")
        again.sees(r"boundary . of 2 at layer .*\n(.*\n)*.*loads node3")
        again.press("q")
        assert again.end() == 0


def closed(here: Terminal) -> None:
    until(lambda: "What node1 may lend" not in here.text, "the window is closed")


def test_an_override_is_refused_with_the_least_and_carried_out_with_another_plan(engine: EngineProcess) -> None:
    with app(engine) as here:
        here.sees(r"● ok +node1")
        node = engine.node("node1")
        assert node is not None
        started = node.override  # of local nodes the engine says what they lend
        here.press("v")
        here.sees("What node1 may lend")
        here.press("0.01", "enter")
        here.sees(r"must lend [\d.]+ GiB")
        here.press("esc")
        closed(here)
        here.press("v")
        here.sees("What node1 may lend")
        here.press("60%", "enter")
        here.sees(r"\[60%\]")
        closed(here)
        node = engine.node("node1")
        assert node is not None and node.override == "60%"
        here.press("V")
        here.sees(rf"node1 \[{started[:3]}")
        here.press("q")
        assert here.end() == 0


def test_read_only_shows_and_refuses_and_a_closed_terminal_ends_the_app(engine: EngineProcess) -> None:
    before = cuts(engine)
    with app(engine, "--readonly") as here:
        here.sees("READ-ONLY")
        here.press("2")
        here.sees(r"predicted \d")
        here.press("left")
        here.sees("DRAFT")
        here.sees(r"one stream [\d.]+ →")
        here.press("enter")
        here.sees("read-only: nothing is changed")
        here.hang_up()
        assert here.end() == 0
    assert cuts(engine) == before


def said(engine: EngineProcess, prompt: str, tokens: int) -> int:
    """Tokens of an answer that ends at its limit only."""
    body = {"model": "any", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return int(engine.post("/v1/completions", body).raise_for_status().json()["usage"]["completion_tokens"])


def test_a_terminal_that_stops_reading_holds_up_nobody_and_the_app_goes_on(engine: EngineProcess) -> None:
    with app(engine) as here:
        here.sees(r"● ok +node3")
        here.press("3")
        here.sees("enter sends it to")
        here.press("Tell a long story about a ship.", "enter")
        here.sees(r"tokens   esc stops|first token after")
        here.freeze()
        before = here.rss_bytes()
        with ThreadPoolExecutor(2) as pool:
            streams = [pool.submit(said, engine, f"{number} ships sailed", 48) for number in (3, 4)]
            assert [stream.result() for stream in streams] == [48, 48]
        engine.wait_idle()  # the app's own answer has come to its end, too
        assert here.rss_bytes() - before < GROWN_BYTES
        here.thaw()
        here.sees(r"first token after [\d.]+ s")
        here.press("esc")
        until(lambda: "⏎ send" not in here.text, "the prompt has no focus")
        here.press("1")
        here.sees(r"● ok +node3")
        here.press("q")
        assert here.end() == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_the_app_ends_with_its_terminal_and_the_engine_runs_on(engine: EngineProcess, frozen: bool) -> None:
    with app(engine) as here:
        here.sees(r"● ok +node3")
        if frozen:
            here.freeze()
        here.close()
        here.end()
    assert engine.health()[0] == 200


def test_a_storm_of_sizes_leaves_the_last_one(engine: EngineProcess) -> None:
    with app(engine) as here:
        here.sees(r"● ok +node3")
        for index in range(60):
            here.resize(40 + 7 * (index % 20), 8 + index % 50)
        here.resize(*SIZE)
        here.press("5")
        here.sees(r"models folder: .*\n(.*\n)*.*quit")
        here.press("q")
        assert here.end() == 0
