"""Keys and what they do, with a scripted cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual import events
from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from dwarfstar_engine.views import EventsView, EventView, OverrideView
from dwarfstar_tui import text, updates
from dwarfstar_tui.app import DwarfStarApp
from dwarfstar_tui.preferences import Preferences
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.screens.chat import ChatScreen
from dwarfstar_tui.screens.dialogs import Confirm, ShowToken, is_host
from dwarfstar_tui.screens.events import Timeline
from dwarfstar_tui.screens.help import HelpScreen, JumpScreen
from dwarfstar_tui.screens.lend_dialog import Lend
from dwarfstar_tui.updates import (
    AnswerOver,
    AnswerPiece,
    Ask,
    Drain,
    Happened,
    KeepChat,
    LentSet,
    Linked,
    LinkState,
    MakeToken,
    NameNode,
    Remove,
    SetLent,
    StartEngine,
    StatusSeen,
    StopAnswer,
)
from dwarfstar_tui.widgets.first_start import FirstStart
from dwarfstar_tui.widgets.header_bar import HeaderBar
from dwarfstar_tui.widgets.node_table import NodeTable
from dwarfstar_tui.widgets.prompt import Prompt
from dwarfstar_tui.widgets.runs_view import RunsView
from support.tui_cluster import AROUND, FITS, MODELS, NOW, WALL, Stage, history, home_lab, large, node, status

SIZE = (100, 30)
AppPilot = Pilot[None]


async def begin(stage: Stage, pilot: AppPilot) -> DwarfStarApp:
    stage.play()
    stage.tell(AROUND, MODELS)
    await pilot.pause()
    return stage.running


def asked(stage: Stage, kind: type[updates.Command]) -> list[updates.Command]:
    return [command for command in stage.asked if isinstance(command, kind)]


def shown(app: DwarfStarApp) -> str:
    """The whole screen as text."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def header(app: DwarfStarApp) -> str:
    return app.screen.query_one(HeaderBar).text


async def test_digits_go_to_screens_and_esc_comes_back() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        for key, name in (("2", "plan"), ("4", "events"), ("5", "models"), ("1", "cluster")):
            await pilot.press(key)
            assert app.current_mode == name
        for name in ("models", "events", "plan", "cluster", "cluster"):
            await pilot.press("escape")
            assert app.current_mode == name


async def test_a_click_on_a_tab_goes_there() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.click(HeaderBar, offset=(16, 1))
        assert app.current_mode == "plan"


async def test_ages_run_on_when_nothing_is_told() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        table = app.screen.query_one(NodeTable)
        assert "0.2s" in table.text
        stage.now += 3
        app.tick()
        assert "3.2s" in table.text
        assert "late" in table.text.splitlines()[0]


async def test_freeze_keeps_the_view_and_says_so() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("p")
        before = app.screen.query_one(NodeTable).text
        assert "FROZEN" in header(app)
        stage.now += 60
        stage.tell(StatusSeen(status([node("other", "cpu", 8, 2, 6)], []), stage.now, 1.0))
        assert app.screen.query_one(NodeTable).text == before
        await pilot.press("p")
        assert "other" in app.screen.query_one(NodeTable).text
        assert "FROZEN" not in header(app)


async def test_the_cursor_stays_with_its_machine() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        table = app.screen.query_one(NodeTable)
        await pilot.press("down")
        assert table.chosen is not None
        assert table.chosen.view.name == "garage-box"
        view = home_lab()
        stage.tell(StatusSeen(view.model_copy(update={"nodes": view.nodes[::-1]}), NOW, 1.0))
        assert table.chosen.view.name == "garage-box"
        await pilot.click(NodeTable, offset=(5, 0))
        assert table.chosen.view.name == "laptop"


async def test_a_high_screen_has_what_happened_last_in_sight() -> None:
    for size, seen in (((160, 48), True), ((120, 34), False)):
        stage = Stage(history(home_lab()))
        async with stage.app().run_test(size=size) as pilot:
            app = await begin(stage, pilot)
            assert ("laptop is late" in app.screen.query_one("#recent", RunsView).text) is seen
            assert app.screen.query_one("#recent").display is seen
            assert app.screen.query_one(NodeTable).region.height >= 5


