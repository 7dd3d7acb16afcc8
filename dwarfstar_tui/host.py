"""What screens and widgets may ask of the app they are in."""

from __future__ import annotations

from typing import Protocol

from dwarfstar_tui.store import State
from dwarfstar_tui.text import Glyphs
from dwarfstar_tui.updates import Command


class Host(Protocol):
    """state: as it is shown, frozen when the person wishes so. readonly: nothing may be changed.
    slow: over a thin line, at 1 Hz."""

    @property
    def state(self) -> State: ...
    @property
    def glyphs(self) -> Glyphs: ...
    @property
    def readonly(self) -> bool: ...
    @property
    def frozen(self) -> bool: ...
    @property
    def slow(self) -> bool: ...
    @property
    def home_label(self) -> str: ...

    def moment(self) -> float:
        """Now, as it is shown: monotonic, s."""
        ...

    def wall(self) -> float:
        """Seconds since 1970."""
        ...

    def fresh_id(self) -> str: ...

    def submit(self, command: Command) -> None: ...
    def tell(self, text: str, severity: str = "information") -> None:
        """A toast; ``text`` is no markup."""
        ...

    def copy(self, text: str, what: str) -> None:
        """To the person's clipboard, through the terminal."""
        ...

    def go(self, name: str) -> None:
        """To a screen."""
        ...
