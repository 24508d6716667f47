"""The slot cache: N + B slots a layer, evicted inside the graph.

Layout of the slots of one layer (the same for every KV head, so one causal rule serves all heads):

    0 .. n-1      tokens held, n = min(tokens read so far, N)
    n .. n+T-1    the T new tokens of a block, appended behind them
    n+T .. S-1    empty; slot S-1 also takes rows that nobody needs

A *block* is written first and attended to in its place; at the end of the step its surviving tokens move over the
victims. A *single token* is written last: attention takes its key and value beside the cache, and once the victim is
known the token goes straight into the victim's slot. So one row a cache is written, and nothing is written between the
layers, which lets a backend keep all of them in one piece. Where attention is one operator that appends by itself
(`SlotOps.attend`), a single token stands at n like a block of one, and is written again over its victim.

Either way every layer evicts at the end of the step, all of them together: what a layer's attention tells is kept until
then, and the rest (scores, order, plan of moves) is computed once for all layers, as if they were one with L * H heads.
Which slots hold a token follows from the position of the first new one, so a cache is reset by starting at position 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .policies import Policy, SlotView
from .shape import CacheShape
from .slot_ops import SlotOps, leaving_order

# Below every score; finite, because infinity times zero is no number, and far enough from the end of float32 that a
# score can be added.
NEVER = -1e38
_INT8_LEVELS = 127
# Of a row of zeros the scale would be 0 and its inverse infinite.
_LEAST_SCALE = 1e-30


@dataclass
class Slots:
    """State of all layers. `ops.view` gives the shapes below; how they are stored is the backend's business.

    Attributes:
        keys, values: a layer each, [H, S, d] in the cache's dtype.
        scales: a layer each, [H, S, 2] float32, what a key's and a value's integers are multiplied with; empty unless
            they are int8.
        positions: [L * H, S] float32 whole numbers, exact below 2**24.
        state: [L * H, S] float32, or None when the policy keeps nothing a slot.
        total: [L * H, d] float64, the policy's sums of keys, or None when it asks for none. Carried from step to step:
            plus what enters, minus what leaves, and in double precision no drift to speak of.
    """

    keys: list[Tensor]
    values: list[Tensor]
    scales: list[Tensor]
    positions: Tensor
    state: Tensor | None = None
    total: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, in graph I/O order: keys_0, values_0, ..., positions, state, total."""
        named: dict[str, Tensor] = {}
        for layer in range(len(self.keys)):
            named.update({f"{name}_{layer}": part[layer] for name, part in self.layered().items()})
        shared = {"positions": self.positions, "state": self.state, "total": self.total}
        return {**named, **{name: tensor for name, tensor in shared.items() if tensor is not None}}

    def layered(self) -> dict[str, list[Tensor]]:
        """The tensors that every layer has of its own."""
        parts = {"keys": self.keys, "values": self.values, "scales": self.scales}
        return {name: part for name, part in parts.items() if part}

    @classmethod
    def named(cls, tensors: dict[str, Tensor], layers: int) -> Slots:
        """The opposite of `tensors`."""
        keys, values, scales = (
            [tensors[f"{name}_{i}"] for i in range(layers) if f"{name}_{i}" in tensors]
            for name in ("keys", "values", "scales")
        )
        return cls(keys, values, scales, tensors["positions"], tensors.get("state"), tensors.get("total"))


@dataclass(frozen=True)
class Attended:
    """What an attention over the slots gives; S counts one more for a single token, which stands behind the slots.

    Attributes:
        output: [H, R, T, d].
        dots: [H, S] dot products of the keys with the probe, of a single token times the scaling of its logits.
        attention: [H, S] probabilities summed over the observed queries, averaged over R, or None without any.
    """

    output: Tensor
    dots: Tensor | None
    attention: Tensor | None


@dataclass
class _Gathered:
    """What the layers of a step leave behind for eviction, a layer each.

    Attributes:
        rows: what a single token writes: keys, values and scales [H, 1, width] by name.
        keys: its key as the cache keeps it, [H, 1, d].
        states: the policy's numbers of the new tokens, [H, T].
        entering: what the new tokens add to the sum of keys, [H, d] float32.
        dots, attention: of `Attended`.
        scaling: factor on dots.
        output: the last layer's attention.
    """

    rows: list[dict[str, Tensor]] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    entering: list[Tensor] = field(default_factory=list)
    dots: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    scaling: float = 1.0
    output: Tensor | None = None


