"""What an empty screen says: what is listened for, where, and what to do next. Pure."""

from __future__ import annotations

from dwarfstar_tui import text
from dwarfstar_tui.cluster_rows import Runs
from dwarfstar_tui.store import State
from dwarfstar_tui.text import Glyphs
from dwarfstar_tui.updates import LinkState, Surroundings

MAX_INTERFACES = 6


def port(address: str) -> str:
    return address.rpartition(":")[2]


def waiting(state: State, around: Surroundings, glyphs: Glyphs, width: int) -> list[Runs]:
    """For a cluster without machines."""
    lines: list[Runs] = [(("No machine has joined yet.", "name"),), ()]
    reason = state.status.reason if state.status is not None else ""
    if reason:
        lines += [((line, "late"),) for line in text.wrapped(text.clean(reason), width)] + [()]
    lines += listening(around, glyphs)
    lines += [
        (),
        (("t", "key"), ("  show the line with which another machine joins", "plain")),
        (("a", "key"), ("  add a machine by its address", "plain")),
        (("4", "key"), ("  what has happened so far", "plain")),
    ]
    return lines


def listening(around: Surroundings, glyphs: Glyphs) -> list[Runs]:
    """Interfaces and ports, and how machines find this one."""
    lines: list[Runs] = []
    if around.discovery:
        lines.append((("Listening for ", "muted"), ("dwarfstar node", "accent"),
                      (" by multicast DNS (UDP 5353).", "muted")))  # fmt: skip
    else:
        lines.append((("Nothing is told to the network: machines join by address only.", "muted"),))
    if around.control:
        lines.append((("Ports      ", "muted"), (f"TCP {port(around.control)}", "plain"), (" control", "muted"),
                      (f"   TCP {port(around.join) or '?'}", "plain"), (" joining", "muted")))  # fmt: skip
    shown = around.interfaces[:MAX_INTERFACES]
    for index, one in enumerate(shown):
        kind = "  virtual" if one.virtual else ""
        lines.append((("Interfaces " if index == 0 else " " * 11, "muted"), (f"{one.name:10.10} ", "plain"),
                      (one.address, "accent"), (kind, "muted")))  # fmt: skip
    if len(around.interfaces) > len(shown):
        lines.append(((" " * 11 + f"and {len(around.interfaces) - len(shown)} more", "muted"),))
    if not shown:
        lines.append((("Interfaces ", "muted"), ("none: this machine is on no network", "late")))
    return lines


def unattached(state: State, home: str, said: tuple[str, ...], glyphs: Glyphs, width: int) -> list[Runs]:
    """When there is no engine to show: which, and since when it has been tried, or what it says as it starts."""
    link = state.link
    if link.state is LinkState.STARTING or (said and link.state is not LinkState.DOWN):
        lines: list[Runs] = [
            (("Starting the engine ", "name"), ("in the background; it survives this app.", "muted")),
            (),
        ]
        for line in said[-8:]:
            lines += [((part, "plain"),) for part in text.wrapped(text.clean(line), width)]
        return lines
    if link.state is LinkState.DOWN:
        return [
            (("The engine does not answer.", "lost"),),
            (),
            *(((line, "plain"),) for line in text.wrapped(text.clean(link.detail), width)),
            (),
            (("Trying again by itself; nothing that you have typed is lost.", "muted"),),
        ]
    if link.state is LinkState.CONNECTING:
        return [((f"Looking for the engine of {home} {glyphs.ellipsis}", "muted"),)]
    return []
