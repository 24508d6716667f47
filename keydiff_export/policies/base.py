"""What an eviction policy is: pure functions of the held slots, one small file a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class SlotView:
    """What a policy sees of one layer after attention and before eviction.

    Shapes: H KV heads, S slots, d head dimension. Slots that hold no token carry finite, meaningless numbers;
    `valid` is 0 there and a policy must not let them influence the others.

    Attributes:
        keys: [H, S, d] float, keys after RoPE.
        positions: [H, S] int64, true position of each slot's token.
        valid: [S] float, 1 where the slot holds a token, else 0 (the same for all heads).
        state: [H, S] float or None, what `Policy.slot_state` returned when the token entered.
        anchor_dot: [H, S] float or None, dot product of every key with `Policy.anchor`.
    """

    keys: Tensor
    positions: Tensor
    valid: Tensor
    state: Tensor | None = None
    anchor_dot: Tensor | None = None


@dataclass(frozen=True)
class Policy(ABC):
    """Scores the held tokens of a layer; the budget's worth with the largest score stays, per KV head.

    Attributes:
        recent: share of the budget that always holds the most recent tokens, in [0, 1] (the paper's sliding window).
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    recent: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.recent <= 1.0:
            raise ValueError(f"recent must be between 0 and 1, got {self.recent}")

    def recent_tokens(self, budget: int) -> int:
        """Number of most recent tokens that never leave: floor(recent * N)."""
        # The tiny term undoes binary rounding, so that 0.7 * 10 keeps 7 tokens and not 6.
        return int(self.recent * budget + 1e-9)

    def parameters(self) -> dict[str, Any]:
        """Name and every parameter, as the manifest and a graph card spell them."""
        return {"name": self.name, **asdict(self)}

    def slot_state(self, keys: Tensor) -> Tensor | None:
        """A number that each new token keeps beside its slot: [H, T, d] keys -> [H, T], or None."""
        return None

    def anchor(self, view: SlotView) -> Tensor | None:
        """A vector [H, d] whose dot product with every key `score` needs, or None."""
        return None

    @abstractmethod
    def score(self, view: SlotView) -> Tensor:
        """[H, S] scores, larger stays. Slots with valid == 0 may get any finite number."""
