"""A described cluster is read as it is written, and what cannot be meant is refused with its key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.plan.capacity import usable_bytes
from dwarfstar_engine.plan.cluster import Kind, Link, Measured
from dwarfstar_engine.plan.topology import MAX_BYTES, read_topology
from support.clusters import GIB

NODE = '[[node]]\nname = "a"\ndevice = "gpu"\nmemory_gib = 8.0\n'


def refused(text: str | bytes) -> str:
    with pytest.raises(SettingsError) as no:
        read_topology(text if isinstance(text, bytes) else text.encode(), "file")
    assert no.value.message.startswith("file") or "effective VRAM" in no.value.message
    return no.value.message


def test_everything_that_can_be_said() -> None:
    found = read_topology(b"""
        [[node]]
        name = "tower"
        effective_vram = "-2"
        [[node.devices]]
        device = "gpu"
        memory_gib = 24
        bandwidth_gb_s = 936
        [[node.devices]]
        device = "gpu"
        memory_gib = 12
        usable_gib = 11.0
        [[node]]
        name = "mini"
        device = "cpu"
        memory_gib = 64.0
        cores = 16
        threads = 8
        [[node.measured]]
        layers = [0, 7]
        step_ms = 20.5
        batches = [[4, 60.0]]
        prompt = [[64, 200.0]]
        [capacity_layers]
        phone = 2
        [link]
        gbit_s = 2.5
        [[links]]
        between = ["tower", "mini"]
        gbit_s = 10
        latency_ms = 0.1
        [model]
        layers = 40
        weights_gib = 9.0
        head_gib = 1.0
        kv_gib = 2.0
        context = 8192
        compute_gib_per_node = 0.25
        legal_cuts = [4, 8]
        [expect.anything]
        at_all = true
    """)
    tower, mini, phone = found.cluster.nodes
    assert [device.kind for device in tower.devices] == [Kind.GPU, Kind.GPU]
    assert usable_bytes(tower) == int((24 + 11 - 2) * GIB)
    assert mini.measured == (Measured((0, 7), 20.5, False, ((4, 60.0),), ((64, 200.0),)),)
    assert (mini.machine, mini.cores, mini.threads, tower.cores) == ("mini", 16, 8, 0)
    assert phone.name == "phone" and found.cluster.link == Link(2.5, 0.3)
    assert found.cluster.between(mini, tower) == Link(10, 0.1)
    assert found.expect == {"anything": {"at_all": True}} and found.model is not None
    job = found.model.job()
    assert job.legal == (4, 8) and job.costs.head_bytes == GIB and job.need.reserve_bytes == GIB // 4
    assert job.costs.total == pytest.approx(9 * GIB, rel=1e-6)
    kv = job.need.cells * sum(job.costs.kv_bytes_per_token)
    assert kv == pytest.approx(2 * GIB, rel=0.01)
    half = found.model.job(4096)
    assert half.context == 4096 and half.need.cells * sum(half.costs.kv_bytes_per_token) == kv // 2


def test_capacities_in_layers_hold_so_many() -> None:
    found = read_topology(b"[capacity_layers]\nbig = 40\nsmall = 10\n[model]\nlayers = 50\nweights_gib = 10\n")
    sizes = {node.name: usable_bytes(node) // int(10 * GIB / 50) for node in found.cluster.nodes}
    assert sizes == {"big": 40, "small": 10}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no node"),
        ("node = 3", "node must be"),
        ("[[node]]\nname='a'\n", "node of 'a' needs device and memory_gib, or devices"),
        ("[[node]]\ndevice='gpu'\nmemory_gib=1\n", "node.name of node 1 is missing"),
        (NODE + "colour = 3", "node.colour of 'a' is no key of a topology"),
        (NODE.replace("8.0", "-8.0"), "node.memory_gib of 'a' must be greater than 0 (given: -8.0)"),
        (NODE.replace("8.0", "nan"), "node.memory_gib of 'a' must be a finite number"),
        (NODE.replace("8.0", "inf"), "node.memory_gib of 'a' must be"),
        (NODE.replace("gpu", "tpu"), "node.device of 'a' must be 'gpu' or 'cpu' (given: 'tpu')"),
        (NODE + "usable_gib = 9.0", "usable_gib (9) is more than memory_gib (8)"),
        (NODE + "effective_vram = 'lots'", "as in 18"),
        (NODE + "[[node.devices]]\ndevice='gpu'\nmemory_gib=1", "both devices and a device of its own"),
        (NODE + "[[node.measured]]\nlayers=[5, 5]\nstep_ms=1", "layers must be [first, end)"),
        (NODE.replace('"a"', '"\\u001b[31m"'), "node.name of '\\x1b[31m' must be printable"),
        (NODE + NODE, "two nodes are called 'a'"),
        (NODE + "[capacity_layers]\na = 3", "two nodes are called 'a'"),
        (NODE + "[link]\ngbit_s = 0", "link.gbit_s must be greater than 0"),
        (NODE + "[link]\nlatency_ms = -1", "link.latency_ms must be greater than or equal to 0"),
        (NODE + "[link]\nmbit_s = 100", "link.mbit_s is no key of a topology"),
        (NODE + "[[links]]\nbetween = ['a', 'b']", "links joins 'b', and no node is called that"),
        (NODE + "[[links]]\nbetween = ['a', 'a']", "links joins 'a' to itself"),
        (NODE + "[model]\nlayers = 0", "model.layers must be"),
        (NODE + "[model]\nweights_gib = 3.0", "model.layers is missing"),
        (NODE + "[model]\nlayers = 4\nweights_gib = 1.0\nhead_gib = 2.0", "model head_gib and active_gib are more"),
        (NODE + "[model]\nlayers = 4\nlegal_cuts = [2, 5]", "legal_cuts must rise and lie between 0 and 4"),
        ("nodes = ", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"#" * (MAX_BYTES + 1), "does not describe a cluster"),
    ],
)
def test_what_cannot_be_meant_names_its_key(text: str | bytes, words: str) -> None:
    assert words in refused(text)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_is_read_there_is_a_cluster_or_a_sentence(data: bytes) -> None:
    try:
        assert read_topology(data).cluster.nodes
    except SettingsError as error:
        assert error.message
