"""The static graphs around a Hugging Face model: `prefill` (B tokens, the last block padded) and `decode` (one).

`fill` is `decode` without the operators of eviction, for an answer that ends before the cache is full. Where generated
tokens leave k at a time, `append` and `decode_evicting` take the place of both. For runners that know one method only
there is `forward`: 1 to B tokens, none of them padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import forward_logits
from .policies import Policy
from .shape import CacheShape
from .slot_ops import SlotOps
from .slots import SlotCache, Slots


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

    def prefill(self, tokens: Tensor, start: Tensor, count: Tensor, slots: Slots) -> Tensor:
        """Reads `count` [1] of tokens [1, B] at position `start` [1] (all int64); updates `slots`; logits [1, V]."""
        cache = SlotCache(self.shape, self.policy, self.ops, slots, self.shape.block, start, count)
        return self._step(cache, tokens, start, count - 1)

    def decode(self, tokens: Tensor, start: Tensor, slots: Slots) -> Tensor:
        """Reads one token [1, 1] at position `start` [1] (int64); updates `slots`; logits [1, V]."""
        cache = SlotCache(self.shape, self.policy, self.ops, slots, 1, start, None)
        return self._step(cache, tokens, start)

    def fill(self, tokens: Tensor, start: Tensor, slots: Slots) -> Tensor:
        """Reads one token as `decode` does where fewer than N were read before it, and so none leaves."""
        cache = SlotCache(self.shape, self.policy, self.ops, slots, 1, start, None, evicts=False)
        return self._step(cache, tokens, start)

    def append(self, tokens: Tensor, start: Tensor, staged: Tensor, slots: Slots) -> Tensor:
        """Reads one token behind `staged` [1] others that no eviction has seen yet, and evicts nothing."""
        cache = SlotCache(self.shape, self.policy, self.ops, slots, 1, start, None, staged, evicts=False)
        return self._step(cache, tokens, start)

    def decode_evicting(self, tokens: Tensor, start: Tensor, staged: Tensor, slots: Slots) -> Tensor:
        """Reads one token behind `staged` [1] others and evicts down to N: `evict_every` tokens at once."""
        one = torch.ones_like(start)
        cache = SlotCache(self.shape, self.policy, self.ops, slots, 1, start, one, staged)
        return self._step(cache, tokens, start)

    def _step(self, cache: SlotCache, tokens: Tensor, start: Tensor, last: Tensor | None = None) -> Tensor:
        logits = forward_logits(self.model, cache, tokens, start, last)
        cache.finish()
        return logits

    def forward(self, tokens: Tensor, start: Tensor, slots: Slots) -> Tensor:
        """Reads all of tokens [1, T], 1 <= T <= B, at position `start` [1] (int64); updates `slots`; logits [1, V].

        T may be a size that only run time knows; a step reads and leaves the state as `prefill` does.
        """
        length = tokens.shape[1]
        count = torch.arange(length)[-1:] + 1
        cache = SlotCache(self.shape, self.policy, self.ops, slots, length, start, count)
        return self._step(cache, tokens, start)

    def methods(self, fill: bool = False) -> dict[str, dict[str, Tensor]]:
        """Example inputs by name of every method that a lowering makes, `fill` among them if wanted."""
        block, one = torch.zeros(1, self.shape.block, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        single = {"tokens": block[:, :1], "start": one}
        methods = {"prefill": {"tokens": block, "start": one, "count": one + 1}}
        if self.shape.evict_every == 1:
            return {**methods, "decode": single, **({"fill": single} if fill and self.policy.evicts else {})}
        # A tensor of its own: export takes two inputs that are one object for one input.
        lazy = {**single, "staged": one.clone()}
        return {**methods, "append": lazy, "decode_evicting": lazy}
