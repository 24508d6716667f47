"""The static graphs around a Hugging Face model: `prefill` (B tokens, the last block padded) and `decode` (one)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import forward_logits
from .policies import Policy
from .slots import CacheShape, LayerSlots, SlotCache, SlotOps


class StaticGraph:
    """A model, its cache's static sizes and its policy, stepped with a backend's slot operations.

    Args:
        model: a causal LM prepared for slot attention (`models.load_model`).
        shape: static sizes of the cache.
        policy: which tokens stay.
        ops: the backend's slot operations.
    """

    def __init__(self, model: nn.Module, shape: CacheShape, policy: Policy, ops: SlotOps) -> None:
        self.model, self.shape, self.policy, self.ops = model, shape, policy, ops

    def prefill(self, tokens: Tensor, start: Tensor, count: Tensor, layers: list[LayerSlots]) -> Tensor:
        """Reads `count` [1] of tokens [1, B] at position `start` [1] (all int64); updates `layers`; logits [1, V]."""
        cache = SlotCache(self.shape, self.policy, self.ops, layers, self.shape.block, start, count)
        return forward_logits(self.model, cache, tokens, start, count - 1)

    def decode(self, tokens: Tensor, start: Tensor, layers: list[LayerSlots]) -> Tensor:
        """Reads one token [1, 1] at position `start` [1] (int64); updates `layers`; logits [1, V]."""
        cache = SlotCache(self.shape, self.policy, self.ops, layers, 1, start, None)
        return forward_logits(self.model, cache, tokens, start, torch.zeros_like(start))
