"""The nodes attached to a coordinator, as it knows them."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from dwarfstar_engine.cluster.ids import InstanceId
from dwarfstar_engine.cluster.membership import Known, State
from dwarfstar_engine.errors import PeerError
from dwarfstar_engine.node.source import Source
from dwarfstar_engine.plan.capacity import overridden, parse_override
from dwarfstar_engine.plan.proportional import Capacity
from dwarfstar_engine.views import NodeView
from dwarfstar_engine.wire.generated import control_pb2 as pb

GIB = 1 << 30
OUTBOX = 256  # messages waiting for a node; it is told a few per epoch, so more means it has stopped reading
_NOT_ATTACHED = InstanceId("")
_NO_REPORT = pb.StageReport()
END = pb.CoordinatorMessage()  # in an outbox: close the control stream


@dataclass(slots=True)
class Member:
    """One attached node. ``host``: where its stages are reached. held: the last event of each of its stages, by layers.

    drained: it gets no layers. tidied: the epoch under which it was last told which stages to keep. lent: what the
    cluster's owner set it to lend while it runs, in their words; empty: what it was started with counts. own_name: what
    it calls itself, where its owner calls it ``name``. file: of the model that is wanted, another file that it runs its
    layers from; None: the served one.
    """

    id: str
    name: str
    host: str
    device: pb.Device
    instance: str = ""  # of its process
    peer: str = ""  # where its control stream comes from
    connection: InstanceId = _NOT_ATTACHED  # its control stream, as ``Nodes`` calls it
    live: pb.Heartbeat = field(default_factory=pb.Heartbeat)  # its last
    held: dict[tuple[int, int], pb.StageEvent] = field(default_factory=dict)
    drained: bool = False
    tidied: int = 0
    lent: str = ""
    file: Source | None = None
    own_name: str = ""
    profile: pb.StageProfile = field(default_factory=pb.StageProfile)  # of the stage that was measured here last
    profiled: int = 0  # its layers
    hosts: tuple[str, ...] = ()  # all its machine's addresses, for its peers
    control_port: int = 0  # where it would be a coordinator; 0: it would not
    epoch_seen: int = 0  # the highest its stage was ever assigned
    outbox: asyncio.Queue[pb.CoordinatorMessage] = field(default_factory=lambda: asyncio.Queue(OUTBOX))

    @property
    def usable_bytes(self) -> int:
        """What its stages may take, its owner's override applied."""
        device = self.device
        if self.lent:
            usable = device.memory_usable_bytes or device.effective_vram_bytes
            built_in = max(device.memory_total_bytes, usable, device.effective_vram_bytes)
            return overridden(parse_override(self.lent), usable, built_in)
        return device.effective_vram_bytes or device.memory_usable_bytes

    @property
    def override(self) -> str:
        """What its owner set, in their words; empty: nothing."""
        set_there = self.device.effective_vram_bytes
        return self.lent or self.device.override or (f"{set_there / GIB:.4g}" if set_there else "")

    def runs(self, source: Source) -> Source:
        """The file that its layers of a model are from."""
        return self.file if self.file is not None and self.file.stands_for == source.fingerprint else source

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

    def view(self, known: Known) -> NodeView:
        live = self.live
        return NodeView(
            id=self.id,
            name=self.name,
            address=self.host,
            state="drained" if self.drained and known.state is State.JOINED else known.state.value,
            device=self.device.description or self.device.kind,
            memory_gib=round(self.device.memory_total_bytes / GIB, 3),
            used_gib=round(live.memory_used_bytes / GIB, 3),
            effective_vram_gib=round(self.usable_bytes / GIB, 3),
            heartbeat_age_s=round(known.silent_s, 2),
            free_gib=round(live.memory_free_bytes / GIB, 3) if live.memory_free_bytes else None,
            load=round(live.load, 3) if live.number else None,
            temperature_c=round(live.temperature_c, 1) if live.HasField("temperature_c") else None,
            power_w=round(live.power_w, 1) if live.HasField("power_w") else None,
            bandwidth_gb_s=round(self.device.bandwidth_gb_s, 2) or None,
            usable_gib=round(self.device.memory_usable_bytes / GIB, 3),
            override=self.override,
        )
