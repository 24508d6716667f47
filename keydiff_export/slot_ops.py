"""What a backend must be able to do with slots, and the same in plain PyTorch."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class SlotOps(Protocol):
    """The operations that a backend spells in its own operators. T rows, H heads.

    Attributes:
        fuses: whether attention is one operator, `attend`, which is faster than its parts.
    """

    fuses: bool

    def allocate(self, heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
        """Zeroed slots of `width` numbers each; width 0 means one number without an axis of its own."""

    def view(self, slots: Tensor) -> Tensor:
        """[H, S, width], or [H, S] for width 0."""

    def address(self, index: Tensor) -> Any:
        """Turns slots index [H, T] into what `write` and `take` use, for tensors that all layers share."""

    def addresses(self, index: Tensor, heads: int) -> list[Any]:
        """Addresses for the tensors that every layer has of its own, each `heads` rows of index [L * heads, T]."""

    def layers(self, tensor: Tensor, heads: int) -> list[Tensor]:
        """The rows of every layer, `heads` each, of a tensor [L * heads, ...]."""

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

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, held: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Appends key and value [H, T, d] to the slots `keys` and `values` at slot `held` (int64 [1]).

        query [H * R, T, d] sees the slots up to its own. Returns its output, of the query's shape, and both slots.
        """

    def last_of_largest(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """[H, S] float32 -> [H] slots of the largest number, of equal ones that of the highest position (float32)."""

    def after(self, index: Tensor, *results: Tensor) -> Tensor:
        """The index, computed no sooner than the results: rows at it move only once they were read."""


def leaving_order(leaving: Tensor, positions: Tensor) -> Tensor:
    """[H, S] float64, ordered as leaving is, and of equal numbers the higher position has more.

    The weight of a position is far below a float32 rounding step (2**-24) for every position up to 2**24, so it orders
    equal numbers and never reorders different ones; the smallest addend, below every float32, orders zeros.
    """
    exact = leaving.double()
    # Tensors, because a backend may hold a Python number in float32.
    least, weight = torch.tensor([1e-60, 2.0**-51], dtype=torch.float64)
    return exact + (exact.abs() + least) * (positions * weight)


class TorchOps:
    """The slot operations in plain, functional PyTorch: the static graph before any lowering."""

    fuses = False

    def allocate(self, heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((heads, slots, width) if width else (heads, slots), dtype=dtype)

    def view(self, slots: Tensor) -> Tensor:
        return slots

    def address(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(index.shape[0]).unsqueeze(1), index

    def addresses(self, index: Tensor, heads: int) -> list[tuple[Tensor, Tensor]]:
        return [self.address(rows) for rows in index.split(heads)]

    def layers(self, tensor: Tensor, heads: int) -> list[Tensor]:
        return list(tensor.split(heads))

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

    def attend(self, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("attention is spelled out")

    def last_of_largest(self, numbers: Tensor, positions: Tensor) -> Tensor:
        largest = numbers == numbers.amax(-1, keepdim=True)
        return torch.where(largest, positions, -1.0).argmax(-1)

    def after(self, index: Tensor, *results: Tensor) -> Tensor:
        return index
