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

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .policies import Policy, SlotView
from .shape import CacheShape

# Below every score; finite, because infinity times zero is no number, and far enough from the end of float32 that a
# score can be added.
NEVER = -1e38
_INT8_LEVELS = 127
# Of a row of zeros the scale would be 0 and its inverse infinite.
_LEAST_SCALE = 1e-30


@dataclass
class LayerSlots:
    """State of one layer. `ops.view` gives the shapes below; how they are stored is the backend's business.

    Attributes:
        keys, values: [H, S, d] in the cache's dtype.
        positions: [H, S] int64.
        pending: [H] int64, the slot that the next single-token write goes to once the cache is full.
        state: [H, S] float32, or None when the policy keeps nothing a slot.
        total: [H, d] float64, the policy's sum of keys, or None when it asks for none. Carried from step to step: plus
            what enters, minus what leaves, and in double precision no drift to speak of.
        scales: [H, S, 2] float32, what a key's and a value's integers are multiplied with; None unless they are int8.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    pending: Tensor
    state: Tensor | None = None
    total: Tensor | None = None
    scales: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, in graph I/O order."""
        named = {field.name: getattr(self, field.name) for field in fields(LayerSlots)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


# The state's tensors that hold something a slot, and move with it.
SLOTTED = ("keys", "values", "positions", "state", "scales")


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

    def pack(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Float32 numbers in the cache's dtype; int8 rounds to the nearest, of two to the even one."""

    def numbers(self, packed: Tensor) -> Tensor:
        """Packed numbers in float32."""

    def product(self, left: Tensor, right: Tensor, transpose: bool = False, scaling: float = 1.0) -> Tensor:
        """Batched matrix product of left [H, a, b] with right [H, b, c], or with right [H, c, b] transposed, scaled."""

    def last_of_largest(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """[H, S] float32 -> [H] slots of the largest number, of equal ones that of the highest position."""

    def after(self, index: Tensor, *results: Tensor) -> Tensor:
        """The index, computed no sooner than the results: rows at it move only once they were read."""


def leaving_order(leaving: Tensor, positions: Tensor) -> Tensor:
    """[H, S] float64, ordered as leaving is, and of equal numbers the higher position has more.

    The weight of a position is far below a float32 rounding step (2**-24) for every position up to 2**26, so it orders
    equal numbers and never reorders different ones; the smallest addend, below every float32, orders zeros.
    """
    exact = leaving.double()
    # Tensors, because a backend may hold a Python number in float32.
    least, weight = torch.tensor([1e-60, 2.0**-51], dtype=torch.float64)
    return exact + (exact.abs() + least) * (positions * weight)


class SlotCache:
    """One step of a slot cache over all layers; the attention hook calls `attend` once a layer.

    Everything that layers have in common is computed here once: a lowering pays for every node in every layer.

    Args:
        shape: static sizes.
        policy: which tokens stay.
        ops: the backend's spelling of the slot operations.
        layers: state before the step; replaced layer by layer by the state after it.
        length: T, new tokens including padding: B for prefill, 1 for decode, up to B for forward.
        start: int64 tensor [1], true position of the first new token.
        count: int64 tensor [1], valid new tokens, or None for a decode step that evicts on the next write.
        staged: int64 tensor [1], tokens read since the last eviction and past N; None for none.
        evicts: False for a step that only appends.
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
        staged: Tensor | None = None,
        evicts: bool = True,
    ) -> None:
        heads, budget, slots = shape.kv_heads, shape.budget, shape.slots
        self.shape, self.policy, self.ops, self.layers = shape, policy, ops, layers
        self.start, self.count, self.evicts = start, count, evicts and policy.evicts
        self.held = start.clamp_max(budget) if staged is None else (start - staged).clamp_max(budget) + staged
        self.filling = start <= budget
        slot, row = torch.arange(slots), torch.arange(length)
        self.positions = (start + row).expand(heads, length)
        # A decode step scores only once the budget is full, and then slots 0 .. N all hold a token.
        occupied = slot <= budget if count is None else slot < self.held + count
        self.valid = occupied.to(torch.float32)
        self.empty = torch.where(occupied, 0.0, NEVER)
        self.slot, self.sight = slot.to(torch.float32), (self.held + row).to(torch.float32)
        self.mask: Tensor | None = None
        self.end = start + (1 if count is None else count)
        self.entering = torch.ones(length) if count is None else (row < count).to(torch.float32)
        self.observed = self._observed(policy.observed_queries(), row)
        wanted = policy.key_sum()
        if wanted is not None:
            self.kept = (start > 0).double() * (1.0 - wanted.decay)
        if count is None:
            self.evicting = (start >= budget).double()
        else:
            self.appended = (self.held + row).expand(heads, length)
            self.last_slot = ops.address(torch.full((heads, 1), budget))
            # At most so many leave at once: a block, or the generated tokens that were let pile up.
            self.most = length if staged is None else shape.evict_every
            leave = torch.arange(self.most)
            self.excess = leave < (self.held + count - budget).clamp_min(0)
            # Sort weights that list slots in ascending order: positive, and falling with the slot.
            self.staged_weight = (budget + leave < self.held + count) * (self.most - leave)
            # One more than can leave: the last takes the marks of those that do not.
            self.unmarked = torch.zeros(heads, self.most + 1, dtype=torch.int64)
            self.marks = torch.ones(heads, self.most, dtype=torch.int64)

    def _observed(self, queries: int, row: Tensor) -> Tensor | None:
        """[T] float32, 1 for the last `queries` queries that are not padding, else 0; None when none are wanted."""
        if queries == 0 or not self.policy.evicts:
            return None
        if self.count is None or queries >= self.shape.block:
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
        rows = self._packed(key, value)
        # What a policy sees of a token is what the cache keeps of it.
        key = self._unpacked(rows["keys"], rows.get("scales"))
        state = self.policy.slot_state(key)
        rows["positions"] = self.positions
        if state is not None:
            rows["state"] = state
        if self.count is None:
            place = torch.where(self.filling, self.start, slots.pending).unsqueeze(1)
        elif self.shape.evict_every > 1:
            place = self.appended
        else:
            place, rows = self._settled(slots, rows)
        self._write(slots, self.ops.address(place), rows)
        total = None
        if slots.total is not None:
            entered = self._sum(key, state, None if self.count is None else self.entering)
            total = slots.total * self.kept + entered
        view = self._view(slots, total)
        probe = self.policy.probe(view) if self.evicts else None
        found = self._attend(query.reshape(heads, -1, length, width), slots, scaling, probe)
        view = replace(view, dots=found.dots, attention=found.attention)
        if self.policy.evicts:
            view = self._bring_up_to_date(slots, view)
        if self.evicts:
            self._evict(slots, view, total, found.output)
        elif total is not None:
            slots.total = self.ops.overwrite(slots.total, total)
        return found.output.reshape(-1, length, width)

    def _packed(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Keys and values [H, T, d] as the cache stores them; int8 with a scale a row, whose largest becomes 127."""
        dtype = stored_dtype(self.shape)
        if dtype is not torch.int8:
            return {"keys": self.ops.pack(key, dtype), "values": self.ops.pack(value, dtype)}
        packed, scales = [], []
        for row in (key, value):
            scale = row.abs().amax(-1, keepdim=True).clamp_min(_LEAST_SCALE) * (1 / _INT8_LEVELS)
            packed.append(self.ops.pack(row * scale.reciprocal(), dtype))
            scales.append(scale)
        return {"keys": packed[0], "values": packed[1], "scales": torch.cat(scales, -1)}

    def _unpacked(self, keys: Tensor, scales: Tensor | None) -> Tensor:
        """Keys [H, T, d] float32 of stored rows."""
        numbers = self.ops.numbers(keys)
        return numbers if scales is None else numbers * scales[..., :1]

    def _attend(self, query: Tensor, slots: LayerSlots, scaling: float, probe: Tensor | None) -> Attended:
        """Attention of query [H, R, T, d], token i over slots 0 .. held + i."""
        heads, groups, length, width = query.shape
        rows = groups * length
        flat = query.reshape(heads, rows, width)
        if probe is not None:
            # One more query: the pass over the keys that attention makes anyway gives their products with it as well.
            # It goes all the way through, because leaving it out of softmax would copy all the others.
            flat = torch.cat([flat, (probe / scaling).unsqueeze(1)], dim=1)
        keys, values = (self.ops.numbers(self.ops.view(packed)) for packed in (slots.keys, slots.values))
        key_scale = value_scale = None
        if slots.scales is not None:
            key_scale, value_scale = self.ops.view(slots.scales).split(1, dim=-1)
            if length > 1:
                # A block has more queries than a row has numbers, so here it is the cheaper side to scale.
                keys, values = keys * key_scale, values * value_scale
                key_scale = value_scale = None
        logits = self.ops.product(flat, keys, transpose=True, scaling=scaling)
        if key_scale is not None:
            logits = logits * key_scale.transpose(1, 2)
        weights = (logits + self._mask(groups, probe is not None)).softmax(-1)
        attention = None
        if self.observed is not None:
            share = (self.observed / groups).repeat(groups)
            if probe is not None:
                share = torch.cat([share, torch.zeros(1)])
            attention = self.ops.product(share.expand(heads, 1, -1), weights).squeeze(1)
        if value_scale is not None:
            weights = weights * value_scale.transpose(1, 2)
        output = self.ops.product(weights, values)[:, :rows].reshape(heads, groups, length, width)
        return Attended(output, None if probe is None else logits[:, rows], attention)

    def _mask(self, groups: int, probe: bool) -> Tensor:
        """[R * T, S] addend that hides later tokens and empty slots from a query, the same for all layers; a row of

        zeros behind it for the probe.
        """
        if self.mask is None:
            sight = self.sight.repeat(groups)
            if probe:
                sight = torch.cat([sight, self.slot[-1:]])
            # Arithmetic in place of a comparison, which a delegate lacks: 0 for a slot in sight, else NEVER.
            self.mask = (sight.unsqueeze(1) - self.slot).clamp(-1.0, 0.0) * -NEVER
        return self.mask

    def _view(self, slots: LayerSlots, total: Tensor | None) -> SlotView:
        """What the policy sees before attention."""
        state = None if slots.state is None else self.ops.view(slots.state)
        known = None if total is None else total.to(torch.float32)
        scales = None if slots.scales is None else self.ops.view(slots.scales)
        keys, positions = self._unpacked(self.ops.view(slots.keys), scales), self.ops.view(slots.positions)
        return SlotView(keys, positions, self.valid, self.end - 1, state, known)

    def _sum(self, keys: Tensor, state: Tensor | None, weights: Tensor | None) -> Tensor:
        """[H, d] float64: the sum that the policy asks for over keys [H, T, d], row i counting weights[i] times; of one

        key without weights. A block is added up in float32, so that a matrix product can do it; only blocks are added
        in double precision.
        """
        wanted = self.policy.key_sum()
        assert wanted is not None
        if wanted.by_state:
            assert state is not None
            keys = keys * state.unsqueeze(-1)
        if weights is None:
            return keys.squeeze(1).double()
        return self.ops.product(weights.expand(len(keys), 1, -1), keys).squeeze(1).double()

    def _write(self, slots: LayerSlots, address: Any, rows: dict[str, Tensor]) -> None:
        """Writes rows [H, T(, d)] by the name of the state's tensor."""
        for name, tensor in rows.items():
            setattr(slots, name, self.ops.write(getattr(slots, name), address, tensor))

    def _take(self, slots: LayerSlots, address: Any) -> dict[str, Tensor]:
        """The rows of every tensor that has one a slot."""
        kept = {name: tensor for name, tensor in slots.tensors().items() if name in SLOTTED}
        return {name: self.ops.take(tensor, address) for name, tensor in kept.items()}

    def _settled(self, slots: LayerSlots, entering: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Slots [H, 1 + T] and rows to write: the new tokens, and before them the eviction that a decode step left

        pending, that is the token in slot N to its victim's place. One write does both, because a runtime that writes
        in place does so once a buffer. Where nothing is pending the first row is the first new token over again.
        """
        nothing = (self.filling | (slots.pending >= self.shape.budget)).unsqueeze(1)
        place = torch.where(nothing.squeeze(1), self.held, slots.pending).unsqueeze(1)
        last, rows = self._take(slots, self.last_slot), {}
        for name, new in entering.items():
            packed = name in ("keys", "values")
            # Chosen as float32 numbers, because a runtime has no selection of bytes.
            new, moved = (self.ops.numbers(t) if packed else t for t in (new, last[name]))
            choice = nothing.unsqueeze(-1) if new.dim() == 3 else nothing
            row = torch.where(choice, new[:, :1], moved.reshape(new[:, :1].shape))
            both = torch.cat([row, new], dim=1)
            rows[name] = self.ops.pack(both, entering[name].dtype) if packed else both
        return torch.cat([place, self.appended], dim=1), rows

    def _bring_up_to_date(self, slots: LayerSlots, view: SlotView) -> SlotView:
        """Lets the policy update its number a slot by this step's attention."""
        state = self.policy.update_state(view)
        if state is None or slots.state is None:
            return view
        slots.state = self.ops.overwrite(slots.state, state)
        return replace(view, state=state)

    def _evict(self, slots: LayerSlots, view: SlotView, total: Tensor | None, output: Tensor) -> None:
        leaving = self._leaving(view)
        if self.count is None:
            victim = self.ops.last_of_largest(leaving, view.positions)
            if total is not None:
                self._leave_total(slots, total, victim.unsqueeze(1), None)
            slots.pending = self.ops.overwrite(slots.pending, victim)
            return
        victims = leaving_order(leaving, view.positions).topk(self.most, dim=-1).indices
        source, target = self._plan_moves(victims)
        source = self.ops.after(source, output)
        if total is not None:
            source = self.ops.after(source, self._leave_total(slots, total, victims, self.excess.to(torch.float32)))
        self._write(slots, self.ops.address(target), self._take(slots, self.ops.address(source)))
        # Slot N, always, but computed from the plan: as a constant, a runtime that binds one buffer as input and output
        # may write it before the old value was read.
        slots.pending = self.ops.overwrite(slots.pending, source[:, 0].clamp_max(self.shape.budget))

    def _leave_total(self, slots: LayerSlots, total: Tensor, victims: Tensor, weights: Tensor | None) -> Tensor:
        """Takes victims [H, T] out of the sum of keys, row i as far as weights[i] says, and returns the sum that stays.

        Without weights there is one victim, which leaves once the budget is full.
        """
        wanted = self.policy.key_sum()
        assert wanted is not None
        assert slots.total is not None
        if not wanted.decay:
            address = self.ops.address(victims)
            keys, scales = self.ops.take(slots.keys, address).reshape(*victims.shape, -1), None
            if slots.scales is not None:
                scales = self.ops.take(slots.scales, address).reshape(*victims.shape, -1)
            keys, state = self._unpacked(keys, scales), None
            if wanted.by_state and slots.state is not None:
                state = self.ops.take(slots.state, address).reshape(victims.shape)
            leaving = self._sum(keys, state, weights)
            total = total - (leaving * self.evicting if weights is None else leaving)
        slots.total = self.ops.overwrite(slots.total, total)
        return slots.total

    def _leaving(self, view: SlotView) -> Tensor:
        """[H, S] float32, larger leaves first; empty slots, pinned tokens and the recent window never leave."""
        barrier = self.empty
        recent = self.policy.recent_tokens(self.shape.budget)
        if recent or self.policy.pinned:
            # Arithmetic in place of comparisons, which a delegate lacks: 0 for what may leave, else NEVER. Positions
            # are exact in float32 up to 2**24.
            place = view.positions.to(torch.float32)
            if recent:
                oldest = (self.end - recent - 1).to(torch.float32)
                barrier = barrier + (oldest - place).clamp(-1.0, 0.0) * -NEVER
            if self.policy.pinned:
                barrier = barrier + (place - self.policy.pinned).clamp(-1.0, 0.0) * -NEVER
        return barrier - self.policy.score(view)

    def _plan_moves(self, victims: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs the surviving tokens behind slot N with the victims before it: two [H, B] slot indices. Of the victims

        [H, B], first to leave first, only the excess leaves. (k in place of B where k generated tokens leave at once.)

        There are as many of the one as of the other. Both are listed in ascending slot order; the unused rest of a
        list moves into slot S - 1, which is empty after every eviction. Nothing here is as long as the cache.
        """
        budget, most, nowhere = self.shape.budget, self.most, self.shape.slots - 1
        freed = ((budget - victims).clamp_min(0) * self.excess).topk(most, dim=-1).values
        behind = victims - budget
        leaving = self.unmarked.scatter(1, torch.where(self.excess & (behind >= 0), behind, most), self.marks)
        staged = (1 - leaving[:, :most]) * self.staged_weight
        source = staged.topk(most, dim=-1).indices + budget
        return source, torch.where(freed > 0, budget - freed, nowhere)


def stored_dtype(shape: CacheShape) -> torch.dtype:
    """What keys and values are stored as."""
    return {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}[shape.dtype]


def new_layers(shape: CacheShape, policy: Policy, ops: SlotOps) -> list[LayerSlots]:
    """Empty state for every layer."""
    heads, slots, dtype = shape.kv_heads, shape.slots, stored_dtype(shape)
    keeps_state = policy.slot_state(torch.zeros(heads, 1, shape.head_dim)) is not None
    return [
        LayerSlots(
            keys=ops.allocate(heads, slots, shape.head_dim, dtype),
            values=ops.allocate(heads, slots, shape.head_dim, dtype),
            positions=ops.allocate(heads, slots, 0, torch.int64),
            pending=torch.full((heads,), shape.budget, dtype=torch.int64),
            state=ops.allocate(heads, slots, 0, torch.float32) if keeps_state else None,
            total=torch.zeros(heads, shape.head_dim, dtype=torch.float64) if policy.key_sum() is not None else None,
            scales=ops.allocate(heads, slots, 2, torch.float32) if dtype is torch.int8 else None,
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

    def pack(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return (numbers.round() if dtype is torch.int8 else numbers).to(dtype)

    def numbers(self, packed: Tensor) -> Tensor:
        return packed.to(torch.float32)

    def product(self, left: Tensor, right: Tensor, transpose: bool = False, scaling: float = 1.0) -> Tensor:
        return (left @ (right.mT if transpose else right)) * scaling

    def last_of_largest(self, numbers: Tensor, positions: Tensor) -> Tensor:
        largest = numbers == numbers.amax(-1, keepdim=True)
        return torch.where(largest, positions, -1).argmax(-1)

    def after(self, index: Tensor, *results: Tensor) -> Tensor:
        return index
