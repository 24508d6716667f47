"""The slot operations in ExecuTorch's stock operators; rows are written by `llama::update_cache_with_indices`.

It comes with every ExecuTorch LLM build, the Android package included. A KV head is a batch entry, so one call writes
different rows a head.
"""

from __future__ import annotations

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers torch.ops.llama)
from torch import Tensor
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  (registers the library)

from ..slots import leaving_order

_QUANTIZED = torch.ops.quantized_decomposed


class Address:
    """Slots by index [H, T] for the custom operator, and flattened over heads for index_select."""

    def __init__(self, index: Tensor) -> None:
        self.index = index.contiguous()
        self._flat: Tensor | None = None

    def flat(self, slots: int) -> Tensor:
        """[H * T] rows of slots flattened over heads."""
        if self._flat is None:
            offset = torch.arange(self.index.shape[0]).unsqueeze(1) * slots
            self._flat = (self.index + offset).reshape(-1)
        return self._flat


class ExecuTorchOps:
    """Slots are stored as [H, S, 1, width], the layout that the custom operators take, and written in place."""

    def allocate(self, heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(heads, slots, 1, max(width, 1), dtype=dtype)

    def view(self, slots: Tensor) -> Tensor:
        heads, count, _, width = slots.shape
        return slots.view((heads, count, width) if width > 1 else (heads, count))

    def address(self, index: Tensor) -> Address:
        return Address(index)

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

    def last_of_largest(self, numbers: Tensor, positions: Tensor) -> Tensor:
        # One pass over doubles: comparing and selecting cost several times as much in the portable kernels.
        return leaving_order(numbers, positions).argmax(-1)

    def after(self, index: Tensor, *results: Tensor) -> Tensor:
        # In-place writes are ordered by nothing but data: without this, a policy that does not look at the keys could
        # have its moves scheduled before the attention that still reads the old rows. No number exceeds infinity.
        for result in results:
            index = index + (result.reshape(-1)[:1] > float("inf")).to(torch.int64)
        return index
