"""Builds the library and its C++ test program with AddressSanitizer and UBSan, and runs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
COMPILERS = ("c++", "g++", "clang++")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.timeout(300)  # a compiler on a busy machine
def test_native_code_is_clean_under_sanitizers(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None or not any(map(shutil.which, COMPILERS)):
        pytest.skip("needs CMake and a C++ compiler")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run(
        cmake, "-S", str(NATIVE), "-B", str(tmp_path), *generator, "-DDWARFSTAR_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"
    )
    _run(cmake, "--build", str(tmp_path), "--parallel", "2")
    ctest = shutil.which("ctest", path=str(Path(cmake).parent)) or "ctest"
    _run(ctest, "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error")
