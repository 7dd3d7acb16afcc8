"""Leases on the wire: ``cluster.lease``'s messages as ``LeadMessage`` and back. Who sent one, the stream says. Pure."""

from __future__ import annotations

import math
from typing import assert_never

from dwarfstar_engine.cluster import lease
from dwarfstar_engine.cluster.ids import NodeId
from dwarfstar_engine.wire.generated import control_pb2 as pb

MAX_ID = 64


def message_to(message: lease.Message) -> pb.LeadMessage:
    match message:
        case lease.LeaseRequest(_, term, number, leading, hears, lease_s):
            return pb.LeadMessage(
                request=pb.LeaseRequest(term=term, number=number, leading=leading, hears=hears, lease_s=lease_s)
            )
        case lease.LeaseReply(_, term, number, reason, term_seen, holder):
            return pb.LeadMessage(
                reply=pb.LeaseReply(term=term, number=number, reason=reason, term_seen=term_seen, holder=holder or "")
            )
        case lease.Release(_, term):
            return pb.LeadMessage(release=pb.LeaseRelease(term=term))
        case _:
            assert_never(message)


def message_from(node: NodeId, message: pb.LeadMessage) -> lease.Message | None:
    """What ``node`` says; None if it is not sound, or newer than this release."""
    match message.WhichOneof("message"):
        case "request":
            r = message.request
            if not math.isfinite(r.lease_s) or r.lease_s <= 0:
                return None
            return lease.LeaseRequest(node, r.term, r.number, r.leading, r.hears, r.lease_s)
        case "reply":
            a = message.reply
            try:
                reason = lease.Reason(a.reason)
            except ValueError:
                return None
            holder = NodeId(a.holder[:MAX_ID]) if a.holder else None
            return lease.LeaseReply(node, a.term, a.number, reason, a.term_seen, holder)
        case "release":
            return lease.Release(node, message.release.term)
        case _:
            return None
