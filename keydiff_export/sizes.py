"""How large a decoder is, from its config.json alone: no weights, no torch, no transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .errors import UserError


@dataclass(frozen=True)
class Family:
    """What a model type does that its config does not spell out.

    Attributes:
        mlp: matrices of the MLP, 3 when gated (SwiGLU, GeGLU), 2 when plain.
        norms: norms of the hidden size a layer.
        head_norms: norms of queries and keys: none, one a head dimension, or one over all heads.
        biased: linear layers that always have a bias.
        layer_norm: norms have a bias, too.
        defaults: fields that a config may leave out.
        exported: `export` serves it; the others are planned only.
    """

    mlp: int = 3
    norms: int = 2
    head_norms: Literal["none", "head", "all"] = "none"
    biased: tuple[str, ...] = ()
    layer_norm: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()
    exported: bool = True


_TIED = (("tie_word_embeddings", True),)
FAMILIES = {
    "gemma": Family(exported=False, defaults=(*_TIED, ("head_dim", 256))),
    "gemma2": Family(exported=False, norms=4, defaults=(*_TIED, ("head_dim", 256))),
    "gemma3_text": Family(exported=False, norms=4, head_norms="head", defaults=(*_TIED, ("head_dim", 256))),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "olmo2": Family(head_norms="all"),
    "phi": Family(exported=False, mlp=2, norms=1, biased=("qkv", "out", "mlp", "head"), layer_norm=True),
    "phi3": Family(),
    "qwen2": Family(biased=("qkv",)),
    "qwen3": Family(head_norms="head", defaults=(("head_dim", 128),)),
    "smollm3": Family(defaults=_TIED),
}


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a decoder.

    Attributes:
        kind: model_type.
        layers, hidden, vocabulary: L, D, V.
        query_heads, kv_heads, head_dim: heads of attention and their width d.
        matrices: numbers in the linear layers of all L layers.
        rows: output rows of those layers, one scale each when quantised a row.
        vectors: numbers in norms and biases, which stay float32.
        tied: the head is the embedding.
        trained_context: positions that RoPE was trained for.
        sliding: some layers attend to a window only, which an export refuses.
    """

    kind: str
    layers: int
    hidden: int
    vocabulary: int
    query_heads: int
    kv_heads: int
    head_dim: int
    matrices: int
    rows: int
    vectors: int
    tied: bool
    trained_context: int
    sliding: bool

    @property
    def table(self) -> int:
        """Numbers in the embedding, and in the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All numbers, a tied head counted once."""
        return self.matrices + self.vectors + self.table * (1 if self.tied else 2)


def model_sizes(config: dict[str, Any], source: str) -> ModelSizes:
    """Reads a config.json's content.

    Args:
        config: its fields.
        source: where it came from, for messages.

    Raises:
        UserError: unknown model_type, or a size that is missing or no whole number.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{source}: model_type {kind!r} is not known to plan: choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    fields = {**dict(family.defaults), **{key: value for key, value in config.items() if value is not None}}

    def whole(key: str, default: int | None = None) -> int:
        value = fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{source}: {key} must be a whole number of at least 1, got {value!r}")
        return value

    hidden, inner, layers = whole("hidden_size"), whole("intermediate_size"), whole("num_hidden_layers")
    query_heads, vocabulary = whole("num_attention_heads"), whole("vocab_size")
    kv_heads = whole("num_key_value_heads", query_heads)
    width = whole("head_dim", hidden // query_heads)
    queries, keys = query_heads * width, kv_heads * width
    biases = _biases(
        family, fields, {"qkv": queries + 2 * keys, "out": hidden, "mlp": (family.mlp - 1) * inner + hidden}
    )
    norms = hidden * family.norms * (2 if family.layer_norm else 1)
    norms += {"none": 0, "head": 2 * width, "all": queries + keys}[family.head_norms]
    last = hidden * (2 if family.layer_norm else 1) + (vocabulary if "head" in family.biased else 0)
    return ModelSizes(
        kind=kind,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=width,
        matrices=layers * hidden * (2 * queries + 2 * keys + family.mlp * inner),
        rows=layers * (queries + 2 * keys + hidden + (family.mlp - 1) * inner + hidden),
        vectors=layers * (biases + norms) + last,
        tied=bool(fields.get("tie_word_embeddings", False)),
        trained_context=whole("max_position_embeddings"),
        sliding=_has_windows(fields),
    )


def _biases(family: Family, fields: dict[str, Any], sizes: dict[str, int]) -> int:
    """Numbers in one layer's biases."""
    biased = set(family.biased)
    if fields.get("attention_bias"):
        biased |= {"qkv", "out"}
    if fields.get("mlp_bias"):
        biased.add("mlp")
    return sum(size for name, size in sizes.items() if name in biased)


def _has_windows(fields: dict[str, Any]) -> bool:
    """Whether some layers attend to a sliding window only."""
    kinds = set(fields.get("layer_types") or ())
    if kinds:
        return kinds != {"full_attention"}
    return bool(fields.get("sliding_window")) and fields.get("use_sliding_window", True)