class SlotCache:
    """One step of a slot cache: the attention hook calls `attend` once a layer, then `finish` is called once.

    Args:
        shape: static sizes.
        policy: which tokens stay.
        ops: the backend's spelling of the slot operations.
        slots: state before the step; after `finish` the state after it.
        length: T, new tokens including padding: B for prefill, 1 for decode, up to B for forward.
        start: int64 tensor [1], true position of the first new token.
        count: int64 tensor [1], valid tokens of a block, or None for a single token, which is written last.
        staged: int64 tensor [1], tokens read since the last eviction and past N; None for none.
        evicts: False for a step that only appends.
    """

    def __init__(
        self,
        shape: CacheShape,
        policy: Policy,
        ops: SlotOps,
        slots: Slots,
        length: int,
        start: Tensor,
        count: Tensor | None,
        staged: Tensor | None = None,
        evicts: bool = True,
    ) -> None:
        heads, budget = shape.kv_heads, shape.budget
        self.rows = shape.layers * heads
        self.shape, self.policy, self.ops, self.slots = shape, policy, ops, slots
        self.start, self.count, self.evicts = start, count, evicts and policy.evicts
        self.held = start.clamp_max(budget) if staged is None else (start - staged).clamp_max(budget) + staged
        self.end = start + (1 if count is None else count)
        slot, row = torch.arange(shape.slots), torch.arange(length)
        self.positions = (start + row).to(torch.float32).expand(self.rows, length)
        self.slot, self.sight = slot.to(torch.float32), (self.held + row).to(torch.float32)
        self.appended = (self.held + row).expand(self.rows, length)
        self.entering = torch.ones(length) if count is None else (row < count).to(torch.float32)
        self.observed = self._observed(policy.observed_queries(), row)
        self.fused = ops.fuses and self.observed is None and stored_dtype(shape) is torch.float32
        self.beside = count is None and not self.fused
        occupied = (slot < (self.held if self.beside else self.held + self.end - start)).to(torch.float32)
        self.valid = torch.cat([occupied, torch.ones(1)]) if self.beside else occupied
        self.empty = (1.0 - self.valid) * NEVER
        self.mask: Tensor | None = None
        self.gathered = _Gathered()
        self.known = self.carried = None
        wanted = policy.key_sum()
        if wanted is not None and slots.total is not None:
            self.carried = slots.total * ((start > 0).double() * (1.0 - wanted.decay))
            self.known = self.carried.to(torch.float32)
            self.known_layers = ops.layers(self.known, heads)
        if count is not None:
            (self.place,) = ops.addresses(self.appended[:heads], heads)
            # At most so many leave at once: a block, or the generated tokens that were let pile up.
            self.most = length if staged is None else shape.evict_every

    def _observed(self, queries: int, row: Tensor) -> Tensor | None:
        """[T] float32, 1 for the last `queries` queries that are not padding, else 0; None when none are wanted."""
        if queries == 0 or not self.policy.evicts:
            return None
        if self.count is None or queries >= self.shape.block:
            return self.entering
        return self.entering * (row >= self.count - queries)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of T new tokens to the slots and to themselves.

        Args:
            layer: layer index.
            query: [H * R, T, d], key and value: [H, T, d], all after RoPE.
            scaling: factor on the attention logits.

        Returns:
            [H * R, T, d] attention output.
        """
        heads, length, width = key.shape
        packed = self._packed(key, value)
        # What attention and policy see of a token is what the cache keeps of it.
        key = self._unpacked(packed["keys"], packed.get("scales"), 0)
        if self.count is None:
            self.gathered.rows.append(packed)
        if self.fused:
            output = self._attend_fused(layer, query, key, value, scaling)
        elif self.count is not None:
            self._write(layer, self.place, packed)
        probe = self._probe(layer, key) if self.policy.evicts else None
        grouped = query.reshape(heads, -1, length, width)
        if self.fused:
            found = Attended(output, None if probe is None else self._dots(layer, probe), None)
        elif self.count is None:
            value = self._unpacked(packed["values"], packed.get("scales"), 1)
            found = self._attend_token(layer, grouped, key, value, scaling, probe)
            self.gathered.scaling = scaling
        else:
            found = self._attend_block(layer, grouped, scaling, probe)
        for kept, tensor in ((self.gathered.dots, found.dots), (self.gathered.attention, found.attention)):
            if tensor is not None:
                kept.append(tensor)
        self.gathered.keys.append(key)
        self.gathered.output = found.output
        return found.output.reshape(-1, length, width)

    def _attend_fused(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[H * R, T, d] by the backend's own operator, which appends the new tokens behind the held ones."""
        slots = self.slots
        output, slots.keys[layer], slots.values[layer] = self.ops.attend(
            query, key, value, slots.keys[layer], slots.values[layer], self.held, scaling
        )
        return output

    def _dots(self, layer: int, probe: Tensor) -> Tensor:
        """Products of the cached keys with a probe [H, d]: [H, S], and axes of length 1 where stored keys have such.

        A change of shape would be a call of its own in every layer.
        """
        keys = self.slots.keys[layer]
        # The keys on the left: a kernel packs the right side anew at every call.
        return self.ops.product(keys, probe.reshape(*keys.shape[:-2], -1, 1))

    def _probe(self, layer: int, key: Tensor) -> Tensor | None:
        """Notes what the layer's new keys [H, T, d] add to state and sum; the policy's probe [H, d], if it has one."""
        wanted, state, total = self.policy.key_sum(), None, None
        if self.count is not None or (wanted is not None and wanted.by_state):
            state = self.policy.slot_state(key)
            if state is not None:
                self.gathered.states.append(state)
        if self.known is not None:
            entering = self._sum(key, state, None if self.count is None else self.entering)
            self.gathered.entering.append(entering)
            total = self.known_layers[layer] + entering
        heads = self.shape.kv_heads
        positions = self._positions()[layer * heads : (layer + 1) * heads]
        keys = self._layer_keys(layer, key)
        return self.policy.probe(SlotView(keys, positions, self.valid, self.end - 1, self._head(), total=total))

    def _head(self, layers: int = 1) -> Tensor:
        """[layers * H] int64, every row's KV head."""
        return torch.arange(self.shape.kv_heads).repeat(layers)

    def _positions(self) -> Tensor:
        """[L * H, S] int64, before eviction."""
        held = self.ops.view(self.slots.positions)
        return (torch.cat([held, self.positions], 1) if self.beside else held).to(torch.int64)

    def _layer_keys(self, layer: int, new: Tensor) -> Tensor:
        """[H, S, d] float32, before eviction."""
        keys = self._keys(layer)
        return torch.cat([keys, new], 1) if self.beside else keys

    def _keys(self, layer: int) -> Tensor:
        """[H, S, d] float32, the layer's cached keys."""
        scales = self.ops.view(self.slots.scales[layer]) if self.slots.scales else None
        return self._unpacked(self.ops.view(self.slots.keys[layer]), scales, 0)

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

    def _unpacked(self, packed: Tensor, scales: Tensor | None, column: int) -> Tensor:
        """Keys (column 0) or values (1) [H, T, d] float32 of stored rows."""
        numbers = self.ops.numbers(packed)
        return numbers if scales is None else numbers * scales[..., column : column + 1]

    def _attend_block(self, layer: int, query: Tensor, scaling: float, probe: Tensor | None) -> Attended:
        """Attention of query [H, R, T, d], token i over slots 0 .. held + i."""
        heads, groups, length, width = query.shape
        keys, values = (self.ops.numbers(self.ops.view(part[layer])) for part in (self.slots.keys, self.slots.values))
        if self.slots.scales:
            # A block has more queries than a row has numbers, so here it is the cheaper side to scale.
            key_scale, value_scale = self.ops.view(self.slots.scales[layer]).split(1, dim=-1)
            keys, values = keys * key_scale, values * value_scale
        dots = None if probe is None else self.ops.product(keys, probe.unsqueeze(-1)).squeeze(-1)
        logits = self.ops.product(query.reshape(heads, -1, width), keys, transpose=True, scaling=scaling)
        weights = (logits + self._mask(groups)).softmax(-1)
        output = self.ops.product(weights, values).reshape(heads, groups, length, width)
        return Attended(output, dots, self._attention(weights, groups))

    def _attend_token(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, probe: Tensor | None
    ) -> Attended:
        """Attention of query [H, R, 1, d] over the slots that hold a token and over its own key and value [H, 1, d],

        which count as one slot more, behind the others.
        """
        heads, groups, _, width = query.shape
        flat, slots = query.reshape(heads, groups, width), self.shape.slots
        if probe is not None:
            # One more query: the pass over the keys that attention makes anyway gives their products with it as well.
            flat = torch.cat([flat, probe.unsqueeze(1)], dim=1)
        keys, values = (self.ops.numbers(self.ops.view(part[layer])) for part in (self.slots.keys, self.slots.values))
        logits = self.ops.product(flat, keys, transpose=True, scaling=scaling)
        value_scale = None
        if self.slots.scales:
            key_scale, value_scale = (t.transpose(1, 2) for t in self.ops.view(self.slots.scales[layer]).split(1, -1))
            logits = logits * key_scale
        logits = torch.cat([logits, self.ops.product(flat, key, transpose=True, scaling=scaling)], -1)
        weights = (logits + self.empty).softmax(-1)
        # Slices, not a split, which a delegate lacks.
        held, own = weights[..., :slots], weights[..., slots:]
        output = self.ops.product(held if value_scale is None else held * value_scale, values) + own * value
        dots = None
        if probe is not None:
            output, dots = output[:, :groups], logits[:, groups:].reshape(heads, -1)
            weights = weights[:, :groups] if self.observed is not None else weights
        return Attended(output.reshape(heads, groups, 1, width), dots, self._attention(weights, groups))

    def _attention(self, weights: Tensor, groups: int) -> Tensor | None:
        """[H, S] of probabilities weights [H, R * T, S]: the observed queries' sum, averaged over R."""
        if self.observed is None:
            return None
        share = (self.observed / groups).repeat(groups)
        return self.ops.product(share.expand(len(weights), 1, -1), weights).squeeze(1)

    def _mask(self, groups: int) -> Tensor:
        """[R * T, S] addend that hides later tokens and empty slots from a block's query, the same for all layers."""
        if self.mask is None:
            # Arithmetic in place of a comparison, which a delegate lacks: 0 for a slot in sight, else NEVER.
            self.mask = (self.sight.repeat(groups).unsqueeze(1) - self.slot).clamp(-1.0, 0.0) * -NEVER
        return self.mask

    def _sum(self, keys: Tensor, state: Tensor | None, weights: Tensor | None) -> Tensor:
        """[H, d] float32: the sum that the policy asks for over keys [H, T, d], row i counting weights[i] times; of one

        key without weights.
        """
        wanted = self.policy.key_sum()
        assert wanted is not None
        if wanted.by_state:
            assert state is not None
            keys = keys * state.unsqueeze(-1)
        if weights is None:
            return keys.squeeze(1)
        return self.ops.product(weights.expand(len(keys), 1, -1), keys).squeeze(1)

    def finish(self) -> None:
        """Evicts and writes, in all layers at once."""
        if self.gathered.states:
            states: Tensor | None = torch.cat(self.gathered.states)
        else:
            states = self.policy.slot_state(torch.cat(self.gathered.keys))
        if self.count is None:
            self._finish_token(states)
        else:
            self._finish_block(states)

    def _view(self, state: Tensor | None) -> SlotView:
        """What the policy sees of all layers after attention."""
        gathered = self.gathered
        keys = torch.cat([self._layer_keys(layer, key) for layer, key in enumerate(gathered.keys)])
        head = self._head(self.shape.layers)
        dots, attention, entering = (
            torch.cat(part) if part else None for part in (gathered.dots, gathered.attention, gathered.entering)
        )
        if dots is not None:
            dots = dots.reshape(self.rows, -1)
            dots = dots if self.fused else dots * (1.0 / gathered.scaling)
        total = None if self.known is None or entering is None else self.known + entering
        view = SlotView(keys, self._positions(), self.valid, self.end - 1, head, state, total, dots, attention)
        updated = self.policy.update_state(view) if self.policy.evicts else None
        return view if updated is None else replace(view, state=updated)

    def _finish_token(self, states: Tensor | None) -> None:
        slots, ops, budget = self.slots, self.ops, self.shape.budget
        if self.fused:
            state = self._append_numbers(states)
        else:
            before = None if slots.state is None else ops.view(slots.state)
            state = None if before is None or states is None else torch.cat([before, states], 1)
        view = self._view(state)
        if state is not None and view.state is not None and view.state is not state:
            held, states = view.state.split([self.shape.slots, 1], 1)
            slots.state = ops.overwrite(slots.state, held)
        stays = leaves = None
        if self.evicts:
            positions = ops.view(slots.positions)
            positions = torch.cat([positions, self.positions], 1) if self.beside else positions
            victim = ops.last_of_largest(self._leaving(view, positions), positions)
            filling = self.start < budget
            # A token that leaves at once is written where nobody looks.
            own = self.shape.slots if self.beside else self.held
            place = torch.where(filling, self.start, victim.clamp_max(self.shape.slots - 1))
            stays = filling | (victim != own)
            leaves = stays & ~filling
        else:
            place = self.held.expand(self.rows)
        place = ops.after(place, self._output()).unsqueeze(1)
        if self.carried is not None:
            slots.total = ops.overwrite(slots.total, self._total_after_token(place, stays, leaves))
            place = ops.after(place, slots.total)
        if self.fused and not self.evicts:
            return
        rows = self._token_rows()
        for layer, address in enumerate(ops.addresses(place, self.shape.kv_heads)):
            self._write(layer, address, rows[layer])
        self._write_numbers(ops.address(place), states)

    def _token_rows(self) -> list[dict[str, Tensor]]:
        """What a single token writes, a layer each. Where nodes are to be saved all come out of one tensor."""
        rows = self.gathered.rows
        if not self.fused:
            return rows
        heads = self.shape.kv_heads
        joined = {name: self.ops.layers(torch.cat([row[name] for row in rows]), heads) for name in rows[0]}
        return [{name: parts[layer] for name, parts in joined.items()} for layer in range(len(rows))]

    def _append_numbers(self, states: Tensor | None) -> Tensor | None:
        """Writes the new tokens' positions, and the policy's numbers [L * H, T] if it has any, behind the held ones.

        Returns the policy's numbers of all slots [L * H, S].
        """
        self._write_numbers(self.ops.address(self.appended), states)
        return None if self.slots.state is None else self.ops.view(self.slots.state)

    def _write_numbers(self, address: Any, states: Tensor | None) -> None:
        """Writes the new tokens' positions, and the policy's numbers if it has any, at an address of all layers."""
        slots = self.slots
        slots.positions = self.ops.write(slots.positions, address, self.positions)
        if slots.state is not None and states is not None:
            slots.state = self.ops.write(slots.state, address, states)

    def _finish_block(self, states: Tensor | None) -> None:
        slots, ops = self.slots, self.ops
        state = self._append_numbers(states)
        view = self._view(state)
        if state is not None and view.state is not None and view.state is not state:
            slots.state = ops.overwrite(slots.state, view.state)
        entered = None
        if self.carried is not None:
            entered = self.carried + torch.cat(self.gathered.entering).double()
        if not self.evicts:
            if entered is not None:
                slots.total = ops.overwrite(slots.total, entered)
            return
        positions = ops.view(slots.positions)
        victims = leaving_order(self._leaving(view, positions), positions).topk(self.most, dim=-1).indices
        excess = torch.arange(self.most) < (self.held + self.count - self.shape.budget).clamp_min(0)
        source, target = self._plan_moves(victims, excess)
        source = ops.after(source, self._output())
        if entered is not None:
            slots.total = ops.overwrite(slots.total, self._less_victims(entered, victims, excess))
            source = ops.after(source, slots.total)
        heads = self.shape.kv_heads
        pairs = zip(ops.addresses(source, heads), ops.addresses(target, heads), strict=True)
        for layer, (origin, place) in enumerate(pairs):
            moved = {name: ops.take(part[layer], origin) for name, part in slots.layered().items()}
            self._write(layer, place, moved)
        origin, place = ops.address(source), ops.address(target)
        slots.positions = ops.write(slots.positions, place, ops.take(slots.positions, origin))
        if slots.state is not None:
            slots.state = ops.write(slots.state, place, ops.take(slots.state, origin))

    def _output(self) -> Tensor:
        """The last layer's attention: who waits for it waits for every read of the caches."""
        assert self.gathered.output is not None
        return self.gathered.output

    def _write(self, layer: int, address: Any, rows: dict[str, Tensor]) -> None:
        """Writes rows [H, T, width] of the tensors that every layer has of its own."""
        for name, part in self.slots.layered().items():
            part[layer] = self.ops.write(part[layer], address, rows[name])

    def _total_after_token(self, place: Tensor, stays: Tensor | None, leaves: Tensor | None) -> Tensor:
        """[L * H, d] float64: the sums of keys once a token was written to place [L * H, 1], where rows [L * H] `stays`

        says whether it enters, and `leaves` whether the one that was there goes.
        """
        wanted = self.policy.key_sum()
        assert wanted is not None
        assert self.carried is not None
        entering = torch.cat(self.gathered.entering).double()
        if wanted.decay or stays is None or leaves is None:
            return self.carried + entering
        old = self._sums_at(place, None).double()
        return self.carried + entering * stays.double().unsqueeze(1) - old * leaves.double().unsqueeze(1)

    def _less_victims(self, total: Tensor, victims: Tensor, excess: Tensor) -> Tensor:
        """[L * H, d] float64: sums of keys without victims [L * H, most], of which only the excess leaves."""
        wanted = self.policy.key_sum()
        assert wanted is not None
        if wanted.decay:
            return total
        return total - self._sums_at(victims, excess.to(torch.float32)).double()

    def _sums_at(self, index: Tensor, weights: Tensor | None) -> Tensor:
        """[L * H, d] float32: `_sum` over the cached keys in slots index [L * H, T]."""
        wanted, slots, ops, heads = self.policy.key_sum(), self.slots, self.ops, self.shape.kv_heads
        assert wanted is not None
        states: list[Tensor | None] = [None] * self.shape.layers
        if wanted.by_state and slots.state is not None:
            states = list(ops.take(slots.state, ops.address(index)).reshape(index.shape).split(heads))
        sums = []
        for layer, address in enumerate(ops.addresses(index, heads)):
            shape = (heads, index.shape[1], -1)
            scales = ops.take(slots.scales[layer], address).reshape(shape) if slots.scales else None
            keys = self._unpacked(ops.take(slots.keys[layer], address).reshape(shape), scales, 0)
            sums.append(self._sum(keys, states[layer], weights))
        return torch.cat(sums)

    def _leaving(self, view: SlotView, positions: Tensor) -> Tensor:
        """[L * H, S] float32, larger leaves first; empty slots, pinned tokens and the recent window never leave."""
        barrier = self.empty
        recent = self.policy.recent_tokens(self.shape.budget)
        # Arithmetic in place of comparisons, which a delegate lacks: 0 for what may leave, else NEVER.
        if recent:
            # Of an empty slot every position counts as recent, so that one pass over the slots serves both.
            oldest = (self.end - recent - 1).to(torch.float32) + self.empty
            barrier = (oldest - positions).clamp(-1.0, 0.0) * -NEVER
        if self.policy.pinned:
            barrier = barrier + (positions - self.policy.pinned).clamp(-1.0, 0.0) * -NEVER
        return barrier - self.policy.score(view)

    def _plan_moves(self, victims: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs the surviving new tokens behind slot N with the victims before it: two [L * H, most] slot indices. Of

        the victims [L * H, most], first to leave first, only the excess [most] leaves.

        There are as many of the one as of the other. Both are listed in ascending slot order; the unused rest of a
        list moves into slot S - 1, which is empty after every eviction. Nothing here is as long as the cache.
        """
        budget, most, nowhere = self.shape.budget, self.most, self.shape.slots - 1
        leave = torch.arange(most)
        freed = ((budget - victims).clamp_min(0) * excess).topk(most, dim=-1).values
        behind = victims - budget
        # One mark more than can leave: it takes those that do not.
        unmarked = torch.zeros(self.rows, most + 1, dtype=torch.int64)
        leaving = unmarked.scatter(1, torch.where(excess & (behind >= 0), behind, most), torch.ones_like(victims))
        # Sort weights that list slots in ascending order: positive, and falling with the slot.
        weight = (budget + leave < self.held + self.count) * (most - leave)
        source = ((1 - leaving[:, :most]) * weight).topk(most, dim=-1).indices + budget
        return source, torch.where(freed > 0, budget - freed, nowhere)


def stored_dtype(shape: CacheShape) -> torch.dtype:
    """What keys and values are stored as."""
    return {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}[shape.dtype]


def new_slots(shape: CacheShape, policy: Policy, ops: SlotOps) -> Slots:
    """Empty state of all layers."""
    heads, count, dtype = shape.kv_heads, shape.slots, stored_dtype(shape)
    rows, layers = shape.layers * heads, range(shape.layers)
    keeps_state = policy.slot_state(torch.zeros(heads, 1, shape.head_dim)) is not None
    sums = policy.key_sum() is not None
    return Slots(
        keys=[ops.allocate(heads, count, shape.head_dim, dtype) for _ in layers],
        values=[ops.allocate(heads, count, shape.head_dim, dtype) for _ in layers],
        scales=[ops.allocate(heads, count, 2, torch.float32) for _ in layers] if dtype is torch.int8 else [],
        positions=ops.allocate(rows, count, 0, torch.float32),
        state=ops.allocate(rows, count, 0, torch.float32) if keeps_state else None,
        total=torch.zeros(rows, shape.head_dim, dtype=torch.float64) if sums else None,
    )
