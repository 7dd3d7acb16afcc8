"""Pictures of the app from a scripted cluster: SVG files for people, texts for tests.

``python -m support.tui_pictures`` writes both anew; a test fails when what is kept is not what would be written.

Everything that could differ from run to run is fixed: the views, the clock, the ids, no animation, no blinking.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from textual.pilot import Pilot

from dwarfstar_engine.views import EventsView, EventView, PlanRequest, ThroughputView
from dwarfstar_tui.text import ASCII, FANCY, Glyphs
from dwarfstar_tui.updates import (
    AnswerOver,
    AnswerPiece,
    Happened,
    Linked,
    LinkState,
    PlanChanged,
    StatusSeen,
    TokenMade,
    Update,
)
from dwarfstar_tui.widgets.prompt import Prompt
from support.tui_cluster import AROUND, MODELS, NOW, WALL, Stage, history, home_lab, large, replaced, stage, status
from support.tui_plans import Planner

TOP = Path(__file__).parents[2]
SCREENSHOTS = TOP / "screenshots"
TEXTS = TOP / "tests" / "tui" / "screens"
WIDTHS = {60: 20, 80: 24, 120: 34, 200: 50}  # columns: lines
SVG_SIZE = (120, 34)
DRAFT = ("2", "right_square_bracket", "left", "left", "left")
THEMES = ("night", "day", "contrast", "ansi-dark", "ansi-light")
ANSWER = """A model that is **too large** for one machine runs on several of them:

1. each machine loads *its own layers*,
2. hidden states travel from one to the next,
3. the last one samples a token.

```python
for stage in ring:
    hidden = stage(hidden)
```

That buys **capacity**, not speed: a model that fits one GPU is faster there.
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """keys: pressed one after the other. prompt: asked after them. commit: a plan that is carried out then. then: told
    after that."""

    name: str
    updates: tuple[Update, ...]
    keys: tuple[str, ...] = ()
    then: tuple[Update, ...] = ()
    prompt: str = ""
    commit: PlanRequest | None = None
    theme: str = "night"
    glyphs: Glyphs = FANCY


def _chat(*then: Update) -> tuple[Update, ...]:
    return (AnswerPiece(1, ANSWER, 80, NOW + 0.62, NOW + 0.62), AnswerPiece(1, "\n", 4, NOW + 4, NOW + 5.2), *then)


LOST = Happened(
    EventsView(
        events=(
            EventView(number=13, time_s=WALL, kind="node_lost", node="garage-box",
                      cause="garage-box is lost: its connection has ended", details={}),
        )
    ),
    NOW,
)  # fmt: skip
TOKEN = TokenMade(
    "dwarfstar node --token ds1.5q2fz7mvxk4t.b7d0c3e1a9f84265", "ds1.5q2fz7mvxk4t.b7d0c3e1a9f84265",
    "192.168.1.10:8478",
    ("if it does not find this machine, which it says within seconds, add --join 192.168.1.10:8478",),
)  # fmt: skip
LAB = tuple(history(home_lab()))
EMPTY = status([], [], model=None, state="unavailable", reason="0 of 2 nodes have joined")

