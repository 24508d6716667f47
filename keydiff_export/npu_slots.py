"""The slot cache for NPUs: the contract of `slots.py` in a graph that a neural processor takes whole.

A processor such as Qualcomm's Hexagon computes in 16 bits, has no int64 or float64, owns no state between calls and
hands every output out in full. So three things differ from `SlotCache`, and of the contract only exact ties:

- The caches are graph inputs and outputs of N slots. Inside a step they are joined with the T new rows, N + T slots.
- Held tokens are packed to the front in no order. A decode step writes its token over the slot of lowest score (an
  empty slot scores lower than any token), one elementwise select; prefill gathers the N best rows by one top-k. Since
  every output is written in full anyway, moving only the victims would save nothing. Positions move along as int32.
- Equal scores leave by slot, not by age: in 16 bits two scores nearer than 1e-3 are equal, so there is no exact tie to
  break; parity counts such pairs as ties (`npu_parity.HALF_TIE`).

What 16 bits cannot carry stays on the CPU, in `HostStep`: the embedding table, rotary angles (a position of 8,000 times
a frequency needs 23 bits) and the masks that follow from the position. `NpuStep` is the rest, and one delegate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import UserError
from .policies import Policy, SlotView
from .policies.keydiff import KeyDiff
from .policies.sink import Sink
from .shape import CacheShape

# Added to a hidden logit. Large enough that exp() of it is nothing, small enough that the logits beside it keep their
# resolution when 16 bits have to span both.
HIDDEN = -200.0
# Policies whose scores 16 bits can order, with a bound that no score exceeds. A cosine lies in [-1, 1]; a tight bound
# keeps the resolution of quantised scores.
_BOUNDS = {"keydiff": 2.0, "full": 2.0, "knorm": 1e4, "sink": 6e4}
STATE = ("keys", "values", "positions", "state")
# float16 holds whole numbers below this exactly. Scores see the newest token no further up, and tokens before _EARLY,
# attention sinks, where they are.
_EXACT, _EARLY = 2048, 64


def check_policy(policy: Policy, budget: int, block: int, quantised: bool) -> None:
    """Refuses a policy whose scores do not survive 16 bits.

    Raises:
        UserError: naming the policy and those that work.
    """
    allowed = [name for name, bound in _BOUNDS.items() if bound <= 2.0 or not quantised]
    if policy.name not in allowed:
        kind = "quantised scores" if quantised else "16-bit scores"
        raise UserError(
            f"policy {policy.name} cannot be ordered by an NPU's {kind} (they need more digits than that): "
            f"choose {', '.join(sorted(allowed))}, or a CPU target"
        )
    if isinstance(policy, KeyDiff) and (policy.anchor, policy.metric) != ("mean", "cosine"):
        raise UserError(
            f"NPU targets take policy keydiff with anchor=mean and metric=cosine, not anchor={policy.anchor} and "
            f"metric={policy.metric}: choose a CPU target"
        )
    if isinstance(policy, Sink):
        most, slots = min(_EARLY, budget - policy.recent_tokens(budget)), _EXACT - _EARLY
        if policy.sinks > most or budget + block > slots:
            raise UserError(
                f"policy sink orders positions in an NPU's 16 bits: here at most {most} sinks and {slots} slots "
                f"(N + B), got {policy.sinks} and {budget + block}"
            )


class StepInputs(NamedTuple):
    """What the CPU computes for one step of T tokens; N = budget, D = model width, d = head dimension.

    Attributes:
        hidden: [1, T, D] float32, embedded tokens.
        cos, sin: [1, T, d] float32, rotary factors at the true positions.
        mask: [T, N + T] float32, 0 where a query sees a slot, else HIDDEN.
        weights: [N + T] float32, 1 / tokens held where a slot holds a token, else 0. Their product with the keys is a
            mean: a sum over hundreds of slots would leave the range of float16 when squared.
        occupied: [N + T] int32, 1 where a slot holds a token.
        positions: [T] int32, true positions of the new tokens.
        newest: [1] int32, position of the newest token.
        oldest: [1] int32, oldest position inside the recent window.
        shift: [1] int32, how far positions that scores look at are lowered, so that 16 bits tell them apart.
        last: [1, T] float32, 1 at the last valid token.
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor
    weights: Tensor
    occupied: Tensor
    positions: Tensor
    newest: Tensor
    oldest: Tensor
    shift: Tensor
    last: Tensor