async def test_enter_opens_the_details_on_a_narrow_screen() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=(80, 30)) as pilot:
        app = await begin(stage, pilot)
        assert not app.screen.query_one("#pane").display
        await pilot.press("enter")
        await pilot.pause()
        app.tick()
        assert "RTX 3090" in app.screen.query_one("#details", RunsView).text


async def test_drain_asks_and_the_same_key_undoes_it() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        await begin(stage, pilot)
        await pilot.press("d", "n")
        assert asked(stage, Drain) == []
        await pilot.press("d", "y")
        assert asked(stage, Drain) == [Drain("n-tower")]
        view = home_lab()
        drained = view.nodes[0].model_copy(update={"state": "drained"})
        stage.tell(StatusSeen(view.model_copy(update={"nodes": (drained, *view.nodes[1:])}), NOW, 1.0))
        await pilot.press("d")
        assert asked(stage, Drain)[1:] == [Drain("n-tower", undo=True)]


async def test_a_machine_is_given_a_name_or_its_own_again() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        await begin(stage, pilot)
        await pilot.press("n", "escape")
        assert asked(stage, NameNode) == []
        await pilot.press("n", *"den", "enter")
        await pilot.press("n", "backspace", "enter")
        assert asked(stage, NameNode) == [NameNode("n-tower", "den"), NameNode("n-tower", "")]


async def test_a_serving_machine_is_removed_only_when_its_name_is_typed() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("x", *"nas", "enter")
        assert isinstance(app.screen, Confirm)
        assert asked(stage, Remove) == []
        await pilot.press(*"tower", "enter")
        assert asked(stage, Remove) == [Remove("n-tower")]


async def test_an_idle_machine_is_removed_with_a_key() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        await begin(stage, pilot)
        await pilot.press("end", "up", "x", "enter")
        assert asked(stage, Remove) == [Remove("n-laptop")]


async def test_keys_that_come_in_one_burst_are_sent_in_their_order_and_whole() -> None:
    """A thin line delivers what was typed in a second at once, enter and the next prompt's beginning among it."""
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("3")
        for char in "hello\rmore":
            app.post_message(events.Key("enter" if char == "\r" else char, char))
        await pilot.pause()
        await pilot.pause()
        questions = [command for command in stage.asked if isinstance(command, Ask)]
        assert [question.messages[-1] for question in questions] == [("user", "hello")]
        assert app.screen.query_one(Prompt).text == "more"


async def test_marked_machines_are_meant_together() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("space", "down", "space")
        assert app.screen.query_one(NodeTable).text.count("✓") == 2
        await pilot.press("d")
        assert "tower, mini-pc" in shown(app)
        await pilot.press("y")
        assert asked(stage, Drain) == [Drain("n-tower"), Drain("n-mini-pc")]
        app.tick()
        assert "✓" not in app.screen.query_one(NodeTable).text


async def test_an_override_that_is_too_small_is_refused_with_the_least_and_a_new_plan_offered() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("v", *"lots", "enter")
        assert asked(stage, SetLent) == [], "that is no amount"
        app.screen.query_one(Input).value = "12"
        await pilot.press("enter")
        wish = SetLent("n-tower", "12")
        assert asked(stage, SetLent) == [wish]
        stage.tell(LentSet(wish, None, "tower must lend 19.52 GiB at least", "in_use"))
        await pilot.pause()
        assert "19.52 GiB at least" in shown(app) and "F2" in shown(app)
        await pilot.press("f2")
        again = SetLent("n-tower", "12", replan=True)
        assert asked(stage, SetLent) == [wish, again]
        view = OverrideView(node="tower", override="12", effective_vram_gib=12.0, replanned=True)
        stage.tell(LentSet(again, view))
        await pilot.pause()
        assert not isinstance(app.screen, Lend)


