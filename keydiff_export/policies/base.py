"""What an eviction policy is: pure functions of the held tokens, one small file a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

# More queries than any block has: the policy observes them all.
EVERY_QUERY = 2**31


@dataclass(frozen=True)
class SlotView:
    """What a policy sees after a step's tokens were attended to, and before eviction.

    Shapes: H KV heads, S slots, d head dimension. Slots that hold no token carry finite, meaningless numbers;
    `valid` is 0 there and a policy must not let them influence the others.

    Attributes:
        keys: [H, S, d] float, keys after RoPE.
        positions: [H, S] int64, true position of each slot's token.
        valid: [S] float, 1 where the slot holds a token, else 0 (the same for all heads).
        newest: [1] int64, position of the newest token.
        head: [H] int64, number of each row's KV head in its layer. A graph scores all layers in one call: there may be
            more rows than a layer has heads.
        state: [H, S] float or None, the number a slot that `Policy.slot_state` and `Policy.update_state` keep.
        total: [H, d] float or None, what `Policy.key_sum` asked for.
        dots: [H, S] float or None, dot product of every key with `Policy.probe`.
        attention: [H, S] float or None, attention probabilities of the step's last `Policy.observed_queries` queries,
            summed over queries, averaged over the query heads of the KV head.
    """

    keys: Tensor
    positions: Tensor
    valid: Tensor
    newest: Tensor
    head: Tensor
    state: Tensor | None = None
    total: Tensor | None = None
    dots: Tensor | None = None
    attention: Tensor | None = None


@dataclass(frozen=True)
class KeySum:
    """A sum over keys, one vector a head.

    Attributes:
        by_state: every key counts times its slot's number.
        decay: 0 for the sum over the tokens held now; above 0 for a moving sum over the tokens read, which shrinks by
            this share a step and keeps what left the cache.
    """

    by_state: bool = False
    decay: float = 0.0


@dataclass(frozen=True)
class Policy(ABC):
    """Scores the held tokens of a layer; the budget's worth with the largest score stays, per KV head.

    Only `score` is obligatory. A policy asks for what it needs by overriding the other methods; what it does not ask
    for is neither computed nor stored in its graphs.

    Attributes:
        recent: share of the budget that always holds the most recent tokens, in [0, 1] (the paper's sliding window).
        pinned: the first `pinned` positions, a system prompt for one, never leave.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    recent: float = 0.0
    pinned: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.recent, bool) or not isinstance(self.recent, int | float) or not 0.0 <= self.recent <= 1.0:
            raise ValueError(f"recent must be between 0 and 1, got {self.recent!r}")
        require_whole("pinned", self.pinned, 0)

    def recent_tokens(self, budget: int) -> int:
        """Number of most recent tokens that never leave: floor(recent * N)."""
        # The tiny term undoes binary rounding, so that 0.7 * 10 keeps 7 tokens and not 6.
        return int(self.recent * budget + 1e-9)

    def check_budget(self, budget: int) -> None:
        """Refuses a budget that pinned and recent tokens overfill.

        Raises:
            ValueError: more than N tokens would never leave.
        """
        recent = self.recent_tokens(budget)
        if self.pinned + recent > budget:
            raise ValueError(f"{self.pinned} pinned and {recent} recent tokens do not fit a budget of {budget}")

    def needs(self) -> str:
        """What the policy's graphs carry and compute beside keys, values and positions, in words."""
        wanted, queries = self.key_sum(), self.observed_queries()
        parts = []
        if self.slot_state(torch.zeros(1, 1, 1)) is not None:
            parts.append("a number a slot")
        if wanted is not None:
            parts.append("a moving sum of keys" if wanted.decay else "the sum of the held keys")
        if queries:
            parts.append("attention of " + ("every query" if queries == EVERY_QUERY else f"the last {queries}"))
        return ", ".join(parts) or "nothing"

    def parameters(self) -> dict[str, Any]:
        """Name and every parameter, as the manifest and a graph card spell them."""
        return {"name": self.name, **asdict(self)}

    def slot_state(self, keys: Tensor) -> Tensor | None:
        """A number that each new token keeps beside its slot: [H, T, d] keys -> [H, T], or None."""
        return None

    def update_state(self, view: SlotView) -> Tensor | None:
        """The slots' numbers after this step's attention, [H, S], or None where they never change."""
        return None

    def key_sum(self) -> KeySum | None:
        """The sum of keys that `SlotView.total` shall hold, or None."""
        return None

    def probe(self, view: SlotView) -> Tensor | None:
        """A vector [H, d] whose dot product with every key `score` needs, or None.

        Asked layer by layer, and before attention: neither state nor attention are known yet.
        """
        return None

    def observed_queries(self) -> int:
        """Number of last queries of a step whose attention `score` needs, 0 for none."""
        return 0

    @abstractmethod
    def score(self, view: SlotView) -> Tensor:
        """[H, S] scores, larger stays. Slots with valid == 0 may get any finite number."""


def require_whole(name: str, value: object, least: int) -> None:
    """Refuses what is not a whole number of at least `least`.

    Raises:
        ValueError: with the name and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
