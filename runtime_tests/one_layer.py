"""One attention layer fed with tensors, no model around it: the reference and the static slot cache side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keydiff_export.policies import Policy
from keydiff_export.reference import Reference
from keydiff_export.shape import CacheShape
from keydiff_export.slot_ops import TorchOps
from keydiff_export.slots import SlotCache, new_slots


@dataclass
class Rows:
    """Queries [H * R, L, d], keys and values [H, L, d] of L tokens."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    def part(self, begin: int, end: int) -> Rows:
        """Tokens begin .. end - 1."""
        return Rows(self.queries[:, begin:end], self.keys[:, begin:end], self.values[:, begin:end])


def random_rows(length: int, heads: int = 2, groups: int = 2, width: int = 4, seed: int = 0) -> Rows:
    """Keys share a direction, as a model's do, and differ in length."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, length, width, generator=generator) + 1.5
    queries = torch.randn(heads * groups, length, width, generator=generator)
    return Rows(queries, keys, torch.randn(heads, length, width, generator=generator))


class EagerLayer:
    """The reference over one layer."""

    def __init__(
        self, policy: Policy, budget: int, block: int, cache_dtype: str = "float32", evict_every: int = 1
    ) -> None:
        self.reference = Reference(torch.nn.Identity(), policy, budget, block, cache_dtype, evict_every)

    def step(self, rows: Rows) -> Tensor:
        """Attention output [H * R, T, d]."""
        output = self.reference.attend(0, rows.queries, rows.keys, rows.values, 0.5)
        self.reference.seen += rows.keys.shape[1]
        return output

    def held(self) -> list[list[int]]:
        """Positions held, a list a head, in the order of the cache."""
        return self.reference.layers[0].positions.tolist()


class StaticLayer:
    """The static slot cache over one layer."""

    def __init__(
        self,
        policy: Policy,
        budget: int,
        block: int,
        heads: int = 2,
        width: int = 4,
        cache_dtype: str = "float32",
        evict_every: int = 1,
    ) -> None:
        self.shape = CacheShape(1, heads, width, budget, block, cache_dtype, evict_every)
        self.policy, self.seen, self.staged = policy, 0, 0
        self.slots = new_slots(self.shape, policy, TorchOps())

    def step(self, rows: Rows, padding: Rows | None = None) -> Tensor:
        """Attention output [H * R, T, d]; `padding` fills a block behind fewer tokens than B."""
        length = rows.keys.shape[1]
        start = torch.tensor([self.seen])
        self.seen += length
        if length == 1 and self.shape.evict_every > 1:
            return self._lazy(rows, start)
        if length == 1:
            return self._run(SlotCache(self.shape, self.policy, TorchOps(), self.slots, 1, start, None), rows)
        missing = self.shape.block - length
        parts = []
        for name in ("queries", "keys", "values"):
            own = getattr(rows, name)
            rest = torch.zeros_like(own[:, :1]).expand(-1, missing, -1)
            parts.append(torch.cat([own, rest if padding is None else getattr(padding, name)[:, :missing]], 1))
        cache = SlotCache(
            self.shape, self.policy, TorchOps(), self.slots, self.shape.block, start, torch.tensor([length])
        )
        return self._run(cache, Rows(*parts))[:, :length]

    def _run(self, cache: SlotCache, rows: Rows) -> Tensor:
        output = cache.attend(0, rows.queries, rows.keys, rows.values, 0.5)
        cache.finish()
        return output

    def _lazy(self, rows: Rows, start: Tensor) -> Tensor:
        staged, full = self.staged, self.seen > self.shape.budget
        self.staged = (staged + 1) % self.shape.evict_every if full else 0
        evicts = full and self.staged == 0
        count, piled = torch.tensor([1]) if evicts else None, torch.tensor([staged])
        cache = SlotCache(self.shape, self.policy, TorchOps(), self.slots, 1, start, count, piled, evicts)
        return self._run(cache, rows)

    def occupied(self) -> Tensor:
        """[H, S] bool: the slots whose token is still held."""
        budget, slots = self.shape.budget, self.shape.slots
        slot = torch.arange(slots).expand(self.shape.kv_heads, slots)
        return slot < min(self.seen, budget + self.staged)

    def held(self) -> list[list[int]]:
        """Positions held, a list a head, in slot order."""
        rows = zip(self.slots.positions, self.occupied(), strict=True)
        return [positions[mask].int().tolist() for positions, mask in rows]

    def litter(self, seed: int) -> None:
        """Overwrites every slot whose token is gone with other numbers."""
        generator = torch.Generator().manual_seed(seed)
        gone = ~self.occupied()
        slots = self.slots

        def littered(tensor: Tensor) -> Tensor:
            junk = torch.randn(tensor.shape, generator=generator) * 50
            return torch.where(gone.reshape(*gone.shape, *[1] * (tensor.dim() - 2)), junk, tensor)

        for part in (slots.keys, slots.values):
            part[0] = littered(part[0])
        slots.state = None if slots.state is None else littered(slots.state)
        slots.positions = torch.where(gone, 10**6 + seed, slots.positions)