async def test_an_override_is_a_badge_and_can_be_reset() -> None:
    view = home_lab()
    nodes = (view.nodes[0].model_copy(update={"override": "50%", "effective_vram_gib": 12.0}), *view.nodes[1:])
    stage = Stage([*history(home_lab()), StatusSeen(view.model_copy(update={"nodes": nodes}), NOW, 1.0)])
    async with stage.app().run_test(size=(120, 34)) as pilot:
        app = await begin(stage, pilot)
        assert "tower [50%]" in app.screen.query_one(NodeTable).text
        await pilot.press("V")
        assert asked(stage, SetLent) == [SetLent("n-tower", "")]
        stage.tell(LentSet(SetLent("n-tower", ""), None, "tower must lend 19.52 GiB at least", "in_use"))
        await pilot.pause()
        assert isinstance(app.screen, Lend), "what is refused can be had with another plan"
        await pilot.press("f2")
        assert asked(stage, SetLent)[1:] == [SetLent("n-tower", "", replan=True)]
        await pilot.press("escape", "down", "V")
        assert len(asked(stage, SetLent)) == 2, "nothing is overridden there"


async def test_models_say_whether_they_fit_and_more_can_be_pulled() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=(120, 34)) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("5")
        stage.tell(MODELS)
        app.tick()
        judged = asked(stage, updates.JudgeModels)
        assert len(judged) == 1
        too_large = updates.Fit("/m/gemma-3-27b-it-Q4_K_M.gguf", problem="it takes 15.4 GiB, and there are 8.0")
        stage.tell(updates.ModelsJudged((*FITS[:1], too_large, *FITS[2:])))
        assert "3 machines, 8.62" in shown(app)
        assert "no: it takes 15.4 GiB" in shown(app)
        await pilot.press("g", *"a/b", "enter")
        assert asked(stage, updates.PullModel) == [updates.PullModel("a/b")]
        stage.tell(updates.PullSeen("a/b", "pulling  12%"))
        assert "a/b: pulling  12%" in shown(app)
        await pilot.press("X")
        assert asked(stage, updates.StopPull) == [updates.StopPull()]
        stage.tell(updates.PullSeen("a/b", "", over=True, problem="stopped"))
        assert "a/b: stopped" in shown(app)
        await pilot.press("X")
        assert len(asked(stage, updates.StopPull)) == 1


async def test_a_join_token_is_shown_and_copied() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("t")
        assert asked(stage, MakeToken) == [MakeToken()]
        stage.tell(updates.TokenMade("dwarfstar node --token ds1.abc", "ds1.abc", "192.168.1.10:8478", ()))
        await pilot.pause()
        assert isinstance(app.screen, ShowToken)
        await pilot.press("c")
        assert app.clipboard == "dwarfstar node --token ds1.abc"


async def test_a_machine_is_added_by_its_address() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("a", *"a;b", "enter")
        assert asked(stage, MakeToken) == []
        app.screen.query_one(Input).value = "ada@attic"
        await pilot.press("enter")
        stage.tell(updates.TokenMade("dwarfstar node --token ds1.abc", "ds1.abc", "192.168.1.10:8478", ()))
        await pilot.press("f7")
        assert app.clipboard == "ssh -t ada@attic dwarfstar node --join 192.168.1.10:8478 --token ds1.abc"


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "a b", "$(x)", "a;b", "a\nb", "x" * 256])
def test_what_a_shell_would_read_is_no_host(host: str) -> None:
    assert not is_host(host)


async def test_readonly_changes_nothing() -> None:
    stage = Stage(history(home_lab()), readonly=True)
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("d", "x", "t")
        app.submit(StartEngine(("--demo",)))
        await pilot.pause()
        assert isinstance(app.screen, AppScreen)
        assert not [one for one in stage.asked if isinstance(one, (Drain, Remove, MakeToken, StartEngine))]
        assert "READ-ONLY" in header(app)


async def test_a_thin_line_is_said() -> None:
    stage = Stage(history(home_lab()), slow=True)
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        assert "1 Hz" in header(app)


async def test_the_filter_narrows_the_table_and_esc_drops_it() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("slash", *"nvidia", "enter")
        table = app.screen.query_one(NodeTable)
        assert "mini-pc" not in table.text
        assert "garage-box" in table.text
        await pilot.press("escape")
        assert "mini-pc" in table.text


async def test_a_lost_engine_is_said_and_what_was_known_stays() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        stage.tell(Linked(LinkState.DOWN, NOW, "it does not answer"))
        assert "down" in header(app)
        assert "tower" in app.screen.query_one(NodeTable).text
        assert "does not answer" in app.screen.query_one("#alerts", RunsView).text
        await pilot.press("d")
        assert not isinstance(app.screen, Confirm)


