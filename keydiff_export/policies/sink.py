"""Attention sinks: keep the first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Policy, SlotView, require_whole

# Above every position, and exact in float32.
_ALWAYS = float(2**30)


@dataclass(frozen=True)
class Sink(Policy):
    """The first `sinks` tokens stay, then the newest; positions are never renumbered."""

    name: ClassVar[str] = "sink"
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("sinks", self.sinks, 0)

    def score(self, view: SlotView) -> Tensor:
        """The position itself, and more than any position for a sink: [H, S]."""
        newest = view.positions.to(torch.float32)
        return torch.where(view.positions < self.sinks, _ALWAYS, newest)
