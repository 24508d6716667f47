"""KeyDiff: keep the keys that point away from an anchor, the mean key (arXiv 2504.15364, Eq. 4-8; variants F.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import KeySum, Policy, SlotView

ANCHORS = ("mean", "normalized", "median", "pairwise", "ema")
METRICS = ("cosine", "dot", "euclidean")
# Squared length below that of any key that a model makes; its inverse root is finite in float32.
_SHORTEST = 1e-24


@dataclass(frozen=True)
class KeyDiff(Policy):
    """score_i = -cos(k_i, mean_j k_j), the mean taken over the raw keys of all held tokens of the head.

    Attributes:
        anchor: mean (the paper's default), normalized (mean of the keys at unit length), median (by coordinate, the
            lower of two), pairwise (average similarity to all held keys), or ema (a moving sum in which evicted keys
            live on: a <- (1 - ema_alpha) a + sum of the step's keys).
        metric: cosine, dot, or euclidean (squared distance: far keys stay).
        ema_alpha: share that the moving sum forgets a step.
    """

    name: ClassVar[str] = "keydiff"
    anchor: str = "mean"
    metric: str = "cosine"
    ema_alpha: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor not in ANCHORS:
            raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {self.anchor!r}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if not 0.0 < self.ema_alpha < 1.0:
            raise ValueError(f"ema_alpha must be above 0 and below 1, got {self.ema_alpha}")
        if self.anchor == "ema" and self.metric == "euclidean":
            raise ValueError("anchor ema is a direction without a length: choose metric cosine or dot")

    @property
    def _sums_unit_keys(self) -> bool:
        return self.anchor == "normalized" or (self.anchor == "pairwise" and self.metric == "cosine")

    def slot_state(self, keys: Tensor) -> Tensor | None:
        """1 / |k|, computed once when the token enters: [H, T, d] -> [H, T]. A raw dot product needs none."""
        if self.metric == "dot" and not self._sums_unit_keys:
            return None
        return (keys * keys).sum(-1).clamp_min(_SHORTEST).rsqrt()

    def key_sum(self) -> KeySum | None:
        """The sum that the anchor is made of: raw keys, keys at unit length, or a moving sum."""
        if self.anchor == "median":
            return None
        return KeySum(by_state=self._sums_unit_keys, decay=self.ema_alpha if self.anchor == "ema" else 0.0)

    def probe(self, view: SlotView) -> Tensor:
        """The anchor, [H, d]; at unit length for the cosine, so that a product with k / |k| is one.

        The average of all pairwise similarities is the similarity to an average, because a dot product is linear in
        each factor: mean_j cos(k_i, k_j) = (k_i / |k_i|) . mean_j (k_j / |k_j|). So `pairwise` costs no S x S matrix.
        """
        if self.anchor == "median":
            anchor = _median(view)
        else:
            assert view.total is not None
            anchor = view.total
        if self.metric == "cosine" and self.anchor != "pairwise":
            return anchor * (anchor * anchor).sum(-1, keepdim=True).clamp_min(_SHORTEST).rsqrt()
        return anchor if self.anchor in ("median", "ema") else anchor / view.valid.sum()

    def score(self, view: SlotView) -> Tensor:
        """Minus the similarity to the anchor, [H, S]; for euclidean the squared distance less |anchor|^2."""
        assert view.dots is not None
        if self.metric == "dot":
            return -view.dots
        assert view.state is not None
        if self.metric == "cosine":
            return -(view.dots * view.state)
        return (view.state * view.state).clamp_min(_SHORTEST).reciprocal() - 2 * view.dots


def _median(view: SlotView) -> Tensor:
    """[H, d] lower median by coordinate over the slots that hold a token."""
    held = torch.where(view.valid > 0, view.keys.transpose(1, 2), -float("inf"))
    descending = held.topk(held.shape[-1] // 2 + 1, dim=-1).values
    middle = (view.valid.sum() / 2).floor().to(torch.int64).reshape(1)
    return descending.index_select(-1, middle).squeeze(-1)
