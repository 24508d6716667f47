"""Static sizes of a slot cache. No torch here: `run` with ONNX Runtime does without it."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of a number of each type that keys and values can be stored as.
CACHE_DTYPES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class CacheShape:
    """Static sizes of a cache: `layers`, `kv_heads`, `head_dim`, `budget` (N) and `block` (B).

    `dtype` is what keys and values are stored as, a name of CACHE_DTYPES; int8 rows have a float32 scale each.
    `evict_every` is k, the generated tokens that the spare slots take before k tokens leave at once, at most B.
    """

    layers: int
    kv_heads: int
    head_dim: int
    budget: int
    block: int
    dtype: str = "float32"
    evict_every: int = 1

    @property
    def slots(self) -> int:
        """N + B."""
        return self.budget + self.block

    @property
    def bytes(self) -> int:
        """Keys and values of all layers, with their scales."""
        row = self.head_dim * CACHE_DTYPES[self.dtype] + (4 if self.dtype == "int8" else 0)
        return 2 * self.layers * self.kv_heads * self.slots * row
