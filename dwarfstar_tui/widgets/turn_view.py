"""One thing said in a conversation: a prompt as it was typed, or an answer as Markdown with its figures below."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from dwarfstar_tui.text import clean


class PromptView(Vertical):
    """What the person said."""

    def __init__(self, text: str) -> None:
        super().__init__(classes="turn said")
        self._text = text

    def compose(self) -> ComposeResult:
        yield Static("\n".join(clean(line) for line in self._text.splitlines()), markup=False)


class AnswerView(Vertical):
    """What the model said. While it comes, pieces are appended to a stream, which lays out only what is new."""

    def __init__(self, text: str = "", note: str = "") -> None:
        super().__init__(classes="turn answer")
        self._text, self._note_text = text, note
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield Markdown(self._text, open_links=False)
        yield Static(self._note_text, classes="note", markup=False)

    async def write(self, text: str) -> None:
        """Append a piece."""
        if self._stream is None:
            self._stream = Markdown.get_stream(self.query_one(Markdown))
        await self._stream.write(text)

    async def end(self) -> None:
        """No more pieces come."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.stop()

    async def on_unmount(self) -> None:
        await self.end()

    def note(self, text: str, *, warn: bool = False) -> None:
        """The line below the answer."""
        note = self.query_one(".note", Static)
        note.set_class(warn, "warn")
        note.update(text)
