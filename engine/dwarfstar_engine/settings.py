"""Settings: command line > environment > ``config.toml`` > default. Frozen, read once at the entry point.

An environment variable is the field's name in capitals behind ``DWARFSTAR_``: ``DWARFSTAR_PORT=9000``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dwarfstar_engine.errors import SettingsError

MAX_CONFIG_BYTES = 1 << 20  # a config file is written by hand; anything larger is a mistake
ENV_PREFIX = "DWARFSTAR_"


_LENT = re.compile(r"(\d+(?:\.\d+)?)(%?)|-\d+(?:\.\d+)?", re.ASCII)
MAX_LENT_GIB = 1 << 20
MAX_SLOTS = 64
MAX_PIPELINES = 64  # each has a coordinator's share of one process; more requests than that need another coordinator


def _lent(value: object) -> str:
    """18 in a config file is a number. As ``plan.capacity.parse_override`` reads it."""
    said = f"{value:.12g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value).strip()
    match = _LENT.fullmatch(said)
    if match is None or (match[1] and not 0 < float(match[1]) <= (100 if match[2] else MAX_LENT_GIB)):
        raise PydanticCustomError(
            "lent", "Input should be GiB, as in 18, a share, as in 50%, or GiB to keep back, as in -2"
        )
    return said


Lent = Annotated[str, BeforeValidator(_lent)]


def _pipelines(value: object) -> object:
    """One error, where a union would have two."""
    if value == "auto":
        return value
    said = str(value).strip()
    if isinstance(value, bool | float) or not said.isdecimal() or len(said) > 9 or not 1 <= int(said) <= MAX_PIPELINES:
        raise PydanticCustomError("pipelines", f"Input should be auto, or a number from 1 to {MAX_PIPELINES}")
    return int(said)


Pipelines = Annotated[Literal["auto"] | int, BeforeValidator(_pipelines)]


class Settings(BaseModel):
    """Every setting, its bounds and its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("dwarfstar")))
    """Folder of identity, certificates, logs and the running engine's address."""
    models: Path | None = None
    """Folder searched for GGUF files; default: ``models`` in the home folder."""
    model: str | None = None
    """Of a node: its file of the model that is served, a path or a name in the models folder; with ``mixed`` of the
    engine perhaps another quantisation."""
    mixed: bool = False
    """Nodes without the file that is served may run their layers from another quantisation of the same model."""
    name: str | None = Field(default=None, max_length=64)
    """This node's name; default: the host's."""

    host: str = "127.0.0.1"
    """Address the HTTP API binds to."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port of the HTTP API; 0 takes a free one."""
    control_host: str = "127.0.0.1"
    """Address the coordinator and the stages of this machine listen on for other nodes; if it is not set and machines
    may find this one (``discovery``, no local nodes), they listen on all."""
    control_port: int = Field(default=8477, ge=0, le=65535)
    """Port of the coordinator's control and data plane; 0 takes a free one."""
    tls_cert: Path | None = None
    """Certificate of the HTTP API, PEM, its issuers' behind it; with ``tls_key`` the API is HTTPS."""
    tls_key: Path | None = None
    """Private key of ``tls_cert``, PEM, without a passphrase."""
    can_lead: bool = False
    """Of a node: take the coordinator's place when that is lost. It needs the model's file."""
    certificate_hours: float = Field(default=24.0 * 365, gt=0, le=24.0 * 3650)
    """How long a node's certificate is good; it is renewed by itself at two thirds of that."""
    discovery: bool = True
    """Tell the local network of this coordinator, and look for one there, by multicast DNS."""
    max_body_mib: int = Field(default=4, ge=1, le=256)
    """Largest HTTP request body, MiB."""

    context: int | None = Field(default=None, ge=16, le=1 << 20)
    """Tokens of one request, prompt and answer; default: the model's own limit, at most 4096."""
    slots: int = Field(default=4, ge=1, le=MAX_SLOTS)
    """Requests generated at the same time; each has a full context of KV cache."""
    kv: Literal["f16", "q8_0", "q4_0"] = "f16"
    """Type of the KV cache's cells. The quantised ones take half and a quarter of the memory, and are not exact."""
    chunk: int | None = Field(default=None, ge=1, le=2048)
    """Tokens of a prompt that travel together; default: chosen from what the stages were measured to take."""
    prefix_cache: Literal["exact", "full", "off"] = "exact"
    """Keep the KV cells of requests that are over, for requests that begin alike: as far as that changes no bit of a
    text, or all that is alike."""
    speculation: Literal["auto", "on", "off"] = "auto"
    """Guess tokens ahead and verify them: never changes a text. ``auto``: where it measures faster."""
    draft_model: str | None = None
    """A small model with the same vocabulary that guesses; default: guesses come from the text itself."""
    queue: int = Field(default=256, ge=0, le=65536)
    """Requests that may wait for a slot; beyond it they are refused with 429."""
    request_timeout_s: float = Field(default=3600.0, gt=0, le=86400)
    """Longest time a request may take, waiting included."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of a stage; default: the physical cores, shared among local nodes."""
    gpu_layers: int = Field(default=-1, ge=-1)
    """Layers of a stage run on the GPU when llama.cpp has one; -1: all."""
    split_mode: Literal["none", "layer", "row", "tensor"] = "layer"
    """How llama.cpp uses several GPUs of one node."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    """llama.cpp's flash attention."""
    batching: Literal["auto", "exact"] = "auto"
    """Run tokens of several requests together where it is much faster, or only where that changes no bit of a text."""
    wire: Literal["auto", "f32", "f16", "q8"] = "auto"
    """Precision of activations between stages; f32 is exact. ``auto``: f32 unless the link would be the bottleneck."""

    effective_vram: Lent | None = None
    """What this node lends: GiB, as in 18; a share of what it could lend, as in 50%; or GiB to keep back, as in -2.
    Default: what is free on its device, less a reserve."""
    cuts: tuple[int, ...] = ()
    """Layer boundaries set by hand; default: what ``strategy`` finds."""
    strategy: Literal["proportional", "fastest"] = "proportional"
    """How layers are shared out: in proportion to effective VRAM, or for the least time by what was measured."""
    objective: Literal["single", "throughput"] = "throughput"
    """What ``fastest`` looks for: the quickest single stream, or most tokens a second of all."""
    auto_balance: Literal["off", "advise", "on"] = "advise"
    """When stages stay unequally busy under load: say which layers should move, or move them if that needs no pause
    for loading."""
    pipelines: Pipelines = 1
    """Pipelines that share no node, each with the whole model, behind the one endpoint; ``slots`` and ``queue`` are of
    each. ``auto``: one, several or copies, whatever promises most."""
    replicas: int = Field(default=0, ge=0, le=MAX_PIPELINES)
    """Nodes that each hold the whole model and serve beside one another; others are spare. 0: as ``pipelines`` says."""
    wait_nodes: int = Field(default=1, ge=1, le=1024)
    """Nodes to wait for before the first plan."""
    heartbeat_s: float = Field(default=1.0, ge=0.05, le=10)
    """Seconds between two heartbeats of a node."""
    late_s: float = Field(default=2.5, gt=0, le=600)
    """Seconds without a heartbeat after which a node is late."""
    lost_s: float = Field(default=5.0, gt=0, le=3600)
    """Seconds without a heartbeat after which a node is lost."""
    rejoin_s: float = Field(default=10.0, ge=0, le=3600)
    """Seconds a lost node is waited for before the model is planned on those that are left."""
    on_loss: Literal["rescue", "fail"] = "rescue"
    """When a node or stage is lost: carry its streams over to what is left, or end them with an error at once."""
    fallback: tuple[str, ...] = Field(default=(), max_length=8)
    """Smaller models, tried in this order when the model does not fit the nodes that are left."""
    rescue_s: float = Field(default=60.0, ge=1, le=3600)
    """Seconds a stream waits for the pipeline to be back before it ends with an error."""
    record_mib: int = Field(default=256, ge=0, le=1 << 20)
    """MiB, at most, that each stage keeps of what it sent, so that after a loss only the lost layers compute again; 0:
    all layers do."""
    carry: Literal["auto", "on", "off"] = "auto"
    """When a slice moves to another node, carry the cells of its running streams there: where that is thought to be
    quicker than computing them again, always, or never."""
    replan: Literal["auto", "idle", "off"] = "auto"
    """Plan anew with nodes that came later: also while streams run, which pause for a moment; when nobody is served; or
    not."""
    standby: int = Field(default=0, ge=0, le=1)
    """Copies of each stage's layers, loaded on another node with room, that take over without loading."""
    drain_s: float = Field(default=20.0, ge=0, le=3600)
    """Seconds a node that gets SIGTERM waits for its layers to move to others before it ends."""
    frame_deadline_s: float = Field(default=60.0, ge=1, le=3600)
    """A frame that is longer on its way is stuck: its pipeline is given up and brought up again."""

    @model_validator(mode="after")
    def _kv_and_attention(self) -> Self:
        if self.kv != "f16" and self.flash_attention == "off":
            raise ValueError(f"with flash_attention off llama.cpp has no {self.kv} cache: leave one of them out")
        return self

    @model_validator(mode="after")
    def _pipelines_and_replicas(self) -> Self:
        if self.replicas and self.pipelines != 1:
            raise ValueError("replicas are pipelines of one node each: give --replicas or --pipelines, not both")
        if self.cuts and (self.replicas > 1 or self.pipelines != 1):
            raise ValueError("--cuts are of one pipeline: leave them or --pipelines and --replicas out")
        return self

    @model_validator(mode="after")
    def _heartbeats(self) -> Self:
        if not self.heartbeat_s < self.late_s < self.lost_s:
            raise ValueError(
                f"heartbeat_s ({self.heartbeat_s:g}) must be less than late_s ({self.late_s:g}), and that less than "
                f"lost_s ({self.lost_s:g}): set them so that they increase"
            )
        return self

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_key is None else ("--tls-key", "--tls-cert")
            raise ValueError(f"{given} needs {missing} as well: give both files, or neither for HTTP without TLS")
        return self

    @property
    def models_dir(self) -> Path:
        return self.models or self.home / "models"


