"""The slot operations as ONNX operators, chosen so that ONNX Runtime writes the caches in place.

ScatterND writes into its input's buffer when the same buffer is bound as graph input and graph output, so a decode step
touches one row a cache. FusedMatMul (a stock ONNX Runtime operator) multiplies with the transposed cache as it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic


def _onnx(name: str, inputs: list[Tensor], shape: list[int], like: Tensor, **attributes: int | float) -> Tensor:
    return symbolic(name, inputs, attributes, dtype=like.dtype, shape=shape)


class OnnxOps:
    """Slots are stored as [H, S, width] or [H, S]; every write returns a new tensor, as ONNX has no mutation."""

    def allocate(self, heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((heads, slots, width) if width else (heads, slots), dtype=dtype)

    def view(self, slots: Tensor) -> Tensor:
        return slots

    def address(self, index: Tensor) -> Tensor:
        head = torch.arange(index.shape[0]).unsqueeze(1).expand_as(index)
        return torch.stack([head, index], dim=-1)

    def addresses(self, index: Tensor, heads: int) -> list[Tensor]:
        head = torch.arange(heads).repeat(index.shape[0] // heads).unsqueeze(1).expand_as(index)
        return list(torch.stack([head, index], dim=-1).split(heads))

    def write(self, slots: Tensor, address: Tensor, rows: Tensor) -> Tensor:
        return _onnx("::ScatterND", [slots, address, rows], list(slots.shape), slots)

    def take(self, slots: Tensor, address: Tensor) -> Tensor:
        shape = [*address.shape[:2], *slots.shape[2:]]
        return _onnx("::GatherND", [slots, address], shape, slots)

    def overwrite(self, target: Tensor, value: Tensor) -> Tensor:
        return value

    def pack(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return (numbers.round() if dtype is torch.int8 else numbers).to(dtype)

    def numbers(self, packed: Tensor) -> Tensor:
        return packed.to(torch.float32)

    def product(self, left: Tensor, right: Tensor, transpose: bool = False, scaling: float = 1.0) -> Tensor:
        # A plain MatMul between two reshapes is rewritten by onnxscript's optimizer into a broadcast over the wrong
        # axis when the query heads a KV head are as many as the KV heads; a fused one is left as it is.
        shape = [*left.shape[:2], right.shape[1 if transpose else 2]]
        return _onnx("com.microsoft::FusedMatMul", [left, right], shape, left, transB=int(transpose), alpha=scaling)

    def last_of_largest(self, numbers: Tensor, positions: Tensor) -> Tensor:
        largest = numbers == numbers.amax(-1, keepdim=True)
        return torch.where(largest, positions, -1.0).argmax(-1)

    def after(self, index: Tensor, *results: Tensor) -> Tensor:
        # Both writes of a prefill step go to one buffer, so the second waits for what reads the first's result.
        for result in results:
            index = index + (result.reshape(-1)[:1] > float("inf")).to(torch.int64)
        return index
