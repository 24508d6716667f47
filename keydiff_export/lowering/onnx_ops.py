"""The slot operations as ONNX operators, chosen so that ONNX Runtime writes the caches in place.

ScatterND and GroupQueryAttention write into their input's buffer when the same buffer is bound as graph input and graph
output, so a decode step touches one row a cache. FusedMatMul and GroupQueryAttention come with every ONNX Runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out


def _onnx(name: str, inputs: list[Tensor], shape: list[int], like: Tensor, **attributes: int | float) -> Tensor:
    return symbolic(name, inputs, attributes, dtype=like.dtype, shape=shape)


class OnnxOps:
    """Slots are stored as [1, H, S, width], the layout of GroupQueryAttention, or [H, S]; every write returns a new

    tensor, as ONNX has no mutation.
    """

    fuses = True

    def allocate(self, heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((1, heads, slots, width) if width else (heads, slots), dtype=dtype)

    def view(self, slots: Tensor) -> Tensor:
        return slots.squeeze(0) if slots.dim() == 4 else slots

    def address(self, index: Tensor) -> Tensor:
        head = torch.arange(index.shape[0]).unsqueeze(1).expand_as(index)
        return torch.stack([head, index], dim=-1)

    def addresses(self, index: Tensor, heads: int) -> list[Tensor]:
        head = torch.arange(heads).repeat(index.shape[0] // heads).unsqueeze(1).expand_as(index)
        return list(torch.stack([torch.zeros_like(head), head, index], dim=-1).split(heads))

    def layers(self, tensor: Tensor, heads: int) -> list[Tensor]:
        # Not slices: ONNX Runtime would join them to one node behind all others, and the probes would wait for it.
        return list(tensor.split(heads))

    def write(self, slots: Tensor, address: Tensor, rows: Tensor) -> Tensor:
        return _onnx("::ScatterND", [slots, address, rows], list(slots.shape), slots)

    def take(self, slots: Tensor, address: Tensor) -> Tensor:
        shape = [*address.shape[:2], *slots.shape[address.shape[-1] :]]
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
        shape = [*left.shape[:-1], right.shape[-2 if transpose else -1]]
        return _onnx("com.microsoft::FusedMatMul", [left, right], shape, left, transB=int(transpose), alpha=scaling)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, held: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, length, width = key.shape
        total = (held + length).to(torch.int32)
        rows = [part.transpose(0, 1).reshape(1, length, -1) for part in (query, key, value)]
        output, appended_keys, appended_values = symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            # Of the tokens in the cache all but the last are counted; causal masking hides a block's padding.
            [*rows, keys, values, total - 1, total],
            {"num_heads": len(query), "kv_num_heads": heads, "scale": scaling},
            dtypes=[torch.float32] * 3,
            shapes=[list(rows[0].shape), list(keys.shape), list(values.shape)],
        )
        return output.reshape(length, -1, width).transpose(0, 1), appended_keys, appended_values

    def last_of_largest(self, numbers: Tensor, positions: Tensor) -> Tensor:
        # A product and not a selection, which takes several times as long. Position 0 never leaves slot 0 for another
        # slot, and of zeros alone argmax takes the first.
        largest = (numbers == numbers.amax(-1, keepdim=True)).to(torch.float32)
        return (largest * positions).argmax(-1)

    def after(self, index: Tensor, *results: Tensor) -> Tensor:
        # Both writes of a prefill step go to one buffer, so the second waits for what reads the first's result.
        for result in results:
            index = index + (result.reshape(-1)[:1] > float("inf")).to(torch.int64)
        return index
