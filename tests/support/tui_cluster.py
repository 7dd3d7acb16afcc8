"""A scripted cluster for the app: views at a frozen moment, and an app that shows them. Nothing runs, nothing waits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path

from dwarfstar_engine.views import (
    CoordinatorView,
    EventsView,
    EventView,
    ModelView,
    NodeView,
    StageView,
    StatusView,
    ThroughputView,
)
from dwarfstar_tui import text
from dwarfstar_tui.app import DwarfStarApp
from dwarfstar_tui.mailbox import Mailbox
from dwarfstar_tui.options import AppOptions
from dwarfstar_tui.preferences import Preferences
from dwarfstar_tui.screens.events import EventsScreen
from dwarfstar_tui.text import Glyphs
from dwarfstar_tui.updates import (
    Command,
    Fit,
    Happened,
    Linked,
    LinkState,
    ModelFile,
    ModelsFound,
    NetInterface,
    StatusSeen,
    Surroundings,
    Update,
)

NOW = 10_000.0
WALL = 1_790_000_000.0
NOTHING_LIKED = Preferences()
MINUTE = 60

MACHINES = (  # name, device, memory, used, lent, load, °C, W, layers, ms
    ("tower", "NVIDIA GeForce RTX 3090", 24.0, 20.6, 22.1, 0.93, 71.0, 318.0, (0, 44), 14.9),
    ("garage-box", "NVIDIA GeForce RTX 3060", 12.0, 10.9, 11.0, 0.97, 64.0, 158.0, (44, 66), 21.4),
    ("mini-pc", "AMD Ryzen 7 5700U", 62.7, 14.2, 24.0, 0.55, 58.0, None, (66, 80), 18.2),
)


def node(name: str, device: str, memory: float, used: float, lent: float, **more: object) -> NodeView:
    facts: dict[str, object] = {
        "id": f"n-{name}"[:24], "name": name, "address": "192.168.1.20", "state": "joined", "device": device,
        "memory_gib": memory, "used_gib": used, "effective_vram_gib": lent, "heartbeat_age_s": 0.4,
        "free_gib": memory - used,
    }  # fmt: skip
    return NodeView.model_validate({**facts, **more})


def stage(name: str, layers: tuple[int, int], ms: float, **more: object) -> StageView:
    count = layers[1] - layers[0]
    facts: dict[str, object] = {
        "node": name, "layers": layers, "weights_gib": round(count * 0.425, 2), "kv_gib": round(count * 0.0156, 2),
        "ms_per_token": ms, "tok_s": 18.3, "busy": round(ms / 54.6, 3), "wait": round(1 - ms / 54.6, 3), "wire": "f16",
        "link_ms": 0.31, "link_mb_s": 112.0, "pid": 4711, "state": "ready", "rss_gib": count * 0.45, "rows_s": 18.3,
    }  # fmt: skip
    return StageView.model_validate({**facts, **more})


def status(nodes: Sequence[NodeView], stages: Sequence[StageView], **more: object) -> StatusView:
    facts: dict[str, object] = {
        "coordinator": CoordinatorView(
            address="192.168.1.10:8477", term=1, api_url="http://127.0.0.1:8080", leader="coordinator"
        ),
        "model": ModelView(
            name="Llama-3.3-70B-Instruct-Q3_K_M", architecture="llama", layers=80, legal_cuts=tuple(range(1, 80)),
            weights_gib=34.2, context=4096,
        ),
        "epoch": 3, "state": "serving", "reason": "", "nodes": tuple(nodes), "stages": tuple(stages),
        "throughput": ThroughputView(tok_s=18.3, active=2, queued=0), "last_event": 12,
    }  # fmt: skip
    return StatusView.model_validate({**facts, **more})


def home_lab() -> StatusView:
    """Three machines that serve, one that is late."""
    nodes = [
        node(name, device, memory, used, lent, load=load, temperature_c=heat, power_w=power,
             address=f"192.168.1.{20 + index}", heartbeat_age_s=0.2 + 0.3 * index)
        for index, (name, device, memory, used, lent, load, heat, power, _, _) in enumerate(MACHINES)
    ]  # fmt: skip
    stages = [stage(row[0], row[8], row[9], pid=4711 + index) for index, row in enumerate(MACHINES)]
    stages[-1] = stages[-1].model_copy(update={"wire": "ids", "link_ms": 0.0, "link_mb_s": 0.0})
    spare = node("laptop", "Apple M2", 16.0, 9.8, 6.0, load=0.08, temperature_c=41.0, heartbeat_age_s=2.9)
    return status([*nodes, spare], stages)


STORY = (  # seconds ago, kind, node, cause
    (612, "settings", "", "started with wait_nodes = 3"),
    (611, "node_joined", "tower", "tower has joined: NVIDIA GeForce RTX 3090, lends 22.1 GiB"),
    (604, "node_joined", "garage-box", "garage-box has joined: NVIDIA GeForce RTX 3060, lends 11.0 GiB"),
    (598, "node_joined", "mini-pc", "mini-pc has joined: AMD Ryzen 7 5700U, lends 24.0 GiB"),
    (598, "plan_made", "", "epoch 1 is planned: tower 0–43 → garage-box 44–65 → mini-pc 66–79"),
    (571, "stage_ready", "mini-pc", "the stage with layers 66–79 is ready on mini-pc: loaded in 26.8 s"),
    (566, "model_loaded", "", "the model Llama-3.3-70B-Instruct-Q3_K_M is loaded: 80 layers, 34.20 GiB"),
    (566, "epoch_up", "", "epoch 1 serves Llama-3.3-70B-Instruct-Q3_K_M over 3 stages"),
    (188, "node_lost", "nas", "nas is lost: its connection has ended"),
    (188, "streams_waiting", "", "2 streams wait for the next epoch"),
    (181, "streams_resumed", "", "2 streams go on"),
    (2, "node_late", "laptop", "laptop is late: no heartbeat for 2.6 s"),
)


def story() -> EventsView:
    return EventsView(
        events=tuple(
            EventView(number=number, time_s=WALL - ago, kind=kind, node=name, cause=cause, details={})
            for number, (ago, kind, name, cause) in enumerate(STORY, 1)
        )
    )


def history(view: StatusView, seconds: int = MINUTE) -> list[Update]:
    """A minute of statuses whose rates go up and down, up to now; before them a machine that has gone since."""
    nas = node("nas", "Intel N100", 15.4, 6.1, 8.0, load=0.2, heartbeat_age_s=0.3)
    told: list[Update] = [
        Linked(LinkState.UP, NOW - 200, "127.0.0.1:8477"),
        StatusSeen(view.model_copy(update={"nodes": (*view.nodes, nas)}), NOW - 190, 2.0),
        Happened(story(), NOW - 100),
    ]
    for second in range(seconds, -1, -1):
        wave = 14 + 4.5 * math.sin(second / 5) + 2.5 * math.sin(second / 2.3)
        stages = tuple(one.model_copy(update={"rows_s": round(wave, 1)}) for one in view.stages)
        rates = view.throughput.model_copy(update={"tok_s": round(wave, 1)})
        told.append(StatusSeen(view.model_copy(update={"stages": stages, "throughput": rates}), NOW - second, 2.0))
    return told


MODELS = ModelsFound(
    "/home/ada/.local/share/dwarfstar/models",
    (
        ModelFile("demo", "/opt/demo/SmolLM2.gguf", 98_000_000, 30, "llama", "Q4_1", 8192, demo=True),
        ModelFile("gemma-3-27b-it-Q4_K_M", "/m/gemma-3-27b-it-Q4_K_M.gguf", 16_546_000_000, 62, "gemma3", "Q4_K", 8192),
        ModelFile("Llama-3.3-70B-Instruct-Q3_K_M", "/m/Llama-3.3-70B-Instruct-Q3_K_M.gguf", 34_268_000_000, 80, "llama",
                  "Q3_K", 131072),
        ModelFile("whisper-large", "/m/whisper-large.gguf", 3_100_000_000,
                  problem="architecture whisper is not verified to split exactly"),
    ),
)  # fmt: skip
FITS = (
    Fit("/opt/demo/SmolLM2.gguf", 1, 812.0),
    Fit("/m/gemma-3-27b-it-Q4_K_M.gguf", 1, 33.7),
    Fit("/m/Llama-3.3-70B-Instruct-Q3_K_M.gguf", 3, 8.62),
)
AROUND = Surroundings(
    (NetInterface("enp3s0", "192.168.1.10", False), NetInterface("docker0", "172.17.0.1", True)),
    control="192.168.1.10:8477", join="192.168.1.10:8478", discovery=True, home="/home/ada/.local/share/dwarfstar",
)  # fmt: skip


@dataclass
class Stage:
    """An app on a stage: what it was asked is in ``asked``, what it is told goes through ``tell``."""

    updates: list[Update] = field(default_factory=list)
    asked: list[Command] = field(default_factory=list)
    readonly: bool = False
    theme: str | None = "night"
    glyphs: Glyphs = text.FANCY
    liked: Preferences = NOTHING_LIKED
    config: Path = Path("/nonexistent")
    now: float = NOW
    slow: bool = False
    count: int = 0

    def __post_init__(self) -> None:
        self.mailbox = Mailbox()
        for update in self.updates:
            self.mailbox.put(update)
            if isinstance(update, StatusSeen):
                self._flushed(update)

    def _flushed(self, update: StatusSeen) -> None:
        """A mailbox keeps the last status only; a script means each."""
        self.script: list[Update] = [*getattr(self, "script", []), *self.mailbox.take()]

    def fresh_id(self) -> str:
        self.count += 1
        return f"chat-{self.count}"

    def app(self) -> DwarfStarApp:
        EventsScreen.zone = UTC
        options = AppOptions(home=Path("/home/ada"), config=self.config, readonly=self.readonly, theme=self.theme)
        self.running = DwarfStarApp(
            options, self.mailbox, self.asked.append, liked=self.liked, slow=self.slow, glyphs=self.glyphs,
            clock=lambda: self.now, wall=lambda: WALL, fresh_id=self.fresh_id, ticking=False,
        )  # fmt: skip
        return self.running

    def tell(self, *updates: Update) -> None:
        """One after the other, each taken before the next."""
        for update in updates:
            self.mailbox.put(update)
            self.running.tick()

    def play(self) -> None:
        """What it was made with."""
        self.tell(*getattr(self, "script", []), *self.mailbox.take())
        self.running.tick()


def large(count: int) -> StatusView:
    """So many machines, in one ring."""
    nodes = [
        node(f"node-{index:02}", "NVIDIA L4", 24.0, 10 + index % 12, 22.0, load=(index % 10) / 10, temperature_c=60.0,
             power_w=70.0, heartbeat_age_s=0.1 + (index % 9) / 10)
        for index in range(count)
    ]  # fmt: skip
    stages = [stage(f"node-{index:02}", (index, index + 1), 1.0 + (index % 7) / 10) for index in range(count)]
    return status(nodes, stages)


def replaced(row: StatusView, **more: object) -> StatusView:
    return row.model_copy(update=more)


__all__ = ["AROUND", "FITS", "MODELS", "NOW", "WALL", "Stage", "history", "home_lab", "large", "node", "replace",
           "replaced", "stage", "status", "story"]  # fmt: skip
