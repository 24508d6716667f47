"""One interface over all runtimes: read a block, read a token, look at the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass
class Snapshot:
    """State of the whole cache after a step, copied out.

    Attributes:
        held: positions held, as sets: [layer][KV head].
        keys, values: [L, H, N + 1, d] float32 by slot.
        slots: slot of each held position: [layer][KV head][position].
    """

    held: list[list[set[int]]]
    keys: NDArray[np.float32]
    values: NDArray[np.float32]
    slots: list[list[dict[int, int]]]


class Runner(ABC):
    """An artifact, loaded and ready to step.

    Attributes:
        budget, block: N and B.
        seen: tokens read since the last reset.
    """

    def __init__(self, budget: int, block: int) -> None:
        self.budget, self.block = budget, block
        self.seen = 0

    def reset(self) -> None:
        """Forgets everything read so far. Slots are not cleared: what is held follows from the position."""
        self.seen = 0

    def step(self, tokens: list[int]) -> Logits:
        """Reads 1 <= T <= B tokens and returns the logits [V] after the last; one token goes through `decode`."""
        if not 1 <= len(tokens) <= self.block:
            raise ValueError(f"a step takes 1 to {self.block} tokens, got {len(tokens)}")
        logits = self._decode(tokens[0]) if len(tokens) == 1 else self._prefill(tokens)
        self.seen += len(tokens)
        return logits

    @property
    def held(self) -> int:
        """Tokens held a layer and KV head."""
        return min(self.seen, self.budget)

    @abstractmethod
    def _prefill(self, tokens: list[int]) -> Logits: ...

    @abstractmethod
    def _decode(self, token: int) -> Logits: ...

    def end_profile(self) -> None:
        """Writes the runtime's own record of all steps into the folder `profile` that the runner was opened with."""
        raise NotImplementedError(f"{type(self).__name__} does not profile")

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """Copies the cache out, for parity checks."""


def padded(tokens: list[int], block: int) -> NDArray[np.int64]:
    """[1, B] int64: the tokens, then zeros that the graph ignores."""
    row = np.zeros((1, block), dtype=np.int64)
    row[0, : len(tokens)] = tokens
    return row


def make_snapshot(layers: list[dict[str, NDArray[np.generic]]], seen: int, budget: int) -> Snapshot:
    """Builds a snapshot from per-layer arrays: positions [H, S], pending [H], keys and values [H, S, d].

    Until the budget is full the slots in use are those of the tokens seen; after that every slot up to N, less the
    pending victim of a decode step.
    """
    held: list[list[set[int]]] = []
    slots: list[list[dict[int, int]]] = []
    for layer in layers:
        rows: list[dict[int, int]] = []
        for head, positions in enumerate(layer["positions"]):
            used = range(seen) if seen <= budget else range(budget + 1)
            skip = -1 if seen <= budget else int(layer["pending"][head])
            rows.append({int(positions[slot]): slot for slot in used if slot != skip})
        slots.append(rows)
        held.append([set(row) for row in rows])
    last = budget + 1
    keys = np.stack([np.asarray(layer["keys"], dtype=np.float32)[:, :last] for layer in layers])
    values = np.stack([np.asarray(layer["values"], dtype=np.float32)[:, :last] for layer in layers])
    return Snapshot(held, keys, values, slots)
