"""The bridge into Hugging Face models: one registered attention function, model classes unmodified."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_NAME = "keydiff_slots"


class AttentionCache(Protocol):
    """What stands behind the hook: the static slot cache, or the reference's growing one."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [Hq, T, d], key and value [H, T, d] after RoPE -> [Hq, T, d]; updates the cache."""


def _slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_cache: AttentionCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hugging Face attention interface: query [1, Hq, T, d], key and value [1, H, T, d] -> ([1, T, Hq, d], None)."""
    if slot_cache is None:
        raise RuntimeError("this model was prepared for slot caches: call it through a runner")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = slot_cache.attend(int(module.layer_idx), query[0], key[0], value[0], scale)
    return output.transpose(0, 1).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _slot_attention)


def forward_logits(
    model: torch.nn.Module, cache: AttentionCache, tokens: Tensor, start: Tensor, last: Tensor | None = None
) -> Tensor:
    """Runs a prepared model over T tokens at true positions and returns one row of logits.

    Args:
        model: a causal LM whose attention implementation is ATTENTION_NAME.
        cache: receives every layer's queries, keys and values.
        tokens: [1, T] int64.
        start: [1] int64, position of the first token.
        last: [1] int64, index in the block of the token whose logits are wanted; the block's last without it.

    Returns:
        [1, V] float32.
    """
    positions = (start + torch.arange(tokens.shape[1])).unsqueeze(0)
    kept = 1 if last is None else last
    output = model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=kept, slot_cache=cache)
    return output.logits[:, 0]
