"""The slot cache: N + B slots a layer, evicted inside the graph.

Layout of the slots of one layer (the same for every KV head, so one causal rule serves all heads):

    0 .. n-1      tokens held, n = min(tokens read so far, N)
    n .. n+T-1    the T new tokens of this step, appended behind them
    n+T .. S-1    empty; slot S-1 also takes rows that nobody needs

`prefill` moves the surviving new tokens over the victims at the end of the step. `decode` leaves its victim where it
is and lets the next step write over it ("evict on the next write"): the set that attention sees is the same, and a
generated token costs one row write a cache. `pending` names that victim. Everything else follows from the position of
the first new token, so a cache is reset by starting again at position 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .policies import Policy, SlotView

NEVER = -float("inf")


@dataclass(frozen=True)
class CacheShape:
    """Static sizes of a cache: `layers`, `kv_heads`, `head_dim`, `budget` (N) and `block` (B)."""

    layers: int
    kv_heads: int
    head_dim: int
    budget: int
    block: int

    @property
    def slots(self) -> int:
        """N + B."""
        return self.budget + self.block


@dataclass
class LayerSlots:
    """State of one layer. `ops.view` gives the shapes below; how they are stored is the backend's business.

    Attributes:
        keys, values: [H, S, d] float32.
        positions: [H, S] int64.
        pending: [H] int64, the slot that the next single-token write goes to once the cache is full.
        state: [H, S] float32, or None when the policy keeps nothing a slot.
        total: [H, d] float32, a moving sum of keys, or None when the policy asks for none.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    pending: Tensor
    state: Tensor | None = None
    total: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, in graph I/O order."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True)
class Attended:
    """What an attention over the slots gives.

    Attributes:
        output: [H, R, T, d].
        dots: [H, S] dot products of the keys with the probe, or None without one.
        attention: [H, S] probabilities summed over the observed queries, averaged over R, or None without any.
    """

    output: Tensor
    dots: Tensor | None
    attention: Tensor | None


