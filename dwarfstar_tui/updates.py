"""What the session tells the app, and what the app asks of the session: two closed unions of frozen values.

Nothing else crosses between the two threads. ``at`` is monotonic, in seconds, by the clock that
both of them read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from dwarfstar_engine.views import (
    CommitView,
    EventsView,
    LoadView,
    OverrideView,
    PlanRequest,
    ProposalView,
    StatusView,
)

# --- session to app --------------------------------------------------------------------------------------------------


class LinkState(StrEnum):
    CONNECTING = "connecting"
    UP = "up"
    DOWN = "down"  # it was up, or there is an engine that does not answer
    NONE = "none"  # no engine runs
    STARTING = "starting"  # the engine that we have started is not there yet


@dataclass(frozen=True, slots=True)
class Linked:
    """How we stand with the engine. detail: for people. round_trip_ms: of the last status; 0: not known."""

    state: LinkState
    at: float
    detail: str = ""
    round_trip_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class StatusSeen:
    """engine: counts those that were attached to; one that is started anew is another, and its events begin at 1."""

    view: StatusView
    at: float
    round_trip_ms: float
    engine: int = 0


@dataclass(frozen=True, slots=True)
class Happened:
    """engine: as in StatusSeen. Which of the two was told first says nothing: a status may be older than events."""

    batch: EventsView
    at: float
    engine: int = 0


@dataclass(frozen=True, slots=True)
class StartLine:
    """A line of what a starting engine says. over: it will say no more; failed: because it has ended."""

    text: str
    over: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Notice:
    """A sentence for the person. severity: information | warning | error."""

    text: str
    severity: str = "information"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file here. problem: why it cannot be served; its other figures are then 0 or empty."""

    name: str
    path: str
    size_bytes: int
    layers: int = 0
    architecture: str = ""
    quantisation: str = ""
    context: int = 0
    problem: str = ""
    demo: bool = False


@dataclass(frozen=True, slots=True)
class ModelsFound:
    folder: str
    files: tuple[ModelFile, ...]
    more: int = 0  # that are not listed
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ModelChecked:
    """A model of that path can be loaded, as ``view`` says."""

    path: str
    view: LoadView


@dataclass(frozen=True, slots=True)
class ModelOrderOver:
    """What was ordered of the model is done, or was refused, which a notice has told."""


@dataclass(frozen=True, slots=True)
class NetInterface:
    name: str
    address: str
    virtual: bool


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where machines can join, and how they would find us."""

    interfaces: tuple[NetInterface, ...] = ()
    control: str = ""
    join: str = ""
    discovery: bool = False
    home: str = ""


@dataclass(frozen=True, slots=True)
class TokenMade:
    """command: to run on the machine that joins. address: where it joins, "host:port"."""

    command: str
    token: str
    address: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """More of an answer. tokens: pieces in ``text``; first_at, at: when its first and last came."""

    answer: int
    text: str
    tokens: int
    first_at: float
    at: float


@dataclass(frozen=True, slots=True)
class AnswerOver:
    """finish: stop | length | stopped (by the person) | failed. problem: why, if it failed."""

    answer: int
    at: float
    finish: str
    prompt_tokens: int = 0
    tokens: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ChatsRead:
    """Conversations kept on disk, as JSON texts, newest first; problems: files that are no conversations."""

    texts: tuple[str, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposed:
    """What the engine says to Propose ``number``. view: None: it did not answer, and problem says why."""

    number: int
    view: ProposalView | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PlanChanged:
    """The end of a commit, or of going back (undone). view: None: what served goes on; problem, code say why."""

    view: CommitView | None
    undone: bool = False
    problem: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class LentSet:
    """The end of SetLent. view: None: refused; problem, code say why."""

    asked: SetLent
    view: OverrideView | None
    problem: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a model fits the machines there are, by the planner. problem: why not."""

    path: str
    stages: int = 0
    single_tok_s: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ModelsJudged:
    fits: tuple[Fit, ...]


@dataclass(frozen=True, slots=True)
class PullSeen:
    """How far a download is. over: it has ended; problem: why, if it is not complete."""

    wanted: str
    line: str
    over: bool = False
    problem: str = ""


Update = (
    Linked | StatusSeen | Happened | StartLine | Notice | ModelsFound | Surroundings | TokenMade | AnswerPiece
    | AnswerOver | ChatsRead | Proposed | PlanChanged | LentSet | ModelsJudged | PullSeen | ModelChecked
    | ModelOrderOver
)  # fmt: skip

# --- app to session --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drain:
    node: str  # id
    undo: bool = False


@dataclass(frozen=True, slots=True)
class Remove:
    node: str  # id


@dataclass(frozen=True, slots=True)
class NameNode:
    """name: empty: as it calls itself."""

    node: str  # id
    name: str


@dataclass(frozen=True, slots=True)
class MakeToken:
    hours: float = 24.0


@dataclass(frozen=True, slots=True)
class FindModels:
    pass


@dataclass(frozen=True, slots=True)
class CheckModel:
    path: str  # on the engine's machine


@dataclass(frozen=True, slots=True)
class LoadModel:
    path: str


@dataclass(frozen=True, slots=True)
class UnloadModel:
    pass


@dataclass(frozen=True, slots=True)
class LookAround:
    pass


@dataclass(frozen=True, slots=True)
class StartEngine:
    """arguments: of ``dwarfstar --serve``."""

    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StopEngine:
    pass


@dataclass(frozen=True, slots=True)
class Ask:
    """messages: (role, text). options: fields of the request's body."""

    answer: int
    messages: tuple[tuple[str, str], ...]
    options: dict[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StopAnswer:
    answer: int


@dataclass(frozen=True, slots=True)
class ReadChats:
    pass


@dataclass(frozen=True, slots=True)
class KeepChat:
    """text: the conversation as JSON; empty: delete it."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Propose:
    """What the engine makes of a plan. Of those that wait only the latest is asked; number tells the answer's."""

    number: int
    request: PlanRequest


@dataclass(frozen=True, slots=True)
class CommitPlan:
    request: PlanRequest
    base_epoch: int


@dataclass(frozen=True, slots=True)
class UndoPlan:
    pass


@dataclass(frozen=True, slots=True)
class SetLent:
    """What a machine lends: 18 (GiB), 50% or -2; empty: as it was started. replan: move layers first, if need be."""

    node: str  # id
    text: str
    replan: bool = False


@dataclass(frozen=True, slots=True)
class JudgeModels:
    """Plan each of these files for the machines of a status."""

    paths: tuple[str, ...]
    status: StatusView


@dataclass(frozen=True, slots=True)
class PullModel:
    wanted: str  # as `dwarfstar pull` takes it


@dataclass(frozen=True, slots=True)
class StopPull:
    pass


Command = (
    Drain | Remove | NameNode | MakeToken | FindModels | LookAround | StartEngine | StopEngine | Ask | StopAnswer
    | ReadChats | KeepChat | Propose | CommitPlan | UndoPlan | SetLent | JudgeModels | PullModel | StopPull
    | CheckModel | LoadModel | UnloadModel
)  # fmt: skip