async def test_the_first_start_leads_to_the_demo() -> None:
    stage = Stage([Linked(LinkState.NONE, NOW)])
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        assert app.screen.query_one(FirstStart).display
        await pilot.press("enter")
        assert asked(stage, StartEngine) == [StartEngine(("--demo",))]
        stage.tell(Linked(LinkState.STARTING, NOW), updates.StartLine("loading: 40 %"))
        assert "loading: 40 %" in app.screen.query_one("#lesson", RunsView).text


async def test_a_start_that_failed_is_said_and_one_may_choose_again() -> None:
    stage = Stage([Linked(LinkState.NONE, NOW)])
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        stage.tell(updates.StartLine("no model 'x'"), updates.StartLine("", over=True, failed=True))
        await pilot.pause()
        assert app.screen.query_one(FirstStart).display
        assert "no model 'x'" in shown(app)


async def test_an_empty_cluster_teaches() -> None:
    view = status([], [], model=None, state="unavailable", reason="no node has joined")
    stage = Stage([Linked(LinkState.UP, NOW), StatusSeen(view, NOW, 1.0)])
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        app.tick()
        lesson = app.screen.query_one("#lesson", RunsView).text
        for word in ("enp3s0", "192.168.1.10", "TCP 8477", "TCP 8478", "dwarfstar node", "no node has joined"):
            assert word in lesson


async def test_help_names_the_keys_of_what_has_the_focus() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=(100, 60)) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("question_mark")
        assert isinstance(app.screen, HelpScreen)
        assert "cluster.drain" in shown(app)
        await pilot.press("escape", "4", "f1")
        assert "timeline.end" in shown(app)


async def test_jump_mode_gives_the_focus() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("3", "escape")
        assert not isinstance(app.focused, Prompt)
        await pilot.press("semicolon")
        assert isinstance(app.screen, JumpScreen)
        await pilot.press("s")
        assert isinstance(app.focused, Prompt)


async def test_y_copies_toml_that_can_be_read_back() -> None:
    import tomllib

    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("y")
        assert tomllib.loads(app.clipboard)["node"]["name"] == "tower"
        await pilot.press("2", "y")
        assert tomllib.loads(app.clipboard)["plan"]["stages"][1] == {"node": "garage-box", "layers": [44, 66]}


async def test_the_palette_opens_with_a_colon() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("colon")
        assert type(app.screen).__name__ == "CommandPalette"


async def test_the_engine_is_stopped_only_when_that_is_typed() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        app.action_stop_engine()
        await pilot.press("enter")
        assert asked(stage, updates.StopEngine) == []
        await pilot.press(*"stop", "enter")
        assert asked(stage, updates.StopEngine) == [updates.StopEngine()]


async def test_a_keymap_is_used_and_unknown_ids_are_told() -> None:
    liked = Preferences(keys={"cluster.token": "k", "cluster.tokn": "z"})
    stage = Stage(history(home_lab()), liked=liked)
    async with stage.app().run_test(size=SIZE, notifications=True) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("t")
        assert asked(stage, MakeToken) == []
        assert any("cluster.tokn" in toast.message for toast in app._notifications)
        app.set_focus(None)
        await pilot.press("k")
        assert asked(stage, MakeToken) == [MakeToken()]


async def test_a_theme_is_reloaded_when_its_file_is_saved_and_a_bad_one_is_told(tmp_path: Path) -> None:
    mine = tmp_path / "themes" / "mine.toml"
    mine.parent.mkdir()
    mine.write_text('primary = "#112233"\nbackground = "#000000"\n')
    stage = Stage(history(home_lab()), config=tmp_path, theme="mine")
    async with stage.app().run_test(size=SIZE, notifications=True) as pilot:
        app = await begin(stage, pilot)
        assert app.theme_variables["background"] == "#000000"
        mine.write_text('primary = "#112233"\nbackground = "#222222"   \n')
        app._reload_themes()
        await pilot.pause()
        assert app.theme_variables["background"] == "#222222"
        mine.write_text('primary = "no colour"\n')
        app._reload_themes()
        await pilot.pause()
        assert app.theme_variables["background"] == "#222222"
        assert any("no colour" in toast.message for toast in app._notifications)


