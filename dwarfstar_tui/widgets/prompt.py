"""Where a prompt is typed: enter sends it, alt+enter or shift+enter begins a new line.

Keys may come in one burst, so none overtakes another: sending is no priority binding, which the app would obey before
this widget has taken the characters that came first, and what is sent is taken out at once.
"""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

TAKEN = ("f6", "f7")  # a text area's keys that are the chat's here; in its list they would stand first
MAX_CHARS = 1 << 20  # pasted text may be long; the engine's own limit is the model's context


class Prompt(TextArea, inherit_bindings=False):
    """Plain text that grows with what is typed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "send", id="chat.send"),
        Binding("alt+enter,shift+enter", "new_line", "new line", id="chat.new-line", show=False),
        *(binding for binding in TextArea.BINDINGS if isinstance(binding, Binding) and binding.key not in TAKEN),
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
            text = self.text
            self.clear()
            self.post_message(self.Sent(text))

    def action_new_line(self) -> None:
        self.insert("\n")

    async def _on_key(self, event: events.Key) -> None:
        """Keys that do something here are not text, whichever keys the person has chosen."""
        bound = None if event.is_printable else self.screen.active_bindings.get(event.key)
        if bound is not None and bound.binding.action == "send":
            event.stop()
            event.prevent_default()
            self.action_send()
        elif bound is not None and bound.binding.action == "new_line":
            event.stop()
            event.prevent_default()
            self.action_new_line()
        else:
            await super()._on_key(event)

    async def _on_paste(self, event: events.Paste) -> None:
        if len(self.text) + len(event.text) > MAX_CHARS:
            event.prevent_default()
            event.stop()
            self.notify(f"that is more than {MAX_CHARS} characters", severity="warning", markup=False)
            return
        await super()._on_paste(event)
