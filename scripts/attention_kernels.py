"""ExecuTorch's custom_sdpa against attention spelled out in an XNNPACK delegate: processor time of one thread."""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers torch.ops.llama)
from executorch.extension.pybindings import portable_lib
from torch import Tensor

HEADS, GROUPS, WIDTH = 3, 3, 64


class Custom(torch.nn.Module):
    """custom_sdpa over all slots, a KV head being a batch entry."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        start = keys.shape[1] - query.shape[2]
        return torch.ops.llama.custom_sdpa(
            query.transpose(1, 2), keys.unsqueeze(2), values.unsqueeze(2), start, None, 0.0, True, 0.125
        )


class SpelledOut(torch.nn.Module):
    """Product, mask, softmax, product."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        rows = query.reshape(HEADS, -1, WIDTH) * 0.125
        weights = (torch.bmm(rows, keys.transpose(1, 2)) + mask).softmax(-1)
        return torch.bmm(weights, values)


def milliseconds(module: torch.nn.Module, arguments: tuple[Tensor, ...], delegate: bool, repeats: int) -> float:
    """Median of a call."""
    program = to_edge_transform_and_lower(
        torch.export.export(module, arguments),
        partitioner=[XnnpackPartitioner()] if delegate else [],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    ).to_executorch()
    buffer = program.buffer  # the loaded program reads from it
    loaded = portable_lib._load_for_executorch_from_buffer(buffer)
    loaded.run_method("forward", list(arguments))
    times = []
    for _ in range(repeats):
        began = time.process_time()
        loaded.run_method("forward", list(arguments))
        times.append((time.process_time() - began) * 1e3)
    return statistics.median(times)


def main() -> None:
    """One line a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[640, 1152, 2176])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    portable_lib._unsafe_reset_threadpool(1)
    print("| slots | new tokens | custom_sdpa ms | spelled out in XNNPACK ms | ratio |\n|---|---|---|---|---|")
    for slots in options.slots:
        for length in (1, 128):
            query = torch.randn(HEADS, GROUPS, length, WIDTH)
            keys, values = torch.randn(2, HEADS, slots, WIDTH).unbind(0)
            future = torch.arange(slots) > (slots - length + torch.arange(length)).unsqueeze(1)
            mask = torch.where(future, -float("inf"), 0.0).repeat(GROUPS, 1)
            arguments = (query, keys, values, mask)
            repeats = 200 if length == 1 else 9
            custom = milliseconds(Custom(), arguments, False, repeats)
            spelled = milliseconds(SpelledOut(), arguments, True, repeats)
            print(f"| {slots} | {length} | {custom:.3f} | {spelled:.3f} | {spelled / custom:.2f} |", flush=True)


if __name__ == "__main__":
    main()