# --- events ---


def event(number: int, cause: str) -> EventView:
    return EventView(number=number, time_s=WALL, kind="plan_made", node="", cause=cause, details={"epoch": 1})


async def test_the_timeline_follows_until_one_looks_back() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("4")
        await pilot.pause()
        timeline = app.screen.query_one(Timeline)
        stage.tell(Happened(EventsView(events=(event(13, "newest"),)), NOW))
        assert timeline.chosen is not None
        assert timeline.chosen.cause == "newest"
        await pilot.press("up")
        stage.tell(Happened(EventsView(events=(event(14, "newer still"),)), NOW))
        assert timeline.chosen.number == 12
        await pilot.press("end")
        assert timeline.chosen.number == 14


async def test_a_flood_of_events_keeps_the_app_alive_and_bounded() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("4")
        for first in range(13, 13 + 4000, 8):
            batch = tuple(event(number, f"event {number}") for number in range(first, first + 8))
            stage.mailbox.put(Happened(EventsView(events=batch), NOW))
        app.tick()
        await pilot.press("1")
        assert app.current_mode == "cluster"
        assert len(app.state.events) == 2000


# --- chat ---


async def chatting(stage: Stage, pilot: AppPilot, prompt: str = "hello") -> ChatScreen:
    app = await begin(stage, pilot)
    await pilot.press("3")
    await pilot.pause()
    if prompt:
        app.screen.query_one(Prompt).text = prompt
        await pilot.press("enter")
    assert isinstance(app.screen, ChatScreen)
    return app.screen


async def test_an_answer_is_shown_with_its_figures_and_kept() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        await chatting(stage, pilot)
        ask = asked(stage, Ask)[0]
        assert isinstance(ask, Ask)
        assert ask.messages == (("user", "hello"),)
        stage.tell(AnswerPiece(1, "Good ", 1, NOW + 0.5, NOW + 0.5), AnswerPiece(1, "day", 10, NOW + 1, NOW + 1.5))
        stage.tell(AnswerOver(1, NOW + 2, "stop", 5, 11))
        await pilot.pause()
        screen = shown(stage.running)
        for words in ("Good day", "10.0 tok/s", "first token after 0.50 s", "11 tokens"):
            assert words in screen
        kept = asked(stage, KeepChat)[0]
        assert isinstance(kept, KeepChat)
        assert '"Good day"' in kept.text


async def test_esc_stops_an_answer_and_keeps_its_text() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        screen = await chatting(stage, pilot)
        stage.tell(AnswerPiece(1, "half", 1, NOW, NOW))
        await pilot.press("escape")
        assert asked(stage, StopAnswer) == [StopAnswer(1)]
        stage.tell(AnswerOver(1, NOW, "stopped"))
        await pilot.pause()
        assert screen.chat.last_answer == "half"
        assert "stopped by you" in shown(stage.running)


async def test_a_failed_prompt_comes_back() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        screen = await chatting(stage, pilot)
        assert screen.query_one(Prompt).text == ""
        stage.tell(AnswerOver(1, NOW, "failed", problem="no node is left"))
        await pilot.pause()
        assert screen.query_one(Prompt).text == "hello"
        assert screen.chat.turns == ()
        assert "no node is left" in shown(stage.running)


async def test_a_draft_survives_a_lost_engine() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        screen = await chatting(stage, pilot, "")
        await pilot.press(*"draft")
        stage.tell(Linked(LinkState.DOWN, NOW, "gone"), Linked(LinkState.UP, NOW, "back"))
        await pilot.press("1", "escape")
        assert screen.query_one(Prompt).text.startswith("draft")


async def test_a_loss_pauses_an_answer_says_why_and_it_goes_on() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        screen = await chatting(stage, pilot)
        stage.tell(AnswerPiece(1, "so", 1, NOW, NOW))
        lost = EventView(number=13, time_s=WALL, kind="node_lost", node="tower", cause="tower is lost", details={})
        stage.tell(Happened(EventsView(events=(lost,)), NOW))
        assert "paused: tower is lost" in screen.query_one("#chat-state", RunsView).text
        stage.now += 3
        stage.tell(AnswerPiece(1, " on", 1, NOW + 3, NOW + 3))
        assert "paused" not in screen.query_one("#chat-state", RunsView).text
        stage.tell(AnswerOver(1, NOW + 3, "stop", 2, 2))
        await pilot.pause()
        assert "paused 3.0 s" in shown(stage.running)


