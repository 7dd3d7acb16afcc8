"""The error tree. Every error a user can meet has a stable ``code`` and one sentence that says what to do.

::

    DwarfStarError
    ├── ModelError                 the model file, or what was asked of it
    │   ├── ModelFileError         unreadable, truncated, not a GGUF: names file, offset and field
    │   ├── UnsupportedModelError  a family that cannot be sliced exactly: names the reason
    │   └── IllegalCutError        a layer boundary at which the model may not be divided
    ├── PlanError                  no plan: the model does not fit, or no node is there
    ├── RequestError               a request that can never work (HTTP 4xx)
    │   └── ContextLengthError
    ├── Unavailable                a request that may work later (HTTP 503, Retry-After)
    │   ├── Overloaded             a bounded queue is full (HTTP 429)
    │   └── NoModel                no model is loaded
    ├── PeerError                  another process spoke wrongly
    │   ├── VersionMismatch        it runs another protocol or llama.cpp build: names both
    │   ├── FrameError             a malformed, corrupted or stale frame
    │   └── TrustError             certificates, tokens, fingerprints
    ├── HubError                   a download: the model hub, the way to it, or the disk it goes to
    ├── StageError                 a stage process failed or died
    ├── ClusterError               what the cluster keeps is damaged or has no room
    └── SettingsError              command line, environment or config file: names the key

Our own faults are assertions, not members of this tree.
"""

from __future__ import annotations


class DwarfStarError(Exception):
    """Base of all errors shown to users. ``message`` is one sentence that says what to do."""

    code = "error"
    http_status = 500
    exit_code = 1

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.retry_after_s = retry_after_s


class ModelError(DwarfStarError):
    code = "model_error"
    exit_code = 2


class ModelFileError(ModelError):
    """A model file that cannot be read. ``path``, ``offset`` (bytes) and ``field`` say where."""

    code = "model_file_invalid"

    def __init__(self, path: str, offset: int, field: str, problem: str) -> None:
        super().__init__(f"{path}: {problem} (field {field}, byte {offset})")
        self.path, self.offset, self.field = path, offset, field


class UnsupportedModelError(ModelError):
    code = "model_unsupported"


class IllegalCutError(ModelError):
    code = "illegal_cut"


class PlanError(DwarfStarError):
    code = "no_plan"
    http_status = 503
    exit_code = 3


class RequestError(DwarfStarError):
    """A request that can never work. ``param`` names the field at fault, as OpenAI does."""

    code = "invalid_request"
    http_status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class Unavailable(DwarfStarError):
    code = "unavailable"
    http_status = 503


class Overloaded(Unavailable):
    code = "overloaded"
    http_status = 429


class NoModel(Unavailable):
    code = "no_model"

    def __init__(self) -> None:
        super().__init__("no model is loaded: `dwarfstar load MODEL` on the engine's machine loads one")


class PeerError(DwarfStarError):
    code = "peer_error"
    http_status = 502


class VersionMismatch(PeerError):
    code = "version_mismatch"


class FrameError(PeerError):
    code = "bad_frame"


class TrustError(PeerError):
    code = "not_trusted"


class StageError(Unavailable):
    code = "stage_failed"


class HubError(DwarfStarError):
    """A download that cannot go on. ``passing``: the same request may work in a moment."""

    code = "hub_error"

    def __init__(
        self, message: str, *, code: str | None = None, retry_after_s: float | None = None, passing: bool = False
    ) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)
        self.passing = passing


class ClusterError(DwarfStarError):
    code = "cluster_state"


class SettingsError(DwarfStarError):
    code = "bad_setting"
    exit_code = 2
