"""SnapKV: keep what the last queries look at, and its neighbours (Li et al., arXiv 2404.14469; A.1 of 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Policy, SlotView, require_whole


@dataclass(frozen=True)
class SnapKV(Policy):
    """score_i = attention from the step's last `window` queries, average-pooled over neighbours in the text.

    The newest `window` tokens always stay, as far as the budget holds them. A step of fewer tokens than `window` (the
    end of a prompt, generation) is observed by the queries that it has.

    Attributes:
        window: number of last queries that observe, and of newest tokens that stay.
        kernel: width of the pooling, odd.
    """

    name: ClassVar[str] = "snapkv"
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("window", self.window, 1)
        require_whole("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    def recent_tokens(self, budget: int) -> int:
        """The window, or the `recent` share where that is more; never more than pinned tokens leave room for."""
        return max(super().recent_tokens(budget), min(self.window, budget - self.pinned))

    def observed_queries(self) -> int:
        """The observation window."""
        return self.window

    def score(self, view: SlotView) -> Tensor:
        """Column sums before the window, pooled over the held tokens in order of position: [H, S]."""
        assert view.attention is not None
        seen = torch.where(view.positions <= view.newest - self.window, view.attention, 0.0)
        order = torch.where(view.valid > 0, -view.positions, -(2**40)).topk(seen.shape[-1], dim=-1).indices
        line = torch.nn.functional.pad(seen.gather(1, order), (self.kernel // 2, self.kernel // 2))
        pooled = line[:, : seen.shape[-1]]
        for shift in range(1, self.kernel):
            pooled = pooled + line[:, shift : shift + seen.shape[-1]]
        return torch.zeros_like(seen).scatter(1, order, pooled / self.kernel)