class SlotOps(Protocol):
    """The operations that a backend spells in its own operators. T rows, H heads, R query heads a KV head."""

    def allocate(self, heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
        """Zeroed slots of `width` numbers each; width 0 means one number without an axis of its own."""

    def view(self, slots: Tensor) -> Tensor:
        """[H, S, width], or [H, S] for width 0."""

    def address(self, index: Tensor) -> Any:
        """Turns slots index [H, T] into what `write` and `take` use; one address serves all tensors of a layer."""

    def write(self, slots: Tensor, address: Any, rows: Tensor) -> Tensor:
        """Writes rows [H, T(, width)] at an address and returns the slots, perhaps the same tensor."""

    def take(self, slots: Tensor, address: Any) -> Tensor:
        """Rows [H, T(, width)] at an address."""

    def overwrite(self, target: Tensor, value: Tensor) -> Tensor:
        """Replaces a whole small tensor and returns it, perhaps the same one."""

    def product(self, left: Tensor, right: Tensor, transpose: bool = False, scaling: float = 1.0) -> Tensor:
        """Batched matrix product of left [H, a, b] with right [H, b, c], or with right [H, c, b] transposed, scaled."""

    def after(self, index: Tensor, output: Tensor) -> Tensor:
        """The index, computed no sooner than the attention output: rows at it move only once they were read."""


def eviction_key(score: Tensor, positions: Tensor, floor: Tensor, step: Tensor) -> Tensor:
    """[H, S] float64, larger leaves first: the lowest score, and of equal scores the newest token.

    `floor` and `step` are float64 scalars: a number below every float32, which orders the zeros too, and the weight of
    a position, far below a float32 rounding step (2**-24) for every position up to 2**26, so that it orders equal
    scores and never reorders different ones.
    """
    leaving = (-score).double()
    return leaving + (leaving.abs() + floor) * (positions * step)


class SlotCache:
    """One step of a slot cache over all layers; the attention hook calls `attend` once a layer.

    Everything that layers have in common is computed here once: a lowering pays for every node in every layer.

    Args:
        shape: static sizes.
        policy: which tokens stay.
        ops: the backend's spelling of the slot operations.
        layers: state before the step; replaced layer by layer by the state after it.
        length: T, new tokens including padding; B for prefill, 1 for decode.
        start: int64 tensor [1], true position of the first new token.
        count: int64 tensor [1], valid new tokens (prefill), or None for a decode step of one token.
    """

    def __init__(
        self,
        shape: CacheShape,
        policy: Policy,
        ops: SlotOps,
        layers: list[LayerSlots],
        length: int,
        start: Tensor,
        count: Tensor | None,
    ) -> None:
        heads, budget, slots = shape.kv_heads, shape.budget, shape.slots
        self.shape, self.policy, self.ops, self.layers = shape, policy, ops, layers
        self.start, self.count = start, count
        self.held = start.clamp_max(budget)
        self.filling = start <= budget
        slot, row = torch.arange(slots), torch.arange(length)
        self.positions = (start + row).expand(heads, length)
        # A decode step scores only once the budget is full, and then slots 0 .. N all hold a token.
        self.occupied = slot <= budget if count is None else slot < self.held + count
        self.valid = self.occupied.to(torch.float32)
        self.mask = torch.where(slot <= (self.held + row).unsqueeze(1), 0.0, NEVER)
        self.end = start + (1 if count is None else count)
        self.entering = torch.ones(length) if count is None else (row < count).to(torch.float32)
        self.observed = self._observed(policy.observed_queries(), row)
        self.tie_floor = torch.tensor(1e-60, dtype=torch.float64)
        self.tie_step = torch.tensor(2.0**-51, dtype=torch.float64)
        if count is not None:
            self.appended = ops.address((self.held + row).expand(heads, length))
            self.last_slot = ops.address(torch.full((heads, 1), budget))
            self.excess = row < (self.held + count - budget).clamp_min(0)
            # Sort weights that list slots in ascending order: positive, and falling with the slot.
            self.staged_weight = (budget + row < self.held + count) * (length - row)
            self.freed_weight = budget - slot[:budget]
            self.unmarked = torch.zeros(heads, slots, dtype=torch.int64)
            self.marks = torch.ones(heads, length, dtype=torch.int64)

    def _observed(self, queries: int, row: Tensor) -> Tensor | None:
        """[T] float32, 1 for the last `queries` queries that are not padding, else 0; None when none are wanted."""
        if queries == 0 or not self.policy.evicts:
            return None
        if self.count is None or queries >= len(row):
            return self.entering
        return self.entering * (row >= self.count - queries)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Writes T new tokens, attends, evicts.

        Args:
            layer: layer index.
            query: [H * R, T, d], key and value: [H, T, d], all after RoPE.
            scaling: factor on the attention logits.

        Returns:
            [H * R, T, d] attention output.
        """
        heads, length, width = key.shape
        slots = self.layers[layer]
        if self.count is None:
            address = self.ops.address(torch.where(self.filling, self.start, slots.pending).unsqueeze(1))
        else:
            self._settle(slots)
            address = self.appended
        state = self.policy.slot_state(key)
        self._write(slots, address, key, value, self.positions, state)
        view = self._view(slots, key, state)
        probe = self.policy.probe(view) if self.policy.evicts else None
        grouped = query.reshape(heads, -1, length, width)
        found = self._attend(grouped, view.keys, self.ops.view(slots.values), scaling, probe)
        if self.policy.evicts:
            self._evict(slots, replace(view, dots=found.dots, attention=found.attention), found.output)
        return found.output.reshape(-1, length, width)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, probe: Tensor | None) -> Attended:
        """Attention of query [H, R, T, d], token i over slots 0 .. held + i."""
        heads, groups, length, width = query.shape
        slots, rows = keys.shape[1], groups * length
        flat = query.reshape(heads, rows, width)
        if probe is not None:
            # One more query: the pass over the keys that attention makes anyway gives their products with it as well.
            flat = torch.cat([flat, (probe / scaling).unsqueeze(1)], dim=1)
        logits = self.ops.product(flat, keys, transpose=True, scaling=scaling)
        dots = None
        if probe is not None:
            logits, dots = logits[:, :rows], logits[:, rows]
        masked = logits.reshape(heads, groups, length, slots) + self.mask
        weights = masked.softmax(-1).reshape(heads, rows, slots)
        attention = None
        if self.observed is not None:
            share = (self.observed / groups).repeat(heads, 1, groups)
            attention = self.ops.product(share, weights).squeeze(1)
        return Attended(self.ops.product(weights, values).reshape(heads, groups, length, width), dots, attention)

    def _view(self, slots: LayerSlots, key: Tensor, state: Tensor | None) -> SlotView:
        """What the policy sees before attention; brings the moving sum up to date."""
        keys, positions = self.ops.view(slots.keys), self.ops.view(slots.positions)
        numbers = None if slots.state is None else self.ops.view(slots.state)
        total, wanted = None, self.policy.key_sum()
        if wanted is not None:
            moving = slots.total is not None
            each = self.entering if moving else self.valid
            if wanted.by_state:
                factor = state if moving else numbers
                assert factor is not None
                each = each * factor
            weights = each.expand(len(keys), -1).unsqueeze(1)
            total = torch.bmm(weights, key if moving else keys).squeeze(1)
            if slots.total is not None:
                kept = (self.start > 0).to(torch.float32) * (1.0 - wanted.decay)
                total = slots.total = self.ops.overwrite(slots.total, slots.total * kept + total)
        return SlotView(keys, positions, self.valid, self.end - 1, numbers, total)

    def _write(
        self, slots: LayerSlots, address: Any, keys: Tensor, values: Tensor, positions: Tensor, state: Tensor | None
    ) -> None:
        slots.keys = self.ops.write(slots.keys, address, keys)
        slots.values = self.ops.write(slots.values, address, values)
        slots.positions = self.ops.write(slots.positions, address, positions)
        if slots.state is not None and state is not None:
            slots.state = self.ops.write(slots.state, address, state)

    def _move(self, slots: LayerSlots, source: Any, target: Any) -> None:
        take = self.ops.take
        state = None if slots.state is None else take(slots.state, source)
        self._write(
            slots, target, take(slots.keys, source), take(slots.values, source), take(slots.positions, source), state
        )

    def _settle(self, slots: LayerSlots) -> None:
        """Carries out a decode step's pending eviction: the token in slot N moves over its victim."""
        target = torch.where(self.filling, self.held, slots.pending).unsqueeze(1)
        self._move(slots, self.last_slot, self.ops.address(target))

    def _evict(self, slots: LayerSlots, view: SlotView, output: Tensor) -> None:
        state = self.policy.update_state(view)
        if state is not None and slots.state is not None:
            slots.state = self.ops.overwrite(slots.state, state)
            view = replace(view, state=state)
        key = self._eviction_key(view)
        if self.count is None:
            slots.pending = self.ops.overwrite(slots.pending, key.argmax(-1))
            return
        source, target = self._plan_moves(key)
        source = self.ops.after(source, output)
        self._move(slots, self.ops.address(source), self.ops.address(target))
        # Slot N, always, but computed from the plan: as a constant, a runtime that binds one buffer as input and output
        # may write it before the old value was read.
        slots.pending = self.ops.overwrite(slots.pending, source[:, 0].clamp_max(self.shape.budget))

    def _eviction_key(self, view: SlotView) -> Tensor:
        """[H, S] float64, larger leaves first; empty slots, pinned tokens and the recent window never leave."""
        key = eviction_key(self.policy.score(view), view.positions, self.tie_floor, self.tie_step)
        may_leave = self.occupied
        recent = self.policy.recent_tokens(self.shape.budget)
        if recent:
            may_leave = may_leave & (view.positions < self.end - recent)
        if self.policy.pinned:
            may_leave = may_leave & (view.positions >= self.policy.pinned)
        return torch.where(may_leave, key, NEVER)

    def _plan_moves(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs the surviving tokens behind slot N with the victims before it: two [H, B] slot indices.

        There are as many of the one as of the other. Both are listed in ascending slot order; the unused rest of a
        list moves into slot S - 1, which is empty after every eviction.
        """
        budget, block, nowhere = self.shape.budget, self.shape.block, self.shape.slots - 1
        victims = torch.where(self.excess, key.topk(block, dim=-1).indices, nowhere)
        leaving = self.unmarked.scatter(1, victims, self.marks)
        staged = (1 - leaving[:, budget:]) * self.staged_weight
        source = staged.topk(block, dim=-1).indices + budget
        freed, slot = (leaving[:, :budget] * self.freed_weight).topk(block, dim=-1)
        return source, torch.where(freed > 0, slot, nowhere)


def new_layers(shape: CacheShape, policy: Policy, ops: SlotOps) -> list[LayerSlots]:
    """Empty state for every layer."""
    heads, slots = shape.kv_heads, shape.slots
    keeps_state = policy.slot_state(torch.zeros(heads, 1, shape.head_dim)) is not None
    wanted = policy.key_sum()
    return [
        LayerSlots(
            keys=ops.allocate(heads, slots, shape.head_dim, torch.float32),
            values=ops.allocate(heads, slots, shape.head_dim, torch.float32),
            positions=ops.allocate(heads, slots, 0, torch.int64),
            pending=torch.full((heads,), shape.budget, dtype=torch.int64),
            state=ops.allocate(heads, slots, 0, torch.float32) if keeps_state else None,
            total=torch.zeros(heads, shape.head_dim) if wanted is not None and wanted.decay else None,
        )
        for _ in range(shape.layers)
    ]


class TorchOps:
    """The slot operations in plain, functional PyTorch: the static graph before any lowering."""

    def allocate(self, heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((heads, slots, width) if width else (heads, slots), dtype=dtype)

    def view(self, slots: Tensor) -> Tensor:
        return slots

    def address(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(index.shape[0]).unsqueeze(1), index

    def write(self, slots: Tensor, address: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        return slots.index_put(address, rows)

    def take(self, slots: Tensor, address: tuple[Tensor, Tensor]) -> Tensor:
        return slots[address]

    def overwrite(self, target: Tensor, value: Tensor) -> Tensor:
        return value

    def product(self, left: Tensor, right: Tensor, transpose: bool = False, scaling: float = 1.0) -> Tensor:
        return (left @ (right.mT if transpose else right)) * scaling

    def after(self, index: Tensor, output: Tensor) -> Tensor:
        return index
