"""Key norm: keep the keys of small length (Devoto et al., arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Policy, SlotView


@dataclass(frozen=True)
class KNorm(Policy):
    """score_i = -|k_i|: a key of small length draws much attention, so it stays."""

    name: ClassVar[str] = "knorm"

    def slot_state(self, keys: Tensor) -> Tensor:
        """|k|, computed once when the token enters: [H, T, d] -> [H, T]."""
        return (keys * keys).sum(-1).sqrt()

    def score(self, view: SlotView) -> Tensor:
        """-|k_i|: [H, S]."""
        assert view.state is not None
        return -view.state
