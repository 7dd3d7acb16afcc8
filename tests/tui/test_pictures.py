"""Every screen at every width as it is kept in ``screens/``, and the pictures in ``screenshots/``.

When a screen is meant to be another: ``make screenshots``, and look at the difference.
"""

from __future__ import annotations

import pytest

from support.tui_pictures import PICTURES, SCREENSHOTS, SVG_SIZE, TEXTS, TEXTS_OF, WIDTHS, Scene, play, text_file


def _name(value: object) -> str:
    return value.name if isinstance(value, Scene) else str(value)


@pytest.mark.parametrize(("scene", "width"), TEXTS_OF, ids=_name)
async def test_a_screen_is_as_it_is_kept(scene: Scene, width: int) -> None:
    _, text = await play(scene, (width, WIDTHS[width]))
    assert text == text_file(scene, width).read_text("utf-8")


@pytest.mark.parametrize("scene", PICTURES, ids=_name)
async def test_a_picture_is_not_stale(scene: Scene) -> None:
    svg, _ = await play(scene, SVG_SIZE)
    kept = SCREENSHOTS / f"{scene.name}.svg"
    assert svg == kept.read_text("utf-8"), f"{kept.name} is stale: make screenshots"


def test_there_is_no_picture_of_nothing() -> None:
    assert {path.stem for path in SCREENSHOTS.glob("*.svg")} == {scene.name for scene in PICTURES}
    assert {path.name for path in TEXTS.glob("*.txt")} == {text_file(*one).name for one in TEXTS_OF}
