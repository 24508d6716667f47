"""Eager reference: the contract in plain PyTorch, written to be read and to judge the static graph.

It keeps each KV head's tokens in a list-like tensor in order of position and drops the evicted ones; there are no
slots, no masks for empty places and no in-place moves. Of the package it shares only the policies' score functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .attention import forward_logits
from .policies import Policy, SlotView


@dataclass
class HeldTokens:
    """One layer's cache: keys and values [H, n, d], positions [H, n] ascending along n, state [H, n] or None.

    `total` [H, d] is the moving sum of a policy that asks for one. `before` and `scores` [H, m] are the m tokens before
    the last eviction and their scores, kept so that another choice can be judged, and followed.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    state: Tensor | None = None
    total: Tensor | None = None
    before: HeldTokens | None = None
    scores: Tensor | None = None

    def select(self, keep: Tensor) -> HeldTokens:
        """The tokens at indices keep [H, k]."""
        rows = torch.arange(keep.shape[0]).unsqueeze(1)
        state = None if self.state is None else self.state[rows, keep]
        return HeldTokens(self.keys[rows, keep], self.values[rows, keep], self.positions[rows, keep], state, self.total)


@dataclass
class Reference:
    """Block-wise prefill and decode with eviction after every step, exactly as the contract says.

    Args:
        model: a causal LM prepared for slot attention (`models.load_model`).
        policy: which tokens stay.
        budget: N, tokens held a layer and KV head after each step.
        block: B, tokens read a prefill step.
        cache_dtype: what keys and values are rounded to before anything reads them: float32, float16 or int8.
        evict_every: k, tokens read one by one that may pile up past N before the cache is brought back to N.
    """

    model: torch.nn.Module
    policy: Policy
    budget: int
    block: int
    cache_dtype: str = "float32"
    evict_every: int = 1
    layers: dict[int, HeldTokens] = field(default_factory=dict)
    seen: int = 0

    def reset(self) -> None:
        """Forgets everything read so far."""
        self.layers, self.seen = {}, 0

    def step(self, tokens: list[int]) -> Tensor:
        """Reads 1 <= T <= B tokens and returns the logits [V] after the last of them.

        A block begins with an empty pile: until then its tokens are read one by one.
        """
        while len(tokens) > 1 and self.layers and self.layers[0].positions.shape[1] > self.budget:
            self.step(tokens[:1])
            tokens = tokens[1:]
        ids = torch.tensor([tokens])
        start, last = torch.tensor([self.seen]), torch.tensor([len(tokens) - 1])
        with torch.no_grad():
            logits = forward_logits(self.model, self, ids, start, last)
        self.seen += len(tokens)
        return logits[0]

    def held(self) -> list[list[set[int]]]:
        """Positions held, as sets: [layer][KV head]."""
        return [[set(row.tolist()) for row in self.layers[i].positions] for i in sorted(self.layers)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention over retained and new tokens, then eviction; shapes as in `attention.AttentionCache`."""
        key, value = self._rounded(key), self._rounded(value)
        heads, length, width = key.shape
        positions = torch.arange(self.seen, self.seen + length).expand(heads, length)
        state = self.policy.slot_state(key)
        old = self.layers.get(layer)
        if old is None:
            held = HeldTokens(key, value, positions, state)
        else:
            held = HeldTokens(
                torch.cat([old.keys, key], 1),
                torch.cat([old.values, value], 1),
                torch.cat([old.positions, positions], 1),
                None if state is None or old.state is None else torch.cat([old.state, state], 1),
            )
        self.layers[layer] = held
        grouped = query.reshape(heads, -1, length, width)
        logits = torch.einsum("hrtd,hsd->hrts", grouped, held.keys) * scaling
        future = held.positions[:, None, None, :] > positions[:, None, :, None]
        weights = logits.masked_fill(future, float("-inf")).softmax(-1)
        output = torch.einsum("hrts,hsd->hrtd", weights, held.values)
        held.total = self._sum_of_keys(held, None if old is None else old.total, length)
        view = self._view(held, weights)
        held.state = view.state
        past = held.positions.shape[1] - self.budget
        if self.policy.evicts and past >= (self.evict_every if length == 1 else 1):
            self.layers[layer] = self._evict(held, view)
        return output.reshape(-1, length, width)

    def _rounded(self, rows: Tensor) -> Tensor:
        """Rows [H, T, d] as a cache of this dtype gives them back; int8 has 127 steps to a row's largest number."""
        if self.cache_dtype == "float16":
            return rows.half().float()
        if self.cache_dtype == "int8":
            step = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) * (1 / 127)
            return (rows * step.reciprocal()).round() * step
        return rows

    def _sum_of_keys(self, held: HeldTokens, before: Tensor | None, entering: int) -> Tensor | None:
        """The policy's sum over the held tokens, or its moving sum over the tokens read."""
        wanted = self.policy.key_sum()
        if wanted is None:
            return None
        rows = held.keys
        if wanted.by_state:
            assert held.state is not None
            rows = rows * held.state.unsqueeze(-1)
        if not wanted.decay:
            return rows.sum(1)
        new = rows[:, -entering:].sum(1)
        return new if before is None else (1 - wanted.decay) * before + new

    def _view(self, held: HeldTokens, weights: Tensor) -> SlotView:
        """What the policy sees after attention with probabilities weights [H, R, T, n]; state is brought up to date."""
        count = held.positions.shape[1]
        newest, head = held.positions[:1, -1], torch.arange(len(held.keys))
        view = SlotView(held.keys, held.positions, torch.ones(count), newest, head, held.state, held.total)
        probe = self.policy.probe(view)
        if probe is not None:
            view = replace(view, dots=torch.einsum("hsd,hd->hs", held.keys, probe))
        queries = self.policy.observed_queries()
        if queries:
            view = replace(view, attention=weights[:, :, -queries:].sum(2).mean(1))
        state = self.policy.update_state(view)
        return view if state is None else replace(view, state=state)

    def _evict(self, held: HeldTokens, view: SlotView) -> HeldTokens:
        scores = self.policy.score(view).clone()
        recent = self.policy.recent_tokens(self.budget)
        if recent:
            scores[:, -recent:] = float("inf")
        scores[held.positions < self.policy.pinned] = float("inf")
        # Positions ascend, so a stable sort leaves the older of two equal scores in front.
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.budget]
        kept = held.select(best.sort(dim=1).values)
        kept.before, kept.scores = held, scores
        return kept

    def score_gap(self, layer: int, head: int, dropped: set[int], kept: set[int]) -> float:
        """How far a choice that dropped and kept other positions than ours is from a tie: the largest score difference

        between a position that we kept and the other dropped, and one that the other kept in its place. Infinite when
        the other kept a position that was not there to keep.
        """
        held = self.layers[layer]
        if held.before is None or held.scores is None:
            return float("inf")
        score = dict(zip(held.before.positions[head].tolist(), held.scores[head].tolist(), strict=True))
        if len(dropped) != len(kept) or not (dropped | kept) <= score.keys():
            return float("inf")
        return max(score[p] for p in dropped) - min(score[p] for p in kept)

    def follow(self, layer: int, head: int, positions: set[int]) -> None:
        """Replaces our last choice for one head by another one, so that the next step can be judged on its own."""
        held = self.layers[layer]
        assert held.before is not None
        before = held.before.positions[head].tolist()
        keep = torch.tensor([[i for i, p in enumerate(before) if p in positions]])
        single = HeldTokens(
            *(t[head : head + 1] for t in (held.before.keys, held.before.values, held.before.positions))
        )
        if held.before.state is not None:
            single.state = held.before.state[head : head + 1]
        chosen = single.select(keep)
        held.keys[head], held.values[head], held.positions[head] = chosen.keys[0], chosen.values[0], chosen.positions[0]
        if held.state is not None and chosen.state is not None:
            held.state[head] = chosen.state[0]
