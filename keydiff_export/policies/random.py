"""Random eviction: the floor that a policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Policy, SlotView

# Multipliers of a Lehmer generator and a large prime, so that neighbours in position or head share nothing.
_POSITION, _HEAD, _RANGE = 48_271, 69_621, 2**24 - 3


@dataclass(frozen=True)
class Random(Policy):
    """Every token draws one lot a KV head from its position, so that runs and runtimes agree; the highest lots stay."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def score(self, view: SlotView) -> Tensor:
        """A pseudo-random whole number below 2^24, exact in float32: [H, S]."""
        head = torch.arange(view.positions.shape[0]).unsqueeze(1)
        lot = (view.positions + head * _HEAD + self.seed + 1) * _POSITION % _RANGE
        return (lot * _POSITION % _RANGE).to(torch.float32)
