"""The line that `/` opens: what is typed narrows the list above it."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input


class FilterInput(Input):
    """Enter keeps the filter and goes back to the list; esc drops it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "drop", "no filter", id="filter.drop")]

    class Over(Message):
        """The person is done with it."""

    def __init__(self) -> None:
        super().__init__(placeholder="filter", id="filter", compact=True)
        self.display = False

    def open(self) -> None:
        self.display = True
        self.focus()

    def action_drop(self) -> None:
        self.value = ""
        self._close()

    async def action_submit(self) -> None:
        self._close()

    def _close(self) -> None:
        self.display = bool(self.value)
        self.post_message(self.Over())
