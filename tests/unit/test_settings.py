"""Settings: which source wins, what is refused, and that an error names the key and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.settings import MAX_CONFIG_BYTES, Settings, load_settings


def load(
    folder: Path, given: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None, file: str = ""
) -> Settings:
    """Settings with ``folder`` as home, whose config file holds ``file``."""
    if file:
        (folder / "config.toml").write_text(file)
    return load_settings({"home": folder, **(given or {})}, environment or {})


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file, environment = "port = 1\nslots = 2\nchunk = 3\n", {"DWARFSTAR_PORT": "11", "DWARFSTAR_SLOTS": "12"}
    settings = load(tmp_path, {"port": 21}, environment, file)
    assert (settings.port, settings.slots, settings.chunk, settings.host) == (21, 12, 3, "127.0.0.1")


def test_an_option_that_was_not_given_does_not_hide_other_sources(tmp_path: Path) -> None:
    assert load(tmp_path, {"port": None}, {"DWARFSTAR_PORT": "11"}).port == 11


def test_a_false_or_zero_option_counts_as_given(tmp_path: Path) -> None:
    assert load(tmp_path, {"port": 0}, {"DWARFSTAR_PORT": "11"}).port == 0


def test_values_are_read_from_text(tmp_path: Path) -> None:
    environment = {"DWARFSTAR_CUTS": "10,20", "DWARFSTAR_EFFECTIVE_VRAM": "1.5", "DWARFSTAR_MODELS": "/m", "OTHER": "x"}
    settings = load(tmp_path, environment=environment)
    assert (settings.cuts, settings.effective_vram, settings.models) == ((10, 20), "1.5", Path("/m"))
    assert load(tmp_path, environment={"DWARFSTAR_CUTS": ""}).cuts == ()


def test_the_config_file_of_the_home(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("port = 5\n")
    assert load_settings({}, {"DWARFSTAR_HOME": str(tmp_path)}).port == 5
    assert load_settings({"home": tmp_path}, {"DWARFSTAR_HOME": "/nowhere"}).port == 5
    other = tmp_path / "other.toml"
    other.write_text("port = 6\n")
    assert load_settings({"home": tmp_path}, {}, other).port == 6


def test_no_config_file_is_no_error(tmp_path: Path) -> None:
    assert load(tmp_path / "missing") == Settings(home=tmp_path / "missing")


def test_models_are_in_the_home_unless_said_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path).models_dir == tmp_path / "models"
    assert load(tmp_path, {"models": tmp_path / "m"}).models_dir == tmp_path / "m"


def test_settings_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        load(tmp_path).port = 1


@pytest.mark.parametrize(
    ("given", "environment", "file", "words"),
    [
        ({"port": 70000}, {}, "", ("--port", "70000")),
        ({"effective_vram": "120%"}, {}, "", ("--effective-vram", "120%", "as in 50%")),
        ({}, {"DWARFSTAR_SLOTS": "many"}, "", ("environment", "DWARFSTAR_SLOTS", "many")),
        ({}, {}, "context = 3\n", ("context", "config.toml", "3")),
        ({}, {}, "colour = 'red'\n", ("colour", "config.toml")),
        ({"tls_cert": "a.pem"}, {}, "", ("--tls-cert", "--tls-key")),
        ({}, {"DWARFSTAR_TLS_KEY": "a.pem"}, "", ("--tls-cert", "--tls-key")),
        ({"port": -1}, {"DWARFSTAR_PORT": "x"}, "port = 99999\n", ("--port", "-1")),
    ],
)
def test_an_error_names_key_value_and_source(
    tmp_path: Path, given: Mapping[str, Any], environment: Mapping[str, str], file: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(SettingsError) as refused:
        load(tmp_path, given, environment, file)
    for word in words:
        assert word in refused.value.message
    assert refused.value.exit_code == 2 and "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("port", (0, 65535), (-1, 65536)),
        ("control_port", (0, 65535), (-1, 65536)),
        ("context", (16, 1 << 20), (15, (1 << 20) + 1)),
        ("slots", (1, 64), (0, 65)),
        ("chunk", (1, 2048), (0, 2049)),
        ("threads", (1, 1024), (0, 1025)),
        ("gpu_layers", (-1, 1000), (-2,)),
        ("max_body_mib", (1, 256), (0, 257)),
        ("effective_vram", ("0.01", "18", "50%", "-2"), ("0", "0%", "101%", "-2%", "lots", float("nan"))),
        ("wait_nodes", (1,), (0,)),
        ("pipelines", (1, 64, "auto"), (0, 65, "some", True, 1.5, -1, "9" * 5000)),
        ("replicas", (0, 64), (-1, 65)),
        ("wire", ("f32", "f16", "q8"), ("f64", "")),
        ("split_mode", ("none", "layer", "row", "tensor"), ("rows",)),
        ("flash_attention", ("auto", "on", "off"), ("yes",)),
        ("name", ("a" * 64,), ("a" * 65,)),
    ],
)
def test_bounds(tmp_path: Path, key: str, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    for value in good:
        assert getattr(load(tmp_path, {key: value}), key) == value
    for value in bad:
        with pytest.raises(SettingsError):
            load(tmp_path, {key: value})


def test_what_is_no_setting_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="api_key in") as refused:
        load(tmp_path, file="api_key = 'ds-secret'\n")
    assert "secret" not in refused.value.message


@pytest.mark.parametrize("content", [b"port = \n", b"\xff\xfe", b"x" * (MAX_CONFIG_BYTES + 1)])
def test_a_config_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"config\.toml"):
        load(tmp_path)


def test_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(SettingsError, match=r"config\.toml cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("given", [{"late_s": 1.0}, {"lost_s": 2.5}, {"heartbeat_s": 3.0}, {"late_s": 9.0}])
def test_times_of_membership_must_increase(given: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match="set them so that they increase"):
        load_settings(given, {}, Path("/nowhere"))
    assert load_settings({"heartbeat_s": 3.0, "late_s": 9.0, "lost_s": 20.0}, {}, Path("/nowhere")).late_s == 9.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pipelines": 2, "replicas": 2}, "not both"),
        ({"pipelines": "auto", "replicas": 1}, "not both"),
        ({"pipelines": 2, "cuts": (3,)}, "--cuts are of one pipeline"),
        ({"replicas": 2, "cuts": (3,)}, "--cuts are of one pipeline"),
        ({"pipelines": "x"}, "--pipelines must be auto, or a number from 1 to 64 .given: 'x'."),
    ],
)
def test_pipelines_that_do_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings(given, {}, Path("/nowhere"))
    assert load_settings({}, {"DWARFSTAR_PIPELINES": "3"}, Path("/nowhere")).pipelines == 3


def test_lent_memory_in_a_file_may_be_a_number(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    for said, meant in (("18", "18"), ("1.5", "1.5"), ('"50%"', "50%")):
        config.write_text(f"effective_vram = {said}\n")
        assert load_settings({}, {}, config).effective_vram == meant