@dataclass
class NpuLayer:
    """State of one layer: keys and values [H, N, d] float32, positions [H, N] int32, state [H, N] float32 or None."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    state: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, in graph I/O order."""
        named = {"keys": self.keys, "values": self.values, "positions": self.positions}
        return named if self.state is None else {**named, "state": self.state}


def new_npu_layers(shape: CacheShape, policy: Policy) -> list[NpuLayer]:
    """Empty state for every layer."""
    heads, budget = shape.kv_heads, shape.budget
    keeps_state = policy.slot_state(torch.zeros(heads, 1, shape.head_dim)) is not None
    return [
        NpuLayer(
            torch.zeros(heads, budget, shape.head_dim),
            torch.zeros(heads, budget, shape.head_dim),
            torch.zeros(heads, budget, dtype=torch.int32),
            torch.zeros(heads, budget) if keeps_state else None,
        )
        for _ in range(shape.layers)
    ]


def state_names(layers: list[NpuLayer]) -> list[str]:
    """Names of all state tensors, in graph I/O order: keys_0, values_0, ..."""
    return [f"{name}_{number}" for number, layer in enumerate(layers) for name in layer.tensors()]


class NpuSlotCache:
    """One step over all layers; the attention hook calls `attend` once a layer.

    Args:
        shape: static sizes.
        policy: which tokens stay; see `check_policy`.
        layers: state before the step; replaced layer by layer by the state after it.
        inputs: what the CPU computed for the step.
    """

    def __init__(self, shape: CacheShape, policy: Policy, layers: list[NpuLayer], inputs: StepInputs) -> None:
        self.shape, self.policy, self.layers, self.inputs = shape, policy, layers, inputs
        self.bound = _BOUNDS[policy.name]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attends over held and new tokens, then evicts; shapes as in `attention.AttentionCache`."""
        held = self.layers[layer]
        new = self._new_rows(key, value)
        joined = NpuLayer(*(torch.cat(pair, 1) for pair in zip(_parts(held), _parts(new), strict=True)))
        output = self._attention(query, joined, scaling)
        if not self.policy.evicts:
            self.layers[layer] = self._append(held, new)
        elif key.shape[1] == 1:
            self.layers[layer] = self._replace_worst(held, new, joined)
        else:
            self.layers[layer] = self._gather_best(joined)
        return output

    def _new_rows(self, key: Tensor, value: Tensor) -> NpuLayer:
        positions = self.inputs.positions.expand(key.shape[0], -1)
        return NpuLayer(key, value, positions, self.policy.slot_state(key))

    def _attention(self, query: Tensor, joined: NpuLayer, scaling: float) -> Tensor:
        heads, slots, width = joined.keys.shape
        length = query.shape[1]
        logits = (query * scaling).reshape(heads, -1, width) @ joined.keys.transpose(1, 2)
        visible = logits.view(heads, -1, length, slots) + self.inputs.mask
        output = visible.softmax(-1).view(heads, -1, slots) @ joined.values
        return output.view(-1, length, width)

    def _keep(self, joined: NpuLayer) -> Tensor:
        """[H, N + T], larger stays: the score, above it pinned tokens and the recent window, below it empty slots."""
        inputs, positions = self.inputs, joined.positions
        # Weights that add up to 1 in place of ones: the sum of keys is their mean, and so is its share of the weights.
        total = None
        if self.policy.key_sum() is not None:
            total = torch.bmm(inputs.weights.expand(len(positions), 1, -1), joined.keys).squeeze(1)
        lowered = torch.where(positions < _EARLY, positions, positions - inputs.shift)
        head = torch.arange(len(positions))
        view = SlotView(joined.keys, lowered, inputs.weights, inputs.newest, head, joined.state, total)
        probe = self.policy.probe(view)
        if probe is not None:
            view = replace(view, dots=(joined.keys @ probe.unsqueeze(-1)).squeeze(-1))
        score = self.policy.score(view)
        if self.policy.pinned:
            score = torch.where(positions < self.policy.pinned, self.bound, score)
        if self.policy.recent_tokens(self.shape.budget):
            score = torch.where(positions >= inputs.oldest, self.bound, score)
        return torch.where(inputs.occupied > 0, score, -self.bound)

    def _gather_best(self, joined: NpuLayer) -> NpuLayer:
        """The N best of N + T rows, by one flat index over all heads: a batched index does not delegate."""
        heads, slots, width = joined.keys.shape
        budget = self.shape.budget
        # A head at a time: of a matrix with long rows (640; 256 were right) in 16-bit integers, the HTP emulator orders
        # the first row only, and every index of the others is 0. A view in four dimensions does not help.
        rows = self._keep(joined).split(1)
        best = torch.cat([row.topk(budget, dim=-1).indices.to(torch.int32) for row in rows])
        # A constant, not arange(heads) * slots: QNN's validation of an int32 product fails every few runs.
        offset = torch.tensor([[head * slots] for head in range(heads)], dtype=torch.int32)
        flat = (best + offset).reshape(-1)
        taken = [
            part.reshape(heads * slots, width).index_select(0, flat).view(heads, budget, width)
            if part.dim() == 3
            else part.reshape(-1).index_select(0, flat).view(heads, budget)
            for part in _parts(joined)
        ]
        return NpuLayer(*taken)

    def _replace_worst(self, held: NpuLayer, new: NpuLayer, joined: NpuLayer) -> NpuLayer:
        """Writes the one new row over the worst slot; if that is its own, it is written nowhere."""
        worst = self._keep(joined).argmin(-1, keepdim=True).to(torch.int32)
        here = torch.arange(self.shape.budget, dtype=torch.int32) == worst
        return self._select(here, new, held)

    def _append(self, held: NpuLayer, new: NpuLayer) -> NpuLayer:
        """Without eviction a token's slot is its position; rows of padding land behind the last token, or nowhere."""
        heads, length, _ = new.keys.shape
        slot = torch.arange(self.shape.budget, dtype=torch.int32).unsqueeze(1)
        place = slot == self.inputs.positions
        here = place.to(torch.int32).sum(-1) > 0
        if length == 1:
            return self._select(here.expand(heads, -1), new, held)
        spread = place.to(torch.float32)
        rows = NpuLayer(spread @ new.keys, spread @ new.values, slot.squeeze(1).expand(heads, -1))
        return self._select(here.expand(heads, -1), rows, held)

    def _select(self, here: Tensor, new: NpuLayer, old: NpuLayer) -> NpuLayer:
        pairs = zip(_parts(new), _parts(old), strict=True)
        return NpuLayer(*(torch.where(here.unsqueeze(-1) if a.dim() == 3 else here, a, b) for a, b in pairs))


