"""A model in another quantisation, and one of the layers of two files, which is what a mixed ring computes.

``python -m support.quantised FROM TO TYPE`` quantises in a process of its own: a GGML assert must not end the tests.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

from dwarfstar_engine.model.gguf import LAYER_TENSOR, GgufModel, read_model
from dwarfstar_engine.model.gguf_reader import TensorInfo
from dwarfstar_engine.stage import llamacpp
from dwarfstar_engine.stage.llamacpp import llama
from support import gguf_bytes as g
from support.real_models import pairs_of

DEADLINE_S = 110.0
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def quantised(path: Path, target: Path, file_type: int) -> Path:
    """``path`` again, in a type of llama.cpp's ``llama_ftype``. Returns ``target``."""
    arguments = [sys.executable, "-m", "support.quantised", str(path), str(target), str(file_type)]
    folder = Path(__file__).parents[1]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def spliced(first: Path, second: Path, cut: int, target: Path) -> Path:
    """The embedding and the layers before ``cut`` of one file, the others and the head of another. Returns ``target``.

    llama.cpp takes a head that is a tensor of its own, as well as one that is the embedding.
    """
    a, b = read_model(first), read_model(second)
    tensors = []
    for name in a.tensors:
        match = LAYER_TENSOR.match(name)
        if name != HEAD:
            own = int(match["layer"]) < cut if match else name == EMBEDDING
            tensors.append(_tensor(name, (a if own else b).tensors[name]))
    tensors.append(_tensor(HEAD, _head(b)))
    return g.write(target, pairs_of(a), tensors)


def _head(model: GgufModel) -> TensorInfo:
    return model.tensors.get(HEAD) or model.tensors[EMBEDDING]


def _tensor(name: str, tensor: TensorInfo) -> g.Tensor:
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset)
        return g.Tensor(name, tensor.shape, tensor.type, file.read(tensor.nbytes))


def main(path: str, target: str, file_type: str) -> None:
    llamacpp.init()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = int(file_type), True, 1
    code = llama.llama_model_quantize(path.encode(), target.encode(), ctypes.byref(params))
    assert code == 0, llamacpp.log_tail()


if __name__ == "__main__":
    main(*sys.argv[1:])
