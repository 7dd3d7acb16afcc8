"""Where a prompt is typed: enter sends it, alt+enter or shift+enter begins a new line."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

MAX_CHARS = 1 << 20  # pasted text may be long; the engine's own limit is the model's context


class Prompt(TextArea):
    """Plain text that grows with what is typed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "send", id="chat.send", priority=True),
        Binding("alt+enter,shift+enter", "new_line", "new line", id="chat.new-line", priority=True, show=False),
    ]
    HELP = "Type a prompt. Enter sends it; alt+enter begins a new line. Esc stops an answer, or goes to the text above."

    class Sent(Message):
        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self) -> None:
        super().__init__("", id="prompt", compact=True, soft_wrap=True, show_line_numbers=False,
                         placeholder="Ask the model", highlight_cursor_line=False)  # fmt: skip

    def action_send(self) -> None:
        if self.text.strip():
            self.post_message(self.Sent(self.text))

    def action_new_line(self) -> None:
        self.insert("\n")

    async def _on_paste(self, event: events.Paste) -> None:
        if len(self.text) + len(event.text) > MAX_CHARS:
            event.prevent_default()
            event.stop()
            self.notify(f"that is more than {MAX_CHARS} characters", severity="warning", markup=False)
            return
        await super()._on_paste(event)
