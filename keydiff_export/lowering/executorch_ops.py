"""The slot operations in ExecuTorch's stock operators; rows are written by `llama::update_cache_with_indices`.

It comes with every ExecuTorch LLM build, the Android package included. A KV head is a batch entry, so one call writes
different rows a head.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers torch.ops.llama)
from torch import Tensor
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  (registers the library)

_QUANTIZED = torch.ops.quantized_decomposed


class Address:
    """Slots by index [H, T] for the custom operator, and flattened over heads for index_select."""

    def __init__(self, index: Tensor) -> None:
        self.index = index.contiguous()

    @cached_property
    def _head(self) -> Tensor:
        return torch.arange(self.index.shape[0]).unsqueeze(1)

    def flat(self, slots: int) -> Tensor:
        """[H * T] rows of slots flattened over heads."""
        return (self.index + self._head * slots).reshape(-1)


class _Layers:
    """The index [L * H, T] of all layers, cut into layers once a use: a step that only writes never flattens."""

    def __init__(self, index: Tensor, heads: int) -> None:
        self.index, self.heads = index.contiguous(), heads
        self._flat: list[Tensor] = []

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        """[H, T] a layer."""
        return self.index.split(self.heads)

    def flat(self, slots: int) -> list[Tensor]:
        """[H * T] a layer, rows of its slots flattened over heads."""
        if not self._flat:
            head = torch.arange(self.heads).repeat(self.index.shape[0] // self.heads).unsqueeze(1)
            rows = self.index + head * slots
            self._flat = [part.reshape(-1) for part in rows.split(self.heads)]
        return self._flat


class _LayerAddress(Address):
    """One layer's part of `_Layers`."""

    def __init__(self, layers: _Layers, layer: int) -> None:
        self._layers, self._layer = layers, layer

    @property
    def index(self) -> Tensor:
        return self._layers.parts[self._layer]

    def flat(self, slots: int) -> Tensor:
        return self._layers.flat(slots)[self._layer]


class ExecuTorchOps:
    """Slots are stored as [H, S, 1, width], the layout that the custom operators take, and written in place."""

    fuses = False

    def allocate(self, heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(heads, slots, 1, max(width, 1), dtype=dtype)

    def view(self, slots: Tensor) -> Tensor:
        heads, count, _, width = slots.shape
        return slots.view((heads, count, width) if width > 1 else (heads, count))

    def address(self, index: Tensor) -> Address:
        return Address(index)

    def addresses(self, index: Tensor, heads: int) -> list[Address]:
        layers = _Layers(index, heads)
        return [_LayerAddress(layers, layer) for layer in range(index.shape[0] // heads)]

    def layers(self, tensor: Tensor, heads: int) -> list[Tensor]:
        # Slices, not a split, which a delegate lacks.
        return [tensor[first : first + heads] for first in range(0, tensor.shape[0], heads)]

    def write(self, slots: Tensor, address: Address, rows: Tensor) -> Tensor:
        heads, length = address.index.shape
        rows = rows.reshape(heads, length, 1, -1)
        torch.ops.llama.update_cache_with_indices(rows, slots, 0, address.index)
        return slots

    def take(self, slots: Tensor, address: Address) -> Tensor:
        heads, count, _, width = slots.shape
        return slots.view(heads * count, width).index_select(0, address.flat(count))

    def overwrite(self, target: Tensor, value: Tensor) -> Tensor:
        target.copy_(value.reshape(target.shape))
        return target

    def pack(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype is torch.int8:
            # With a scale of 1 this rounds and converts, and XNNPACK does it inside a delegate.
            return _QUANTIZED.quantize_per_tensor(numbers, 1.0, 0, -127, 127, dtype)
        return numbers.to(dtype)

    def numbers(self, packed: Tensor) -> Tensor:
        if packed.dtype is torch.int8:
            return _QUANTIZED.dequantize_per_tensor(packed, 1.0, 0, -128, 127, packed.dtype)
        return packed.to(torch.float32)

    def product(self, left: Tensor, right: Tensor, transpose: bool = False, scaling: float = 1.0) -> Tensor:
        scaled = left if scaling == 1.0 else left * scaling
        return torch.bmm(scaled, right.transpose(1, 2) if transpose else right)

    def attend(self, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("attention is spelled out")

    def last_of_largest(self, numbers: Tensor, positions: Tensor) -> Tensor:
        # In a delegate all but the maximum: comparing and selecting cost several times as much in the portable kernels.
        # 1 for the largest, else 0; a difference below 1e-38 would be no difference.
        largest = 1.0 - ((numbers.amax(-1, keepdim=True) - numbers) * 1e38).clamp(0.0, 1.0)
        # Whole numbers, all different where it matters: so far apart, softmax is exactly 1 at the largest, else 0.
        chosen = ((largest * (positions + 1.0)) * 1e30).softmax(-1)
        slot = torch.arange(numbers.shape[-1], dtype=torch.float32)
        return (chosen * slot).sum(-1).round().to(torch.int64)

    def after(self, index: Tensor, *results: Tensor) -> Tensor:
        # In-place writes are ordered by nothing but data: without this, a policy that does not look at the keys could
        # have its moves scheduled before the attention that still reads the old rows. No number exceeds infinity.
        for result in results:
            index = index + (result.reshape(-1)[:1] > float("inf")).to(torch.int64)
        return index
