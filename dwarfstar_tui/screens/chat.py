"""Chat: talk to the model that is served. What was typed is never lost: not by an error, not by a lost engine."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Static

from dwarfstar_tui import conversation, text, updates
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.conversation import Answer, Conversation, Turn
from dwarfstar_tui.plan_lines import in_order
from dwarfstar_tui.screens.base import AppScreen
from dwarfstar_tui.screens.chat_dialogs import DELETE, ChatSettings, ChooseChat
from dwarfstar_tui.store import State
from dwarfstar_tui.updates import AnswerOver, AnswerPiece, ChatsRead, Happened, Update
from dwarfstar_tui.widgets.prompt import Prompt
from dwarfstar_tui.widgets.runs_view import RunsView
from dwarfstar_tui.widgets.turn_view import AnswerView, PromptView

SHOWN_TURNS = 60  # of a long conversation; older ones are kept and sent, and not laid out


class ChatScreen(AppScreen):
    NAME = "chat"
    LESSON = (
        "Talk to the model. Esc stops an answer and keeps its text; when nothing comes, it leaves the prompt, so that "
        "1 to 5 go to other screens. An answer that is interrupted by a lost machine pauses, says why, and goes on."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f2", "settings", "settings", id="chat.settings", priority=True),
        Binding("f3", "choose", "chats", id="chat.choose", priority=True),
        Binding("f4", "fresh", "new", id="chat.new", priority=True),
        Binding("f5", "retry", "retry", id="chat.retry", priority=True),
        Binding("f6", "edit", "edit last", id="chat.edit", priority=True),
        Binding("f7", "copy_answer", "copy", id="chat.copy", priority=True),
        Binding("i", "prompt", "prompt", id="chat.prompt", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._chats: dict[str, Conversation] = {}
        self._chat: Conversation | None = None
        self._answer: Answer | None = None
        self._view: AnswerView | None = None
        self._count = 0

    def body(self) -> ComposeResult:
        yield RunsView(id="chat-title")
        yield VerticalScroll(id="transcript")
        yield RunsView(id="chat-state")
        yield Prompt()

    def on_mount(self) -> None:
        super().on_mount()
        self.host.submit(updates.ReadChats())
        self._chat = Conversation(id=self.host.fresh_id())
        transcript = self.query_one("#transcript", VerticalScroll)
        transcript.mount(Static(_GREETING, id="greeting", markup=False))
        self.query_one(Prompt).focus()

    def main_focus(self) -> None:
        self.query_one(Prompt).focus()

    @property
    def chat(self) -> Conversation:
        assert self._chat is not None, "the screen is mounted"
        return self._chat

    # --- what is shown ---

    def present(self, state: State, now: float) -> None:
        chains = state.status.chains() if state.serving and state.status is not None else ()
        if self._answer is not None and len(chains) == 1:  # of several nobody tells which one has it
            self._answer = self._answer.with_ring(tuple(stage.node for stage in in_order(chains[0])))
        glyphs, width = self.host.glyphs, max(10, self.size.width - 4)
        title = self.chat.title or "New conversation"
        facts = [
            part for part in ("system prompt" if self.chat.system.strip() else "", self.chat.sampling.shown()) if part
        ]
        about = f"  {glyphs.dot} {', '.join(facts)}" if facts else ""
        line = text.fit(text.clean(title) + about, width, ellipsis=glyphs.ellipsis)
        self.query_one("#chat-title", RunsView).set_lines([((line, "muted"),)])
        self.query_one("#chat-state", RunsView).set_lines([self._state_line(state, now, width)])

    def _state_line(self, state: State, now: float, width: int) -> Runs:
        glyphs, answer = self.host.glyphs, self._answer
        if answer is not None and answer.pause:
            cause = f"{glyphs.late} paused: {text.clean(answer.pause)}"
            return ((text.fit(cause, width, ellipsis=glyphs.ellipsis), "late"),)
        if answer is not None:
            waited = now - answer.asked_at
            if not answer.first_at:
                return ((f"{glyphs.late} reading the prompt, {waited:.0f} s", "muted"), ("   esc stops", "muted"))
            rate = f"{answer.tok_s:.1f} tok/s" if answer.tok_s is not None else "answering"
            return ((f"{glyphs.ok} {rate}", "ok"), (f"   {answer.count} tokens   esc stops", "muted"))
        if not state.live:
            return ((f"{glyphs.lost} no engine is attached: what you type stays here", "late"),)
        if not state.serving and state.status is not None:
            reason = text.clean(state.status.reason or state.status.state)
            return ((text.fit(f"{glyphs.late} not serving: {reason}", width, ellipsis=glyphs.ellipsis), "late"),)
        model = state.status.model.name if state.status is not None and state.status.model is not None else ""
        return ((text.fit(f"enter sends it to {text.clean(model)}", width, ellipsis=glyphs.ellipsis), "muted"),)

    # --- answers ---

    def take(self, update: Update) -> None:
        match update:
            case AnswerPiece(number) if self._answer is not None and number == self._answer.number:
                self._answer = self._answer.with_piece(update.text, update.tokens, update.first_at, update.at)
                if self._view is not None:
                    self.call_later(self._view.write, update.text)
            case AnswerOver(number) if self._answer is not None and number == self._answer.number:
                self.call_later(self._over, update)
            case Happened(batch) if self._answer is not None:
                for event in batch.events:
                    self._answer = self._answer.with_event(event)
            case ChatsRead():
                self._read(update)
            case _:
                return
        self.show(self.host.state)

    @on(Prompt.Sent)
    def _sent(self, event: Prompt.Sent) -> None:
        if self._answer is not None:
            self.host.tell("an answer is coming: esc stops it", "warning")
            prompt = self.query_one(Prompt)
            prompt.text = event.text + prompt.text
            prompt.move_cursor(prompt.document.end)
            return
        self._ask(event.text)

    def _ask(self, prompt: str) -> None:
        self._count += 1
        self._answer = Answer(self._count, prompt, self.host.moment())
        self._view = AnswerView()
        self._mount(PromptView(prompt), self._view)
        messages = self.chat.messages(prompt)
        self.host.submit(updates.Ask(self._count, messages, self.chat.sampling.options()))
        self.show(self.host.state)

    def _mount(self, *views: PromptView | AnswerView) -> None:
        transcript = self.query_one("#transcript", VerticalScroll)
        self.query("#greeting").remove()
        transcript.mount(*views)
        turns = list(transcript.query(".turn"))
        for old in turns[: max(0, len(turns) - SHOWN_TURNS)]:
            old.remove()
        transcript.anchor()

    async def _over(self, over: AnswerOver) -> None:
        """The answer has ended. What came is kept in the conversation unless it failed."""
        answer, view = self._answer, self._view
        if answer is None or view is None:
            return
        answer = conversation.ended(answer, over.finish, over.prompt_tokens, over.tokens, over.problem)
        self._answer = self._view = None
        await view.end()
        failed = over.finish == "failed"
        view.note(answer.note(), warn=failed)
        prompt = self.query_one(Prompt)
        if failed:
            if not prompt.text.strip():
                prompt.text = answer.prompt
                prompt.move_cursor(prompt.document.end)
        elif answer.text:
            said = Turn(role="user", text=answer.prompt), Turn(role="assistant", text=answer.text, note=answer.note())
            self._keep(self.chat.with_turns(*said, used_s=self.host.wall()))
        self.refresh_bindings()
        self.show(self.host.state)

    def _keep(self, chat: Conversation) -> None:
        self._chat = self._chats[chat.id] = chat
        self.host.submit(updates.KeepChat(chat.id, conversation.written(chat)))

    def escape(self) -> bool:
        """What esc does here first; False: nothing."""
        if self._answer is not None:
            self.host.submit(updates.StopAnswer(self._answer.number))
            return True
        if isinstance(self.focused, Prompt):
            self.query_one("#transcript").focus()
            return True
        return False

    # --- what can be done ---

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("retry", "edit", "copy_answer") and not (self._chat and self._chat.turns):
            return None
        return super().check_action(action, parameters)

    def action_prompt(self) -> None:
        self.query_one(Prompt).focus()

    def action_fresh(self) -> None:
        self._open(Conversation(id=self.host.fresh_id(), system=self.chat.system, sampling=self.chat.sampling))

    def action_retry(self) -> None:
        if self._answer is None:
            shorter, prompt = self.chat.before_last_prompt()
            self._open(shorter)
            if prompt:
                self._ask(prompt)

    def action_edit(self) -> None:
        if self._answer is None:
            shorter, last = self.chat.before_last_prompt()
            self._open(shorter)
            prompt = self.query_one(Prompt)
            prompt.text = last
            prompt.move_cursor(prompt.document.end)
            prompt.focus()

    def action_copy_answer(self) -> None:
        self.host.copy(self.chat.last_answer, "the last answer")

    def action_settings(self) -> None:
        self.app.push_screen(ChatSettings(self.chat), lambda chat: self._set(chat) if chat is not None else None)

    def _set(self, chat: Conversation) -> None:
        self._chat = chat
        if chat.turns:
            self._keep(chat)
        self.show(self.host.state)

    def action_choose(self) -> None:
        newest = sorted(self._chats.values(), key=lambda chat: -chat.used_s)
        self.app.push_screen(ChooseChat(newest), self._picked)

    def _picked(self, chosen: tuple[str, str] | None) -> None:
        if chosen is None:
            return
        verb, chat_id = chosen
        if verb == DELETE:
            self._chats.pop(chat_id, None)
            self.host.submit(updates.KeepChat(chat_id, ""))
            if self.chat.id == chat_id:
                self.action_fresh()
        elif chat_id in self._chats:
            self._open(self._chats[chat_id])

    def _open(self, chat: Conversation) -> None:
        if self._answer is not None:
            self.host.tell("an answer is coming: esc stops it", "warning")
            return
        self._chat = chat
        self.query_one("#transcript", VerticalScroll).query(".turn").remove()
        if chat.turns:
            views = [
                PromptView(turn.text) if turn.role == "user" else AnswerView(turn.text, turn.note)
                for turn in chat.turns[-SHOWN_TURNS:]
            ]
            self._mount(*views)
        self.refresh_bindings()
        self.show(self.host.state)

    def _read(self, read: ChatsRead) -> None:
        for one in read.texts:
            chat = conversation.read(one)
            if chat is not None:
                self._chats.setdefault(chat.id, chat)
        if read.problems:
            self.host.tell(read.problems[0], "warning")

    def as_toml(self) -> dict[str, object] | None:
        chat = self.chat
        if not chat.turns:
            return None
        turns = [{"role": turn.role, "text": turn.text} for turn in chat.turns]
        return {"conversation": {"title": chat.title, "system": chat.system, "turns": turns}}


_GREETING = """Ask something below: the answer comes from the model that the cluster serves.

F2  system prompt, temperature, seed         F3  earlier conversations
F5  another answer to the last prompt        F6  change the last prompt
esc stops an answer and keeps its text; once more leaves the prompt"""