SCREENS = (
    Scene("cluster", LAB),
    Scene("plan", LAB, ("2",)),
    Scene("chat", LAB, ("3",), _chat(AnswerOver(1, NOW + 5.2, "stop", 14, 84)), prompt="Why split a model?"),
    Scene("events", LAB, ("4",)),
    Scene("models", LAB, ("5",)),
    Scene("plan-draft", LAB, DRAFT),
    Scene("plan-difference", LAB, (*DRAFT, "enter")),
    Scene("plan-commit", LAB, (*DRAFT, "enter", "y")),
)
CUT = PlanRequest(cuts=(44, 63), order=("tower", "garage-box", "mini-pc"))
AFTER = replaced(
    home_lab(),
    epoch=4,
    stages=(stage("tower", (0, 44), 14.9), stage("garage-box", (44, 63), 18.4), stage("mini-pc", (63, 80), 22.3)),
    throughput=ThroughputView(tok_s=16.9, active=1, queued=0),
)
CASES = (
    Scene("first-start", (Linked(LinkState.NONE, NOW),)),
    Scene("empty", (Linked(LinkState.UP, NOW, "127.0.0.1:8477"), StatusSeen(EMPTY, NOW, 1.0))),
    Scene("chat-paused", LAB, ("3",), (*_chat(), LOST), prompt="Why split a model?"),
    Scene("token", LAB, ("t",), (TOKEN,)),
    Scene("help", LAB, ("question_mark",)),
    Scene("crowd", tuple(history(large(64), 3))),
    Scene("ascii", LAB, glyphs=ASCII),
    Scene("lend", LAB, ("v",)),
    Scene("engine-lost", (*LAB, Linked(LinkState.DOWN, NOW, "no answer"))),
    Scene("plan-done", LAB, (*DRAFT, "enter", "y"), (StatusSeen(AFTER, NOW, 2.0),), commit=CUT),
    Scene("plan-clamped", LAB, ("2", "end")),
    Scene("plan-others", LAB, ("2", "A")),
    Scene("plan-ascii", LAB, (*DRAFT, "P"), glyphs=ASCII),
)
OTHER_THEMES = tuple(Scene(f"theme-{name}", LAB, theme=name) for name in THEMES if name != "night")
PICTURES = (*SCREENS, CASES[0], *OTHER_THEMES)
TEXTS_OF = (*((scene, width) for scene in SCREENS for width in WIDTHS), *((scene, 80) for scene in CASES))


async def answered(planner: Planner, stage: Stage, pilot: Pilot[None]) -> None:
    """Until the app has nothing to ask any more."""
    await pilot.pause()
    stage.running.tick()
    while planner.answer(stage):
        await pilot.pause()
        stage.running.tick()


async def play(scene: Scene, size: tuple[int, int]) -> tuple[str, str]:
    """The scene as (SVG, text)."""
    here = Stage(list(scene.updates), theme=scene.theme, glyphs=scene.glyphs)
    app = here.app()
    async with app.run_test(size=size) as pilot:
        planner = Planner()
        here.play()
        here.tell(AROUND, MODELS)
        for key in scene.keys:
            await pilot.press(key)
            await answered(planner, here, pilot)
        if scene.prompt:
            app.screen.query_one(Prompt).text = scene.prompt
            await pilot.press("enter")
        if scene.commit is not None:
            here.tell(PlanChanged(planner.committed(scene.commit)))
        here.tell(AROUND, MODELS, *scene.then)
        await answered(planner, here, pilot)
        for prompt in app.screen.query(Prompt):
            prompt.cursor_blink = False
        app.tick()
        await pilot.pause()
        app.tick()
        await pilot.pause()
        lines = ["".join(part.text for part in strip).rstrip() for strip in app.screen._compositor.render_strips()]
        return _same(app.export_screenshot(title="DwarfStar")), "\n".join(lines) + "\n"


def _same(svg: str) -> str:
    """Without what Rich makes up for each picture."""
    found = re.search(r"terminal-(\d+)-", svg)
    return svg.replace(found.group(1), "0") if found else svg


def text_file(scene: Scene, width: int) -> Path:
    return TEXTS / f"{scene.name}-{width}.txt"


def write() -> None:
    """Write everything anew, and remove what belongs to no scene any more."""
    TEXTS.mkdir(parents=True, exist_ok=True)
    for old in (*SCREENSHOTS.glob("*.svg"), *TEXTS.glob("*.txt")):
        old.unlink()
    for scene in PICTURES:
        svg, _ = asyncio.run(play(scene, SVG_SIZE))
        (SCREENSHOTS / f"{scene.name}.svg").write_text(svg, "utf-8")
    for scene, width in TEXTS_OF:
        _, text = asyncio.run(play(scene, (width, WIDTHS[width])))
        text_file(scene, width).write_text(text, "utf-8")


if __name__ == "__main__":
    write()
