"""TOVA: keep what the newest token attends to (Oren et al., arXiv 2401.06104; A.1 of arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Policy, SlotView


@dataclass(frozen=True)
class Tova(Policy):
    """score_i = attention that the step's last query pays to token i, averaged over the KV head's query heads."""

    name: ClassVar[str] = "tova"

    def observed_queries(self) -> int:
        """The last one."""
        return 1

    def score(self, view: SlotView) -> Tensor:
        """The last row of the attention matrix: [H, S]."""
        assert view.attention is not None
        return view.attention
