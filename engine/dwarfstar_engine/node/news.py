"""What the coordinator tells of plans, stages, epochs and streams: the words and figures of its events."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dwarfstar_engine.node.beside import RELEASED
from dwarfstar_engine.node.epoch import Epoch
from dwarfstar_engine.node.journal import Details, Journal, Kind
from dwarfstar_engine.node.members import GIB, Member
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.wire.generated import control_pb2 as pb

_OVER = {pb.STAGE_STATE_FAILED: "failed", pb.STAGE_STATE_EXITED: "ended"}


_Key = tuple[str, tuple[int, int]]  # member id, layers


class News:
    """See the module. clock: monotonic, s; for how long things took."""

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        self._journal, self._clock = journal, clock
        self._loading: dict[_Key, tuple[int, float]] = {}  # epoch of the load told of, and when it began
        self._ready: dict[_Key, int] = {}  # epoch of the stage told to be ready
        self._model = ""  # loaded last

    def settings(self, settings: Settings) -> None:
        """With what the engine runs: what is set to something else than the default. Paths are nobody's business."""
        fields = Settings.model_fields
        set_here = {
            name: value if isinstance(value, (int, float, str)) else ",".join(map(str, value))
            for name, value in settings.model_dump().items()
            if fields[name].default_factory is None and value != fields[name].default
            if value is not None and not isinstance(value, Path)
        }
        shown = ", ".join(f"{name} = {value}" for name, value in set_here.items())
        self._journal.add(Kind.SETTINGS, f"started with {shown or 'the default settings'}", details=set_here)

    # --- plans and epochs ---

    def plan_made(self, ring: Epoch, left_out: Iterable[tuple[str, str]], members: Mapping[str, Member]) -> None:
        """left_out: (node id, reason)."""
        reasons = [f"{members[node].name} ({why})" for node, why in left_out if node in members]
        text = f"epoch {ring.number} is planned: {ring}" + (f"; without {', '.join(reasons)}" if reasons else "")
        details: Details = {"epoch": ring.number, "stages": _stages(ring), "left_out": "; ".join(reasons)}
        self._journal.add(Kind.PLAN_MADE, text, details=details)

    def no_plan(self, code: str, reason: str) -> None:
        self._journal.add(Kind.NO_PLAN, f"there is no plan: {reason}", details={"code": code})

    def epoch_up(self, ring: Epoch, source: Source, context: int) -> None:
        if source.name != self._model:
            self._model = source.name
            weights = sum(stage.plan.weights_bytes for stage in ring.stages)
            text = f"the model {source.name} is loaded: {source.layers} layers, {weights / GIB:.2f} GiB"
            self._journal.add(
                Kind.MODEL_LOADED, text, details={"model": source.name, "layers": source.layers, "context": context}
            )
        count = len(ring.stages)
        text = f"epoch {ring.number} serves {source.name} over {count} stage{'s' * (count > 1)}"
        self._journal.add(Kind.EPOCH_UP, text, details={"epoch": ring.number, "stages": _stages(ring)})

    def unloaded(self) -> None:
        """The next model is news, also if it is the same."""
        self._model = ""

    def epoch_over(self, number: int, cause: str, *, served: bool, sure: bool, planned: bool) -> None:
        """While an epoch is brought up this is one attempt of several, and no warning. sure: the cause is the first.
        planned: it was ended for the next one."""
        if not sure:
            self._journal.hold()
        level = logging.WARNING if served and not planned else logging.INFO
        self._journal.add(Kind.EPOCH_OVER, f"epoch {number} is over: {cause}", details={"epoch": number}, level=level)

    # --- stages ---

    def stage(self, member: Member, event: pb.StageEvent, ring: Epoch) -> None:
        """What a node says of its stage. The end of a process is news also when its epoch is over already."""
        layers, epoch = (event.layers.begin, event.layers.end), event.epoch
        key = (member.id, layers)
        what = f"a copy of layers {_layers(layers)}" if event.standby else f"the stage with layers {_layers(layers)}"
        if event.code == RELEASED:
            return
        if event.state in _OVER:
            text = event.detail or f"the stage on {member.name} {_OVER[event.state]}"
            self._add(Kind.STAGE_FAILED, member, event, text, code=event.code)
        elif epoch != ring.number and not event.standby:
            return
        elif event.state == pb.STAGE_STATE_LOADING and self._loading.get(key, (0, 0.0))[0] != epoch:
            self._loading[key] = (epoch, self._clock())
            self._add(Kind.STAGE_LOADING, member, event, f"{what} is being loaded on {member.name}")
        elif event.state == pb.STAGE_STATE_READY and self._ready.get(key) != epoch:
            self._ready[key] = epoch
            began = self._loading.get(key, (0, 0.0))
            took = f"loaded in {self._clock() - began[1]:.1f} s" if began[0] == epoch else "it was loaded already"
            self._add(Kind.STAGE_READY, member, event, f"{what} is ready on {member.name}: {took}")

    def forget(self, member: Member) -> None:
        self._loading = {key: told for key, told in self._loading.items() if key[0] != member.id}
        self._ready = {key: told for key, told in self._ready.items() if key[0] != member.id}

    def _add(self, kind: Kind, member: Member, event: pb.StageEvent, text: str, **more: str) -> None:
        details: Details = {"node_id": member.id, "epoch": event.epoch, "pid": event.pid, **more}
        self._journal.add(kind, text, member.name, details)

    # --- streams ---

    def waiting(self, count: int) -> None:
        if count:
            self._journal.add(
                Kind.STREAMS_WAITING, f"{_streams(count, 'wait')} for the next epoch", details={"streams": count}
            )

    def resumed(self, count: int) -> None:
        if count:
            self._journal.add(Kind.STREAMS_RESUMED, f"{_streams(count, 'go')} on", details={"streams": count})

    def carried_over(self, count: int) -> None:
        if count:
            text = f"{_streams(count, 'go')} on in another pipeline"
            self._journal.add(Kind.STREAMS_RESUMED, text, details={"streams": count})

    def carried(self, ring: Epoch, layers: tuple[int, int], nodes: tuple[str, str], of: int, told: pb.Carried) -> None:
        """Cells of ``of`` sequences were to go from the first of ``nodes`` to the other."""
        source, target = nodes
        what = f"{told.sequences} of {of} sequence{'s' * (of > 1)}"
        text = f"layers {_layers(layers)} of {what} were carried from {source} to {target} in {told.seconds:.2f} s"
        details: Details = {
            "epoch": ring.number,
            "from": source,
            "carried": told.sequences,
            "sequences": of,
            "bytes": told.bytes,
            "seconds": told.seconds,
            "code": told.code,
        }
        self._journal.add(Kind.CELLS_CARRIED, text + (f": {told.message}" if told.message else ""), target, details)

    def given_up(self, count: int, why: str) -> None:
        if count:
            self._journal.add(Kind.STREAMS_GIVEN_UP, f"{_streams(count, 'end')}: {why}", details={"streams": count})


def _stages(ring: Epoch) -> str:
    """For programs: name:begin-end, half open, in the order of the ring."""
    return ",".join("{}:{}-{}".format(stage.member.name, *stage.plan.layers) for stage in ring.stages)


def _layers(layers: tuple[int, int]) -> str:
    return f"{layers[0]}–{layers[1] - 1}"


def _streams(count: int, verb: str) -> str:
    if count > 1:
        return f"{count} streams {verb}"
    return f"1 stream {verb}{'es' if verb.endswith('o') else 's'}"