def load_settings(
    command_line: Mapping[str, Any], environment: Mapping[str, str], config: Path | None = None
) -> Settings:
    """Merge the sources. ``config`` None reads ``config.toml`` of the platform's config folder or of the home.

    Raises SettingsError naming the key and its source.
    """
    given = {key: value for key, value in command_line.items() if value is not None}
    from_environment = {
        key: environment[ENV_PREFIX + key.upper()]
        for key in Settings.model_fields
        if ENV_PREFIX + key.upper() in environment
    }
    if "cuts" in from_environment:
        from_environment["cuts"] = [part for part in from_environment["cuts"].split(",") if part]  # type: ignore[assignment]
    home = given.get("home") or from_environment.get("home")
    if config is None:
        folder = Path(home) if home else Path(platformdirs.user_config_dir("dwarfstar"))
        config = folder / "config.toml"
    from_file = _read(config)
    sources = (
        ("{key} in {config}", from_file),
        ("the environment variable {variable}", from_environment),
        ("--{option}", given),
    )
    merged: dict[str, Any] = {}
    for _, values in sources:
        merged.update(values)
    try:
        return Settings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # two that do not go together
            raise SettingsError(str(first["ctx"]["error"])) from None
        key = str(first["loc"][0])
        where = next((name for name, values in reversed(sources) if key in values), "{key}")
        shown = where.format(key=key, config=config, variable=ENV_PREFIX + key.upper(), option=key.replace("_", "-"))
        # What is no setting may be a key that somebody put there, and stderr goes to logs.
        given_as = "" if first["type"] == "extra_forbidden" else f" (given: {first['input']!r})"
        raise SettingsError(f"{shown} {_problem(first['type'], first['msg'])}{given_as}") from None


def _problem(kind: str, said: str) -> str:
    """What pydantic says, as the rest of a sentence that begins with the setting's name."""
    if kind == "extra_forbidden":
        return "is not a setting: see the list in the README"
    return said.replace("Input should", "must", 1) if said.startswith("Input should") else f"is not usable: {said}"


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SettingsError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: it is not a config file")
        return tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
