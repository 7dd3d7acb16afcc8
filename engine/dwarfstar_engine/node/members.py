"""The nodes attached to a coordinator, as it knows them."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from dwarfstar_engine.errors import PeerError
from dwarfstar_engine.plan.proportional import Capacity
from dwarfstar_engine.views import NodeView
from dwarfstar_engine.wire.generated import control_pb2 as pb

GIB = 1 << 30
LATE_S = 2.5  # without a heartbeat a node is late, and after LOST_S lost; heartbeats come each second
LOST_S = 5.0
OUTBOX = 256  # messages waiting for a node; it is told a few per epoch, so more means it has stopped reading
MAX_NODES = 1024
END = pb.CoordinatorMessage()  # in an outbox: close the control stream


@dataclass(slots=True)
class Member:
    """One attached node. ``host``: where its stages are reached. ``stage``: its last stage event of the epoch."""

    id: str
    name: str
    host: str
    device: pb.Device
    heard: float  # monotonic time of its last message
    instance: str = ""  # of its process
    peer: str = ""  # where its control stream comes from
    used_bytes: int = 0
    busy: float = 0.0
    stage: pb.StageEvent | None = None
    link: pb.LinkProfile = field(default_factory=pb.LinkProfile)  # of its stage to the next
    profile: pb.StageProfile = field(default_factory=pb.StageProfile)  # measured by its stage, of the epoch
    hosts: tuple[str, ...] = ()  # all its machine's addresses, for its peers
    control_port: int = 0  # where it would be a coordinator; 0: it would not
    epoch_seen: int = 0  # the highest its stage was ever assigned
    outbox: asyncio.Queue[pb.CoordinatorMessage] = field(default_factory=lambda: asyncio.Queue(OUTBOX))

    @property
    def usable_bytes(self) -> int:
        """Effective VRAM, its owner's override applied."""
        return self.device.effective_vram_bytes or self.device.memory_usable_bytes

    @property
    def capacity(self) -> Capacity:
        return Capacity(self.id, self.usable_bytes)

    def send(self, message: pb.CoordinatorMessage) -> None:
        """Queue a message. Raises PeerError if the node has stopped reading."""
        try:
            self.outbox.put_nowait(message)
        except asyncio.QueueFull:
            raise PeerError(f"node {self.name} takes no messages", code="node_stuck") from None

    def dismiss(self) -> None:
        """End its control stream, so that a node that was only silent attaches again when it wakes."""
        with contextlib.suppress(asyncio.QueueFull):  # then it has stopped reading, and the transport's timeout ends it
            self.outbox.put_nowait(END)

    def state(self, now: float) -> str:
        age = now - self.heard
        return "joined" if age < LATE_S else "late" if age < LOST_S else "lost"

    def view(self, now: float) -> NodeView:
        return NodeView(
            id=self.id,
            name=self.name,
            address=self.host,
            state=self.state(now),
            device=self.device.description or self.device.kind,
            memory_gib=round(self.device.memory_total_bytes / GIB, 3),
            used_gib=round(self.used_bytes / GIB, 3),
            effective_vram_gib=round(self.usable_bytes / GIB, 3),
            heartbeat_age_s=round(now - self.heard, 2),
        )