def _parts(layer: NpuLayer) -> list[Tensor]:
    return list(layer.tensors().values())


class HostStep(nn.Module):
    """The CPU's share of a step: (tokens [1, T], start [1], count [1], all int64) -> `StepInputs`.

    Args:
        model: a causal LM prepared for slot attention; make this before `NpuStep` takes the model over.
        shape: static sizes.
        policy: decides the recent window.
        length: T; B for prefill, 1 for decode.
    """

    def __init__(self, model: nn.Module, shape: CacheShape, policy: Policy, length: int) -> None:
        super().__init__()
        self.embedding, self.rotary = model.get_input_embeddings(), model.model.rotary_emb
        self.budget, self.length = shape.budget, length
        self.recent = policy.recent_tokens(shape.budget)

    def forward(self, tokens: Tensor, start: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        slot, row = torch.arange(self.budget + self.length), torch.arange(self.length)
        held = start.clamp_max(self.budget)
        hidden = self.embedding(tokens)
        cos, sin = self.rotary(hidden, (start + row).unsqueeze(0))
        new = slot - self.budget
        occupied = (slot < held) | ((new >= 0) & (new < count))
        visible = (slot < held) | ((new >= 0) & (new <= row.unsqueeze(1)))
        step = StepInputs(
            hidden,
            cos,
            sin,
            torch.where(visible, 0.0, HIDDEN),
            occupied.to(torch.float32) / (held + count).to(torch.float32),
            occupied.to(torch.int32),
            (start + row).to(torch.int32),
            (start + count - 1).to(torch.int32),
            (start + count - self.recent).to(torch.int32),
            (start + count - _EXACT).clamp_min(0).to(torch.int32),
            (row == count - 1).to(torch.float32).unsqueeze(0),
        )
        return tuple(step)  # torch.export takes no named tuple


class NpuStep(nn.Module):
    """The NPU's share: (*StepInputs, *state) -> (logits [1, V], *state).

    Takes the model over: rotary embedding and norms are replaced (`_GivenRotary`, `FusedNorm`, `_LastToken`), the
    Hugging Face classes around them stay as they are.
    """

    def __init__(self, model: nn.Module, shape: CacheShape, policy: Policy) -> None:
        super().__init__()
        self.model, self.shape, self.policy = model, shape, policy
        self.names = tuple(new_npu_layers(replace(shape, layers=1), policy)[0].tensors())
        fuse_norms(model)
        self.rotary = model.model.rotary_emb = _GivenRotary()
        self.last = model.model.norm = _LastToken(model.model.norm)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, state = StepInputs(*tensors[: len(StepInputs._fields)]), iter(tensors[len(StepInputs._fields) :])
        layers = [NpuLayer(**{name: next(state) for name in self.names}) for _ in range(self.shape.layers)]
        cache = NpuSlotCache(self.shape, self.policy, layers, inputs)
        self.rotary.factors, self.last.choice = (inputs.cos, inputs.sin), inputs.last
        output = self.model(
            inputs_embeds=inputs.hidden,
            position_ids=inputs.positions.unsqueeze(0),
            use_cache=False,
            slot_cache=cache,
        )
        return (output.logits[:, 0], *(tensor for layer in cache.layers for tensor in layer.tensors().values()))


class _GivenRotary(nn.Module):
    """Stands in for the model's rotary embedding and returns what `HostStep` computed in float32."""

    factors: tuple[Tensor, Tensor]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.factors


class _LastToken(nn.Module):
    """The final norm of the last valid token only, [1, T, D] -> [1, 1, D].

    The token is picked by a product: an index from outside does not delegate in both runtimes.
    """

    choice: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x if x.shape[1] == 1 else (self.choice @ x[0]).unsqueeze(0))


class FusedNorm(nn.Module):
    """RMSNorm as one operator: x [..., D] -> [..., D].

    Written out, as Hugging Face has it, its squares overflow float16 for activations above 255, which every model has
    somewhere (the demo model's reach 22,000); QNN's own operator holds them.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return torch.onnx.ops.symbolic(
                "::RMSNormalization",
                [x, self.weight],
                {"axis": -1, "epsilon": self.epsilon},
                dtype=x.dtype,
                shape=list(x.shape),
            )
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def fuse_norms(model: nn.Module) -> None:
    """Replaces every RMSNorm of a Hugging Face model by `FusedNorm` with the same weight."""
    for parent, name, norm in list(_norms(model)):
        setattr(parent, name, FusedNorm(norm.weight, float(norm.variance_epsilon)))


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                yield parent, name, child