async def test_retry_and_edit_take_the_last_prompt_back() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        screen = await chatting(stage, pilot)
        stage.tell(AnswerPiece(1, "one", 1, NOW, NOW), AnswerOver(1, NOW, "stop"))
        await pilot.pause()
        await pilot.press("f5")
        again = asked(stage, Ask)[1]
        assert isinstance(again, Ask)
        assert again.messages == (("user", "hello"),)
        stage.tell(AnswerPiece(2, "two", 1, NOW, NOW), AnswerOver(2, NOW, "stop"))
        await pilot.pause()
        await pilot.press("f6")
        assert screen.query_one(Prompt).text == "hello"
        assert screen.chat.turns == ()


async def test_settings_are_sent_with_the_next_prompt() -> None:
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        await pilot.press("3", "f2")
        app.screen.query_one("#set-temperature", Input).value = "9"
        await pilot.press("f2")
        assert not isinstance(app.screen, ChatScreen)
        app.screen.query_one("#set-temperature", Input).value = "0.5"
        app.screen.query_one("#set-seed", Input).value = "7"
        app.screen.query_one(TextArea).text = "brief"
        await pilot.press("f2", "h", "i", "enter")
        ask = asked(stage, Ask)[0]
        assert isinstance(ask, Ask)
        assert ask.messages == (("system", "brief"), ("user", "hi"))
        assert ask.options == {"temperature": 0.5, "seed": 7}


async def test_earlier_conversations_are_opened_and_deleted() -> None:
    from dwarfstar_tui.conversation import Conversation, Turn, written

    old = Conversation(id="old", used_s=WALL).with_turns(
        Turn(role="user", text="what was"), Turn(role="assistant", text="it was *so*"), used_s=WALL
    )
    stage = Stage(history(home_lab()))
    async with stage.app().run_test(size=SIZE) as pilot:
        screen = await chatting(stage, pilot, "")
        stage.tell(updates.ChatsRead((written(old), "{}")))
        await pilot.press("f3", "enter")
        await pilot.pause()
        assert screen.chat.title == "what was"
        assert "it was so" in shown(stage.running)
        await pilot.press("f3", "x")
        assert asked(stage, KeepChat) == [KeepChat("old", "")]
        assert screen.chat.turns == ()


# --- hard cases ---


async def test_names_with_markup_and_wide_characters_are_shown_as_they_are() -> None:
    view = status([node("[red]機械[/red]", "cpu [bold", 8, 2, 6)], [])
    stage = Stage([Linked(LinkState.UP, NOW), StatusSeen(view, NOW, 1.0)])
    async with stage.app().run_test(size=SIZE, notifications=True) as pilot:
        app = await begin(stage, pilot)
        assert "[red]機械[/red]" in app.screen.query_one(NodeTable).text
        app.tell("[/nonsense] is lost")
        await pilot.press("x")
        assert isinstance(app.screen, Confirm)
        assert "Remove [red]機械[/red]?" in shown(app)


async def test_a_storm_of_sizes_breaks_nothing() -> None:
    stage = Stage(history(large(24), 3))
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        for key in "12345":
            await pilot.press(*(["escape", "escape"] if key == "4" else []), key)
            for width, height in ((60, 20), (200, 60), (20, 6)):
                await pilot.resize_terminal(width, height)
                app.tick()
        assert app.is_running


async def test_ascii_mode_draws_the_cluster_in_ascii() -> None:
    stage = Stage(history(home_lab()), glyphs=text.ASCII)
    async with stage.app().run_test(size=SIZE) as pilot:
        app = await begin(stage, pilot)
        assert app.screen.query_one(NodeTable).text.isascii()
        assert header(app).isascii()


async def test_few_colours_take_the_terminals_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(history(home_lab()), theme=None)
    app = stage.app()
    monkeypatch.setattr(type(app.console), "color_system", property(lambda _: "standard"))
    async with app.run_test(size=SIZE) as pilot:
        await begin(stage, pilot)
        assert app.theme == "ansi-dark"
