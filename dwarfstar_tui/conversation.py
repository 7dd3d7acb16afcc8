"""Conversations: what was said, with which settings, and how they are written to disk. Pure.

A conversation is a list of turns. An answer that is coming is no turn yet: it is an ``Answer``, which takes pieces and
ends. Ended well or stopped by the person it becomes a turn; if it failed, its prompt goes back to where it was typed.

Bounds: TURNS_MAX turns, TEXT_MAX characters of one text; the oldest turns go first. A file that breaks them is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwarfstar_engine.views import EventView
from dwarfstar_tui.text import clean

TURNS_MAX = 400
TEXT_MAX = 1 << 20
CHATS_MAX = 100  # kept on disk; the ones not used for longest go
TITLE_MAX = 48
NOTE_MAX = 400
RINGS_MAX = 3  # of one answer; the latest are told
ROUTE_MAX = 5  # machines that are named
PAUSES = {  # kinds of events after which streams wait, until they go on
    "node_lost", "node_left", "node_removed", "stage_failed", "streams_waiting", "epoch_over",
}  # fmt: skip


class Sampling(BaseModel):
    """None: the model's default."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    seed: int | None = Field(default=None, ge=0, le=(1 << 32) - 1)

    def options(self) -> dict[str, float | int]:
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def shown(self) -> str:
        parts = [f"{name.replace('_', ' ')} {value:g}" for name, value in self.options().items()]
        return ", ".join(parts)


class Turn(BaseModel):
    """role: user | assistant. note: figures of an answer, as they stand below it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: str = Field(pattern="^(user|assistant)$")
    text: str = Field(max_length=TEXT_MAX)
    note: str = Field(default="", max_length=NOTE_MAX)


class Conversation(BaseModel):
    """used_s: unix time it was last said something in."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(pattern="^[a-z0-9-]{1,40}$")
    title: str = Field(default="", max_length=TITLE_MAX)
    system: str = Field(default="", max_length=TEXT_MAX)
    sampling: Sampling = Sampling()
    turns: tuple[Turn, ...] = Field(default=(), max_length=TURNS_MAX)
    used_s: float = 0.0

    def messages(self, prompt: str) -> tuple[tuple[str, str], ...]:
        """What to send for the next answer."""
        first = (("system", self.system),) if self.system.strip() else ()
        return (*first, *((turn.role, turn.text) for turn in self.turns), ("user", prompt))

    def with_turns(self, *turns: Turn, used_s: float) -> Conversation:
        """With more said. Prompts and answers go in pairs, so what is dropped is an even number."""
        every = (*self.turns, *turns)
        over = max(0, len(every) - TURNS_MAX)
        title = self.title or titled(next((turn.text for turn in every if turn.role == "user"), ""))
        return self.model_copy(update={"turns": every[over + over % 2 :], "title": title, "used_s": used_s})

    def before_last_prompt(self) -> tuple[Conversation, str]:
        """Without the last prompt and its answer, and that prompt: to send it again, as it is or edited."""
        for index in range(len(self.turns) - 1, -1, -1):
            if self.turns[index].role == "user":
                return self.model_copy(update={"turns": self.turns[:index]}), self.turns[index].text
        return self, ""

    @property
    def last_answer(self) -> str:
        return next((turn.text for turn in reversed(self.turns) if turn.role == "assistant"), "")


def titled(text: str) -> str:
    """A title from the first thing said."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_MAX else line[: TITLE_MAX - 1].rstrip() + "…"


def read(text: str) -> Conversation | None:
    """From its JSON; None if it is no conversation of ours."""
    try:
        return Conversation.model_validate_json(text)
    except ValidationError:
        return None


def written(conversation: Conversation) -> str:
    return conversation.model_dump_json(indent=1)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is coming. asked_at, first_at, last_at: monotonic, s; first_at 0: nothing came yet.

    pause: why nothing comes, from the cluster's events; empty: it is coming. rings: machines whose stages it went
    through, in their order; another one for each plan that it lived to see, at most RINGS_MAX.
    """

    number: int
    prompt: str
    asked_at: float
    text: str = ""
    pieces: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    pause: str = ""
    paused_s: float = 0.0
    finish: str = ""
    problem: str = ""
    prompt_tokens: int = 0
    tokens: int = field(default=0)
    rings: tuple[tuple[str, ...], ...] = ()

    def with_ring(self, ring: tuple[str, ...]) -> Answer:
        """Served by these machines now."""
        if not ring or ring == (self.rings[-1] if self.rings else ()):
            return self
        return replace(self, rings=(*self.rings, ring)[-RINGS_MAX:])

    def with_piece(self, text: str, pieces: int, first_at: float, at: float) -> Answer:
        paused_s = self.paused_s + (at - self.last_at if self.pause and self.last_at else 0.0)
        return replace(
            self, text=self.text + text, pieces=self.pieces + pieces, first_at=self.first_at or first_at, last_at=at,
            pause="", paused_s=paused_s,
        )  # fmt: skip

    def with_event(self, event: EventView) -> Answer:
        """Paused by what happened, if it is a cause of pauses; the first is the cause, the rest follow from it."""
        if event.kind == "streams_resumed":
            return replace(self, pause=self.pause and "going on")
        if event.kind not in PAUSES or self.pause or self.finish:
            return self
        return replace(self, pause=event.cause)

    @property
    def count(self) -> int:
        """Tokens: as the engine counted them, until then its pieces."""
        return self.tokens or self.pieces

    @property
    def tok_s(self) -> float | None:
        """Of what came after the first token, pauses not counted."""
        taken = self.last_at - self.first_at - self.paused_s
        return (self.count - 1) / taken if self.count > 1 and taken > 0 else None

    @property
    def ttft_s(self) -> float | None:
        return self.first_at - self.asked_at if self.first_at else None

    def note(self) -> str:
        """What stands below it."""
        parts = []
        if (rate := self.tok_s) is not None:
            parts.append(f"{rate:.1f} tok/s")
        if (ttft := self.ttft_s) is not None:
            parts.append(f"first token after {ttft:.2f} s")
        if self.count:
            parts.append(f"{self.count} tokens")
        if self.paused_s >= 0.5:
            parts.append(f"paused {self.paused_s:.1f} s")
        ends = {"stopped": "stopped by you", "length": "cut off: the token limit", "failed": self.problem}
        if ending := ends.get(self.finish, ""):
            parts.append(ending)
        if self.rings and self.count:
            parts.append("served by " + ", then ".join(map(_route, self.rings)))
        return " · ".join(parts)[:NOTE_MAX]


def _route(ring: tuple[str, ...]) -> str:
    """A few machines by name; of many the first and the last."""
    names = [clean(name) for name in ring]
    if len(names) > ROUTE_MAX:
        names = [names[0], f"{len(names) - 2} more", names[-1]]
    return " → ".join(names)


def ended(answer: Answer, finish: str, prompt_tokens: int, tokens: int, problem: str) -> Answer:
    """The answer with its end."""
    return replace(answer, finish=finish, prompt_tokens=prompt_tokens, tokens=tokens, problem=problem, pause="")
