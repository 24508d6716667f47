"""Full cache: nothing is evicted, so a prompt must fit the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Policy, SlotView


@dataclass(frozen=True)
class Full(Policy):
    """No eviction: the baseline that a budgeted cache is compared with. Refuses more tokens than the budget."""

    name: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False

    def score(self, view: SlotView) -> Tensor:
        """Never consulted; zeros, so that the type is honoured: [H, S]."""
        return torch.zeros_like(view.keys[..., 0])
