"""What a policy costs: one attention layer with it and without eviction, through every target, step by step in turn.

The layer stands in a model of random weights with a small MLP, so that attention and eviction are what is measured.
Figures are processor time of one thread: on a machine that does other things as well, wall time would measure those.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .attention import ATTENTION_NAME
from .complexity import Needs
from .inspection import inspect_program
from .lowering import Phases, get_target
from .models import cache_shape
from .policies import Policy
from .runtime import open_artifact
from .runtime.base import Runner
from .shape import CacheShape
from .slot_ops import TorchOps
from .slots import new_slots

VOCABULARY = 64
DECODE_REPEATS, PREFILL_REPEATS, WARM_UP = 100, 15, 3


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the measured layer; SmolLM2-135M's by default."""

    query_heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64


def one_layer_model(shape: LayerShape) -> torch.nn.Module:
    """A Llama of one layer, random weights, ready for slot attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=shape.query_heads * shape.head_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2**20,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION_NAME)
    return model


def policy_state_bytes(shape: CacheShape, policy: Policy) -> int:
    """Bytes a layer that a policy keeps beside keys, values and positions."""
    slots = new_slots(shape, policy, TorchOps())
    return sum(t.nbytes for t in (slots.state, slots.total) if t is not None) // shape.layers


def policy_needs(policy: Policy) -> Needs:
    """What a policy asks for, as `complexity` counts it."""
    wanted = policy.key_sum()
    return Needs(
        slot_number=policy.slot_state(torch.zeros(1, 1, 1)) is not None,
        key_sum=wanted is not None,
        decays=wanted is not None and wanted.decay > 0,
        probe=type(policy).probe is not Policy.probe,
        queries=policy.observed_queries(),
    )


def bench_policies(
    policies: dict[str, Policy],
    target: str,
    slots: int,
    block: int,
    folder: Path,
    shape: LayerShape = LayerShape(),
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Decode and prefill of one layer under every policy, each step paired with the same step without eviction.

    Args:
        policies: by the name to report; one that does not evict is the baseline and must be there as "full".
        target: name of the lowering.
        slots: N + B.
        block: B.
        folder: scratch folder for the artifacts.
        report: told each policy as it is lowered.

    Returns:
        One row a policy: milliseconds of both steps, milliseconds that eviction adds (median of paired differences,
        with the smallest and largest), operators of both methods, and bytes of state.
    """
    model = one_layer_model(shape)
    sizes = cache_shape(model.config, slots - block, block)
    runners: dict[str, Runner] = {}
    operators: dict[str, dict[str, int]] = {}
    for name, policy in policies.items():
        report(f"{target}, {slots} slots: {name}")
        place = folder / f"{target}-{slots}-{len(runners)}"
        runners[name], operators[name] = lowered_runner(model, target, sizes, policy, place)
    rows: list[dict[str, Any]] = [
        {
            "target": target,
            "slots": slots,
            "policy": name,
            "state_bytes": policy_state_bytes(sizes, policy),
            "operators": operators[name],
        }
        for name, policy in policies.items()
    ]
    for method, length, repeats in (("decode", 1, DECODE_REPEATS), ("prefill", block, PREFILL_REPEATS)):
        times = in_turn(runners, length, repeats)
        for row in rows:
            own, base = times[row["policy"]], times["full"]
            added = [a - b for a, b in zip(own, base, strict=True)]
            row[method] = {
                "ms": statistics.median(own),
                "added_ms": statistics.median(added),
                "added_ms_range": [min(added), max(added)],
            }
    return rows


def lowered_runner(
    model: torch.nn.Module, target: str, sizes: CacheShape, policy: Policy, place: Path
) -> tuple[Runner, dict[str, int]]:
    """Lowers a model in float32 into a new folder and opens it with one thread; with it, operators by method."""
    lowering = get_target(target)
    place.mkdir(parents=True)
    lowering.lower(model, "none", sizes, policy, place, Phases(lambda phase, seconds: None))
    methods = inspect_program(place, lowering.runtime)
    operators = {m: sum(methods[m]["kernels_outside_delegates"].values()) for m in ("decode", "prefill")}
    return open_artifact(place, lowering.runtime, sizes.budget, sizes.block, threads=1), operators


def in_turn(runners: dict[str, Runner], length: int | None, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of processor time a step of `length` tokens, or of each runner's block; every cache full."""
    tokens = torch.randint(0, VOCABULARY, (max(r.block for r in runners.values()),)).tolist()
    for runner in runners.values():
        runner.reset()
        while runner.seen <= runner.budget + runner.block:
            runner.step(tokens[: runner.block])
        for _ in range(WARM_UP):
            runner.step(tokens[: length or runner.block])
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, runner in runners.items():
            began = time.process_time()
            runner.step(tokens[: length or runner.block])
            times[name].append((time.process_time() - began) * 1e3)
    return times


def relative_latency(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """The paper's Table 19: per target and policy, the prefill latency that eviction adds at each number of slots, over

    KeyDiff's at the smallest.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target and row["policy"] != "full"]
        keydiff = [row for row in own if row["policy"] == "keydiff"]
        if not keydiff:
            continue
        unit = min(keydiff, key=lambda row: row["slots"])["prefill"]["added_ms"]
        table: dict[str, dict[int, float]] = {}
        for row in own:
            table.setdefault(row["policy"], {})[row["slots"]] = row["prefill"]["added_ms"] / unit
        found[target] = table
    return found
