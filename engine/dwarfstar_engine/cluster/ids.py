"""Id types. A node's id is its certificate's; an instance is one connection of it."""

from __future__ import annotations

from typing import NewType

NodeId = NewType("NodeId", str)
InstanceId = NewType("InstanceId", str)  # random, fresh for every connection: a restart and a reconnect both change it
