"""Windows of the chat: its settings, and the conversations there are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar, cast

from pydantic import ValidationError
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label, OptionList, Static, TextArea
from textual.widgets.option_list import Option

from dwarfstar_tui.conversation import Conversation, Sampling
from dwarfstar_tui.host import Host
from dwarfstar_tui.text import clean, fit

OPEN, DELETE = "open", "delete"
FIELDS = (
    ("temperature", "temperature", "0 to 2; empty: the model's own"),
    ("top_p", "top p", "0 to 1"),
    ("max_tokens", "max tokens", "of one answer"),
    ("seed", "seed", "the same seed, the same answer"),
)


class ChatSettings(ModalScreen[Conversation | None]):
    """System prompt and sampling of one conversation."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "leave", id="dialog.leave"),
        Binding("f2", "done", "save", id="dialog.save", priority=True),
    ]

    def __init__(self, chat: Conversation) -> None:
        super().__init__()
        self._chat = chat

    def compose(self) -> ComposeResult:
        given = self._chat.sampling.model_dump()
        with Vertical(classes="box wide"):
            yield Static("Settings of this conversation", classes="title", markup=False)
            yield Label("System prompt", classes="quiet")
            yield TextArea(self._chat.system, id="system", compact=True, soft_wrap=True)
            with Grid(id="sampling"):
                for name, title, hint in FIELDS:
                    yield Label(title, classes="quiet")
                    value = given[name]
                    yield Input("" if value is None else f"{value:g}", placeholder=hint, id=f"set-{name}", compact=True)
            yield Static("F2 or enter  save     esc  leave it as it was", classes="quiet", markup=False)

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_done()

    def action_leave(self) -> None:
        self.dismiss(None)

    def action_done(self) -> None:
        given = {name: self.query_one(f"#set-{name}", Input).value.strip() or None for name, _, _ in FIELDS}
        try:
            sampling = Sampling.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            cast(Host, self.app).tell(f"{first['loc'][0]}: {first['msg']}", "warning")
            return
        system = self.query_one("#system", TextArea).text
        self.dismiss(self._chat.model_copy(update={"system": system, "sampling": sampling}))


class ChooseChat(ModalScreen[tuple[str, str] | None]):
    """Earlier conversations, newest first: (OPEN or DELETE, id)."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f3", "leave", "close", id="dialog.leave-chats"),
        Binding("x,delete", "delete", "delete", id="dialog.delete-chat"),
    ]

    def __init__(self, chats: Sequence[Conversation]) -> None:
        super().__init__()
        self._chats = list(chats)

    def compose(self) -> ComposeResult:
        with Vertical(classes="box wide"):
            yield Static("Conversations", classes="title", markup=False)
            if self._chats:
                yield OptionList(*(Option(_label(chat)) for chat in self._chats), id="chats", markup=False)
            else:
                yield Static("None are kept yet.", markup=False)
            yield Static("enter  open     x  delete     esc  close", classes="quiet", markup=False)

    @on(OptionList.OptionSelected, "#chats")
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss((OPEN, self._chats[event.option_index].id))

    def action_delete(self) -> None:
        if self._chats and (index := self.query_one(OptionList).highlighted) is not None:
            self.dismiss((DELETE, self._chats[index].id))

    def action_leave(self) -> None:
        self.dismiss(None)


def _label(chat: Conversation) -> str:
    when = datetime.fromtimestamp(chat.used_s).strftime("%d %b %H:%M")
    return f"{when}  {fit(clean(chat.title) or 'untitled', 48)}  {len(chat.turns) // 2:>3} answers"
