"""H2O: keep the heavy hitters of all attention paid so far (Zhang et al., arXiv 2306.14048; A.1 of 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import EVERY_QUERY, Policy, SlotView


@dataclass(frozen=True)
class H2O(Policy):
    """score_i = sum of the attention that token i got from every query since it entered (column sums)."""

    name: ClassVar[str] = "h2o"

    def slot_state(self, keys: Tensor) -> Tensor:
        """A new token starts at nothing: [H, T, d] -> [H, T]."""
        return torch.zeros_like(keys[..., 0])

    def observed_queries(self) -> int:
        """All of the step."""
        return EVERY_QUERY

    def update_state(self, view: SlotView) -> Tensor:
        """Adds this step's column sums: [H, S]. The sums move with their slots."""
        assert view.state is not None
        assert view.attention is not None
        return view.state + view.attention

    def score(self, view: SlotView) -> Tensor:
        """The accumulated sums: [H, S]."""
        assert view.state is not None
        return view.state
