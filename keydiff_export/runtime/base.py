"""One interface over all runtimes: read a block, read a token, look at the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
# What a snapshot takes of a layer beside positions; scales only where keys and values are int8.
LAYERED = ("keys", "values", "scales")


@dataclass
class Snapshot:
    """State of the whole cache after a step, copied out.

    Attributes:
        held: positions held, as sets: [layer][KV head].
        keys, values: [L, H, n, d] float32 by slot, of the n slots that hold a token.
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
        evict_every: k, the generated tokens that may pile up before k tokens leave at once.
        seen: tokens read since the last reset.
        fills: the artifact has the method `fill`.
        fits: all tokens that were announced fit the cache.
        staged: tokens that wait for the next eviction, below k.
    """

    def __init__(self, budget: int, block: int, evict_every: int = 1) -> None:
        self.budget, self.block, self.evict_every = budget, block, evict_every
        self.seen = self.staged = 0
        self.fills = self.fits = False

    def reset(self) -> None:
        """Forgets everything read so far. Slots are not cleared: what is held follows from the position."""
        self.seen = self.staged = 0
        self.fits = False

    def expect(self, tokens: int) -> None:
        """Announces the most tokens that will be held in all before the next reset.

        Where they fit the cache, an artifact that has the method `fill` reads single tokens with it: the same, without
        the cost of eviction. Without an announcement `decode` reads them, so that no method has to be loaded halfway.
        """
        self.fits = tokens <= self.budget

    def step(self, tokens: list[int]) -> Logits:
        """Reads 1 <= T <= B tokens and returns the logits [V] after the last; one token goes through `decode`.

        While tokens wait for an eviction, those of a block are read one by one as well.
        """
        if not 1 <= len(tokens) <= self.block:
            raise ValueError(f"a step takes 1 to {self.block} tokens, got {len(tokens)}")
        while self.staged and len(tokens) > 1:
            self._one(tokens[0])
            tokens = tokens[1:]
        if len(tokens) == 1:
            return self._one(tokens[0])
        logits = self._prefill(tokens)
        self.seen += len(tokens)
        return logits

    def _one(self, token: int) -> Logits:
        logits = self._decode(token)
        if self.evict_every > 1 and self.seen >= self.budget:
            self.staged = (self.staged + 1) % self.evict_every
        self.seen += 1
        return logits

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the artifact's methods that steps go through."""
        return ("prefill", "decode") if self.evict_every == 1 else ("prefill", "append", "decode_evicting")

    @property
    def _single(self) -> str:
        """The method that reads the next single token."""
        if self.evict_every == 1:
            return "decode"
        return "decode_evicting" if self.staged + 1 == self.evict_every else "append"

    def close(self) -> None:  # noqa: B027
        """Frees what the runner holds outside this process."""

    @property
    def held(self) -> int:
        """Tokens held a layer and KV head."""
        return min(self.seen - self.staged, self.budget) + self.staged

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


def make_snapshot(positions: NDArray[np.generic], layers: list[dict[str, NDArray[np.generic]]], count: int) -> Snapshot:
    """Builds a snapshot from positions [L * H, S] and, a layer each, keys and values [H, S, d] by name, with scales

    [H, S, 2] where those are int8. The first `count` slots hold a token.
    """
    heads = len(positions) // len(layers)
    rows = [{int(position): slot for slot, position in enumerate(row[:count])} for row in positions]
    slots = [rows[layer * heads : (layer + 1) * heads] for layer in range(len(layers))]

    def numbers(name: str, column: int) -> NDArray[np.float32]:
        stacked = np.stack([np.asarray(layer[name], dtype=np.float32)[:, :count] for layer in layers])
        if "scales" not in layers[0]:
            return stacked
        return stacked * np.stack([np.asarray(layer["scales"])[:, :count, column : column + 1] for layer in layers])

    return Snapshot([[set(row) for row in layer] for layer in slots], numbers("keys", 0), numbers("values", 1), slots)
