"""Builds the servers that ``dwarfstar bench`` compares with: llama-server and ggml-rpc-server.

They come from the llama.cpp that the installed llama-cpp-python carries, so both sides run the same kernels. The first
time takes about 3 minutes on 2 cores and 80 MB of download; after that it only looks. Run it with the project's Python:
``.venv/bin/python benchmarks/build_peers.py``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "peers"
PROGRAMS = ("llama-server", "ggml-rpc-server")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_RPC=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
)


def built(wanted: str) -> bool:
    """Whether the programs of this version are there."""
    stamp = CACHE / "version"
    return (
        all((CACHE / "bin" / name).is_file() for name in PROGRAMS)
        and stamp.is_file()
        and stamp.read_text("utf-8").strip() == wanted
    )


def source(wanted: str) -> Path:
    """llama.cpp's source, from the source distribution of llama-cpp-python."""
    folder = CACHE / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    pip += ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={wanted}"]
    subprocess.run(pip, check=True)
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def build(wanted: str) -> None:
    (CACHE / "version").unlink(missing_ok=True)
    # llama.cpp puts programs and libraries into bin/ of the build folder, so that folder is the cache itself.
    (CACHE / "CMakeCache.txt").unlink(missing_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(source(wanted)), "-B", str(CACHE), *generator, *OPTIONS]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", str(CACHE), "--parallel", jobs, "--target", *PROGRAMS], check=True)  # noqa: S607
    (CACHE / "version").write_text(wanted + "\n", "utf-8")


def main() -> None:
    wanted = version("llama-cpp-python")
    if built(wanted):
        print(f"The peers are built: {CACHE / 'bin'} (llama.cpp of llama-cpp-python {wanted}).")
        return
    if shutil.which("cmake") is None:
        raise SystemExit("The peers need CMake: install it, then run this again.")
    print(f"Building {' and '.join(PROGRAMS)} of llama-cpp-python {wanted}: about 3 minutes on 2 cores.", flush=True)
    try:
        build(wanted)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"The peers were not built: {error.cmd[0]} ended with {error.returncode}, see above."
        ) from None
    print(f"The peers are in {CACHE / 'bin'}.")


if __name__ == "__main__":
    main()
