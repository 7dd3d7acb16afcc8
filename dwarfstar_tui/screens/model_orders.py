"""What the Models screen does to load and unload: it asks the engine, then the person, and follows what comes of it.

A load is checked first, which changes nothing: the question tells its consequences by what the engine says.
"""

from __future__ import annotations

from textual.app import App

from dwarfstar_tui import updates
from dwarfstar_tui.host import Host
from dwarfstar_tui.model_change import load_question, under_way, unload_question
from dwarfstar_tui.screens.dialogs import Confirm
from dwarfstar_tui.updates import ModelChecked, ModelFile, ModelOrderOver, Update


class ModelOrders:
    """Of one screen. One order at a time."""

    def __init__(self, app: App[None], host: Host) -> None:
        self._app, self._host = app, host
        self._name: str | None = None  # of the model of the order under way, empty: to unload; None: there is none
        self._checking = False

    def load(self, file: ModelFile | None) -> None:
        """Of the file under the cursor."""
        if file is None or not self._may():
            return
        if file.problem:
            self._host.tell(f"{file.name} cannot be served: {file.problem}", "warning")
            return
        self._name, self._checking = file.name, True
        self._host.submit(updates.CheckModel(file.path))

    def unload(self) -> None:
        if not self._may():
            return
        status = self._host.state.status
        if status is None or status.model is None:
            self._host.tell("no model is loaded")
            return
        title, why = unload_question(status)
        self._app.push_screen(Confirm(title, why, "unload"), lambda sure: self._unload() if sure else None)

    def _unload(self) -> None:
        self._name, self._checking = "", False
        self._host.submit(updates.UnloadModel())

    def _may(self) -> bool:
        if self._host.readonly:
            self._host.tell("read-only: nothing is changed", "warning")
        elif not self._host.state.live:
            self._host.tell("no engine is attached: start one on the Cluster screen (1)", "warning")
        elif self._name is not None:
            self._host.tell("a model is being loaded or unloaded already", "warning")
        else:
            return True
        return False

    def take(self, update: Update) -> None:
        """News that may be of an order."""
        match update:
            case ModelChecked(path, view):
                self._name, self._checking = None, False
                title, why = load_question(view)
                question = Confirm(title, why, "load")
                self._app.push_screen(question, lambda sure: self._load(view.model, path) if sure else None)
            case ModelOrderOver():
                self._name, self._checking = None, False
            case _:
                pass

    def _load(self, name: str, path: str) -> None:
        self._name, self._checking = name, False
        self._host.submit(updates.LoadModel(path))

    @property
    def note(self) -> str:
        """What is under way; empty: nothing."""
        if self._name is None:
            return ""
        return under_way(self._name, self._host.state.status, checking=self._checking)
