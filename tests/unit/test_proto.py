"""The committed generated code is what the .proto files give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dwarfstar_engine

ROOT = Path(__file__).resolve().parent.parent.parent
GENERATED = Path(dwarfstar_engine.__file__).parent / "wire" / "generated"

# A process of its own: protoc and the generated modules register the same names in one pool.
SCRIPT = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import gen_proto
gen_proto.generate(pathlib.Path(sys.argv[2]))
"""


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "scripts"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fresh = tmp_path / "dwarfstar_engine" / "wire" / "generated"
    names = {path.name for path in fresh.iterdir()}
    assert {"control_pb2.py", "control_pb2.pyi", "control_pb2_grpc.py", "data_pb2.py"} <= names
    assert names == {path.name for path in GENERATED.iterdir() if path.suffix in (".py", ".pyi")}
    for name in sorted(names):
        assert (fresh / name).read_bytes() == (GENERATED / name).read_bytes(), f"{name}: run make proto"
