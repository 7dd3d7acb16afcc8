"""The coordinator's view of a draft model: a child process that is asked for guesses and never waited for.

Theory. Guesses are a help, not a need: a question is sent and forgotten, and an answer that comes too late is
dropped. Each sequence has at most one question with the child; a newer one waits in its place, and then the older
one's answer is stale. A child that dies, or hangs, takes all questions with it; it is started again after a pause that
grows, and until then no question is taken. See ``stage.draft`` for the other end.

Only what is new of a text is sent. The child may have given a sequence's slot away; it then says so, and gets the
text whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwarfstar_engine.errors import DwarfStarError, ModelError
from dwarfstar_engine.node.child import Child
from dwarfstar_engine.stage.fingerprint import Fingerprint

log = logging.getLogger("dwarfstar.drafter")

DRAFT = "dwarfstar_engine.stage.draft"
START_DEADLINE_S = 120.0  # a small model, but its disk may be cold
ANSWER_DEADLINE_S = 120.0  # the longest prompts of all sequences, one after another, on a slow machine
PAUSE_S = (1.0, 5.0, 30.0, 120.0)  # before the child is started again, by failures in a row; the last one repeats
STEADY_S = 60.0  # a child that answered for so long did not fail at the start

Callback = Callable[[list[int]], None]  # gets the guesses; called from the event loop, must neither block nor raise


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """How the draft model runs. context: tokens of one sequence. sequences: held at the same time, as slots are."""

    context: int
    sequences: int
    threads: int = 1
    gpu_layers: int = -1


@dataclass(frozen=True, slots=True)
class _Question:
    id: int
    tokens: list[int]
    count: int
    callback: Callback
    asked: float  # loop time


@dataclass(slots=True)
class _Asked:
    """A sequence. sent: the text the child holds. open: the question it has. waiting: the newest one, not yet sent."""

    sent: list[int] = field(default_factory=list)
    open: _Question | None = None
    waiting: _Question | None = None


class Drafter:
    """A draft model for a target whose vocabulary is ``vocabulary``. ``target`` names that model in errors."""

    def __init__(self, path: Path, target: str, vocabulary: Fingerprint, options: DraftOptions) -> None:
        self._path, self._target, self._vocabulary, self._options = path, target, vocabulary, options
        self._child: Child | None = None
        self._heard: asyncio.Future[dict[str, Any]] | None = None  # the next step of a start
        self._asked: dict[int, _Asked] = {}
        self._next = 1
        self._failures = 0
        self._ready_at: float | None = None  # loop time since which questions are taken
        self._restarting: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether questions are taken now."""
        return self._ready_at is not None

    @property
    def pid(self) -> int:
        return self._child.pid if self._child is not None else 0

    async def start(self) -> None:
        """Load the model. Raises ModelError if it cannot be used, OSError if the system starts no process."""
        child = Child(DRAFT, lambda event: self._on_event(child, event), lambda status: self._on_exit(child, status))
        self._child = child
        await child.start()
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                theirs = await self._step(child, path=str(self._path))
                self._compare(Fingerprint(int(theirs["tokens"]), theirs["digest"]))
                options = self._options
                await self._step(
                    child,
                    context=options.context,
                    sequences=options.sequences,
                    threads=options.threads,
                    gpu_layers=options.gpu_layers,
                )
            if not child.alive:
                raise self._ended(child)
        except BaseException as error:
            self._child = None
            await child.stop()
            if isinstance(error, TimeoutError):
                raise ModelError(
                    f"{self._path}: loading it took more than {START_DEADLINE_S:.0f} s: choose a smaller draft model"
                ) from None
            raise
        self._ready_at = asyncio.get_running_loop().time()

    async def _step(self, child: Child, **command: Any) -> dict[str, Any]:
        if not child.alive:
            raise self._ended(child)
        self._heard = asyncio.get_running_loop().create_future()
        child.send(**command)
        return await self._heard

    def _ended(self, child: Child) -> ModelError:
        words = "".join(child.last_words[-1:])
        return ModelError(f"{self._path}: llama.cpp ended while loading the draft model: {words}")

    def _compare(self, theirs: Fingerprint) -> None:
        ours = self._vocabulary
        if theirs == ours:
            return
        how = f"{theirs.tokens} tokens against {ours.tokens}"
        if theirs.tokens == ours.tokens:
            how = f"{ours.tokens} tokens each, but not the same ones"
        raise ModelError(
            f"the draft model {self._path.name} has another vocabulary than {self._target} ({how}): "
            "choose a draft model of the same family",
            code="draft_vocabulary",
        )

    def propose(self, sequence: int, tokens: Sequence[int], count: int, callback: Callback) -> None:
        """Ask for at most ``count`` tokens after a text. ``callback`` is called once, or never: guesses that come
        after a newer question, :meth:`forget` or the child's death are dropped. ``forget`` sequences that are over."""
        child, now = self._child, asyncio.get_running_loop().time()
        if child is None or self._ready_at is None:
            return
        asked = self._asked.setdefault(sequence, _Asked())
        question = _Question(self._next, list(tokens), count, callback, now)
        self._next += 1
        if asked.open is None:
            self._send(child, sequence, asked, question)
            return
        asked.waiting = question
        if now - asked.open.asked > ANSWER_DEADLINE_S:
            self._lose(child, f"gave no answer for {ANSWER_DEADLINE_S:.0f} s")

    def forget(self, sequence: int) -> None:
        """A sequence is over."""
        if self._asked.pop(sequence, None) is not None and self._child is not None:
            self._child.send(forget=sequence)

    def _send(self, child: Child, sequence: int, asked: _Asked, question: _Question) -> None:
        keep = _common(asked.sent, question.tokens)
        asked.sent, asked.open = question.tokens, question
        child.send(id=question.id, sequence=sequence, keep=keep, tokens=question.tokens[keep:], count=question.count)

    def _on_event(self, child: Child, event: dict[str, Any]) -> None:
        if child is not self._child:
            return
        match event["event"]:
            case "vocabulary" | "ready":
                if self._heard is not None and not self._heard.done():
                    self._heard.set_result(event)
            case "failed":
                if self._heard is not None and not self._heard.done():
                    self._heard.set_exception(ModelError(event["message"], code=event["code"]))
            case answer:
                self._on_answer(child, event, lost=answer == "lost")

    def _on_answer(self, child: Child, event: dict[str, Any], *, lost: bool) -> None:
        asked = self._asked.get(event["sequence"])
        if asked is None or asked.open is None or asked.open.id != event["id"]:
            return  # of a sequence that is over
        question, asked.open = asked.open, None
        following, asked.waiting = asked.waiting, None
        if lost:
            asked.sent = []
            following = following or question
        if following is not None:
            self._send(child, event["sequence"], asked, following)
        elif event["tokens"]:
            question.callback(event["tokens"])

    def _on_exit(self, child: Child, status: int) -> None:
        if child is not self._child:
            return
        if self.ready:
            self._lose(child, f"ended with status {status} {''.join(child.last_words[-1:])}".rstrip())
        elif self._heard is not None and not self._heard.done():
            self._heard.set_exception(self._ended(child))

    def _lose(self, child: Child, how: str) -> None:
        """Do without drafts until the child is back."""
        assert self._ready_at is not None
        log.warning("the draft model's process %s: there are no drafts until it is back", how)
        loop = asyncio.get_running_loop()
        self._failures = 1 if loop.time() - self._ready_at >= STEADY_S else self._failures + 1
        self._child, self._ready_at = None, None
        self._asked.clear()
        self._restarting = loop.create_task(self._restart(child))

    async def _restart(self, old: Child) -> None:
        await old.stop()
        while True:
            await asyncio.sleep(PAUSE_S[min(self._failures, len(PAUSE_S)) - 1])
            try:
                await self.start()
            except (DwarfStarError, OSError) as error:
                self._failures += 1
                log.info("the draft model did not start: %s", error)
            else:
                log.info("the draft model is back")
                return

    async def close(self) -> None:
        """End the child. Idempotent."""
        self._ready_at = None
        self._asked.clear()
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        child, self._child = self._child, None
        if child is not None:
            await child.stop()


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix. Texts mostly grow: that is seen without a loop."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
