"""KeyDiff: keep the keys that point away from the mean key (arXiv 2504.15364, Eq. 5-8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Policy, SlotView


@dataclass(frozen=True)
class KeyDiff(Policy):
    """score_i = -cos(k_i, mean_j k_j), the mean taken over the raw keys of all held tokens of the head."""

    name: ClassVar[str] = "keydiff"

    def slot_state(self, keys: Tensor) -> Tensor:
        """1 / |k|, computed once when the token enters: [H, T, d] -> [H, T]."""
        return (keys * keys).sum(-1).clamp_min(1e-24).rsqrt()

    def anchor(self, view: SlotView) -> Tensor:
        """Unit vector along the mean key, [H, d]. A sum has the mean's direction, so nothing is divided by a count."""
        weights = view.valid.expand(view.keys.shape[0], 1, -1)
        total = torch.bmm(weights, view.keys).squeeze(1)
        return total * (total * total).sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()

    def score(self, view: SlotView) -> Tensor:
        """-cos(k_i, anchor): [H, S]."""
        assert view.anchor_dot is not None
        assert view.state is not None
        return -(view.anchor_dot * view.state)
