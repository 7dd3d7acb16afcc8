"""What a model's layers, head and embedding take in memory, exactly, from its directory alone.

Weights are counted as a stage process holds them (:mod:`dwarfstar_engine.model.slice`): ``stage_bytes`` of a slice
equals its ``weights_bytes``. KV bytes are those llama.cpp allocates for one cell of the cache in each layer.
Sliding-window layers get fewer cells than the context has tokens, so for them the figure is an upper bound.

Of a mixture of experts all weights are resident, and a token reads those of the experts it is routed to: *active*.
"""

from __future__ import annotations

from dataclasses import dataclass

from dwarfstar_engine.errors import ModelError
from dwarfstar_engine.model.gguf import GgufModel
from dwarfstar_engine.model.slice import OUTPUT, TOKEN_EMBD, shared_parts

KV_BLOCK = 32  # elements that quantised types pack together
KV_BLOCK_BYTES = {"f16": 64, "q8_0": 34, "q4_0": 18}  # of K and of V; f16 is llama.cpp's default
EXPERTS = "exps"  # how names of tensors end that hold all routed experts (ffn_up_exps); shared ones end in "shexp"
MAX_HEAD_WIDTH = 1 << 20  # elements of K or V in one layer and token; real models stay below 2^16


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Bytes, from a model's directory.

    layer_bytes: weights of each layer.
    head_bytes: what the last stage holds more than any other: head, or tied embedding, or head and placeholder.
    embedding_bytes: rows the first stage maps; only those used become resident, and they are no part of the stages.
    kv_bytes_per_token: of each layer, for one cell of the cache.
    shared_bytes: what every stage holds besides its layers: final norm, RoPE factors, placeholders.
    active_bytes: of each layer, what one token reads; empty where that is all of it.
    vocabulary: tokens; 0: not known.
    """

    layer_bytes: tuple[int, ...]
    head_bytes: int
    embedding_bytes: int
    kv_bytes_per_token: tuple[int, ...]
    n_embd: int
    shared_bytes: int = 0
    active_bytes: tuple[int, ...] = ()
    vocabulary: int = 0

    @property
    def read_bytes(self) -> tuple[int, ...]:
        """Of each layer, the weights that one token reads."""
        return self.active_bytes or self.layer_bytes

    @property
    def total(self) -> int:
        """Weights of a single stage that holds the whole model."""
        return stage_bytes(self, 0, len(self.layer_bytes), last=True)


def stage_bytes(costs: ModelCosts, a: int, b: int, last: bool) -> int:
    """Weights of a stage that holds layers a … b-1."""
    return sum(costs.layer_bytes[a:b]) + costs.shared_bytes + (costs.head_bytes if last else 0)


def model_costs(model: GgufModel, kv_type: str = "f16") -> ModelCosts:
    """The costs of a model with a cache of KV_BLOCK_BYTES' types.

    Raises ModelFileError if the directory lacks what they follow from, ModelError if there can be no such cache.
    """
    shared = sum(part.nbytes for part in shared_parts(model, last=False))
    embedding = model.tensors.get(TOKEN_EMBD) or model.tensors.get(OUTPUT)
    return ModelCosts(
        layer_bytes=tuple(sum(t.nbytes for _, t in tensors) for tensors in model.layers),
        head_bytes=sum(part.nbytes for part in shared_parts(model, last=True)) - shared,
        embedding_bytes=embedding.nbytes if embedding else 0,
        kv_bytes_per_token=_kv_bytes(model, kv_type),
        n_embd=model.n_embd,
        shared_bytes=shared,
        active_bytes=_active_bytes(model),
        vocabulary=embedding.shape[-1] if embedding else 0,
    )


def _active_bytes(model: GgufModel) -> tuple[int, ...]:
    """Weights of each layer that a token reads; empty for a model without experts. Shared experts are always read."""
    count, used = (model.metadata.get(model.key(name)) for name in ("expert_count", "expert_used_count"))
    if not (isinstance(count, int) and isinstance(used, int) and 0 < used < count):
        return ()
    return tuple(
        sum(t.nbytes * used // count if rest.split(".", 1)[0].endswith(EXPERTS) else t.nbytes for rest, t in tensors)
        for tensors in model.layers
    )


def _kv_bytes(model: GgufModel, kv_type: str) -> tuple[int, ...]:
    """K and V of one token in each layer: heads times head width, as in llama.cpp's llama_kv_cache.

    A layer without KV heads is recurrent or has no attention: it has no cells. With multi-head latent attention
    (DeepSeek's ``key_length_mla``) only the compressed K is kept, and V is a part of it.
    """
    heads = model.get_per_layer(model.key("attention.head_count"), 0)
    kv_heads = heads
    if model.key("attention.head_count_kv") in model.entries:
        kv_heads = model.get_per_layer(model.key("attention.head_count_kv"))
    if not any(heads):
        return (0,) * model.n_layers
    default = model.n_embd // heads[0] if heads[0] > 0 else 0
    key, value = _head_width(model, "key_length", default), _head_width(model, "value_length", default)
    if kv_type != "f16" and (key % KV_BLOCK or value % KV_BLOCK):
        raise ModelError(
            f"a {kv_type} KV cache needs heads whose width is a multiple of {KV_BLOCK}, and this model's are {key} and "
            f"{value} wide: serve it with --kv f16"
        )
    latent = model.get_int(model.key("attention.key_length_mla"), 0) > 0
    width = key if latent else key + value
    for n in kv_heads:
        if not 0 <= n * width <= MAX_HEAD_WIDTH:
            raise model.problem(model.key("attention.head_count_kv"), f"gives a layer a KV width of {n * width}")
    return tuple(n * width * KV_BLOCK_BYTES[kv_type] // KV_BLOCK for n in kv_heads)


def _head_width(model: GgufModel, name: str, default: int) -> int:
    """Elements of one head. Some models have another width in sliding-window layers: the larger is taken."""
    full = model.get_int(model.key(f"attention.{name}"), default)
    return max(full, model.get_int(model.key(f"attention.{name}_swa"), full))
