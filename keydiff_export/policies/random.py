"""Random eviction: the floor that a policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Policy, SlotView

# A prime below 2^24, so that lots are exact in float32, and multipliers that spread neighbours over its range.
_PRIME, _POSITION, _HEAD, _SEED = 2**24 - 3, 48_271, 7_368_787, 12_345_701


@dataclass(frozen=True)
class Random(Policy):
    """Every token draws one lot a KV head from its position, so that runs and runtimes agree; the highest lots stay."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def score(self, view: SlotView) -> Tensor:
        """A pseudo-random whole number below 2^24, exact in float32: [H, S]."""
        place = (view.positions * _POSITION + view.head.unsqueeze(1) * _HEAD + self.seed * _SEED) % _PRIME
        # Cubed, because a linear map would give every head the same lots, shifted.
        return (place * place % _PRIME * place % _PRIME).to(torch.float32)
